//! East-west gateways: two networks with the same addresses, hosts that only dial out, gateways that die.

use crate::{PATIENCE, needs_root};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    io::Write as _,
    os::unix::fs::FileExt as _,
    process::Stdio,
    time::{Duration, Instant},
};
use tombolo_testkit::{Gateway, Lan, Mesh, MeshOptions, Nginx, Vm, wait_for};

/// What stands in every request and answer of a capture, if it can be read there.
const CANARY: &str = "canary-7f3a91";

/// Discovery, and a gateway beside it: whoever else wants to reach discovery comes through the gateway's port 443.
pub(crate) struct Site {
    pub(crate) mesh: Mesh,
    pub(crate) east: Lan,
    pub(crate) west: Lan,
    pub(crate) gateway: Gateway,
}

impl Site {
    pub(crate) fn start(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, MeshOptions::default())?;
        let (mut east, west) = (mesh.lab.lan("east")?, mesh.lab.lan("west")?);
        let gateway = mesh.gateway("gw1", "", &mut east, 201)?;
        let (discovery, only) = (
            mesh.control.address().to_string(),
            gateway.host.address().to_string(),
        );
        mesh.lab.on_router(&[
            "iptables", "-A", "FORWARD", "-d", &discovery, "-p", "tcp", "--dport", "15012", "!", "-s", &only,
            "-j", "REJECT",
        ])?;
        Ok(Self {
            mesh,
            east,
            west,
            gateway,
        })
    }

    /// A group of a network with its service: 80 to 8080, and 81 to a port where nobody listens.
    pub(crate) fn group(&self, name: &str, network: &str, annotations: &str) -> Result<()> {
        self.mesh.apply(&format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata:\n  name: {name}\n  namespace: shop\n  \
             annotations: {{tombolo.io/address-cidrs: 10.0.0.0/24{annotations}}}\nspec:\n  template:\n    \
             serviceAccount: {name}\n    network: '{network}'\n    labels: {{app: {name}}}\n    ports: {{http: 8080, closed: 8081}}\n\
             ---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
             hosts: [{host}]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
             ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}, {{number: 81, name: closed, protocol: TCP, targetPort: 8081}}]\n  \
             workloadSelector: {{labels: {{app: {name}}}}}\n",
            host = host(name)
        ))?;
        Ok(())
    }

    pub(crate) fn vm(&mut self, east: bool, name: &str, last: u8) -> Result<Vm> {
        let lan = if east { &mut self.east } else { &mut self.west };
        let vm = self.mesh.bare_in(lan, name, last)?;
        vm.up(&self.mesh.token(name)?)?;
        Ok(vm)
    }
}

pub(crate) fn host(name: &str) -> String {
    format!("{name}.shop.svc.mesh.internal")
}

fn url(name: &str) -> String {
    format!("http://{}/", host(name))
}

pub(crate) fn answers(from: &Vm, name: &str, by: &Gateway) -> Result<()> {
    let body = wait_for(&url(name), PATIENCE, || {
        Ok(from.curl(&url(name))?.checked()?.stdout)
    });
    let body =
        body.with_context(|| format!("{}\n--- gateway\n{}", tail(&from.agent_log()), tail(&by.log())))?;
    ensure!(body == format!("{name} speaks\n"), "{body}");
    Ok(())
}

pub(crate) fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

pub(crate) fn serve(vm: &Vm, name: &str) -> Result<Nginx> {
    Nginx::start(&vm.host, 8080, &format!("{name} speaks"))
}

pub(crate) fn connect(from: &Vm, name: &str, port: &str) -> Result<String> {
    let how = from
        .host
        .run("tombolo-peer", &["call", "connect", &host(name), port])?;
    Ok(how.text())
}

/// A second network with a gateway, and a host in each that has the same address.
pub(crate) fn pair(name: &str) -> Result<(Vm, Vm, Gateway, Site)> {
    let mut site = Site::start(name)?;
    let far = site.mesh.gateway("gw2", "net2", &mut site.west, 202)?;
    site.group("front", "", "")?;
    site.group("back", "net2", "")?;
    let front = site.vm(true, "front", 5)?;
    let back = site.vm(false, "back", 5)?;
    Ok((front, back, far, site))
}

