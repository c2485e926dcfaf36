//! A gateway that vanishes without a word: no reset and no end of a connection tells anybody.

use crate::{
    PATIENCE,
    gateway::{Site, answers, host, serve, tail},
    load::{Load, now_ms},
    needs_root,
};
use anyhow::{Result, ensure};
use std::time::Duration;
use tombolo_testkit::{Gateway, Vm, wait_for};

/// Longest time after the loss in which a call may fail.
const RECOVERY: Duration = Duration::from_secs(3);

fn sessions(gateway: &Gateway) -> Result<u64> {
    gateway.metric("tombolo_gateway_reverse_sessions")
}

fn has_sessions(gateway: &Gateway, count: u64) -> Result<()> {
    wait_for(&format!("{count} sessions"), PATIENCE, || {
        let now = sessions(gateway)?;
        ensure!(now == count, "{now}\n{}", tail(&gateway.log()));
        Ok(())
    })
}

/// Both carry calls to the service.
fn shared(gateways: &[&Gateway], service: &str) -> Result<()> {
    let line = format!(
        "tombolo_gateway_calls_total{{service=\"{}\",result=\"ok\"}}",
        host(service)
    );
    for gateway in gateways {
        let before = gateway.metric(&line)?;
        wait_for("calls through both", PATIENCE, || {
            ensure!(gateway.metric(&line)? > before + 5, "{}", tail(&gateway.log()));
            Ok(())
        })?;
    }
    Ok(())
}

/// What a gateway has refused last.
fn refusals(gateway: &Gateway) -> String {
    let log = gateway.log();
    let refused: Vec<&str> = log.lines().filter(|line| line.contains("refused")).collect();
    tail(&refused.join("\n"))
}

/// What its loss costs those who call a host by its address and one by its session.
fn lose(front: &Vm, lost: &Gateway, other: &Gateway, how: &str) -> Result<String> {
    let mut told = String::new();
    let loads = ["back", "away"].map(|service| (service, Load::start(front, &host(service), 80, 30)));
    for service in ["back", "away"] {
        shared(&[lost, other], service)?;
    }
    lost.fall_silent()?;
    let moment = now_ms();
    std::thread::sleep(Duration::from_secs(4)); // what is measured
    for (service, load) in loads {
        let since = load?.stop()?.since(moment);
        let (all, failed, last) = (
            since.requests.len(),
            since.failed().len(),
            since.last_failure(moment),
        );
        told += &format!(
            "gateway vanished ({how}), calls to {service}: {failed} of {all} failed, the last {last:?} after it; the slowest {:?}\n",
            since.slowest()
        );
        ensure!(all > 90, "{all} calls");
        ensure!(
            last <= RECOVERY && since.slowest() <= 2 * RECOVERY,
            "{:?}\n{}\n--- the other gateway\n{}",
            since.failed(),
            tail(&front.agent_log()),
            refusals(other)
        );
        ensure!(failed * 10 <= all, "{:?}", since.failed());
    }
    // Both ends of the session have noticed.
    has_sessions(lost, 0)?;
    Ok(told)
}

fn status(of: &Vm, wanted: &str) -> Result<()> {
    wait_for(wanted, PATIENCE, || {
        let said = of.host.run("tombolo", &["status"])?.stdout;
        ensure!(said.contains(wanted), "{said}");
        Ok(())
    })
}

#[test]
fn a_gateway_vanishes_without_a_word() -> Result<()> {
    needs_root!();
    let mut site = Site::start("silence")?;
    let quic = site.mesh.gateway("gw2", "net2", &mut site.west, 202)?;
    let tcp = site.mesh.gateway_tcp("gw3", "net2", &mut site.west, 203)?;
    site.group("front", "", "")?;
    site.group("back", "net2", "")?;
    site.group("away", "net2", ", tombolo.io/reach: outbound")?;
    let front = site.vm(true, "front", 5)?;
    let (back, away) = (site.vm(false, "back", 5)?, site.vm(false, "away", 6)?);
    let _servers = (serve(&back, "back")?, serve(&away, "away")?);
    for gateway in [&quic, &tcp] {
        has_sessions(gateway, 1)?;
    }
    answers(&front, "back", &quic)?;
    answers(&front, "away", &quic)?;
    for (lost, other, how) in [(&tcp, &quic, "tcp"), (&quic, &tcp, "quic")] {
        print!("{}", lose(&front, lost, other, how)?);
        status(&away, "1 of 2 gateways")?;
        lost.speak()?;
        has_sessions(lost, 1)?;
        status(&away, "2 of 2 gateways")?;
    }
    Ok(())
}
