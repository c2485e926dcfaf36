//! A pool, and a server that connects each CONNECT to the address that it names.

use crate::support::Mesh;
use http::{Method, StatusCode};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tombolo_identity::{LiveIdentity, Peer};
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{
    Authority, Baggage, ConnectRequest, Ended, Incoming, Limits, Monitor, NoObserver, OpenError, Pool,
    PoolLimits, Server, Service, Target, TunnelStream, bidirectional, serve,
};
use tombolo_types::{DeviceId, SpiffeId};

pub(crate) const WAIT: Duration = Duration::from_secs(20);

/// Connects each CONNECT to the address that it names.
#[derive(Default)]
pub(crate) struct Deliver {
    pub(crate) revoked: AtomicU64,
    pub(crate) open: Arc<AtomicUsize>,
}

impl Service for Deliver {
    fn admit(&self, peer: &Peer) -> bool {
        peer.device != Some(DeviceId(self.revoked.load(Ordering::SeqCst)))
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        let Ok(Authority::Address(address)) = incoming.authority() else {
            return incoming.refuse(StatusCode::BAD_REQUEST);
        };
        if incoming.method() != Method::CONNECT {
            return incoming.refuse(StatusCode::BAD_REQUEST);
        }
        match address.port() {
            1 => return incoming.refuse(StatusCode::UNAUTHORIZED),
            2 => return std::future::pending().await,
            _ => {}
        }
        let Ok(tcp) = TcpStream::connect(address).await else {
            return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
        };
        tcp.set_nodelay(true).unwrap();
        self.open.fetch_add(1, Ordering::SeqCst);
        let from = incoming
            .forwarded()
            .source
            .map(|s| s.to_string())
            .unwrap_or_default();
        let said = Baggage {
            service: from,
            ..Baggage::default()
        }
        .to_header();
        if let Ok(stream) = incoming.accept(said.as_ref()) {
            bidirectional(tcp, stream, &Monitor::default()).await;
        }
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(crate) struct World {
    pub(crate) mesh: Mesh,
    pub(crate) tasks: TaskGroup,
    pub(crate) client: Arc<LiveIdentity>,
    pub(crate) server_identity: Arc<LiveIdentity>,
    pub(crate) service: Arc<Deliver>,
    pub(crate) server: Server,
    pub(crate) pool: Pool,
    pub(crate) target: Target,
}

pub(crate) async fn world() -> World {
    world_with(PoolLimits::default(), Limits::default()).await
}

pub(crate) async fn world_with(pool: PoolLimits, limits: Limits) -> World {
    let mesh = Mesh::new("mesh.example");
    let tasks = TaskGroup::new("test");
    let client = mesh.workload("shop", "webapp", 7);
    let server_identity = mesh.workload("shop", "catalog", 8);
    let service = Arc::new(Deliver::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = serve(
        listener,
        &server_identity,
        Arc::clone(&service),
        limits,
        Arc::new(NoObserver),
        &tasks,
    )
    .unwrap();
    let pool = Pool::new(
        Arc::clone(&client),
        pool,
        Arc::new(|_| true),
        Arc::new(NoObserver),
        &tasks,
    );
    let target = target(server.local_addr(), &mesh.id("shop", "catalog"));
    World {
        mesh,
        tasks,
        client,
        server_identity,
        service,
        server,
        pool,
        target,
    }
}

pub(crate) fn target(hbone: SocketAddr, id: &SpiffeId) -> Target {
    Target {
        hbone,
        expected: [id.clone()].into(),
    }
}

pub(crate) fn request(address: SocketAddr) -> ConnectRequest {
    ConnectRequest::new(Authority::Address(address))
}

impl World {
    pub(crate) async fn open(&self, address: SocketAddr) -> Result<TunnelStream, OpenError> {
        self.pool
            .open(&self.target, &request(address), Instant::now() + WAIT)
            .await
    }

    /// An application's socket whose other end is copied to `address` behind the server.
    pub(crate) async fn application(
        &self,
        address: SocketAddr,
    ) -> (TcpStream, Arc<Monitor>, tokio::task::JoinHandle<Ended>) {
        let stream = self.open(address).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (theirs, _) = listener.accept().await.unwrap();
        theirs.set_nodelay(true).unwrap();
        ours.set_nodelay(true).unwrap();
        let monitor = Arc::new(Monitor::default());
        let watched = Arc::clone(&monitor);
        let copy = self.tasks.spawn(
            "copy",
            async move { bidirectional(theirs, stream, &watched).await },
        );
        (ours, monitor, copy)
    }
}

/// A server whose accepted sockets are handed over.
pub(crate) async fn backend() -> (SocketAddr, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (listener.local_addr().unwrap(), listener)
}

pub(crate) async fn until(mut condition: impl FnMut() -> bool) {
    let reached = timeout(WAIT, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    reached.await.expect("the condition within its deadline");
}
