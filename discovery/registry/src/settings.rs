use tombolo_types::{AddressPlan, TrustDomain};

/// What is fixed for a mesh when it is founded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshSettings {
    /// Trust domain of every workload here.
    pub trust_domain: TrustDomain,
    /// Cluster id, `Kubernetes` by default.
    pub cluster_id: String,
    /// Network of workloads that name none, and of all VIPs; empty by default.
    pub network: String,
    /// For example `mesh.internal`: services are `<service>.<namespace>.svc.<mesh domain>`.
    pub mesh_domain: String,
    /// Namespace whose policies are mesh-wide, `istio-system` by default.
    pub root_namespace: String,
    /// Where VIPs come from.
    pub plan: AddressPlan,
    /// Nothing is admitted that no ALLOW policy admits.
    pub default_deny: bool,
}

impl MeshSettings {
    /// The defaults of a trust domain.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            cluster_id: "Kubernetes".to_owned(),
            network: String::new(),
            mesh_domain: "mesh.internal".to_owned(),
            root_namespace: "istio-system".to_owned(),
            plan: AddressPlan::default(),
            default_deny: false,
        }
    }
}
