use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};
use tombolo_tunnel::{Limits, PoolLimits};
use tombolo_types::ports;

/// What a host may set of its data path.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where HBONE is served; an IPv6 address takes IPv6 only.
    pub hbone_listen: Vec<SocketAddr>,
    /// Longest wait for open connections when draining.
    pub drain: Duration,
    /// Longest time that one endpoint may take to accept before the next one is tried.
    pub attempt_timeout: Duration,
    /// Longest time of one try through a gateway of another network, which holds connecting to the gateway, the gateway's
    /// connecting to an endpoint, and TLS with that: several round trips of a WAN. Three tries fit into
    /// `connect_timeout`.
    pub gateway_timeout: Duration,
    /// Longest time that an application waits in connect().
    pub connect_timeout: Duration,
    /// Longest wait of an inbound connection for this host's own record.
    pub own_record_wait: Duration,
    /// Longest time that the local application may take to accept.
    pub application_timeout: Duration,
    /// Where the host's own name servers are found.
    pub resolv_conf: PathBuf,
    /// Most name lookups under way to the host's own servers.
    pub dns_in_flight_max: usize,
    /// Answer names with IPv4 addresses.
    pub ipv4: bool,
    /// Answer names with IPv6 addresses.
    pub ipv6: bool,
    /// Limits of the HBONE server.
    pub server: Limits,
    /// Limits of the HBONE client.
    pub pool: PoolLimits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            hbone_listen: vec![
                (Ipv4Addr::UNSPECIFIED, ports::HBONE).into(),
                (Ipv6Addr::UNSPECIFIED, ports::HBONE).into(),
            ],
            drain: Duration::from_secs(5),
            attempt_timeout: Duration::from_secs(1),
            gateway_timeout: Duration::from_millis(2500),
            connect_timeout: Duration::from_secs(10),
            own_record_wait: Duration::from_secs(5),
            application_timeout: Duration::from_secs(10),
            resolv_conf: "/etc/resolv.conf".into(),
            dns_in_flight_max: 512,
            ipv4: true,
            ipv6: true,
            server: Limits::default(),
            pool: PoolLimits::default(),
        }
    }
}
