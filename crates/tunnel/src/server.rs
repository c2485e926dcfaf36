use crate::{
    conn_io::ConnIo,
    control::{CUT, Control, DRAIN},
    driver::{CONNECTION_WINDOW, Driver, End, FRAME_MAX, SEND_QUEUE, STREAM_WINDOW},
    half_open::HalfOpen,
    io::{SharedIo, TlsIo},
    observe::{Observe, Side},
    pool::log_end,
    tls::{self, HandshakeError},
};
use socket2::{SockRef, TcpKeepalive};
use std::{
    collections::HashMap,
    fmt,
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tombolo_identity::{Current, LiveIdentity, Peer, hbone_server_config, peer_of, still_trusted};
use tombolo_runtime::TaskGroup;

mod idle;
mod incoming;
mod nested;
mod reverse;
mod side;

pub(crate) use incoming::Accepted;
pub use incoming::{Call, Incoming};
pub use reverse::{HeldSession, SessionEnd, SessionPath};
use side::ServerSide;

/// Longest time that a refused peer is listened to.
const FAREWELL: Duration = Duration::from_millis(500);
/// Most bytes of it that are thrown away.
const FAREWELL_MAX: usize = 64 * 1024;

/// Limits of a server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most connections; more wait in the kernel's queue.
    pub connections_max: usize,
    /// Most connections of one source that have not shown a certificate yet; more are closed. A source from which a
    /// certificate has come within ten minutes may have an eighth of `connections_max` if that is more, one that is
    /// [named](Server::name_sources) all. All sources together get half of `connections_max`, strangers a quarter.
    pub half_open_per_source_max: usize,
    /// Longest time from TCP connection to the HTTP/2 preface.
    pub handshake_timeout: Duration,
    /// Most streams of one connection.
    pub streams_max: u32,
    /// Longest header list, in bytes.
    pub header_list_max: u32,
}

impl Default for Limits {
    /// Source for streams and headers: ztunnel.
    fn default() -> Self {
        Self {
            connections_max: 8192,
            half_open_per_source_max: 128,
            handshake_timeout: Duration::from_secs(10),
            streams_max: 200,
            header_list_max: 64 * 1024,
        }
    }
}

/// Decides about connections and serves CONNECT streams.
pub trait Service: Send + Sync + 'static {
    /// True if a peer with a valid certificate may connect at all: false for revoked devices.
    fn admit(&self, peer: &Peer) -> bool;

    /// Serves one stream. The task is dropped with its stream reset if the future does nothing.
    fn connect(self: Arc<Self>, incoming: Incoming) -> impl Future<Output = ()> + Send + 'static;
}

/// A connection as a snapshot for diagnosis.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// Who.
    pub peer: Arc<Peer>,
    /// From where.
    pub remote: SocketAddr,
    /// Open streams.
    pub streams: usize,
}

/// A running server. Dropping it changes nothing: it runs until its tasks are stopped.
#[derive(Clone)]
pub struct Server {
    pub(crate) shared: Arc<Shared>,
    pub(crate) local: SocketAddr,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

pub(crate) struct Shared {
    pub(crate) live: Arc<LiveIdentity>,
    tls: Arc<rustls::ServerConfig>,
    limits: Limits,
    pub(crate) half_open: Arc<HalfOpen>,
    pub(crate) places: Arc<Semaphore>,
    pub(crate) observer: Arc<dyn Observe>,
    running: Mutex<HashMap<u64, Running>>,
    next: AtomicU64,
    pub(crate) stop_accepting: CancellationToken,
}

#[derive(Clone)]
struct Running {
    accepted: Arc<Accepted>,
    bundle_generation: u64,
}

impl Running {
    /// Cuts the connection if its peer is not trusted or not admitted any more.
    fn recheck(&mut self, current: &Current, now_unix: u64, admit: impl Fn(&Peer) -> bool) {
        let peer = &self.accepted.peer;
        let trusted = self.bundle_generation == current.bundle_generation
            || still_trusted(current, &peer.chain, now_unix);
        self.bundle_generation = current.bundle_generation;
        if !trusted || !admit(peer) {
            tracing::info!(peer = %peer.id, "connection cut: the peer is not trusted any more");
            self.accepted.control.set(CUT);
        }
    }
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, HashMap<u64, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Its connections.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        let info = |accepted: &Accepted| ConnectionInfo {
            peer: Arc::clone(&accepted.peer),
            remote: accepted.remote,
            streams: accepted.control.streams(),
        };
        self.shared
            .running()
            .values()
            .map(|running| info(&running.accepted))
            .collect()
    }

    /// Looks at every connection again: if trust bundles have changed the peer's chain is verified again; whoever is
    /// not trusted or not admitted any more is cut at once.
    pub fn recheck(&self, now_unix: u64, admit: impl Fn(&Peer) -> bool) {
        let current = self.shared.live.current();
        for running in self.shared.running().values_mut() {
            running.recheck(&current, now_unix, &admit);
        }
    }

