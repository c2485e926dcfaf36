//! Who may say for whom a connection is: gateways pass on the TLS of hosts that reach discovery through them, with the
//! address of each before it.
//!
//! **Invariant:** a word about the source is believed from the address of a gateway that is enrolled and not revoked, and
//! from nobody else. In discovery's own network that is the address of its WorkloadEntry; where two networks may have the
//! same addresses, the gateway must in addition have shown its certificate from there, on a control stream that is open.

use crate::fleet::{Fleet, Member, View};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{io::AsyncReadExt as _, net::TcpStream};
use tombolo_registry::MeshSettings;
use tombolo_types::{DeviceId, PROXY_MAX, PROXY_PREFIX, PROXY_SIGNATURE, ProxyHeader, SpiffeId, TrustDomain};

/// What discovery says on the control stream of a gateway whose word it believes.
pub const FEATURE: &str = "proxy-protocol-v2";
/// A gateway writes its header at once.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);

/// A gateway that passes a connection on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarder {
    /// Where it is.
    pub address: IpAddr,
    /// Its network: where the source is an address of.
    pub network: Arc<str>,
    /// Which one.
    pub device: DeviceId,
}

/// The gateways, as discovery knows them at this moment. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Forwarders {
    fleet: Fleet,
    settings: MeshSettings,
    /// Open control streams of gateways, by where they come from.
    streams: Arc<Mutex<BTreeMap<(IpAddr, DeviceId), usize>>>,
}

/// A control stream of a gateway; it counts until this is dropped.
#[derive(Debug)]
pub struct Shown {
    forwarders: Forwarders,
    key: (IpAddr, DeviceId),
}

impl Forwarders {
    /// Looks at the fleet whenever it is asked.
    pub fn new(fleet: Fleet, settings: MeshSettings) -> Self {
        Self {
            fleet,
            settings,
            streams: Arc::default(),
        }
    }

    /// What certificates are made for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.settings.trust_domain
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<(IpAddr, DeviceId), usize>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gateway at an address, if there is one.
    pub fn find(&self, address: IpAddr) -> Option<Forwarder> {
        let address = address.to_canonical();
        let shown = || {
            let streams = self.streams();
            let from_there = streams.range((address, DeviceId(0))..=(address, DeviceId(u64::MAX)));
            from_there.map(|((_, device), _)| *device).collect()
        };
        find(&self.fleet.view(), &self.settings, address, shown)
    }

    /// True if the address is that of a member of discovery's own network.
    pub fn lists(&self, address: IpAddr) -> bool {
        let slot = (self.settings.network.clone(), address.to_canonical());
        self.fleet.view().by_address.contains_key(&slot)
    }

    /// A control stream of a device is open: of a gateway that is proof of where it is.
    pub fn shown(&self, device: DeviceId, address: IpAddr) -> Option<Shown> {
        let view = self.fleet.view();
        let member = view.members.get(&device)?;
        if !is_gateway(member, &self.settings) {
            return None;
        }
        let key = (address.to_canonical(), device);
        *self.streams().entry(key).or_default() += 1;
        Some(Shown {
            forwarders: self.clone(),
            key,
        })
    }
}

fn is_gateway(member: &Member, settings: &MeshSettings) -> bool {
    let (id, device) = (SpiffeId::gateway(settings.trust_domain.clone()), &member.device);
    device.metadata.namespace == *id.namespace
        && device.spec.service_account == *id.service_account
        && device.spec.revoked.is_none()
}

/// `shown`: devices with a control stream from there.
fn find(
    view: &View,
    settings: &MeshSettings,
    address: IpAddr,
    shown: impl FnOnce() -> Vec<DeviceId>,
) -> Option<Forwarder> {
    let slot = (settings.network.clone(), address);
    let listed = view
        .by_address
        .get(&slot)
        .and_then(|entry| view.by_entry.get(entry).copied());
    listed.into_iter().chain(shown()).find_map(|device| {
        let member = view.members.get(&device)?;
        (is_gateway(member, settings) && member.address == Some(address)).then(|| Forwarder {
            address,
            network: member.device.spec.network.as_str().into(),
            device,
        })
    })
}

impl Drop for Shown {
    fn drop(&mut self) {
        let mut streams = self.forwarders.streams();
        if let Some(count) = streams.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                streams.remove(&self.key);
            }
        }
    }
}

/// What a connection begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// A header: its first byte is that of no TLS record.
    Header,
    /// Something else: TLS, or what the handshake will refuse.
    Other,
}

/// Looks at the first byte without taking it. Cancel-safe.
///
/// # Errors
/// When the peer is gone.
pub async fn first(socket: &TcpStream) -> io::Result<First> {
    let mut byte = [0];
    Ok(match socket.peek(&mut byte).await? {
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        _ if byte[0] == PROXY_SIGNATURE[0] => First::Header,
        _ => First::Other,
    })
}

