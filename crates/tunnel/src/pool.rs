use crate::{
    OpenError, TlsError,
    conn_io::ConnIo,
    control::{CLOSED, CUT, Control, DRAIN, Lease, SILENT},
    driver::{CONNECTION_WINDOW, Driver, End, FRAME_MAX, Http2, SEND_QUEUE, STREAM_WINDOW},
    headers::{Baggage, ConnectRequest},
    io::{SharedIo, TlsIo},
    observe::{Observe, Side},
    quic::QuicClient,
    stream::TunnelStream,
    tls::{self, HandshakeError},
};
use bytes::Bytes;
use h2::{
    PingPong, Reason,
    client::{Connection, SendRequest},
};
use std::{
    collections::HashMap,
    fmt,
    future::{Future as _, poll_fn},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{net::TcpSocket, sync::watch, time::Instant};
use tombolo_identity::{
    Current, LiveIdentity, Peer, hbone_client_config, hbone_server_name, peer_of, still_trusted,
};
use tombolo_runtime::TaskGroup;
use tombolo_types::SpiffeId;

mod nested;
mod paths;
mod reverse;

pub(crate) use nested::refuse_revoked;
pub use nested::{GatewayTarget, ThroughError};
pub use paths::QuicPath;
pub use reverse::ReverseSession;

/// Longest header list that we take in an answer. Source: ztunnel.
const HEADER_LIST_MAX: u32 = 16 * 1024;
/// Tries of one stream when a connection ends under it before the peer has seen it.
const TRIES: u32 = 3;
/// How often connections are looked over.
const SWEEP: Duration = Duration::from_secs(5);

/// Limits of the pool.
#[derive(Debug, Clone, Copy)]
pub struct PoolLimits {
    /// Streams of one connection, at most what the peer allows; then another connection is opened.
    pub streams_max: usize,
    /// Longest TCP and TLS handshake together.
    pub connect_timeout: Duration,
    /// A connection without streams is released after so long.
    pub idle_timeout: Duration,
    /// A gateway that did not answer over UDP is not asked that way again for so long.
    pub udp_retry: Duration,
}

impl Default for PoolLimits {
    /// Source: ztunnel: 100 streams, 10 s, 5 min. UDP after a minute: firewalls are not changed more often.
    fn default() -> Self {
        Self {
            streams_max: 100,
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            udp_retry: Duration::from_secs(60),
        }
    }
}

/// A peer and who it must be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Its HBONE server.
    pub hbone: SocketAddr,
    /// Identities of which it must prove one.
    pub expected: Arc<[SpiffeId]>,
}

/// Connections are shared only between streams that would make the same handshake.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    target: Target,
    certificate_generation: u64,
    bundle_generation: u64,
}

/// Decides whether a peer with a valid certificate may be spoken to: false for revoked devices.
pub type Admit = dyn Fn(&Peer) -> bool + Send + Sync;

/// Opens streams to peers and reuses connections. Cheap to clone; clones share the connections.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

struct Shared {
    live: Arc<LiveIdentity>,
    limits: PoolLimits,
    admit: Arc<Admit>,
    observer: Arc<dyn Observe>,
    tasks: TaskGroup,
    quic: QuicClient,
    /// Gateways that did not answer over UDP, and until when they are not asked again.
    no_udp: Mutex<HashMap<SocketAddr, Instant>>,
    slots: Mutex<HashMap<Key, Slot>>,
    /// Every connection whose driver runs, also those that take no new streams.
    running: Mutex<HashMap<u64, Running>>,
    next: AtomicU64,
    draining: AtomicBool,
}

type Outcome = Option<Result<(), OpenError>>;

#[derive(Default)]
struct Slot {
    ready: Vec<Arc<Pooled>>,
    connecting: Option<watch::Receiver<Outcome>>,
}

struct Pooled {
    sender: SendRequest<Bytes>,
    control: Arc<Control>,
    peer: Arc<Peer>,
}

