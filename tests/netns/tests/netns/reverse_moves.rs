//! Reverse sessions and calls between networks while the way changes: UDP that is dropped and passes again, and a host that
//! gets another address.

use crate::{
    PATIENCE,
    gateway::{Site, answers, host, serve, tail},
    load::{Load, now_ms},
    needs_root,
};
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;
use tombolo_testkit::{Gateway, Lan, Vm, wait_for};

/// `quic_retry_seconds` of the hosts.
const RETRY: Duration = Duration::from_secs(2);

/// Calls, and sessions, by transport.
fn carried(gateway: &Gateway, what: &str, transport: &str) -> Result<u64> {
    gateway.metric(&format!("tombolo_gateway_{what}{{transport=\"{transport}\"}}"))
}

fn session_is(gateway: &Gateway, transport: &str) -> Result<()> {
    let other = if transport == "quic" { "tcp" } else { "quic" };
    wait_for(&format!("a session over {transport}"), PATIENCE, || {
        let now = (
            carried(gateway, "transport_sessions", transport)?,
            carried(gateway, "transport_sessions", other)?,
        );
        ensure!(now == (1, 0), "{now:?}\n{}", tail(&gateway.log()));
        Ok(())
    })
}

/// Sessions that have come to the gateway so far.
fn sessions_made(gateway: &Gateway) -> usize {
    gateway.log().matches(": reverse session").count()
}

/// The host at `10.0.0.FROM` is at `10.0.0.TO` now, and calls to it go on.
fn moves(front: &Vm, away: &Vm, gateway: &Gateway, (from, to): (u8, u8), how: &str) -> Result<String> {
    let load = Load::start(front, &host("away"), 80, 40)?;
    let before = carried(gateway, "transport_calls_total", how)?;
    wait_for("calls", PATIENCE, || {
        ensure!(
            carried(gateway, "transport_calls_total", how)? > before + 5,
            "{}",
            tail(&gateway.log())
        );
        Ok(())
    })?;
    // Deleting the only address of a prefix takes its routes along.
    let moved = away.host.sh(&format!(
        "ip addr del 10.0.0.{from}/24 dev eth0 && ip addr add 10.0.0.{to}/24 dev eth0 && \
         ip route replace default via 10.0.0.1"
    ))?;
    moved.checked()?;
    let moment = now_ms();
    std::thread::sleep(Duration::from_secs(3)); // what is measured
    let since = load.stop()?.since(moment);
    let (all, failed, last) = (
        since.requests.len(),
        since.failed().len(),
        since.last_failure(moment),
    );
    let told = format!(
        "address changed, session over {how}: {failed} of {all} calls failed, the last {last:?} after it; the slowest {:?}",
        since.slowest()
    );
    ensure!(all > 90, "{all} calls");
    ensure!(
        last <= Duration::from_secs(3) && since.slowest() <= Duration::from_secs(3) && failed * 10 <= all,
        "{:?}\n{}\n--- gateway\n{}",
        since.failed(),
        away.host
            .sh("grep -h -i -e 'reverse session' -e 'address is gone' /var/log/tombolo/*.log")?
            .stdout,
        tail(&gateway.log())
    );
    Ok(told)
}

fn udp(lans: [&Lan; 2], passes: bool) -> Result<()> {
    let verb = if passes { "-D" } else { "-I" };
    for lan in lans {
        lan.on_router(&format!("iptables {verb} FORWARD -p udp -j DROP"))?;
    }
    Ok(())
}

#[test]
fn sessions_and_calls_follow_the_way() -> Result<()> {
    needs_root!();
    let mut site = Site::start("moves")?;
    let gateway = site.mesh.gateway("gw2", "net2", &mut site.west, 202)?;
    site.group("front", "", "")?;
    site.group("away", "net2", ", tombolo.io/reach: outbound")?;
    // From the first packet on.
    udp([&site.east, &site.west], false)?;
    let mut hosts = Vec::new();
    for (name, east) in [("front", true), ("away", false)] {
        let lan = if east { &mut site.east } else { &mut site.west };
        let vm = site.mesh.bare_in(lan, name, 5)?;
        let settings = format!("access_log: all\nquic_retry_seconds: {}\n", RETRY.as_secs());
        vm.host.write("/etc/tombolo/agent.yaml", &settings)?;
        vm.up(&site.mesh.token(name)?)?;
        hosts.push(vm);
    }
    let away = hosts.pop().context("away")?;
    let front = hosts.pop().context("front")?;
    let _server = serve(&away, "away")?;
    session_is(&gateway, "tcp")?;
    answers(&front, "away", &gateway)?;
    ensure!(
        carried(&gateway, "transport_calls_total", "tcp")? > 0
            && carried(&gateway, "transport_calls_total", "quic")? == 0,
        "{}",
        gateway.metrics()?
    );
    println!("{}", moves(&front, &away, &gateway, (5, 55), "tcp")?);

    // UDP passes again: both go back to QUIC, and no call pays for it.
    let load = Load::start(&front, &host("away"), 80, 20)?;
    udp([&site.east, &site.west], true)?;
    let moment = now_ms();
    session_is(&gateway, "quic")?;
    wait_for("calls over QUIC", PATIENCE, || {
        ensure!(
            carried(&gateway, "transport_calls_total", "quic")? > 5,
            "{}",
            gateway.metrics()?
        );
        Ok(())
    })?;
    let took = Duration::from_millis(u64::try_from(now_ms() - moment)?);
    let outcome = load.stop()?;
    println!(
        "UDP passes again: used after {took:?}, {} calls",
        outcome.requests.len()
    );
    ensure!(outcome.failed().is_empty(), "{:?}", outcome.failed());
    ensure!(took <= 3 * RETRY, "{took:?}");

    // The same session goes on from the new address.
    let made = sessions_made(&gateway);
    println!("{}", moves(&front, &away, &gateway, (55, 56), "quic")?);
    session_is(&gateway, "quic")?;
    let anew = sessions_made(&gateway) - made;
    ensure!(
        anew == 0,
        "{anew} sessions were made anew\n{}",
        tail(&gateway.log())
    );
    Ok(())
}
