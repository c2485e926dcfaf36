//! Calls through a gateway: the caller's TLS inside, to an endpoint that is dialled or that holds a reverse session.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use http::StatusCode;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use support::{Mesh, now_unix};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tombolo_identity::{LiveIdentity, Peer};
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{
    Authority, Call, ConnectRequest, GatewayTarget, Incoming, Limits, Monitor, NoObserver, OpenError, Pool,
    PoolLimits, ReverseSession, Server, Service, Target, ThroughError, TunnelIo, TunnelStream, bidirectional,
    serve,
};
use tombolo_types::DeviceId;

const WAIT: Duration = Duration::from_secs(20);
const HOST: &str = "catalog.shop.svc.mesh.internal";

/// The endpoint: tells who called it and by which name, then echoes.
#[derive(Default)]
struct Endpoint {
    revoked: Mutex<Option<DeviceId>>,
}

impl Service for Endpoint {
    fn admit(&self, peer: &Peer) -> bool {
        *self.revoked.lock().unwrap() != peer.device
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        if incoming.authority().unwrap().port() == 81 {
            return incoming.refuse(StatusCode::UNAUTHORIZED);
        }
        let network = incoming.headers().get("x-forwarded-network").cloned().unwrap();
        let hello = format!(
            "{} for {} from {}\n",
            incoming.peer().id,
            incoming.authority().unwrap(),
            network.to_str().unwrap()
        );
        let Ok(stream) = incoming.accept(None) else { return };
        let mut io = TunnelIo::from(stream);
        io.write_all(hello.as_bytes()).await.unwrap();
        let (mut from, mut to) = tokio::io::split(io);
        tokio::io::copy(&mut from, &mut to).await.unwrap();
        to.shutdown().await.unwrap();
    }
}

/// The gateway: passes bytes to an address, or into a reverse session.
struct Gateway {
    address: SocketAddr,
    over_quic: AtomicUsize,
    session: Mutex<Option<ReverseSession>>,
}

impl Service for Gateway {
    fn admit(&self, _: &Peer) -> bool {
        true
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        let authority = incoming.authority().unwrap();
        if authority.port() == 9 {
            return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
        }
        let session = self.session.lock().unwrap().clone();
        if let Some(session) = session {
            let inward = session
                .open(&ConnectRequest::new(authority), Instant::now() + WAIT)
                .await;
            let Ok(inward) = inward else {
                return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
            };
            let Ok(outward) = incoming.accept(None) else {
                return;
            };
            let (mut inward, mut outward) = (inward, TunnelIo::from(outward));
            let _ = copy_bidirectional(&mut inward, &mut outward).await;
            return;
        }
        let mut tcp = TcpStream::connect(self.address).await.unwrap();
        match incoming.accept_call(None) {
            Ok(Call::Stream(stream)) => {
                bidirectional(tcp, stream, &Monitor::default()).await;
            }
            Ok(Call::Io(mut io)) => {
                self.over_quic.fetch_add(1, Ordering::SeqCst);
                let _ = copy_bidirectional(&mut tcp, &mut io).await;
            }
            Err(_) => {}
        }
    }
}

struct World {
    mesh: Mesh,
    tasks: TaskGroup,
    endpoint: Arc<Endpoint>,
    server: Server,
    gateway: Arc<Gateway>,
    gateway_identity: Arc<LiveIdentity>,
    outer: Server,
    caller: Pool,
    way_in: GatewayTarget,
}

async fn listen(live: &Arc<LiveIdentity>, service: Arc<impl Service>, tasks: &TaskGroup) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    serve(
        listener,
        live,
        service,
        Limits::default(),
        Arc::new(NoObserver),
        tasks,
    )
    .unwrap()
}

fn pool(live: &Arc<LiveIdentity>, tasks: &TaskGroup) -> Pool {
    Pool::new(
        Arc::clone(live),
        PoolLimits::default(),
        Arc::new(|_| true),
        Arc::new(NoObserver),
        tasks,
    )
}

async fn world() -> World {
    let mesh = Mesh::new("mesh.example");
    let tasks = TaskGroup::new("test");
    let endpoint = Arc::new(Endpoint::default());
    let server = listen(
        &mesh.workload("shop", "catalog", 8),
        Arc::clone(&endpoint),
        &tasks,
    )
    .await;
    let gateway = Arc::new(Gateway {
        address: server.local_addr(),
        over_quic: AtomicUsize::new(0),
        session: Mutex::default(),
    });
    let gateway_identity = mesh.workload("tombolo-system", "gateway", 9);
    let outer = listen(&gateway_identity, Arc::clone(&gateway), &tasks).await;
    let way_in = GatewayTarget {
        tcp: Target {
            hbone: outer.local_addr(),
            expected: [mesh.id("tombolo-system", "gateway")].into(),
        },
        quic: None,
    };
    let caller = pool(&mesh.workload("shop", "webapp", 7), &tasks);
    World {
        mesh,
        tasks,
        endpoint,
        server,
        gateway,
        gateway_identity,
        outer,
        caller,
        way_in,
    }
}