struct Running {
    control: Arc<Control>,
    peer: Arc<Peer>,
    bundle_generation: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// An empty pool; its tasks run in `tasks`.
    pub fn new(
        live: Arc<LiveIdentity>,
        limits: PoolLimits,
        admit: Arc<Admit>,
        observer: Arc<dyn Observe>,
        tasks: &TaskGroup,
    ) -> Self {
        let shared = Arc::new(Shared {
            quic: QuicClient::new(Arc::clone(&live), Arc::clone(&admit), tasks.clone()),
            no_udp: Mutex::default(),
            live,
            limits,
            admit,
            observer,
            tasks: tasks.clone(),
            slots: Mutex::default(),
            running: Mutex::default(),
            next: AtomicU64::new(0),
            draining: AtomicBool::new(false),
        });
        let swept = Arc::downgrade(&shared);
        tasks.spawn_until_stopped("hbone pool sweep", async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                let Some(shared) = swept.upgrade() else { return };
                shared.sweep();
            }
        });
        Self { shared }
    }

    /// Opens a stream: over a pooled connection if one has room, else over a new one. At most one connection to a
    /// target is being made at a time; the others wait for it.
    ///
    /// Cancel-safe: a connection that is being made is finished for others.
    ///
    /// # Errors
    /// When no connection can be made, the peer refuses the CONNECT, or the deadline passes.
    pub async fn open(
        &self,
        target: &Target,
        request: &ConnectRequest,
        deadline: Instant,
    ) -> Result<TunnelStream, OpenError> {
        let started = Instant::now();
        let opened = tokio::time::timeout_at(deadline, self.open_within(target, request));
        opened
            .await
            .unwrap_or_else(|_| Err(OpenError::Timeout(started.elapsed())))
    }

    async fn open_within(
        &self,
        target: &Target,
        request: &ConnectRequest,
    ) -> Result<TunnelStream, OpenError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let (pooled, lease) = self.acquire(target).await?;
            match pooled.request(lease, request).await {
                Ok(stream) => return Ok(stream),
                Err(Failure::Unseen(error)) => {
                    self.shared.forget(&pooled);
                    if tries == TRIES {
                        return Err(error);
                    }
                }
                Err(Failure::Final(error)) => return Err(error),
            }
        }
    }

    async fn acquire(&self, target: &Target) -> Result<(Arc<Pooled>, Lease), OpenError> {
        loop {
            if self.shared.draining.load(Ordering::Acquire) {
                return Err(OpenError::Draining);
            }
            let current = self.shared.live.current();
            let mut connecting = match self.shared.find(target, &current) {
                Found::Ready(pooled, lease) => return Ok((pooled, lease)),
                Found::Wait(connecting) => connecting,
                Found::Connect(key, outcome, connecting) => {
                    let shared = Arc::clone(&self.shared);
                    self.shared
                        .tasks
                        .spawn("hbone connect", shared.connect(key, outcome));
                    connecting
                }
            };
            match connecting.wait_for(Option::is_some).await {
                Ok(outcome) => {
                    if let Some(Err(error)) = &*outcome {
                        return Err(error.clone());
                    }
                }
                Err(_) => return Err(OpenError::Draining), // the task was dropped with the runtime
            }
        }
    }

    /// Looks at every connection again: after a change of certificates it takes no new streams; after a change of trust
    /// bundles the peer's chain is verified again; whoever is not trusted or not admitted any more is cut at once.
    pub fn recheck(&self, now_unix: u64) {
        let current = self.shared.live.current();
        for running in lock(&self.shared.running).values_mut() {
            let trusted = running.bundle_generation == current.bundle_generation
                || still_trusted(&current, &running.peer.chain, now_unix);
            running.bundle_generation = current.bundle_generation;
            if !trusted || !(self.shared.admit)(&running.peer) {
                tracing::info!(peer = %running.peer.id, "connection cut: the peer is not trusted any more");
                running.control.set(CUT);
            }
        }
        for link in self.shared.quic.all() {
            let trusted = link.bundle_generation == current.bundle_generation
                || still_trusted(&current, &link.peer.chain, now_unix);
            if !trusted || !(self.shared.admit)(&link.peer) {
                tracing::info!(peer = %link.peer.id, "connection cut: the peer is not trusted any more");
                link.control.set(CUT);
            }
        }
        self.shared.sweep();
    }

    /// Opens no new streams to peers whose certificate has expired; what runs goes on.
    pub fn retire(&self, now_unix: u64) {
        for slot in lock(&self.shared.slots).values_mut() {
            slot.ready.retain(|pooled| pooled.peer.not_after >= now_unix);
        }
    }

    /// Connections now.
    pub fn connections(&self) -> usize {
        lock(&self.shared.running).len()
    }

    /// Takes no new streams; connections end when theirs have.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
        lock(&self.shared.slots).clear();
        self.shared
            .quic
            .all()
            .iter()
            .for_each(|link| link.control.set(DRAIN));
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        lock(&self.shared.running)
            .values()
            .for_each(|running| running.control.set(CUT));
        self.shared
            .quic
            .all()
            .iter()
            .for_each(|link| link.control.set(CUT));
    }
}

enum Found {
    Ready(Arc<Pooled>, Lease),
    Wait(watch::Receiver<Outcome>),
    Connect(Key, watch::Sender<Outcome>, watch::Receiver<Outcome>),
}

