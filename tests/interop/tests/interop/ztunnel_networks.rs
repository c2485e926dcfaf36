//! An unmodified ztunnel across networks: in its own trust domain through our gateways in both directions, and what it
//! can and cannot do with services of another cluster.

use crate::{
    PATIENCE,
    site::{Captured, Place, Site, deny, service, tail, ztunnel},
    vip,
};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use tombolo_testkit::{require_root, wait_for};

/// Longest silence after a gateway has died: discovery must hear of it, and say so.
const FAILOVER: Duration = Duration::from_secs(5);

#[test]
fn ztunnel_across_networks() -> Result<()> {
    if !require_root("interop") {
        return Ok(());
    }
    let Some(program) = ztunnel() else {
        return Ok(());
    };
    let mut site = Site::start("zt-net", false)?;
    let mut captured = Vec::new();
    for (name, network) in [("zeast", ""), ("zwest", "net2")] {
        let way = &site.east_gateway.host;
        let place = Place {
            name,
            network,
            last: 6,
            way,
            trust_domain: "mesh.example",
            token: "",
        };
        let lan = if network.is_empty() {
            &mut site.east
        } else {
            &mut site.west
        };
        captured.push(Captured::start(&program, &mut site.mesh, lan, &place)?);
    }
    let (zeast, zwest) = (&captured[0], &captured[1]);
    let (front, back) = (vip(&site.mesh, "front")?, vip(&site.mesh, "back")?);
    // ztunnel calls, our agent answers; from discovery's own network and from the other one.
    zeast.answers(&back, "back")?;
    zwest.answers(&front, "front")?;
    for (vm, caller) in [(&site.back, "sa/zeast"), (&site.front, "sa/zwest")] {
        wait_for(caller, PATIENCE, || {
            let log = vm.agent_log();
            ensure!(
                log.contains(caller) && !log.contains("sa/gateway"),
                "{}",
                tail(&log)
            );
            Ok(())
        })?;
    }
    // Our agent calls, ztunnel answers.
    site.answers(&site.front, "zwest")?;
    site.answers(&site.back, "zeast")?;
    for (ztunnel, caller) in [(zwest, "sa/front"), (zeast, "sa/back")] {
        wait_for(caller, PATIENCE, || {
            let log = ztunnel.log();
            ensure!(
                log.contains(caller) && !log.contains("sa/gateway"),
                "{}",
                tail(&log)
            );
            Ok(())
        })?;
    }
    // ztunnel at both ends, ours in the middle.
    zeast.answers(&vip(&site.mesh, "zwest")?, "zwest")?;

    // A policy: refused by the gateway before the endpoint hears of it.
    site.mesh.apply(&deny("back", "mesh.example/ns/shop/sa/zeast"))?;
    wait_for("the gateway's refusal", PATIENCE, || {
        ensure!(!zeast.get(&back)?.ok(), "still answered");
        let log = site.west_gateway.log();
        ensure!(log.contains("shop/no-caller"), "{}", tail(&log));
        Ok(())
    })?;
    site.mesh.tombolo("delete ap no-caller -n shop")?;
    zeast.answers(&back, "back")?;
    site.mesh.apply(&deny("zwest", "mesh.example/ns/shop/sa/front"))?;
    wait_for("the refusal", PATIENCE, || {
        ensure!(!site.front.curl(&format!("http://{}/", service("zwest")))?.ok());
        Ok(())
    })?;
    site.mesh.tombolo("delete ap no-caller -n shop")?;

    // The gateway that ztunnel was told of dies: discovery names the other one.
    let second = site.mesh.gateway("gw-west2", "net2", &mut site.west, 203)?;
    zeast.answers(&back, "back")?;
    site.west_gateway.kill();
    let died = Instant::now();
    let mut failed = 0;
    let recovered = loop {
        if zeast.get(&back)?.ok() {
            break died.elapsed();
        }
        failed += 1;
        ensure!(died.elapsed() < FAILOVER, "{}", tail(&zeast.log()));
        std::thread::sleep(Duration::from_millis(50)); // the pace of the calls that are counted
    };
    println!("gateway killed: ztunnel calls again after {recovered:?}, {failed} calls failed");
    let metrics = second.metrics()?;
    ensure!(metrics.contains("result=\"ok\""), "{}", tail(&second.log()));
    Ok(())
}
