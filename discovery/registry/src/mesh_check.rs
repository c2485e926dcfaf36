use crate::MeshSettings;
use tombolo_config::{Diagnostic, Resource};

/// What the settings of the mesh say about a resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshCheck {
    /// Refusals and warnings.
    pub diagnostics: Vec<Diagnostic>,
    /// Hosts that only a mesh-admin may publish: names outside of the namespace's own `.svc.<mesh domain>`.
    pub needs_mesh_admin: Vec<String>,
}

/// Checks a valid resource against the mesh it is for. `protected_hosts` are names that nobody may publish, because
/// agents need them to reach discovery or a gateway.
pub fn validate_in_mesh(resource: &Resource, mesh: &MeshSettings, protected_hosts: &[String]) -> MeshCheck {
    let _ = (resource, mesh, protected_hosts);
    todo!()
}
