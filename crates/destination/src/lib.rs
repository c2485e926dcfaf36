//! Which endpoint a connection goes to: the model of workloads and services, and the choice among endpoints.
//!
//! Position: layer 1, the third arrow of the data path (`packet -> flow -> destination -> policy -> tunnel -> peer`).
//! An [`Index`] (the agent's snapshot) finds records; [`resolve`] turns a dialled virtual address and port into a
//! [`Destination`] with its usable endpoints, nearest first; [`order`] says in which order to try them now.
//!
//! **Invariant:** no tokio, clock, randomness, files or sockets: the seed of a tie-break is an argument.
//! **Invariant:** a candidate always has the identities that its peer must prove; there is no "any peer" endpoint.

#[cfg(test)]
mod fixture;
mod model;
mod order;
mod resolve;

pub use model::{
    AppProtocol, GatewayAddress, GatewayTarget, IpFamilies, LoadBalancing, Locality, Mode, PortMap, Scope,
    Service, Tunnel, Visibility, Workload,
};
pub use order::order;
pub use resolve::{Candidate, Destination, Index, Source, resolve, resolve_service, resolve_workload};
