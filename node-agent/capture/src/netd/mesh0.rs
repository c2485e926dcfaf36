use super::{
    Families, NetdError,
    message::Refusal,
    netlink::{Netlink, Route, RouteKind},
};
use crate::device;
use ipnet::IpNet;
use std::{
    fs, io,
    net::IpAddr,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};
use tombolo_runtime::TaskGroup;
use tombolo_types::{AddressPlan, Code};

/// MTU of mesh0, in bytes: near the longest IPv4 packet, 65,535. Nothing of it is seen outside
/// of the host. Measured against 1,500, where bulk data crosses in super-segments, too: 0.33 instead of 0.43 CPU
/// seconds of the agent per GB up, 0.38 instead of 0.52 down; half the acknowledgments; a sender of 3,000-byte writes
/// without TCP_NODELAY three times as fast; small messages and connections the same. It is as large as loopback's, so
/// that applications have met it.
const MTU: u32 = 65_520;
/// Frames that wait to be read: a SYN of each connection that may be held, and half as many segments again would be
/// lost in a burst with the kernel's 500.
const QUEUE_FRAMES: u32 = 4096;
/// So long the kernel may take to act on a new carrier; then netd goes on without.
const OPERATIONAL_WITHIN: Duration = Duration::from_secs(2);
/// Metric of the `unreachable` routes: beyond that of the routes to mesh0 (0, and 1,024 in IPv6).
const UNREACHABLE_METRIC: u32 = 1 << 30;
/// IPv4 routes shorter than this, and IPv6 routes shorter than the next, count as default routes: VPN clients route
/// the halves of the address space, IPv6 routers 2000::/3.
const DEFAULT_V4_MAX: u8 = 7;
const DEFAULT_V6_MAX: u8 = 16;

/// The life of mesh0: the only thing on the host that netd changes.
#[derive(Debug)]
pub struct Mesh0 {
    netlink: Netlink,
    name: String,
    /// User id of the agent; it may attach to the device by itself, too.
    owner: u32,
}

