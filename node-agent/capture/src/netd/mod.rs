//! The protocol between the agent and `tombolo-netd`, and netd's side of it.
//!
//! netd has CAP_NET_ADMIN and no input from the network; the agent has no capability. Between them is one Unix socket
//! of packets (SOCK_SEQPACKET): one JSON message each way per request, the TUN descriptor beside its answer. The first
//! message of a connection is `hello` with a version. netd answers root and the agent's user only.
//!
//! **Invariant:** netd changes mesh0, routes to it, its own sysctls and the resolver's settings of it, and nothing
//! else on the host but one nft table of its own while policies close a port; `revert` leaves none of it. Of files it makes one of its own in the resolver's folder for such
//! files, and puts a line into `/etc/resolv.conf` only where the host's owner said so.

mod client;
mod guard;
mod mesh0;
mod message;
mod names;
mod netlink;
mod said;
mod server;

pub use client::NetdClient;
pub use guard::{GuardRules, GuardedPort, HostGuard};
pub use mesh0::Mesh0;
pub use message::Families;
pub use names::{ALIVE_EVERY, CONFIRM_WITHIN, DnsSettings, HostNames, HostResolver, NamesMode};
pub use server::NetdServer;

/// Where netd listens.
pub const SOCKET: &str = "/run/tombolo/netd/netd.sock";

/// The link's name.
pub const INTERFACE: &str = "mesh0";

/// Why a request to netd failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetdError {
    /// netd cannot be reached, or the connection broke.
    #[error("{}", tombolo_types::Code::NetdUnreachable.message(.0))]
    Io(#[from] std::io::Error),
    /// netd refused; the message has code, cause and next step.
    #[error("{message}")]
    Refused {
        /// The code, for example `TMB0114`.
        code: String,
        /// For people.
        message: String,
    },
}
