//! The stage of the second part: two clusters and a kiosk in a shop, each behind a router of its own, with the same
//! addresses inside.

use crate::story::Story;
use anyhow::{Context as _, Result, bail, ensure};
use std::time::Duration;
use tombolo_testkit::{EchoServer, Gateway, Host, Lan, Mesh, MeshOptions, Nginx, Process, Vm, wait_for};

/// In east alone.
pub(crate) const PAYMENTS: &str = "payments.shop.svc.mesh.internal";
/// In both.
pub(crate) const CATALOG: &str = "catalog.shop.svc.mesh.internal";
/// In the shop.
pub(crate) const KIOSK: &str = "kiosk.shop.svc.mesh.internal";
pub(crate) const WAIT: Duration = Duration::from_secs(20);

/// Everything on the stage. Dropped from top to bottom: applications, hosts, then the mesh with its namespaces.
pub(crate) struct Clusters {
    pub(crate) apps: Vec<Nginx>,
    /// A port of payments where a connection can stay open.
    #[allow(dead_code, reason = "kept for its drop")]
    feed: EchoServer,
    /// West: calls.
    pub(crate) web: Vm,
    /// West: catalog.
    pub(crate) cat_w: Vm,
    /// East: payments.
    pub(crate) pay: Vm,
    /// East: catalog.
    pub(crate) cat_e: Vm,
    /// Of west, elsewhere; there from the second scene.
    pub(crate) kiosk: Option<Vm>,
    pub(crate) gw_w: Gateway,
    pub(crate) gw_e1: Gateway,
    pub(crate) gw_e2: Gateway,
    /// West's discovery is the mesh's; the verbs of [`Mesh`] speak to it.
    pub(crate) mesh: Mesh,
    /// East's.
    pub(crate) east: Host,
    #[allow(dead_code, reason = "kept for its drop")]
    east_discovery: Process,
    /// West's, east's, the shop's.
    pub(crate) lans: [Lan; 3],
}

/// A VM and the group that it joins.
struct Member {
    name: &'static str,
    last: u8,
    group: &'static str,
    ports: &'static str,
}

const WEST: [Member; 2] = [
    Member {
        name: "web",
        last: 5,
        group: "webapp",
        ports: "--port http=80:8080",
    },
    Member {
        name: "cat-w",
        last: 6,
        group: "catalog",
        ports: "--port http=80:8080 --export",
    },
];

const EAST: [Member; 2] = [
    Member {
        name: "pay",
        last: 5,
        group: "payments",
        ports: "--port http=80:8080 --port feed=9000 --export",
    },
    Member {
        name: "cat-e",
        last: 6,
        group: "catalog",
        ports: "--port http=80:8080 --export",
    },
];

impl Clusters {
    /// Two clusters that do not know each other yet, and a shop without a VM.
    pub(crate) fn build() -> Result<Self> {
        let options = MeshOptions {
            trust_domain: "west.example".to_owned(),
            ..MeshOptions::default()
        };
        let mut mesh = Mesh::prepare("clusters", options)?;
        let mut lans = [
            mesh.lab.lan("lan-w")?,
            mesh.lab.lan("lan-e")?,
            mesh.lab.lan("shop")?,
        ];
        // Discovery, too, is inside: nothing but gateways has an address on the internet.
        mesh.control = mesh.lab.lan_host(&mut lans[0], "west", 2)?;
        let mut east = mesh.lab.lan_host(&mut lans[1], "east", 2)?;
        mesh.found()?;
        let gw_w = mesh.gateway("gw-w", "", &mut lans[0], 201)?;
        let [web, cat_w] = members(&mut mesh, &mut lans[0], &WEST)?;

        std::mem::swap(&mut mesh.control, &mut east);
        let init = [
            "init",
            "--trust-domain",
            "east.example",
            "--advertise",
            "10.0.0.2:15012",
        ];
        mesh.control.run("tombolo-discovery", &init)?.checked()?;
        let east_discovery = start_discovery(&mesh.control)?;
        let gw_e1 = mesh.gateway("gw-e1", "", &mut lans[1], 201)?;
        let gw_e2 = mesh.gateway("gw-e2", "", &mut lans[1], 202)?;
        let [pay, cat_e] = members(&mut mesh, &mut lans[1], &EAST)?;
        std::mem::swap(&mut mesh.control, &mut east);

        let mut clusters = Self {
            apps: Vec::new(),
            feed: EchoServer::start(&pay.host, "echo", 9000)?,
            web,
            cat_w,
            pay,
            cat_e,
            kiosk: None,
            gw_w,
            gw_e1,
            gw_e2,
            mesh,
            east,
            east_discovery,
            lans,
        };
        for (vm, says) in [
            (&clusters.cat_w, "catalog in west"),
            (&clusters.pay, "payments in east"),
            (&clusters.cat_e, "catalog in east"),
        ] {
            clusters.apps.push(Nginx::start(&vm.host, 8080, says)?);
        }
        Ok(clusters)
    }

