//! Bad input at every door.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Result, ensure};
use tombolo_testkit::{Lab, Mesh, MeshOptions, Nginx};

#[test]
fn garbage_on_every_port_changes_nothing() -> Result<()> {
    needs_root!();
    let (a, b, mesh) = pair("garbage", "http=80:8080", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let url = format!("http://{CATALOG}/");
    a.curl_until(&url, PATIENCE)?;
    let blast = |host: &tombolo_testkit::Host, address: &str, port: u16| {
        host.sh(&format!(
            "for n in 1 2 3 4 5; do head -c 20000 /dev/urandom | timeout 2 tombolo-peer call blast {address} {port} >/dev/null 2>&1; done; true"
        ))
    };
    let pids = (a.agent_pid()?, b.agent_pid()?);
    blast(&a.host, &b.host.ipv4().to_string(), 15008)?;
    blast(&a.host, &mesh.control.ipv4().to_string(), 15012)?;
    for port in [15020, 15021] {
        blast(&b.host, "127.0.0.1", port)?;
    }
    for port in [15014, 15021] {
        blast(&mesh.control, "127.0.0.1", port)?;
    }
    for port in [15001, 15053] {
        blast(&b.host, "240.240.255.253", port)?;
    }
    // UDP garbage at the DNS VIP and at a service.
    b.host.sh(
        "python3 -c \"import os,socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\nfor n in range(300):\n  s.sendto(os.urandom(n),('240.240.255.254',53)); s.sendto(os.urandom(n+1),('240.240.0.1',9))\" 2>&1; true",
    )?;
    ensure!(a.curl(&url)?.stdout == "hello\n", "{}", b.agent_log());
    ensure!((a.agent_pid()?, b.agent_pid()?) == pids, "no agent was restarted");
    // Nothing of ours but the documented ports listens on the host's own addresses.
    let open = b.host.sh("ss -Hltn | awk '{print $4}' | grep -v '127.0.0.1\\|\\[::1\\]\\|240.240\\|2001:2:\\|8080' | sort -u")?.stdout;
    for line in open.lines() {
        ensure!(line.ends_with(":15008"), "an undocumented listener: {line}");
    }
    Ok(())
}

#[test]
fn a_neighbour_does_not_speak_as_this_host() -> Result<()> {
    needs_root!();
    // A LAN neighbour routes the mesh prefix to a host that forwards, as every docker host does.
    let (a, b, mesh) = pair("neighbour", "http=80:8080", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    a.curl_until(&format!("http://{CATALOG}/"), PATIENCE)?;
    let vip = a
        .host
        .sh(&format!("getent ahostsv4 {CATALOG}"))?
        .stdout
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned();
    a.host.sh("sysctl -qw net.ipv4.ip_forward=1")?.checked()?;
    mesh.lab.on_router(&[
        "ip",
        "route",
        "add",
        "240.240.0.0/16",
        "via",
        &a.host.ipv4().to_string(),
    ])?;
    let neighbour = format!("timeout 4 curl -sS -m 3 http://{vip}/");
    let output = mesh.control.sh(&neighbour)?;
    ensure!(
        !output.ok() && !output.stdout.contains("hello"),
        "a neighbour's packet left with a's identity: {}",
        output.text()
    );
    Ok(())
}

#[test]
fn another_mesh_is_not_this_mesh() -> Result<()> {
    needs_root!();
    let mut one = Mesh::start("one", MeshOptions::default())?;
    one.group("catalog", "http=80:8080")?;
    let token = one.token("catalog")?;
    // Same names, same address, another root: the pin does not fit.
    one.kill_discovery();
    let advertise = one.control.at(15012);
    one.control
        .sh("rm -rf /var/lib/tombolo/discovery /etc/tombolo/discovery.yaml")?
        .checked()?;
    one.control
        .run(
            "tombolo-discovery",
            &[
                "init",
                "--trust-domain",
                "mesh.example",
                "--advertise",
                &advertise,
            ],
        )?
        .checked()?;
    one.start_discovery()?;
    let vm = one.bare("a")?;
    let output = vm.host.run("tombolo", &["up", &token])?;
    ensure!(
        !output.ok() && output.text().contains("TMB0110"),
        "{}",
        output.text()
    );
    // init never runs twice.
    let again = one.control.run(
        "tombolo-discovery",
        &[
            "init",
            "--trust-domain",
            "mesh.example",
            "--advertise",
            &advertise,
        ],
    )?;
    ensure!(
        !again.ok() && again.text().contains("already"),
        "{}",
        again.text()
    );
    // Nobody there at all.
    one.kill_discovery();
    let output = vm.host.run("tombolo", &["up", &token])?;
    ensure!(
        !output.ok() && output.text().contains("TMB0112"),
        "{}",
        output.text()
    );
    drop(Lab::new("unused")?);
    Ok(())
}
