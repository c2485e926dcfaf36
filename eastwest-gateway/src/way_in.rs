//! The way in to discovery: its own TLS, passed on unopened, within a budget of its own.
//!
//! Discovery sees this gateway as the source of all of it. So the address of each host is written before the first byte of
//! its connection (PROXY protocol), where discovery has said that it takes it: on this gateway's own control stream, which
//! came to the same address from the same address.

use crate::{config::Settings, passthrough::dial};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncWriteExt as _, copy_bidirectional_with_sizes},
    net::TcpStream,
    sync::watch,
    time::timeout,
};
use tombolo_control_client::{ControlPath, ControlStatus, Registration};
use tombolo_runtime::fair::{Place, Places, Rate};
use tombolo_types::ProxyHeader;

/// After a start hosts may be back before this gateway's own control stream is: so long they wait to be named.
const PATH_PATIENCE: Duration = Duration::from_secs(2);
/// Buffer towards discovery: requests are small.
const UP_BYTES: usize = 2 * 1024;
/// And from it.
const DOWN_BYTES: usize = 8 * 1024;
/// Most connections that a gateway can be set to pass on at once.
pub(crate) const CONNECTIONS_MAX: usize = 16_384;

const _: () = assert!(
    CONNECTIONS_MAX * (UP_BYTES + DOWN_BYTES) <= 160 << 20,
    "buffers of connections to discovery stay under 160 MiB"
);

/// Whether a host may come in, and how it gets to discovery.
#[derive(Debug)]
pub(crate) struct WayIn {
    places: Arc<Places>,
    rate: Rate,
    /// `host:port` instead of those of the registration.
    fixed: Vec<String>,
    registration: watch::Receiver<Arc<Registration>>,
    status: watch::Receiver<ControlStatus>,
}

/// Why a host does not come in: a metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// So many connections a second, of this source or of all.
    Rate,
    /// So many at once.
    Places,
}

impl Limit {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Rate => "discovery_rate",
            Self::Places => "discovery_connections",
        }
    }
}

impl WayIn {
    pub(crate) fn new(
        settings: &Settings,
        registration: watch::Receiver<Arc<Registration>>,
        status: watch::Receiver<ControlStatus>,
    ) -> Self {
        Self {
            places: Places::new(
                settings.discovery_connections_max.min(CONNECTIONS_MAX),
                settings.discovery_per_source_max,
            ),
            rate: Rate::new(
                settings.discovery_per_second,
                settings.discovery_per_source_per_second,
            ),
            fixed: settings.discovery.clone(),
            registration,
            status,
        }
    }

    /// A place for a connection, held until it ends.
    pub(crate) fn admit(&self, source: IpAddr, now: Instant) -> Result<Place, Limit> {
        let place = self.places.enter(source).ok_or(Limit::Places)?;
        if self.rate.take(source, now) {
            Ok(place)
        } else {
            Err(Limit::Rate)
        }
    }

    /// Passes a connection to discovery, until one of the two ends it.
    pub(crate) async fn pass(&self, mut tcp: TcpStream, remote: SocketAddr) {
        let endpoints = if self.fixed.is_empty() {
            self.registration.borrow().endpoints.clone()
        } else {
            self.fixed.clone()
        };
        for endpoint in endpoints {
            let mut inward = match dial(&endpoint).await {
                Ok(inward) => inward,
                Err(error) => {
                    tracing::warn!(endpoint, %error, "discovery was not reached");
                    continue;
                }
            };
            let _ = tcp.set_nodelay(true);
            if let Some(header) = self.header(&tcp, remote, &inward).await
                && inward.write_all(&header).await.is_err()
            {
                continue;
            }
            // How it ends is the ends' business.
            let _ = copy_bidirectional_with_sizes(&mut tcp, &mut inward, UP_BYTES, DOWN_BYTES).await;
            return;
        }
    }

