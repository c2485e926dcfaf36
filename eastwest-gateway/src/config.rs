//! `/etc/tombolo/gateway.yaml`. Every key is optional.

use serde::{Deserialize, Serialize};
use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};
use tombolo_config::file;
use tombolo_types::ports;

const FILE: &str = "/etc/tombolo/gateway.yaml";
/// The public port that is open everywhere.
const HTTPS: u16 = 443;

/// What the gateway does on this host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// Level directives, for example `info,tombolo_tunnel=debug`.
    pub(crate) log_filter: String,
    /// Log every call, not only refused ones.
    pub(crate) log_calls: bool,
    /// Worker threads; 0: as many as cores.
    pub(crate) workers: usize,
    /// Where members come: HBONE, reverse sessions, and the way in to discovery, on each. One that is taken is said
    /// and left to its owner, as long as another is free.
    pub(crate) listen: Vec<SocketAddr>,
    /// Calls and reverse sessions over QUIC too, at the same ports.
    pub(crate) quic: bool,
    /// Where sidecars of Istio come with `outbound_.<port>_._.<host>` as server name; none: nowhere.
    pub(crate) passthrough_listen: Vec<SocketAddr>,
    /// Host names that they may reach: their identity is not seen here, and no policy is asked.
    pub(crate) passthrough_hosts: Vec<String>,
    /// Where discovery is, `host:port`; none: as the registration says.
    pub(crate) discovery: Vec<String>,
    /// Connections of members at once.
    pub(crate) connections_max: usize,
    /// Connections of one source that have not shown who they are.
    pub(crate) half_open_per_source_max: usize,
    /// Devices that may hold reverse sessions. One costs a few ten KiB (benches/results).
    pub(crate) sessions_max: usize,
    /// Calls of members at once. Each is two descriptors and, while bytes flow, two buffers: 20,000 fill about a gigabyte
    /// at worst.
    pub(crate) calls_max: usize,
    /// Of one device, or of one identity where members have no device: as many as one agent holds back at most, and a fifth of
    /// all.
    pub(crate) calls_per_peer_max: usize,
    /// Calls whose endpoint has not taken them yet: 1,000 a second to endpoints that answer nothing at all.
    pub(crate) dials_max: usize,
    /// A member's connection without calls is closed after so long; 0: never. ztunnel and our agents close theirs after five
    /// minutes.
    pub(crate) connection_idle_seconds: u64,
    /// Connections to discovery at once, and of one source.
    pub(crate) discovery_connections_max: usize,
    /// Of one source: an office or a cloud's NAT may hide many VMs.
    pub(crate) discovery_per_source_max: usize,
    /// New connections to discovery a second, twice as many after a pause.
    pub(crate) discovery_per_second: u32,
    /// Of one source.
    pub(crate) discovery_per_source_per_second: u32,
    /// Where metrics are served.
    pub(crate) metrics_listen: SocketAddr,
    /// Where readiness is served.
    pub(crate) readiness_listen: SocketAddr,
    /// Longest wait for open calls on SIGTERM.
    pub(crate) drain_seconds: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let everywhere = |port| {
            [
                SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
                (Ipv6Addr::UNSPECIFIED, port).into(),
            ]
        };
        Self {
            log_filter: "info".to_owned(),
            log_calls: false,
            workers: 0,
            listen: [everywhere(ports::HBONE), everywhere(HTTPS)].concat(),
            quic: true,
            passthrough_listen: Vec::new(),
            passthrough_hosts: Vec::new(),
            discovery: Vec::new(),
            connections_max: 8192,
            half_open_per_source_max: 128,
            sessions_max: 10_000,
            calls_max: 20_000,
            calls_per_peer_max: 4096,
            dials_max: 2048,
            connection_idle_seconds: 600,
            discovery_connections_max: 8192,
            discovery_per_source_max: 480,
            discovery_per_second: 400,
            discovery_per_source_per_second: 50,
            metrics_listen: (loopback, ports::METRICS).into(),
            readiness_listen: (loopback, ports::READINESS).into(),
            drain_seconds: 30,
        }
    }
}

impl Settings {
    pub(crate) const fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

/// Where the file is.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Configuration file; a missing one is an empty one.
    #[arg(
        long,
        env = "TOMBOLO_GATEWAY_CONFIG",
        value_name = "FILE",
        hide_env_values = true
    )]
    pub(crate) config: Option<PathBuf>,
}

impl Args {
    /// The file above the defaults.
    pub(crate) fn load(&self) -> anyhow::Result<Settings> {
        let path = self.config.clone().unwrap_or_else(|| FILE.into());
        let text = file::text(&path, fs::read_to_string(&path)).map_err(anyhow::Error::msg)?;
        let mut settings: Settings = file::settings(&path, &text).map_err(anyhow::Error::msg)?;
        if settings.workers == 0 {
            settings.workers = std::thread::available_parallelism().map_or(1, Into::into);
        }
        for host in &mut settings.passthrough_hosts {
            *host = host.trim_end_matches('.').to_ascii_lowercase();
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> anyhow::Result<Settings> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("gateway.yaml");
        fs::write(&path, text)?;
        Args { config: Some(path) }.load()
    }

    #[test]
    fn what_is_said_counts_and_what_is_unknown_is_named() {
        let settings = load("listen: ['0.0.0.0:443']\npassthrough_hosts: [A.example.]\n").unwrap();
        assert_eq!(settings.listen, ["0.0.0.0:443".parse().unwrap()]);
        assert_eq!(settings.passthrough_hosts, ["a.example"]);
        assert_eq!(load("").unwrap().listen.len(), 4);
        let error = load("listn: []\n").unwrap_err().to_string();
        assert!(
            error.starts_with("TMB0504") && error.contains("did you mean listen?"),
            "{error}"
        );
    }
}
