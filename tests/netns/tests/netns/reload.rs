//! An agent is replaced under load: nothing that is open is lost, nothing new is refused.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::time::{Duration, Instant};
use tombolo_testkit::{EchoServer, Host, Mesh, MeshOptions, Nginx, Output, Process, Vm, wait_for};

/// Connections that are open over all reloads.
const STREAMS: &str = "1000";
/// New connections per second meanwhile.
const RATE: &str = "500";

pub(crate) fn reload(vm: &Vm) -> Result<Output> {
    vm.host.run("tombolo-agent", &["reload"])
}

/// A program whose standard input ends when [`stop`] is called.
fn until_stopped(host: &Host, line: &str) -> Result<Process> {
    let wait = "while [ ! -e /run/stop ]; do sleep 0.05; done";
    host.spawn("sh", &["-c", &format!("{wait} | exec {line}")])
}

fn stop(host: &Host) -> Result<()> {
    host.write("/run/stop", "")
}

/// The agent that answers at the admin socket.
pub(crate) fn main_pid(vm: &Vm) -> Result<i32> {
    let text = vm.host.sh("cat /run/tombolo/agent/agent.pid")?.checked()?.stdout;
    text.trim().parse().context(text)
}

fn holding(process: &Process) -> Result<()> {
    wait_for("the long connections", PATIENCE, || {
        ensure!(process.log().contains("holding"), "{}", process.log());
        Ok(())
    })
}

/// What `tombolo-peer call load` says: answers, failures, and the longest time of one in ms.
fn judge(log: &str) -> Result<(usize, u64)> {
    let (mut count, mut worst) = (0, 0);
    for line in log.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, took, how] = words.as_slice() else {
            bail!("{line}")
        };
        ensure!(*how == "ok", "a request failed: {line}");
        count += 1;
        worst = worst.max(took.parse()?);
    }
    Ok((count, worst))
}

#[test]
fn nothing_is_lost_over_reloads_of_both_sides() -> Result<()> {
    needs_root!();
    let (a, b, mesh) = pair("reload", "http=80:8080,echo=7003", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let _echo = EchoServer::start(&b.host, "echo", 7003)?;
    a.curl_until(&format!("http://{CATALOG}/"), PATIENCE)?;
    let mut streams = until_stopped(
        &a.host,
        &format!("tombolo-peer call steady {CATALOG} 7003 {STREAMS}"),
    )?;
    holding(&streams)?;
    let mut load = until_stopped(&a.host, &format!("tombolo-peer call load {CATALOG} 80 {RATE}"))?;
    let begun = Instant::now();
    let before = [main_pid(&a)?, main_pid(&b)?];
    for vm in [&a, &b, &a, &b] {
        std::thread::sleep(Duration::from_millis(300));
        reload(vm)?.checked().with_context(|| vm.agent_log())?;
    }
    ensure!(before[0] != main_pid(&a)? && before[1] != main_pid(&b)?);
    let status = a.host.run("tombolo", &["status", "--output", "json"])?.stdout;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    ensure!(status["state"] == "Serving", "{status}");
    wait_for("the count of what the processes before serve", PATIENCE, || {
        let status = a.host.run("tombolo", &["status"])?.stdout;
        ensure!(status.contains("and 1000 in the process before"), "{status}");
        Ok(())
    })?;
    let members = mesh.tombolo("vm list")?;
    ensure!(
        !members.contains("UNHEALTHY") && !members.contains("suspect"),
        "{members}"
    );
    std::thread::sleep(Duration::from_millis(300));
    stop(&a.host)?;
    let took = begun.elapsed();
    ensure!(load.wait(PATIENCE) == Some(0), "{}", load.log());
    ensure!(streams.wait(PATIENCE) == Some(0), "{}", streams.log());
    let (requests, worst) = judge(&load.log())?;
    let steady = streams
        .log()
        .lines()
        .find(|line| line.starts_with("steady"))
        .map(str::to_owned);
    println!(
        "reload: {requests} requests in {took:?} over 4 reloads, none failed, the longest {worst} ms; 1,000 streams: {}",
        steady.unwrap_or_default()
    );
    let pauses = [&a, &b].map(|vm| vm.host.sh("grep -ho 'pause_us=[0-9]*' /var/log/tombolo/*.log"));
    for pause in pauses {
        println!("reload: {}", pause?.stdout.replace('\n', " "));
    }
    // What was open is closed: the processes before end.
    wait_for("the processes before to end", PATIENCE, || {
        let left = (
            a.host.pids_of("tombolo-agent")?.len(),
            b.host.pids_of("tombolo-agent")?.len(),
        );
        ensure!(left == (1, 1), "{left:?}: {}", b.agent_log());
        Ok(())
    })
}

fn deny(mesh: &Mesh) -> Result<()> {
    mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: none, namespace: shop}\nspec:\n  action: DENY\n  \
         selector: {matchLabels: {app: catalog}}\n  rules: [{to: [{operation: {ports: ['7003']}}]}]\n",
    )
    .map(drop)
}

