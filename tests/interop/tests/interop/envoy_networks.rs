//! Envoy between networks, as Istio sets it up: as the gateway that our agent calls through, and as the caller through
//! ours.

use crate::{
    PATIENCE,
    site::{AGENT, GATEWAY, Site, service, service_entry, tail, url},
};
use anyhow::{Context as _, Result, bail, ensure};
use tombolo_testkit::{
    Host, Nginx, Process, envoy, envoy_double_client, envoy_east_west, envoy_sidecar_client,
    envoy_sidecar_server, require_root, skip, wait_for,
};

fn run(host: &Host, config: &str) -> Result<Process> {
    let program = envoy().context("checked before")?.display().to_string();
    host.write("/etc/tombolo-envoy.yaml", config)?;
    let arguments = "-c /etc/tombolo-envoy.yaml --concurrency 1 --use-dynamic-base-id --log-level warn --disable-hot-restart";
    host.spawn(&program, &arguments.split(' ').collect::<Vec<_>>())
}

#[test]
fn envoy_between_networks() -> Result<()> {
    if !require_root("interop") {
        return Ok(());
    }
    if envoy().is_none() {
        skip(
            "interop",
            "no Envoy: `make setup` fetches it, or TOMBOLO_ENVOY=/path",
        );
        return Ok(());
    }
    let mut site = Site::start("envoy-net", true)?;
    let authority = format!("{}:80", service("back"));
    {
        // Our agent through Envoy.
        let config = envoy_east_west(GATEWAY, "mesh.example", &authority, "10.0.0.5:15008");
        let process = run(&site.west_gateway.host, &config)?;
        let body = site
            .front
            .curl_until(&url("back"), PATIENCE)
            .with_context(|| process.log())?;
        ensure!(body == "back speaks\n", "{body}");
        wait_for("the caller's identity", PATIENCE, || {
            let log = site.back.agent_log();
            ensure!(
                log.contains("sa/front") && !log.contains("sa/gateway"),
                "{}",
                tail(&log)
            );
            Ok(())
        })?;
        // A policy of the endpoint's holds though this gateway asks none: it is refused inside.
        let denied = crate::site::deny("back", "mesh.example/ns/shop/sa/front");
        site.mesh.apply(&denied)?;
        wait_for("the refusal", PATIENCE, || {
            if site.front.curl(&url("back"))?.ok() {
                bail!("still answered")
            } else {
                Ok(())
            }
        })?;
        site.mesh.tombolo("delete ap no-caller -n shop")?;
        site.answers(&site.front, "back")?;
        // To Envoy a service that it does not know is not found: our agent says which gateway refused.
        drop(process);
        let config = envoy_east_west(GATEWAY, "mesh.example", "other.example:80", "10.0.0.5:15008");
        let _process = run(&site.west_gateway.host, &config)?;
        let name = format!("{}:80", service("back"));
        wait_for("why to name the gateway", PATIENCE, || {
            let why = site.front.host.run("tombolo", &["why", &name])?;
            ensure!(why.text().contains("404"), "{}", why.text());
            Ok(())
        })?;
    }
    // Envoy through our gateway, with the identity of front.
    let caller = &site.mesh.control;
    for file in ["identity.pem", "roots.pem"] {
        let text = site
            .front
            .host
            .sh(&format!("cat {AGENT}/{file}"))?
            .checked()?
            .stdout;
        caller.write(&format!("/run/caller/{file}"), &text)?;
    }
    let id = |path: &str| format!("spiffe://mesh.example/ns/{path}");
    let at = site.west_gateway.host.at(15008);
    let client = |gateway: &str, endpoint: &str| {
        envoy_double_client(
            "/run/caller",
            (&at, &id(gateway)),
            &authority,
            &id(endpoint),
            "east",
        )
    };
    let call = || caller.sh("curl -sS -m 5 http://127.0.0.1:19080/");
    {
        let process = run(caller, &client("tombolo-system/sa/gateway", "shop/sa/back"))?;
        let body =
            wait_for("Envoy's call", PATIENCE, || Ok(call()?.checked()?.stdout)).with_context(|| {
                format!(
                    "{}\n--- gateway\n{}",
                    process.log(),
                    tail(&site.west_gateway.log())
                )
            })?;
        ensure!(body == "back speaks\n", "{body}");
        wait_for("the gateway's log", PATIENCE, || {
            let log = site.west_gateway.log();
            ensure!(
                log.contains("sa/front") && log.contains(&service("back")),
                "{}",
                tail(&log)
            );
            Ok(())
        })?;
        site.mesh
            .apply(&crate::site::deny("back", "mesh.example/ns/shop/sa/front"))?;
        wait_for("the refusal", PATIENCE, || {
            ensure!(!call()?.ok(), "still answered");
            Ok(())
        })?;
        site.mesh.tombolo("delete ap no-caller -n shop")?;
    }
    // It finds out who is at either end, and refuses the wrong one.
    for (gateway, endpoint) in [
        ("tombolo-system/sa/gateway", "shop/sa/other"),
        ("shop/sa/other", "shop/sa/back"),
    ] {
        let _process = run(caller, &client(gateway, endpoint))?;
        wait_for("Envoy to listen", PATIENCE, || {
            caller.sh("ss -Hltn 'sport = 19080' | grep -q .")?.checked()
        })?;
        ensure!(!call()?.ok(), "{gateway} {endpoint}");
    }
    sidecars(&mut site)
}

/// Sidecars at both ends, our gateway's port 15443 between them: it passes their TLS on unopened.
fn sidecars(site: &mut Site) -> Result<()> {
    let called = site.mesh.bare_in(&mut site.west, "sidecar", 8)?;
    let _application = Nginx::start(&called.host, 8081, "sidecar speaks")?;
    for file in ["identity.pem", "roots.pem"] {
        let text = site
            .back
            .host
            .sh(&format!("cat {AGENT}/{file}"))?
            .checked()?
            .stdout;
        called.host.write(&format!("/run/sidecar/{file}"), &text)?;
    }
    site.mesh.apply(&format!(
        "{}---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: sidecar, namespace: shop, \
         labels: {{app: sidecar}}}}\nspec: {{address: 10.0.0.8, network: net2, serviceAccount: back, ports: {{http: 8080}}}}\n",
        service_entry("sidecar")
    ))?;
    let config = envoy_sidecar_server("/run/sidecar", "mesh.example", 8080, "127.0.0.1:8081");
    let server = run(&called.host, &config)?;
    let caller = &site.mesh.control;
    let at = site.west_gateway.host.at(15443);
    let call = || caller.sh("curl -sS -m 5 http://127.0.0.1:19080/");
    let client = |name: &str| {
        let server_name = format!("outbound_.80_._.{}", service(name));
        let peer = "spiffe://mesh.example/ns/shop/sa/back";
        run(
            caller,
            &envoy_sidecar_client("/run/caller", &at, &server_name, peer),
        )
    };
    {
        let process = client("sidecar")?;
        let body = wait_for("the sidecar's call", PATIENCE, || Ok(call()?.checked()?.stdout));
        let body = body.with_context(|| format!("{}\n---\n{}", process.log(), server.log()))?;
        ensure!(body == "sidecar speaks\n", "{body}");
    }
    // A host that is not opted in.
    let _process = client("back")?;
    wait_for("Envoy to listen", PATIENCE, || {
        caller.sh("ss -Hltn 'sport = 19080' | grep -q .")?.checked()
    })?;
    ensure!(!call()?.ok(), "back is not in passthrough_hosts");
    Ok(())
}
