//! Things die; the mesh goes on.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use tombolo_testkit::{MeshOptions, Nginx, wait_for};

#[test]
fn the_agent_serves_from_its_snapshot_without_discovery() -> Result<()> {
    needs_root!();
    let (a, b, mut mesh) = pair("snapshot", "http=80:8080", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let url = format!("http://{CATALOG}/");
    a.curl_until(&url, PATIENCE)?;
    mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: none, namespace: shop}\nspec:\n  action: DENY\n  selector: {matchLabels: {app: catalog}}\n  \
         rules: [{to: [{operation: {ports: ['9999']}}]}]\n",
    )?;
    // The snapshot is written half a second after the last change.
    std::thread::sleep(Duration::from_millis(1500));
    mesh.kill_discovery();
    for vm in [&a, &b] {
        vm.host.signal_all("tombolo-agent", Signal::SIGKILL)?;
        vm.host.signal_all("tombolo-netd", Signal::SIGKILL)?;
    }
    let begun = Instant::now();
    b.host.run("tombolo", &["up"])?.checked()?;
    a.host.run("tombolo", &["up"])?.checked()?;
    a.curl_until(&url, PATIENCE)?;
    ensure!(
        begun.elapsed() < Duration::from_secs(4),
        "two agents from kill -9 to serving: {:?}",
        begun.elapsed()
    );
    let status = a.host.run("tombolo", &["status"])?;
    ensure!(
        status.text().contains("TMB0302"),
        "status says that discovery is away: {}",
        status.text()
    );
    // It comes back, and so do changes.
    mesh.start_discovery()?;
    mesh.group("late", "http=80:8080")?;
    wait_for("a new name", PATIENCE, || {
        a.host.sh("getent ahosts late.shop.svc.mesh.internal")?.checked()
    })?;
    Ok(())
}

#[test]
fn acknowledged_writes_survive_kill_9_of_discovery() -> Result<()> {
    needs_root!();
    let mut mesh = tombolo_testkit::Mesh::start("durable", MeshOptions::default())?;
    let mut acknowledged = Vec::new();
    for round in 0..5 {
        for n in 0..4 {
            let name = format!("g{round}-{n}");
            mesh.group(&name, "http=80:8080")?;
            acknowledged.push(name);
        }
        mesh.kill_discovery();
        mesh.start_discovery()?;
        let list = mesh.tombolo("get wg -n shop -o name")?;
        for name in &acknowledged {
            ensure!(
                list.contains(name),
                "{name} was acknowledged and is gone after kill {round}"
            );
        }
    }
    // VIPs are stable over all of it.
    let first = mesh.tombolo("get se g0-0 -n shop -o yaml")?;
    ensure!(first.contains("240.240."), "{first}");
    Ok(())
}

#[test]
fn everything_is_undone() -> Result<()> {
    needs_root!();
    let mut mesh = tombolo_testkit::Mesh::start("undo", MeshOptions::default())?;
    mesh.group("catalog", "http=80:8080")?;
    let vm = mesh.bare("a")?;
    let before = vm.host.fingerprint()?;
    vm.up(&mesh.token("catalog")?)?;
    let during = vm.host.fingerprint()?;
    let part = |text: &str, name: &str| {
        text.split("# ")
            .find(|part| part.starts_with(name))
            .map(str::to_owned)
    };
    for unchanged in ["nft", "rules", "files"] {
        ensure!(
            part(&before, unchanged) == part(&during, unchanged),
            "{unchanged} changed while the agent runs:\n{during}"
        );
    }
    // kill -9 of both, then only `down`.
    vm.host.signal_all("tombolo-agent", Signal::SIGKILL)?;
    vm.host.signal_all("tombolo-netd", Signal::SIGKILL)?;
    vm.host.run("tombolo", &["down"])?.checked()?;
    wait_for("the host to be as before", PATIENCE, || {
        let after = vm.host.fingerprint()?;
        ensure!(after == before, "before:\n{before}\nafter:\n{after}");
        Ok(())
    })
}

#[test]
fn sigterm_drains() -> Result<()> {
    needs_root!();
    let (a, b, _mesh) = pair("drain", "source=7002", MeshOptions::default())?;
    let _server = tombolo_testkit::EchoServer::start(&b.host, "source", 7002)?;
    let mut call = a
        .host
        .spawn("tombolo-peer", &["call", "source", CATALOG, "7002", "300000000"])?;
    std::thread::sleep(Duration::from_millis(300));
    b.host.signal_all("tombolo-agent", Signal::SIGTERM)?;
    ensure!(
        call.wait(PATIENCE) == Some(0),
        "a stream that was open when the drain began ends whole: {}",
        call.log()
    );
    wait_for("the agent to exit", PATIENCE, || {
        ensure!(b.host.pids_of("tombolo-agent")?.is_empty(), "{}", b.agent_log());
        Ok(())
    })
}
