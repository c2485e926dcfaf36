//! What an installation does to a host, and what it does not.

use crate::{AGENT_UNITS, HOST, needs_machines};
use anyhow::{Context as _, Result, ensure};
use tombolo_packages::{Machine, Yard, revision};

/// Files, folders and links of a machine that stay, with owner and mode; without what every start of a program writes.
const TREE: &str = "find / -xdev \\( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /srv -o -path /var/tmp \
                    -o -path /var/log -o -path /var/cache -o -path /var/lib/apt -o -path /var/lib/dpkg -o -path /var/lib/systemd/catalog \
                    -o -path /etc/apt \\) -prune -o -printf '%p %y %m %u:%g %l\\n' | grep -v -e '/etc/ld.so.cache' -e '-$' | sort";

/// `systemd-analyze security`, as a number.
fn exposure(machine: &Machine, unit: &str) -> Result<f64> {
    let text = machine.ok(&format!("systemd-analyze security --no-pager {unit} | tail -1"))?;
    let number = text.split_whitespace().find_map(|word| word.parse().ok());
    number.with_context(|| format!("no score in {text:?}"))
}

/// A field of /proc/PID/status.
fn process_field(machine: &Machine, unit: &str, field: &str) -> Result<String> {
    let pid = machine.pid(unit)?;
    machine.ok(&format!("sed -n 's/^{field}:[[:space:]]*//p' /proc/{pid}/status"))
}

#[test]
fn without_a_token_it_idles_and_says_so() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    let before = vm.ok(HOST)?;
    vm.apt("install tombolo-agent")?;
    ensure!(
        vm.ok(HOST)? == before,
        "the installation changed the host:\n{before}\n---\n{}",
        vm.ok(HOST)?
    );
    ensure!(
        !vm.sh("ip link show mesh0")?.ok(),
        "there is a mesh0 without a mesh"
    );

    // One line, the same by both ways; no restarts, no complaint.
    let status = vm.until("systemctl show --value -p StatusText tombolo-agent | grep 'tombolo up'")?;
    ensure!(status.lines().count() == 1, "{status}");
    let shown = vm.sh("tombolo status")?.text();
    ensure!(
        shown.contains("TMB0301") && shown.contains("tombolo up"),
        "{shown}"
    );
    ensure!(vm.property("tombolo-agent", "NRestarts")? == "0");
    for unit in ["tombolo-agent", "tombolo-netd"] {
        ensure!(
            vm.property(unit, "ActiveState")? == "active",
            "{unit}\n{}",
            vm.journal()
        );
        ensure!(vm.ok(&format!("systemctl is-enabled {unit}"))? == "enabled");
    }
    // Its condition keeps it out, which is no failure.
    ensure!(
        vm.property("tombolo-join", "ActiveState")? == "inactive"
            && vm.property("tombolo-join", "Result")? == "success"
    );
    let loud =
        vm.ok("journalctl -q --no-pager -p warning -u tombolo-agent -u tombolo-netd -u tombolo-join")?;
    ensure!(loud.is_empty(), "{loud}");
    let words =
        vm.sh("systemd-analyze verify tombolo-agent.service tombolo-netd.service tombolo-join.service")?;
    ensure!(words.ok() && words.text().trim().is_empty(), "{}", words.text());

    vm.reboot()?;
    vm.until("systemctl show --value -p StatusText tombolo-agent | grep 'tombolo up'")?;
    ensure!(vm.ok(HOST)? == before, "a reboot without a mesh changed the host");
    Ok(())
}

#[test]
fn the_sandbox_holds() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    vm.apt("install tombolo-agent tombolo-gateway tombolo-discovery")?;
    vm.until("systemctl is-active tombolo-agent tombolo-netd tombolo-gateway")?;

    let agent = exposure(&vm, "tombolo-agent")?;
    ensure!(agent <= 2.0, "the agent's exposure is {agent}");
    let discovery = exposure(&vm, "tombolo-discovery")?;
    ensure!(discovery <= 2.0, "discovery's exposure is {discovery}");
    let gateway = exposure(&vm, "tombolo-gateway")?;
    ensure!(gateway <= 2.0, "the gateway's exposure is {gateway}");
    // It idles until it is enrolled, with the one capability that port 443 takes.
    let status = vm.ok(&format!("grep ^Cap /proc/{}/status", vm.pid("tombolo-gateway")?))?;
    for field in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        ensure!(
            status.contains(&format!("{field}:\t0000000000000400")),
            "{status}"
        );
    }
    let netd = exposure(&vm, "tombolo-netd")?;
    ensure!(netd <= 2.0, "netd's exposure is {netd}");

    // The process that reads the network: nobody, with nothing, and no way to anything.
    for field in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let set = process_field(&vm, "tombolo-agent", field)?;
        ensure!(
            set.trim_start_matches('0').is_empty(),
            "{field} of the agent: {set}"
        );
    }
    ensure!(process_field(&vm, "tombolo-agent", "NoNewPrivs")? == "1");
    ensure!(process_field(&vm, "tombolo-agent", "Seccomp")? == "2");
    let uid = vm.ok("id -u tombolo-agent")?;
    ensure!(
        process_field(&vm, "tombolo-agent", "Uid")?
            .split_whitespace()
            .all(|id| id == uid)
    );
    // CAP_NET_ADMIN is bit 12, and the only one.
    for field in ["CapPrm", "CapEff", "CapBnd"] {
        let set = process_field(&vm, "tombolo-netd", field)?;
        ensure!(set.trim_start_matches('0') == "1000", "{field} of netd: {set}");
    }

    // From inside the agent's mounts: its own two folders can be written, nothing else; no homes, no TUN, no keys of others.
    let inside = |line: &str| -> Result<bool> {
        let pid = vm.pid("tombolo-agent")?;
        Ok(vm.sh(&format!("nsenter -t {pid} -m -- setpriv --reuid tombolo-agent --regid tombolo-agent --clear-groups sh -c '{line}'"))?.ok())
    };
    for line in [
        "touch /var/lib/tombolo/agent/x && rm /var/lib/tombolo/agent/x",
        "touch /run/tombolo/agent/x && rm /run/tombolo/agent/x",
    ] {
        ensure!(inside(line)?, "{line}");
    }
    for line in [
        "touch /etc/tombolo/x",
        "touch /var/lib/x",
        "touch /usr/bin/x",
        "ls /var/lib/tombolo/discovery",
        "ls /root",
        "test -e /dev/net/tun",
        "test -e /dev/mem",
    ] {
        ensure!(!inside(line)?, "the agent may: {line}");
    }
    // netd has uid 0, but sees the settings of links, one device, and nothing else that it could write or open.
    let netd = |line: &str| -> Result<bool> {
        let pid = vm.pid("tombolo-netd")?;
        Ok(vm.sh(&format!("nsenter -t {pid} -m -- sh -c '{line}'"))?.ok())
    };
    ensure!(netd(
        "test -w /proc/sys/net/ipv4/conf/all/ignore_routes_with_linkdown"
    )?);
    for line in [
        "test -e /dev/mem",
        "test -e /dev/kmsg",
        "test -w /proc/sys/kernel/core_pattern",
        "test -w /proc/sys/net/core/somaxconn",
        "touch /etc/tombolo/x",
        "ls /root/.profile",
    ] {
        ensure!(!netd(line)?, "netd may: {line}");
    }
    // Who has these folders is the mesh member, or the mesh.
    for user in ["agent", "discovery"] {
        let mode = vm.ok(&format!("stat -c '%a %U' /var/lib/tombolo/{user}"))?;
        ensure!(mode == format!("700 tombolo-{user}"), "{mode}");
    }
    Ok(())
}

