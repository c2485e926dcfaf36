//! The few netlink requests that netd needs, and what it reads, in its own words.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "attributes of netlink are open sets: what is not known is skipped"
)]

use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    Error, Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, State},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};
use tombolo_runtime::TaskGroup;

/// Marks our routes: "T". Numbers below 128 are not given to anybody else by iproute2 or the kernel.
const OURS: RouteProtocol = RouteProtocol::Other(0x54);

/// A connection to the kernel.
#[derive(Debug)]
pub(super) struct Netlink(Handle);

/// A link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) is_tun: bool,
    pub(super) is_up: bool,
    /// Somebody is attached.
    pub(super) has_carrier: bool,
    /// The kernel has acted on the carrier: before, it drops what is sent.
    pub(super) is_operational: bool,
}

/// An address of a link.
#[derive(Debug, Clone)]
pub(super) struct Address {
    pub(super) link: u32,
    pub(super) address: IpAddr,
    /// Good for talking to other hosts.
    pub(super) is_global: bool,
    message: AddressMessage,
}

/// What a route does with packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RouteKind {
    /// They go somewhere.
    Delivers,
    /// They are refused or dropped.
    Refuses,
}

/// A route of any table.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) destination: IpNet,
    /// `None`: several.
    pub(super) link: Option<u32>,
    pub(super) kind: RouteKind,
    pub(super) is_ours: bool,
    message: RouteMessage,
}

impl Netlink {
    pub(super) fn new(tasks: &TaskGroup) -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tasks.spawn("netlink", connection);
        Ok(Self(handle))
    }

    /// A link by name.
    pub(super) async fn link(&self, name: &str) -> Result<Option<Link>, Error> {
        let mut links = self.0.link().get().match_name(name.to_owned()).execute();
        let message = match links.try_next().await {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(None),
            Err(Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => return Ok(None),
            Err(error) => return Err(error),
        };
        let is_tun = message.attributes.iter().any(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Tun)),
            _ => false,
        });
        let flags = message.header.flags;
        // Unknown: it had its carrier from the start.
        let states = [State::Up, State::Unknown].map(LinkAttribute::OperState);
        let is_operational = flags.contains(LinkFlags::LowerUp)
            && states.iter().any(|state| message.attributes.contains(state));
        Ok(Some(Link {
            index: message.header.index,
            is_tun,
            is_up: flags.contains(LinkFlags::Up),
            has_carrier: flags.contains(LinkFlags::LowerUp),
            is_operational,
        }))
    }

    /// The name of a link.
    pub(super) async fn link_name(&self, index: u32) -> Option<String> {
        let mut links = self.0.link().get().match_index(index).execute();
        let message = links.try_next().await.ok()??;
        message
            .attributes
            .into_iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            })
    }

    pub(super) async fn set_link_up(&self, index: u32, mtu: u32, queue_frames: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index)
            .mtu(mtu)
            .txqueuelen(queue_frames)
            .up();
        self.0.link().set(message.build()).execute().await
    }

    pub(super) async fn remove_link(&self, index: u32) -> Result<(), Error> {
        self.0.link().del(index).execute().await
    }

    /// All addresses of all links.
    pub(super) async fn addresses(&self) -> Result<Vec<Address>, Error> {
        let messages: Vec<_> = self.0.address().get().execute().try_collect().await?;
        Ok(messages.into_iter().filter_map(address).collect())
    }

    /// Adds a single address to a link; again is no error.
    pub(super) async fn add_address(&self, link: u32, address: IpAddr) -> Result<(), Error> {
        let length = if address.is_ipv6() { 128 } else { 32 };
        let mut request = self.0.address().add(link, address, length).replace();
        if address.is_ipv6() {
            // It is the only one on the link: there is nobody to ask whether it is taken. And no prefix route.
            let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
            request
                .message_mut()
                .attributes
                .push(AddressAttribute::Flags(flags));
        }
        request.execute().await
    }

    pub(super) async fn remove_address(&self, address: &Address) -> Result<(), Error> {
        self.0.address().del(address.message.clone()).execute().await
    }

    /// All routes of both families and all tables.
    pub(super) async fn routes(&self) -> Result<Vec<Route>, Error> {
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let mut routes = Vec::new();
        for family in [v4, v6] {
            let messages: Vec<_> = self.0.route().get(family).execute().try_collect().await?;
            routes.extend(messages.into_iter().filter_map(route));
        }
        Ok(routes)
    }

    /// Adds a route by a link; again is no error.
    pub(super) async fn add_route(&self, prefix: IpNet, link: u32, source: IpAddr) -> Result<(), Error> {
        let message = match (prefix, source) {
            (IpNet::V4(net), IpAddr::V4(source)) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(net.network(), net.prefix_len())
                .output_interface(link)
                .pref_source(source)
                .scope(RouteScope::Link)
                .protocol(OURS)
                .build(),
            (IpNet::V6(net), IpAddr::V6(source)) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(net.network(), net.prefix_len())
                .output_interface(link)
                .pref_source(source)
                .protocol(OURS)
                .build(),
            _ => return Err(Error::RequestFailed),
        };
        self.0.route().add(message).replace().execute().await
    }

    /// Adds a route that refuses; again is no error.
    pub(super) async fn add_unreachable(&self, prefix: IpNet, metric: u32) -> Result<(), Error> {
        let message = match prefix {
            IpNet::V4(net) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(net.network(), net.prefix_len())
                .kind(RouteType::Unreachable)
                .priority(metric)
                .protocol(OURS)
                .build(),
            IpNet::V6(net) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(net.network(), net.prefix_len())
                .kind(RouteType::Unreachable)
                .priority(metric)
                .protocol(OURS)
                .build(),
        };
        self.0.route().add(message).replace().execute().await
    }

    /// Removes a route; one that is gone already is no error.
    pub(super) async fn remove_route(&self, route: Route) -> Result<(), Error> {
        match self.0.route().del(route.message).execute().await {
            Err(Error::NetlinkError(error)) if error.raw_code() == -libc::ESRCH => Ok(()),
            other => other,
        }
    }
}

fn address(message: AddressMessage) -> Option<Address> {
    let (mut peer, mut local) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Local(address) => local = Some(*address),
            _ => {}
        }
    }
    Some(Address {
        link: message.header.index,
        address: local.or(peer)?,
        is_global: message.header.scope == AddressScope::Universe,
        message,
    })
}

fn route(message: RouteMessage) -> Option<Route> {
    let header = &message.header;
    let kind = match header.kind {
        RouteType::Unicast | RouteType::Local | RouteType::Anycast | RouteType::Nat => RouteKind::Delivers,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            RouteKind::Refuses
        }
        _ => return None,
    };
    let (mut destination, mut link) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                destination = Some(IpAddr::V4(*address))
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                destination = Some(IpAddr::V6(*address))
            }
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    // A default route has no destination.
    let destination = IpNet::new(destination?, header.destination_prefix_length).ok()?;
    Some(Route {
        destination,
        link,
        kind,
        is_ours: header.protocol == OURS,
        message,
    })
}

#[cfg(test)]
impl Route {
    /// A route of somebody else.
    pub(super) fn example(destination: IpNet, link: Option<u32>) -> Self {
        let message = RouteMessage::default();
        Self {
            destination,
            link,
            kind: RouteKind::Delivers,
            is_ours: false,
            message,
        }
    }
}
