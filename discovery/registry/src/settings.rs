use tombolo_types::{AddressPlan, TrustDomain};

/// What is fixed for a mesh when it is founded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshSettings {
    /// Trust domain of every workload here.
    pub trust_domain: TrustDomain,
    /// Other names of the own trust domain while it is being renamed: identities of these are of this mesh, and are
    /// believed by the same roots. Certificates are made for `trust_domain` alone. Empty otherwise.
    pub also: Vec<TrustDomain>,
    /// Names that the own trust domain had: they let nobody in, and connections that they let in run on.
    pub former: Vec<TrustDomain>,
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
            also: Vec::new(),
            former: Vec::new(),
            cluster_id: "Kubernetes".to_owned(),
            network: String::new(),
            mesh_domain: "mesh.internal".to_owned(),
            root_namespace: "istio-system".to_owned(),
            plan: AddressPlan::default(),
            default_deny: false,
        }
    }
    /// True for a name of the own trust domain that is believed now.
    pub fn is_own(&self, trust_domain: &TrustDomain) -> bool {
        *trust_domain == self.trust_domain || self.also.contains(trust_domain)
    }

    /// Every name of the own trust domain that is believed now, the one that certificates are made for first.
    pub fn own_names(&self) -> impl Iterator<Item = &TrustDomain> {
        std::iter::once(&self.trust_domain).chain(&self.also)
    }
}
