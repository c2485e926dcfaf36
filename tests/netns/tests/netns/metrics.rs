//! Metrics of hosts that nobody can scrape, seen by a real Prometheus through discovery.

use crate::{CATALOG, PATIENCE, needs_root};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tombolo_testkit::{Host, Mesh, MeshOptions, Nginx, Vm, wait_for};

/// Out: to discovery and answers; in: HBONE and answers. Nobody comes to the metrics port, and nothing is pushed elsewhere.
const FIREWALL: &str = "table inet fw {\n\
    chain in { type filter hook input priority 0; policy drop; iif lo accept; iifname mesh0 accept; \
    ct state established accept; tcp dport 15008 accept; }\n\
    chain out { type filter hook output priority 0; policy drop; oif lo accept; oifname mesh0 accept; \
    ct state established accept; tcp dport 15012 accept; }\n}\n";

fn pushing(mesh: &mut Mesh, name: &str, group: &str) -> Result<Vm> {
    let vm = mesh.bare(name)?;
    vm.host.write(
        "/etc/tombolo/agent.yaml",
        "access_log: all\nmetrics_push_seconds: 1\n",
    )?;
    vm.up(&mesh.token(group)?)?;
    Ok(vm)
}

fn get(host: &Host, url: &str) -> Result<Value> {
    let text = host
        .run("curl", &["-sS", "-f", "-m", "5", url])?
        .checked()?
        .stdout;
    serde_json::from_str(&text).with_context(|| text)
}

#[test]
fn prometheus_sees_a_host_that_may_only_reach_discovery() -> Result<()> {
    needs_root!();
    let mut mesh = Mesh::start("metrics", MeshOptions::default())?;
    // As docs/OPERATIONS.md says: the page is opened to the scraper, the one line that this takes.
    mesh.kill_discovery();
    mesh.control
        .sh("sed -i 's/^debug_listen:.*/debug_listen: 0.0.0.0:15014/' /etc/tombolo/discovery.yaml")?
        .checked()?;
    mesh.start_discovery()?;
    mesh.group("webapp", "http=80:8080")?;
    mesh.group("catalog", "http=80:8080")?;
    let b = pushing(&mut mesh, "b", "catalog")?;
    let a = pushing(&mut mesh, "a", "webapp")?;
    b.host.write("/run/fw.nft", FIREWALL)?;
    b.host.sh("nft -f /run/fw.nft")?.checked()?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    a.curl_until(&format!("http://{CATALOG}/"), PATIENCE)?;

    let base = format!("http://{}", mesh.control.at(15014));
    let prometheus = mesh.lab.host("prometheus")?;
    ensure!(
        prometheus
            .sh(&format!("curl -sS -m 1 http://{}/metrics", b.host.at(15020)))?
            .code
            != 0,
        "nobody scrapes it directly"
    );
    prometheus.write(
        "/etc/prom.yaml",
        &format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: tombolo-vms\n  \
             http_sd_configs: [{{url: '{base}/http_sd', refresh_interval: 1s}}]\n"
        ),
    )?;
    prometheus.sh("promtool check config /etc/prom.yaml")?.checked()?;
    let server = prometheus.spawn(
        "prometheus",
        &[
            "--config.file=/etc/prom.yaml",
            "--storage.tsdb.path=/run/prometheus",
            "--web.listen-address=127.0.0.1:9090",
        ],
    )?;
    let query = |text: &str| {
        get(
            &prometheus,
            &format!("http://127.0.0.1:9090/api/v1/query?query={text}"),
        )
    };
    let opened = wait_for("the counters of b", PATIENCE, || {
        let found = query("istio_tcp_connections_opened_total%7Bworkload_group=%22catalog%22%7D")?;
        let series = found["data"]["result"][0].clone();
        ensure!(series.is_object(), "{found} {}", server.log());
        Ok(series)
    })?;
    let (labels, value) = (&opened["metric"], &opened["value"][1]);
    let device_name = labels["workload"].as_str().unwrap_or_default();
    ensure!(device_name.starts_with("catalog-"), "{labels}");
    for (label, wanted) in [
        ("namespace", "shop"),
        ("service_account", "catalog"),
        ("reporter", "destination"),
        ("instance", &format!("shop/{device_name}")),
    ] {
        ensure!(labels[label] == wanted, "{label}: {labels}");
    }
    ensure!(value.as_str().is_some_and(|count| count != "0"), "{value}");
    wait_for("both targets to be up", PATIENCE, || {
        let up = query("up")?;
        let up = up["data"]["result"].as_array().cloned().unwrap_or_default();
        ensure!(
            up.len() == 2 && up.iter().all(|series| series["value"][1] == "1"),
            "{up:?}"
        );
        Ok(())
    })?;
    // What is served is what the format's own tool takes, without a word.
    let page = format!("{base}/metrics/vm/shop/{device_name}");
    prometheus
        .sh(&format!("curl -sSf {page} > /run/page && promtool check metrics < /run/page 2>&1 | grep -v 'no help text\\|_total' > /run/lint; cat /run/lint; ! grep -q error /run/lint"))?
        .checked()?;
    // Who leaves is no target any more, and its page is gone.
    a.host.run("tombolo", &["leave"])?.checked()?;
    wait_for("one target", PATIENCE, || {
        let list = get(&prometheus, &format!("{base}/http_sd"))?;
        ensure!(list.as_array().is_some_and(|list| list.len() == 1), "{list}");
        Ok(())
    })?;
    // Who pushes no longer, because its owner says so, stays a target that is down only as long as it is a member.
    ensure!(get(&prometheus, &page).is_err(), "a page is no JSON");
    ensure!(
        prometheus
            .run("curl", &["-sSf", &format!("{base}/metrics/vm/shop/none")])?
            .code
            == 22
    );
    Ok(())
}