impl Mesh0 {
    /// For the link `name`, whose owner will be the user id `owner`. Its netlink connection lives in `tasks`.
    ///
    /// # Errors
    /// When there is no netlink, or the name cannot be one of a link.
    pub fn new(name: &str, owner: u32, tasks: &TaskGroup) -> io::Result<Self> {
        let usable = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if name.is_empty()
            || name.len() >= libc::IFNAMSIZ
            || !name.bytes().all(usable)
            || name.starts_with('.')
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name:?} cannot name a link"),
            ));
        }
        Ok(Self {
            netlink: Netlink::new(tasks)?,
            name: name.to_owned(),
            owner,
        })
    }

    /// Clears what a crash left behind. A device that an agent is attached to stays: netd was restarted beside it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn clean_start(&mut self) -> Result<(), NetdError> {
        let link = self
            .netlink
            .link(&self.name)
            .await
            .map_err(failed("links cannot be read"))?;
        if link.as_ref().is_some_and(|link| link.is_tun && link.has_carrier) {
            tracing::info!(link = self.name, "an agent is attached: the device stays");
            return Ok(());
        }
        Ok(self.undo().await?)
    }

    /// Removes the device and all routes.
    ///
    /// # Errors
    /// When the kernel refuses, or a link of that name is not a TUN device.
    pub async fn revert(&mut self) -> Result<(), NetdError> {
        Ok(self.undo().await?)
    }

    pub(super) async fn undo(&mut self) -> Result<(), Refusal> {
        if let Some(link) = self
            .netlink
            .link(&self.name)
            .await
            .map_err(failed("links cannot be read"))?
        {
            if !link.is_tun {
                let cause = format!("there is a link {} that is not a TUN device", self.name);
                return Err(Refusal {
                    code: Code::CaptureFailed,
                    cause,
                });
            }
            self.netlink
                .remove_link(link.index)
                .await
                .map_err(failed("the link cannot be removed"))?;
            tracing::info!(link = self.name, "removed");
        }
        self.remove_routes(|_| true).await
    }

    /// Attaches to the device; makes it if there is none.
    pub(super) async fn open_tun(&mut self) -> Result<OwnedFd, Refusal> {
        let fd = device::open(&self.name, self.owner).map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::EBUSY) => ": another process is attached to it (an agent that still runs?)",
                Some(libc::EINVAL) => ": there is a link of that name of another kind",
                Some(libc::ENOENT | libc::ENODEV) => ": /dev/net/tun is missing",
                _ => "",
            };
            Refusal {
                code: Code::CaptureFailed,
                cause: format!("{} cannot be opened: {error}{hint}", self.name),
            }
        })?;
        self.configure().await?;
        self.until_operational().await?;
        Ok(fd)
    }

    /// Waits until an attached device does what it is told to: the kernel acts on a new carrier, and delivers to a new
    /// IPv6 address, some time after it was asked to; a millisecond mostly, a second if carriers change often. Until
    /// then packets are lost without a word, and the first DNS query of a host would be one of them.
    async fn until_operational(&self) -> Result<(), Refusal> {
        let deadline = Instant::now() + OPERATIONAL_WITHIN;
        while !self
            .is_operational()
            .await
            .map_err(failed("the state of mesh0 cannot be read"))?
        {
            if Instant::now() >= deadline {
                tracing::warn!(
                    link = self.name,
                    "the kernel takes long to bring up the link; going on"
                );
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    async fn is_operational(&self) -> Result<bool, rtnetlink::Error> {
        let Some(link) = self.netlink.link(&self.name).await? else {
            return Ok(true);
        };
        if !link.has_carrier {
            return Ok(true); // nobody is attached: nothing to wait for
        }
        let routes = self.netlink.routes().await?;
        let delivered = |address: IpAddr| {
            let here =
                |route: &Route| route.link == Some(link.index) && route.destination == IpNet::from(address);
            routes.iter().any(here)
        };
        let addresses = self.netlink.addresses().await?;
        let mut own = addresses.iter().filter(|each| each.link == link.index);
        Ok(link.is_operational && own.all(|each| delivered(each.address)))
    }

    /// Sets what the link needs before it is up; idempotent.
    async fn configure(&self) -> Result<u32, Refusal> {
        let link = self
            .netlink
            .link(&self.name)
            .await
            .map_err(failed("links cannot be read"))?;
        let link = link.ok_or_else(|| Refusal {
            code: Code::CaptureFailed,
            cause: "the device is gone".into(),
        })?;
        // With nobody attached its routes are left out, and the unreachable ones decide.
        self.sysctl("ipv4", "ignore_routes_with_linkdown", "1")?;
        // A host without IPv6 has no such files.
        if fs::exists(format!("/proc/sys/net/ipv6/conf/{}", self.name)).unwrap_or(false) {
            self.sysctl("ipv6", "ignore_routes_with_linkdown", "1")?;
            // No link-local address: nobody is there to be a neighbour.
            self.sysctl("ipv6", "addr_gen_mode", "1")?;
        }
        let up = self.netlink.set_link_up(link.index, MTU, QUEUE_FRAMES);
        up.await.map_err(failed("the link cannot be brought up"))?;
        Ok(link.index)
    }

    fn sysctl(&self, family: &str, key: &str, value: &str) -> Result<(), Refusal> {
        let path = format!("/proc/sys/net/{family}/conf/{}/{key}", self.name);
        fs::write(&path, value).map_err(|error| Refusal {
            code: Code::CaptureFailed,
            cause: format!("{path} cannot be written: {error}"),
        })
    }

    /// The index of the device; makes a persistent one if there is none.
    async fn ensure(&mut self) -> Result<u32, Refusal> {
        match self
            .netlink
            .link(&self.name)
            .await
            .map_err(failed("links cannot be read"))?
        {
            Some(link) if link.is_tun && link.is_up => Ok(link.index),
            Some(link) if !link.is_tun => {
                let cause = format!("there is a link {} that is not a TUN device", self.name);
                Err(Refusal {
                    code: Code::CaptureFailed,
                    cause,
                })
            }
            Some(_) => self.configure().await,
            // It is persistent: closing the descriptor leaves it.
            None => {
                drop(self.open_tun().await?);
                self.configure().await
            }
        }
    }

    /// Adds mesh0's own addresses of the families that are wished and that the host has; takes others away.
    pub(super) async fn set_address(
        &mut self,
        plan: &AddressPlan,
        wished: Families,
    ) -> Result<Families, Refusal> {
        let index = self.ensure().await?;
        let addresses = self
            .netlink
            .addresses()
            .await
            .map_err(failed("addresses cannot be read"))?;
        let host_has = |v6: bool| {
            addresses
                .iter()
                .any(|each| each.link != index && each.is_global && each.address.is_ipv6() == v6)
        };
        let mut families = Families {
            ipv4: wished.ipv4 && host_has(false),
            ipv6: wished.ipv6 && host_has(true),
        };
        let own = own_addresses(plan);
        for each in addresses.iter().filter(|each| each.link == index) {
            let keep = own.iter().any(|(address, v6)| {
                each.address == *address && if *v6 { families.ipv6 } else { families.ipv4 }
            });
            if !keep {
                let removed = self.netlink.remove_address(each).await;
                removed.map_err(failed("an address of mesh0 cannot be removed"))?;
            }
        }
        for (address, v6) in own {
            let offered = if v6 {
                &mut families.ipv6
            } else {
                &mut families.ipv4
            };
            if !*offered {
                continue;
            }
            let added = self.netlink.add_address(index, address).await;
            match added {
                Ok(()) => {}
                // IPv6 may be disabled on new links only.
                Err(error) if v6 => {
                    tracing::warn!(%error, "no IPv6 on mesh0: the kernel does not take an address");
                    *offered = false;
                }
                Err(error) => return Err(failed("mesh0 does not take its address")(error)),
            }
        }
        self.until_operational().await?;
        Ok(families)
    }

    /// Routes the VIP prefixes of these families to the device.
    pub(super) async fn set_route(&mut self, plan: &AddressPlan, families: Families) -> Result<(), Refusal> {
        let index = self.ensure().await?;
        let wished: Vec<IpNet> = [
            (IpNet::V4(plan.v4), families.ipv4),
            (IpNet::V6(plan.v6), families.ipv6),
        ]
        .into_iter()
        .filter_map(|(prefix, offered)| offered.then_some(prefix))
        .collect();
        let routes = self
            .netlink
            .routes()
            .await
            .map_err(failed("routes cannot be read"))?;
        for prefix in &wished {
            if let Some(taken) = routes
                .iter()
                .find(|route| !route.is_ours && takes(route, prefix, index))
            {
                let link = match taken.link {
                    Some(link) => self
                        .netlink
                        .link_name(link)
                        .await
                        .unwrap_or_else(|| format!("link {link}")),
                    None => "several links".into(),
                };
                let cause = format!(
                    "{prefix} overlaps {}, which is routed by {link}",
                    taken.destination
                );
                return Err(Refusal {
                    code: Code::PrefixTaken,
                    cause,
                });
            }
        }
        let addresses = self
            .netlink
            .addresses()
            .await
            .map_err(failed("addresses cannot be read"))?;
        for (own, v6) in own_addresses(plan) {
            let has = addresses
                .iter()
                .any(|each| each.link == index && each.address == own);
            if !has && if v6 { families.ipv6 } else { families.ipv4 } {
                let cause = format!("mesh0 does not have its address {own}: set_address comes first");
                return Err(Refusal {
                    code: Code::CaptureFailed,
                    cause,
                });
            }
        }
        self.remove_routes(|route| !wished.contains(&route.destination))
            .await?;
        for prefix in wished {
            let source = match prefix {
                IpNet::V4(_) => IpAddr::from(plan.host_v4()),
                IpNet::V6(_) => plan.host_v6().into(),
            };
            let routed = async {
                // First what holds when nobody is attached: not one packet may leave by the default route.
                self.netlink.add_unreachable(prefix, UNREACHABLE_METRIC).await?;
                self.netlink.add_route(prefix, index, source).await
            };
            routed.await.map_err(failed("a route to mesh0 cannot be added"))?;
        }
        Ok(())
    }

    async fn remove_routes(&self, which: impl Fn(&Route) -> bool) -> Result<(), Refusal> {
        let routes = self
            .netlink
            .routes()
            .await
            .map_err(failed("routes cannot be read"))?;
        for route in routes.into_iter().filter(|route| route.is_ours && which(route)) {
            self.netlink
                .remove_route(route)
                .await
                .map_err(failed("a route cannot be removed"))?;
        }
        Ok(())
    }
}

fn own_addresses(plan: &AddressPlan) -> [(IpAddr, bool); 2] {
    [(plan.host_v4().into(), false), (plan.host_v6().into(), true)]
}

/// True if a route of somebody else decides where addresses of the prefix go.
fn takes(route: &Route, prefix: &IpNet, mesh0: u32) -> bool {
    let (destination, default_max) = match (route.destination, prefix) {
        (IpNet::V4(_), IpNet::V4(_)) => (route.destination, DEFAULT_V4_MAX),
        (IpNet::V6(_), IpNet::V6(_)) => (route.destination, DEFAULT_V6_MAX),
        (IpNet::V4(_), IpNet::V6(_)) | (IpNet::V6(_), IpNet::V4(_)) => return false,
    };
    let overlap = destination.contains(prefix) || prefix.contains(&destination);
    route.kind == RouteKind::Delivers
        && route.link != Some(mesh0)
        && destination.prefix_len() > default_max
        && overlap
}

fn failed<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> Refusal {
    let what = what.to_owned();
    move |error| Refusal {
        code: Code::CaptureFailed,
        cause: format!("{what}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_prefixes() {
        let v4: IpNet = "240.240.0.0/16".parse().unwrap();
        let v6: IpNet = "2001:2::/48".parse().unwrap();
        let table = [
            ("240.240.0.0/16", v4, true),
            ("240.240.7.0/24", v4, true),
            ("240.0.0.0/4", v4, false),
            ("240.0.0.0/8", v4, true),
            ("0.0.0.0/0", v4, false),
            ("128.0.0.0/1", v4, false),
            ("10.0.0.0/8", v4, false),
            ("2001:2::/64", v6, true),
            ("2001::/20", v6, true),
            ("2000::/3", v6, false),
            ("::/0", v6, false),
            ("fd00::/8", v6, false),
            ("::/0", v4, false),
        ];
        for (destination, prefix, expected) in table {
            let mut route = Route::example(destination.parse().unwrap(), Some(2));
            assert_eq!(takes(&route, &prefix, 9), expected, "{destination}");
            route.link = Some(9);
            assert!(!takes(&route, &prefix, 9), "by mesh0 itself");
            route.link = Some(2);
            route.kind = RouteKind::Refuses;
            assert!(
                !takes(&route, &prefix, 9),
                "an unreachable route delivers nothing"
            );
        }
    }
}
