//! Envoy as HBONE client of our agent, and as HBONE server behind it, with certificates of our CA.

use crate::{CATALOG, PATIENCE, entry};
use anyhow::{Context as _, Result, bail, ensure};
use tombolo_testkit::{
    Host, Mesh, MeshOptions, Nginx, Process, envoy, envoy_client, envoy_server, require_root, skip, wait_for,
};

const STATE: &str = "/var/lib/tombolo/agent";

fn run(host: &Host, config: &str) -> Result<Process> {
    let program = envoy().context("checked before")?.display().to_string();
    host.write("/etc/tombolo-envoy.yaml", config)?;
    host.spawn(
        &program,
        &[
            "-c",
            "/etc/tombolo-envoy.yaml",
            "--concurrency",
            "1",
            "--use-dynamic-base-id",
            "--log-level",
            "warn",
            "--disable-hot-restart",
        ],
    )
}

fn ready() -> bool {
    if !require_root("interop") {
        return false;
    }
    if envoy().is_none() {
        skip(
            "interop",
            "no Envoy: `make setup` fetches it, or TOMBOLO_ENVOY=/path",
        );
        return false;
    }
    true
}

#[test]
fn envoy_calls_our_agent() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut mesh = Mesh::start("envoy-c", MeshOptions::default())?;
    mesh.group("webapp", "http=80:8080")?;
    mesh.group("catalog", "http=80:8080")?;
    let (a, b) = (mesh.vm("a", "webapp")?, mesh.vm("b", "catalog")?);
    let _nginx = Nginx::start(&b.host, 8080, "hello envoy")?;
    let id = |sa: &str| format!("spiffe://mesh.example/ns/shop/sa/{sa}");
    let call = || a.host.sh("curl -sS -m 5 http://127.0.0.1:19080/");
    {
        let process = run(
            &a.host,
            &envoy_client(STATE, &b.host.at(15008), &b.host.at(8080), &id("catalog")),
        )?;
        let answer = wait_for("Envoy's call", PATIENCE, || Ok(call()?.checked()?.stdout))
            .with_context(|| process.log())?;
        ensure!(answer == "hello envoy\n", "{answer}");
        // A policy of ours is the policy of Envoy's calls too.
        mesh.apply(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-webapp, namespace: shop}\nspec:\n  action: DENY\n  \
             rules: [{from: [{source: {principals: [mesh.example/ns/shop/sa/webapp]}}]}]\n",
        )?;
        wait_for("the refusal", PATIENCE, || {
            if call()?.ok() {
                bail!("still answered")
            } else {
                Ok(())
            }
        })?;
        mesh.tombolo("delete ap no-webapp -n shop")?;
        wait_for("the way back", PATIENCE, || call()?.checked())?;
    }
    {
        // A port that is not declared is not delivered.
        let _other = Nginx::start(&a.host, 18081, "unused")?;
        let _process = run(
            &a.host,
            &envoy_client(STATE, &b.host.at(15008), &b.host.at(22), &id("catalog")),
        )?;
        wait_for("Envoy to listen", PATIENCE, || {
            a.host.sh("ss -Hltn 'sport = 19080' | grep -q .")?.checked()
        })?;
        ensure!(!call()?.ok(), "port 22 must not be delivered");
    }
    // Envoy refuses our agent when it expects somebody else.
    let _process = run(
        &a.host,
        &envoy_client(STATE, &b.host.at(15008), &b.host.at(8080), &id("somebody")),
    )?;
    wait_for("Envoy to listen", PATIENCE, || {
        a.host.sh("ss -Hltn 'sport = 19080' | grep -q .")?.checked()
    })?;
    ensure!(!call()?.ok(), "the wrong identity must be refused");
    Ok(())
}

#[test]
fn our_agent_calls_envoy() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut mesh = Mesh::start("envoy-s", MeshOptions::default())?;
    mesh.group("webapp", "http=80:8080")?;
    mesh.group("catalog", "http=80:8080")?;
    mesh.group("wrong", "http=80:8080")?;
    let (a, e, w) = (
        mesh.vm("a", "webapp")?,
        mesh.vm("e", "catalog")?,
        mesh.vm("w", "wrong")?,
    );
    let _apps = (
        Nginx::start(&e.host, 8080, "behind envoy")?,
        Nginx::start(&w.host, 8080, "must not answer")?,
    );
    // Both hosts keep their certificate files and go on without our agent.
    for vm in [&e, &w] {
        vm.host
            .sh(&format!("cp -a {STATE} /run/envoy-state"))?
            .checked()?;
        vm.host.run("tombolo", &["down"])?.checked()?;
    }
    let peer = "spiffe://mesh.example/ns/shop/sa/webapp";
    let process = run(&e.host, &envoy_server("/run/envoy-state", peer))?;
    entry(&mesh, "envoy-1", &e.host, "catalog")?;
    let url = format!("http://{CATALOG}/");
    let answer = a.curl_until(&url, PATIENCE).with_context(|| process.log())?;
    ensure!(answer == "behind envoy\n", "{answer}");
    // The same service, but the host behind the address has another identity: refused, and why says so.
    drop(process);
    mesh.tombolo("delete we envoy-1 -n shop")?;
    let _process = run(&w.host, &envoy_server("/run/envoy-state", peer))?;
    entry(&mesh, "envoy-2", &w.host, "catalog")?;
    wait_for("why to name the identity", PATIENCE, || {
        let why = a.host.run("tombolo", &["why", &format!("{CATALOG}:80")])?;
        if why.text().contains("TMB0407") {
            Ok(())
        } else {
            bail!("{}", why.text())
        }
    })?;
    ensure!(!a.curl(&url)?.ok());
    Ok(())
}
