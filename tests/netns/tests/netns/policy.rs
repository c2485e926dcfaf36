//! AuthorizationPolicy and PeerAuthentication, on new and on open connections.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Result, bail, ensure};
use std::time::Duration;
use tombolo_testkit::{EchoServer, MeshOptions, Nginx, Redis, wait_for};

fn deny(name: &str, principal: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  action: DENY\n  \
         rules: [{{from: [{{source: {{principals: [{principal}]}}}}]}}]\n"
    )
}

#[test]
fn a_policy_cuts_refuses_and_is_named() -> Result<()> {
    needs_root!();
    let (a, b, mut mesh) = pair("policy", "http=80:8080,echo=7003", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let _echo = EchoServer::start(&b.host, "echo", 7003)?;
    let url = format!("http://{CATALOG}/");
    a.curl_until(&url, PATIENCE)?;
    // A second member of the caller's group with the same identity, and one with another.
    mesh.group("other", "http=80:8080")?;
    let other = mesh.vm("other", "other")?;
    other.curl_until(&url, PATIENCE)?;
    let mut open = a
        .host
        .spawn("tombolo-peer", &["call", "banner", CATALOG, "7003"])?; // waits for a banner that never comes
    wait_for("the open connection", PATIENCE, || {
        let open = b.host.sh("ss -Htn state established 'sport = 7003'")?.stdout;
        if open.trim().is_empty() {
            bail!("not yet")
        } else {
            Ok(())
        }
    })?;
    mesh.apply(&deny("no-webapp", "mesh.example/ns/shop/sa/webapp"))?;
    wait_for("the refusal", PATIENCE, || {
        let how = a.host.run("tombolo-peer", &["call", "connect", CATALOG, "80"])?;
        if how.stdout.starts_with("ECONNREFUSED") {
            Ok(())
        } else {
            bail!("{}", how.text())
        }
    })?;
    ensure!(
        open.wait(Duration::from_secs(3)).is_some_and(|code| code != 0),
        "the open connection must be cut"
    );
    ensure!(other.curl(&url)?.ok(), "others are not touched");
    let why = a.host.run("tombolo", &["why", &format!("{CATALOG}:80")])?;
    ensure!(
        why.code == 1 && why.stdout.contains("shop/no-webapp"),
        "{}",
        why.text()
    );
    ensure!(
        other
            .host
            .run("tombolo", &["why", &format!("{CATALOG}:80")])?
            .ok()
    );
    mesh.tombolo("delete ap no-webapp -n shop")?;
    a.curl_until(&url, PATIENCE)?;
    // An ALLOW policy that names somebody else denies everybody else.
    mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: only-other, namespace: shop}\nspec:\n  selector: {matchLabels: {app: catalog}}\n  \
         rules: [{from: [{source: {serviceAccounts: [shop/other]}}]}]\n",
    )?;
    wait_for("a to be refused", PATIENCE, || {
        if a.curl(&url)?.ok() {
            bail!("still answered")
        } else {
            Ok(())
        }
    })?;
    ensure!(other.curl(&url)?.ok());
    Ok(())
}

#[test]
fn revocation_cuts_one_device_and_no_other() -> Result<()> {
    needs_root!();
    let (a, b, mut mesh) = pair("revoke", "redis=6379", MeshOptions::default())?;
    let _redis = Redis::start(&b.host, 6379)?;
    let twin = mesh.vm("twin", "webapp")?;
    let hold = |vm: &tombolo_testkit::Vm| {
        vm.host
            .spawn("redis-cli", &["-h", CATALOG, "blpop", "never", "0"])
    };
    for vm in [&a, &twin] {
        wait_for("redis", PATIENCE, || {
            vm.host.sh(&format!("redis-cli -h {CATALOG} ping"))?.checked()
        })?;
    }
    let (mut of_a, mut of_twin) = (hold(&a)?, hold(&twin)?);
    wait_for("both sessions", PATIENCE, || {
        let clients = b.host.sh("redis-cli info clients")?.stdout;
        if clients.contains("blocked_clients:2") {
            Ok(())
        } else {
            bail!("{clients}")
        }
    })?;
    let list: String = mesh.tombolo("vm list -n shop -o json")?;
    let status = a.host.run("tombolo", &["status", "-o", "json"])?.stdout;
    let device = status
        .split('"')
        .find(|word| word.len() == 16 && word.bytes().all(|b| b.is_ascii_hexdigit()))
        .map(str::to_owned)
        .unwrap_or_default();
    ensure!(list.contains(&device) && !device.is_empty(), "{list}\n{status}");
    let begun = std::time::Instant::now();
    mesh.tombolo(&format!("vm revoke {device} --reason stolen"))?;
    wait_for("the cut", Duration::from_secs(5), || {
        let clients = b.host.sh("redis-cli info clients")?.stdout;
        if clients.contains("blocked_clients:1") {
            Ok(())
        } else {
            bail!("{clients}")
        }
    })?;
    ensure!(
        begun.elapsed() < Duration::from_millis(1500),
        "cut after {:?}",
        begun.elapsed()
    );
    ensure!(of_twin.is_running(), "the twin's session lives on");
    ensure!(of_a.wait(PATIENCE).is_some(), "the revoked session ends");
    ensure!(
        !a.host
            .sh(&format!("timeout 5 redis-cli -h {CATALOG} ping"))?
            .stdout
            .contains("PONG"),
        "the revoked key is refused"
    );
    ensure!(
        twin.host
            .sh(&format!("redis-cli -h {CATALOG} ping"))?
            .stdout
            .contains("PONG")
    );
    ensure!(mesh.tombolo("vm list -n shop")?.contains("Revoked"));
    Ok(())
}
