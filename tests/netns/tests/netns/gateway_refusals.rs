//! What a gateway refuses, asked by members with real certificates; its limits; and TLS that it passes on unopened.

use crate::{
    PATIENCE,
    gateway::{Site, answers, host, serve, tail},
    needs_root,
};
use anyhow::{Context as _, Result, ensure};
use std::process::{Child, Stdio};
use tombolo_testkit::{EchoServer, Gateway, Vm, wait_for};

/// Where an agent keeps its certificate.
const STATE: &str = "/var/lib/tombolo/agent";

/// Endpoints that nobody has: they are dialled until the time is over.
const HOLE: &str = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: hole, namespace: shop}\nspec:\n  \
     hosts: [hole.shop.svc.mesh.internal]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
     ports: [{number: 80, name: tcp, protocol: TCP, targetPort: 8080}]\n  workloadSelector: {labels: {app: hole}}\n---\n\
     apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: hole, namespace: shop}\nspec:\n  \
     {address: 10.0.0.99, network: net2, serviceAccount: hole, labels: {app: hole, networking.istio.io/tunnel: http}}\n";

/// The statuses of CONNECTs, asked by a host with its own certificate.
fn ask(from: &Vm, gateway: &Gateway, what: &[&str]) -> Result<Vec<String>> {
    let at = gateway.host.at(443);
    let arguments = [&["ask", STATE, &at], what].concat();
    let said = from.host.run("tombolo-member", &arguments)?.checked()?.stdout;
    Ok(said.lines().map(str::to_owned).collect())
}

fn limited(gateway: &Gateway, limit: &str) -> Result<u64> {
    gateway.metric(&format!("tombolo_gateway_limited_total{{limit=\"{limit}\"}}"))
}

/// SYNs that have come to a host's HBONE port.
fn knocks(vm: &Vm) -> Result<u64> {
    let counted = vm
        .host
        .sh("iptables -vnxL INPUT | awk '/dpt:15008/ {print $1}'")?
        .checked()?;
    counted.stdout.trim().parse().with_context(|| counted.text())
}

