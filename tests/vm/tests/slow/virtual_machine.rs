use crate::mesh::{APPLICATION, Mesh, call};
use anyhow::{Context as _, Result, ensure};
use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};
use tombolo_packages::{Yard, revision};
use tombolo_vm::{Record, Seed, Vm, Web, built, has};

/// Resident memory of one process of ours on a host of 512 MB.
const RSS_MAX_KIB: u64 = 40 * 1024;
/// Processor time of agent and netd together while nothing happens. The goal on a real processor is 0.1 %, which this does
/// not show: an emulated one needs a multiple of it. 1.1 % was seen beside two builds.
const IDLE_CPU_PERCENT_MAX: f64 = 3.0;
/// From the start of the agent's process until it serves; the goal on a real processor is 1 s. Beside two
/// builds 12 s were seen.
const READY_MS_MAX: u64 = 30_000;

/// Where an administrator changes the agent's unit.
const DROP_IN: &str = "/etc/systemd/system/tombolo-agent.service.d";
/// Memory that the kernel counts for the units, in words.
const GROUPS: &str = "for unit in agent netd; do \
    echo \"$unit $(($(systemctl show --value -p MemoryCurrent tombolo-$unit) / 1024)) KiB\"; done";

/// Why there can be no VM here.
fn obstacle() -> Option<String> {
    let tools = [
        "qemu-system-x86_64",
        "qemu-img",
        "genisoimage",
        "ssh",
        "grub-mkimage",
        "mke2fs",
        "openssl",
    ];
    let missing = tools.into_iter().find(|tool| !has(tool))?;
    Some(format!(
        "{missing} is missing (packaging/box/setup.sh installs it)"
    ))
}

/// Nanoseconds of processor that a unit has used.
fn cpu_nanos(vm: &Vm, unit: &str) -> Result<u64> {
    let text = vm.ok(&format!("systemctl show --value -p CPUUsageNSec {unit}"))?;
    text.parse()
        .with_context(|| format!("processor time of {unit}: {text:?}"))
}

/// Resident memory of a unit's main process, in KiB.
fn rss_kib(vm: &Vm, unit: &str) -> Result<u64> {
    let text = vm.ok(&format!(
        "sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/$(systemctl show --value -p MainPID {unit})/status"
    ))?;
    text.parse()
        .with_context(|| format!("memory of {unit}: {text:?}"))
}

/// Both directions, by name.
fn calls_work(vm: &Vm, mesh: &Mesh) -> Result<()> {
    let answer = vm.until(&call("catalog"))?;
    ensure!(answer == "peer", "{answer}");
    let answer = tombolo_testkit::wait_for("the way back", Duration::from_secs(60), || {
        mesh.peer.ok(&call("webapp"))
    })
    .with_context(|| format!("{}\n{}", mesh.peer.journal(), vm.journal()))?;
    ensure!(answer == "vm", "{answer}");
    Ok(())
}

/// A limit of memory that an administrator sets holds, and what dies of one comes back.
fn a_limit_of_memory_holds(vm: &Vm, mesh: &Mesh, record: &mut Record) -> Result<()> {
    let limit = |size: &str, restart: &str| -> Result<()> {
        vm.ok(&format!(
            "mkdir -p {DROP_IN} && printf '[Service]\\nMemoryMax={size}\\nMemorySwapMax=0\\n' > {DROP_IN}/memory.conf && \
             systemctl daemon-reload && systemctl {restart} tombolo-agent"
        ))
        .map(drop)
    };
    limit("16M", "restart")?;
    ensure!(vm.ok("cat /sys/fs/cgroup/system.slice/tombolo-agent.service/memory.max")? == "16777216");
    calls_work(vm, mesh)?;
    let peak: u64 = vm
        .ok("cat /sys/fs/cgroup/system.slice/tombolo-agent.service/memory.peak")?
        .parse()?;
    limit("1M", "restart --no-block")?;
    vm.until("journalctl -q -b -u tombolo-agent | grep -E 'oom-kill|OOM killer'")?;
    ensure!(
        vm.ok("systemctl is-active tombolo-netd")? == "active",
        "netd died with it"
    );
    vm.ok(&format!("rm -r {DROP_IN} && systemctl daemon-reload"))?;
    vm.until("systemctl is-active tombolo-agent")?;
    calls_work(vm, mesh)?;
    let seen = format!(
        "16 MiB: starts and serves, at most {:.1} MiB; 1 MiB: killed by the kernel, host and netd unharmed, back without the limit",
        peak as f64 / 1048576.0
    );
    record.add("MemoryMax= of the agent's unit", seen);
    Ok(())
}

/// An orderly boot and a loss of power, both while discovery is dead.
fn boots(vm: &Vm, mesh: &Mesh, record: &mut Record) -> Result<()> {
    for (what, orderly) in [("reboot", true), ("loss of power", false)] {
        // The first call after a boot must not need discovery.
        mesh.discovery.ok("systemctl stop tombolo-discovery")?;
        vm.reboot(orderly)?;
        vm.until("systemctl is-active tombolo-agent")?;
        let answer = vm.until(&call("catalog"))?;
        ensure!(answer == "peer", "{answer}");
        let ready = vm.ready_ms("tombolo-agent")?;
        ensure!(ready <= READY_MS_MAX, "ready after {ready} ms");
        mesh.discovery.ok("systemctl start tombolo-discovery")?;
        calls_work(vm, mesh)?;
        let when = vm.ok("systemctl show --value -p ActiveEnterTimestampMonotonic tombolo-agent")?;
        let total = vm.ok("systemd-analyze time | head -1")?;
        record.add(
            &format!("{what}, discovery dead"),
            format!(
                "agent ready {ready} ms after its start, {:.1} s after the kernel's; calls work; then with discovery in both directions. {total}",
                when.parse::<u64>()? as f64 / 1e6
            ),
        );
    }
    record.add(
        "slowest units of a boot",
        vm.ok("systemd-analyze blame --no-pager | head -5; systemd-analyze blame --no-pager | grep tombolo")?,
    );
    Ok(())
}

