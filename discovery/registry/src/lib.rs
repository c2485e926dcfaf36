//! The registry: resources of the mesh in, compiled xDS resources out.
//!
//! Position: layer 2, "config in -> registry -> compile -> push". One owner task holds the [`Registry`], tells it what
//! changed and publishes immutable [`World`]s, which the xDS server reads.
//!
//! **Invariant:** no tokio, clock, randomness, files or sockets.
//! **Invariant:** what is published depends only on the present objects, health and settings, never on the order in
//! which they came; an incremental publish equals one from scratch.
//! **Invariant:** what another cluster says counts for its own trust domain, networks and endpoints only, and nothing of
//! it is told to a third.
//! **Invariant:** a policy is never weaker than it was written, except where a warning says so.

mod authorization;
mod changes;
mod content;
mod export_rules;
mod exports;
mod imports;
mod mesh_check;
mod networks;
mod peer_authentication;
mod publish;
mod registry;
mod selectors;
mod services;
mod settings;
mod state;
mod trust_names;
mod vips;
mod workloads;
mod world;

pub use export_rules::{ExportState, ExportStates, ExportVerdict, ExportedBy};
pub use exports::{EndpointSummary, Export, ServicePort};
pub use imports::{ImportedGateway, ImportedVip, Imports, foreign_network};
pub use mesh_check::{MeshCheck, validate_in_mesh};
pub use networks::NetworkGateway;
pub use registry::{Health, Registry};
pub use settings::MeshSettings;
pub use trust_names::{policy_needs_name, service_needs_name};
pub use vips::{Allocation, Watermark};
pub use world::{Compiled, Resources, Subscriber, World};
