//! Peers that mean harm, over loopback: they may be refused, but cost nobody else anything.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use http::{Method, Request, Version};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use support::{Mesh, now_unix};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout},
};
use tokio_rustls::client::TlsStream;
use tombolo_identity::{Peer, hbone_client_config, hbone_server_name};
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{
    Authority, ConnectRequest, Incoming, Limits, NoObserver, OpenError, Pool, PoolLimits, Server, Service,
    Target, serve,
};

const WAIT: Duration = Duration::from_secs(5);

/// Counts the streams that it serves, and never answers.
#[derive(Default)]
struct Counting {
    revoked: AtomicBool,
    serving: AtomicUsize,
    most: AtomicUsize,
}

impl Service for Counting {
    fn admit(&self, _: &Peer) -> bool {
        !self.revoked.load(Ordering::SeqCst)
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        if incoming.authority().is_ok_and(|authority| authority.port() == 1) {
            return incoming.refuse(http::StatusCode::UNAUTHORIZED);
        }
        let now = self.serving.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        // As slow as an application that does not answer.
        tokio::time::sleep(WAIT).await;
        self.serving.fetch_sub(1, Ordering::SeqCst);
    }
}

struct World {
    mesh: Mesh,
    tasks: TaskGroup,
    service: Arc<Counting>,
    server: Server,
}

async fn world(limits: Limits) -> World {
    let mesh = Mesh::new("mesh.example");
    let tasks = TaskGroup::new("test");
    let identity = mesh.workload("shop", "catalog", 8);
    let service = Arc::new(Counting::default());
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let server = serve(
        listener,
        &identity,
        Arc::clone(&service),
        limits,
        Arc::new(NoObserver),
        &tasks,
    )
    .unwrap();
    World {
        mesh,
        tasks,
        service,
        server,
    }
}

impl World {
    fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.server.local_addr().port()))
    }

    /// What an honest neighbour gets: the answer "not you", over TLS.
    async fn neighbour(&self) -> Result<(), OpenError> {
        let live = self.mesh.workload("shop", "webapp", 7);
        let pool = Pool::new(
            live,
            PoolLimits::default(),
            Arc::new(|_| true),
            Arc::new(NoObserver),
            &self.tasks,
        );
        let target = Target {
            hbone: self.address(),
            expected: [self.mesh.id("shop", "catalog")].into(),
        };
        let request = ConnectRequest::new(Authority::Address("10.0.0.1:1".parse().unwrap()));
        pool.open(&target, &request, Instant::now() + WAIT)
            .await
            .map(drop)
    }

    async fn tls(&self) -> TlsStream<TcpStream> {
        let live = self.mesh.workload("shop", "webapp", 7);
        let config = hbone_client_config(&live, vec![self.mesh.id("shop", "catalog")]).unwrap();
        let tcp = TcpStream::connect(self.address()).await.unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(hbone_server_name(), tcp)
            .await
            .unwrap()
    }
}

async fn from_source(source: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((source, 0))).unwrap();
    socket.connect(to).await.unwrap()
}

/// The first bytes of a handshake, and then nothing.
async fn stall(source: [u8; 4], to: SocketAddr) -> TcpStream {
    let mut tcp = from_source(source, to).await;
    tcp.write_all(&[22, 3, 1]).await.unwrap();
    tcp
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_handshakes_delay_nobody() {
    let w = world(Limits::default()).await;
    let mut stalled = Vec::new();
    for i in 0..200 {
        stalled.push(stall([127, 0, 0, 2 + i % 2], w.address()).await);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(matches!(w.neighbour().await, Err(OpenError::Status(401))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_source_does_not_take_all_places() {
    let limits = Limits {
        connections_max: 300,
        ..Limits::default()
    };
    let w = world(limits).await;
    let mut stalled = Vec::new();
    for _ in 0..400 {
        stalled.push(from_source([127, 0, 0, 2], w.address()).await);
    }
    assert!(matches!(w.neighbour().await, Err(OpenError::Status(401))));
}

/// The certificate is shown before the revocation, HTTP/2 begins after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_during_the_handshake_is_not_missed() {
    let w = world(Limits::default()).await;
    let mut tls = w.tls().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    w.service.revoked.store(true, Ordering::SeqCst);
    w.server.recheck(now_unix(), |peer| w.service.admit(peer));
    // Preface and an empty SETTINGS.
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    tls.write_all(preface).await.unwrap();
    let mut rest = Vec::new();
    let closed = timeout(WAIT, tls.read_to_end(&mut rest)).await;
    assert!(closed.is_ok(), "a revoked device keeps its connection");
    assert!(w.server.connections().is_empty());
}

/// Streams that are reset at once do not count against the limit of HTTP/2, but what they started goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_reset_at_once_do_not_pile_up() {
    let limits = Limits {
        streams_max: 20,
        ..Limits::default()
    };
    let w = world(limits).await;
    let (mut sender, connection) = h2::client::handshake(w.tls().await).await.unwrap();
    let driver = w.tasks.spawn("client", connection);
    for _ in 0..400 {
        let Ok(ready) = sender.clone().ready().await else {
            break;
        };
        sender = ready;
        let request = Request::builder()
            .method(Method::CONNECT)
            .version(Version::HTTP_2)
            .uri("10.0.0.1:80")
            .body(())
            .unwrap();
        let Ok((response, mut stream)) = sender.send_request(request, false) else {
            break;
        };
        // Let it be accepted before it is taken back.
        tokio::time::sleep(Duration::from_millis(2)).await;
        stream.send_reset(h2::Reason::CANCEL);
        drop(response);
    }
    let most = w.service.most.load(Ordering::SeqCst);
    assert!(
        most <= 40,
        "{most} streams were served at once for one connection"
    );
    assert!(most > 0);
    driver.abort();
}