    /// Takes no new streams from peers whose certificate has expired: what runs goes on, as on any live connection, but
    /// a peer that nobody renews is out, however long it keeps a connection.
    pub fn retire(&self, now_unix: u64) {
        for running in self.shared.running().values() {
            let accepted = &running.accepted;
            if accepted.peer.not_after < now_unix && !accepted.control.has(DRAIN) {
                tracing::info!(peer = %accepted.peer.id, "no new streams: the peer's certificate has expired");
                accepted.control.set(DRAIN);
            }
        }
    }

    /// Sources that may hold as many connections without a certificate as there are places, all of them: gateways, which
    /// dial for everybody in other networks.
    pub fn name_sources(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.shared.half_open.name(addresses);
    }

    /// Accepts no more connections and streams; those that run go on. Peers are told by GOAWAY.
    pub fn drain(&self) {
        self.shared.stop_accepting.cancel();
        self.shared
            .running()
            .values()
            .for_each(|running| running.accepted.control.set(DRAIN));
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        self.shared
            .running()
            .values()
            .for_each(|running| running.accepted.control.set(CUT));
    }
}

impl Server {
    /// A server without a listener of its own: it serves what [`Server::take`] is given. `local` is what it says of
    /// itself.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(
        local: SocketAddr,
        live: &Arc<LiveIdentity>,
        limits: Limits,
        observer: Arc<dyn Observe>,
        tasks: &TaskGroup,
    ) -> std::io::Result<Self> {
        let tls = hbone_server_config(live).map_err(std::io::Error::other)?;
        let shared = Arc::new(Shared {
            live: Arc::clone(live),
            tls: tls::server_config(&tls),
            limits,
            half_open: HalfOpen::new(limits.half_open_per_source_max, limits.connections_max / 2),
            places: Arc::new(Semaphore::new(limits.connections_max)),
            observer,
            running: Mutex::default(),
            next: AtomicU64::new(0),
            stop_accepting: tasks.token().child_token(),
        });
        Ok(Self { shared, local })
    }

    /// Serves a connection that was accepted elsewhere. False if it was closed at once: too many of them have not
    /// shown a certificate yet, or there is no place.
    pub fn take<S: Service>(
        &self,
        tcp: TcpStream,
        remote: SocketAddr,
        service: &Arc<S>,
        tasks: &TaskGroup,
    ) -> bool {
        match Arc::clone(&self.shared.places).try_acquire_owned() {
            Ok(place) => self.shared.take(tcp, remote, place, service, tasks),
            Err(_) => {
                self.shared.observer.handshake(Side::Server, "limited");
                false
            }
        }
    }
}

/// Serves HBONE on `listener` until `tasks` stop.
///
/// # Errors
/// When the socket has no address, or TLS cannot be set up.
pub fn serve<S: Service>(
    listener: TcpListener,
    live: &Arc<LiveIdentity>,
    service: Arc<S>,
    limits: Limits,
    observer: Arc<dyn Observe>,
    tasks: &TaskGroup,
) -> std::io::Result<Server> {
    let server = Server::new(listener.local_addr()?, live, limits, observer, tasks)?;
    let (accepting, group) = (Arc::clone(&server.shared), tasks.clone());
    tasks.spawn("hbone accept", async move {
        let stop = accepting.stop_accepting.clone();
        stop.run_until_cancelled(accept(listener, accepting, service, group))
            .await;
    });
    Ok(server)
}

