//! Containers of a host, on a bridge that its owner has opted in or not.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use tombolo_testkit::{MeshOptions, Nginx, Output, Vm};

/// A bridge with one container, as container engines make them; nothing is masqueraded.
const CONTAINER: &str = "set -e
ip netns add inside
ip link add br-test type bridge
ip addr add 172.30.0.1/24 dev br-test
ip link set br-test up
ip link add outer type veth peer name eth0 netns inside
ip link set outer master br-test up
ip -n inside link set lo up
ip -n inside addr add 172.30.0.2/24 dev eth0
ip -n inside link set eth0 up
ip -n inside route add default via 172.30.0.1
sysctl -qw net.ipv4.ip_forward=1
printf 'nameserver 240.240.255.254\\noptions timeout:2 attempts:1\\n' > /run/inside-resolv.conf";

/// A shell line in the container, with the mesh's resolver.
fn inside(vm: &Vm, line: &str) -> Result<Output> {
    let script = format!("mount --bind /run/inside-resolv.conf /etc/resolv.conf && {line}");
    vm.host
        .run("ip", &["netns", "exec", "inside", "sh", "-c", &script])
}

#[test]
fn containers_of_an_opted_in_bridge_call_by_name() -> Result<()> {
    needs_root!();
    let (a, b, _mesh) = pair("containers", "http=80:8080", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let url = format!("http://{CATALOG}/");
    a.curl_until(&url, PATIENCE)?;
    a.host.sh(CONTAINER)?.checked()?;
    let vip = a
        .host
        .sh(&format!("getent ahostsv4 {CATALOG} | awk 'NR==1 {{print $1}}'"))?
        .stdout;
    let vip = vip.trim();

    // Nobody has said that they may: refused, and at once.
    let begun = Instant::now();
    let refused = inside(&a, &format!("curl -sS -m 8 http://{vip}/"))?;
    ensure!(
        refused.code == 7 && begun.elapsed() < Duration::from_secs(2),
        "after {:?}: {}",
        begun.elapsed(),
        refused.text()
    );
    let begun = Instant::now();
    let unknown = inside(&a, &format!("getent ahostsv4 {CATALOG}"))?;
    ensure!(
        !unknown.ok() && begun.elapsed() < Duration::from_secs(6),
        "after {:?}: {}",
        begun.elapsed(),
        unknown.text()
    );

    // Masquerading hides the container behind the host's own address, but not that the host has no such socket.
    let masquerade = |what: &str| {
        a.host
            .sh(&format!(
                "iptables -t nat {what} POSTROUTING -s 172.30.0.0/24 ! -o br-test -j MASQUERADE"
            ))?
            .checked()
    };
    masquerade("-A")?;
    // That the host forwards is seen within a second.
    let deadline = Instant::now() + Duration::from_secs(3);
    loop {
        let begun = Instant::now();
        let hidden = inside(&a, &format!("curl -sS -m 8 http://{vip}/"))?;
        if hidden.code == 7 && begun.elapsed() < Duration::from_secs(2) {
            break;
        }
        ensure!(Instant::now() < deadline, "{}\n{}", hidden.text(), a.agent_log());
    }
    // The host itself goes on, by an IPv4 socket and by one that writes the address as IPv6.
    a.curl_until(&url, Duration::from_secs(2))?;
    let mapped = format!("curl -sS -m 8 'http://[::ffff:{vip}]/'");
    let mapped = a.host.sh(&mapped)?.checked()?;
    ensure!(mapped.stdout == "hello\n", "{}", mapped.text());
    masquerade("-D")?;

    for bridges in ["br-test", "172.30.0.0/24"] {
        a.host.run("tombolo", &["down"])?.checked()?;
        a.host.write(
            "/etc/tombolo/agent.yaml",
            &format!("access_log: all\nbridges: [{bridges}]\n"),
        )?;
        a.host.run("tombolo", &["up"])?.checked()?;
        a.curl_until(&url, PATIENCE)?;
        let called = inside(&a, &format!("curl -sS -m 8 {url}"))?;
        ensure!(
            called.stdout == "hello\n",
            "{bridges}: {}\n{}",
            called.text(),
            a.agent_log()
        );
    }
    // With the masquerading of a container engine the caller's address is the host's own: it works all the same.
    masquerade("-A")?;
    let called = inside(&a, &format!("curl -sS -m 8 {url}"))?;
    ensure!(called.stdout == "hello\n", "{}\n{}", called.text(), a.agent_log());
    Ok(())
}
