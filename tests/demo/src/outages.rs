//! A gateway dies, a whole cluster dies, and what others notice of it.

use crate::{
    clusters::{CATALOG, Clusters, PAYMENTS, WAIT, answers, twenty},
    load::{Load, now_ms},
    story::{Story, time},
};
use anyhow::{Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use std::{
    thread::sleep,
    time::{Duration, Instant},
};
use tombolo_testkit::{Gateway, Host, Nginx, Vm, wait_for};

/// The longest that callers may wait for what is left to take over.
const TAKE_OVER: Duration = Duration::from_secs(3);

/// Calls to payments that a gateway has passed on since its start.
fn passed(gateway: &Gateway) -> Result<u64> {
    let wanted = format!("tombolo_gateway_calls_total{{service=\"{PAYMENTS}\",result=\"ok\"}}");
    let metrics = gateway.metrics()?;
    let line = metrics.lines().find_map(|line| line.strip_prefix(&wanted));
    Ok(line.map_or(Ok(0), |count| count.trim().parse())?)
}

/// One of two gateways is killed.
pub(crate) fn gateway(story: &mut Story, stage: &mut Clusters) -> Result<()> {
    story.step("One of east's two gateways is killed under load, and comes back");
    let before = (passed(&stage.gw_e1)?, passed(&stage.gw_e2)?);
    let load = Load::start(&stage.web.host, PAYMENTS, 100)?;
    story.say(&format!("web$ 100 new connections a second to {PAYMENTS}:80"));
    let shares = wait_for("calls through both gateways", WAIT, || {
        let first = passed(&stage.gw_e1)? - before.0;
        let second = passed(&stage.gw_e2)? - before.1;
        ensure!(first + second >= 100, "{first} and {second} calls");
        Ok((first, second))
    })?;
    ensure!(shares.0 >= 20 && shares.1 >= 20, "not shared: {shares:?}");
    story.say(&format!(
        "gw-e1 has passed on {} of them, gw-e2 {}",
        shares.0, shares.1
    ));
    let died = now_ms();
    stage.gw_e1.kill();
    story.say("gw-e1: kill -9");
    sleep(TAKE_OVER);
    let (again, begun) = (now_ms(), Instant::now());
    stage.gw_e1.start()?;
    wait_for("calls through the gateway that is back", WAIT, || {
        let count = passed(&stage.gw_e1)?;
        ensure!(count > 0, "none yet");
        Ok(())
    })?;
    let back = begun.elapsed();
    let calls = load.finish()?;
    for call in calls.failed().take(3) {
        story.say(&format!(
            "{} ms after the kill: {}",
            call.end.saturating_sub(died),
            call.how
        ));
    }
    let (failed, gap) = (calls.failed().count(), calls.longest_gap(died, again));
    ensure!(calls.total() > 300, "only {} calls", calls.total());
    ensure!(
        calls.failed().all(|call| call.end >= died),
        "calls failed before the kill"
    );
    ensure!(gap <= TAKE_OVER, "nothing was answered for {}", time(gap));
    ensure!(
        failed * 20 <= calls.total(),
        "{failed} of {} failed",
        calls.total()
    );
    story.result(
        "a gateway is killed: longest time without an answer",
        format!("{failed} of {} calls failed", calls.total()),
        gap,
    );
    story.result("the gateway is started again", "carries calls again", back);
    Ok(())
}

/// Power off, all at once: links first, then every process.
fn power_off(hosts: &[&Host]) -> Result<()> {
    for host in hosts {
        host.unplug()?;
    }
    for host in hosts {
        for pid in host.pids()? {
            let _ = kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    Ok(())
}

fn boot(vm: &mut Vm) -> Result<()> {
    vm.start_dnsmasq()?;
    vm.host.run("tombolo", &["up"])?.checked().map(drop)
}

/// A cluster loses power and gets it back.
pub(crate) fn cluster(story: &mut Story, stage: &mut Clusters) -> Result<()> {
    story.step("The whole of west loses power: its kiosk elsewhere goes on with east's catalog, and returns");
    story.say("catalog is in both clusters; everybody calls the nearest, the kiosk that of its own cluster");
    let kiosk = stage.kiosk()?;
    twenty(story, &kiosk.host, CATALOG, "catalog in west")?;
    twenty(story, &stage.pay.host, CATALOG, "catalog in east")?;
    let loads = [
        Load::start(&kiosk.host, CATALOG, 50)?,
        Load::start(&stage.pay.host, CATALOG, 50)?,
    ];
    story.say("kiosk$, pay$ 50 new connections a second each to catalog");
    sleep(Duration::from_millis(500));
    let (died, begun) = (now_ms(), Instant::now());
    power_off(&[
        &stage.mesh.control,
        &stage.gw_w.host,
        &stage.web.host,
        &stage.cat_w.host,
    ])?;
    story.say("west: power off: discovery, gateway, web and cat-w (links down, every process killed)");
    answers(kiosk, CATALOG, "catalog in east")?;
    let over = begun.elapsed();
    twenty(story, &kiosk.host, CATALOG, "catalog in east")?;
    let (again, begun) = (now_ms(), Instant::now());
    for host in [
        &stage.mesh.control,
        &stage.gw_w.host,
        &stage.web.host,
        &stage.cat_w.host,
    ] {
        host.plug()?;
    }
    story.say("west: power on");
    stage.mesh.start_discovery()?;
    stage.gw_w.start()?;
    boot(&mut stage.cat_w)?;
    boot(&mut stage.web)?;
    stage
        .apps
        .push(Nginx::start(&stage.cat_w.host, 8080, "catalog in west")?);
    let up = begun.elapsed();
    let kiosk = stage.kiosk()?;
    answers(kiosk, CATALOG, "catalog in west")?;
    let returned = begun.elapsed();
    let told = wait_for("west to be connected", WAIT, || {
        let told = Clusters::state(&stage.east, "west")?;
        ensure!(told.contains("Connected"), "{told}");
        Ok(told)
    })?;
    story.say(&format!("east$ tombolo cluster list   {told}"));
    twenty(story, &kiosk.host, CATALOG, "catalog in west")?;
    let [kiosks, pays] = loads.map(Load::finish);
    let (kiosks, pays) = (kiosks?, pays?);
    for call in kiosks.failed().take(3) {
        story.say(&format!(
            "{} ms after the power-off: {}",
            call.end.saturating_sub(died),
            call.how
        ));
    }
    let (gap, later) = (
        kiosks.longest_gap(died, again),
        kiosks.longest_gap(again, u64::MAX),
    );
    let (failed, others) = (kiosks.failed().count(), pays.failed().count());
    if let Some(call) = pays.failed().next() {
        bail!(
            "east's own calls must not notice: {others} failed, the first with {}",
            call.how
        );
    }
    ensure!(
        later <= TAKE_OVER,
        "nothing was answered for {} when west came back",
        time(later)
    );
    ensure!(gap <= TAKE_OVER, "the kiosk got no answer for {}", time(gap));
    ensure!(
        failed * 20 <= kiosks.total(),
        "{failed} of {} calls failed",
        kiosks.total()
    );
    story.result(
        "a cluster loses power: the kiosk's longest time without an answer",
        format!("{failed} of {} calls failed", kiosks.total()),
        gap,
    );
    story.result(
        "east's own calls meanwhile",
        format!("0 of {} calls failed", pays.total()),
        pays.longest_gap(died, again),
    );
    story.result("power off to the first answer from east", "answered", over);
    story.result(
        "power on to the first answer from west",
        format!(
            "{} after discovery, gateway and VMs were up",
            time(returned.saturating_sub(up))
        ),
        returned,
    );
    let late = kiosks.failed().filter(|call| call.end >= again).count();
    story.result(
        "the kiosk's longest time without an answer meanwhile",
        format!("{late} calls failed"),
        later,
    );
    Ok(())
}