    pub(crate) fn kiosk(&self) -> Result<&Vm> {
        self.kiosk.as_ref().context("the kiosk has joined")
    }

    /// All hosts, for a person who wants to enter them.
    pub(crate) fn hosts(&self) -> Vec<&Host> {
        let vms = [&self.web, &self.cat_w, &self.pay, &self.cat_e];
        let gateways = [&self.gw_w, &self.gw_e1, &self.gw_e2];
        [&self.mesh.control, &self.east]
            .into_iter()
            .chain(gateways.map(|gateway| &gateway.host))
            .chain(vms.map(|vm| &vm.host))
            .chain(self.kiosk.as_ref().map(|vm| &vm.host))
            .collect()
    }

    /// What east's discovery says of west, or west's of east.
    pub(crate) fn state(asked: &Host, of: &str) -> Result<String> {
        let listed = asked.run("tombolo", &["cluster", "list"])?.checked()?.stdout;
        let line = listed
            .lines()
            .find(|line| line.split_whitespace().next() == Some(of));
        line.map(str::to_owned)
            .with_context(|| format!("no {of} in\n{listed}"))
    }
}

/// Groups, tokens and `tombolo up`; the hosts join side by side.
fn members(mesh: &mut Mesh, lan: &mut Lan, wanted: &[Member; 2]) -> Result<[Vm; 2]> {
    let mut joining = Vec::new();
    for member in wanted {
        let Member {
            name,
            last,
            group,
            ports,
        } = member;
        mesh.tombolo(&format!(
            "workload-group create {group} -n shop --service-account {group} {ports}"
        ))?;
        joining.push((mesh.bare_in(lan, name, *last)?, mesh.token(group)?));
    }
    std::thread::scope(|scope| {
        let ups: Vec<_> = joining
            .iter()
            .map(|(vm, token)| scope.spawn(move || vm.up(token)))
            .collect();
        ups.into_iter().try_for_each(|up| {
            let joined = up.join().map_err(|_| anyhow::anyhow!("a VM did not join"))?;
            joined.map(drop)
        })
    })?;
    let joined: Vec<Vm> = joining.into_iter().map(|(vm, _)| vm).collect();
    joined.try_into().map_err(|_| anyhow::anyhow!("two VMs"))
}

/// Starts the discovery of a host and waits until it is ready.
fn start_discovery(host: &Host) -> Result<Process> {
    let discovery = host.spawn("tombolo-discovery", &["run"])?;
    wait_for("discovery to be ready", WAIT, || {
        host.sh("curl -sf -m 2 http://127.0.0.1:15021/healthz/ready")?
            .checked()
    })
    .with_context(|| discovery.log())?;
    Ok(discovery)
}

/// Waits until a host gets this answer from a service.
pub(crate) fn answers(from: &Vm, service: &str, wanted: &str) -> Result<()> {
    wait_for(wanted, 2 * WAIT, || {
        let said = from.host.sh(&format!("curl -sS -m 8 http://{service}/"))?;
        ensure!(said.stdout.trim() == wanted, "{}", said.text());
        Ok(())
    })
    .with_context(|| from.agent_log())
}

/// 20 calls as a person would count them; fails unless all of them were answered by one.
pub(crate) fn twenty(story: &Story, from: &Host, service: &str, wanted: &str) -> Result<()> {
    let line = format!("for i in $(seq 20); do curl -sS -m 8 http://{service}/; done | sort | uniq -c");
    let (counted, _) = story.must(from, &line)?;
    if counted.trim() != format!("20 {wanted}") {
        bail!("not all calls were answered by {wanted}: {counted}");
    }
    Ok(())
}
