//! The agent is replaced while it works: by `systemctl reload`, by an upgrade, after a crash; and what is left of the
//! processes before.

use crate::{lifecycle::Mesh, needs_machines};
use anyhow::{Context as _, Result, bail, ensure};
use std::time::Instant;
use tombolo_packages::{Machine, Yard, revision};
use tombolo_testkit::binaries;

/// Connections that are open all the time.
const STREAMS: u32 = 1000;
/// New connections per second meanwhile.
const RATE: u32 = 500;
/// Shorter than the package's, so that a test sees several.
const WATCHDOG: &str = "[Service]\nWatchdogSec=1s\n";
/// The test's own program on a machine.
const PEER: &str = "/usr/local/bin/tombolo-peer";
/// There is no process before any more.
const ALONE: &str = "test \"$(pgrep -c -x tombolo-agent)\" = 1";
const UNIT: &str = "tombolo-agent.service";

/// Two members: an echo and a web server on one, the callers on the other.
struct Pair {
    mesh: Mesh,
    callee: Machine,
    caller: Machine,
    vip: String,
}

impl Pair {
    fn new(yard: &Yard) -> Result<Self> {
        let mesh = Mesh::found(yard)?;
        mesh.discovery.ok(
            "tombolo workload-group create steady -n shop --service-account steady --port http=80:9080,echo=7003",
        )?;
        let callee = mesh.member(yard, "callee", "steady")?;
        let caller = mesh.member(yard, "caller", "webapp")?;
        for vm in [&callee, &caller] {
            std::fs::copy(binaries().join("tombolo-peer"), vm.path(PEER))?;
            vm.write(
                &format!("/etc/systemd/system/{UNIT}.d/watchdog.conf"),
                "0644",
                WATCHDOG,
            )?;
            vm.ok(&format!("systemctl daemon-reload && systemctl restart {UNIT}"))?;
        }
        for (mode, port) in [("echo", 7003), ("http", 9080)] {
            callee.ok(&format!(
                "systemd-run -q --unit={mode} -p LimitNOFILE=16384 {PEER} serve {mode} {port}"
            ))?;
        }
        let vip = mesh.vip("steady")?;
        caller.until(&format!("curl -sS -m 5 http://{vip}/"))?;
        Ok(Self {
            mesh,
            callee,
            caller,
            vip,
        })
    }

    /// Starts `tombolo-peer call` on the caller; it ends with [`Self::finish`].
    fn call(&self, mode: &str, port: u16, count: u32) -> Result<()> {
        let wait = "while [ ! -e /run/stop ]; do sleep 0.05; done";
        self.caller.ok(&format!(
            "rm -f /run/stop /root/{mode}; systemd-run -q --unit={mode} -p LimitNOFILE=16384 -p StandardOutput=file:/root/{mode} \
             -p RemainAfterExit=yes sh -c '{wait} | exec {PEER} call {mode} {} {port} {count}'",
            self.vip
        ))?;
        Ok(())
    }

    /// Long connections that are all open.
    fn streams(&self, count: u32) -> Result<()> {
        self.call("steady", 7003, count)?;
        self.caller.until("grep -q holding /root/steady").map(drop)
    }

    /// Stops a call; gives what it wrote. An error if it had failed.
    fn finish(&self, mode: &str) -> Result<String> {
        self.caller.ok("touch /run/stop")?;
        self.caller.until(&format!(
            "case $(systemctl show --value -p SubState {mode}) in exited|failed) ;; *) false ;; esac"
        ))?;
        let result = self.caller.property(mode, "Result")?;
        self.caller.ok(&format!(
            "systemctl stop {mode}; systemctl reset-failed {mode} || :"
        ))?;
        ensure!(
            result == "success",
            "{mode}: {result}\n{}\n{}{}",
            self.caller
                .ok(&format!("journalctl -q --no-pager -n 5 -u {mode}"))?,
            self.caller.journal(),
            self.callee.journal()
        );
        self.caller.ok(&format!("cat /root/{mode}"))
    }
}

/// The main process and the invocation: a reload changes the first, a restart both.
fn running(vm: &Machine) -> Result<(u32, String)> {
    let facts = ["ActiveState", "SubState", "NRestarts"];
    let facts = facts.map(|name| vm.property(UNIT, name));
    let facts = facts.into_iter().collect::<Result<Vec<_>>>()?.join(" ");
    ensure!(facts == "active running 0", "{facts}\n{}", vm.journal());
    let pid = vm.pid(UNIT)?;
    let own = vm.ok("cat /run/tombolo/agent/agent.pid")?;
    ensure!(
        own == pid.to_string(),
        "systemd looks at {pid}, the agent is {own}"
    );
    Ok((pid, vm.property(UNIT, "InvocationID")?))
}

