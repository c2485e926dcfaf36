use crate::Problem;
use std::net::{IpAddr, SocketAddr};

/// How the node stands with discovery: what `tombolo status` shows.
#[derive(Debug, Clone, Default)]
pub struct ControlStatus {
    /// A control stream is open and answered.
    pub connected: bool,
    /// `host:port` of it, or of the last attempt.
    pub endpoint: String,
    /// Unix milliseconds since when `connected` has its value; 0: since the start.
    pub since_unix_ms: i64,
    /// Unix milliseconds of the last change taken from discovery; 0: never by this process.
    pub last_change_unix_ms: i64,
    /// Why the last attempt to connect failed; none while connected.
    pub stream_problem: Option<Problem>,
    /// Why the last attempt to renew failed; none after a success.
    pub renewal_problem: Option<Problem>,
    /// Why the snapshot on disk is not the one in force; none after a success.
    pub snapshot_problem: Option<Problem>,
    /// Unix seconds at which the certificate expires; 0: there is none.
    pub certificate_not_after: u64,
    /// Unix seconds at which its renewal is due.
    pub renewal_due: u64,
    /// Resources of the last responses that were refused (sent back as NACK), `name: reason`, newest last, at most 16.
    pub rejected: Vec<String>,
    /// Version of the discovery that was connected last; empty where it does not say.
    pub discovery_version: String,
    /// The way that the last stream took, and what discovery says that it can do on it.
    pub path: Option<ControlPath>,
    /// Every type was answered at least once on a stream of this process.
    pub synced: bool,
}

/// A connection to discovery, and what discovery offers on connections that take the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlPath {
    /// Address of this host on it.
    pub local: IpAddr,
    /// What was dialled.
    pub remote: SocketAddr,
    /// Features beyond its version.
    pub features: Vec<String>,
}

impl ControlPath {
    /// True if discovery believes what a header of the PROXY protocol says on connections that take this way.
    pub fn takes_proxy_headers(&self) -> bool {
        self.features.iter().any(|feature| feature == PROXY_FEATURE)
    }
}

/// As discovery says it.
const PROXY_FEATURE: &str = "proxy-protocol-v2";