fn requests(port: u16) -> (ConnectRequest, ConnectRequest) {
    let authority = Authority::Name {
        host: HOST.to_owned(),
        port,
    };
    let outer = ConnectRequest::new(authority);
    let mut inner = outer.clone();
    inner.network = Some("net1".parse().unwrap());
    (outer, inner)
}

impl World {
    async fn call(&self, port: u16, service_account: &str) -> Result<TunnelStream, ThroughError> {
        let (outer, inner) = requests(port);
        let expected = [self.mesh.id("shop", service_account)];
        self.caller
            .open_through(&self.way_in, &outer, &expected, &inner, Instant::now() + WAIT)
            .await
    }

    /// The gateway takes QUIC too.
    fn quic(&mut self) -> SocketAddr {
        let gateway = Arc::clone(&self.gateway);
        let take = Arc::new(move |session| *gateway.session.lock().unwrap() = Some(session));
        let any = "127.0.0.1:0".parse().unwrap();
        let address = self
            .outer
            .listen_quic(any, &self.gateway, take, &self.tasks)
            .unwrap();
        self.way_in.quic = Some(address);
        address
    }

    /// A host that holds a reverse session with the gateway.
    async fn reverse(&self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (server, endpoint, tasks) = (
            self.server.clone(),
            Arc::clone(&self.endpoint),
            self.tasks.clone(),
        );
        let expected = vec![self.mesh.id("tombolo-system", "gateway")];
        self.tasks.spawn("host", async move {
            let held = server
                .hold_reverse(address, expected, endpoint, &tasks)
                .await
                .unwrap();
            assert_eq!(held.peer.device, Some(DeviceId(9)));
            held.run.await;
        });
        let (tcp, _) = listener.accept().await.unwrap();
        let session = pool(&self.gateway_identity, &self.tasks)
            .accept_reverse(tcp)
            .await
            .unwrap();
        assert_eq!(session.peer().device, Some(DeviceId(8)));
        *self.gateway.session.lock().unwrap() = Some(session);
    }
}

async fn line(io: &mut TunnelIo) -> String {
    let mut text = Vec::new();
    while text.last() != Some(&b'\n') {
        text.push(timeout(WAIT, io.read_u8()).await.unwrap().unwrap());
    }
    String::from_utf8(text).unwrap()
}

