use crate::{ExportedGateway, Services};
use imbl::OrdMap;
use std::{collections::BTreeSet, sync::Arc};
use tombolo_types::TrustDomain;

/// What one other cluster offers to this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imports {
    /// Which cluster.
    pub cluster: Arc<str>,
    /// Its trust domain: every identity in `services`, and its gateways, are of it or of one of its other names. Of
    /// several names the one that it makes certificates for, as far as that is known.
    pub trust_domain: TrustDomain,
    /// Other names of that trust domain while it is renamed.
    pub also: BTreeSet<TrustDomain>,
    /// Names that it had, and that nobody has now: they let nobody in, and what they let in may run on.
    pub former: BTreeSet<TrustDomain>,
    /// Its root certificates. Two clusters that share a trust domain have each its own.
    pub roots_pem: Arc<str>,
    /// Its healthy gateways, sorted.
    pub gateways: Arc<[ExportedGateway]>,
    /// Its services.
    pub services: Services,
    /// Its mesh domain: its own gateways know a service as `<name>.<namespace>.svc.<mesh domain>`. Empty: not said.
    pub mesh_domain: Arc<str>,
    /// It cannot be reached (or not yet): this is what it said last.
    pub stale: bool,
}

/// All other members of the set, as an immutable value. Cheap to clone.
///
/// **Invariant:** exactly the live members other than the own cluster are in it, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    /// By name of the cluster.
    pub clusters: OrdMap<Arc<str>, Arc<Imports>>,
}
