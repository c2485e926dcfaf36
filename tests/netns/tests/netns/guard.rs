//! Plaintext to declared ports: closed where a policy says so, and only there.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use tombolo_testkit::{EchoServer, Host, MeshOptions, Nginx, Vm, wait_for};

/// Firewalls of others, without counters: what the guard must never touch.
const OTHERS: &str = "nft -s list ruleset | awk '/^table inet tombolo_guard/ {skip=1} !skip {print} /^}/ {skip=0}'; \
    iptables-save | grep -v '^#'; ip6tables-save | grep -v '^#'";

fn peer_authentication(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: strict, namespace: shop}}\nspec: {spec}\n"
    )
}

/// How a connection past the mesh goes.
fn connect(from: &Host, address: &str, port: u16) -> Result<String> {
    let how = from.run("tombolo-peer", &["call", "connect", address, &port.to_string()])?;
    Ok(how.stdout.lines().next().unwrap_or_default().to_owned())
}

fn until(from: &Host, to: &Vm, port: u16, expected: &str) -> Result<()> {
    let address = to.host.ipv4().to_string();
    wait_for(&format!("{port}: {expected}"), PATIENCE, || {
        let how = connect(from, &address, port)?;
        if how.starts_with(expected) {
            Ok(())
        } else {
            bail!("{port}: {how}\n{}", to.agent_log())
        }
    })
}

fn tables(vm: &Vm) -> Result<String> {
    Ok(vm.host.sh("nft list tables")?.checked()?.stdout)
}

