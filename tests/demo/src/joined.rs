//! Clusters join, a VM that only dials out is called, and a cluster is removed.

use crate::{
    clusters::{Clusters, KIOSK, PAYMENTS, WAIT, answers},
    story::{self, Story},
    wire::{CANARY, Capture},
};
use anyhow::{Context as _, Result, ensure};
use std::{
    process::{Child, Stdio},
    time::Instant,
};
use tombolo_testkit::{Nginx, Vm, wait_for};

/// The first line of a host's log with this caller.
fn caller_at(callee: &Vm, principal: &str) -> Result<String> {
    wait_for("the access log", WAIT, || {
        let found = callee
            .host
            .sh(&format!("grep -h '{principal}' /var/log/tombolo/agent.log"))?;
        let line = found.stdout.lines().last().map(str::to_owned);
        line.context("the caller is not in the log yet")
    })
    .with_context(|| callee.agent_log())
}

/// Two clusters become one mesh.
pub(crate) fn join(story: &mut Story) -> Result<Clusters> {
    story.step("Two clusters with the same 10.0.0.0/24 inside are joined by two commands");
    let begun = Instant::now();
    let stage = Clusters::build()?;
    for line in [
        "        trust domain   10.0.0.2    10.0.0.5   10.0.0.6   gateways, on the internet too",
        "  west  west.example   discovery   web        cat-w      gw-w",
        "  east  east.example   discovery   pay        cat-e      gw-e1, gw-e2",
        "Each is behind a router that masquerades, lets nothing in, and nothing out but to port 443. The internet reaches",
        "port 443 of the gateways and nothing else.",
    ] {
        story.say(line);
    }
    story.say(&format!(
        "They were made as in scene 1; gateways by tombolo token create --gateway, tombolo-gateway join ({})",
        story::time(begun.elapsed())
    ));
    let url = format!("http://{PAYMENTS}/");
    let (before, _) = story.type_on(&stage.web.host, &format!("curl -sS -m 5 {url}"))?;
    ensure!(
        !before.ok(),
        "payments must be unknown in west before they are joined"
    );
    let begun = Instant::now();
    let invite = story.secret(
        &stage.mesh.control,
        "tombolo cluster invite east --trust-domain east.example --namespaces shop",
    )?;
    let joining = Instant::now();
    story.must(&stage.east, &format!("tombolo cluster join {invite} --yes"))?;
    let joined = begun.elapsed();
    answers(&stage.web, PAYMENTS, "payments in east")?;
    let called = joining.elapsed();
    story.must(&stage.web.host, &format!("curl -sS -m 5 {url}"))?;
    let principal = "spiffe://west.example/ns/shop/sa/webapp";
    let line = caller_at(&stage.pay, principal)?;
    story.say(&format!("the log of pay: {}", story::logged(&line)));
    story.result("a cluster joins (invite + join)", "2 commands, 0 files", joined);
    story.result(
        "10.0.0.5 in west calls 10.0.0.5 in east by name",
        "answered, counted from the join",
        called,
    );
    story.holds("the callee in east sees", principal);
    Ok(stage)
}

/// A VM behind NAT is a full member.
pub(crate) fn kiosk(story: &mut Story, stage: &mut Clusters) -> Result<()> {
    story.step("A kiosk in a shop, behind NAT with no port open, joins by one command and is called");
    let Clusters { mesh, lans, .. } = stage;
    let vm = mesh.bare_in(&mut lans[2], "kiosk", 5)?;
    stage
        .apps
        .push(Nginx::start(&vm.host, 8080, "kiosk in the shop")?);
    story.must(
        &mesh.control,
        "tombolo workload-group create kiosk -n shop --service-account kiosk --port http=80:8080 --outbound --export",
    )?;
    let token = story.secret(
        &mesh.control,
        "tombolo token create -n shop --workload-group kiosk",
    )?;
    let (_, joined) = story.must(&vm.host, &format!("tombolo up {token}"))?;
    // From the internet there is no way in.
    let outside = lans[2].address();
    let (knocked, _) = story.type_on(
        &stage.gw_w.host,
        &format!("curl -sS -m 1 https://{outside}:15008/   # the shop's address on the internet"),
    )?;
    ensure!(!knocked.ok(), "the shop's router must let nobody in");
    let capture = Capture::start(stage.gw_w.host.command("tcpdump"), stage.gw_w.host.dir())?;
    answers(&stage.pay, KIOSK, "kiosk in the shop")?;
    let url = format!("http://{KIOSK}");
    let (_, call) = story.must(&stage.pay.host, &format!("curl -sS -m 5 {url}/"))?;
    let echo = format!("curl -sS -m 5 -H 'X-Canary: {CANARY}' {url}/echo");
    let (echoed, _) = story.must(&stage.pay.host, &echo)?;
    ensure!(
        echoed.contains(CANARY),
        "the kiosk must see the canary (positive control)"
    );
    let captured = capture.finish()?;
    let principal = "spiffe://east.example/ns/shop/sa/payments";
    let line = caller_at(&vm, principal)?;
    story.say(&format!("the log of kiosk: {}", story::logged(&line)));
    stage.kiosk = Some(vm);
    story.result("a VM behind NAT joins", "1 command on it, no port open", joined);
    story.result("it is called from the other cluster", "answered", call);
    story.holds("the kiosk sees", principal);
    story.holds(
        &format!("canary at gateway gw-w ({} KB captured)", captured / 1000),
        "0 times; at the applications it is there",
    );
    Ok(())
}

/// A program that is not left behind.
struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Removal cuts.
pub(crate) fn remove(story: &mut Story, stage: &Clusters) -> Result<()> {
    story.step("East is removed: what is open is cut, its names are gone");
    let mut open = stage.web.host.command("tombolo-peer");
    open.args(["call", "drip", PAYMENTS, "9000", "20"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut open = Held(open.spawn()?);
    story.say(&format!(
        "web$ a connection to {PAYMENTS}:9000 that stays open, a byte each way every 20 ms"
    ));
    wait_for("the connection at payments", WAIT, || {
        let seen = stage.pay.host.sh("ss -Htn state established sport = 9000")?;
        ensure!(!seen.stdout.trim().is_empty(), "not yet");
        Ok(())
    })?;
    ensure!(open.0.try_wait()?.is_none(), "the connection must be open");
    let removing = Instant::now();
    story.must(&stage.mesh.control, "tombolo cluster remove east --yes")?;
    let ended = wait_for("the cut", WAIT, || open.0.try_wait()?.context("it is open"))?;
    let cut = removing.elapsed();
    ensure!(!ended.success(), "the application must notice the cut");
    story.result("open connection to the removed cluster", "cut", cut);
    wait_for("the end of the name", WAIT, || {
        let said = stage.web.host.sh(&format!("curl -sS -m 2 http://{PAYMENTS}/"))?;
        ensure!(!said.ok(), "{}", said.text());
        Ok(())
    })?;
    let (after, _) = story.type_on(&stage.web.host, &format!("curl -sS -m 5 http://{PAYMENTS}/"))?;
    ensure!(!after.ok(), "payments must be gone");
    let (trust, _) = story.must(&stage.mesh.control, "tombolo trust show")?;
    ensure!(!trust.contains("east.example"), "its roots must be withdrawn");
    story.result(
        "the name, and the roots of east in west",
        "gone",
        removing.elapsed(),
    );
    Ok(())
}
