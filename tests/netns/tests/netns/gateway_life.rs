//! What the loss of one endpoint behind a gateway costs, and its return.

use crate::{
    PATIENCE,
    gateway::{Site, answers, host, serve, tail},
    load::{Load, now_ms},
    needs_root,
};
use anyhow::{Result, ensure};
use std::time::Duration;
use tombolo_testkit::{Vm, wait_for};

#[test]
fn one_endpoint_is_taken_out_and_not_the_gateway() -> Result<()> {
    needs_root!();
    let mut site = Site::start("ejection")?;
    let gateway = site.mesh.gateway("gw2", "net2", &mut site.west, 202)?;
    site.group("front", "", "")?;
    site.group("back", "net2", "")?;
    let front = site.vm(true, "front", 5)?;
    let (one, other) = (site.vm(false, "back", 5)?, {
        let vm = site.mesh.bare_in(&mut site.west, "back2", 6)?;
        vm.up(&site.mesh.token("back")?)?;
        vm
    });
    let served = |vm: &Vm| {
        Ok::<_, anyhow::Error>(
            vm.host
                .sh("cat /var/log/tombolo/*.log")?
                .stdout
                .matches("sa/front")
                .count(),
        )
    };
    let _servers = (serve(&one, "back")?, serve(&other, "back")?);
    answers(&front, "back", &gateway)?;
    let load = Load::start(&front, &host("back"), 80, 50)?;
    for vm in [&one, &other] {
        wait_for("calls to both", PATIENCE, || {
            ensure!(served(vm)? > 10, "{}", tail(&vm.agent_log()));
            Ok(())
        })?;
    }
    other.host.unplug()?;
    let moment = now_ms();
    wait_for("the gateway to let it rest", Duration::from_secs(5), || {
        ensure!(
            gateway.metric("tombolo_gateway_resting_endpoints")? == 1,
            "{}",
            tail(&gateway.log())
        );
        Ok(())
    })?;
    std::thread::sleep(Duration::from_secs(3)); // what is measured
    let lost = load.stop()?.since(moment);
    println!(
        "endpoint gone: of {} requests {} failed, the slowest {:?}",
        lost.requests.len(),
        lost.failed().len(),
        lost.slowest()
    );
    // A call that ran in it when it vanished may be lost.
    let late = lost
        .failed()
        .into_iter()
        .filter(|request| request.start > moment + 50);
    ensure!(late.count() == 0, "{:?}", lost.failed());
    let metrics = front.host.sh("curl -s http://127.0.0.1:15020/metrics")?.stdout;
    let refused = metrics.lines().filter(|line| {
        line.starts_with("tombolo_dataplane_gateway_calls_total")
            && line.contains("gateway=\"")
            && line.contains("_gateway\"")
    });
    ensure!(refused.clone().count() == 0, "{:?}", refused.collect::<Vec<_>>());
    // It is back: few calls first, then as many as the other gets.
    other.host.plug()?;
    let before = served(&other)?;
    let load = Load::start(&front, &host("back"), 80, 50)?;
    wait_for("calls to come back", PATIENCE, || {
        ensure!(served(&other)? > before + 20, "{}", tail(&gateway.log()));
        Ok(())
    })?;
    let load = load.stop()?;
    ensure!(load.failed().is_empty(), "{:?}", load.failed());
    Ok(())
}
