//! Who may connect: layer-4 authorization policies and the verdict on a connection.
//!
//! Position: layer 1, the fourth arrow of the data path (`packet -> flow -> destination -> policy -> tunnel -> peer`).
//! The snapshot compiles the control plane's messages into [`Policy`] values; the inbound proxy collects those that
//! apply to the workload and calls [`decide`] for each new connection, and again for live ones when policies change.
//!
//! **Invariant:** no tokio, clock, randomness, files or sockets; knows nothing of protobuf.
//! **Invariant:** never weaker than written. What could not be read makes an ALLOW match less and a DENY match more.

mod decide;
mod policy;

pub use decide::{Connection, Decision, Verdict, decide, decide_with_dry_run};
pub use policy::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};