#[test]
fn two_networks_with_the_same_addresses() -> Result<()> {
    needs_root!();
    let (front, back, far, site) = pair("twonets")?;
    let _servers = (serve(&front, "front")?, serve(&back, "back")?);
    answers(&front, "back", &far)?;
    answers(&back, "front", &site.gateway)?;
    // Who called is what the callee sees, not the gateway.
    for (vm, caller) in [(&back, "sa/front"), (&front, "sa/back")] {
        wait_for(caller, PATIENCE, || {
            let log = vm.agent_log();
            ensure!(log.contains(caller) && !log.contains("sa/gateway"), "{log}");
            Ok(())
        })?;
    }
    // The gateway says of a call who, what and where to, and holds nothing that can be read.
    let log = far.log();
    ensure!(
        log.contains("ns/shop/sa/front") && log.contains(&host("back")),
        "{log}"
    );
    let mut capture = far.host.spawn(
        "tcpdump",
        &["-i", "any", "--immediate-mode", "-U", "-w", "/run/wire.pcap"],
    )?;
    wait_for("tcpdump", PATIENCE, || {
        ensure!(capture.log().contains("listening on"), "{}", capture.log());
        Ok(())
    })?;
    let echo = format!("{}echo", url("back"));
    let canary = format!("X-Canary: {CANARY}");
    for _ in 0..3 {
        let said = front
            .host
            .run("curl", &["-sS", "-m", "12", "-H", &canary, &echo])?;
        ensure!(said.stdout.trim() == CANARY, "{}", said.text());
    }
    let size = wait_for("the calls to be captured", PATIENCE, || {
        let size: u64 = far.host.sh("stat -c %s /run/wire.pcap")?.stdout.trim().parse()?;
        ensure!(size > 2000, "{size} bytes, {}", capture.log());
        Ok(size)
    })?;
    capture.signal(nix::sys::signal::Signal::SIGINT)?;
    capture.wait(PATIENCE);
    let hits = far
        .host
        .sh(&format!("grep -a -c -e {CANARY} -e 'HTTP/1.1' /run/wire.pcap"))?;
    ensure!(
        hits.stdout.trim() == "0",
        "{size} bytes captured, {} lines with plaintext",
        hits.stdout.trim()
    );
    // Nor is it anywhere in the gateway's own memory, with all the keys that it has; in the caller's agent it is.
    let gateways = far.host.pids_of("tombolo-gateway")?;
    let gateway = *gateways.first().context("the gateway is not running")?;
    let (held, open) = (
        in_memory(gateway, CANARY)?,
        in_memory(front.agent_pid()?, CANARY)?,
    );
    ensure!(
        held == 0 && open > 0,
        "{held} times in the gateway, {open} in the agent"
    );
    // Nobody listens there: the application is told so by connect() itself.
    let how = connect(&front, "back", "81")?;
    ensure!(how.starts_with("ECONNREFUSED"), "{how}\n{}", far.log());
    // A policy is decided at the gateway already, which names it.
    site.mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-front, namespace: shop}\nspec:\n  action: DENY\n  \
         selector: {matchLabels: {app: back}}\n  rules: [{from: [{source: {principals: [mesh.example/ns/shop/sa/front]}}]}]\n",
    )?;
    wait_for("the refusal", PATIENCE, || {
        let how = connect(&front, "back", "80")?;
        ensure!(how.starts_with("ECONNREFUSED"), "{how}");
        Ok(())
    })?;
    wait_for("the gateway to name the policy", PATIENCE, || {
        ensure!(far.log().contains("shop/no-front"), "{}", far.log());
        Ok(())
    })?;
    answers(&back, "front", &site.gateway)?; // the other way nothing is denied
    let metrics = far.metrics()?;
    ensure!(
        metrics.contains(&format!(
            "tombolo_gateway_calls_total{{service=\"{}\",result=\"ok\"}}",
            host("back")
        )),
        "{metrics}"
    );
    let vms = site.mesh.tombolo("vm list -A")?;
    ensure!(vms.matches("gateway").count() >= 2, "{vms}");
    drop(site);
    Ok(())
}