async fn echoes(stream: TunnelStream) {
    assert_eq!(
        stream.peer().device,
        Some(DeviceId(8)),
        "the endpoint itself, not the gateway"
    );
    let mut io = TunnelIo::from(stream);
    assert_eq!(
        line(&mut io).await,
        format!("spiffe://mesh.example/ns/shop/sa/webapp for {HOST}:80 from net1\n")
    );
    // More than every window on the way.
    let sent: Vec<u8> = (0..3_000_000u32).map(|i| (i / 7) as u8).collect();
    let (mut from, mut to) = tokio::io::split(io);
    let write = async {
        to.write_all(&sent).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let mut read = Vec::new();
    let (_, count) = tokio::join!(write, from.read_to_end(&mut read));
    count.unwrap();
    assert!(read == sent, "{} of {}", read.len(), sent.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identity_is_end_to_end_through_a_gateway() {
    let w = world().await;
    echoes(w.call(80, "catalog").await.unwrap()).await;
    // The connection to the gateway is shared, the inner ones are not.
    echoes(w.call(80, "catalog").await.unwrap()).await;
    let error = w.call(9, "catalog").await.unwrap_err();
    assert!(
        matches!(error, ThroughError::Gateway(OpenError::Status(503))),
        "{error:?}"
    );
    let error = w.call(81, "catalog").await.unwrap_err();
    assert!(
        matches!(error, ThroughError::Endpoint(OpenError::Status(401))),
        "{error:?}"
    );
    // A gateway that leads to somebody else is found out.
    let error = w.call(80, "payments").await.unwrap_err();
    assert!(
        matches!(error, ThroughError::Endpoint(OpenError::Tls(_))),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_only_dials_out_is_called() {
    let w = world().await;
    w.reverse().await;
    echoes(w.call(80, "catalog").await.unwrap()).await;
    let calls = (0..20).map(|_| w.call(80, "catalog"));
    for stream in futures_util::future::join_all(calls).await {
        echoes(stream.unwrap()).await;
    }
    // The end of the session ends its calls, and is seen at both ends.
    let stream = w.call(80, "catalog").await.unwrap();
    let session = w.gateway.session.lock().unwrap().clone().unwrap();
    session.cut();
    let mut io = TunnelIo::from(stream);
    let mut rest = Vec::new();
    // Greeting or not, it ends: an error or an end, no wait.
    let _ = timeout(WAIT, io.read_to_end(&mut rest)).await.unwrap();
    assert!(session.is_closed());
    let error = w.call(80, "catalog").await.unwrap_err();
    assert!(
        matches!(error, ThroughError::Gateway(OpenError::Status(503))),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revocation_cuts_the_nested_connection_of_one_device() {
    for reverse in [false, true] {
        let w = world().await;
        if reverse {
            w.reverse().await;
        }
        let mut io = TunnelIo::from(w.call(80, "catalog").await.unwrap());
        line(&mut io).await;
        *w.endpoint.revoked.lock().unwrap() = Some(DeviceId(7));
        w.server.recheck(now_unix(), |peer| w.endpoint.admit(peer));
        let mut rest = Vec::new();
        let _ = timeout(WAIT, io.read_to_end(&mut rest)).await.unwrap();
        assert!(w.call(80, "catalog").await.is_err(), "refused from now on");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_is_no_gateway() {
    let w = world().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stranger = pool(&w.mesh.workload("shop", "webapp", 7), &w.tasks);
    let accepting = w.tasks.spawn("stranger", async move {
        let (tcp, _) = listener.accept().await.unwrap();
        stranger.accept_reverse(tcp).await.map(|_| ())
    });
    let expected = vec![w.mesh.id("tombolo-system", "gateway")];
    let held = w
        .server
        .hold_reverse(address, expected, Arc::clone(&w.endpoint), &w.tasks)
        .await;
    assert!(matches!(held, Err(OpenError::Tls(_))));
    assert!(timeout(WAIT, accepting).await.unwrap().unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_over_quic() {
    let mut w = world().await;
    w.quic();
    let calls = (0..20).map(|_| w.call(80, "catalog"));
    for stream in futures_util::future::join_all(calls).await {
        echoes(stream.unwrap()).await;
    }
    assert_eq!(w.gateway.over_quic.load(Ordering::SeqCst), 20);
    let error = w.call(9, "catalog").await.unwrap_err();
    assert!(
        matches!(error, ThroughError::Gateway(OpenError::Status(503))),
        "{error:?}"
    );
    let error = w.call(81, "catalog").await.unwrap_err();
    assert!(
        matches!(error, ThroughError::Endpoint(OpenError::Status(401))),
        "{error:?}"
    );
    let error = w.call(80, "payments").await.unwrap_err();
    assert!(
        matches!(error, ThroughError::Endpoint(OpenError::Tls(_))),
        "{error:?}"
    );
    // A drained gateway ends what runs only when it is done.
    let mut io = TunnelIo::from(w.call(80, "catalog").await.unwrap());
    w.outer.drain();
    line(&mut io).await;
    io.write_all(b"still").await.unwrap();
    let mut echo = [0; 5];
    timeout(WAIT, io.read_exact(&mut echo)).await.unwrap().unwrap();
    assert_eq!(&echo, b"still");
    w.outer.cut();
    let mut rest = Vec::new();
    let _ = timeout(WAIT, io.read_to_end(&mut rest)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_is_called_through_a_session_over_quic() {
    let mut w = world().await;
    let address = w.quic();
    let gateway = Target {
        hbone: address,
        expected: [w.mesh.id("tombolo-system", "gateway")].into(),
    };
    let held = w
        .server
        .hold_reverse_quic(&gateway, Arc::clone(&w.endpoint), &w.tasks)
        .await
        .unwrap();
    assert_eq!(held.peer.device, Some(DeviceId(9)));
    w.tasks.spawn("host", held.run);
    let session = timeout(WAIT, async {
        loop {
            let session = w.gateway.session.lock().unwrap().clone();
            match session {
                Some(session) => return session,
                None => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    });
    let session = session.await.unwrap();
    assert_eq!(
        (session.peer().device, session.transport()),
        (Some(DeviceId(8)), "quic")
    );
    let calls = (0..10).map(|_| w.call(80, "catalog"));
    for stream in futures_util::future::join_all(calls).await {
        echoes(stream.unwrap()).await;
    }
    session.cut();
    assert!(w.call(80, "catalog").await.is_err());
    // Another host is no gateway, over UDP as over TCP.
    let impostor = Target {
        hbone: address,
        expected: [w.mesh.id("shop", "webapp")].into(),
    };
    let held = w
        .server
        .hold_reverse_quic(&impostor, Arc::clone(&w.endpoint), &w.tasks)
        .await;
    assert!(held.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_udp_is_dropped_tcp_carries_it() {
    let mut w = world().await;
    // Takes datagrams and says nothing.
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    w.way_in.quic = Some(silent.local_addr().unwrap());
    let began = Instant::now();
    echoes(w.call(80, "catalog").await.unwrap()).await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    // It is remembered for a while.
    let began = Instant::now();
    echoes(w.call(80, "catalog").await.unwrap()).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}
