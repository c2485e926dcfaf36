//! The end of a root whose key was stolen: connections that it let in are cut, and no other.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::{
    process::{Child, Stdio},
    time::Duration,
};
use tombolo_testkit::{EchoServer, Mesh, MeshOptions, Vm, wait_for};

/// A connection that says a byte every 20 ms and hears it back.
struct Drip(Child);

impl Drip {
    fn start(from: &Vm) -> Result<Self> {
        let child = from
            .host
            .command("tombolo-peer")
            .args(["call", "drip", CATALOG, "80", "20"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Self(child))
    }

    fn is_open(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }
}

impl Drop for Drip {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn unblocked(mesh: &Mesh) -> Result<()> {
    wait_for("everybody to be ready", PATIENCE, || {
        let shown: Value = serde_json::from_str(&mesh.tombolo("trust show -o json")?)?;
        let blockers = &shown["rotation"]["blockers"];
        ensure!(blockers.as_array().is_some_and(Vec::is_empty), "{blockers}");
        Ok(())
    })
}

/// What a host holds of a kind of PEM block in its roots.
fn held(vm: &Vm, kind: &str) -> Result<usize> {
    let text = vm
        .host
        .sh("cat /var/lib/tombolo/agent/roots.pem")?
        .checked()?
        .stdout;
    Ok(text.matches(&format!("-----BEGIN {kind}-----")).count())
}

fn hold(vms: [&Vm; 2], roots: usize, retired: usize) -> Result<()> {
    for vm in vms {
        wait_for("the roots", PATIENCE, || {
            let now = (held(vm, "CERTIFICATE")?, held(vm, "RETIRED CERTIFICATE")?);
            ensure!(now == (roots, retired), "{now:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn issuer(vm: &Vm) -> Result<String> {
    let line = "openssl x509 -noout -issuer -in /var/lib/tombolo/agent/identity.pem";
    Ok(vm.host.sh(line)?.checked()?.stdout)
}

fn calls(from: &Vm) -> Result<()> {
    from.host
        .run("tombolo-peer", &["call", "echo", CATALOG, "80", "1000"])?
        .checked()
        .map(drop)
}

#[test]
fn a_cut_ends_what_the_retired_root_let_in() -> Result<()> {
    needs_root!();
    let (a, b, mesh) = pair("trustcut", "echo=80:8080", MeshOptions::default())?;
    let _server = EchoServer::start(&b.host, "echo", 8080)?;
    wait_for("the first call", PATIENCE, || calls(&a))?;
    let mut old = Drip::start(&a)?;
    let first = issuer(&a)?;
    mesh.tombolo("trust rotate start --yes")?;
    unblocked(&mesh)?;
    hold([&a, &b], 2, 0)?;
    mesh.tombolo("trust rotate switch --yes")?;
    for vm in [&a, &b] {
        wait_for("a certificate of the new root", PATIENCE, || {
            ensure!(issuer(vm)? != first);
            Ok(())
        })?;
    }
    let mut new = Drip::start(&a)?;
    mesh.tombolo("trust rotate finish --force --yes")?;
    hold([&a, &b], 1, 1)?;
    // Both agents have looked at their connections since.
    calls(&a)?;
    ensure!(old.is_open()? && new.is_open()?, "finish has cut a connection");

    let begun = std::time::Instant::now();
    mesh.tombolo("trust rotate cut --yes")?;
    wait_for("the cut", Duration::from_secs(5), || {
        ensure!(!old.is_open()?);
        Ok(())
    })?;
    println!("cut after {:?}", begun.elapsed());
    hold([&a, &b], 1, 0)?;
    calls(&a)?;
    ensure!(new.is_open()?, "a connection of the new root was cut");
    let output = old.0.stderr.take().context("stderr")?;
    let said = std::io::read_to_string(output)?;
    ensure!(said.contains("reset") || said.contains("Reset"), "{said}");
    let audit = mesh.tombolo("audit")?;
    ensure!(audit.contains("rotate-cut"), "{audit}");
    Ok(())
}
