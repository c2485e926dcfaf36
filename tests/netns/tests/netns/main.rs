//! Real programs on a real kernel: every host is a network namespace with a TUN device, a resolver and applications.
//!
//! One binary, one module per concern. Each test makes its own lab and removes it. Needs root and the release build.

mod commands;
mod containers;
mod enrolment;
mod exports;
mod federated_names;
mod federation;
mod federation_scale;
mod gateway;
mod gateway_drain;
mod gateway_entry;
mod gateway_life;
mod gateway_refusals;
mod gateway_silence;
mod guard;
mod hostile;
mod lab;
mod lifecycle;
mod liveness;
mod load;
mod metrics;
mod migration;
mod names;
mod objects;
mod policy;
mod reload;
mod reload_limits;
mod reverse_moves;
mod survival;
mod time;
mod traffic;
mod trust;
mod trust_cut;
mod trust_domain;
mod visible;
mod wan;

use std::time::Duration;
use tombolo_testkit::{Mesh, MeshOptions, Vm};

/// The service of the `catalog` group.
const CATALOG: &str = "catalog.shop.svc.mesh.internal";
/// Longest wait for something that takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A mesh with a caller `a` in group `webapp` and a callee `b` in group `catalog` with the given ports.
fn pair(name: &str, ports: &str, options: MeshOptions) -> anyhow::Result<(Vm, Vm, Mesh)> {
    let mut mesh = Mesh::start(name, options)?;
    mesh.group("webapp", "http=80:8080")?;
    mesh.group("catalog", ports)?;
    let b = mesh.vm("b", "catalog")?;
    let a = mesh.vm("a", "webapp")?;
    Ok((a, b, mesh))
}

/// Leaves a test with SKIPPED where the suite cannot run.
macro_rules! needs_root {
    () => {
        if !tombolo_testkit::require_root("netns") {
            return Ok(());
        }
    };
}
pub(crate) use needs_root;