/// How often a text stands in the memory that a process can write to.
fn in_memory(pid: i32, text: &str) -> Result<usize> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = std::fs::File::open(format!("/proc/{pid}/mem"))?;
    let (mut found, mut read) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if !rights.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-').context("a range of addresses")?;
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        let mut bytes = vec![0; usize::try_from(to - from)?];
        // Some cannot be read, or are gone by now.
        if memory.read_exact_at(&mut bytes, from).is_ok() {
            read += bytes.len();
            let parts = bytes.windows(text.len());
            found += parts.filter(|part| *part == text.as_bytes()).count();
        }
    }
    ensure!(read > 1 << 20, "only {read} bytes of process {pid} can be read");
    Ok(found)
}

#[test]
fn an_outsider_sees_enrolment_and_nothing_else() -> Result<()> {
    needs_root!();
    let mut site = Site::start("outsider")?;
    let outsider = site.mesh.lab.host("outsider")?;
    let gateway = site.gateway.host.address();
    let dial = |arguments: &str| outsider.sh(&format!("curl -sS -k -m 5 {arguments} 2>&1"));
    // By name it reaches discovery's TLS, which asks for what only members and tokens have.
    let name = "discovery.mesh.example";
    let said = dial(&format!(
        "--http2-prior-knowledge -o /dev/null -w '%{{http_code}}' --resolve {name}:443:{gateway} https://{name}/"
    ))?;
    ensure!(said.ok() && !said.stdout.contains("000"), "{}", said.text());
    // Any other name, and none with no certificate: the connection ends without an answer.
    for arguments in [
        format!("--resolve bank.example:443:{gateway} https://bank.example/"),
        format!("--http2-prior-knowledge https://{gateway}/"),
        format!("--http2-prior-knowledge https://{gateway}:15008/"),
        format!("http://{gateway}:443/"),
    ] {
        let said = dial(&arguments)?;
        ensure!(!said.ok(), "{arguments}: {}", said.text());
    }
    // Neither discovery itself nor the gateway's own endpoints are there for it.
    for port in ["15012", "15014", "15020", "15021"] {
        for host in [site.mesh.control.address(), gateway] {
            let said = dial(&format!("https://{host}:{port}/"))?;
            ensure!(!said.ok(), "{host}:{port}: {}", said.text());
        }
    }
    // Half-open connections of one source are bounded, and everybody else comes through meanwhile.
    let mut flood = outsider
        .command("tombolo-peer")
        .args(["call", "idle", &gateway.to_string(), "443", "400"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    site.group("front", "", "")?;
    let front = site.vm(true, "front", 5)?;
    ensure!(front.host.run("tombolo", &["status"])?.ok());
    wait_for("the limit", PATIENCE, || {
        let metrics = site.gateway.metrics()?;
        let refused = metrics
            .lines()
            .find_map(|line| line.strip_prefix("tombolo_gateway_accepted_total{kind=\"refused\"} "))
            .and_then(|count| count.trim().parse::<u64>().ok());
        ensure!(refused.is_some_and(|count| count >= 200), "{refused:?}");
        Ok(())
    })?;
    flood.stdin.take();
    let _ = flood.wait();
    Ok(())
}

#[test]
fn a_host_that_only_dials_out() -> Result<()> {
    needs_root!();
    let mut site = Site::start("outbound")?;
    site.group("front", "", "")?;
    site.group("away", "", ", tombolo.io/reach: outbound")?;
    let front = site.vm(true, "front", 5)?;
    let away = site.vm(false, "away", 5)?;
    let _servers = (serve(&front, "front")?, serve(&away, "away")?);
    answers(&away, "front", &site.gateway)?;
    answers(&front, "away", &site.gateway)?;
    let log = site.gateway.log();
    ensure!(log.contains("reverse session") && log.contains("quic"), "{log}");
    ensure!(away.agent_log().contains("sa/front"), "{}", away.agent_log());
    // The site's firewall drops UDP from now on: the same over TCP.
    site.west.on_router("iptables -I FORWARD -p udp -j DROP")?;
    let cut = Instant::now();
    wait_for("a session over TCP", PATIENCE, || {
        let log = site.gateway.log();
        let over_tcp = log
            .lines()
            .any(|line| line.contains("reverse session") && !line.contains("quic"));
        ensure!(over_tcp, "{log}");
        Ok(())
    })?;
    answers(&front, "away", &site.gateway)?;
    println!("UDP dropped: called again over TCP after {:?}", cut.elapsed());
    answers(&away, "front", &site.gateway)?;
    // The gateway comes back, and the sessions with it.
    site.gateway.process().signal(nix::sys::signal::Signal::SIGTERM)?;
    site.gateway.process().wait(Duration::from_secs(10));
    let begun = Instant::now();
    site.gateway.start()?;
    answers(&front, "away", &site.gateway)?;
    println!("gateway restarted: called again after {:?}", begun.elapsed());
    ensure!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    // Revoked: the session is cut, and no other one is taken.
    let vms = site.mesh.tombolo("vm list -n shop -o json")?;
    let list: serde_json::Value = serde_json::from_str(&vms)?;
    let text = list.to_string();
    let device = text
        .split('"')
        .skip_while(|word| !word.starts_with("away-"))
        .find_map(|word| word.strip_prefix("away-"))
        .unwrap_or_default()
        .to_owned();
    ensure!(device.len() == 16, "{vms}");
    site.mesh
        .tombolo(&format!("vm revoke {device} --reason stolen"))?;
    wait_for("the cut", Duration::from_secs(5), || {
        let metrics = site.gateway.metrics()?;
        ensure!(
            metrics.contains("tombolo_gateway_reverse_sessions 0"),
            "{}",
            site.gateway.log()
        );
        Ok(())
    })?;
    ensure!(!front.curl(&url("away"))?.ok(), "nobody calls it");
    ensure!(!away.curl(&url("front"))?.ok(), "and it calls nobody");
    Ok(())
}

#[test]
fn a_gateway_dies_under_load() -> Result<()> {
    needs_root!();
    let (front, back, mut first, mut site) = pair("gwdies")?;
    let second = site.mesh.gateway("gw3", "net2", &mut site.west, 203)?;
    let _server = serve(&back, "back")?;
    answers(&front, "back", &first)?;
    let mut load = front
        .host
        .command("tombolo-peer")
        .args(["call", "load", &host("back"), "80", "50"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    // Both carry calls before one dies.
    for gateway in [&first, &second] {
        wait_for("calls through both", PATIENCE, || {
            let metrics = gateway.metrics()?;
            ensure!(metrics.contains("result=\"ok\""), "{}", gateway.log());
            Ok(())
        })?;
    }
    first.kill();
    let died = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_millis();
    std::thread::sleep(Duration::from_secs(5)); // the time that is measured
    drop(load.stdin.take());
    let output = load.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (mut all, mut failed, mut last) = (0_u32, 0_u32, 0_u128);
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [start, took, outcome @ ..] = words.as_slice() else {
            bail!("{line}")
        };
        let end = start.parse::<u128>()? + took.parse::<f64>()? as u128;
        if end < died {
            ensure!(outcome == ["ok"], "before the kill: {line}");
            continue;
        }
        all += 1;
        if outcome != ["ok"] {
            failed += 1;
            last = last.max(end - died);
        }
    }
    println!(
        "gateway killed at 50 calls/s: {failed} of {all} calls failed, the last {last} ms after the kill"
    );
    ensure!(all > 150, "{all} calls\n{text}");
    ensure!(
        last <= 3000 && failed <= 75,
        "{failed} failed, the last after {last} ms\n{text}"
    );
    std::io::stdout().flush()?;
    Ok(())
}
