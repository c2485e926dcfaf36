//! Two networks of one mesh with the same addresses inside, each behind a gateway; discovery is reached through the
//! first one.

use crate::PATIENCE;
use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;
use tombolo_testkit::{Gateway, Host, Lan, Mesh, MeshOptions, Nginx, Process, Vm, skip, wait_for};

/// Where our agent keeps its key.
pub(crate) const AGENT: &str = "/var/lib/tombolo/agent";
/// Where our gateway does.
pub(crate) const GATEWAY: &str = "/var/lib/tombolo/gateway";

/// The real one, unless the environment names none.
pub(crate) fn ztunnel() -> Option<PathBuf> {
    let named = std::env::var_os("TOMBOLO_ZTUNNEL").map(PathBuf::from);
    let found = named.filter(|path| path.exists());
    if found.is_none() {
        skip("ztunnel", "TOMBOLO_ZTUNNEL=/path names no ztunnel");
    }
    found
}

pub(crate) fn service(name: &str) -> String {
    format!("{name}.shop.svc.mesh.internal")
}

pub(crate) fn url(name: &str) -> String {
    format!("http://{}/", service(name))
}

pub(crate) fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// A service that selects workloads by its name: 80 to 8080, told to other clusters.
pub(crate) fn service_entry(name: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop, \
         labels: {{istio.io/global: 'true'}}}}\nspec:\n  hosts: [{host}]\n  location: MESH_INTERNAL\n  \
         resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}]\n  \
         workloadSelector: {{labels: {{app: {name}}}}}\n",
        host = service(name)
    )
}

/// The group of our agents in a network, with its service.
pub(crate) fn group(name: &str, network: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata:\n  name: {name}\n  namespace: shop\n  \
         annotations: {{tombolo.io/address-cidrs: 10.0.0.0/24}}\nspec:\n  template:\n    serviceAccount: {name}\n    \
         network: '{network}'\n    labels: {{app: {name}}}\n    ports: {{http: 8080}}\n---\n{}",
        service_entry(name)
    )
}

pub(crate) fn deny(at: &str, caller: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: no-caller, namespace: shop}}\n\
         spec:\n  action: DENY\n  selector: {{matchLabels: {{app: {at}}}}}\n  \
         rules: [{{from: [{{source: {{principals: [{caller}]}}}}]}}]\n"
    )
}

/// A mesh in two networks: east is discovery's own (""), west is net2.
pub(crate) struct Site {
    /// 10.0.0.5 in the east: calls.
    pub(crate) front: Vm,
    /// 10.0.0.5 in the west: is called.
    pub(crate) back: Vm,
    _servers: (Nginx, Nginx),
    pub(crate) west_gateway: Gateway,
    pub(crate) east_gateway: Gateway,
    pub(crate) mesh: Mesh,
    pub(crate) east: Lan,
    pub(crate) west: Lan,
}

impl Site {
    /// With `stand_in`, port 443 of the west's gateway is left free.
    pub(crate) fn start(name: &str, stand_in: bool) -> Result<Self> {
        let mut mesh = Mesh::start(name, MeshOptions::default())?;
        let (mut east, mut west) = (mesh.lab.lan("east")?, mesh.lab.lan("west")?);
        let east_gateway = mesh.gateway("gw-east", "", &mut east, 201)?;
        mesh.apply(&format!("{}---\n{}", group("front", ""), group("back", "net2")))?;
        let mut vms = Vec::new();
        for (lan, name) in [(&mut east, "front"), (&mut west, "back")] {
            let vm = mesh.bare_in(lan, name, 5)?;
            vm.up(&mesh.token(name)?)?;
            vms.push(vm);
        }
        let west_gateway = if stand_in {
            mesh.gateway_behind("gw-west", "net2", &mut west, 202)?
        } else {
            mesh.gateway("gw-west", "net2", &mut west, 202)?
        };
        let (back, front) = (vms.pop().context("back")?, vms.pop().context("front")?);
        let servers = (
            Nginx::start(&front.host, 8080, "front speaks")?,
            Nginx::start(&back.host, 8080, "back speaks")?,
        );
        Ok(Self {
            front,
            back,
            _servers: servers,
            west_gateway,
            east_gateway,
            mesh,
            east,
            west,
        })
    }

    /// Waits until `from` has the body that `name` sends.
    pub(crate) fn answers(&self, from: &Vm, name: &str) -> Result<()> {
        let body = wait_for(&url(name), PATIENCE, || {
            Ok(from.curl(&url(name))?.checked()?.stdout)
        });
        let body = body.with_context(|| {
            let gateways = [&self.east_gateway, &self.west_gateway];
            let logs = gateways.map(|gateway| tail(&gateway.log()));
            format!(
                "{}\n--- gateways\n{}",
                tail(&from.agent_log()),
                logs.join("\n---\n")
            )
        })?;
        ensure!(body == format!("{name} speaks\n"), "{body}");
        Ok(())
    }
}

/// A host whose calls to the mesh and from it go through a real ztunnel.
pub(crate) struct Captured {
    process: Process,
    _server: Nginx,
    pub(crate) vm: Vm,
}

