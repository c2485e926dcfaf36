//! What can be seen from outside: metrics, access log, status, and what `why` says of each broken hop.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};
use tombolo_testkit::{MeshOptions, Nginx, Vm, wait_for};

const WEBAPP: &str = "spiffe://mesh.example/ns/shop/sa/webapp";
const CALLEE: &str = "spiffe://mesh.example/ns/shop/sa/catalog";

/// Lines of the agent's log about connections, as JSON.
fn connections(vm: &Vm) -> Result<Vec<Value>> {
    let log = vm.host.sh("cat /var/log/tombolo/agent.log")?.stdout;
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter(|line| line["target"] == "access").collect())
}

fn field<'a>(line: &'a Value, name: &str) -> &'a str {
    line[name].as_str().unwrap_or_default()
}

/// The value of the series of a family that has all these labels.
fn series(text: &str, family: &str, labels: &[(&str, &str)]) -> Option<u64> {
    text.lines()
        .filter(|line| line.starts_with(&format!("{family}{{")))
        .find(|line| {
            labels
                .iter()
                .all(|(name, value)| line.contains(&format!("{name}=\"{value}\"")))
        })
        .and_then(|line| line.rsplit(' ').next()?.parse().ok())
}

fn metrics(vm: &Vm) -> Result<String> {
    Ok(vm
        .host
        .sh("curl -sf -m 2 http://127.0.0.1:15020/metrics")?
        .checked()?
        .stdout)
}

#[test]
fn metrics_and_access_log_name_both_ends() -> Result<()> {
    needs_root!();
    let (a, b, mesh) = pair("seen", "http=80:8080", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    for vm in [&a, &b] {
        vm.host.run("tombolo", &["down"])?.checked()?;
        vm.host
            .write("/etc/tombolo/agent.yaml", "access_log: all\nlog_format: json\n")?;
        vm.host
            .sh("rm /var/log/tombolo/agent.log; tombolo up")?
            .checked()?;
    }
    a.curl_until(&format!("http://{CATALOG}/"), PATIENCE)?;

    // Both ends tell the same story, with Istio's names.
    let of = |vm: &Vm, direction: &str| -> Result<Value> {
        wait_for("the line", PATIENCE, || {
            let lines = connections(vm)?;
            let line = lines
                .iter()
                .find(|line| line["direction"] == direction && line["message"] == "connection complete");
            line.cloned().with_context(|| format!("{lines:?}"))
        })
    };
    for (vm, direction) in [(&a, "outbound"), (&b, "inbound")] {
        let line = of(vm, direction)?;
        ensure!(
            field(&line, "src_identity") == WEBAPP && field(&line, "dst_identity") == CALLEE,
            "{line}"
        );
        ensure!(field(&line, "src_workload").starts_with("webapp-"), "{line}");
        ensure!(field(&line, "dst_workload").starts_with("catalog-"), "{line}");
        ensure!(
            field(&line, "dst_address").ends_with(":8080") && line["response_flags"] == "-",
            "{line}"
        );
        ensure!(
            line["bytes_sent"].as_u64() > Some(50) && line["bytes_received"].as_u64() > Some(50),
            "{line}"
        );
        ensure!(line["duration_ms"].is_u64(), "{line}");
        for absent in ["reason", "detail", "policy"] {
            ensure!(line.get(absent).is_none(), "{absent} in {line}");
        }
    }
    let common = [
        ("source_workload", "webapp"),
        ("source_workload_namespace", "shop"),
        ("source_principal", WEBAPP),
        ("source_canonical_service", "webapp"),
        ("source_cluster", "Kubernetes"),
        ("destination_service", CATALOG),
        ("destination_service_name", "catalog"),
        ("destination_service_namespace", "shop"),
        ("destination_workload", "catalog"),
        ("destination_workload_namespace", "shop"),
        ("destination_principal", CALLEE),
        ("destination_canonical_service", "catalog"),
        ("destination_cluster", "Kubernetes"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let text = metrics(&a)?;
    for family in [
        "istio_tcp_connections_opened_total",
        "istio_tcp_connections_closed_total",
        "istio_tcp_sent_bytes_total",
        "istio_tcp_received_bytes_total",
    ] {
        let value = series(&text, family, &[&common[..], &[("reporter", "source")]].concat());
        ensure!(value.is_some_and(|value| value > 0), "{family}: {text}");
        let there = metrics(&b)?;
        let at_callee = series(
            &there,
            family,
            &[("reporter", "destination"), ("source_principal", WEBAPP)],
        );
        ensure!(at_callee.is_some_and(|value| value > 0), "{family}: {there}");
    }

    // Plain TCP proves nobody, and no line says so.
    let mut plain = mesh
        .control
        .spawn("tombolo-peer", &["serve", "banner", "18081"])?;
    mesh.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: outside, namespace: shop}}\nspec:\n  \
         hosts: [outside.shop.svc.mesh.internal]\n  location: MESH_EXTERNAL\n  resolution: STATIC\n  \
         ports: [{{number: 80, name: tcp, protocol: TCP, targetPort: 18081}}]\n  endpoints: [{{address: {}}}]\n",
        mesh.control.ipv4()
    ))?;
    wait_for("the plain call", PATIENCE, || {
        a.host
            .sh("timeout 3 nc -w 1 outside.shop.svc.mesh.internal 80 </dev/null | grep .")?
            .checked()
    })?;
    wait_for("its line", PATIENCE, || {
        let lines = connections(&a)?;
        let line = lines
            .iter()
            .find(|line| line["dst_workload"] == "outside" && line["message"] == "connection complete")
            .with_context(|| format!("{lines:?}"))?;
        ensure!(line.get("dst_identity").is_none(), "{line}");
        Ok(())
    })?;
    let text = metrics(&a)?;
    let labels = [
        ("destination_service_name", "outside"),
        ("destination_principal", "unknown"),
        ("connection_security_policy", "unknown"),
    ];
    ensure!(
        series(&text, "istio_tcp_connections_opened_total", &labels) >= Some(1),
        "{text}"
    );
    plain.kill();

    // Refused: always written, with the policy, and the flag of who is to blame.
    mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-webapp, namespace: shop}\nspec:\n  action: DENY\n  \
         selector: {matchLabels: {app: catalog}}\n  rules: [{from: [{source: {serviceAccounts: [shop/webapp]}}]}]\n",
    )?;
    wait_for("the refusal", PATIENCE, || {
        ensure!(!a.curl(&format!("http://{CATALOG}/"))?.ok());
        let lines = connections(&b)?;
        let line = lines.iter().find(|line| line["message"] == "connection failed");
        let line = line.with_context(|| format!("{lines:?}"))?;
        ensure!(
            field(line, "policy") == "shop/no-webapp" && field(line, "level") == "WARN",
            "{line}"
        );
        ensure!(
            field(line, "src_identity") == WEBAPP && line["response_flags"] != "-",
            "{line}"
        );
        Ok(())
    })?;
    // Loopback only.
    for port in [15020, 15021] {
        ensure!(
            !b.host
                .sh(&format!("curl -s -m 1 http://{}:{port}/metrics", b.host.ipv4()))?
                .ok()
        );
    }
    let ready = b
        .host
        .sh("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:15021/healthz/ready")?;
    ensure!(ready.stdout == "200", "{}", ready.text());
    Ok(())
}

