//! A discovery on loopback and clients for it.

mod ads;
mod objects;
mod vm;

pub(crate) use ads::Ads;
pub(crate) use objects::{group, object, policy, service};
pub(crate) use vm::{Host, Token, node};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tombolo_discovery::{
    config::{Config, Endpoint},
    init::{Founding, found},
    server::{self, Running},
};
use tombolo_identity::{
    JoinKey, LiveIdentity, TrustBundle, WorkloadIdentity, client_exporter, control_client_config,
    control_server_name,
};
use tombolo_proto::tombolo::admin::v1::{self as admin, admin_client::AdminClient};
use tombolo_types::{SpiffeId, TrustDomain};
use tonic::transport::{Channel, Endpoint as Remote};

pub(crate) const SHOP: &str = "shop";

pub(crate) fn trust_domain() -> TrustDomain {
    "mesh.example".parse().unwrap()
}

/// A discovery with a folder of its own.
pub(crate) struct Lab {
    dir: tempfile::TempDir,
    pub(crate) config: Config,
    pub(crate) running: Option<Running>,
    /// The program itself instead, where a test kills it or looks at its memory.
    pub(crate) process: Option<std::process::Child>,
    root: Arc<TrustBundle>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Lab {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    pub(crate) async fn start_with(edit: impl FnOnce(&mut Config)) -> Self {
        let mut lab = Self::found_with(edit);
        lab.boot().await;
        lab
    }

    /// Founded, and not running yet.
    pub(crate) fn found_with(edit: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new("mesh.example", vec!["discovery.test:15012".into()]);
        config.state_dir = dir.path().join("state");
        config.admin_socket = dir.path().join("run/admin.sock");
        config.listen = "127.0.0.1:0".parse().unwrap();
        config.debug_listen = Endpoint::At("127.0.0.1:0".parse().unwrap());
        config.readiness_listen = Endpoint::At("127.0.0.1:0".parse().unwrap());
        edit(&mut config);
        let founding = Founding {
            config: config.clone(),
            config_path: dir.path().join("etc/discovery.yaml"),
            ca_dir: None,
        };
        found(&founding).unwrap();
        let pem = std::fs::read_to_string(config.state_dir.join("ca/root-cert.pem")).unwrap();
        let trust_domain = config.trust_domain.parse().unwrap();
        Self {
            dir,
            config,
            running: None,
            process: None,
            root: Arc::new(TrustBundle::from_pem(trust_domain, &pem).unwrap()),
        }
    }

    /// Starts `tombolo-discovery run`, and waits until it answers.
    pub(crate) async fn spawn(&mut self) {
        let mut options = std::fs::File::options();
        let log = options
            .create(true)
            .append(true)
            .open(self.dir.path().join("discovery.log"))
            .unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tombolo-discovery"));
        command
            .args(["run", "--config"])
            .arg(self.dir.path().join("etc/discovery.yaml"));
        command.stdin(std::process::Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.process = Some(command.spawn().unwrap());
        self.wait_for("discovery answers", async || {
            tokio::net::TcpStream::connect(self.config.listen).await.is_ok()
                && tokio::net::UnixStream::connect(&self.config.admin_socket)
                    .await
                    .is_ok()
        })
        .await;
    }

    /// SIGKILL, for those who hold no more than a reference. [`Self::kill`] waits for its end.
    pub(crate) fn sigkill(&self) {
        let pid = i32::try_from(self.process.as_ref().unwrap().id()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// What the process has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("discovery.log")).unwrap_or_default()
    }

    /// Resident memory of the process in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let pid = self.process.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.running
            .as_ref()
            .map_or(self.config.listen, |running| running.address)
    }

    pub(crate) async fn boot(&mut self) {
        self.running = Some(server::start(&self.config).await.unwrap());
    }

    pub(crate) async fn shut_down(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop().await;
        }
    }

    pub(crate) fn trust_domain(&self) -> TrustDomain {
        self.config.trust_domain.parse().unwrap()
    }

    pub(crate) fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    pub(crate) fn audit_log(&self) -> String {
        std::fs::read_to_string(self.config.state_dir.join("audit.log")).unwrap()
    }

    pub(crate) async fn admin(&self) -> AdminClient<Channel> {
        let path: PathBuf = self.config.admin_socket.clone();
        let channel = Remote::from_static("http://admin")
            .connect_with_connector(tower::service_fn(move |_: http::Uri| {
                let path = path.clone();
                async move {
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(
                        tokio::net::UnixStream::connect(path).await?,
                    ))
                }
            }))
            .await
            .unwrap();
        AdminClient::new(channel)
    }

