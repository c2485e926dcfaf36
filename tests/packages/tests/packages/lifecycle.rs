//! A mesh of packages: enrolment, reboots, upgrades and goodbyes on hosts as users have them.

use crate::{HOST, needs_machines};
use anyhow::{Context as _, Result, ensure};
use std::time::{Duration, Instant};
use tombolo_packages::{Machine, Yard, revision};

/// The mesh's discovery, and what is called: a web server on every member.
pub(crate) struct Mesh {
    pub(crate) discovery: Machine,
}

/// An application whose answer says which host it is on: systemd hands each connection to a shell.
const SOCKET: &str =
    "[Socket]\nListenStream=8080\nAccept=yes\nMaxConnections=1000\n[Install]\nWantedBy=sockets.target\n";
const APPLICATION: &str = "[Service]\nStandardInput=socket\nStandardError=journal\n\
    ExecStart=/bin/sh -c 'while read -r line && [ \"$${#line}\" -gt 1 ]; do :; done; \
    printf \"HTTP/1.0 200 OK\\\\r\\\\n\\\\r\\\\n%%s\" \"$$(cat /etc/hostname)\"'\n";

impl Mesh {
    pub(crate) fn found(yard: &Yard) -> Result<Self> {
        let discovery = yard.machine("discovery")?;
        discovery.add_repository(revision(1)?)?;
        discovery.apt("install tombolo-discovery")?;
        ensure!(
            discovery.property("tombolo-discovery", "ActiveState")? == "inactive",
            "it waits for init"
        );
        let at = discovery.address();
        let said = discovery.ok(&format!(
            "tombolo-discovery init --trust-domain mesh.example --advertise {at}:15012"
        ))?;
        ensure!(
            said.contains("systemctl enable --now tombolo-discovery"),
            "{said}"
        );
        discovery.ok("systemctl enable --now tombolo-discovery")?;
        for group in ["webapp", "catalog"] {
            discovery.ok(&format!(
                "tombolo workload-group create {group} -n shop --service-account {group} --port http=80:8080"
            ))?;
        }
        Ok(Self { discovery })
    }

    pub(crate) fn token(&self, group: &str) -> Result<String> {
        self.discovery
            .ok(&format!("tombolo token create -n shop --workload-group {group}"))
    }

    /// The virtual address of a service.
    pub(crate) fn vip(&self, service: &str) -> Result<String> {
        let text = self
            .discovery
            .ok(&format!("tombolo get se {service} -n shop -o json"))?;
        let object: serde_json::Value = serde_json::from_str(&text)?;
        let addresses = object["status"]["addresses"]
            .as_array()
            .with_context(|| text.clone())?;
        let values = addresses.iter().filter_map(|address| address["value"].as_str());
        values
            .filter(|value| !value.contains(':'))
            .map(str::to_owned)
            .next()
            .context(text)
    }

    /// A member that the application runs on.
    pub(crate) fn member(&self, yard: &Yard, name: &str, group: &str) -> Result<Machine> {
        let vm = self.stranger(yard, name, &[])?;
        let said = vm
            .sh_with("tombolo up -", &self.token(group)?)?
            .checked()
            .with_context(|| vm.journal())?;
        ensure!(
            said.stdout.contains("This host is in the mesh"),
            "{}",
            said.stdout
        );
        Ok(vm)
    }

    /// A host with the package and the application.
    pub(crate) fn stranger(&self, yard: &Yard, name: &str, options: &[&str]) -> Result<Machine> {
        let vm = yard.machine_with(name, options)?;
        vm.write("/etc/systemd/system/application.socket", "0644", SOCKET)?;
        vm.write("/etc/systemd/system/application@.service", "0644", APPLICATION)?;
        vm.ok("systemctl enable --now application.socket")?;
        ensure!(
            vm.ok("curl -sS http://127.0.0.1:8080/")? == name,
            "the application"
        );
        vm.add_repository(revision(1)?)?;
        vm.apt("install tombolo-agent")?;
        Ok(vm)
    }
}

fn call(vip: &str) -> String {
    format!("curl -sS -m 5 http://{vip}/")
}

