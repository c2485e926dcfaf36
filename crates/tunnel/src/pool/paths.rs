//! What the connections over QUIC know of their paths.

use super::Pool;
use std::{net::SocketAddr, time::Duration};

/// A connection to a gateway over QUIC, as it has been so far.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QuicPath {
    /// The gateway.
    pub gateway: SocketAddr,
    /// Smoothed round trip.
    pub rtt: Duration,
    /// Most bytes in flight now.
    pub window: u64,
    /// Largest datagram, in bytes.
    pub mtu: u16,
    /// Packets sent.
    pub sent: u64,
    /// Packets taken for lost: what was in them was sent again.
    pub lost: u64,
}

impl Pool {
    /// The connections to gateways over QUIC.
    pub fn quic_paths(&self) -> Vec<QuicPath> {
        let links = self.shared.quic.all();
        let path = |link: &std::sync::Arc<crate::quic::Link>| {
            let stats = link.connection.stats().path;
            QuicPath {
                gateway: link.connection.remote_address(),
                rtt: stats.rtt,
                window: stats.cwnd,
                mtu: stats.current_mtu,
                sent: stats.sent_packets,
                lost: stats.lost_packets,
            }
        };
        links.iter().map(path).collect()
    }
}
