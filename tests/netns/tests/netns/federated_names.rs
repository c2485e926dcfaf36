//! A member of a set of clusters renames its trust domain while the clusters call each other through their gateways.

use crate::{
    PATIENCE,
    federation::{Clusters, EAST, WEST, serve},
    needs_root,
    trust::Load,
};
use anyhow::{Result, ensure};
use serde_json::Value;
use tombolo_testkit::wait_for;

const OLD: &str = "east.example";
const NEW: &str = "new.example";

/// A step in the east, as soon as nobody is in its way.
fn step(clusters: &mut Clusters, verb: &str, wanted: &str) -> Result<()> {
    let line = format!("trust migrate {verb} --yes");
    wait_for(verb, PATIENCE, || clusters.tombolo(EAST, &line).map(drop))?;
    wait_for(wanted, PATIENCE, || {
        let shown: Value = serde_json::from_str(&clusters.tombolo(EAST, "trust show -o json")?)?;
        ensure!(shown["migration"]["step"] == wanted, "{}", shown["migration"]);
        Ok(())
    })
}

/// Names of east's trust domain, as west has them.
fn names(clusters: &mut Clusters) -> Result<(String, Vec<String>, bool)> {
    let listed: Value = serde_json::from_str(&clusters.tombolo(WEST, "cluster list -o json")?)?;
    let all = listed["clusters"].as_array().cloned().unwrap_or_default();
    let east = all.iter().find(|cluster| cluster["name"] == "east");
    let east = east.cloned().unwrap_or_default();
    let also = east["alsoTrustDomains"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let connected = east["connected"] == true;
    Ok((
        text(&east["trustDomain"]),
        also.iter().map(text).collect(),
        connected,
    ))
}

fn until_named(clusters: &mut Clusters, first: &str, also: &[&str]) -> Result<()> {
    wait_for("west to know the names", PATIENCE, || {
        let (found, others, connected) = names(clusters)?;
        ensure!(
            found == first && others == also && connected,
            "{found} {others:?} {connected}"
        );
        Ok(())
    })
}

#[test]
fn a_member_renames_its_trust_domain_under_load() -> Result<()> {
    needs_root!();
    let mut clusters = Clusters::start("fedname")?;
    let _servers = (
        serve(&clusters.vms[WEST], "front")?,
        serve(&clusters.vms[EAST], "back")?,
    );
    clusters.join()?;
    clusters.answers(WEST, "back")?;
    clusters.answers(EAST, "front")?;

    // The others must know first, and only west may tell them.
    let refused = clusters
        .tombolo(EAST, &format!("trust migrate start {NEW} --yes"))
        .unwrap_err();
    let refused = format!("{refused:#}");
    let command = format!("tombolo cluster grant east --trust-domain {NEW}");
    ensure!(
        refused.contains("TMB0729") && refused.contains(&command),
        "{refused}"
    );
    let own_word = format!("cluster grant east --trust-domain {NEW} --yes");
    let refused = format!("{:#}", clusters.tombolo(EAST, &own_word).unwrap_err());
    ensure!(refused.contains("TMB0707"), "{refused}");

    let (front, back) = (&clusters.vms[WEST], &clusters.vms[EAST]);
    let mut load = Vec::new();
    for (from, to) in [(front, "back"), (back, "front")] {
        for mode in ["load", "keep"] {
            load.push(Load::start(from, mode, to)?);
        }
    }
    clusters.tombolo(WEST, &own_word)?;
    until_named(&mut clusters, OLD, &[NEW])?;
    step(&mut clusters, &format!("start {NEW}"), "started")?;
    step(&mut clusters, "switch", "switched")?;
    wait_for("a caller of the new name", PATIENCE, || {
        let line = "grep -c 'src_identity=\"spiffe://new.example/ns/shop/sa/back' /var/log/tombolo/agent.log";
        clusters.vms[WEST].host.sh(line)?.checked().map(drop)
    })?;
    // While it is believed there the name is not taken away.
    let drop_old = format!("cluster grant east --drop-trust-domain {OLD} --yes");
    let refused = format!("{:#}", clusters.tombolo(WEST, &drop_old).unwrap_err());
    ensure!(refused.contains("TMB0728"), "{refused}");
    step(&mut clusters, "finish", "steady")?;
    wait_for("west to hear that it is done", PATIENCE, || {
        clusters.tombolo(WEST, &drop_old).map(drop)
    })?;
    until_named(&mut clusters, NEW, &[])?;
    clusters.answers(WEST, "back")?;
    clusters.answers(EAST, "front")?;
    let trust = clusters.tombolo(WEST, "trust show")?;
    ensure!(trust.contains(NEW) && !trust.contains(OLD), "{trust}");
    let mut requests = 0;
    for one in load {
        requests += one.end()?;
    }
    println!("{requests} requests, none failed");
    ensure!(requests > 500, "{requests} requests");
    Ok(())
}
