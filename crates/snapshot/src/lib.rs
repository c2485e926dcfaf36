//! The agent's picture of the mesh: what the control plane sent, indexed for the data path.
//!
//! Position: layer 2, the end of the control path (`config in -> registry -> compile -> push -> snapshot`). One owner
//! task applies incremental xDS responses to a [`Snapshot`] and publishes clones; flows, names and policies read one
//! version each. It can be written to disk and read again, so that an agent serves before it reaches discovery.
//!
//! **Invariant:** no tokio, clock, randomness, files or sockets; input of a peer never panics.
//! **Invariant:** a clone costs a few reference counts, and one update a few paths of persistent maps.
//! **Invariant:** the same resources give the same snapshot, in whatever order and grouping they came.
//! **Invariant:** a name is only ever answered with an address of the mesh's own prefixes: a connection to any other
//! address would go past the mesh in plain text.

mod claims;
mod convert;
mod disk;
mod mix;
mod names;
mod own;
mod policies;
mod registry;
mod resource;
mod snapshot;

pub use disk::SnapshotError;
pub use own::{ExposedPort, Exposure, Own};
pub use resource::Rejected;
pub use snapshot::Snapshot;
