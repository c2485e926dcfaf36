//! Joining: what is refused, with which words, and that nothing is left half done.

use crate::{CATALOG, PATIENCE, needs_root};
use anyhow::{Result, ensure};
use tombolo_testkit::{Mesh, MeshOptions, Vm, wait_for};

fn refused(vm: &Vm, token: &str, code: &str) -> Result<()> {
    let before = vm.host.fingerprint()?;
    let output = vm.host.run("tombolo", &["up", token])?;
    ensure!(
        !output.ok() && output.text().contains(code),
        "wanted {code}: {}",
        output.text()
    );
    ensure!(
        output.text().to_lowercase().contains("next:"),
        "every refusal names the next step: {}",
        output.text()
    );
    ensure!(
        !output.text().contains(&token[8..]),
        "no part of the token in a message"
    );
    ensure!(vm.host.fingerprint()? == before, "nothing is left half done");
    ensure!(vm.host.pids_of("tombolo")?.is_empty());
    Ok(())
}

#[test]
fn every_bad_token_has_its_own_message() -> Result<()> {
    needs_root!();
    let mut mesh = Mesh::start("tokens", MeshOptions::default())?;
    mesh.group("catalog", "http=80:8080")?;
    let (a, b) = (mesh.bare("a")?, mesh.bare("b")?);
    refused(&a, "tmb1_notatoken", "TMB0101")?;
    let token = mesh.token("catalog")?;
    refused(&a, &token[..token.len() - 1], "TMB0101")?;
    let expired = mesh.tombolo("token create -n shop --workload-group catalog --ttl 1s")?;
    std::thread::sleep(std::time::Duration::from_millis(1500));
    refused(&a, expired.trim(), "TMB0102")?;
    let elsewhere = mesh.tombolo("token create -n shop --workload-group catalog --cidr 192.0.2.0/24")?;
    refused(&a, elsewhere.trim(), "TMB0105")?;
    let revoked = mesh.token("catalog")?;
    let id = mesh.tombolo("get jt -n shop -o name")?;
    ensure!(id.lines().count() >= 3, "{id}");
    for name in id
        .lines()
        .map(|line| line.rsplit('/').next().unwrap_or_default().to_owned())
    {
        if mesh.tombolo(&format!("token inspect {revoked}"))?.contains(&name) {
            mesh.tombolo(&format!("token revoke {name} -n shop"))?;
        }
    }
    refused(&a, &revoked, "TMB0104")?;
    // The good one works, once; another host is refused with it and the refusal is in the audit log.
    a.up(&token)?;
    refused(&b, &token, "TMB0103")?;
    ensure!(mesh.tombolo("audit")?.contains("TMB0103"));
    Ok(())
}

#[test]
fn two_hosts_of_one_name_are_two_vms_and_leave_is_clean() -> Result<()> {
    needs_root!();
    let mut mesh = Mesh::start("twins", MeshOptions::default())?;
    mesh.group("catalog", "http=80:8080")?;
    let (a, b) = (mesh.vm("a", "catalog")?, mesh.vm("b", "catalog")?);
    b.host.sh("hostname a")?;
    let list = mesh.tombolo("get we -n shop -o name")?;
    ensure!(list.lines().count() == 2, "{list}");
    // up again without a token: the same VM.
    a.host.run("tombolo", &["down"])?.checked()?;
    ensure!(a.host.sh("ip link show mesh0")?.code != 0, "down removes mesh0");
    a.host.run("tombolo", &["up"])?.checked()?;
    ensure!(mesh.tombolo("get we -n shop -o name")? == list);
    // A spent token of the same device burns nothing, and leave removes the entry.
    a.host.run("tombolo", &["leave"])?.checked()?;
    ensure!(mesh.tombolo("get we -n shop -o name")?.lines().count() == 1);
    let left = a.host.sh("ls -A /var/lib/tombolo/agent")?.stdout;
    ensure!(left.trim().is_empty(), "leave left {left}");
    wait_for("a to know no mesh", PATIENCE, || {
        ensure!(a.host.sh(&format!("getent ahosts {CATALOG}"))?.code != 0);
        Ok(())
    })
}

#[test]
fn an_enrolled_vm_cannot_pose_as_discovery() -> Result<()> {
    needs_root!();
    let mut mesh = Mesh::start("poser", MeshOptions::default())?;
    mesh.group("catalog", "http=80:8080")?;
    let (poser, victim) = (mesh.vm("poser", "catalog")?, mesh.bare("victim")?);
    let token = mesh.token("catalog")?;
    // The poser owns a certificate of this mesh and the address of discovery.
    let address = mesh.control.ipv4();
    mesh.kill_discovery();
    mesh.control.unplug()?;
    poser
        .host
        .sh(&format!("ip addr add {address}/32 dev lo"))?
        .checked()?;
    mesh.lab.on_router(&[
        "ip",
        "route",
        "replace",
        &format!("{address}/32"),
        "via",
        &poser.host.ipv4().to_string(),
    ])?;
    poser.host.write(
        "/run/pose.py",
        "import socket, ssl, threading\nc = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\nc.load_cert_chain('/var/lib/tombolo/agent/identity.pem')\nc.set_alpn_protocols(['h2'])\ns = socket.create_server(('', 15012))\nprint('posing', flush=True)\nwhile True:\n    k, _ = s.accept()\n    try:\n        t = c.wrap_socket(k, server_side=True); print('TLS up', t.recv(1), flush=True)\n    except Exception as e:\n        print('refused', e, flush=True)\n",
    )?;
    let process = poser.host.spawn("python3", &["/run/pose.py"])?;
    wait_for("the poser", PATIENCE, || {
        ensure!(process.log().contains("posing"), "{}", process.log());
        Ok(())
    })?;
    let output = victim.host.run("tombolo", &["up", &token])?;
    ensure!(
        !output.ok() && (output.text().contains("TMB0111") || output.text().contains("TMB0110")),
        "{}",
        output.text()
    );
    // A running agent that reconnects meets the poser too and tells it nothing.
    wait_for("the agent to have tried", PATIENCE, || {
        ensure!(process.log().contains("refused"), "{}", process.log());
        Ok(())
    })?;
    ensure!(
        !process.log().contains("TLS up b'P"),
        "nobody spoke HTTP/2 to the poser: {}",
        process.log()
    );
    Ok(())
}
