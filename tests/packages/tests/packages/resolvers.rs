//! Hosts whose names are looked up by something else than systemd-resolved: dnsmasq, unbound, NetworkManager, and a
//! plain resolv.conf with the word of its owner.

use crate::{HOST, lifecycle::Mesh, names::NAME, needs_machines};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use tombolo_packages::{Machine, Upstream, Yard};
use tombolo_testkit::skip;

const DNSMASQ_FILE: &str = "/etc/dnsmasq.d/tombolo.conf";
const UNBOUND_FILE: &str = "/etc/unbound/unbound.conf.d/tombolo.conf";
const RESOLV_FILES: &str = "sha256sum /etc/resolv.conf /etc/nsswitch.conf /etc/hosts; stat -c '%a %U:%G' /etc/resolv.conf; \
                            ls -A /etc | grep tombolo.conf || :";

/// A name of the mesh and an ordinary one, as every program looks them up.
fn both(vm: &Machine, vip: &str, round: &str) -> Result<()> {
    let first = "head -1 | cut -d' ' -f1";
    vm.until(&format!("test \"$(getent ahostsv4 {NAME} | {first})\" = {vip}"))?;
    let line = format!(
        "test \"$(getent ahostsv4 {round}.example.net | {first})\" = {}",
        Upstream::ANSWER
    );
    vm.ok(&line).map(drop)
}

/// Makes a server of the host its resolver, with the network's server behind it.
fn use_local(vm: &Machine) -> Result<()> {
    vm.ok("systemctl disable --now systemd-resolved; rm -f /etc/resolv.conf; echo 'nameserver 127.0.0.1' > /etc/resolv.conf")
        .map(drop)
}

