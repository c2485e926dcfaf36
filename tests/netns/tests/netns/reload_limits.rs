//! The edges of a reload: programs that cannot take over, how many processes are kept and for how long, and that
//! `tombolo down` reaches all of them.

use crate::{
    CATALOG, PATIENCE, needs_root, pair,
    reload::{main_pid, reload},
};
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;
use tombolo_testkit::{EchoServer, MeshOptions, Process, Vm, binaries, wait_for};

/// A program that is installed in the place of the agent: it says what a real one would, up to a point.
const IMPOSTOR: &str = r#"#!/usr/bin/perl
exit 2 if HOW eq "no-verb";
my $verb = shift;
if ($verb eq "spawn") { exit 0 if fork; }
open(my $other, "+<&=", 0) or die;
fcntl($other, 4, 0); # F_SETFL: wait
my $format = HOW eq "skew" ? 7 : 1;
syswrite $other, qq({"say":"hello","format":$format,"version":"9.9.9","pid":$$});
sysread $other, my $message, 65536;
if (HOW eq "skew") { exit 1; }
syswrite $other, '{"say":"prepared"}';
sysread $other, $message, 65536;
exit 1 if HOW eq "late";
syswrite $other, '{"say":"failed","message":"no memory"}' if HOW eq "says";
sleep 60;
"#;

/// A connection with a byte each way every 20 ms, until a line is written to its fifo.
fn stream(vm: &Vm, fifo: &str) -> Result<Process> {
    let line = format!("mkfifo {fifo}; exec tombolo-peer call drip {CATALOG} 7003 20 <> {fifo}");
    let before = open(vm)?;
    let stream = vm.host.spawn("sh", &["-c", &line])?;
    wait_for("the stream", PATIENCE, || {
        ensure!(open(vm)? > before, "{}", stream.log());
        Ok(())
    })?;
    Ok(stream)
}

fn open(vm: &Vm) -> Result<usize> {
    let open = vm.host.sh("ss -Htn state established dport = :7003 | wc -l")?;
    Ok(open.stdout.trim().parse()?)
}

fn agents(vm: &Vm, count: usize) -> Result<()> {
    wait_for("the number of processes", PATIENCE, || {
        let found = vm.host.pids_of("tombolo-agent")?.len();
        ensure!(found == count, "{found} and not {count}\n{}", vm.agent_log());
        Ok(())
    })
}

#[test]
fn a_program_that_cannot_take_over_is_refused_and_all_goes_on() -> Result<()> {
    needs_root!();
    let (a, b, _mesh) = pair("reloadnot", "echo=7003", MeshOptions::default())?;
    let _echo = EchoServer::start(&b.host, "echo", 7003)?;
    let mut stream = stream(&a, "/run/stream")?;
    let first = main_pid(&a)?;
    let program = binaries().join("tombolo-agent").canonicalize()?;
    for (how, cause) in [
        ("no-verb", "does it know `spawn`"),
        ("skew", "version 9.9.9 hands over in format 7"),
        ("late", "has ended before it had taken over"),
        ("says", "no memory"),
        // It is killed after 3 s.
        ("hangs", "did not answer in time"),
    ] {
        a.host
            .write("/run/impostor", &IMPOSTOR.replace("HOW", &format!("\"{how}\"")))?;
        a.host
            .sh(&format!(
                "chmod 755 /run/impostor && mount --bind /run/impostor {}",
                program.display()
            ))?
            .checked()?;
        // By way of the socket: the verb's own program is the impostor now.
        let refused = a
            .host
            .sh("kill -HUP $(cat /run/tombolo/agent/agent.pid); echo sent")?;
        refused.checked()?;
        let said = wait_for(how, PATIENCE, || {
            let log = a.agent_log();
            ensure!(log.contains(cause), "{log}");
            Ok(log)
        })?;
        a.host.sh(&format!("umount {}", program.display()))?.checked()?;
        ensure!(said.contains("TMB0511"), "{said}");
        ensure!(
            main_pid(&a)? == first && stream.is_running(),
            "{how}: {}",
            stream.log()
        );
        a.host
            .run("tombolo-peer", &["call", "echo", CATALOG, "7003", "10"])?
            .checked()
            .context(how)?;
    }
    ensure!(a.host.pids_of("perl")?.is_empty(), "an impostor is left");
    // After all that, the real one still can.
    reload(&a)?.checked()?;
    ensure!(main_pid(&a)? != first);
    a.host.sh("echo > /run/stream")?.checked()?;
    ensure!(stream.wait(PATIENCE) == Some(0), "{}", stream.log());
    Ok(())
}

#[test]
fn processes_before_are_few_short_lived_and_end_with_the_agent() -> Result<()> {
    needs_root!();
    let (a, b, _mesh) = pair("reloadfew", "echo=7003", MeshOptions::default())?;
    let _echo = EchoServer::start(&b.host, "echo", 7003)?;
    a.host.write("/etc/tombolo/agent.yaml", "drain_seconds: 1\n")?;
    reload(&a)?.checked()?;
    agents(&a, 1)?;
    // Three processes before, each with a stream; with the fourth the first is drained.
    let mut streams = Vec::new();
    for n in 0..4 {
        streams.push(stream(&a, &format!("/run/stream-{n}"))?);
        reload(&a)?.checked()?;
    }
    wait_for("the oldest to be drained", PATIENCE, || {
        ensure!(!streams[0].is_running(), "{}", a.agent_log());
        Ok(())
    })?;
    agents(&a, 4)?;
    for stream in &mut streams[1..] {
        ensure!(stream.is_running(), "{}", stream.log());
    }

    // A limit of life: it is the word of the process that it is about.
    a.host.write(
        "/etc/tombolo/agent.yaml",
        "drain_seconds: 1\nreload_linger_seconds: 1\n",
    )?;
    reload(&a)?.checked()?;
    let mut short = stream(&a, "/run/stream-short")?;
    reload(&a)?.checked()?;
    wait_for("the limit of life", Duration::from_secs(5), || {
        ensure!(!short.is_running(), "{}", a.agent_log());
        Ok(())
    })?;
    ensure!(
        a.agent_log().contains("reload_linger_seconds is over"),
        "{}",
        a.agent_log()
    );

    // A goodbye reaches all.
    ensure!(streams[3].is_running(), "{}", streams[3].log());
    a.host.run("tombolo", &["down"])?.checked()?;
    ensure!(!streams[3].is_running());
    agents(&a, 0)?;
    ensure!(a.host.sh("ip link show mesh0")?.code != 0, "mesh0 is left");
    Ok(())
}
