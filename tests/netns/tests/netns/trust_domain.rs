//! The trust domain is renamed while hosts call each other, directly and through gateways, and nobody notices.

use crate::{
    PATIENCE,
    gateway::{Site, answers, pair, serve},
    needs_root,
    trust::Load,
};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::time::Duration;
use tombolo_testkit::{Vm, wait_for};

const OLD: &str = "mesh.example";
const NEW: &str = "new.example";

fn shown(site: &Site) -> Result<Value> {
    Ok(serde_json::from_str(&site.mesh.tombolo("trust show -o json")?)?)
}

fn step(site: &Site) -> Result<String> {
    let shown = shown(site)?;
    Ok(shown["migration"]["step"].as_str().unwrap_or_default().to_owned())
}

/// What is in the way of the next step.
fn blockers(site: &Site) -> Result<Vec<String>> {
    let shown = shown(site)?;
    let list = shown["migration"]["blockers"].as_array().context("blockers")?;
    let who = list
        .iter()
        .map(|one| one["who"].as_str().unwrap_or_default().to_owned());
    Ok(who.collect())
}

fn until_blocked_by(site: &Site, wanted: &[&str]) -> Result<()> {
    wait_for(&format!("to be blocked by {wanted:?} alone"), PATIENCE, || {
        let found = blockers(site)?;
        let all = wanted.iter().all(|one| found.iter().any(|who| who.contains(one)));
        ensure!(found.len() == wanted.len() && all, "{found:?}");
        Ok(())
    })
}

/// A step, with discovery killed before, while, or right after it is made.
fn killed_around(site: &mut Site, verb: &str, wanted: &str) -> Result<()> {
    let line = format!("trust migrate {verb} --yes");
    for delay in [4, 23] {
        if !verb.contains("--force") {
            until_blocked_by(site, &[])?;
        }
        let args: Vec<&str> = line.split(' ').collect();
        let mut asking = site.mesh.control.spawn("tombolo", &args)?;
        std::thread::sleep(Duration::from_millis(delay));
        site.mesh.kill_discovery();
        // Whoever asks looks for the new discovery, if it was answered before.
        site.mesh.start_discovery()?;
        asking.wait(PATIENCE);
        if step(site)? == wanted {
            return Ok(());
        }
    }
    if !verb.contains("--force") {
        until_blocked_by(site, &[])?;
    }
    // Killed too early each time: undisturbed now, and killed after.
    wait_for(verb, PATIENCE, || site.mesh.tombolo(&line).map(drop))?;
    site.mesh.kill_discovery();
    site.mesh.start_discovery()?;
    ensure!(step(site)? == wanted, "{}", step(site)?);
    Ok(())
}

/// Who a host says that it is.
fn identity(vm: &Vm) -> Result<String> {
    let line = "openssl x509 -noout -ext subjectAltName -in /var/lib/tombolo/agent/identity.pem | grep -o 'spiffe:[^,]*'";
    Ok(vm.host.sh(line)?.checked()?.stdout.trim().to_owned())
}

fn until_named(vm: &Vm, name: &str) -> Result<()> {
    wait_for("a certificate of the other name", PATIENCE, || {
        let id = identity(vm)?;
        ensure!(id.starts_with(&format!("spiffe://{name}/ns/shop/sa/")), "{id}");
        let file = vm
            .host
            .sh("cat /var/lib/tombolo/agent/registration.json")?
            .checked()?;
        ensure!(
            file.stdout.contains(&format!("\"trust_domain\": \"{name}\"")),
            "{}",
            file.stdout
        );
        Ok(())
    })
}

/// `name` takes calls of front and late alone, which the policy calls by a name of the trust domain.
fn admits(site: &Site, name: &str, trust_domain: &str) -> Result<()> {
    site.mesh.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
         selector: {{matchLabels: {{app: {name}}}}}\n  \
         rules: [{{from: [{{source: {{principals: [{trust_domain}/ns/shop/sa/front, {trust_domain}/ns/shop/sa/late]}}}}]}}]\n"
    ))?;
    Ok(())
}