/// A broken hop: its name, its code, and a next step.
fn broken(vm: &Vm, destination: &str, hop: &str, code: &str) -> Result<()> {
    let output = vm.host.run("tombolo", &["why", destination, "-o", "json"])?;
    ensure!(output.code == 1, "{destination}: {}", output.text());
    let answer: Value = serde_json::from_str(&output.stdout)?;
    let hops = answer["hops"].as_array().context("hops")?;
    let found = hops
        .iter()
        .find(|hop| hop["result"] == "broken")
        .context("no broken hop")?;
    ensure!(
        found["name"] == hop && found["finding"]["code"] == code,
        "{destination}: {hop} {code} is not what is said: {found}"
    );
    ensure!(
        found["finding"]["next"]
            .as_str()
            .is_some_and(|next| !next.is_empty()),
        "{found}"
    );
    ensure!(
        hops.iter()
            .skip_while(|hop| hop["result"] != "broken")
            .skip(1)
            .all(|hop| hop["result"] == "skipped"),
        "nothing is said of what was not reached: {answer}"
    );
    Ok(())
}

#[test]
fn why_names_each_broken_hop() -> Result<()> {
    needs_root!();
    let (a, b, mesh) = pair("why", "http=80:8080,redis=6379", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let url = format!("http://{CATALOG}/");
    a.curl_until(&url, PATIENCE)?;
    let web = format!("{CATALOG}:80");
    ensure!(a.host.run("tombolo", &["why", &web])?.ok());
    let eventually = |destination: &str, hop: &str, code: &str| {
        wait_for(code, PATIENCE, || broken(&a, destination, hop, code))
    };
    let well = || {
        wait_for("all hops to hold", PATIENCE, || {
            a.host.run("tombolo", &["why", &web])?.checked()
        })
    };

    broken(&a, "catlog.shop.svc.mesh.internal:80", "name", "TMB0401")?;
    let slip = a
        .host
        .run("tombolo", &["why", "catlog.shop.svc.mesh.internal:80"])?;
    let meant = format!("did you mean {CATALOG}?");
    ensure!(slip.text().contains(&meant), "{}", slip.text());
    broken(&a, &format!("{CATALOG}:81"), "vip", "TMB0403")?;
    broken(&a, &format!("{CATALOG}:6379"), "application", "TMB0408")?;

    // The host does not ask the mesh.
    let resolver = a.host.sh("cat /etc/resolv.conf")?.stdout;
    a.host
        .write("/etc/resolv.conf", &format!("nameserver {}\n", a.host.router()))?;
    eventually(&web, "name", "TMB0402")?;
    a.host.write("/etc/resolv.conf", &resolver)?;
    well()?;

    // Somebody else than who it must be, and a port that nobody declared.
    let entry = |name: &str, account: &str, port: u16| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
             hosts: [{name}.shop.svc.mesh.internal]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
             ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {port}}}]\n  \
             endpoints: [{{address: {}, serviceAccount: {account}, labels: {{networking.istio.io/tunnel: http}}}}]\n",
            b.host.ipv4()
        )
    };
    mesh.apply(&format!(
        "{}{}",
        entry("poser", "somebody", 8080),
        entry("hidden", "catalog", 9999)
    ))?;
    eventually("poser.shop.svc.mesh.internal:80", "tls", "TMB0407")?;
    // Over the wire an undeclared port looks as one where nobody listens; the callee itself knows which it is.
    eventually("hidden.shop.svc.mesh.internal:80", "application", "TMB0408")?;
    wait_for("TMB0409", PATIENCE, || {
        broken(&b, "hidden.shop.svc.mesh.internal:80", "application", "TMB0409")
    })?;

    // Endpoints that are names, which nobody looks up: the author is told, and connect() is not kept waiting.
    mesh.control.write(
        "/run/named.yaml",
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: named, namespace: shop}\nspec:\n  \
         hosts: [named.shop.svc.mesh.internal]\n  location: MESH_INTERNAL\n  resolution: DNS\n  \
         ports: [{number: 80, name: http, protocol: HTTP}]\n  endpoints: [{address: db.example.org}]\n",
    )?;
    let applied = mesh.control.run("tombolo", &["apply", "-f", "/run/named.yaml"])?;
    ensure!(
        applied.ok() && applied.text().contains("agents do not look endpoints up"),
        "{}",
        applied.text()
    );
    eventually("named.shop.svc.mesh.internal:80", "endpoint", "TMB0410")?;
    let began = Instant::now();
    let connect = ["call", "connect", "named.shop.svc.mesh.internal", "80"];
    let how = a.host.run("tombolo-peer", &connect)?;
    ensure!(
        how.stdout.starts_with("ECONNREFUSED") || how.stdout.starts_with("EHOSTUNREACH"),
        "{}",
        how.text()
    );
    ensure!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());

    // The way to 15008 is closed.
    b.host
        .sh("nft add table inet shut && nft add chain inet shut in '{ type filter hook input priority 0; }' && nft add rule inet shut in tcp dport 15008 reject with tcp reset")?
        .checked()?;
    b.host.sh("ss -K sport = 15008 >/dev/null 2>&1 || true")?;
    eventually(&web, "tls", "TMB0406")?;
    b.host.sh("nft delete table inet shut")?.checked()?;
    well()?;

    // Policy, with the policy's own words.
    mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-webapp, namespace: shop}\nspec:\n  action: DENY\n  \
         selector: {matchLabels: {app: catalog}}\n  rules: [{from: [{source: {serviceAccounts: [shop/webapp]}}]}]\n",
    )?;
    eventually(&web, "policy", "TMB0404")?;
    let text = a.host.run("tombolo", &["why", &web])?.stdout;
    ensure!(
        text.contains("shop/no-webapp") && text.contains("tombolo get ap -n shop no-webapp"),
        "{text}"
    );
    mesh.tombolo("delete ap no-webapp -n shop")?;
    well()?;

    // Nobody is there.
    b.host.run("tombolo", &["down"])?.checked()?;
    eventually(&web, "endpoint", "TMB0405")?;
    let list = mesh.tombolo("vm list -n shop")?;
    ensure!(
        !list.contains("TMB0306"),
        "a stopped agent is no failing probe: {list}"
    );
    Ok(())
}
