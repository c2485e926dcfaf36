use crate::{
    Dataplane, Settings,
    dataplane::Parts,
    outbound::{self, Held},
    support::Mesh,
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::timeout,
};
use tombolo_capture::Refusal;
use tombolo_identity::LiveIdentity;
use tombolo_proto::{istio::security, istio::workload as wds, pack, tombolo::v1, type_url, xds};
use tombolo_runtime::{Publisher, TaskGroup, published};
use tombolo_snapshot::{Own, Snapshot};
use tombolo_telemetry::{AccessLog, Metrics};
use tombolo_types::AddressPlan;

pub(crate) const WAIT: Duration = Duration::from_secs(20);
pub(crate) const CATALOG: &str = "shop/catalog.shop.svc.mesh.internal";
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(127, 240, 0, 1);

/// Hosts of different tests must not share an address: the HBONE port is the same everywhere.
fn fresh_address() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let [_, a, b, c] = (0x7f01_0002 + NEXT.fetch_add(1, Ordering::Relaxed)).to_be_bytes();
    Ipv4Addr::new(127, a, b, c)
}

/// Mesh addresses that every test host has: loopback ones.
pub(crate) fn plan() -> AddressPlan {
    AddressPlan::from_prefixes(["127.240.0.0/16"]).unwrap()
}

/// What all hosts of a test are told.
pub(crate) struct Fleet {
    pub(crate) mesh: Mesh,
    pub(crate) tasks: TaskGroup,
    /// Resources by type, name and message.
    resources: Vec<(&'static str, String, prost_types::Any)>,
    hosts: Vec<Arc<Host>>,
}

pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) identity: Arc<LiveIdentity>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) dataplane: Dataplane,
    publisher: Publisher<Snapshot>,
    own: Own,
    pub(crate) device: u64,
}

impl Fleet {
    pub(crate) fn new() -> Self {
        let mut fleet = Self {
            mesh: Mesh::new("mesh.example"),
            tasks: TaskGroup::new("test"),
            resources: Vec::new(),
            hosts: Vec::new(),
        };
        // An empty set is a set.
        fleet.set(type_url::REVOCATIONS, "devices", &v1::Revocations::default());
        fleet
    }

    pub(crate) fn host(&mut self, service_account: &str) -> Arc<Host> {
        self.host_with(service_account, Settings::default())
    }

    pub(crate) fn host_with(&mut self, service_account: &str, settings: Settings) -> Arc<Host> {
        let device = u64::try_from(self.hosts.len()).unwrap() + 1;
        let name = format!("{service_account}-{device}");
        let own = Own {
            namespace: "shop".into(),
            workload_name: name.as_str().into(),
            service_account: service_account.into(),
            network: "".into(),
            cluster_id: "Kubernetes".into(),
            mesh_domain: "mesh.internal".into(),
            trust_domain: "mesh.example".parse().unwrap(),
        };
        let address = fresh_address();
        let identity = self.mesh.workload("shop", service_account, device);
        let metrics = Arc::new(Metrics::new());
        let (publisher, world) = published(Snapshot::empty(plan(), own.clone()));
        let parts = Parts {
            listeners: Vec::new(),
            world,
            identity: Arc::clone(&identity),
            own: own.clone(),
            plan: plan(),
            metrics: Arc::clone(&metrics),
            access_log: AccessLog::new(true),
            settings: Settings {
                hbone_listen: vec![SocketAddr::new(address.into(), 15008)],
                ..settings
            },
        };
        let dataplane = Dataplane::assemble(parts, &self.tasks).unwrap();
        let host = Arc::new(Host {
            name,
            address,
            identity,
            metrics,
            dataplane,
            publisher,
            own,
            device,
        });
        self.hosts.push(Arc::clone(&host));
        self.workload(&host, |_| {});
        host
    }

    /// Sets one resource for all hosts.
    pub(crate) fn set<M: prost::Name>(&mut self, type_url: &'static str, name: &str, message: &M) {
        self.resources
            .retain(|(t, n, _)| (*t, n.as_str()) != (type_url, name));
        self.resources.push((type_url, name.to_owned(), pack(message)));
    }

    pub(crate) fn remove(&mut self, type_url: &'static str, name: &str) {
        self.resources
            .retain(|(t, n, _)| (*t, n.as_str()) != (type_url, name));
    }

