use crate::{Diagnostic, Object, ServiceEntrySpec, WorkloadGroupSpec};
use std::collections::BTreeMap;

/// What `tombolo workload-group create` is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NewWorkloadGroup {
    /// Name of the group and of its service.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account; empty: `default`.
    pub service_account: String,
    /// Ports in the order given.
    pub ports: Vec<NewPort>,
    /// Labels of the entries, beside `app`.
    pub labels: BTreeMap<String, String>,
    /// Network id; empty: the mesh's own.
    pub network: String,
    /// For example `mesh.internal`.
    pub mesh_domain: String,
}

/// `http=80:8080`: name, port of the service, port on the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPort {
    /// Name.
    pub name: String,
    /// What clients connect to.
    pub service_port: u16,
    /// What the application listens on.
    pub target_port: u16,
}

impl std::str::FromStr for NewPort {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let _ = text;
        todo!()
    }
}

impl NewWorkloadGroup {
    /// The two objects that it stands for.
    ///
    /// # Errors
    /// With what validation says about either.
    pub fn objects(&self) -> Result<(Object<WorkloadGroupSpec>, Object<ServiceEntrySpec>), Vec<Diagnostic>> {
        todo!()
    }
}
