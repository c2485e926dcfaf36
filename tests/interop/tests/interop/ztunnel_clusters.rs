//! An unmodified ztunnel and the services of another cluster, which has another trust domain.

use crate::{
    PATIENCE,
    site::{Captured, Place, deny, group, service, tail, url, ztunnel},
};
use anyhow::{Context as _, Result, ensure};
use tombolo_testkit::{Gateway, Host, Lan, Mesh, MeshOptions, Nginx, Process, Vm, require_root, wait_for};

/// Two discoveries in one lab: that of `mesh` is west, the other one east.
struct Clusters {
    back: Vm,
    _server: Nginx,
    gateways: [Gateway; 2],
    _discovery: Process,
    mesh: Mesh,
    east: Host,
    west_lan: Lan,
}

fn ready(host: &Host) -> Result<()> {
    wait_for("discovery to be ready", PATIENCE, || {
        host.sh("curl -sf -m 2 http://127.0.0.1:15021/healthz/ready")?
            .checked()
    })
    .map(drop)
}

impl Clusters {
    fn start() -> Result<Self> {
        let options = MeshOptions {
            trust_domain: "west.example".into(),
            ..MeshOptions::default()
        };
        let mut mesh = Mesh::start("zt-clusters", options)?;
        let mut east = mesh.lab.host("discovery2")?;
        let advertise = east.at(15012);
        let init = "init --trust-domain east.example --advertise";
        let mut init: Vec<&str> = init.split(' ').collect();
        init.push(&advertise);
        east.run("tombolo-discovery", &init)?.checked()?;
        let discovery = east.spawn("tombolo-discovery", &["run"])?;
        ready(&east)?;
        let (mut west_lan, mut east_lan) = (mesh.lab.lan("west")?, mesh.lab.lan("east")?);
        let west_gateway = mesh.gateway("gw-west", "", &mut west_lan, 201)?;
        std::mem::swap(&mut mesh.control, &mut east);
        let east_gateway = mesh.gateway("gw-east", "", &mut east_lan, 201)?;
        mesh.apply(&group("back", ""))?;
        let back = mesh.bare_in(&mut east_lan, "back", 5)?;
        back.up(&mesh.token("back")?)?;
        std::mem::swap(&mut mesh.control, &mut east);
        let server = Nginx::start(&back.host, 8080, "back speaks")?;
        let invite = mesh.tombolo("cluster invite east --trust-domain east.example --namespaces shop")?;
        let join = ["cluster", "join", invite.trim(), "--yes"];
        east.run("tombolo", &join)?.checked()?;
        Ok(Self {
            back,
            _server: server,
            gateways: [west_gateway, east_gateway],
            _discovery: discovery,
            mesh,
            east,
            west_lan,
        })
    }

    fn captured(&mut self, program: &std::path::Path, name: &str, last: u8, token: &str) -> Result<Captured> {
        let place = Place {
            name,
            network: "",
            last,
            way: &self.gateways[0].host,
            trust_domain: "west.example",
            token,
        };
        Captured::start(program, &mut self.mesh, &mut self.west_lan, &place)
    }

    fn in_east(&self, line: &str) -> Result<String> {
        let words: Vec<&str> = line.split(' ').collect();
        Ok(self.east.run("tombolo", &words)?.checked()?.stdout)
    }
}

#[test]
fn ztunnel_and_another_trust_domain() -> Result<()> {
    if !require_root("interop") {
        return Ok(());
    }
    let Some(program) = ztunnel() else {
        return Ok(());
    };
    let mut clusters = Clusters::start()?;
    // With a token of its own trust domain alone it sees the service and does not believe its gateway.
    let narrow = clusters.captured(&program, "narrow", 6, "")?;
    let back = narrow.vip(&service("back"))?;
    wait_for("ztunnel to name the unknown root", PATIENCE, || {
        ensure!(!narrow.get(&back)?.ok());
        let log = narrow.log();
        ensure!(log.contains("UnknownIssuer"), "{}", tail(&log));
        Ok(())
    })?;
    // With all roots it calls, and is seen as who it is.
    let wide = clusters.captured(&program, "wide", 7, " --all-roots")?;
    wide.answers(&back, "back")?;
    wait_for("the caller's identity", PATIENCE, || {
        let log = clusters.back.agent_log();
        let seen = log.contains("west.example/ns/shop/sa/wide") && !log.contains("sa/gateway");
        ensure!(seen, "{}", tail(&log));
        Ok(())
    })?;
    clusters
        .east
        .write("/run/apply.yaml", &deny("back", "west.example/ns/shop/sa/wide"))?;
    clusters.in_east("apply -f /run/apply.yaml")?;
    wait_for("the refusal", PATIENCE, || {
        ensure!(!wide.get(&back)?.ok(), "still answered");
        Ok(())
    })?;
    // The other way ztunnel takes callers of its own trust domain alone, whatever roots it has.
    wait_for("the import", PATIENCE, || {
        let why = clusters
            .back
            .host
            .run("tombolo", &["why", &format!("{}:80", service("wide"))])?;
        ensure!(why.text().contains("TMB"), "{}", why.text());
        Ok(())
    })?;
    wait_for("ztunnel to name the trust domain", PATIENCE, || {
        ensure!(!clusters.back.curl(&url("wide"))?.ok(), "answered");
        let log = wide.log();
        let named = log.contains("SanTrustDomainError") && log.contains("east.example");
        ensure!(named, "{}", tail(&log));
        Ok(())
    })
    .context("a caller of another trust domain")
}
