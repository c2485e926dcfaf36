//! Calls into another network, by gateways that are real tunnel servers.

use super::hosts::{CATALOG, Fleet, Host, VIP, WAIT, accepted, backend, until};
use crate::{CallError, Transport};
use http::StatusCode;
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::Instant,
};
use tombolo_capture::Refusal;
use tombolo_destination::{Gateway, GatewayHost, Locality, resolve};
use tombolo_identity::{LiveIdentity, Peer};
use tombolo_proto::{istio::workload as wds, tombolo::v1, type_url};
use tombolo_tunnel::{
    ConnectRequest, Incoming, Limits, NoObserver, OpenError, Pool, PoolLimits, ReverseSession, Server,
    Service, ThroughError, serve,
};
use tombolo_types::DeviceId;

/// A gateway that passes bytes to one address, or into a reverse session, or refuses.
#[derive(Default)]
struct Passing {
    to: Mutex<Option<SocketAddr>>,
    session: Mutex<Option<ReverseSession>>,
    refuses: AtomicU16,
    calls: AtomicUsize,
}

impl Service for Passing {
    fn admit(&self, _: &Peer) -> bool {
        true
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let authority = incoming.authority().unwrap();
        assert!(
            incoming.headers().get("x-forwarded-network").is_none(),
            "inner only"
        );
        let refuses = self.refuses.load(Ordering::SeqCst);
        if refuses != 0 {
            return incoming.refuse(StatusCode::from_u16(refuses).unwrap());
        }
        let session = self.session.lock().unwrap().clone();
        if let Some(session) = session {
            let request = ConnectRequest::new(authority);
            let Ok(mut inward) = session.open(&request, Instant::now() + WAIT).await else {
                return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
            };
            let Ok(mut outward) = incoming.accept_io(None) else {
                return;
            };
            let _ = copy_bidirectional(&mut inward, &mut outward).await;
            return;
        }
        let to = self.to.lock().unwrap().unwrap();
        let Ok(mut inward) = TcpStream::connect(to).await else {
            return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
        };
        let Ok(mut outward) = incoming.accept_io(None) else {
            return;
        };
        let _ = copy_bidirectional(&mut inward, &mut outward).await;
    }
}

struct TestGateway {
    passing: Arc<Passing>,
    server: Server,
    identity: Arc<LiveIdentity>,
}

impl TestGateway {
    async fn new(fleet: &Fleet, to: Option<&Host>) -> Self {
        let identity = fleet.mesh.workload("tombolo-system", "gateway", 99);
        let passing = Arc::new(Passing::default());
        *passing.to.lock().unwrap() = to.map(|host| SocketAddr::new(host.address.into(), 15008));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = Arc::clone(&passing);
        let server = serve(
            listener,
            &identity,
            service,
            Limits::default(),
            Arc::new(NoObserver),
            &fleet.tasks,
        );
        Self {
            passing,
            server: server.unwrap(),
            identity,
        }
    }

    fn port(&self) -> u16 {
        self.server.local_addr().port()
    }

    fn calls(&self) -> usize {
        self.passing.calls.load(Ordering::SeqCst)
    }

    /// A host of the fleet holds a reverse session here, over QUIC.
    async fn reverse_quic(&self, fleet: &Fleet, host: &Host) -> crate::ReverseEnd {
        let passing = Arc::clone(&self.passing);
        let take = Arc::new(move |session| *passing.session.lock().unwrap() = Some(session));
        let any = "127.0.0.1:0".parse().unwrap();
        let address = self.server.listen_quic(any, &self.passing, take, &fleet.tasks);
        let gateway = Gateway {
            quic_port: Some(address.unwrap().port()),
            ..self.listed(fleet, 1)
        };
        let held = host.dataplane.hold_reverse(&gateway, Transport::Quic).await;
        until(|| self.passing.session.lock().unwrap().is_some()).await;
        held.unwrap()
    }