#[test]
fn strict_closes_declared_ports_and_nothing_else() -> Result<()> {
    needs_root!();
    let (a, b, mut mesh) = pair("guard", "http=80:8080,echo=7003", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let _echo = EchoServer::start(&b.host, "echo", 7003)?;
    let _undeclared = EchoServer::start(&b.host, "echo", 7009)?;
    let neighbour = mesh.lab.host("neighbour")?;
    let neighbour = &neighbour;
    let url = format!("http://{CATALOG}/");
    a.curl_until(&url, PATIENCE)?;
    // Somebody's firewall, in both dialects.
    b.host
        .sh("nft 'add table inet filter; add chain inet filter input { type filter hook input priority 0; }; \
             add rule inet filter input tcp dport 25 drop' && iptables -A INPUT -p tcp --dport 26 -j DROP && ip6tables -A INPUT -p tcp --dport 26 -j DROP")?
        .checked()?;
    let others = b.host.sh(OTHERS)?.checked()?.stdout;
    ensure!(
        others.contains("dport 25") && others.contains("dport 26"),
        "{others}"
    );
    ensure!(!tables(&b)?.contains("tombolo"), "no policy, no table");
    until(neighbour, &b, 8080, "connected")?;
    let status = b.host.run("tombolo", &["status"])?;
    ensure!(
        status.stdout.contains("8080 open: no policy denies plaintext"),
        "{}",
        status.text()
    );
    let talk = format!(
        "import socket,time\ns=socket.create_connection(('{}',7003))\ntry:\n while True:\n  s.send(b'x'); assert s.recv(1); time.sleep(0.05)\n\
         except ConnectionResetError:\n print('was reset')",
        b.host.ipv4()
    );
    let mut open = neighbour.spawn("python3", &["-c", &talk])?;
    wait_for("an open plaintext connection", PATIENCE, || {
        let open = b.host.sh("ss -Htn state established 'sport = 7003'")?.stdout;
        if open.trim().is_empty() {
            bail!("not yet")
        } else {
            Ok(())
        }
    })?;

    mesh.apply(&peer_authentication("{mtls: {mode: STRICT}}"))?;
    let begun = Instant::now();
    until(neighbour, &b, 8080, "ECONNREFUSED")?;
    ensure!(
        begun.elapsed() < Duration::from_millis(1500),
        "closed after {:?}",
        begun.elapsed()
    );
    let refused = Instant::now();
    for address in [b.host.ipv4().to_string(), b.host.ipv6().to_string()] {
        for port in [8080, 7003] {
            let how = connect(neighbour, &address, port)?;
            ensure!(how.starts_with("ECONNREFUSED"), "{address} {port}: {how}");
        }
    }
    ensure!(
        refused.elapsed() < Duration::from_secs(2),
        "refused at once, not timed out"
    );
    ensure!(
        connect(neighbour, &b.host.ipv4().to_string(), 7009)?.starts_with("connected"),
        "not declared"
    );
    ensure!(a.curl(&url)?.stdout == "hello\n", "{}", b.agent_log());
    ensure!(
        open.wait(Duration::from_secs(3)) == Some(0) && open.log().contains("was reset"),
        "the open plaintext connection must be cut: {}",
        open.log()
    );
    ensure!(tables(&b)?.contains("table inet tombolo_guard"));
    ensure!(b.host.sh(OTHERS)?.stdout == others, "another table was touched");
    let local = b.host.sh(
        "curl -sS -m 5 http://127.0.0.1:8080/ && curl -sS -m 5 http://$(hostname -I | cut -d' ' -f1):8080/",
    )?;
    ensure!(local.ok(), "the host's own calls are not asked: {}", local.text());
    let status = b.host.run("tombolo", &["status"])?;
    ensure!(
        status.code == 0
            && status
                .stdout
                .contains("8080 guarded: PeerAuthentication says STRICT")
            && status.stdout.contains("not the mesh's to close"),
        "{}",
        status.text()
    );
    // Neither program's end opens anything, once the disk knows of the policy: it is not written any more.
    wait_for("the snapshot on disk", PATIENCE, || {
        b.host
            .sh(
                "[ $(($(date +%s%N) - $(date +%s%N -r /var/lib/tombolo/agent/snapshot.bin))) -gt 500000000 ]",
            )?
            .checked()
            .map(drop)
    })?;
    for program in ["tombolo-agent", "tombolo-netd"] {
        b.host.signal_all(program, Signal::SIGKILL)?;
        until(neighbour, &b, 8080, "ECONNREFUSED")?;
    }
    // As after a reboot without discovery: the snapshot closes it before the agent is ready.
    b.host.sh("nft delete table inet tombolo_guard")?.checked()?;
    mesh.kill_discovery();
    b.host.run("tombolo", &["up"])?.checked()?;
    ensure!(
        connect(neighbour, &b.host.ipv4().to_string(), 8080)?.starts_with("ECONNREFUSED"),
        "{}",
        b.agent_log()
    );
    mesh.start_discovery()?;
    a.curl_until(&url, PATIENCE)?;
    ensure!(connect(neighbour, &b.host.ipv4().to_string(), 8080)?.starts_with("ECONNREFUSED"));

    // A port that the policy leaves open.
    mesh.tombolo("delete pa strict -n shop")?;
    until(neighbour, &b, 8080, "connected")?;
    wait_for("the table to go", PATIENCE, || {
        let tables = tables(&b)?;
        if tables.contains("tombolo") {
            bail!("{tables}")
        } else {
            Ok(())
        }
    })?;
    mesh.apply(&peer_authentication(
        "{selector: {matchLabels: {app: catalog}}, mtls: {mode: STRICT}, portLevelMtls: {\"7003\": {mode: PERMISSIVE}}}",
    ))?;
    until(neighbour, &b, 8080, "ECONNREFUSED")?;
    ensure!(connect(neighbour, &b.host.ipv4().to_string(), 7003)?.starts_with("connected"));
    mesh.tombolo("delete pa strict -n shop")?;
    until(neighbour, &b, 8080, "connected")?;

    // An ALLOW policy that plaintext does not pass is not walked around.
    mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: only-web, namespace: shop}\nspec:\n  \
         selector: {matchLabels: {app: catalog}}\n  rules: [{from: [{source: {serviceAccounts: [shop/webapp]}}]}]\n",
    )?;
    until(neighbour, &b, 8080, "ECONNREFUSED")?;
    ensure!(a.curl(&url)?.stdout == "hello\n", "{}", b.agent_log());
    // One that admits a neighbour by its address admits it, and nobody else.
    mesh.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: neighbour, namespace: shop}}\nspec:\n  \
         selector: {{matchLabels: {{app: catalog}}}}\n  rules: [{{from: [{{source: {{ipBlocks: [\"{}\"]}}}}]}}]\n",
        neighbour.ipv4()
    ))?;
    until(neighbour, &b, 8080, "connected")?;
    ensure!(connect(&a.host, &b.host.ipv4().to_string(), 8080)?.starts_with("ECONNREFUSED"));

    b.host.run("tombolo", &["down"])?.checked()?;
    ensure!(!tables(&b)?.contains("tombolo"), "down leaves nothing");
    ensure!(connect(&a.host, &b.host.ipv4().to_string(), 8080)?.starts_with("connected"));
    ensure!(b.host.sh(OTHERS)?.stdout == others);
    Ok(())
}

#[test]
fn where_it_cannot_be_closed_it_is_said() -> Result<()> {
    needs_root!();
    let (_a, b, mesh) = pair("unguarded", "http=80:8080", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    until(&mesh.control, &b, 8080, "connected")?;
    b.host.sh("mount --bind /dev/null /usr/sbin/nft")?.checked()?;
    mesh.apply(&peer_authentication("{mtls: {mode: STRICT}}"))?;
    let mut status = String::new();
    wait_for("the finding", PATIENCE, || {
        let output = b.host.run("tombolo", &["status"])?;
        status = output.text();
        if output.code == 1 && status.contains("TMB0314") {
            Ok(())
        } else {
            bail!("{status}")
        }
    })?;
    ensure!(
        status.contains("8080 OPEN: NOT GUARDED although PeerAuthentication") && status.contains("nftables"),
        "{status}"
    );
    ensure!(b.agent_log().contains("TMB0314"), "{}", b.agent_log());
    // netd takes nothing but ports that may be closed, whoever asks.
    let garbage = "import json,socket\n\
        def ask(ports):\n \
        s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET); s.settimeout(5); s.connect('/run/tombolo/netd/netd.sock')\n \
        s.send(b'{\"verb\":\"hello\",\"version\":1}'); s.recv(20000)\n \
        s.send(json.dumps({'verb':'set_guard','rules':{'ports':[{'port':p} for p in ports]}}).encode())\n \
        return s.recv(20000).decode()\n\
        for ports in [[0],[70000],[22],[15008],list(range(1,10001)),['80; flush ruleset'],[80]*300]: print(ask(ports) or 'closed')\n";
    let answers = b.host.run("python3", &["-c", garbage])?.checked()?.stdout;
    ensure!(answers.lines().count() == 7, "{answers}");
    for answer in answers.lines() {
        ensure!(answer == "closed" || answer.contains("\"refused\""), "{answer}");
    }
    b.host.sh("umount /usr/sbin/nft")?.checked()?;
    until(&mesh.control, &b, 8080, "ECONNREFUSED")?;
    wait_for("the finding to go", PATIENCE, || {
        let status = b.host.run("tombolo", &["status", "-o", "json"])?.checked()?;
        ensure!(
            status.stdout.contains("\"guarded\"") && !status.stdout.contains("TMB0314"),
            "{}",
            status.stdout
        );
        Ok(())
    })
}
