//! Who is in and who is out.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use tombolo_testkit::{MeshOptions, Nginx, wait_for};

#[test]
fn power_off_takes_out_one_and_a_lost_control_plane_nobody() -> Result<()> {
    needs_root!();
    let (a, b, mut mesh) = pair("power", "http=80:8080", MeshOptions::default())?;
    let c = mesh.vm("c", "catalog")?;
    let _apps = (
        Nginx::start(&b.host, 8080, "b")?,
        Nginx::start(&c.host, 8080, "c")?,
    );
    let url = format!("http://{CATALOG}/");
    wait_for("both to answer", PATIENCE, || {
        let seen: String = (0..20)
            .map(|_| a.curl(&url).map(|o| o.stdout).unwrap_or_default())
            .collect();
        if seen.contains('b') && seen.contains('c') {
            Ok(())
        } else {
            bail!("{seen}")
        }
    })?;
    // Discovery remembers who it has reached before it may call one dead.
    std::thread::sleep(Duration::from_secs(1));
    let begun = Instant::now();
    c.host.power_off()?;
    wait_for("c to be out", PATIENCE, || {
        if mesh.tombolo("vm list -n shop")?.contains(" Away ") {
            Ok(())
        } else {
            bail!("all are healthy")
        }
    })?;
    ensure!(
        begun.elapsed() <= Duration::from_secs(3),
        "out after {:?}",
        begun.elapsed()
    );
    for n in 0..50 {
        let output = a.curl(&url)?;
        ensure!(
            output.ok() && output.stdout == "b\n",
            "request {n} after the removal: {}",
            output.text()
        );
    }
    // The control plane goes, and nobody else with it.
    mesh.control.unplug()?;
    let until = Instant::now() + Duration::from_secs(6);
    while Instant::now() < until {
        ensure!(a.curl(&url)?.stdout == "b\n", "{}", a.agent_log());
    }
    mesh.control.plug()?;
    wait_for("b to be back with discovery", PATIENCE, || {
        let list = mesh.tombolo("vm list -n shop")?;
        if list.matches(" Healthy").count() >= 2 {
            Ok(())
        } else {
            bail!("{list}")
        }
    })
}

#[test]
fn a_graceful_stop_fails_no_request() -> Result<()> {
    needs_root!();
    let (a, b, mut mesh) = pair("graceful", "http=80:8080", MeshOptions::default())?;
    let c = mesh.vm("c", "catalog")?;
    let _apps = (
        Nginx::start(&b.host, 8080, "b")?,
        Nginx::start(&c.host, 8080, "c")?,
    );
    a.curl_until(&format!("http://{CATALOG}/"), PATIENCE)?;
    let mut load = a
        .host
        .command("tombolo-peer")
        .args(["call", "load", CATALOG, "80", "50"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    c.host.run("tombolo", &["down"])?.checked()?;
    std::thread::sleep(Duration::from_secs(1));
    drop(load.stdin.take());
    let lines = String::from_utf8(load.wait_with_output()?.stdout)?;
    let bad: Vec<_> = lines.lines().filter(|line| !line.ends_with(" ok")).collect();
    ensure!(
        lines.lines().count() > 60 && bad.is_empty(),
        "{} of {}: {bad:?}",
        bad.len(),
        lines.lines().count()
    );
    Ok(())
}

#[test]
fn a_failing_probe_takes_the_endpoint_out() -> Result<()> {
    needs_root!();
    let (a, b, mesh) = pair("probe", "http=80:8080", MeshOptions::default())?;
    let _ = b;
    mesh.apply(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {name: probed, namespace: shop, labels: {app: probed}}\nspec:\n  metadata: {labels: {app: probed}}\n  \
         template: {serviceAccount: probed, ports: {http: 8080}}\n  probe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: probed, namespace: shop}\nspec:\n  hosts: [probed.shop.svc.mesh.internal]\n  location: MESH_INTERNAL\n  \
         resolution: STATIC\n  workloadSelector: {labels: {app: probed}}\n  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]\n",
    )?;
    let mut mesh = mesh;
    let p = mesh.bare("p")?;
    let mut nginx = Nginx::start(&p.host, 8080, "probed")?;
    p.up(&mesh.token("probed")?)?;
    let url = "http://probed.shop.svc.mesh.internal/";
    a.curl_until(url, PATIENCE)?;
    nginx.kill();
    wait_for("the probe to take it out", PATIENCE, || {
        if mesh.tombolo("vm list -n shop")?.contains("Unhealthy") {
            Ok(())
        } else {
            bail!("still healthy")
        }
    })?;
    p.host.signal_all("tombolo-agent", Signal::SIGCONT)?;
    let _nginx = Nginx::start(&p.host, 8080, "again")?;
    ensure!(a.curl_until(url, PATIENCE)? == "again\n");
    Ok(())
}