#[test]
fn networkd_keeps_its_hands_off_mesh0() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    vm.apt("install tombolo-agent")?;
    // What many images have; networkd would flush addresses and routes that it does not know.
    let adopt_all =
        "[Match]\nName=*\n[Network]\nLinkLocalAddressing=ipv6\nAddress=10.99.0.5/24\nKeepConfiguration=no\n";
    vm.write("/etc/systemd/network/10-all.network", "0644", adopt_all)?;
    vm.ok(
        "ip tuntap add mesh0 mode tun && ip link set mesh0 up && ip addr add 240.240.255.253/32 dev mesh0 && \
           ip link add other0 type veth peer name other1",
    )?;
    vm.ok("systemctl start systemd-networkd && networkctl --no-pager reload")?;
    // The positive control: it does adopt another link.
    vm.until("ip -4 addr show other0 | grep 10.99.0.5")?;
    vm.until("networkctl --no-pager --no-legend list mesh0 | grep unmanaged")?;
    ensure!(!vm.ok("ip -4 addr show mesh0")?.contains("10.99.0.5"));
    ensure!(vm.ok("ip -4 addr show mesh0")?.contains("240.240.255.253"));
    Ok(())
}

#[test]
fn purge_leaves_nothing() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    let (host, tree) = (vm.ok(HOST)?, vm.ok(TREE)?);
    let users = vm.ok("getent passwd; getent group")?;
    vm.apt("install tombolo-agent tombolo-discovery")?;
    vm.ok("tombolo-discovery init --trust-domain mesh.example --advertise 127.0.0.1:15012")?;
    // Beside an agent on one host each needs a port for readiness of its own.
    vm.ok("sed -i 's/127.0.0.1:15021/127.0.0.1:15022/' /etc/tombolo/discovery.yaml && systemctl start tombolo-discovery")?;
    vm.ok("echo 'workers: 1' >> /etc/tombolo/agent.yaml")?;

    vm.apt("remove tombolo-agent tombolo-discovery tombolo")?;
    ensure!(!vm.sh("pgrep -l tombolo")?.ok(), "{}", vm.ok("pgrep -l tombolo")?);
    for unit in AGENT_UNITS {
        ensure!(
            vm.property(unit, "LoadState")? != "loaded",
            "{unit} is still there"
        );
    }
    // A removal is no purge: keys, store and settings are kept for the next installation.
    vm.ok("test -s /var/lib/tombolo/discovery/store.redb && grep -q 'workers: 1' /etc/tombolo/agent.yaml")?;

    vm.apt("purge tombolo-agent tombolo-discovery tombolo")?;
    let difference = |before: &str, after: &str| {
        let gone = before
            .lines()
            .filter(|line| !after.lines().any(|other| other == *line))
            .map(|line| format!("- {line}"));
        let new = after
            .lines()
            .filter(|line| !before.lines().any(|other| other == *line))
            .map(|line| format!("+ {line}"));
        gone.chain(new).collect::<Vec<_>>().join("\n")
    };
    let rest = difference(&tree, &vm.ok(TREE)?);
    ensure!(rest.is_empty(), "left behind:\n{rest}");
    let rest = difference(&users, &vm.ok("getent passwd; getent group")?);
    ensure!(rest.is_empty(), "users left behind:\n{rest}");
    ensure!(vm.ok(HOST)? == host);
    ensure!(!vm.sh("test -e /run/tombolo")?.ok() && !vm.sh("dpkg -l | grep tombolo")?.ok());
    ensure!(vm.ok("systemctl --failed --no-legend")?.is_empty());
    Ok(())
}
