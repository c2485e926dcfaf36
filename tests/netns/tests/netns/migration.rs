//! An Istio VM is taken over by the commands of docs/MIGRATING-FROM-ISTIO-VM.md, and goes back.

use crate::{CATALOG, PATIENCE, needs_root};
use anyhow::{Result, ensure};
use tombolo_testkit::{Mesh, MeshOptions, Nginx, wait_for};

/// As `istioctl x workload entry configure --autoregister` writes them.
const CLUSTER_ENV: &str = include_str!("../../../../crates/config/src/istio_vm/fixtures/cluster.env");
const MESH_YAML: &str = include_str!("../../../../crates/config/src/istio_vm/fixtures/mesh.yaml");

#[test]
fn an_istio_vm_is_taken_over_by_the_documented_commands() -> Result<()> {
    needs_root!();
    let mut mesh = Mesh::start("istiovm", MeshOptions::default())?;
    mesh.group("webapp", "http=80:8080")?;
    // One network: there is no gateway between two here.
    let (env, config) = (
        CLUSTER_ENV.replace("vm-net", ""),
        MESH_YAML.replace("vm-net", "\"\""),
    );
    for (name, text) in [
        ("cluster.env", env.as_str()),
        // nginx answers every path: the probe holds.
        ("mesh.yaml", config.as_str()),
        ("hosts", "192.0.2.10 istiod.istio-system.svc\n"),
        ("istio-token", "eyJhbGciOiJSUzI1NiJ9.secret.secret"),
        ("root-cert.pem", "-----BEGIN CERTIFICATE-----\n"),
    ] {
        mesh.control.write(&format!("/run/vm/{name}"), text)?;
    }
    let taken = mesh
        .control
        .sh("tombolo config from-istio /run/vm --port http=80:8080 --agent-file /run/vm/agent.yaml > /run/vm/objects.yaml")?
        .checked()?;
    for word in [
        "WITHOUT A COUNTERPART",
        "MY_TEAMS_OWN",
        "tracing",
        "ISTIO_INBOUND_PORTS",
        "istio-token",
    ] {
        ensure!(taken.stderr.contains(word), "{word}: {}", taken.stderr);
    }
    ensure!(
        !taken.text().contains("eyJ"),
        "the token is read by nobody: {}",
        taken.text()
    );
    let applied = mesh.tombolo("apply -f /run/vm/objects.yaml")?;
    ensure!(applied.contains("catalog"), "{applied}");
    let settings = mesh.control.sh("cat /run/vm/agent.yaml")?.stdout;

    let caller = mesh.vm("a", "webapp")?;
    let vm = mesh.bare("b")?;
    vm.host.write("/etc/tombolo/agent.yaml", &settings)?;
    let before = vm.host.fingerprint()?;
    let _nginx = Nginx::start(&vm.host, 8080, "hello")?;
    vm.host.write("/run/token", &mesh.token("catalog")?)?;
    vm.host.sh("tombolo up - < /run/token")?.checked()?;
    let config = vm.host.run("tombolo", &["config", "show"])?.checked()?.stdout;
    ensure!(
        config.contains("drain_seconds") && config.contains("45"),
        "{config}"
    );
    ensure!(caller.curl_until(&format!("http://{CATALOG}/"), PATIENCE)? == "hello\n");
    let entry = mesh.tombolo("get we -n shop -o yaml")?;
    for word in ["catalog-sa", "canonical-revision: v1"] {
        ensure!(entry.contains(word), "{word}: {entry}");
    }
    // The way back: the host is as it was, and Istio's files were never touched.
    vm.host.run("tombolo", &["leave"])?.checked()?;
    wait_for("the host to be as before", PATIENCE, || {
        let after = vm.host.fingerprint()?;
        ensure!(after == before, "before:\n{before}\nafter:\n{after}");
        Ok(())
    })?;
    mesh.tombolo("delete -f /run/vm/objects.yaml")?;
    // A folder that is no VM's is said, with the code and the next step.
    let refused = mesh.control.sh("tombolo config from-istio /root")?;
    ensure!(
        !refused.ok() && refused.text().contains("TMB0209"),
        "{}",
        refused.text()
    );
    Ok(())
}
