//! Certificates in time: the wall clock of the hosts is moved, everything else is real.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};
use tombolo_testkit::{Clock, EchoServer, Host, Mesh, MeshOptions, Nginx, Vm, wait_for};

const HOUR: Duration = Duration::from_secs(3600);
/// Past the half life of a certificate of 24 h and its jitter.
const HALF_LIFE: Duration = Duration::from_secs(13 * 3600);

fn options() -> MeshOptions {
    MeshOptions {
        clock: true,
        ..MeshOptions::default()
    }
}

/// Leaves a test with SKIPPED where clocks cannot be moved.
macro_rules! needs_clock {
    () => {
        needs_root!();
        if !Clock::require("netns time") {
            return Ok(());
        }
    };
}

/// A client that runs until it is asked how it went.
struct Client(Option<Child>);

impl Client {
    fn start(host: &Host, mode: &str, port: u16, count: u64) -> Result<Self> {
        let child = host
            .command("tombolo-peer")
            .args(["call", mode, CATALOG, &port.to_string(), &count.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Self(Some(child)))
    }

    /// New connections, `per_second` of them.
    fn load(host: &Host, per_second: u64) -> Result<Self> {
        Self::start(host, "load", 80, per_second)
    }

    fn end(&mut self) -> Result<String> {
        let mut child = self.0.take().context("ended")?;
        drop(child.stdin.take());
        let output = child.wait_with_output()?;
        let text = String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?;
        ensure!(output.status.success(), "{text}");
        Ok(text)
    }

    /// Stops the load. How many requests there were; none may have failed.
    fn all_well(mut self) -> Result<usize> {
        let text = self.end()?;
        let bad: Vec<_> = text.lines().filter(|line| !line.ends_with(" ok")).collect();
        let all = text.lines().count();
        ensure!(
            bad.is_empty(),
            "{} of {all} failed, first: {:?}",
            bad.len(),
            &bad[..bad.len().min(5)]
        );
        Ok(all)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What discovery knows of the VM with this hostname.
fn vm_of(mesh: &Mesh, hostname: &str) -> Result<Value> {
    let list: Value = serde_json::from_str(&mesh.tombolo("vm list -o json")?)?;
    let vms = list["vms"].as_array().context("vms")?;
    vms.iter()
        .find(|vm| vm["hostname"] == hostname)
        .cloned()
        .with_context(|| format!("{hostname}: {list}"))
}

fn generation(mesh: &Mesh, hostname: &str) -> Result<u64> {
    vm_of(mesh, hostname)?["generation"]
        .as_u64()
        .context("generation")
}

/// Serial number of the certificate on the host's disk.
fn serial(vm: &Vm) -> Result<String> {
    let line = "openssl x509 -noout -serial -in /var/lib/tombolo/agent/identity.pem";
    Ok(vm.host.sh(line)?.checked()?.stdout)
}

/// Serial number of the certificate that discovery serves with.
fn discovery_serial(mesh: &Mesh) -> Result<String> {
    let line = "openssl s_client -connect 127.0.0.1:15012 -alpn h2 </dev/null 2>/dev/null | openssl x509 -noout -serial";
    Ok(mesh.control.sh(line)?.checked()?.stdout)
}

fn status(vm: &Vm) -> Result<Value> {
    let output = vm.host.run("tombolo", &["status", "-o", "json"])?;
    serde_json::from_str(&output.stdout).with_context(|| output.text())
}

/// Codes of the findings, in order.
fn codes(vm: &Vm) -> Result<String> {
    let status = status(vm)?;
    let found = status["findings"].as_array().context("findings")?;
    let codes: Vec<_> = found.iter().filter_map(|f| f["code"].as_str()).collect();
    Ok(codes.join(" "))
}

fn wait_for_code(vm: &Vm, code: &str, deadline: Duration) -> Result<()> {
    wait_for(&format!("{code} on {}", vm.host.name()), deadline, || {
        let found = codes(vm)?;
        ensure!(found.contains(code), "{found:?}");
        Ok(())
    })
}

fn wait_for_serving(vm: &Vm, deadline: Duration) -> Result<()> {
    wait_for(&format!("{} to serve", vm.host.name()), deadline, || {
        let status = status(vm)?;
        ensure!(
            status["state"] == "Serving" && status["controlConnected"] == true,
            "{status}"
        );
        Ok(())
    })
}

#[test]
fn rotation_under_load_fails_nothing() -> Result<()> {
    needs_clock!();
    let (a, b, mesh) = pair("rotation", "http=80:8080,tcp=7002", options())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let _echo = EchoServer::start(&b.host, "echo", 7002)?;
    a.curl_until(&format!("http://{CATALOG}/"), PATIENCE)?;
    let state = || -> Result<_> {
        Ok((
            [generation(&mesh, "a")?, generation(&mesh, "b")?],
            [serial(&a)?, serial(&b)?, discovery_serial(&mesh)?],
        ))
    };
    let (generations, serials) = state()?;
    let load = Client::load(&a.host, 60)?;
    let mut stream = Client::start(&a.host, "drip", 7002, 20)?;
    // Time flies 12,000 times faster: a half life is 3.6 s.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(16) {
        mesh.clock().advance(Duration::from_secs(600))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let requests = load.all_well().with_context(|| a.agent_log())?;
    let dripped = stream.end().context("the long stream")?;
    ensure!(requests > 600, "{requests} requests");
    ensure!(dripped.contains("dripped"), "{dripped}");
    let (later, new) = state()?;
    for (before, after) in generations.iter().zip(later) {
        ensure!(after >= before + 2, "generation {before} to {after}");
    }
    ensure!(serials.iter().zip(&new).all(|(old, new)| old != new), "{new:?}");
    for vm in [&a, &b] {
        wait_for_serving(vm, PATIENCE)?;
    }
    Ok(())
}