#[test]
fn a_reload_that_fails_changes_nothing_and_policies_reach_the_process_before() -> Result<()> {
    needs_root!();
    let (a, b, mesh) = pair("reloadfail", "http=80:8080,echo=7003", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let _echo = EchoServer::start(&b.host, "echo", 7003)?;
    let url = format!("http://{CATALOG}/");
    a.curl_until(&url, PATIENCE)?;
    let mut streams = until_stopped(&a.host, &format!("tombolo-peer call steady {CATALOG} 7003 20"))?;
    holding(&streams)?;

    // A configuration that cannot be read.
    let first = main_pid(&b)?;
    let config = b.host.sh("cat /etc/tombolo/agent.yaml")?.stdout;
    b.host.write("/etc/tombolo/agent.yaml", "worker: 2\n")?;
    let refused = reload(&b)?;
    ensure!(
        refused.code == 1
            && refused.stderr.contains("TMB0511")
            && refused.stderr.contains("did you mean workers?"),
        "{}",
        refused.text()
    );
    ensure!(main_pid(&b)? == first && b.host.pids_of("tombolo-agent")?.len() == 1);
    a.curl(&url)?.checked()?;
    b.host.write("/etc/tombolo/agent.yaml", &config)?;

    // The new process dies: what the one before serves goes on, and the next one finds it.
    reload(&b)?.checked()?;
    reload(&a)?.checked()?;
    for vm in [&a, &b] {
        let second = main_pid(vm)?;
        kill(Pid::from_raw(second), Signal::SIGKILL)?;
        vm.host
            .run("tombolo", &["up"])?
            .checked()
            .with_context(|| vm.agent_log())?;
        ensure!(main_pid(vm)? != second);
    }
    a.curl_until(&url, PATIENCE)?;
    ensure!(streams.is_running(), "{}", streams.log());
    wait_for("the next agent to find the process before", PATIENCE, || {
        let status = a.host.run("tombolo", &["status"])?.stdout;
        ensure!(
            status.contains("and 20 in the process before"),
            "{status}\n{}",
            a.agent_log()
        );
        Ok(())
    })?;

    // A policy of now holds for what was open then.
    let begun = Instant::now();
    deny(&mesh)?;
    wait_for("denied streams to be cut", Duration::from_secs(3), || {
        ensure!(a.host.pids_of("tombolo-peer")?.is_empty(), "{}", b.agent_log());
        Ok(())
    })?;
    println!(
        "reload: denied streams of the process before are cut after {:?}",
        begun.elapsed()
    );
    stop(&a.host)?;
    ensure!(
        streams.wait(PATIENCE).is_some_and(|code| code != 0),
        "{}",
        streams.log()
    );
    a.curl(&url)?.checked()?;
    Ok(())
}
