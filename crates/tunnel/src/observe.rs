/// Which end of a connection this host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// We connected.
    Client,
    /// We accepted.
    Server,
}

impl Side {
    /// As a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// Is told what happens, for metrics. Called on the hot path of connections, never of bytes.
pub trait Observe: Send + Sync {
    /// A handshake ended: `ok`, or why not in a fixed vocabulary.
    fn handshake(&self, side: Side, result: &'static str) {
        let _ = (side, result);
    }

    /// A connection was opened (`+1`) or closed (`-1`).
    fn connections(&self, side: Side, change: i64) {
        let _ = (side, change);
    }

    /// A limit of a connection has refused something: `streams`, of a peer that opens streams faster than they end.
    fn limited(&self, limit: &'static str) {
        let _ = limit;
    }
}

/// Observes nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoObserver;

impl Observe for NoObserver {}