async fn accept<S: Service>(listener: TcpListener, shared: Arc<Shared>, service: Arc<S>, tasks: TaskGroup) {
    loop {
        let Ok(place) = Arc::clone(&shared.places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((tcp, remote)) => {
                shared.take(tcp, remote, place, &service, &tasks);
            }
            Err(error) => {
                // Out of file descriptors: wait instead of spinning.
                tracing::debug!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

impl Shared {
    fn take<S: Service>(
        self: &Arc<Self>,
        tcp: TcpStream,
        remote: SocketAddr,
        place: OwnedSemaphorePermit,
        service: &Arc<S>,
        tasks: &TaskGroup,
    ) -> bool {
        let Some(unproven) = self.half_open.enter(remote.ip()) else {
            self.observer.handshake(Side::Server, "limited");
            return false;
        };
        let (shared, service, group) = (Arc::clone(self), Arc::clone(service), tasks.clone());
        tasks.spawn_until_stopped("hbone server connection", async move {
            let shaken = Box::pin(handshake(tcp, remote, &shared, Arc::clone(&service), group)).await;
            let ready = match shaken {
                Ok(ready) => {
                    unproven.proven();
                    ready
                }
                Err(error) => {
                    let (label, error) = error.label();
                    shared.observer.handshake(Side::Server, label);
                    tracing::debug!(%remote, label, error, "handshake failed");
                    return;
                }
            };
            shared.observer.handshake(Side::Server, "ok");
            let (driver, accepted, bundle_generation) = ready;
            run(driver, accepted, bundle_generation, &*service, &shared).await;
            drop(place);
        });
        true
    }
}

enum Refused {
    Timeout,
    NotAdmitted,
    Handshake(HandshakeError),
    Http2(h2::Error),
}

impl Refused {
    /// Of rustls behind an interface that wraps its errors.
    fn io(error: std::io::Error) -> Self {
        let tls = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        Self::Handshake(match tls.cloned() {
            Some(tls) => tls.into(),
            None => error.into(),
        })
    }

    fn tls(error: &dyn fmt::Display) -> Self {
        Self::Handshake(rustls::Error::General(error.to_string()).into())
    }

    /// A metric label, and what the log says.
    fn label(&self) -> (&'static str, String) {
        match self {
            Self::Timeout => ("timeout", "too slow".to_owned()),
            Self::NotAdmitted => ("not_admitted", "the device was revoked".to_owned()),
            Self::Handshake(HandshakeError::Io(error)) => ("io", error.to_string()),
            Self::Handshake(HandshakeError::Tls(error)) => (error.label(), error.to_string()),
            Self::Http2(error) => ("http2", error.to_string()),
        }
    }
}

type Ready<S> = (Driver<ServerSide<S>>, Arc<Accepted>, u64);

async fn handshake<S: Service>(
    mut tcp: TcpStream,
    remote: SocketAddr,
    shared: &Arc<Shared>,
    service: Arc<S>,
    tasks: TaskGroup,
) -> Result<Ready<S>, Refused> {
    let deadline = Instant::now() + shared.limits.handshake_timeout;
    let within = timeout_at(deadline, async {
        socket_options(&tcp);
        let bundle_generation = shared.live.current().bundle_generation;
        let established = {
            match tls::accept(&mut tcp, Arc::clone(&shared.tls)).await {
                Ok(established) => established,
                Err(error) => {
                    if matches!(error, HandshakeError::Tls(_)) {
                        farewell(&mut tcp).await;
                    }
                    return Err(Refused::Handshake(error));
                }
            }
        };
        let peer = peer_of(&established.chain).map_err(|error| Refused::tls(&error))?;
        if !service.admit(&peer) {
            return Err(Refused::NotAdmitted);
        }
        let local = tcp
            .local_addr()
            .map_err(|error| Refused::Handshake(error.into()))?;
        let control = Control::new();
        let io = SharedIo::new(TlsIo::new(tcp, established, Arc::clone(&control)));
        let connection = http2(&shared.limits)
            .handshake(ConnIo::Tcp(io.clone()))
            .await
            .map_err(Refused::Http2)?;
        let accepted = Arc::new(Accepted {
            peer: Arc::new(peer),
            local,
            remote,
            is_tcp: true,
            control: Arc::clone(&control),
        });
        let side = ServerSide::new(connection, &accepted, service, tasks, shared);
        Ok((Driver::new(side, io, control), accepted, bundle_generation))
    });
    within.await.unwrap_or(Err(Refused::Timeout))
}

/// Closes so that the alert arrives: with bytes left unread the kernel would send a reset, which overtakes it.
async fn farewell(tcp: &mut TcpStream) {
    let read_out = async {
        let mut waste = [0; 4096];
        let mut left = FAREWELL_MAX;
        tcp.shutdown().await?;
        while left > 0 {
            let count = tcp.read(&mut waste).await?;
            if count == 0 {
                break;
            }
            left = left.saturating_sub(count);
        }
        Ok::<_, std::io::Error>(())
    };
    // Whether it went well changes nothing.
    let _ = timeout(FAREWELL, read_out).await;
}

pub(crate) async fn run<S: Service>(
    driver: impl Future<Output = End>,
    accepted: Arc<Accepted>,
    bundle_generation: u64,
    service: &S,
    shared: &Shared,
) {
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    let peer = Arc::clone(&accepted.peer);
    let control = Arc::clone(&accepted.control);
    let mut running = Running {
        accepted,
        bundle_generation,
    };
    shared.running().insert(id, running.clone());
    // Registered first, looked at second: no drain, revocation or change of roots falls between, however long the peer
    // took for its handshake.
    if shared.stop_accepting.is_cancelled() {
        control.set(DRAIN);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    running.recheck(&shared.live.current(), now.as_secs(), |peer| service.admit(peer));
    shared.observer.connections(Side::Server, 1);
    let _gone = Gone { shared, id };
    let end = driver.await;
    log_end(Side::Server, &peer, &end);
}

/// Also when the task is cut.
struct Gone<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.shared.running().remove(&self.id);
        self.shared.observer.connections(Side::Server, -1);
    }
}

/// Options of both sides' sockets. Failing ones are not worth a connection.
pub(crate) fn socket_options(tcp: &TcpStream) {
    let _ = tcp.set_nodelay(true);
    // Source: ztunnel. A dead peer is noticed sooner by PING.
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(180))
        .with_interval(Duration::from_secs(180))
        .with_retries(9);
    let _ = SockRef::from(tcp).set_tcp_keepalive(&keepalive);
}

/// Our settings of HTTP/2.
fn http2(limits: &Limits) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_MAX)
        .max_header_list_size(limits.header_list_max)
        .max_concurrent_streams(limits.streams_max)
        .max_send_buffer_size(SEND_QUEUE);
    builder
}