    pub(crate) async fn apply(&self, objects: &[Value]) -> Result<admin::ApplyResponse, tonic::Status> {
        let objects = objects
            .iter()
            .map(|json| admin::Object {
                json: json.to_string(),
            })
            .collect();
        let request = admin::ApplyRequest {
            objects,
            ..Default::default()
        };
        self.admin()
            .await
            .apply(request)
            .await
            .map(tonic::Response::into_inner)
    }

    pub(crate) async fn get(&self, kind: &str, name: &str) -> Result<Value, tonic::Status> {
        let request = admin::GetRequest {
            kind: kind.into(),
            namespace: SHOP.into(),
            name: name.into(),
        };
        let object = self.admin().await.get(request).await?.into_inner();
        Ok(serde_json::from_str(&object.json).unwrap())
    }

    pub(crate) async fn vms(&self) -> Vec<admin::Vm> {
        self.admin()
            .await
            .list_vms(admin::ListVmsRequest::default())
            .await
            .unwrap()
            .into_inner()
            .vms
    }

    pub(crate) async fn group(&self, name: &str) {
        self.apply(&[group(name), service(name)]).await.unwrap();
    }

    /// A token for a group; `edit` changes its spec.
    pub(crate) async fn token(&self, group: &str, edit: impl FnOnce(&mut Value)) -> Token {
        let (id, seed): ([u8; 16], [u8; 32]) = (rand::random(), rand::random());
        let token = Token {
            id,
            key: JoinKey::from_seed(&seed),
        };
        let mut spec = json!({
            "publicKey": STANDARD.encode(token.key.public_key()),
            "workloadGroup": group, "uses": 1,
            "expires": (jiff::Timestamp::now() + Duration::from_secs(900)).to_string(),
        });
        edit(&mut spec);
        self.apply(&[object("tombolo.io/v1", "JoinToken", &token.name(), spec)])
            .await
            .unwrap();
        token
    }

    /// The root that the mesh was founded with.
    pub(crate) fn bundle(&self) -> Arc<TrustBundle> {
        Arc::clone(&self.root)
    }

    /// A connection, with a certificate if there is one, and its exporter.
    pub(crate) async fn dial(&self, identity: Option<Arc<WorkloadIdentity>>) -> (Channel, [u8; 32]) {
        self.dial_at(self.address(), identity).await
    }

    pub(crate) async fn dial_at(
        &self,
        address: SocketAddr,
        identity: Option<Arc<WorkloadIdentity>>,
    ) -> (Channel, [u8; 32]) {
        let live = LiveIdentity::new(identity.clone(), vec![self.bundle()]);
        let tls = control_client_config(
            &live,
            &SpiffeId::discovery(self.trust_domain()),
            identity.is_some(),
        )
        .unwrap();
        let socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let name = control_server_name(&self.trust_domain()).unwrap();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(tls))
            .connect(name, socket)
            .await
            .unwrap();
        let exporter = client_exporter(stream.get_ref().1).unwrap();
        let mut once = Some(stream);
        let channel = Remote::from_static("http://discovery")
            .connect_with_connector(tower::service_fn(move |_: http::Uri| {
                let stream = once
                    .take()
                    .ok_or_else(|| std::io::Error::other("one connection only"));
                async move { stream.map(hyper_util::rt::TokioIo::new) }
            }))
            .await
            .unwrap();
        (channel, exporter)
    }

    /// Enrols a new host into a group.
    pub(crate) async fn enrol(&self, group: &str) -> Host {
        let token = self.token(group, |_| ()).await;
        let mut host = Host::new();
        host.enrol(self, &token).await.unwrap();
        host
    }

    pub(crate) async fn wait_for(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(15);
        while !holds().await {
            assert!(Instant::now() < deadline, "{what}: not within the deadline");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Reads an HTTP endpoint.
pub(crate) async fn http_get(address: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

/// An address of this host that a node may claim: not loopback, not link-local.
pub(crate) fn host_address() -> Option<std::net::IpAddr> {
    let plan = tombolo_types::AddressPlan::default();
    nix::ifaddrs::getifaddrs()
        .unwrap()
        .filter_map(|interface| {
            interface
                .address?
                .as_sockaddr_in()
                .map(|address| address.ip().into())
        })
        .find(|address| tombolo_discovery::address::may_be_claimed(*address, &plan))
}

/// Says that a test cannot run here; fails where it must.
pub(crate) fn skip(reason: &str) {
    assert!(
        std::env::var_os("TOMBOLO_TEST_REQUIRE").is_none(),
        "required, but: {reason}"
    );
    println!("SKIPPED: {reason}");
}
