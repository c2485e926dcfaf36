//! The way in to discovery through a gateway: who is seen as the source, what a flood there delays, and what an outsider
//! finds.

use crate::{PATIENCE, needs_root};
use anyhow::{Context as _, Result, ensure};
use std::{
    fs,
    time::{Duration, Instant},
};
use tombolo_testkit::{Gateway, Host, Lan, Mesh, MeshOptions, Vm, wait_for};

/// The name by which clients ask for discovery.
const NAME: &str = "discovery.mesh.example";
/// A PROXY header that says 192.0.2.66 (for `printf`), and what would be TLS behind it.
const HEADER: &str =
    r"\r\n\r\n\000\r\nQUIT\n\041\021\000\014\300\000\002\102\300\000\002\001\004\000\001\273\026\003\001";

/// Discovery, which only its gateway reaches, and a private network that lets out nothing but port 443.
struct Site {
    mesh: Mesh,
    west: Lan,
    gateway: Gateway,
}

impl Site {
    fn start(name: &str) -> Result<Self> {
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
        mesh.group("front", "http=80:8080")?;
        Ok(Self { mesh, west, gateway })
    }

    /// A host of the private network that reaches nothing but the gateway's port 443.
    fn vm(&mut self, name: &str, last: u8) -> Result<Vm> {
        let vm = self.mesh.bare_in(&mut self.west, name, last)?;
        vm.up(&self.mesh.token("front")?)?;
        Ok(vm)
    }

    fn audit(&self) -> Result<String> {
        self.mesh.tombolo("audit -o json")
    }

    fn metric(&self, name: &str) -> Result<u64> {
        let text = self
            .mesh
            .control
            .sh("curl -sf -m 2 http://127.0.0.1:15014/metrics")?;
        value(&text.checked()?.stdout, name)
    }

    /// `address` of the entry whose name begins so; empty if it has none.
    fn address_of(&self, host: &str) -> Result<String> {
        let list: serde_json::Value = serde_json::from_str(&self.mesh.tombolo("get we -n shop -o json")?)?;
        let text = list.to_string();
        let items = list.as_array().or_else(|| list["items"].as_array());
        let device = self.mesh.tombolo("vm list -n shop -o json")?;
        let devices: serde_json::Value = serde_json::from_str(&device)?;
        let devices = devices.as_array().or_else(|| devices["vms"].as_array());
        let entry = devices
            .into_iter()
            .flatten()
            .find(|vm| vm["hostname"] == host)
            .and_then(|vm| vm["name"].as_str().or_else(|| vm["workload_entry"].as_str()))
            .with_context(|| format!("{host} in {device}"))?
            .to_owned();
        let entry = entry.rsplit('/').next().unwrap_or_default();
        items
            .into_iter()
            .flatten()
            .find(|item| item["metadata"]["name"] == entry)
            .map(|item| item["spec"]["address"].as_str().unwrap_or_default().to_owned())
            .with_context(|| format!("{entry} in {text}"))
    }
}

fn value(metrics: &str, name: &str) -> Result<u64> {
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line
        .with_context(|| format!("{name} in\n{metrics}"))?
        .trim()
        .parse()?)
}

fn forge(from: &Host, to: &str, port: u16) -> Result<()> {
    from.sh(&format!(
        "printf '{HEADER}' | tombolo-peer call blast {to} {port}"
    ))
    .map(drop)
}

#[test]
fn the_source_behind_a_gateway_is_the_hosts_own() -> Result<()> {
    needs_root!();
    let mut site = Site::start("gwsource")?;
    let (front, other) = (site.mesh.bare("front")?, site.mesh.bare("other")?);
    let (own, elsewhere) = (front.host.address().to_string(), other.host.address().to_string());
    let gateway = site.gateway.host.address().to_string();
    // A token for one address is good there, and nowhere else behind the same gateway.
    let token = site.mesh.tombolo(&format!(
        "token create -n shop --workload-group front --cidr {own}/32"
    ))?;
    let refused = other.host.run("tombolo", &["up", token.trim()])?;
    let text = refused.text();
    ensure!(
        !refused.ok() && text.contains("TMB0105") && text.contains(&elsewhere),
        "{text}"
    );
    front.up(token.trim())?;
    ensure!(
        site.address_of("front")? == own,
        "its own address is its endpoint"
    );
    let audit = site.audit()?;
    for host in [&own, &elsewhere] {
        ensure!(
            audit.lines().any(|line| line.contains(&format!("{host}:"))
                && line.contains(&format!("through the gateway {gateway}"))),
            "{host}\n{audit}"
        );
    }
    ensure!(site.metric("tombolo_discovery_connections_forwarded")? >= 2);
    // The address of a NAT is nobody's endpoint.
    let away = site.vm("away", 5)?;
    ensure!(away.host.run("tombolo", &["status"])?.ok());
    let nat = site.west.on_router("ip -4 -o addr show up0")?.stdout;
    let nat = nat
        .split_whitespace()
        .find_map(|word| word.strip_suffix("/24"))
        .context("the NAT's address")?;
    let audit = site.audit()?;
    ensure!(
        audit.contains(&format!("{nat}:")),
        "the source is the NAT\n{audit}"
    );
    ensure!(site.address_of("away")?.is_empty(), "it waits for a dial-back");

    // Who is no gateway cannot name another source: not at discovery, and not at the gateway's port.
    let discovery = site.mesh.control.address().to_string();
    forge(&site.mesh.control, &discovery, 15012)?;
    wait_for("the refusal", PATIENCE, || {
        let audit = site.audit()?;
        ensure!(audit.contains("TMB0607"), "{audit}");
        ensure!(!audit.contains("192.0.2.66"), "{audit}");
        ensure!(site.metric("tombolo_discovery_connections_impostors")? == 1);
        Ok(())
    })?;
    forge(&other.host, &gateway, 443)?;
    ensure!(site.metric("tombolo_discovery_connections_impostors")? == 1);
    // Nor can a gateway that was revoked.
    let gateways = site.mesh.tombolo("vm list -n tombolo-system -o json")?;
    let device = gateways
        .split('"')
        .find_map(|word| word.rsplit_once("gateway-").map(|(_, id)| id))
        .filter(|id| id.len() == 16)
        .with_context(|| gateways.clone())?
        .to_owned();
    site.mesh
        .tombolo(&format!("vm revoke {device} --reason stolen"))?;
    forge(&site.gateway.host, &discovery, 15012)?;
    wait_for("the refusal", PATIENCE, || {
        ensure!(site.metric("tombolo_discovery_connections_impostors")? >= 2);
        Ok(())
    })?;
    ensure!(!site.audit()?.contains("192.0.2.66"));
    Ok(())
}

