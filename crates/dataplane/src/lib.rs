//! The async data path of a host: outbound flows, inbound connections, names.
//!
//! Position: layer 5. `packet -> flow -> destination -> policy -> tunnel -> peer`: capture hands over what applications
//! do, the snapshot says where it goes and who may, the tunnel carries it. Everything is decided by the pure crates;
//! here are the sockets, the time limits and what is said of it (access log, metrics).
//!
//! **Invariant:** an application's connect() succeeds only after a peer has accepted the connection.
//! **Invariant:** a connection is registered before it is decided upon, and every new version decides again about all
//! that are registered: no change of policy falls between.
//! **Invariant:** without a first set of policies nothing is admitted.

mod context;
mod dataplane;
mod endpoints;
mod flows;
mod inbound;
mod names;
mod outbound;
mod refusal;
mod report;
mod reverse;
mod settings;
mod through;
mod upstreams;

#[cfg(test)]
#[path = "../../tunnel/tests/support/mod.rs"]
mod support;
#[cfg(test)]
mod tests;

pub use dataplane::{ConnectionInfo, Dataplane, Inputs, ProbeResult, StartError};
pub use refusal::CallError;
pub use reverse::{ReverseEnd, Transport};
pub use settings::Settings;
pub use through::GatewayTry;