/// Runs something that must put another process in the place of the main one, without a restart.
fn replaced(vm: &Machine, line: &str) -> Result<()> {
    let (pid, invocation) = running(vm)?;
    vm.ok(line).with_context(|| vm.journal())?;
    vm.until(&format!(
        "test \"$(systemctl show --value -p MainPID {UNIT})\" != {pid}"
    ))?;
    let (now, after) = running(vm)?;
    ensure!(invocation == after, "{line}: it was restarted\n{}", vm.journal());
    ensure!(
        vm.ok(&format!("readlink /proc/{now}/exe"))? == "/usr/bin/tombolo-agent",
        "the old program still runs"
    );
    Ok(())
}

fn processes(vm: &Machine) -> Result<usize> {
    let list = vm.sh("pgrep -x tombolo-agent")?.stdout;
    Ok(list.lines().count())
}

/// Nothing of ours, and nothing of systemd about us, is an error.
fn no_errors(vm: &Machine) -> Result<()> {
    let errors = vm.ok("journalctl -q --no-pager -p err -u tombolo-agent -u tombolo-netd")?;
    ensure!(errors.is_empty(), "{errors}");
    let warnings = vm.ok("journalctl -q --no-pager -p warning -u tombolo-agent")?;
    let notify = warnings
        .lines()
        .find(|line| line.contains("notification message"));
    ensure!(notify.is_none(), "{warnings}");
    let status = vm.ok(&format!("systemctl status --no-pager {UNIT}"))?;
    ensure!(status.contains("Status: \"Serving as "), "{status}");
    Ok(())
}

#[test]
fn nothing_is_lost_by_reloads_and_upgrades_under_load() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let pair = Pair::new(&yard)?;
    let both = [&pair.caller, &pair.callee];
    for vm in both {
        vm.add_repository(revision(2)?)?;
    }
    pair.streams(STREAMS)?;
    pair.call("load", 80, RATE)?;
    let begun = Instant::now();
    for vm in both {
        replaced(vm, &format!("systemctl reload {UNIT}"))?;
    }
    for vm in both {
        replaced(
            vm,
            "dpkg -i /srv/packages/tombolo_*.deb /srv/packages/tombolo-agent_*.deb 2>&1",
        )?;
        let version = vm.ok("dpkg-query -W -f '${Version}' tombolo-agent")?;
        ensure!(version.ends_with("-2"), "{version}");
    }
    let status = pair.caller.ok("tombolo status")?;
    ensure!(
        status.contains(&format!("and {STREAMS} in the process before")),
        "{status}"
    );
    // Longer than the watchdog waits.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    for vm in both {
        running(vm)?;
        no_errors(vm)?;
    }
    let load = pair.finish("load")?;
    let took = begun.elapsed();
    let steady = pair.finish("steady")?;
    let (mut requests, mut worst) = (0, 0);
    for line in load.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, took, "ok"] = words.as_slice() else {
            bail!("a request failed: {line}\n{}", pair.caller.journal());
        };
        requests += 1;
        worst = worst.max(took.parse::<u64>()?);
    }
    ensure!(requests > 500, "{requests} requests");
    println!(
        "upgrade: {requests} requests in {took:?}, none failed, the longest {worst} ms; {STREAMS} streams: {}",
        steady.replace('\n', ", ")
    );
    for vm in both {
        vm.until(ALONE)?;
        no_errors(vm)?;
    }
    Ok(())
}

