//! The maintainer scripts by themselves: twice, in a chroot, with another systemd, with an administrator's no.

use crate::needs_machines;
use anyhow::{Result, ensure};
use tombolo_packages::{Yard, revision};

#[test]
fn twice_is_once() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    vm.apt("install tombolo-agent tombolo-gateway tombolo-discovery")?;
    let state = "systemctl show -p ActiveState,UnitFileState tombolo-agent tombolo-netd; getent passwd; getent group; \
                 stat -c '%n %a %U:%G' /var/lib/tombolo/* /run/tombolo; ls /run/tombolo*";
    let (before, pid) = (vm.ok(state)?, vm.pid("tombolo-agent")?);
    for package in ["tombolo-agent", "tombolo-gateway", "tombolo-discovery"] {
        for _ in 0..2 {
            vm.ok(&format!("/var/lib/dpkg/info/{package}.postinst configure ''"))?;
        }
    }
    ensure!(vm.pid("tombolo-agent")? == pid, "it was restarted for nothing");
    // As dpkg calls them when something else failed.
    for call in [
        "postinst abort-upgrade 0",
        "postinst abort-remove",
        "prerm upgrade 0",
        "postrm upgrade 0",
        "prerm failed-upgrade 0",
    ] {
        for package in ["tombolo-agent", "tombolo-gateway", "tombolo-discovery"] {
            vm.ok(&format!("/var/lib/dpkg/info/{package}.{call}"))?;
        }
    }
    ensure!(vm.ok(state)? == before, "{before}\n---\n{}", vm.ok(state)?);
    vm.apt("purge tombolo-agent tombolo-gateway tombolo-discovery tombolo")?;
    Ok(())
}

#[test]
fn an_image_build_enables_and_starts_nothing() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    // A root without a systemd that runs, as image builders have it: the machine's own files, another mount namespace.
    let inside = |line: &str| vm.ok(&format!("unshare -m sh -ec 'mount -t tmpfs none /run; {line}'"));
    inside(
        "DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install tombolo-agent >/dev/null",
    )?;
    ensure!(!vm.sh("pgrep -l tombolo")?.ok(), "something was started");
    vm.ok("systemctl daemon-reload && systemctl is-enabled tombolo-agent tombolo-netd tombolo-join")?;
    // The image boots.
    vm.reboot()?;
    vm.until("systemctl show --value -p StatusText tombolo-agent | grep 'tombolo up'")?;
    inside("DEBIAN_FRONTEND=noninteractive apt-get -q -y purge tombolo-agent >/dev/null").map(drop)
}

#[test]
fn policy_rc_d_is_obeyed() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    vm.write("/usr/sbin/policy-rc.d", "0755", "#!/bin/sh\nexit 101\n")?;
    vm.apt("install tombolo-agent")?;
    ensure!(vm.property("tombolo-agent", "ActiveState")? == "inactive");
    ensure!(vm.ok("systemctl is-enabled tombolo-agent")? == "enabled");
    Ok(())
}

#[test]
fn newer_systemds_restart_ever_more_slowly() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    vm.apt("install tombolo-agent")?;
    let drop_in = "/usr/lib/systemd/system/tombolo-agent.service.d/backoff.conf";
    let version = vm.ok("systemctl --version | sed -n '1s/^systemd \\([0-9]*\\).*/\\1/p'")?;
    if version.parse::<u32>()? >= 254 {
        ensure!(vm.property("tombolo-agent", "RestartSteps")? == "6");
    } else {
        let there = vm.sh(&format!("test -e {drop_in}"))?.ok();
        ensure!(!there, "systemd {version} does not know these settings");
        // A systemctl of 256 in front of the real one.
        let newer = "#!/bin/sh\n[ \"$1\" = --version ] && { echo 'systemd 256 (256.4)'; exit 0; }\n\
                     exec /usr/bin/systemctl \"$@\"\n";
        vm.write("/opt/newer/systemctl", "0755", newer)?;
        vm.ok("PATH=/opt/newer:$PATH /var/lib/dpkg/info/tombolo-agent.postinst configure ''")?;
    }
    ensure!(vm.ok(&format!("cat {drop_in}"))?.contains("RestartSteps="));
    vm.apt("remove tombolo-agent")?;
    ensure!(
        !vm.sh("ls -d /usr/lib/systemd/system/tombolo-agent.service.d")?
            .ok()
    );
    Ok(())
}