impl Shared {
    fn find(&self, target: &Target, current: &Current) -> Found {
        let key = Key {
            target: target.clone(),
            certificate_generation: current.certificate_generation,
            bundle_generation: current.bundle_generation,
        };
        let mut slots = lock(&self.slots);
        let slot = slots.entry(key.clone()).or_default();
        slot.ready.retain(|pooled| !pooled.control.has(CLOSED | CUT));
        for pooled in &slot.ready {
            let max = self
                .limits
                .streams_max
                .min(pooled.sender.current_max_send_streams())
                .max(1);
            if let Some(lease) = pooled.control.try_lease(max) {
                return Found::Ready(Arc::clone(pooled), lease);
            }
        }
        if let Some(connecting) = &slot.connecting {
            return Found::Wait(connecting.clone());
        }
        let (outcome, connecting) = watch::channel(None);
        slot.connecting = Some(connecting.clone());
        Found::Connect(key, outcome, connecting)
    }

    /// Lets a connection that is ending take no further streams.
    fn forget(&self, gone: &Arc<Pooled>) {
        for slot in lock(&self.slots).values_mut() {
            slot.ready.retain(|pooled| !Arc::ptr_eq(pooled, gone));
        }
    }

    fn sweep(&self) {
        let current = self.live.current();
        let idle = self.limits.idle_timeout.as_secs();
        self.quic.sweep();
        lock(&self.slots).retain(|key, slot| {
            let present = key.certificate_generation == current.certificate_generation
                && key.bundle_generation == current.bundle_generation;
            // Dropping the last sender makes HTTP/2 say GOAWAY and end with the last stream.
            slot.ready.retain(|pooled| {
                present && !pooled.control.has(CLOSED | CUT) && pooled.control.idle_seconds() < idle
            });
            !slot.ready.is_empty() || slot.connecting.is_some()
        });
    }

    async fn connect(self: Arc<Self>, key: Key, outcome: watch::Sender<Outcome>) {
        let timeout = self.limits.connect_timeout;
        let connected = tokio::time::timeout(timeout, self.handshake(&key.target));
        let connected = connected.await.unwrap_or(Err(OpenError::Timeout(timeout)));
        self.observer.handshake(
            Side::Client,
            match &connected {
                Ok(_) => "ok",
                Err(OpenError::Tls(error)) => error.label(),
                Err(error) => error.reason(),
            },
        );
        let result = connected.map(|(pooled, driver)| {
            let bundle_generation = key.bundle_generation;
            self.run(&pooled, driver, bundle_generation);
            pooled
        });
        let draining = self.draining.load(Ordering::Acquire);
        {
            let mut slots = lock(&self.slots);
            let slot = slots.entry(key.clone()).or_default();
            slot.connecting = None;
            match &result {
                Ok(pooled) if !draining => slot.ready.push(Arc::clone(pooled)),
                Ok(_) => {}
                Err(_) if slot.ready.is_empty() => drop(slots.remove(&key)),
                Err(_) => {}
            }
        }
        // Nobody may be waiting any more.
        let _ = outcome.send(Some(result.map(drop)));
    }

    async fn handshake(&self, target: &Target) -> Result<(Arc<Pooled>, Driver<Http2Client>), OpenError> {
        if self.live.current().identity.is_none() {
            return Err(OpenError::Tls(TlsError::NoIdentity));
        }
        let config = hbone_client_config(&self.live, target.expected.to_vec())
            .map_err(|error| OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string()))))?;
        let socket = if target.hbone.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        let mut tcp = socket.connect(target.hbone).await?;
        crate::server::socket_options(&tcp);
        let established = tls::connect(&mut tcp, config, hbone_server_name())
            .await
            .map_err(|error| match error {
                HandshakeError::Io(error) => error.into(),
                HandshakeError::Tls(error) => OpenError::Tls(error),
            })?;
        let peer = peer_of(&established.chain)
            .map_err(|error| OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string()))))?;
        refuse_revoked(&self.admit, &peer)?;
        let control = Control::new();
        let io = SharedIo::new(TlsIo::new(tcp, established, Arc::clone(&control)));
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_MAX)
            .max_header_list_size(HEADER_LIST_MAX)
            .max_send_buffer_size(SEND_QUEUE)
            .enable_push(false)
            .handshake(ConnIo::Tcp(io.clone()))
            .await
            .map_err(OpenError::from_h2)?;
        let driver = Driver::new(Http2Client(connection), io, Arc::clone(&control));
        Ok((
            Arc::new(Pooled {
                sender,
                control,
                peer: Arc::new(peer),
            }),
            driver,
        ))
    }

    fn run(self: &Arc<Self>, pooled: &Arc<Pooled>, driver: Driver<Http2Client>, bundle_generation: u64) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (control, peer) = (Arc::clone(&pooled.control), Arc::clone(&pooled.peer));
        let running = Running {
            control,
            peer: Arc::clone(&peer),
            bundle_generation,
        };
        lock(&self.running).insert(id, running);
        // Registered first, looked at second: a revocation during the handshake is not missed. (A change of roots made
        // another key: no stream is opened here, and the next look verifies the chain again.)
        if !(self.admit)(&peer) {
            pooled.control.set(CUT);
        }
        self.observer.connections(Side::Client, 1);
        let shared = Arc::clone(self);
        self.tasks.spawn("hbone client connection", async move {
            let end = driver.await;
            lock(&shared.running).remove(&id);
            shared.observer.connections(Side::Client, -1);
            log_end(Side::Client, &peer, &end);
        });
    }
}