/// Peak of a program's memory in MiB.
fn peak(host: &Host, program: &str) -> Result<u64> {
    let pid = host.pids_of(program)?.first().copied().context("it runs")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"))
        .context("VmHWM")?;
    Ok(kib.trim().parse::<u64>()? / 1024)
}

fn renewals(vm: &Vm, times: u32) -> Result<Vec<u64>> {
    let done = vm
        .host
        .run(
            "tombolo-flood",
            &["renew", "/var/lib/tombolo/agent", &times.to_string()],
        )?
        .checked()?;
    done.stdout
        .lines()
        .map(|line| line.parse().with_context(|| format!("a renewal failed: {line}")))
        .collect()
}

#[test]
fn a_flood_at_the_gateway_delays_no_renewal_and_no_push() -> Result<()> {
    needs_root!();
    let mut site = Site::start("gwflood")?;
    // Hosts try discovery's own address first. The router's ICMP is limited to one a second, a reset is not: what is
    // measured is the way through the gateway.
    site.west
        .on_router("iptables -I FORWARD -i br0 -p tcp --dport 15012 -j REJECT --reject-with tcp-reset")?;
    let (good, watch) = (site.vm("good", 5)?, site.vm("watch", 6)?);
    let late = site.mesh.bare_in(&mut site.west, "late", 7)?;
    let late_token = site.mesh.token("front")?;
    let outsider = site.mesh.lab.host("outsider")?;
    good.host.run("tombolo", &["down"])?.checked()?;
    let calm = renewals(&good, 3)?;
    // Eight sources, on one core.
    let subnet = outsider.address().to_string();
    let subnet = subnet.rsplit_once('.').context("IPv4")?.0.to_owned();
    let sources: Vec<String> = (11..19).map(|last| format!("{subnet}.{last}")).collect();
    for source in &sources {
        outsider
            .sh(&format!("ip addr add {source}/24 dev eth0"))?
            .checked()?;
    }
    let port = format!("{}:443", site.gateway.host.address());
    let seconds = "12";
    let mut flood = outsider.command("tombolo-flood");
    flood.args(["flood", &port, NAME, seconds]).args(&sources);
    let mut flood = outsider.spawn_command("tombolo-flood", flood)?;
    wait_for("the limits", PATIENCE, || {
        let metrics = site.gateway.metrics()?;
        ensure!(
            value(
                &metrics,
                "tombolo_gateway_limited_total{limit=\"discovery_rate\"}"
            )? > 1000
        );
        Ok(())
    })?;
    let begun = Instant::now();
    let renewed = renewals(&good, 12)?;
    let mut pushes = Vec::new();
    for n in 0..5 {
        let host = format!("push{n}.shop.svc.mesh.internal");
        site.mesh.apply(&format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: push{n}, namespace: shop}}\nspec:\n  \
             hosts: [{host}]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  \
             endpoints: [{{address: 192.0.2.9}}]\n"
        ))?;
        let applied = Instant::now();
        wait_for("the name", PATIENCE, || {
            watch.host.sh(&format!("getent ahostsv4 {host}"))?.checked()
        })?;
        pushes.push(applied.elapsed().as_millis());
    }
    ensure!(
        flood.is_running() && begun.elapsed() < Duration::from_secs(10),
        "all that was beside the flood: {:?}\n{}",
        begun.elapsed(),
        flood.log()
    );
    let joining = Instant::now();
    late.up(&late_token)?;
    let joined = joining.elapsed();
    flood.wait(PATIENCE);
    let gateway = peak(&site.gateway.host, "tombolo-gateway")?;
    let discovery = peak(&site.mesh.control, "tombolo-discovery")?;
    let limited = site.metric("tombolo_discovery_connections_limited")?;
    println!(
        "{}renewals beside it {renewed:?} ms (before {calm:?}), pushes {pushes:?} ms, a new host joined in {joined:?}; \
         peak memory of the gateway {gateway} MiB, of discovery {discovery} MiB; closed by discovery's limits {limited}",
        flood.log()
    );
    ensure!(renewed.iter().all(|&ms| ms < 1000), "{renewed:?}");
    ensure!(pushes.iter().all(|&ms| ms < 1000), "{pushes:?}");
    ensure!(gateway < 128 && discovery < 192, "{gateway} and {discovery} MiB");
    ensure!(watch.host.run("tombolo", &["status"])?.ok());
    Ok(())
}