/// Where a ztunnel is, and who.
pub(crate) struct Place<'a> {
    pub(crate) name: &'a str,
    pub(crate) network: &'a str,
    pub(crate) last: u8,
    /// The gateway by whose port 443 it reaches discovery.
    pub(crate) way: &'a Host,
    pub(crate) trust_domain: &'a str,
    /// More options of its bearer token.
    pub(crate) token: &'a str,
}

impl Captured {
    /// Makes the host with its entry and service, and starts ztunnel there.
    pub(crate) fn start(
        program: &std::path::Path,
        mesh: &mut Mesh,
        lan: &mut Lan,
        place: &Place<'_>,
    ) -> Result<Self> {
        let Place { name, network, .. } = *place;
        let vm = mesh.bare_in(lan, name, place.last)?;
        let server = Nginx::start(&vm.host, 8080, &format!("{name} speaks"))?;
        mesh.apply(&format!(
            "{}---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: {name}\n  \
             namespace: shop\n  labels: {{app: {name}, networking.istio.io/tunnel: http}}\nspec:\n  \
             address: {}\n  network: '{network}'\n  serviceAccount: {name}\n  ports: {{http: 8080}}\n",
            service_entry(name),
            vm.host.ipv4()
        ))?;
        let line = format!(
            "token create --bearer -n shop --service-account {name}{}",
            place.token
        );
        let token = mesh.tombolo(&line)?;
        let roots = mesh
            .control
            .sh("cat /var/lib/tombolo/discovery/ca/root-cert.pem")?
            .checked()?
            .stdout;
        vm.host.write("/run/zt/token", token.trim())?;
        vm.host.write("/run/zt/root.pem", &roots)?;
        let discovery = format!("discovery.{}", place.trust_domain);
        let line = format!("echo '{} {discovery}' >> /etc/hosts", place.way.address());
        vm.host.sh(&line)?.checked()?;
        let discovery = format!("https://{discovery}:443");
        let mut command = vm.host.command(&program.display().to_string());
        let info = format!("shop/{name}/{name}");
        for (key, value) in [
            ("XDS_ADDRESS", discovery.as_str()),
            ("CA_ADDRESS", &discovery),
            ("XDS_ROOT_CA", "/run/zt/root.pem"),
            ("CA_ROOT_CA", "/run/zt/root.pem"),
            ("AUTH_TOKEN", "/run/zt/token"),
            ("CLUSTER_ID", "Kubernetes"),
            ("NETWORK", network),
            ("CLUSTER_DOMAIN", "mesh.internal"),
            ("PROXY_MODE", "dedicated"),
            ("PROXY_WORKLOAD_INFO", &info),
            ("PACKET_MARK", "1337"),
            ("ENABLE_ORIG_SRC", "false"),
            ("IPV6_ENABLED", "false"),
            ("RUST_LOG", "info"),
        ] {
            command.env(key, value);
        }
        let process = vm.host.spawn_command("ztunnel", command)?;
        wait_for("ztunnel to be ready", PATIENCE, || {
            vm.host
                .sh("curl -sf -m 2 http://127.0.0.1:15021/healthz/ready")?
                .checked()
        })
        .with_context(|| tail(&process.log()))?;
        let redirect = "iptables -w -t nat -A OUTPUT -p tcp -d 240.240.0.0/16 -m mark ! --mark 1337/0xfff \
             -j REDIRECT --to-ports 15001";
        vm.host.sh(redirect)?.checked()?;
        Ok(Self {
            process,
            _server: server,
            vm,
        })
    }

    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// IPv4 address of a service, as ztunnel was told it in its own network.
    pub(crate) fn vip(&self, host: &str) -> Result<String> {
        wait_for(host, PATIENCE, || {
            let dump = self
                .vm
                .host
                .sh("curl -sf -m 2 http://127.0.0.1:15000/config_dump")?;
            let dump: serde_json::Value = serde_json::from_str(&dump.checked()?.stdout)?;
            let all = dump["services"].as_array().context("no services")?;
            let found = all.iter().find(|service| service["hostname"] == host);
            let vips = found.and_then(|service| service["vips"].as_array());
            let texts = vips.into_iter().flatten().filter_map(|vip| vip.as_str());
            let mut addresses = texts.filter_map(|vip| vip.rsplit('/').next());
            let found = addresses.find(|address| address.parse::<std::net::Ipv4Addr>().is_ok());
            found.map(str::to_owned).context("no address")
        })
    }

    /// GET of a service by its address.
    pub(crate) fn get(&self, vip: &str) -> Result<tombolo_testkit::Output> {
        self.vm
            .host
            .run("curl", &["-sS", "-m", "5", &format!("http://{vip}/")])
    }

    pub(crate) fn answers(&self, vip: &str, expected: &str) -> Result<()> {
        let body = wait_for(expected, PATIENCE, || Ok(self.get(vip)?.checked()?.stdout))
            .with_context(|| tail(&self.log()))?;
        ensure!(body == format!("{expected} speaks\n"), "{body}");
        Ok(())
    }
}
