//! A gateway that is stopped on purpose while many call one host.

use crate::{
    PATIENCE,
    gateway::{answers, host, pair, serve, tail},
    load::{Load, now_ms},
    needs_root,
};
use anyhow::{Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::time::Duration;
use tombolo_testkit::{Gateway, Vm, wait_for};

/// New calls a second.
const RATE: u32 = 200;

fn carried(gateway: &Gateway) -> Result<u64> {
    let service = host("back");
    gateway.metric(&format!(
        "tombolo_gateway_calls_total{{service=\"{service}\",result=\"ok\"}}"
    ))
}

/// Handshakes at a host, by result.
fn handshakes(at: &Vm) -> Result<String> {
    let line = "curl -sf -m 2 http://127.0.0.1:15020/metrics | grep ^tombolo_tunnel_handshakes_total";
    Ok(at.host.sh(line)?.stdout)
}

fn carries(gateway: &Gateway) -> Result<()> {
    let before = carried(gateway)?;
    wait_for("calls through the gateway", PATIENCE, || {
        ensure!(carried(gateway)? > before + 20, "{}", tail(&gateway.log()));
        Ok(())
    })
}

/// The host is busy for a second: as many calls wait there for its part of the handshake, all of them from one source, the
/// gateway that is left.
fn stall(host: &Vm) -> Result<()> {
    let agent = Pid::from_raw(host.agent_pid()?);
    kill(agent, Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_secs(1)); // what is measured
    Ok(kill(agent, Signal::SIGCONT)?)
}

/// One speaks QUIC and the other one TCP alone: each is stopped once under load.
#[test]
fn a_drain_under_load_fails_no_call() -> Result<()> {
    needs_root!();
    let (front, back, first, mut site) = pair("drain")?;
    let second = site.mesh.gateway_tcp("gw3", "net2", &mut site.west, 203)?;
    let _server = serve(&back, "back")?;
    answers(&front, "back", &first)?;
    let load = Load::start(&front, &host("back"), 80, RATE)?;
    let begun = now_ms();
    let mut gateways = [first, second];
    for gateway in &gateways {
        carries(gateway)?;
    }
    for (at, gateway) in gateways.iter_mut().enumerate() {
        let moment = now_ms();
        let process = gateway.process();
        process.signal(Signal::SIGTERM)?;
        let code = process.wait(Duration::from_secs(15));
        ensure!(code == Some(0), "{code:?}\n{}", tail(&gateway.log()));
        println!("drained in {} ms", now_ms() - moment);
        if at == 0 {
            stall(&back)?;
            gateway.start()?;
            carries(gateway)?;
        }
    }
    let ended = now_ms();
    let outcome = load.stop()?;
    let (all, failed) = (outcome.requests.len(), outcome.failed());
    println!(
        "two drains at {RATE} calls/s: {} of {all} calls failed, the slowest {:?}",
        failed.len(),
        outcome.slowest()
    );
    let handshakes = handshakes(&back)?;
    ensure!(
        failed.is_empty(),
        "{failed:?}\n{handshakes}\n{}",
        tail(&front.agent_log())
    );
    ensure!(!handshakes.contains("result=\"limited\""), "{handshakes}");
    // It was the load that is spoken of.
    let wanted = u128::from(RATE) * (ended - begun) / 1000;
    ensure!(all as u128 > wanted * 8 / 10, "{all} calls, not {wanted}");
    Ok(())
}
