//! Connections that nobody uses.

use super::Server;
use crate::control::{DRAIN, HELD};
use std::time::Duration;

impl Server {
    /// Tells the peers of connections without streams for `idle` or longer to make another one when they need it: a peer
    /// that keeps connections for nothing takes places that others want. Returns how many there were. Reverse sessions stay:
    /// they are there to be called.
    pub fn close_idle(&self, idle: Duration) -> usize {
        let running = self.shared.running();
        let unused = running
            .values()
            .map(|running| &running.accepted)
            .filter(|accepted| {
                let control = &accepted.control;
                control.idle_seconds() >= idle.as_secs() && !control.has(DRAIN | HELD)
            });
        let mut count = 0;
        for accepted in unused {
            tracing::debug!(peer = %accepted.peer.id, remote = %accepted.remote, "connection without calls closed");
            accepted.control.set(DRAIN);
            count += 1;
        }
        count
    }
}