#[test]
fn the_trust_domain_is_renamed_under_load() -> Result<()> {
    needs_root!();
    let (front, back, far, mut site) = pair("renamed")?;
    site.group("near", "", "")?;
    let near = site.vm(true, "near", 6)?;
    site.group("late", "", "")?;
    let late = site.vm(true, "late", 7)?;
    let _servers = (
        serve(&near, "near")?,
        serve(&back, "back")?,
        serve(&late, "late")?,
    );
    admits(&site, "near", OLD)?;
    answers(&front, "near", &site.gateway)?;
    answers(&front, "back", &far)?;
    answers(&late, "back", &far)?;
    let old_token = site.mesh.token("late")?;
    ensure!(identity(&front)? == format!("spiffe://{OLD}/ns/shop/sa/front"));
    // It sleeps from before the start until after the end.
    late.host.run("tombolo", &["down"])?.checked()?;
    // A discovery that has just started waits 20 s for whom it knows: here the sleeper does not come.
    let grace = "echo 'start_grace: 1s' >> /etc/tombolo/discovery.yaml";
    site.mesh.control.sh(grace)?.checked()?;

    let calls = [
        ("load", "near"),
        ("keep", "near"),
        ("load", "back"),
        ("keep", "back"),
    ];
    let load = calls.map(|(mode, to)| Load::start(&front, mode, to));
    let load = load.into_iter().collect::<Result<Vec<_>>>()?;
    // There and back, by a discovery that nobody kills.
    site.mesh.tombolo(&format!("trust migrate start {NEW} --yes"))?;
    let refused = site.mesh.tombolo("trust migrate finish --yes").unwrap_err();
    ensure!(format!("{refused:#}").contains("TMB0801"), "{refused:#}");
    let refused = site.mesh.tombolo("trust rotate start --yes").unwrap_err();
    ensure!(format!("{refused:#}").contains("TMB0801"), "{refused:#}");
    site.mesh.tombolo("trust migrate abort --yes")?;
    ensure!(step(&site)? == "steady" && shown(&site)?["trustDomain"] == OLD);

    killed_around(&mut site, &format!("start {NEW}"), "started")?;
    until_blocked_by(&site, &[])?;
    // One policy names the old name, the other one the new name: each means both.
    admits(&site, "back", NEW)?;
    killed_around(&mut site, "switch", "switched")?;
    for vm in [&front, &near, &back] {
        until_named(vm, NEW)?;
    }
    // A token of before still works, and whoever comes by it has the new name.
    let newcomer = site.mesh.bare_in(&mut site.east, "newcomer", 8)?;
    newcomer.up(&old_token)?;
    until_named(&newcomer, NEW)?;
    until_blocked_by(&site, &["shop/late", "AuthorizationPolicy shop/near"])?;
    let refused = site.mesh.tombolo("trust migrate finish --yes").unwrap_err();
    ensure!(format!("{refused:#}").contains("TMB0802"), "{refused:#}");
    admits(&site, "near", NEW)?;
    until_blocked_by(&site, &["shop/late"])?;

    killed_around(&mut site, "finish --force", "steady")?;
    let names = shown(&site)?;
    ensure!(
        names["trustDomain"] == NEW && names["former"][0] == OLD,
        "{names}"
    );
    // Its certificate is in its time and nobody believes it: its device key brings it back.
    late.host.run("tombolo", &["up"])?;
    until_named(&late, NEW)?;
    answers(&late, "near", &site.gateway)?;
    answers(&newcomer, "back", &far)?;
    let mut requests = 0;
    for one in load {
        requests += one.end()?;
    }
    println!("{requests} requests, none failed");
    ensure!(requests > 2000, "{requests} requests");
    let audit = site.mesh.tombolo("audit")?;
    for verb in [
        "migrate-start new.example",
        "migrate-abort",
        "migrate-switch",
        "migrate-finish",
    ] {
        ensure!(audit.contains(verb), "{verb} is not in the audit log");
    }
    Ok(())
}