    pub(crate) fn workload(&mut self, host: &Host, change: impl FnOnce(&mut wds::Workload)) {
        let mut wire = wds::Workload {
            uid: format!("uid/{}", host.name),
            name: host.name.clone(),
            namespace: "shop".into(),
            service_account: host.own.service_account.to_string(),
            trust_domain: "mesh.example".into(),
            workload_name: host.own.service_account.to_string(),
            canonical_name: host.own.service_account.to_string(),
            addresses: vec![host.address.octets().to_vec()],
            tunnel_protocol: wds::TunnelProtocol::Hbone.into(),
            ..wds::Workload::default()
        };
        change(&mut wire);
        let uid = wire.uid.clone();
        self.set(
            type_url::ADDRESS,
            &uid,
            &wds::Address {
                r#type: Some(wds::address::Type::Workload(wire)),
            },
        );
    }

    /// The catalog at [`VIP`], port 80, served by `hosts` at `port` each.
    pub(crate) fn catalog(&mut self, port: u16, hosts: &[&Arc<Host>]) {
        let (namespace, hostname) = CATALOG.split_once('/').unwrap();
        let ports = vec![wds::Port {
            service_port: 80,
            target_port: port.into(),
            app_protocol: 0,
        }];
        let service = wds::Service {
            name: "catalog".into(),
            namespace: namespace.into(),
            hostname: hostname.into(),
            ports: ports.clone(),
            addresses: vec![wds::NetworkAddress {
                network: String::new(),
                address: VIP.octets().to_vec(),
                length: None,
            }],
            ..wds::Service::default()
        };
        self.set(
            type_url::ADDRESS,
            CATALOG,
            &wds::Address {
                r#type: Some(wds::address::Type::Service(service)),
            },
        );
        for host in hosts {
            self.serve(host, port);
        }
    }

    /// Makes a host an endpoint of the catalog at a port, which it also declares.
    pub(crate) fn serve(&mut self, host: &Host, port: u16) {
        let list = wds::PortList {
            ports: vec![wds::Port {
                service_port: 80,
                target_port: port.into(),
                app_protocol: 0,
            }],
        };
        self.workload(host, |wire| drop(wire.services.insert(CATALOG.to_owned(), list)));
        self.declare(host, &[port]);
    }

    pub(crate) fn declare(&mut self, host: &Host, ports: &[u16]) {
        let ports = ports
            .iter()
            .map(|&port| v1::DeclaredPort {
                port: port.into(),
                loopback: true,
            })
            .collect();
        self.set(
            type_url::EXPOSURE,
            &format!("shop/{}", host.name),
            &v1::Exposure {
                ports,
                all_ports: false,
            },
        );
    }

    /// DENY for one principal, in the namespace of all.
    pub(crate) fn deny(&mut self, name: &str, principal: &str) {
        let matches = vec![security::Match {
            principals: vec![security::StringMatch {
                match_type: Some(security::string_match::MatchType::Exact(principal.to_owned())),
            }],
            ..security::Match::default()
        }];
        let policy = security::Authorization {
            name: name.into(),
            namespace: "shop".into(),
            scope: security::Scope::Namespace.into(),
            action: security::Action::Deny.into(),
            rules: vec![security::Rule {
                clauses: vec![security::Clause { matches }],
            }],
            ..security::Authorization::default()
        };
        self.set(type_url::AUTHORIZATION, &format!("shop/{name}"), &policy);
    }

    pub(crate) fn revoke(&mut self, device: u64) {
        self.set(
            type_url::REVOCATIONS,
            "devices",
            &v1::Revocations {
                device_ids: vec![device],
            },
        );
    }

    /// Tells all hosts everything.
    pub(crate) fn publish(&self) {
        self.publish_types(&[
            type_url::ADDRESS,
            type_url::AUTHORIZATION,
            type_url::REVOCATIONS,
            type_url::EXPOSURE,
        ]);
    }