/// Takes a header: where the connection comes from; `None`: from the gateway itself.
///
/// # Errors
/// When it is none, too long, or does not come at once.
pub async fn read(socket: &mut TcpStream) -> io::Result<Option<SocketAddr>> {
    let read = async {
        let mut buffer = [0; PROXY_MAX];
        let (prefix, rest) = buffer.split_at_mut(PROXY_PREFIX);
        socket.read_exact(prefix).await?;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let length = match prefix.first_chunk() {
            Some(prefix) => ProxyHeader::length(prefix).map_err(invalid)?,
            None => return Err(io::ErrorKind::InvalidData.into()),
        };
        if let Some(addresses) = rest.get_mut(..length - PROXY_PREFIX) {
            socket.read_exact(addresses).await?;
        }
        let header = ProxyHeader::decode(buffer.get(..length).unwrap_or_default()).map_err(invalid)?;
        Ok(match header {
            ProxyHeader::Proxied { source, .. } => {
                Some(SocketAddr::new(source.ip().to_canonical(), source.port()))
            }
            ProxyHeader::Local => None,
        })
    };
    tokio::time::timeout(HEADER_TIMEOUT, read).await?
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_config::{DeviceSpec, Metadata, Object, Revoked};

    const HOME: &str = "lan";

    fn settings() -> MeshSettings {
        MeshSettings {
            network: HOME.into(),
            ..MeshSettings::new("mesh.example".parse().unwrap())
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A device with its entry: namespace, service account, network, address.
    fn add(view: &mut View, n: u64, [namespace, account, network, address]: [&str; 4]) {
        let entry = (namespace.to_owned(), format!("entry-{n}"));
        let spec = DeviceSpec {
            workload_entry: entry.1.clone(),
            service_account: account.into(),
            network: network.into(),
            ..DeviceSpec::default()
        };
        let member = Member {
            locality: String::new(),
            device: Object::<DeviceSpec>::new(Metadata::named(namespace, DeviceId(n).to_string()), spec),
            address: Some(ip(address)),
            entry_status: None,
            standing: None,
            report: None,
            awaits_report: false,
            since_unix_ms: 0,
        };
        view.members.insert(DeviceId(n), Arc::new(member));
        view.by_address
            .insert((network.into(), ip(address)), entry.clone());
        view.by_entry.insert(entry, DeviceId(n));
    }

    #[test]
    fn only_gateways_and_only_from_where_they_are() {
        let mut view = View::default();
        add(&mut view, 1, ["tombolo-system", "gateway", HOME, "192.0.2.1"]);
        add(&mut view, 2, ["shop", "gateway", HOME, "192.0.2.2"]);
        add(&mut view, 3, ["tombolo-system", "other", HOME, "192.0.2.3"]);
        add(&mut view, 4, ["tombolo-system", "gateway", "far", "10.0.0.4"]);
        add(&mut view, 5, ["shop", "front", HOME, "10.0.0.5"]);
        add(&mut view, 6, ["tombolo-system", "gateway", "far", "10.0.0.5"]);
        let found = |address: &str, shown: &[u64]| {
            let shown = || shown.iter().copied().map(DeviceId).collect();
            find(&view, &settings(), ip(address), shown)
                .map(|found| (found.device.0, found.network.to_string()))
        };
        assert_eq!(found("192.0.2.1", &[]), Some((1, HOME.to_owned())));
        assert_eq!(found("192.0.2.2", &[]), None, "another namespace");
        assert_eq!(found("192.0.2.3", &[]), None, "another service account");
        assert_eq!(found("192.0.2.9", &[]), None);
        // In another network the same address may be anybody's here.
        assert_eq!(found("10.0.0.4", &[]), None);
        assert_eq!(found("10.0.0.4", &[4]), Some((4, "far".to_owned())));
        assert_eq!(found("10.0.0.5", &[]), None, "a VM of this network");
        assert_eq!(found("10.0.0.5", &[6]), Some((6, "far".to_owned())));
        // A stream through a NAT: its address is also that of others.
        assert_eq!(found("192.0.2.9", &[1]), None);
        assert_eq!(found("192.0.2.9", &[5]), None);
    }

    #[test]
    fn a_revoked_gateway_says_nothing() {
        let mut view = View::default();
        add(&mut view, 1, ["tombolo-system", "gateway", HOME, "192.0.2.1"]);
        let mut member = Member::clone(&view.members[&DeviceId(1)]);
        member.device.spec.revoked = Some(Revoked::default());
        view.members.insert(DeviceId(1), Arc::new(member));
        assert_eq!(
            find(&view, &settings(), ip("192.0.2.1"), || vec![DeviceId(1)]),
            None
        );
    }
}
