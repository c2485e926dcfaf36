//! The pure core of federation: what one discovery knows of the others, and what it tells them.
//!
//! Position: layer 2. The shell in discovery opens streams, keeps the store and reads the clock; it calls
//! [`Federation::handle`] and carries out the [`Action`]s in their order.
//!
//! **Invariant:** no tokio, clock, files, sockets; no randomness but the seed of the start.

mod action;
mod codec;
mod connection;
mod crypto;
mod exchange;
mod exports;
mod federation;
mod join;
pub mod limits;
mod membership;
mod record;
mod refusal;
mod session;
mod timers;
mod world;

pub use action::{Action, ConnId, Event, Now, Write};
pub use crypto::{Crypto, Ed25519, MemberKey};
pub use exports::{
    ExportedGateway, ExportedPort, ExportedService, Exports, Locality, Presence, ServiceName, Services,
};
pub use federation::{Federation, MemberStatus, Own, Saved};
pub use join::Invite;
pub use membership::{Member, Standing};
pub use record::{Grant, Profile, Record};
pub use refusal::Refusal;
pub use world::{Imports, World};