#[test]
fn dnsmasq_and_unbound_get_a_file_of_their_own_and_give_it_back() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let _upstream = Upstream::start(&yard)?;
    let mesh = Mesh::found(&yard)?;
    let vm = mesh.stranger(&yard, "vm", &[])?;
    use_local(&vm)?;
    vm.write(
        "/etc/dnsmasq.d/site.conf",
        "0644",
        &format!(
            "no-resolv\nserver={}\nlisten-address=127.0.0.1\nbind-interfaces\n",
            Upstream::ADDRESS
        ),
    )?;
    vm.ok("systemctl start dnsmasq")?;
    vm.until("getent ahostsv4 before.example.net")?;
    let (host, files) = (
        vm.ok(HOST)?,
        vm.ok("cd /etc && find dnsmasq* unbound NetworkManager -type f | sort | xargs sha256sum")?,
    );

    let said = vm
        .sh_with("tombolo up -", &mesh.token("catalog")?)?
        .checked()?
        .text();
    let vip = mesh.vip("catalog")?;
    both(&vm, &vip, "up")?;
    vm.until(
        "tombolo status | grep 'Names:.*dnsmasq, which asks the mesh for mesh.internal (names: dnsmasq)'",
    )?;
    ensure!(!said.contains("TMB0313"), "{said}");
    vm.until(&format!("! grep -q trial {DNSMASQ_FILE}"))?;
    ensure!(vm.ok(&format!("stat -c '%a %U:%G' {DNSMASQ_FILE}"))? == "644 root:root");
    ensure!(
        vm.ok("sha256sum /etc/resolv.conf")?
            == vm.ok("echo 'nameserver 127.0.0.1' | sha256sum | sed 's|-|/etc/resolv.conf|'")?
    );

    // A new netd finds it in place and leaves dnsmasq alone.
    let pid = vm.pid("dnsmasq")?;
    vm.ok("systemctl restart tombolo-netd")?;
    both(&vm, &vip, "again")?;
    vm.until("tombolo status | grep 'names: dnsmasq'")?;
    ensure!(vm.pid("dnsmasq")? == pid, "dnsmasq was restarted without need");
    vm.ok("tombolo down")?;
    ensure!(!vm.sh(&format!("ls {DNSMASQ_FILE}"))?.ok());
    ensure!(vm.ok(HOST)? == host, "{host}\n---\n{}", vm.ok(HOST)?);
    vm.ok("getent ahostsv4 down.example.net")?;

    // One that does not work with the mesh: it is as before, and said.
    vm.ok("sed -i 's|^server=.*|&\\naddress=/mesh.internal/192.0.2.99|' /etc/dnsmasq.d/site.conf && \
           printf 'server=/catalog.shop.svc.mesh.internal/10.77.0.1\\n' >> /etc/dnsmasq.d/site.conf && systemctl restart dnsmasq")?;
    vm.ok("tombolo up")?;
    let status = vm.until("tombolo status | grep -A2 TMB0313 | grep 'was tried and taken back'")?;
    ensure!(
        status.contains("names of mesh.internal were not found"),
        "{status}"
    );
    ensure!(!vm.sh(&format!("ls {DNSMASQ_FILE}"))?.ok());
    vm.ok("getent ahostsv4 refused.example.net")?;
    vm.ok("tombolo down && sed -i '/mesh.internal/d' /etc/dnsmasq.d/site.conf && systemctl restart dnsmasq")?;

    // netd dies between the change and the verdict: the next one takes it back.
    vm.write(
        DNSMASQ_FILE,
        "0644",
        "# Written by tombolo-netd, which takes it away again: tombolo down\n# on trial\n",
    )?;
    vm.ok("systemctl start tombolo-netd")?;
    vm.until(&format!("! ls {DNSMASQ_FILE}"))?;

    // unbound, the same way.
    vm.ok("systemctl disable --now dnsmasq; rm -rf /run/dnsmasq")?;
    vm.write(
        "/etc/unbound/unbound.conf.d/site.conf",
        "0644",
        &format!(
            "server:\n  domain-insecure: \".\"\n  module-config: \"iterator\"\nforward-zone:\n  name: \".\"\n  forward-addr: {}\n",
            Upstream::ADDRESS
        ),
    )?;
    vm.ok("systemctl start unbound")?;
    vm.until("getent ahostsv4 unbound.example.net")?;
    vm.ok("tombolo up")?;
    both(&vm, &vip, "unbound-up")?;
    vm.until("tombolo status | grep 'names: unbound'")?;
    vm.ok("tombolo leave")?;
    ensure!(!vm.sh(&format!("ls {UNBOUND_FILE}"))?.ok());
    vm.ok("getent ahostsv4 unbound-left.example.net")?;
    vm.ok("rm /etc/dnsmasq.d/site.conf /etc/unbound/unbound.conf.d/site.conf")?;
    let now = vm.ok("cd /etc && find dnsmasq* unbound NetworkManager -type f | sort | xargs sha256sum")?;
    ensure!(
        files
            .lines()
            .filter(|line| !line.contains("site.conf"))
            .eq(now.lines()),
        "{files}\n---\n{now}"
    );
    Ok(())
}