#[test]
fn what_goes_wrong_at_a_reload_and_after_it() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let pair = Pair::new(&yard)?;
    let (caller, callee) = (&pair.caller, &pair.callee);
    pair.streams(10)?;

    // A configuration that cannot be read: said, and the one that runs goes on.
    let before = running(caller)?;
    caller
        .ok("cp -p /etc/tombolo/agent.yaml /root/agent.yaml; echo 'worker: 2' >> /etc/tombolo/agent.yaml")?;
    ensure!(!caller.sh(&format!("systemctl reload {UNIT}"))?.ok());
    let said = caller.ok(&format!("journalctl -q --no-pager -o cat -u {UNIT}"))?;
    ensure!(
        said.contains("TMB0511") && said.contains("did you mean workers?"),
        "{said}"
    );
    ensure!(running(caller)? == before && processes(caller)? == 1);
    caller.ok("cp -p /root/agent.yaml /etc/tombolo/agent.yaml")?;

    // By signal, which nobody waits for.
    for vm in [caller, callee] {
        replaced(vm, &format!("systemctl kill --kill-who=main -s HUP {UNIT}"))?;
        ensure!(processes(vm)? == 2, "{}", vm.journal());
    }

    // The main process dies: what is open goes on, and the next one finds it.
    for vm in [caller, callee] {
        let (pid, _) = running(vm)?;
        vm.ok(&format!("kill -9 {pid}"))?;
        vm.until(&format!(
            "pid=$(systemctl show --value -p MainPID {UNIT}); test $pid != {pid} && test $pid != 0 && systemctl is-active {UNIT}"
        ))?;
        ensure!(processes(vm)? == 2, "{}", vm.journal());
        vm.until("tombolo status | grep 'and 10 in the process before'")?;
        ensure!(vm.property(UNIT, "NRestarts")? == "1");
    }
    caller.until(&format!("curl -sS -m 5 http://{}/", pair.vip))?;
    pair.finish("steady")?;
    for vm in [caller, callee] {
        vm.until(ALONE)?;
    }

    // A restart is a drain, of all processes.
    let short = "sed -i '/drain_seconds/d' /etc/tombolo/agent.yaml; echo 'drain_seconds: 1' >> /etc/tombolo/agent.yaml";
    for vm in [caller, callee] {
        vm.ok(&format!("{short}; systemctl reload {UNIT}"))?;
        vm.until(ALONE)?;
    }
    pair.streams(10)?;
    caller.ok(&format!("systemctl reload {UNIT}"))?;
    ensure!(processes(caller)? == 2);
    caller.ok(&format!("systemctl restart {UNIT}"))?;
    ensure!(processes(caller)? == 1, "{}", caller.journal());
    ensure!(pair.finish("steady").is_err(), "a restart is a drain");

    // Goodbyes with a process before: nothing is left.
    for goodbye in ["tombolo down", "tombolo leave"] {
        caller.until(&format!("curl -sS -m 5 http://{}/", pair.vip))?;
        pair.streams(10)?;
        caller.ok(&format!("systemctl reload {UNIT}"))?;
        ensure!(processes(caller)? == 2);
        // The worst case: nobody is left who could tell the process before.
        if goodbye == "tombolo leave" {
            let (pid, _) = running(caller)?;
            caller.ok(&format!("kill -9 {pid}"))?;
        }
        caller.ok(goodbye)?;
        ensure!(processes(caller)? == 0, "{goodbye}\n{}", caller.journal());
        ensure!(!caller.sh("ip link show mesh0")?.ok(), "{goodbye}: mesh0 is left");
        ensure!(pair.finish("steady").is_err(), "{goodbye} ends what is open");
        if goodbye == "tombolo down" {
            caller.ok("tombolo up")?;
        }
    }
    ensure!(
        !pair
            .mesh
            .discovery
            .ok("tombolo vm list -n shop")?
            .contains("webapp-")
    );
    Ok(())
}

#[test]
fn an_upgrade_of_an_idle_agent_and_of_one_that_cannot_reload() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("idle")?;
    vm.add_repository(revision(1)?)?;
    vm.apt("install tombolo-agent")?;
    let idle = format!("systemctl show --value -p StatusText {UNIT} | grep 'tombolo up'");
    vm.until(&idle)?;
    replaced(&vm, &format!("systemctl reload {UNIT}"))?;
    vm.until(&idle)?;
    vm.add_repository(revision(2)?)?;
    replaced(
        &vm,
        "dpkg -i /srv/packages/tombolo_*.deb /srv/packages/tombolo-agent_*.deb 2>&1",
    )?;
    vm.until(&idle)?;
    vm.until(ALONE)?;

    // The running agent cannot: it is restarted, once, and that is said.
    let postinst = "/var/lib/dpkg/info/tombolo-agent.postinst configure 0.1 2>&1";
    let drop_in = format!("/run/systemd/system/{UNIT}.d/cannot.conf");
    vm.write(
        &drop_in,
        "0644",
        "[Service]\nExecReload=\nExecReload=/bin/false\n",
    )?;
    let (pid, invocation) = running(&vm)?;
    let said = vm.ok(postinst)?;
    ensure!(said.contains("it is restarted"), "{said}");
    let (after, second) = running(&vm)?;
    ensure!(after != pid && second != invocation, "{said}");

    // With a configuration that the new program refuses, a restart would be the end of a member: it goes on as it is.
    vm.ok("echo 'worker: 2' >> /etc/tombolo/agent.yaml")?;
    let said = vm.ok(postinst)?;
    ensure!(
        said.contains("did you mean workers?") && said.contains("systemctl reload tombolo-agent"),
        "{said}"
    );
    ensure!(running(&vm)? == (after, second), "{said}");
    Ok(())
}
