use std::{collections::HashMap, net::IpAddr, sync::Arc};
use tombolo_authz::Policy;
use tombolo_destination::{Index, Service, Source, Workload};
use tombolo_dns::{Addresses, Names};
use tombolo_proto::xds;
use tombolo_types::{AddressPlan, DeviceId, NamespacedName, NetworkAddress, TrustDomain};

/// Who this agent is: fixed by its registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name of its WorkloadEntry.
    pub workload_name: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
    /// Network; empty is the default one.
    pub network: Arc<str>,
    /// Cluster.
    pub cluster_id: Arc<str>,
    /// Mesh domain, for example `mesh.internal`.
    pub mesh_domain: Arc<str>,
    /// Trust domain.
    pub trust_domain: TrustDomain,
}

/// A port that the own workload may deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExposedPort {
    /// Port of the application.
    pub port: u16,
    /// Deliver to loopback instead of the host's own address.
    pub loopback: bool,
}

/// What the own workload may deliver.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exposure {
    /// Declared ports.
    pub ports: Vec<ExposedPort>,
    /// Every port but 22 and ours.
    pub all_ports: bool,
}

/// A resource that was not taken, and why: the two parts of a line of the NACK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Resource name.
    pub name: String,
    /// Reason for people.
    pub reason: String,
}

/// Why bytes on disk were not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Not a snapshot file.
    #[error("not a snapshot")]
    NotASnapshot,
}

/// One version of the world.
#[derive(Debug, Clone)]
pub struct Snapshot {
    plan: AddressPlan,
    own: Own,
}

#[allow(unused_variables, reason = "skeleton")]
impl Snapshot {
    /// Knows nothing yet.
    pub fn empty(plan: AddressPlan, own: Own) -> Self {
        Self { plan, own }
    }

    /// Reads what [`Snapshot::encode`] wrote.
    ///
    /// # Errors
    /// When the bytes are damaged, or written by a newer program.
    pub fn decode(bytes: &[u8], plan: AddressPlan, own: Own) -> Result<Self, SnapshotError> {
        todo!("decode")
    }

    /// As bytes for a file.
    pub fn encode(&self) -> Vec<u8> {
        todo!("encode")
    }

    /// Applies one incremental response. Good resources are taken, bad ones returned (a NACK per resource).
    pub fn apply(&mut self, type_url: &str, resources: Vec<xds::Resource>, removed: &[String]) -> Vec<Rejected> {
        todo!("apply")
    }

    /// Resource name to version held, for `initial_resource_versions` of a new stream.
    pub fn held(&self, type_url: &str) -> HashMap<String, String> {
        todo!("held")
    }

    /// Counts changes; two clones with the same version are the same.
    pub fn version(&self) -> u64 {
        todo!("version")
    }

    /// Who this agent is.
    pub fn own(&self) -> &Own {
        &self.own
    }

    /// The mesh's virtual addresses.
    pub fn plan(&self) -> &AddressPlan {
        &self.plan
    }

    /// What ranks of endpoints are measured from: the own record's place if it is known, else the registration's.
    pub fn source(&self) -> Source {
        todo!("source")
    }

    /// The record with this agent's namespace, name and service account.
    pub fn own_workload(&self) -> Option<&Arc<Workload>> {
        todo!("own_workload")
    }

    /// What this agent may deliver, if discovery said so.
    pub fn exposure(&self) -> Option<&Exposure> {
        todo!("exposure")
    }

    /// Policies that apply to a workload: global ones, those of its namespace, those that it names.
    pub fn policies_for(&self, workload: &Workload) -> Vec<&Arc<Policy>> {
        todo!("policies_for")
    }

    /// All policies, by key.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        std::iter::empty()
    }

    /// True once a whole set of policies was received, now or in the life of a snapshot read from disk.
    pub fn policies_synced(&self) -> bool {
        todo!("policies_synced")
    }

    /// True once a whole set of workloads and services was received.
    pub fn addresses_synced(&self) -> bool {
        todo!("addresses_synced")
    }

    /// True if a device was revoked.
    pub fn is_revoked(&self, device: DeviceId) -> bool {
        todo!("is_revoked")
    }

    /// The service that a host name means for a client in a namespace: exact, then wildcards.
    pub fn service_by_host(&self, host: &str, client_namespace: &str) -> Option<&Arc<Service>> {
        todo!("service_by_host")
    }

    /// The virtual addresses of a service for this agent.
    pub fn vips(&self, key: &NamespacedName) -> Vec<IpAddr> {
        todo!("vips")
    }

    /// A workload by its uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        todo!("workload")
    }

    /// All services, by key.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        std::iter::empty()
    }

    /// All workloads, in no order that means anything.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        std::iter::empty()
    }

    /// How many services.
    pub fn service_count(&self) -> usize {
        todo!("service_count")
    }

    /// How many workloads.
    pub fn workload_count(&self) -> usize {
        todo!("workload_count")
    }

    /// How many policies.
    pub fn policy_count(&self) -> usize {
        todo!("policy_count")
    }

    /// Trust domains and their roots (PEM).
    pub fn trust_bundles(&self) -> impl Iterator<Item = (&TrustDomain, &str)> {
        std::iter::empty()
    }
}

#[allow(unused_variables, reason = "skeleton")]
impl Index for Snapshot {
    fn service_by_address(&self, address: IpAddr) -> Option<&Arc<Service>> {
        todo!("service_by_address")
    }

    fn service(&self, key: &NamespacedName) -> Option<&Arc<Service>> {
        todo!("service")
    }

    fn workload_by_address(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        todo!("workload_by_address")
    }

    fn endpoints(&self, key: &NamespacedName, each: &mut dyn FnMut(&Arc<Workload>)) {
        todo!("endpoints")
    }
}

#[allow(unused_variables, reason = "skeleton")]
impl Names for Snapshot {
    fn find(&self, host: &str, client_namespace: &str) -> Option<Addresses> {
        todo!("find")
    }

    fn is_mesh_name(&self, host: &str) -> bool {
        todo!("is_mesh_name")
    }

    fn mesh_domain(&self) -> &str {
        &self.own.mesh_domain
    }

    fn is_mesh_address(&self, address: IpAddr) -> bool {
        self.plan.contains(address)
    }

    fn host_of(&self, address: IpAddr) -> Option<String> {
        todo!("host_of")
    }
}