/// One VM, and everything that is asked of it in turn: each boot costs half a minute.
#[test]
fn a_small_vm_joins_by_cloud_init_and_stays_over_boots() -> Result<()> {
    if let Some(reason) = obstacle() {
        tombolo_testkit::skip("vm", &reason);
        return Ok(());
    }
    if !tombolo_packages::required() {
        return Ok(());
    }
    let mut record = Record::new("Virtual machine");
    let image = built("image")?;
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let web = Web::start(&yard, &revision(1)?.repo())?;
    let token = mesh
        .discovery
        .ok("tombolo token create -n shop --workload-group webapp --ttl 30m")?;
    let address = Ipv4Addr::new(10, 77, 0, 50);
    let seed = Seed::new("vm", address, &token, Web::AUTHORITY, &web.ca())?;

    // --- the first boot does everything that the example says
    let begun = Instant::now();
    let vm = Vm::start(&yard, &seed, &image, address)?;
    vm.booted().with_context(|| web.log())?;
    record.add("system", vm.ok(". /etc/os-release; echo \"$PRETTY_NAME, $(uname -r), $(systemctl --version | head -1), $(cloud-init --version)\"")?);
    record.add(
        "machine",
        vm.ok("echo \"$(nproc) processor (emulated), $(free -m | awk '/^Mem:/{print $2}') MB\"")?,
    );
    record.add(
        "power on to the end of cloud-init, member of the mesh",
        format!("{:.0} s", begun.elapsed().as_secs_f64()),
    );
    ensure!(
        vm.ok("uname -r")?.starts_with("6.1."),
        "another kernel than Debian's"
    );
    ensure!(
        vm.ok("tombolo status")?.contains("webapp"),
        "{}",
        vm.ok("tombolo status")?
    );
    ensure!(
        !vm.sh("test -e /run/tombolo-token")?.ok(),
        "the token is still there"
    );
    ensure!(vm.ok("systemctl is-enabled tombolo-agent tombolo-netd")? == "enabled\nenabled");
    let complaints = vm.ok(
        "cloud-init schema --system 2>&1 | grep -v '^Valid'; grep WARNING /var/log/cloud-init.log; true",
    )?;
    ensure!(complaints.is_empty(), "{complaints}");
    vm.ok(APPLICATION)?;
    let begun = Instant::now();
    vm.until(&call("catalog"))?;
    record.add(
        "first call by name from the VM",
        format!("{:.1} s, ssh included", begun.elapsed().as_secs_f64()),
    );
    calls_work(&vm, &mesh)?;
    let took = vm.ok(&format!("{} -o /dev/null -w '%{{time_total}}'", call("catalog")))?;
    record.add("a later call by name", format!("{took} s"));

    // --- small and quiet
    let before = (
        cpu_nanos(&vm, "tombolo-agent")? + cpu_nanos(&vm, "tombolo-netd")?,
        Instant::now(),
    );
    std::thread::sleep(Duration::from_secs(60));
    let used = cpu_nanos(&vm, "tombolo-agent")? + cpu_nanos(&vm, "tombolo-netd")? - before.0;
    let percent = used as f64 / before.1.elapsed().as_nanos() as f64 * 100.0;
    record.add(
        "idle processor time of agent and netd",
        format!("{percent:.2} % of the emulated processor"),
    );
    ensure!(percent <= IDLE_CPU_PERCENT_MAX, "{percent:.2} %");
    let (agent, netd) = (rss_kib(&vm, "tombolo-agent")?, rss_kib(&vm, "tombolo-netd")?);
    record.add(
        "resident memory",
        format!(
            "agent {:.1} MiB, netd {:.1} MiB",
            agent as f64 / 1024.0,
            netd as f64 / 1024.0
        ),
    );
    ensure!(
        agent <= RSS_MAX_KIB && netd <= RSS_MAX_KIB,
        "{agent} KiB, {netd} KiB"
    );
    record.add("memory of the control groups", vm.ok(GROUPS)?);

    let begun = Instant::now();
    vm.save("joined")?;
    a_limit_of_memory_holds(&vm, &mesh, &mut record)?;

    // --- put back to a moment before all that, as a hypervisor does: connections are stale, the clock is behind
    let behind = begun.elapsed().as_secs();
    let begun = Instant::now();
    vm.load("joined")?;
    ensure!(
        !vm.sh(&format!("test -e {DROP_IN}/memory.conf"))?.ok(),
        "it was not put back"
    );
    calls_work(&vm, &mesh)?;
    record.add(
        &format!("put back to a snapshot {behind} s old"),
        format!(
            "calls work in both directions after {:.0} s, with no command",
            begun.elapsed().as_secs_f64()
        ),
    );

    boots(&vm, &mesh, &mut record)?;
    let failed = vm.ok("systemctl --failed --no-legend --plain")?;
    ensure!(failed.is_empty(), "{failed}");
    let loud = vm.ok("journalctl -q --no-pager -b -p err -u tombolo-agent -u tombolo-netd")?;
    ensure!(loud.is_empty(), "{loud}");
    record.write()
}