    /// What says where the connection comes from, if discovery takes it on this one.
    async fn header(&self, tcp: &TcpStream, remote: SocketAddr, inward: &TcpStream) -> Option<Vec<u8>> {
        let mut status = self.status.clone();
        let known = status.wait_for(|status| status.path.is_some());
        let path = timeout(PATH_PATIENCE, known).await.ok()?.ok()?.path.clone()?;
        let ends = (inward.local_addr().ok()?, inward.peer_addr().ok()?);
        takes(&path, ends).then_some(())?;
        let header = ProxyHeader::Proxied {
            source: remote,
            destination: tcp.local_addr().ok()?,
        };
        Some(header.encode())
    }
}

/// True if what discovery has said on `path` holds for a connection between `ends` (ours and its).
fn takes(path: &ControlPath, ends: (SocketAddr, SocketAddr)) -> bool {
    let same =
        |a: SocketAddr, b: SocketAddr| (a.ip().to_canonical(), a.port()) == (b.ip().to_canonical(), b.port());
    path.takes_proxy_headers()
        && path.local.to_canonical() == ends.0.ip().to_canonical()
        && same(path.remote, ends.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_source_is_named_only_where_discovery_takes_it() {
        let path = |features: &[&str]| ControlPath {
            local: "192.0.2.9".parse().unwrap(),
            remote: at("192.0.2.1:15012"),
            features: features.iter().map(|&feature| feature.to_owned()).collect(),
        };
        let new = path(&["x", "proxy-protocol-v2"]);
        assert!(takes(&new, (at("192.0.2.9:40000"), at("192.0.2.1:15012"))));
        assert!(takes(
            &new,
            (at("[::ffff:192.0.2.9]:40000"), at("[::ffff:192.0.2.1]:15012"))
        ));
        // Another gateway or a load balancer at another address, another port, from another address of this host.
        for ends in [
            (at("192.0.2.9:40000"), at("192.0.2.2:15012")),
            (at("192.0.2.9:40000"), at("192.0.2.1:443")),
            (at("192.0.2.8:40000"), at("192.0.2.1:15012")),
        ] {
            assert!(!takes(&new, ends), "{ends:?}");
        }
        // An older discovery.
        assert!(!takes(&path(&[]), (at("192.0.2.9:40000"), at("192.0.2.1:15012"))));
    }

    #[test]
    fn each_source_has_its_share_and_a_flood_leaves_some() {
        let settings = Settings {
            discovery_connections_max: 1000,
            discovery_per_source_max: 20,
            discovery_per_second: 100,
            discovery_per_source_per_second: 10,
            ..Settings::default()
        };
        let way_in = WayIn {
            places: Places::new(
                settings.discovery_connections_max,
                settings.discovery_per_source_max,
            ),
            rate: Rate::new(
                settings.discovery_per_second,
                settings.discovery_per_source_per_second,
            ),
            fixed: Vec::new(),
            registration: watch::channel(Arc::new(registration())).1,
            status: watch::channel(ControlStatus::default()).1,
        };
        let now = Instant::now();
        let source = |n: u32| IpAddr::V4((0xc633_0000 + n).into());
        let held: Vec<_> = (0..100)
            .filter_map(|_| way_in.admit(source(1), now).ok())
            .collect();
        assert_eq!(held.len(), 20);
        assert_eq!(way_in.admit(source(1), now).unwrap_err(), Limit::Places);
        drop(held);
        assert_eq!(way_in.admit(source(1), now).unwrap_err(), Limit::Rate);
        for n in 0..100 {
            while way_in.admit(source(100 + n % 10), now).is_ok() {}
        }
        assert!(
            way_in.admit(source(2), now).is_ok(),
            "a host that comes now and then"
        );
    }

    fn registration() -> Registration {
        let proto = tombolo_proto::tombolo::v1::Registration {
            device_id: "00000000000000ab".into(),
            workload_name: "gateway-1".into(),
            namespace: "tombolo-system".into(),
            service_account: "gateway".into(),
            trust_domain: "mesh.example".into(),
            mesh_domain: "mesh.internal".into(),
            vip_prefixes: tombolo_types::AddressPlan::default().prefixes().to_vec(),
            ..Default::default()
        };
        Registration::from_proto(proto, &["192.0.2.1:15012".to_owned()]).unwrap()
    }
}