#[test]
fn what_a_member_may_not_ask() -> Result<()> {
    needs_root!();
    let mut site = Site::start("refusals")?;
    let gateway = site.mesh.gateway("gw2", "net2", &mut site.west, 202)?;
    site.group("front", "", "")?;
    site.group("back", "net2", "")?;
    // Whatever a service says of its ports.
    site.mesh.apply(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: doors, namespace: shop}\nspec:\n  \
         hosts: [doors.shop.svc.mesh.internal]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports:\n  \
         - {number: 2222, name: tcp-ssh, protocol: TCP, targetPort: 22}\n  \
         - {number: 15000, name: tcp-admin, protocol: TCP, targetPort: 15000}\n  \
         - {number: 15008, name: tcp-hbone, protocol: TCP, targetPort: 15008}\n  \
         - {number: 15012, name: tcp-discovery, protocol: TCP, targetPort: 15012}\n  \
         - {number: 15020, name: tcp-metrics, protocol: TCP, targetPort: 15020}\n  \
         - {number: 15021, name: tcp-ready, protocol: TCP, targetPort: 15021}\n  \
         workloadSelector: {labels: {app: back}}\n",
    )?;
    let front = site.vm(true, "front", 5)?;
    let back = site.vm(false, "back", 5)?;
    let _server = serve(&back, "back")?;
    answers(&front, "back", &gateway)?;
    back.host
        .sh("iptables -I INPUT -p tcp --syn --dport 15008")?
        .checked()?;
    let (good, door, transit) = (host("back"), host("doors"), host("front"));
    let knocked = knocks(&back)?;
    for (authority, status) in [
        ("10.0.0.5:8080".to_owned(), "400"),
        ("10.0.0.5:15008".to_owned(), "400"),
        ("127.0.0.1:15020".to_owned(), "400"),
        ("[fd00::1]:80".to_owned(), "400"),
        (format!("{good}:15012"), "503"),
        (format!("{good}:22"), "503"),
        (format!("{good}:8080"), "503"),
        (format!("{door}:2222"), "503"),
        (format!("{door}:15000"), "503"),
        (format!("{door}:15008"), "503"),
        (format!("{door}:15012"), "503"),
        (format!("{door}:15020"), "503"),
        (format!("{door}:15021"), "503"),
        ("nobody.shop.svc.mesh.internal:80".to_owned(), "503"),
        ("discovery.mesh.example:15012".to_owned(), "503"),
        ("bank.example:443".to_owned(), "503"),
        // Its endpoints are in another network, which is not this gateway's.
        (format!("{transit}:80"), "503"),
    ] {
        let said = ask(&front, &gateway, &[&authority])?;
        ensure!(
            said == [format!("{authority} {status}")],
            "{said:?}, not {status}\n{}",
            tail(&gateway.log())
        );
    }
    let wanted = format!("{good}:80");
    let (get, long) = (
        ask(&front, &gateway, &["method=GET", &wanted])?,
        ask(&front, &gateway, &["filler=20000", &wanted])?,
    );
    ensure!(get == [format!("{wanted} 400")], "{get:?}");
    ensure!(long == [format!("{wanted} 431")], "{long:?}");
    ensure!(knocks(&back)? == knocked, "nothing of this was dialled");
    // The roles of Istio's callers; without a waypoint they come to the same.
    for role in ["waypoint", "gateway", "sidecar", "x"] {
        let said = ask(&front, &gateway, &[&format!("x-istio-source={role}"), &wanted])?;
        ensure!(said == [format!("{wanted} 200")], "{role}: {said:?}");
    }
    ensure!(knocks(&back)? == knocked + 4, "each of these was dialled");

    // A connection carries 200 calls, whoever asks for more before it has heard so.
    let at = gateway.host.at(443);
    let burst = |count: &str, authority: &str, how: &[&str]| {
        let arguments = [&["burst", STATE, &at, count, authority], how].concat();
        Ok::<_, anyhow::Error>(front.host.run("tombolo-member", &arguments)?.checked()?.stdout)
    };
    let said = burst("210", &wanted, &[])?;
    // The others are refused, or wait at the caller if it has heard of the limit just in time.
    let (taken, others) = said.split_once('\n').context("no answers")?;
    ensure!(
        taken == "200: 200" && ["REFUSED_STREAM: 10\n", "no answer: 10\n"].contains(&others),
        "{said}"
    );
    // And what calls that were given up have left to do is bounded, too: what they dial is dialled to its end.
    site.mesh.apply(HOLE)?;
    let hole = format!("{}:80", host("hole"));
    wait_for("the hole to be known", PATIENCE, || {
        let said = burst("1", &hole, &["reset"])?;
        ensure!(said == "no answer: 1\n", "{said}");
        Ok(())
    })?;
    let said = burst("500", &hole, &["reset"])?;
    let refused = said
        .lines()
        .find_map(|line| line.strip_prefix("REFUSED_STREAM: "));
    let refused: u64 = refused.with_context(|| said.clone())?.parse()?;
    ensure!(
        refused <= 100 && limited(&gateway, "streams")? == refused,
        "{said}\n{}",
        gateway.metrics()?
    );
    ensure!(
        gateway.log().contains("opens them faster than they end"),
        "{}",
        tail(&gateway.log())
    );

    // A policy is asked before anything is dialled.
    site.mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-front, namespace: shop}\nspec:\n  action: DENY\n  \
         selector: {matchLabels: {app: back}}\n  rules: [{from: [{source: {principals: [mesh.example/ns/shop/sa/front]}}]}]\n",
    )?;
    wait_for("the policy", PATIENCE, || {
        let said = ask(&front, &gateway, &[&wanted])?;
        ensure!(said == [format!("{wanted} 401")], "{said:?}");
        Ok(())
    })?;
    let knocked = knocks(&back)?;
    for _ in 0..3 {
        ensure!(ask(&front, &gateway, &[&wanted])? == [format!("{wanted} 401")]);
    }
    ensure!(
        knocks(&back)? == knocked,
        "a denied call has reached the endpoint"
    );
    site.mesh.tombolo("delete authorizationpolicy no-front -n shop")?;

    // A host that can be dialled holds no session, by whichever way it asks.
    for transport in ["tcp", "quic"] {
        let arguments = ["10", "tombolo-member", "session", STATE, &at, transport];
        let said = front.host.run("timeout", &arguments)?;
        ensure!(
            said.ok() && said.stdout.ends_with("ended\n"),
            "{transport}: {}",
            said.text()
        );
    }
    ensure!(gateway.metric("tombolo_gateway_reverse_sessions")? == 0);
    ensure!(
        gateway.log().contains("no WorkloadEntry of an outbound group"),
        "{}",
        gateway.log()
    );

    // Revoked: not even a connection, and what a call has carried until it was cut is counted.
    let _echo = EchoServer::start(&back.host, "echo", 8081)?;
    let mut drip = front
        .host
        .command("tombolo-peer")
        .args(["call", "drip", &good, "81", "10"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    wait_for("the call", PATIENCE, || {
        ensure!(gateway.metric("tombolo_gateway_open_calls")? == 1);
        Ok(())
    })?;
    let to = format!("tombolo_gateway_bytes_total{{service=\"{good}\",direction=\"to\"}}");
    let carried = gateway.metric(&to)?;
    let vms = site.mesh.tombolo("vm list -n shop -o json")?;
    let device = vms
        .split('"')
        .find_map(|word| word.strip_prefix("front-"))
        .context("no device of front")?
        .to_owned();
    site.mesh
        .tombolo(&format!("vm revoke {device} --reason stolen"))?;
    wait_for("the revocation", PATIENCE, || {
        let said = ask(&front, &gateway, &[&wanted])?;
        let told = said.first().context("nothing was said")?;
        ensure!(!told.ends_with("200") && !told.ends_with("no answer"), "{said:?}");
        Ok(())
    })?;
    wait_for("the call to be cut and counted", PATIENCE, || {
        let (open, now) = (
            gateway.metric("tombolo_gateway_open_calls")?,
            gateway.metric(&to)?,
        );
        ensure!(
            open == 0 && now > carried,
            "{open} open, {carried} and {now} bytes\n{}",
            tail(&gateway.log())
        );
        Ok(())
    })?;
    drop(drip.stdin.take());
    drip.wait()?;
    let log = gateway.log();
    let call = log
        .lines()
        .rev()
        .find(|line| line.contains(&good) && line.contains("bytes_to="));
    ensure!(call.is_some_and(|line| !line.contains("bytes_to=0")), "{call:?}");
    Ok(())
}

/// Holds calls; the answers so far.
fn hold(from: &Vm, gateway: &Gateway, count: u32, authority: &str) -> Result<(Child, String)> {
    let at = gateway.host.at(443);
    let mut child = from
        .host
        .command("tombolo-member")
        .args(["hold", STATE, &at, &count.to_string(), authority])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let said = said_until(&mut child, "holds")?;
    Ok((child, said))
}

/// What a child prints before a line.
fn said_until(child: &mut Child, line: &str) -> Result<String> {
    use std::io::BufRead as _;
    let output = child.stdout.as_mut().context("stdout")?;
    let mut said = String::new();
    for one in std::io::BufReader::new(output).lines() {
        let one = one?;
        if one.starts_with(line) {
            return Ok(said + &one);
        }
        said.push_str(&one);
        said.push('\n');
    }
    anyhow::bail!("it ended: {said}")
}

#[test]
fn every_limit_is_kept_and_counted() -> Result<()> {
    needs_root!();
    let mut site = Site::start("limits")?;
    let settings =
        "calls_max: 8\ncalls_per_peer_max: 5\ndials_max: 2\nconnection_idle_seconds: 2\nsessions_max: 1\n";
    let gateway = site
        .mesh
        .gateway_set("gw2", "net2", &mut site.west, 202, settings)?;
    site.group("front", "", "")?;
    site.group("back", "net2", "")?;
    site.mesh.apply(HOLE)?;
    site.group("away", "net2", ", tombolo.io/reach: outbound")?;
    let front = site.vm(true, "front", 5)?;
    let other = site.mesh.bare_in(&mut site.east, "front2", 6)?;
    other.up(&site.mesh.token("front")?)?;
    let back = site.vm(false, "back", 5)?;
    let _server = serve(&back, "back")?;
    answers(&front, "back", &gateway)?;
    let wanted = format!("{}:80", host("back"));

    let (mut first, said) = hold(&front, &gateway, 7, &wanted)?;
    ensure!(said.contains("200: 5\n") && said.contains("503: 2\n"), "{said}");
    let (mut second, said) = hold(&other, &gateway, 5, &wanted)?;
    ensure!(said.contains("200: 3\n") && said.contains("503: 2\n"), "{said}");
    ensure!(limited(&gateway, "calls_per_peer_max")? == 2 && limited(&gateway, "calls_max")? == 2);
    for child in [&mut first, &mut second] {
        drop(child.stdin.take());
        child.wait()?;
    }
    wait_for("the places to be free", PATIENCE, || {
        ensure!(ask(&front, &gateway, &[&wanted])? == [format!("{wanted} 200")]);
        Ok(())
    })?;

    // Dialling: two wait for the hole, further ones are told at once.
    let at = gateway.host.at(443);
    let hole = format!("{}:80", host("hole"));
    let parallel = front.host.sh(&format!(
        "for n in 1 2 3 4; do tombolo-member ask {STATE} {at} {hole} & done; wait"
    ))?;
    ensure!(
        parallel.stdout.matches(" 503").count() == 4,
        "{}",
        parallel.text()
    );
    ensure!(limited(&gateway, "dials_max")? == 2, "{}", gateway.metrics()?);

    // A connection that nobody uses.
    let idle = front
        .host
        .run("timeout", &["8", "tombolo-member", "idle", STATE, &at])?;
    ensure!(idle.ok() && idle.stdout.ends_with("ended\n"), "{}", idle.text());
    ensure!(limited(&gateway, "connection_idle")? > 0);

    // One host may hold a session; the next one is told at its own status, and the gateway says which limit it is.
    let mut away = Vec::new();
    for (name, last) in [("away", 6), ("away2", 7)] {
        let vm = site.mesh.bare_in(&mut site.west, name, last)?;
        vm.up(&site.mesh.token("away")?)?;
        wait_for(name, PATIENCE, || {
            let (held, over) = (
                gateway.metric("tombolo_gateway_reverse_sessions")?,
                limited(&gateway, "sessions")?,
            );
            ensure!(held == 1 && (name == "away" || over > 0), "{held}, {over}");
            Ok(())
        })?;
        away.push(vm);
    }
    let log = gateway.log();
    ensure!(
        log.contains("reverse session refused: sessions_max is reached"),
        "{log}"
    );
    for (vm, said) in away.iter().zip(["1 of 1 gateway ", "TMB0315"]) {
        wait_for(said, PATIENCE, || {
            let status = vm.host.run("tombolo", &["status"])?.stdout;
            ensure!(status.contains(said), "{status}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn sidecars_reach_named_and_exported_hosts_alone() -> Result<()> {
    needs_root!();
    let mut site = Site::start("sidecars")?;
    let settings = "passthrough_listen: ['0.0.0.0:15443']\n\
                    passthrough_hosts: [legacy.shop.svc.mesh.internal, kept.shop.svc.mesh.internal]\n";
    let gateway = site
        .mesh
        .gateway_set("gw2", "net2", &mut site.west, 202, settings)?;
    // A server with TLS of its own, outside of the mesh.
    let plain = site.mesh.lab.lan_host(&mut site.west, "plain", 7)?;
    plain.sh(
        "mkdir -p /run/www && echo legacy speaks > /run/www/index.html && cd /run && \
         openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout tls.key -out tls.crt -days 2 -subj /CN=legacy 2>&1",
    )?
    .checked()?;
    // It speaks Istio's ALPN, as a sidecar does.
    let server = "cd /run/www && exec openssl s_server -accept 8443 -cert /run/tls.crt -key /run/tls.key -alpn istio -WWW -quiet";
    let _server = plain.spawn("sh", &["-c", server])?;
    let entry = |name: &str, exported: bool| {
        let labels = if exported {
            ", labels: {istio.io/global: 'true'}"
        } else {
            ""
        };
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop{labels}}}\nspec:\n  \
             hosts: [{name}.shop.svc.mesh.internal]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
             ports: [{{number: 443, name: tls, protocol: TLS, targetPort: 8443}}]\n  \
             endpoints: [{{address: 10.0.0.7, network: net2}}]\n"
        )
    };
    for (name, exported) in [("legacy", true), ("kept", false), ("unnamed", true)] {
        site.mesh.apply(&entry(name, exported))?;
    }
    let sidecar = site.mesh.lab.host("sidecar")?;
    let at = |port: u16| gateway.host.at(port);
    let dial = |port: u16, name: &str, alpn: &str| {
        sidecar.sh(&format!(
            "(printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n'; sleep 1) | timeout 5 openssl s_client -connect {} -servername {name} -alpn {alpn} -quiet -ign_eof 2>&1",
            at(port)
        ))
    };
    let name = |port: u16, host: &str| format!("outbound_.{port}_._.{host}.shop.svc.mesh.internal");
    wait_for("the host behind the gateway", PATIENCE, || {
        let said = dial(15443, &name(443, "legacy"), "istio")?.text();
        ensure!(
            said.contains("CN=legacy") || said.contains("CN = legacy"),
            "{said}"
        );
        ensure!(said.contains("legacy speaks"), "{said}");
        Ok(())
    })?;
    for (port, name, alpn, what) in [
        (15443, name(443, "legacy"), "http/1.1", "not a sidecar's TLS"),
        (15443, name(80, "legacy"), "istio", "a port that it does not have"),
        (15443, name(443, "kept"), "istio", "named, but not exported"),
        (15443, name(443, "unnamed"), "istio", "exported, but not named"),
        (
            15443,
            "legacy.shop.svc.mesh.internal".to_owned(),
            "istio",
            "not AUTO_PASSTHROUGH's name",
        ),
        (
            15443,
            "discovery.mesh.example".to_owned(),
            "h2",
            "discovery is elsewhere",
        ),
        (443, name(443, "legacy"), "istio", "the members' port"),
    ] {
        let said = dial(port, &name, alpn)?.text();
        ensure!(!said.contains("legacy"), "{what}: {said}");
    }
    let passed = gateway.metric("tombolo_gateway_accepted_total{kind=\"passthrough\"}")?;
    ensure!(passed >= 1, "{passed}");
    Ok(())
}
