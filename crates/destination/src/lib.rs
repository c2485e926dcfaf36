//! Which endpoint a connection goes to: the model of workloads and services, and the choice among endpoints.
//!
//! Position: layer 1, the third arrow of the data path (`packet -> flow -> destination -> policy -> tunnel -> peer`).
//! An [`Index`] (the agent's snapshot) finds records; [`resolve`] turns a dialled virtual address and port into a
//! [`Destination`] with its usable endpoints, nearest first; [`order`] says in which order to try them now.
//!
//! Endpoints of other networks are reached through gateways ([`Candidate::via`]): all of one service, network and
//! locality are one candidate, since the gateway chooses among them.
//!
//! **Invariant:** no tokio, clock, randomness, files or sockets: the seed of a tie-break is an argument.
//! **Invariant:** a candidate always has the identities that its peer must prove; there is no "any peer" endpoint.
//! **Invariant:** an address means something within its network only: what is in another one is never dialled directly.

#[cfg(test)]
mod fixture;
mod gateway;
mod model;
mod order;
mod resolve;

pub use gateway::{Gateway, GatewayHost, Via, order_gateways};
pub use model::{
    AppProtocol, GatewayAddress, GatewayTarget, IpFamilies, LoadBalancing, Locality, Mode, PortMap, Scope,
    Service, Tunnel, Visibility, Workload,
};
pub use order::order;
pub use resolve::{Candidate, Destination, Index, Source, resolve, resolve_service, resolve_workload};