#[test]
fn a_plain_resolv_conf_with_its_owners_word() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let upstream = Upstream::start(&yard)?;
    let mesh = Mesh::found(&yard)?;
    let vm = mesh.stranger(&yard, "vm", &[])?;
    let original = format!("# mine\nsearch corp.example\nnameserver {}\n", Upstream::ADDRESS);
    vm.ok("systemctl disable --now systemd-resolved; rm -f /etc/resolv.conf; sed -i 's/^hosts:.*/hosts: files dns/' /etc/nsswitch.conf")?;
    vm.write("/etc/resolv.conf", "0644", &original)?;
    let files = vm.ok(RESOLV_FILES)?;
    let token = mesh.token("catalog")?;

    // Without a word nothing is touched; the word needs a person, or --yes.
    vm.sh_with("tombolo up -", &token)?.checked()?;
    ensure!(vm.ok(RESOLV_FILES)? == files);
    let refused = vm.sh("tombolo up --names resolv-conf")?;
    ensure!(
        !refused.ok() && refused.text().contains("add --yes"),
        "{}",
        refused.text()
    );
    ensure!(
        refused.text().contains("each query waits 1 s"),
        "it says what it costs: {}",
        refused.text()
    );
    ensure!(vm.ok(RESOLV_FILES)? == files && !vm.sh("ls /etc/systemd/system/tombolo-netd.service.d")?.ok());
    let pid = vm.pid("tombolo-netd")?;
    ensure!(
        !vm.sh(&format!("nsenter -t {pid} -m touch /etc/x"))?.ok(),
        "netd may write /etc"
    );

    vm.ok("tombolo up --names resolv-conf --yes")?;
    let vip = mesh.vip("catalog")?;
    both(&vm, &vip, "up")?;
    ensure!(
        vm.ok("grep -c ^nameserver /etc/resolv.conf; sed -n 2p /etc/resolv.conf")?
            == "2\nnameserver 240.240.255.254"
    );
    ensure!(vm.ok("stat -c '%a %U:%G' /etc/resolv.conf")? == "644 root:root");
    vm.until("tombolo status | grep 'names: resolv-conf'")?;
    ensure!(
        upstream.asked("up.example.net") == 1,
        "it went round in a circle, or past the agent"
    );

    // Killed: nobody waits. Frozen: each waits its second, none fails, and after some the line is out.
    let lookup = |round: &str| -> Result<Duration> {
        let begun = Instant::now();
        vm.ok(&format!("getent ahostsv4 {round}.example.net"))?;
        Ok(begun.elapsed())
    };
    let agent = vm.pid("tombolo-agent")?;
    vm.ok(&format!("kill -STOP {agent}"))?;
    let begun = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut round = 0;
    while vm.ok("sed -n 2p /etc/resolv.conf")?.contains("240.240.255.254") {
        slowest = slowest.max(lookup(&format!("frozen{round}"))?);
        round += 1;
        ensure!(begun.elapsed() < Duration::from_secs(8), "the line stays");
    }
    ensure!(
        slowest < Duration::from_millis(1900) && round > 0,
        "{round} lookups, the slowest in {slowest:?}"
    );
    ensure!(lookup("past")? < Duration::from_millis(700));
    ensure!(vm.ok(RESOLV_FILES)? == files, "it is not the original");
    vm.ok(&format!("kill -CONT {agent}"))?;
    both(&vm, &vip, "thawed")?;
    // What it had not read yet when it died is lost with it; from then on nobody waits.
    vm.ok(&format!(
        "kill -KILL {agent} && while [ -e /proc/{agent} ]; do :; done"
    ))?;
    // The kernel closes the device a moment after the process has gone, or the next agent has it by now.
    vm.until("ip link show mesh0 | grep -q NO-CARRIER || pidof tombolo-agent")?;
    ensure!(lookup("killed")? < Duration::from_millis(700));
    both(&vm, &vip, "back")?;

    // A new lease: its server is the one behind now.
    let lease = original.replace("corp.example", "new.example");
    vm.write("/etc/resolv.conf.dhcp", "0644", &lease)?;
    vm.ok("mv /etc/resolv.conf.dhcp /etc/resolv.conf")?;
    vm.until("grep -q new.example /etc/resolv.conf && sed -n 2p /etc/resolv.conf | grep 240.240.255.254")?;
    both(&vm, &vip, "lease")?;
    vm.write("/etc/resolv.conf", "0644", &original)?;
    vm.until("sed -n 2p /etc/resolv.conf | grep 240.240.255.254")?;

    // Both are killed for good, and then the power goes: the next boot mends it, with no agent.
    vm.ok("systemctl kill -s KILL tombolo-netd && systemctl kill -s KILL tombolo-agent")?;
    both(&vm, &vip, "both-killed")?;
    vm.until("sed -n 2p /etc/resolv.conf | grep 240.240.255.254")?;
    vm.ok("systemctl disable tombolo-agent && sync")?;
    vm.power_off()?;
    ensure!(std::fs::read_to_string(vm.path("/etc/resolv.conf"))?.contains("240.240.255.254"));
    vm.boot()?;
    vm.until(&format!("test \"$({RESOLV_FILES})\" = '{files}'"))?;
    ensure!(lookup("booted")? < Duration::from_millis(700));
    ensure!(!vm.sh("ls /var/lib/tombolo/netd/resolv.conf")?.ok());

    vm.ok("tombolo up")?;
    both(&vm, &vip, "up-again")?;
    vm.ok("tombolo down")?;
    ensure!(vm.ok(RESOLV_FILES)? == files, "down is not the way back");
    vm.ok("tombolo up")?;
    both(&vm, &vip, "up-once-more")?;
    // The package goes while the file is ours.
    let drop_in = "/etc/systemd/system/tombolo-netd.service.d";
    vm.ok(&format!("ls {drop_in}"))?;
    vm.apt("remove tombolo-agent")?;
    ensure!(vm.ok(RESOLV_FILES)? == files, "removal is not the way back");
    ensure!(
        !vm.sh(&format!("ls {drop_in}"))?.ok(),
        "the drop-in outlives the package"
    );
    ensure!(lookup("removed")? < Duration::from_millis(700));
    vm.apt("install tombolo-agent")?;
    vm.ok("tombolo up")?;
    both(&vm, &vip, "installed")?;

    // An /etc that cannot be written: the rest works, and why names do not is said.
    vm.ok("tombolo down && mount --bind /etc /etc && mount -o remount,bind,ro /etc")?;
    vm.ok("tombolo up")?;
    vm.until("tombolo status | grep -A2 TMB0313 | grep -i 'read-only'")?;
    ensure!(vm.ok(RESOLV_FILES)? == files && lookup("read-only")? < Duration::from_millis(700));
    ensure!(vm.ok(&format!("dig +short +time=2 @240.240.255.254 {NAME}"))? == vip);
    vm.ok("umount /etc && tombolo down && tombolo up")?;
    both(&vm, &vip, "written-again")?;
    vm.ok("tombolo leave")?;
    ensure!(vm.ok(RESOLV_FILES)? == files);
    ensure!(
        !vm.sh("ls /etc/systemd/system/tombolo-netd.service.d")?.ok(),
        "the drop-in stays"
    );

    // A link is another program's file.
    vm.ok("mkdir -p /run/other && mv /etc/resolv.conf /run/other/ && ln -s /run/other/resolv.conf /etc/resolv.conf")?;
    vm.sh_with("tombolo up -", &mesh.token("catalog")?)?.checked()?;
    vm.until("tombolo status | grep -A2 TMB0313 | grep 'is a link to /run/other/resolv.conf'")?;
    ensure!(vm.ok("readlink /etc/resolv.conf")? == "/run/other/resolv.conf");
    ensure!(vm.ok("cat /etc/resolv.conf")? == original.trim_end());
    Ok(())
}