#[test]
fn what_an_outsider_gets_at_each_port_of_a_gateway() -> Result<()> {
    needs_root!();
    let mut site = Site::start("gwports")?;
    site.gateway.process().signal(nix::sys::signal::Signal::SIGTERM)?;
    site.gateway.process().wait(PATIENCE);
    let sidecars = "passthrough_listen: ['0.0.0.0:15443']\npassthrough_hosts: [named.example]\n";
    site.gateway.host.write("/etc/tombolo/gateway.yaml", sidecars)?;
    site.gateway.start()?;
    let outsider = site.mesh.lab.host("outsider")?;
    let gateway = site.gateway.host.address().to_string();
    // By the name of discovery it finds what a host needs to join, and every other service refuses it.
    for port in [443, 15008] {
        let probe = ["probe", &format!("{gateway}:{port}"), NAME];
        let said = outsider.run("tombolo-flood", &probe)?.checked()?.stdout;
        let expected = "ads Unauthenticated\ncertificate Unauthenticated\nadmin PermissionDenied\nfederation PermissionDenied\n\
                        enrol InvalidArgument\nrenew Unauthenticated\npreflight Ok\n";
        ensure!(said == expected, "{port}:\n{said}");
    }
    // Everything else ends before anything is answered: TLS without a certificate, other names, other protocols.
    let tls = |port: u16, more: &str| format!("openssl s_client -connect {gateway}:{port} {more} </dev/null");
    let service = "outbound_.80_._.front.shop.svc.mesh.internal";
    for (what, line) in [
        (
            "HBONE",
            format!("curl -sS -k -m 5 --http2-prior-knowledge https://{gateway}/"),
        ),
        (
            "HBONE",
            format!("curl -sS -k -m 5 --http2-prior-knowledge https://{gateway}:15008/"),
        ),
        (
            "another name",
            format!("curl -sS -k -m 5 --resolve bank.example:443:{gateway} https://bank.example/"),
        ),
        (
            "discovery of another trust domain",
            tls(443, "-servername discovery.other.example"),
        ),
        ("HTTP", format!("curl -sS -m 5 http://{gateway}:443/")),
        ("HTTP", format!("curl -sS -m 5 http://{gateway}:15008/")),
        (
            "a sidecar's name at another port",
            tls(443, &format!("-servername {service} -alpn istio")),
        ),
        (
            "a service that is not named",
            tls(15443, &format!("-servername {service} -alpn istio")),
        ),
        (
            "discovery at the port of sidecars",
            tls(15443, &format!("-servername {NAME} -alpn istio")),
        ),
        (
            "a named host without the mesh's ALPN",
            tls(15443, "-servername outbound_.80_._.named.example"),
        ),
    ] {
        let said = outsider.sh(&format!("timeout 10 {line} 2>&1"))?;
        ensure!(!said.ok(), "{what}: {line}\n{}", said.text());
        ensure!(!said.text().contains("HTTP/"), "{what}: {line}\n{}", said.text());
    }
    // A reverse session without a certificate: TLS 1.3 tells the client late, but no session is there.
    outsider.sh(&format!(
        "timeout 5 {} 2>&1",
        tls(443, "-noservername -alpn tombolo-reverse/1")
    ))?;
    let metrics = site.gateway.metrics()?;
    ensure!(value(&metrics, "tombolo_gateway_reverse_sessions")? == 0);
    ensure!(!metrics.contains("result=\"ok\""), "{metrics}");
    ensure!(!metrics.contains("kind=\"passthrough\""), "{metrics}");
    // No other port is open to it, discovery's own included.
    let discovery = site.mesh.control.address().to_string();
    for (host, ports) in [
        (
            &gateway,
            &["15012", "15014", "15020", "15021", "15030", "15031", "22", "53"][..],
        ),
        (&discovery, &["15012", "15014", "15021"][..]),
    ] {
        for port in ports {
            let how = outsider.run("tombolo-peer", &["call", "connect", host, port])?;
            ensure!(
                how.text().contains("ECONNREFUSED"),
                "{host}:{port}: {}",
                how.text()
            );
        }
    }
    Ok(())
}
