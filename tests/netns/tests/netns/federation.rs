//! Clusters that are joined: each with its own trust domain and the same addresses inside, behind a gateway.

use crate::{PATIENCE, needs_root, trust::is_believed};
use anyhow::{Context as _, Result, ensure};
use std::time::{Duration, Instant};
use tombolo_testkit::{Gateway, Host, Lan, Mesh, MeshOptions, Nginx, Process, Vm, wait_for};

/// Two discoveries in one lab; the verbs of [`Mesh`] speak to the one that is chosen.
pub(crate) struct Clusters {
    pub(crate) vms: Vec<Vm>,
    pub(crate) gateways: Vec<Gateway>,
    east_discovery: Process,
    east_domain: String,
    pub(crate) mesh: Mesh,
    /// The discovery that is not chosen.
    other: Host,
    lans: Vec<Lan>,
}

pub(crate) const WEST: usize = 0;
pub(crate) const EAST: usize = 1;

const MESH_DOMAIN: &str = "mesh.internal";

pub(crate) fn service(name: &str) -> String {
    format!("{name}.shop.svc.{MESH_DOMAIN}")
}

pub(crate) fn url(name: &str) -> String {
    format!("http://{}/", service(name))
}

pub(crate) fn serve(vm: &Vm, name: &str) -> Result<Nginx> {
    Nginx::start(&vm.host, 8080, &format!("{name} speaks"))
}

impl Clusters {
    /// West and east: in each a gateway, and a VM 10.0.0.5 with a service that is exported.
    pub(crate) fn start(name: &str) -> Result<Self> {
        Self::start_with(name, MESH_DOMAIN)
    }

    /// The same with another mesh domain in the east.
    fn start_with(name: &str, east_domain: &str) -> Result<Self> {
        let options = MeshOptions {
            trust_domain: "west.example".into(),
            mesh_domains: vec![MESH_DOMAIN.into(), east_domain.into()],
            ..MeshOptions::default()
        };
        let mut mesh = Mesh::start(name, options)?;
        let other = mesh.lab.host("discovery2")?;
        let advertise = other.at(15012);
        let init = [
            "init",
            "--trust-domain",
            "east.example",
            "--mesh-domain",
            east_domain,
            "--advertise",
            &advertise,
        ];
        other.run("tombolo-discovery", &init)?.checked()?;
        let east_discovery = other.spawn("tombolo-discovery", &["run"])?;
        ready(&other)?;
        let lans = vec![mesh.lab.lan("west")?, mesh.lab.lan("east")?];
        let mut made = Self {
            vms: Vec::new(),
            gateways: Vec::new(),
            east_discovery,
            east_domain: east_domain.to_owned(),
            mesh,
            other,
            lans,
        };
        for (at, vm, gateway) in [(WEST, "front", "gw-west"), (EAST, "back", "gw-east")] {
            made.on(at, |mesh, lan| {
                let gateway = mesh.gateway(gateway, "", lan, 201)?;
                let domain = if at == EAST { east_domain } else { MESH_DOMAIN };
                mesh.apply(&group(vm).replace(MESH_DOMAIN, domain))?;
                let host = mesh.bare_in(lan, vm, 5)?;
                host.up(&mesh.token(vm)?)?;
                Ok((host, gateway))
            })
            .map(|(host, gateway)| {
                made.vms.push(host);
                made.gateways.push(gateway);
            })?;
        }
        Ok(made)
    }

    pub(crate) fn on<T>(
        &mut self,
        at: usize,
        verb: impl FnOnce(&mut Mesh, &mut Lan) -> Result<T>,
    ) -> Result<T> {
        if at == EAST {
            std::mem::swap(&mut self.mesh.control, &mut self.other);
        }
        let result = verb(&mut self.mesh, &mut self.lans[at]);
        if at == EAST {
            std::mem::swap(&mut self.mesh.control, &mut self.other);
        }
        result
    }

    pub(crate) fn tombolo(&mut self, at: usize, line: &str) -> Result<String> {
        self.on(at, |mesh, _| mesh.tombolo(line))
    }

    /// True if the gateway there takes the certificate of the host in the west.
    fn foreigner_is_believed(&self, at: usize) -> Result<bool> {
        let gateway = self.gateways[at].host.address().to_string();
        is_believed(
            &self.vms[WEST],
            "/var/lib/tombolo/agent/identity.pem",
            (&gateway, 443),
        )
    }

    /// The one command on each side.
    pub(crate) fn join(&mut self) -> Result<Duration> {
        let invite = "cluster invite east --trust-domain east.example --namespaces shop";
        let token = self.tombolo(WEST, invite)?;
        let begun = Instant::now();
        let told = self.tombolo(EAST, &format!("cluster join {} --yes", token.trim()))?;
        ensure!(told.contains("Joined"), "{told}");
        Ok(begun.elapsed())
    }

    fn state(&mut self, at: usize, of: &str) -> Result<String> {
        let listed = self.tombolo(at, "cluster list --removed -o json")?;
        let listed: serde_json::Value = serde_json::from_str(&listed)?;
        let all = listed["clusters"].as_array().context("no list")?;
        let found = all.iter().find(|cluster| cluster["name"] == of);
        let state = found.and_then(|cluster| cluster["state"].as_str());
        Ok(state.unwrap_or_default().to_owned())
    }

    /// What a caller of a cluster calls a service, wherever that is.
    fn url_at(&self, at: usize, name: &str) -> String {
        let domain = if at == EAST {
            &self.east_domain
        } else {
            MESH_DOMAIN
        };
        url(name).replace(MESH_DOMAIN, domain)
    }

