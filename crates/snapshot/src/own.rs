use std::sync::Arc;
use tombolo_types::TrustDomain;

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