/// Notes at debug level how a connection ended.
pub(crate) fn log_end(side: Side, peer: &Peer, end: &End) {
    let side = side.as_str();
    match end {
        End::Http2(Ok(())) => tracing::debug!(side, peer = %peer.id, "connection ended"),
        End::Http2(Err(error)) => tracing::debug!(side, peer = %peer.id, %error, "connection ended"),
        End::Io(error) => tracing::debug!(side, peer = %peer.id, %error, "connection lost"),
        End::Silent => tracing::info!(side, peer = %peer.id, "connection dropped: the peer was silent"),
        End::Cut => tracing::debug!(side, peer = %peer.id, "connection cut"),
    }
}

/// Why a request failed.
enum Failure {
    /// The peer has not seen it: it may be sent again.
    Unseen(OpenError),
    Final(OpenError),
}

impl Failure {
    fn into_error(self) -> OpenError {
        match self {
            Self::Unseen(error) | Self::Final(error) => error,
        }
    }
}

impl Pooled {
    async fn request(&self, lease: Lease, request: &ConnectRequest) -> Result<TunnelStream, Failure> {
        let http = request
            .to_http()
            .map_err(|error| Failure::Final(io::Error::new(io::ErrorKind::InvalidInput, error).into()))?;
        let mut sender = self.sender.clone();
        poll_fn(|cx| sender.poll_ready(cx))
            .await
            .map_err(|error| self.unseen(error))?;
        let unanswered = lease.asks();
        let (response, send) = sender
            .send_request(http, false)
            .map_err(|error| self.unseen(error))?;
        drop(sender);
        let response = response.await.map_err(|error| {
            let refused = error.reason() == Some(Reason::REFUSED_STREAM);
            // A GOAWAY names the last stream that was seen, and fails only those behind it.
            if refused || (error.is_go_away() && error.reason() == Some(Reason::NO_ERROR)) {
                return self.unseen(error);
            }
            Failure::Final(self.explain(error))
        })?;
        drop(unanswered);
        let (parts, recv) = response.into_parts();
        if parts.status != http::StatusCode::OK {
            return Err(Failure::Final(OpenError::Status(parts.status.as_u16())));
        }
        let baggage = Some(Baggage::from_headers(&parts.headers))
            .filter(|b| *b != Baggage::default())
            .map(Box::new);
        Ok(TunnelStream {
            send,
            recv,
            lease,
            peer: Arc::clone(&self.peer),
            baggage,
        })
    }

    fn unseen(&self, error: h2::Error) -> Failure {
        let explained = self.explain(error);
        // A handshake that the peer has refused afterwards would be refused again.
        if matches!(explained, OpenError::Tls(_)) {
            Failure::Final(explained)
        } else {
            Failure::Unseen(explained)
        }
    }

    fn explain(&self, error: h2::Error) -> OpenError {
        if self.control.has(SILENT) {
            return OpenError::Timeout(Duration::from_secs(2));
        }
        match self.control.tls_failure() {
            Some(failure) => OpenError::Tls(failure.clone()),
            None => OpenError::from_h2(error),
        }
    }
}

/// The client's side of HTTP/2.
struct Http2Client(Connection<ConnIo, Bytes>);

impl Http2 for Http2Client {
    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        Pin::new(&mut self.0).poll(cx)
    }

    fn ping_pong(&mut self) -> Option<PingPong> {
        self.0.ping_pong()
    }

    fn grow(&mut self, window: u32) {
        // Fails only while an earlier change is unacknowledged: then the windows stay as they are.
        let _ = self.0.set_initial_window_size(window);
    }

    fn drain(&mut self) {
        // A client ends by dropping its senders.
    }
}