    pub(crate) fn answers(&self, at: usize, name: &str) -> Result<()> {
        let (from, url) = (&self.vms[at], self.url_at(at, name));
        let body = wait_for(&url, PATIENCE, || Ok(from.curl(&url)?.checked()?.stdout));
        let logs = || {
            let of = |gateway: &Gateway| tail(&gateway.log());
            let gateways: Vec<String> = self.gateways.iter().map(of).collect();
            format!(
                "{}\n--- gateways\n{}",
                tail(&from.agent_log()),
                gateways.join("\n---\n")
            )
        };
        let body = body.with_context(logs)?;
        ensure!(body == format!("{name} speaks\n"), "{body}");
        Ok(())
    }
}

fn ready(host: &Host) -> Result<()> {
    wait_for("discovery to be ready", PATIENCE, || {
        host.sh("curl -sf -m 2 http://127.0.0.1:15021/healthz/ready")?
            .checked()
    })
    .map(drop)
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

pub(crate) fn group(name: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata:\n  name: {name}\n  namespace: shop\n  \
         annotations: {{tombolo.io/address-cidrs: 10.0.0.0/24}}\nspec:\n  template:\n    serviceAccount: {name}\n    \
         labels: {{app: {name}}}\n    ports: {{http: 8080}}\n---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
         metadata: {{name: {name}, namespace: shop, labels: {{istio.io/global: 'true'}}}}\nspec:\n  hosts: [{host}]\n  \
         location: MESH_INTERNAL\n  resolution: STATIC\n  \
         ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}]\n  workloadSelector: {{labels: {{app: {name}}}}}\n",
        host = service(name)
    )
}

#[test]
fn two_clusters_join_call_and_part() -> Result<()> {
    needs_root!();
    // Each side calls the other's services by its own mesh domain.
    let mut clusters = Clusters::start_with("federation", "east.internal")?;
    let _servers = (
        serve(&clusters.vms[WEST], "front")?,
        serve(&clusters.vms[EAST], "back")?,
    );
    // Until then the gateway takes nobody of the other trust domain.
    let own = clusters.foreigner_is_believed(WEST)?;
    ensure!(own, "a member is not believed by its own gateway");
    ensure!(!clusters.foreigner_is_believed(EAST)?, "a stranger is believed");
    let took = clusters.join()?;
    println!("joined in {took:?}");
    clusters.answers(WEST, "back")?;
    clusters.answers(EAST, "front")?;
    ensure!(
        clusters.foreigner_is_believed(EAST)?,
        "a member of the set is not believed"
    );
    // Who called is what the callee sees: the principal of the other trust domain, not the gateway.
    for (at, caller) in [
        (EAST, "west.example/ns/shop/sa/front"),
        (WEST, "east.example/ns/shop/sa/back"),
    ] {
        wait_for(caller, PATIENCE, || {
            let log = clusters.vms[at].agent_log();
            ensure!(log.contains(caller) && !log.contains("sa/gateway"), "{log}");
            Ok(())
        })?;
    }
    // A policy names the principal of the other one.
    clusters.on(EAST, |mesh, _| {
        mesh.apply(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-front, namespace: shop}\nspec:\n  \
             action: DENY\n  selector: {matchLabels: {app: back}}\n  \
             rules: [{from: [{source: {principals: [west.example/ns/shop/sa/front]}}]}]\n",
        )
    })?;
    wait_for("the refusal", PATIENCE, || {
        ensure!(!clusters.vms[WEST].curl(&url("back"))?.ok());
        Ok(())
    })?;
    clusters.tombolo(EAST, "delete ap no-front -n shop")?;
    clusters.answers(WEST, "back")?;

    // A discovery dies: calls go on, and the other side says how old its word is.
    clusters.east_discovery.kill();
    wait_for("east to be stale", PATIENCE, || {
        ensure!(clusters.state(WEST, "east")? == "Stale");
        Ok(())
    })?;
    for _ in 0..5 {
        clusters.answers(WEST, "back")?;
        clusters.answers(EAST, "front")?;
    }
    clusters.east_discovery = clusters.other.spawn("tombolo-discovery", &["run"])?;
    ready(&clusters.other)?;
    wait_for("east to be back", PATIENCE, || {
        ensure!(clusters.state(WEST, "east")? == "Connected");
        Ok(())
    })?;

    // Removed: its name is gone, and a call that is under way is cut.
    let host = service("back");
    let script = format!(
        "exec 3<>/dev/tcp/{host}/80 && echo up > /run/call && cat <&3 > /dev/null; echo ended > /run/call"
    );
    let _call = clusters.vms[WEST].host.spawn("bash", &["-c", &script])?;
    let call_is = |clusters: &Clusters, wanted: &str| {
        wait_for(wanted, PATIENCE, || {
            let said = clusters.vms[WEST].host.sh("cat /run/call")?.stdout;
            ensure!(said.trim() == wanted, "{said}");
            Ok(())
        })
    };
    call_is(&clusters, "up")?;
    let begun = Instant::now();
    clusters.tombolo(WEST, "cluster remove east --yes")?;
    call_is(&clusters, "ended")?;
    println!(
        "a call that was open ended {:?} after the removal",
        begun.elapsed()
    );
    for (at, name) in [(WEST, "back"), (EAST, "front")] {
        wait_for("no call", PATIENCE, || {
            ensure!(!clusters.vms[at].curl(&clusters.url_at(at, name))?.ok());
            Ok(())
        })?;
    }
    wait_for("the gateway to believe it no more", PATIENCE, || {
        ensure!(!clusters.foreigner_is_believed(EAST)?);
        Ok(())
    })?;
    let trust = clusters.tombolo(WEST, "trust show")?;
    ensure!(!trust.contains("east.example"), "{trust}");
    Ok(())
}