    fn listed(&self, fleet: &Fleet, port: u16) -> Gateway {
        Gateway {
            uid: "gateway".into(),
            address: GatewayHost::Address(Ipv4Addr::LOCALHOST.into()),
            hbone_port: port,
            quic_port: None,
            expected: [fleet.mesh.id("tombolo-system", "gateway")].into(),
            cluster: "Kubernetes".into(),
            locality: Locality::default(),
            healthy: true,
            rank: 0,
        }
    }

    /// A host of the fleet holds a reverse session here.
    async fn reverse(&self, fleet: &Fleet, host: &Host) -> crate::ReverseEnd {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let pool = Pool::new(
            Arc::clone(&self.identity),
            PoolLimits::default(),
            Arc::new(|_| true),
            Arc::new(NoObserver),
            &fleet.tasks,
        );
        let accept = async {
            let (tcp, _) = listener.accept().await.unwrap();
            pool.accept_reverse(tcp).await.unwrap()
        };
        let gateway = self.listed(fleet, port);
        let (session, held) = tokio::join!(accept, host.dataplane.hold_reverse(&gateway, Transport::Tcp));
        assert_eq!(session.peer().device, Some(DeviceId(host.device)));
        *self.passing.session.lock().unwrap() = Some(session);
        held.unwrap()
    }
}

/// The network `west` and the ways into it.
fn gateways(fleet: &mut Fleet, network: &str, ports: &[u16]) {
    let gateways = ports.iter().map(|&port| v1::NetworkGateway {
        address: "127.0.0.1".into(),
        hbone_port: port.into(),
        trust_domain: "mesh.example".into(),
        namespace: "tombolo-system".into(),
        service_account: "gateway".into(),
        healthy: true,
        uid: format!("gateway-{port}"),
        ..v1::NetworkGateway::default()
    });
    let message = v1::NetworkGateways {
        network: network.into(),
        gateways: gateways.collect(),
    };
    fleet.set(type_url::NETWORK_GATEWAYS, network, &message);
    fleet.publish_types(&[type_url::NETWORK_GATEWAYS]);
}

/// Makes a host an endpoint of the catalog in another network.
fn serve_in(fleet: &mut Fleet, host: &Host, port: u16, network: &str, addresses: bool) {
    fleet.serve(host, port);
    let list = wds::PortList {
        ports: vec![wds::Port {
            service_port: 80,
            target_port: port.into(),
            app_protocol: 0,
        }],
    };
    fleet.workload(host, |wire| {
        wire.network = network.into();
        wire.services.insert(CATALOG.to_owned(), list);
        if !addresses {
            wire.addresses.clear();
        }
    });
}

struct West {
    fleet: Fleet,
    web: Arc<Host>,
    catalog: Arc<Host>,
    listener: TcpListener,
    port: u16,
}

/// A caller, and an endpoint in the network `west`.
async fn west() -> West {
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[]);
    serve_in(&mut fleet, &catalog, port, "west", true);
    fleet.publish();
    West {
        fleet,
        web,
        catalog,
        listener,
        port,
    }
}