    /// Tells all hosts what there is of some types, in one new version.
    pub(crate) fn publish_types(&self, types: &[&'static str]) {
        for host in &self.hosts {
            let mut snapshot = Snapshot::clone(&host.publisher.load());
            for &type_url in types {
                let wanted =
                    |name: &str| type_url != type_url::EXPOSURE || name == format!("shop/{}", host.name);
                let resources: Vec<_> = self
                    .resources
                    .iter()
                    .filter(|(t, name, _)| *t == type_url && wanted(name))
                    .map(|(_, name, any)| xds::Resource {
                        name: name.clone(),
                        version: "1".into(),
                        resource: Some(any.clone()),
                        ..xds::Resource::default()
                    })
                    .collect();
                let mut removed: Vec<String> = snapshot.held(type_url).into_keys().collect();
                removed.retain(|held| !resources.iter().any(|resource| resource.name == *held));
                assert_eq!(snapshot.apply(type_url, resources, &removed), []);
            }
            host.publisher.publish(snapshot);
        }
    }
}

impl Host {
    pub(crate) fn principal(&self) -> String {
        format!("mesh.example/ns/shop/sa/{}", self.own.service_account)
    }

    /// An application on this host connects to a virtual address.
    pub(crate) fn connect(&self, tasks: &TaskGroup, destination: impl Into<SocketAddr>) -> Application {
        let (outcome_tx, outcome) = oneshot::channel();
        let held = Hand {
            destination: destination.into(),
            source: SocketAddr::new(self.address.into(), 40_000),
            outcome: outcome_tx,
        };
        tasks.spawn(
            "application",
            outbound::serve(Arc::clone(&self.dataplane.context), held),
        );
        Application(outcome)
    }

    pub(crate) async fn connected(&self, tasks: &TaskGroup) -> TcpStream {
        self.connect(tasks, (VIP, 80)).socket().await
    }

    pub(crate) async fn refused(&self, tasks: &TaskGroup, port: u16) -> Refusal {
        self.connect(tasks, (VIP, port)).refusal().await
    }

    /// Bytes of the task that an application's connection runs in.
    pub(crate) fn task_size(&self) -> usize {
        let held = Hand {
            destination: (VIP, 80).into(),
            source: (VIP, 1).into(),
            outcome: oneshot::channel().0,
        };
        size_of_val(&outbound::serve(Arc::clone(&self.dataplane.context), held))
    }

    /// True if some line of the metrics has all these parts.
    pub(crate) fn measured(&self, parts: &[&str]) -> bool {
        self.metrics
            .encode()
            .lines()
            .any(|line| parts.iter().all(|part| line.contains(part)))
    }
}

/// A held connection whose application is the test.
pub(crate) struct Hand {
    destination: SocketAddr,
    source: SocketAddr,
    outcome: oneshot::Sender<Result<TcpStream, Refusal>>,
}

impl Held for Hand {
    fn destination(&self) -> SocketAddr {
        self.destination
    }
    fn source(&self) -> SocketAddr {
        self.source
    }
    async fn accept(self) -> io::Result<TcpStream> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let ours = TcpStream::connect(listener.local_addr()?).await?;
        let (theirs, _) = listener.accept().await?;
        self.outcome
            .send(Ok(ours))
            .map_err(|_| io::ErrorKind::ConnectionAborted)?;
        Ok(theirs)
    }
    fn refuse(self, with: Refusal) {
        drop(self.outcome.send(Err(with)));
    }
}

pub(crate) struct Application(oneshot::Receiver<Result<TcpStream, Refusal>>);

impl Application {
    pub(crate) async fn outcome(self) -> Result<TcpStream, Refusal> {
        timeout(WAIT, self.0)
            .await
            .expect("an outcome within the deadline")
            .expect("an outcome")
    }
    pub(crate) async fn socket(self) -> TcpStream {
        self.outcome().await.expect("accepted")
    }
    pub(crate) async fn refusal(self) -> Refusal {
        self.outcome().await.expect_err("refused")
    }
}

/// An application that listens on loopback.
pub(crate) async fn backend() -> (u16, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (listener.local_addr().unwrap().port(), listener)
}

pub(crate) async fn accepted(listener: &TcpListener) -> (TcpStream, IpAddr) {
    let (socket, from) = timeout(WAIT, listener.accept())
        .await
        .expect("a connection")
        .unwrap();
    (socket, from.ip())
}

pub(crate) async fn until(mut condition: impl FnMut() -> bool) {
    let reached = timeout(WAIT, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    reached.await.expect("the condition within its deadline");
}
