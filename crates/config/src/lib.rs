//! The resource model: Istio's kinds and ours, read strictly and validated.
//!
//! Position: layer 1, first of "config in -> registry -> compile -> push -> snapshot". Text comes in, typed resources
//! go on to store and registry; typed configuration files of the programs are read by the same code.
//!
//! **Invariant:** nothing is silently dropped: a field that is not known is refused, with the nearest known name.
//! **Invariant:** no tokio, clock, randomness, files or sockets; input is bounded in size, depth and expansion.

mod compare;
mod create;
mod diagnostic;
pub mod export;
pub mod file;
mod istio_vm;
mod kind;
pub mod networking;
mod object;
mod read;
mod resource;
pub mod security;
mod strict;
mod tombolo;
mod typed;
mod validate;
mod yaml;

pub use compare::{Difference, differences, unchanged};
pub use create::{NewPort, NewWorkloadEntry, NewWorkloadGroup};
pub use diagnostic::{Diagnostic, nearest};
pub use export::{NamespaceSpec, ServiceExportSpec, exports};
pub use istio_vm::{IstioVm, IstioVmFiles, Note, read_istio_vm};
pub use kind::{Kind, UnknownKind};
pub use networking::{Location, Probe, Resolution, ServiceEntrySpec, WorkloadEntrySpec, WorkloadGroupSpec};
pub use object::{Metadata, Object, OwnerReference};
pub use read::read_documents;
pub use resource::Resource;
pub use security::{Action, AuthorizationPolicySpec, LabelSelector, MtlsMode, PeerAuthenticationSpec};
pub use tombolo::{DeviceSpec, GroupOptions, JoinTokenSpec, JoinTokenStatus, Revoked, annotation};
pub use yaml::documents;

use serde_json::Value;

/// Reads one object strictly and validates it. The same as [`Resource::from_json`].
///
/// # Errors
/// With every finding that refuses it.
pub fn from_json(json: &Value) -> Result<Resource, Vec<Diagnostic>> {
    Resource::from_json(json)
}

/// An RFC 3339 time in milliseconds since 1970.
pub fn unix_ms(rfc3339: &str) -> Option<i64> {
    rfc3339
        .parse::<jiff::Timestamp>()
        .ok()
        .map(jiff::Timestamp::as_millisecond)
}

/// Milliseconds since 1970 as RFC 3339 in UTC, seconds if they suffice; a time outside of jiff's years -9999 to 9999
/// becomes 1970.
pub fn rfc3339(unix_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(unix_ms)
        .unwrap_or_default()
        .to_string()
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
