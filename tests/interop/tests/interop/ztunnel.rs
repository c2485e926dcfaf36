//! An unmodified ztunnel with our discovery as control plane and CA, and as peer of our agent in both directions.

use crate::{CATALOG, PATIENCE, entry, vip};
use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;
use tombolo_testkit::{Mesh, MeshOptions, Nginx, require_root, skip, wait_for};

#[test]
fn ztunnel_both_ways() -> Result<()> {
    if !require_root("interop") {
        return Ok(());
    }
    let Some(program) = std::env::var_os("TOMBOLO_ZTUNNEL")
        .map(PathBuf::from)
        .filter(|path| path.exists())
    else {
        skip("ztunnel", "TOMBOLO_ZTUNNEL=/path names no ztunnel");
        return Ok(());
    };
    let mut mesh = Mesh::start("ztunnel", MeshOptions::default())?;
    mesh.group("webapp", "http=80:8080")?;
    mesh.group("catalog", "http=80:8080")?;
    let a = mesh.vm("a", "webapp")?;
    let z = mesh.bare("z")?;
    let _apps = (
        Nginx::start(&a.host, 8080, "webapp on a")?,
        Nginx::start(&z.host, 8080, "catalog behind ztunnel")?,
    );
    entry(&mesh, "z1", &z.host, "catalog")?;
    let token = mesh.tombolo("token create --bearer -n shop --service-account catalog")?;
    let roots = mesh
        .control
        .sh("cat /var/lib/tombolo/discovery/ca/root-cert.pem")?
        .checked()?
        .stdout;
    z.host.write("/run/zt/token", token.trim())?;
    z.host.write("/run/zt/root.pem", &roots)?;
    let discovery = format!("https://{}", mesh.control.at(15012));
    let mut command = z.host.command(&program.display().to_string());
    for (key, value) in [
        ("XDS_ADDRESS", discovery.as_str()),
        ("CA_ADDRESS", &discovery),
        ("XDS_ROOT_CA", "/run/zt/root.pem"),
        ("CA_ROOT_CA", "/run/zt/root.pem"),
        ("AUTH_TOKEN", "/run/zt/token"),
        ("CLUSTER_ID", "Kubernetes"),
        ("NETWORK", ""),
        ("CLUSTER_DOMAIN", "mesh.internal"),
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "shop/z1/catalog"),
        ("PACKET_MARK", "1337"),
        ("ENABLE_ORIG_SRC", "false"),
        ("IPV6_ENABLED", "false"),
        ("RUST_LOG", "info"),
    ] {
        command.env(key, value);
    }
    let process = z.host.spawn_command("ztunnel", command)?;
    wait_for("ztunnel to be ready", PATIENCE, || {
        z.host
            .sh("curl -sf -m 2 http://127.0.0.1:15021/healthz/ready")?
            .checked()
    })
    .with_context(|| process.log())?;
    // Our agent calls ztunnel.
    let answer = a
        .curl_until(&format!("http://{CATALOG}/"), PATIENCE)
        .with_context(|| process.log())?;
    ensure!(answer == "catalog behind ztunnel\n", "{answer}");
    // ztunnel calls our agent.
    z.host
        .sh("iptables -w -t nat -A OUTPUT -p tcp ! -o lo -m mark ! --mark 1337/0xfff -j REDIRECT --to-ports 15001")?
        .checked()?;
    let webapp = vip(&mesh, "webapp")?;
    let answer = wait_for("ztunnel's call", PATIENCE, || {
        Ok(z.host
            .sh(&format!("curl -sS -m 5 http://{webapp}/"))?
            .checked()?
            .stdout)
    })
    .with_context(|| format!("{}\n--- a\n{}", process.log(), a.agent_log()))?;
    ensure!(answer == "webapp on a\n", "{answer}");
    ensure!(
        a.agent_log().contains("sa/catalog"),
        "a's log names ztunnel's identity"
    );
    // Policies of ours reach ztunnel and hold there.
    mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-webapp, namespace: shop}\nspec:\n  action: DENY\n  selector: {matchLabels: {app: catalog}}\n  \
         rules: [{from: [{source: {principals: [mesh.example/ns/shop/sa/webapp]}}]}]\n",
    )?;
    wait_for("ztunnel to refuse", PATIENCE, || {
        ensure!(!a.curl(&format!("http://{CATALOG}/"))?.ok(), "still answered");
        Ok(())
    })
}