async fn talks(app: &mut TcpStream, server: &mut TcpStream) {
    app.write_all(b"question").await.unwrap();
    let mut read = [0; 8];
    server.read_exact(&mut read).await.unwrap();
    server.write_all(&read).await.unwrap();
    app.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"question");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_into_another_network_is_made_end_to_end() {
    let mut west = west().await;
    let gateway = TestGateway::new(&west.fleet, Some(&west.catalog)).await;
    gateways(&mut west.fleet, "west", &[gateway.port()]);
    let mut app = west.web.connected(&west.fleet.tasks).await;
    let (mut server, _) = accepted(&west.listener).await;
    talks(&mut app, &mut server).await;
    let [info] = &west.web.dataplane.connections()[..] else {
        panic!("one connection")
    };
    assert_eq!(info.peer, Some(west.fleet.mesh.id("shop", "catalog")));
    let [info] = &west.catalog.dataplane.connections()[..] else {
        panic!("one connection")
    };
    assert_eq!(
        info.peer,
        Some(west.fleet.mesh.id("shop", "webapp")),
        "not the gateway"
    );
    assert_eq!(&*info.service, CATALOG.split_once('/').unwrap().1);
    let ok = ["tombolo_dataplane_gateway_calls_total", "west", "\"ok\"", " 1"];
    assert!(west.web.measured(&ok), "{}", west.web.metrics.encode());
    drop((app, server));
    until(|| west.web.dataplane.connection_count() + west.catalog.dataplane.connection_count() == 0).await;
    assert!(west.web.measured(&[
        "istio_tcp_sent_bytes_total",
        "destination_principal=\"spiffe://mesh.example/ns/shop/sa/catalog\"",
        " 8"
    ]));
    // Nothing is remembered of an endpoint without an address.
    let nowhere = crate::endpoints::Spot::Endpoint(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 80));
    assert_eq!(west.web.dataplane.context.endpoints.outstanding(&nowhere), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_gateway_costs_one_try_and_later_calls_nothing() {
    let mut west = west().await;
    // It takes connections and says nothing, as a frozen host does.
    let frozen = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gateway = TestGateway::new(&west.fleet, Some(&west.catalog)).await;
    let ports = [frozen.local_addr().unwrap().port(), gateway.port()];
    gateways(&mut west.fleet, "west", &ports);
    let (started, mut slow) = (Instant::now(), 0);
    let mut kept = Vec::new();
    for _ in 0..10 {
        let began = Instant::now();
        kept.push(west.web.connected(&west.fleet.tasks).await);
        kept.push(accepted(&west.listener).await.0);
        slow += usize::from(began.elapsed() > Duration::from_secs(1));
    }
    assert!(slow <= 1, "{slow} calls waited for it");
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
    // One that nobody listens at is no delay at all, and its place in the order changes nothing.
    drop(frozen);
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ports = [gone.local_addr().unwrap().port(), gateway.port()];
    drop(gone);
    gateways(&mut west.fleet, "west", &ports);
    for _ in 0..10 {
        kept.push(west.web.connected(&west.fleet.tasks).await);
        kept.push(accepted(&west.listener).await.0);
    }
    assert_eq!(gateway.calls(), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_share_the_calls_and_one_without_an_endpoint_is_passed_over() {
    let mut west = west().await;
    let (one, two) = (
        TestGateway::new(&west.fleet, Some(&west.catalog)).await,
        TestGateway::new(&west.fleet, Some(&west.catalog)).await,
    );
    gateways(&mut west.fleet, "west", &[one.port(), two.port()]);
    let mut kept = Vec::new();
    for _ in 0..10 {
        kept.push(west.web.connected(&west.fleet.tasks).await);
        kept.push(accepted(&west.listener).await.0);
    }
    assert_eq!((one.calls(), two.calls()), (5, 5));
    // The host holds no session with this one, for example.
    one.passing.refuses.store(503, Ordering::SeqCst);
    for _ in 0..10 {
        kept.push(west.web.connected(&west.fleet.tasks).await);
        kept.push(accepted(&west.listener).await.0);
    }
    assert_eq!(two.calls(), 15);
    assert!(
        one.calls() <= 7,
        "{}: it rests as the way to this service",
        one.calls()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_the_gateways_or_the_endpoints() {
    let mut west = west().await;
    let tasks = west.fleet.tasks.clone();
    assert_eq!(
        west.web.refused(&tasks, 80).await,
        Refusal::HostUnreachable,
        "no gateway"
    );
    assert!(west.web.measured(&["no_valid_destination", " 1"]));
    let gateway = TestGateway::new(&west.fleet, Some(&west.catalog)).await;
    gateways(&mut west.fleet, "west", &[gateway.port()]);
    for (status, refusal, reason) in [
        (401, Refusal::Reset, "denied_by_gateway"),
        (503, Refusal::HostUnreachable, "refused_by_gateway"),
    ] {
        gateway.passing.refuses.store(status, Ordering::SeqCst);
        assert_eq!(west.web.refused(&tasks, 80).await, refusal);
        assert!(west.web.measured(&["outbound", reason, " 1"]), "{reason}");
    }
    gateway.passing.refuses.store(0, Ordering::SeqCst);
    // The last word is the endpoint's, on the identity that it has seen itself.
    let principal = west.web.principal();
    west.fleet.deny("no-web", &principal);
    west.fleet.publish();
    assert_eq!(west.web.refused(&tasks, 80).await, Refusal::Reset);
    assert!(west.web.measured(&["outbound", "denied_by_peer", " 1"]));
    assert!(
        west.catalog
            .measured(&["tombolo_dataplane_refused_total", "inbound", " 1"])
    );
    west.fleet.remove(type_url::AUTHORIZATION, "shop/no-web");
    west.fleet.publish();
    // Somebody else behind the gateway is found out.
    west.catalog.identity.set_identity(west.fleet.mesh.issue(
        &west.fleet.mesh.id("shop", "payments"),
        DeviceId(west.catalog.device),
    ));
    assert_eq!(west.web.refused(&tasks, 80).await, Refusal::Reset);
    assert!(west.web.measured(&["outbound", "wrong_peer_identity", " 1"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trial_names_the_gateways() {
    let mut west = west().await;
    let gateway = TestGateway::new(&west.fleet, Some(&west.catalog)).await;
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone_port = gone.local_addr().unwrap().port();
    drop(gone);
    let probe = async |west: &West| {
        let world = west.web.dataplane.context.world.load();
        let destination = resolve(&*world, &world.source(), VIP.into(), 80).unwrap();
        west.web.dataplane.probe(&destination).await.remove(0)
    };
    gateways(&mut west.fleet, "west", &[gone_port]);
    let result = probe(&west).await;
    assert!(matches!(
        &result.outcome,
        Err(CallError::Through(ThroughError::Gateway(OpenError::Io(_))))
    ));
    gateways(&mut west.fleet, "west", &[gateway.port()]);
    let result = probe(&west).await;
    assert!(result.outcome.is_ok(), "{result:?}");
    assert_eq!(result.peer, Some(west.fleet.mesh.id("shop", "catalog")));
    let [tried] = &result.gateways[..] else {
        panic!("one gateway")
    };
    assert_eq!(*tried.gateway, format!("127.0.0.1:{}", gateway.port()));
    let West { listener, .. } = west;
    drop(listener);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_addresses_is_called_through_its_session() {
    called_through_its_session(Transport::Tcp).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_addresses_is_called_through_its_session_over_quic() {
    called_through_its_session(Transport::Quic).await;
}

async fn called_through_its_session(transport: Transport) {
    let mut west = west().await;
    let (catalog, port) = (Arc::clone(&west.catalog), west.port);
    // At home in the default network, where the caller is too.
    serve_in(&mut west.fleet, &catalog, port, "~outbound", false);
    west.fleet.publish();
    let gateway = TestGateway::new(&west.fleet, None).await;
    let mut session = if transport == Transport::Quic {
        gateway.reverse_quic(&west.fleet, &catalog).await
    } else {
        gateway.reverse(&west.fleet, &catalog).await
    };
    assert_eq!(session.transport, transport);
    gateways(&mut west.fleet, "~outbound", &[gateway.port()]);
    let mut app = west.web.connected(&west.fleet.tasks).await;
    let (mut server, _) = accepted(&west.listener).await;
    talks(&mut app, &mut server).await;
    let [info] = &catalog.dataplane.connections()[..] else {
        panic!("one connection")
    };
    assert_eq!(info.peer, Some(west.fleet.mesh.id("shop", "webapp")));
    // Drained, it takes nothing new, once the gateway has heard of it, and ends with what runs.
    session.drain();
    let refused = async {
        loop {
            match west.web.connect(&west.fleet.tasks, (VIP, 80)).outcome().await {
                Ok(_) => drop(accepted(&west.listener).await),
                Err(refusal) => return refusal,
            }
        }
    };
    let refused = tokio::time::timeout(WAIT, refused).await.unwrap();
    assert_eq!(refused, Refusal::HostUnreachable);
    talks(&mut app, &mut server).await;
    assert!(!session.is_ended());
    drop((app, server));
    tokio::time::timeout(WAIT, session.ended()).await.unwrap();
    assert!(session.is_ended());
}
