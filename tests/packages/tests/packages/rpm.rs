//! The rpm packages, with their scriptlets run under systemd. There is no Fedora or RHEL root here: what is proven is
//! the packages' own part, with rpm 4.18.

use crate::{AGENT_UNITS, needs_machines};
use anyhow::{Result, ensure};
use tombolo_packages::{Yard, revision};

#[test]
fn install_upgrade_and_erase() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    // As on a host that was never a Debian: no helpers of dpkg, presets decide.
    vm.ok("rm /usr/bin/deb-systemd-helper /usr/bin/deb-systemd-invoke; rpm --initdb")?;
    // The signature first. What the packages require is not in this database and is looked at by itself.
    let check = "rpmkeys --checksig /srv/tombolo/yum/*.rpm";
    ensure!(!vm.sh(check)?.ok(), "an unknown key was believed");
    vm.ok("rpmkeys --import /srv/tombolo/tombolo.asc")?;
    vm.ok(check)?;
    let requires = vm.ok("rpm -qp --requires /srv/tombolo/yum/tombolo-agent-*.rpm")?;
    ensure!(
        requires.contains("nftables") && requires.contains("systemd") && requires.contains("tombolo ="),
        "{requires}"
    );
    let floor = requires
        .lines()
        .filter_map(|line| line.split("GLIBC_").nth(1)?.split(')').next()?.strip_prefix("2."));
    for minor in floor {
        ensure!(
            minor
                .split('.')
                .next()
                .is_some_and(|minor| minor.parse::<u32>().is_ok_and(|minor| minor <= 34)),
            "{requires}"
        );
    }

    vm.ok("rpm -i --nodeps /srv/tombolo/yum/*.rpm")?;
    vm.until("systemctl show --value -p StatusText tombolo-agent | grep 'tombolo up'")?;
    for user in ["agent", "discovery"] {
        ensure!(vm.ok(&format!("stat -c '%a %U' /var/lib/tombolo/{user}"))? == format!("700 tombolo-{user}"));
    }
    for unit in AGENT_UNITS {
        ensure!(vm.ok(&format!("systemctl is-enabled {unit}"))? == "enabled");
    }
    let pid = vm.pid("tombolo-agent")?;
    vm.ok("echo 'workers: 1' >> /etc/tombolo/agent.yaml; echo keep > /var/lib/tombolo/agent/keep")?;

    vm.add_repository(revision(2)?)?;
    vm.ok("rpmkeys --import /srv/tombolo/tombolo.asc && rpm -U --nodeps /srv/tombolo/yum/*.rpm")?;
    ensure!(vm.pid("tombolo-agent")? != pid, "the old program still runs");
    vm.ok("grep -q 'workers: 1' /etc/tombolo/agent.yaml && test -e /var/lib/tombolo/agent/keep")?;

    vm.ok("rpm -e --nodeps tombolo-agent tombolo-discovery tombolo")?;
    // Also not one from before the reload of the upgrade.
    vm.until("! ps -o pid,etimes,args -C tombolo-agent,tombolo-netd,tombolo-discovery")?;
    for unit in AGENT_UNITS {
        ensure!(
            vm.property(unit, "LoadState")? != "loaded",
            "{unit} is still there"
        );
    }
    // rpm has no purge: the key stays until somebody deletes it, an edited file is set aside.
    vm.ok("test -e /var/lib/tombolo/agent/keep && grep -q 'workers: 1' /etc/tombolo/agent.yaml.rpmsave")
        .map(drop)
}