#[test]
fn network_managers_dnsmasq() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let _upstream = Upstream::start(&yard)?;
    let mesh = Mesh::found(&yard)?;
    let vm = mesh.stranger(&yard, "vm", &[])?;
    vm.ok("systemctl disable --now systemd-resolved; rm -f /etc/resolv.conf; touch /etc/resolv.conf")?;
    vm.write(
        "/etc/NetworkManager/conf.d/dns.conf",
        "0644",
        "[main]\ndns=dnsmasq\nrc-manager=file\n[keyfile]\nunmanaged-devices=none\n",
    )?;
    if !vm.sh("systemctl start NetworkManager")?.ok() {
        skip(
            "network_managers_dnsmasq",
            "NetworkManager does not start on this machine",
        );
        return Ok(());
    }
    let (address, server) = (vm.address(), Upstream::ADDRESS);
    vm.ok("nmcli dev set eth0 managed yes")?;
    vm.ok(&format!(
        "nmcli con add type ethernet ifname eth0 con-name site ipv4.method manual ipv4.addresses {address}/24 \
         ipv4.gateway {server} ipv4.dns {server} ipv6.method disabled && nmcli con up site"
    ))?;
    vm.until("grep -q '^nameserver 127.0.0.1' /etc/resolv.conf && getent ahostsv4 before.example.net")?;
    vm.sh_with("tombolo up -", &mesh.token("catalog")?)?.checked()?;
    let vip = mesh.vip("catalog")?;
    both(&vm, &vip, "up")?;
    vm.until("tombolo status | grep 'names: networkmanager'")?;
    // mesh0 is not NetworkManager's, and its resolv.conf is not ours.
    ensure!(vm.ok("nmcli -g DEVICE,STATE dev")?.contains("mesh0:unmanaged"));
    vm.ok("nmcli con up site")?;
    both(&vm, &vip, "after")?;
    vm.ok("tombolo down")?;
    ensure!(!vm.sh("ls /etc/NetworkManager/dnsmasq.d/tombolo.conf")?.ok());
    vm.until("getent ahostsv4 down.example.net").map(drop)
}