#[test]
fn members_call_each_other_over_reboots_and_outages() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let callee = mesh.member(&yard, "callee", "catalog")?;
    let caller = mesh.member(&yard, "caller", "webapp")?;
    let vip = mesh.vip("catalog")?;
    ensure!(caller.until(&call(&vip))? == "callee");
    // Names are answered at the DNS VIP; nothing on the host was pointed at it.
    let name = "catalog.shop.svc.mesh.internal";
    ensure!(caller.ok(&format!("dig +short +time=2 @240.240.255.254 {name}"))? == vip);
    ensure!(
        caller
            .ok("systemctl show --value -p StatusText tombolo-agent")?
            .starts_with("Serving as webapp-"),
        "{}",
        caller.journal()
    );

    // The application sees mesh0's address and no loopback; the agent that carried it has no capability.
    let pid = callee.pid("tombolo-agent")?;
    ensure!(
        callee
            .ok(&format!("grep CapEff /proc/{pid}/status"))?
            .ends_with("0000000000000000")
    );

    // Killed: systemd brings it back, and calls fail at once instead of leaking meanwhile.
    caller.ok("systemctl kill -s KILL tombolo-agent")?;
    let begun = Instant::now();
    let failed = caller.sh(&call(&vip))?;
    ensure!(
        failed.ok() || begun.elapsed() < Duration::from_secs(2),
        "a call hung for {:?}",
        begun.elapsed()
    );
    ensure!(caller.until(&call(&vip))? == "callee");
    ensure!(caller.property("tombolo-agent", "NRestarts")? == "1");

    // Frozen: the watchdog notices. Its interval is the package's; a drop-in is how an administrator changes it.
    caller.write(
        "/etc/systemd/system/tombolo-agent.service.d/watchdog.conf",
        "0644",
        "[Service]\nWatchdogSec=2s\n",
    )?;
    caller.ok("systemctl daemon-reload && systemctl restart tombolo-agent")?;
    let frozen = caller.pid("tombolo-agent")?;
    caller.ok(&format!("kill -STOP {frozen}"))?;
    caller.until(&format!("test \"$(systemctl show --value -p MainPID tombolo-agent)\" != {frozen} && systemctl is-active tombolo-agent"))?;
    ensure!(caller.until(&call(&vip))? == "callee");

    // Both hosts boot while discovery is dead: everything is served from the snapshots.
    mesh.discovery.power_off()?;
    caller.reboot()?;
    callee.reboot()?;
    caller.until("systemctl is-active tombolo-agent")?;
    let ready = "$(($(systemctl show --value -p ActiveEnterTimestampMonotonic tombolo-agent)-$(systemctl show --value -p InactiveExitTimestampMonotonic tombolo-agent)))";
    let micros: u64 = caller.ok(&format!("echo {ready}"))?.parse()?;
    ensure!(
        micros <= 1_000_000,
        "the agent was ready {micros} us after its start"
    );
    ensure!(caller.until(&call(&vip))? == "callee");
    Ok(())
}

#[test]
fn an_upgrade_keeps_the_member_and_the_administrators_word() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let callee = mesh.member(&yard, "callee", "catalog")?;
    let caller = mesh.member(&yard, "caller", "webapp")?;
    let vip = mesh.vip("catalog")?;
    caller.until(&call(&vip))?;
    caller.ok("sed -i 's/^#probes: true/probes: false/' /etc/tombolo/agent.yaml")?;
    let key = caller.ok("sha256sum /var/lib/tombolo/agent/device.key")?;
    let pid = caller.pid("tombolo-agent")?;

    caller.add_repository(revision(2)?)?;
    let said = caller.apt("install tombolo-agent")?;
    ensure!(
        caller
            .ok("dpkg-query -W -f '${Version}' tombolo-agent")?
            .ends_with("-2"),
        "{said}"
    );
    caller.ok("grep -q '^probes: false' /etc/tombolo/agent.yaml")?;
    ensure!(
        caller.ok("sha256sum /var/lib/tombolo/agent/device.key")? == key,
        "it became another device"
    );
    ensure!(caller.until(&call(&vip))? == "callee");
    let (now, exe) = (caller.pid("tombolo-agent")?, "/usr/bin/tombolo-agent");
    ensure!(
        now != pid && caller.ok(&format!("readlink /proc/{now}/exe"))? == exe,
        "the old program still runs"
    );
    ensure!(caller.ok("systemctl is-active tombolo-netd")? == "active");

    // Stopped by the administrator, before and after: a package does not start what a person stopped.
    callee.ok("tombolo down")?;
    callee.add_repository(revision(2)?)?;
    callee.apt("install tombolo-agent")?;
    ensure!(
        callee.property("tombolo-agent", "ActiveState")? == "inactive",
        "the upgrade started a stopped agent"
    );
    ensure!(!callee.sh("systemctl is-enabled tombolo-agent")?.ok());
    callee.ok("tombolo up")?;
    ensure!(caller.until(&call(&vip))? == "callee");

    // Away and back again: the same member.
    caller.apt("remove tombolo-agent")?;
    ensure!(
        !caller.sh("ip link show mesh0")?.ok(),
        "mesh0 outlives the package"
    );
    caller.apt("install tombolo-agent")?;
    ensure!(caller.ok("sha256sum /var/lib/tombolo/agent/device.key")? == key);
    ensure!(caller.until(&call(&vip))? == "callee");

    // Back to the version before: not by accident, and the same member with the same settings.
    caller.add_repository(revision(1)?)?;
    let older = "tombolo=$(apt-cache policy tombolo | awk '/Candidate/ {print $2}' | sed 's/-[0-9]*$/-1/')";
    let older = format!("{older} {}", older.replace("tombolo=", "tombolo-agent="));
    let refused = caller.apt(&format!("install {older}"));
    ensure!(refused.is_err(), "apt went back unasked");
    caller.apt(&format!("install --allow-downgrades {older}"))?;
    let version = caller.ok("dpkg-query -W -f '${Version}' tombolo-agent")?;
    ensure!(version.ends_with("-1"), "{version}");
    ensure!(caller.ok("sha256sum /var/lib/tombolo/agent/device.key")? == key);
    ensure!(caller.until(&call(&vip))? == "callee");
    let exe = caller.ok(&format!("readlink /proc/{}/exe", caller.pid("tombolo-agent")?))?;
    ensure!(exe == "/usr/bin/tombolo-agent", "{exe}");
    caller
        .ok("grep -q '^probes: false' /etc/tombolo/agent.yaml")
        .map(drop)
}

#[test]
fn an_image_joins_by_its_credential() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let token = mesh.token("webapp")?;
    // As a golden image: everything is installed, nothing is enrolled, the token comes with the machine.
    let vm = mesh.stranger(&yard, "image", &[])?;
    vm.until("systemctl show --value -p StatusText tombolo-agent | grep 'tombolo up'")?;
    vm.write("/etc/credstore/tombolo-token", "0600", &token)?;
    vm.reboot()?;
    vm.until("test -s /var/lib/tombolo/agent/registration.json")?;
    vm.until("tombolo status | grep -i serving")?;
    ensure!(mesh.discovery.ok("tombolo vm list -n shop")?.contains("webapp"));
    // The next boot needs no token and does not try to use it again.
    vm.reboot()?;
    vm.until("tombolo status | grep -i serving")?;
    ensure!(vm.property("tombolo-join", "ConditionResult")? == "no");

    // One that is refused says why, once, and does not try for ever.
    let late = mesh.stranger(&yard, "late", &[])?;
    late.write("/etc/credstore/tombolo-token", "0600", &token)?;
    late.reboot()?;
    late.until("systemctl is-failed tombolo-join")?;
    let log = late.ok("journalctl -q --no-pager -o cat -u tombolo-join")?;
    ensure!(
        log.contains("TMB0103") && log.contains("tombolo token create"),
        "{log}"
    );
    ensure!(late.property("tombolo-join", "NRestarts")? == "0", "{log}");
    ensure!(!log.contains(token.trim()), "the token is in the log");
    Ok(())
}

#[test]
fn leave_and_purge_leave_no_trace() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let vm = mesh.stranger(&yard, "vm", &[])?;
    let before = vm.ok(HOST)?;
    vm.sh_with("tombolo up -", &mesh.token("catalog")?)?.checked()?;
    ensure!(vm.ok("ip -o link show mesh0")?.contains("mesh0"));
    let said = vm.ok("tombolo leave")?;
    ensure!(said.contains("has left the mesh"), "{said}");
    ensure!(
        vm.ok(HOST)? == before,
        "leave left something:\n{before}\n---\n{}",
        vm.ok(HOST)?
    );
    let members = mesh.discovery.ok("tombolo vm list -n shop")?;
    ensure!(!members.contains("catalog-"), "{members}");
    vm.apt("purge tombolo-agent tombolo")?;
    ensure!(!vm.sh("ls -d /var/lib/tombolo /run/tombolo /etc/tombolo")?.ok());
    ensure!(vm.ok(HOST)? == before);
    Ok(())
}
