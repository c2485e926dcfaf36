use crate::{
    Settings,
    context::Context,
    endpoints::Endpoints,
    flows::Flows,
    inbound::Inbound,
    names::{Names, NotOurs},
    outbound,
    refusal::CallError,
    report::count_refusal,
    reverse::Reverse,
    through::{GatewayNames, GatewayTry},
};
use futures_util::future::join_all;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io, mem,
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{Instant, interval, sleep},
};
use tombolo_capture::{Capture, CaptureError, CaptureStats, Captured, Frozen, OpenFlows, Refusal};
use tombolo_destination::{Candidate, Destination, Gateway, GatewayHost, Index as _, resolve};
use tombolo_identity::{LiveIdentity, Peer};
use tombolo_runtime::{Reader, TaskGroup};
use tombolo_snapshot::{Own, Snapshot};
use tombolo_telemetry::{AccessLog, Direction, HandshakeLabels, Metrics, SideLabels};
use tombolo_tunnel::{Observe, Pool, Server, Service as _, Side, serve};
use tombolo_types::{AddressPlan, SpiffeId, networks};

/// Connections that wait in the kernel until they are accepted.
const BACKLOG: i32 = 4096;
/// How often a change of certificates is looked for.
const IDENTITY_LOOK: Duration = Duration::from_millis(250);
/// How often the bytes of open connections are added to the metrics.
const BYTES_EVERY: Duration = Duration::from_secs(5);
/// Longest time that a trial connection waits for one endpoint.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Of the host's own name servers.
const DNS_PORT: u16 = 53;
/// Longest time that cut connections take to be gone.
const CUT_GRACE: Duration = Duration::from_millis(500);

/// What the data path works with.
#[derive(Debug)]
pub struct Inputs {
    /// The world, as discovery sends it.
    pub world: Reader<Snapshot>,
    /// This host's certificate and the trust bundles.
    pub identity: Arc<LiveIdentity>,
    /// Who this host is.
    pub own: Own,
    /// The mesh's virtual addresses.
    pub plan: AddressPlan,
    /// What applications do.
    pub capture: Capture,
    /// Listeners of the process that ran before, by their address instead of new ones; others are closed.
    pub listeners: Vec<StdListener>,
    /// Where is counted.
    pub metrics: Arc<Metrics>,
    /// Where is told.
    pub access_log: AccessLog,
    /// What the host has set.
    pub settings: Settings,
}

/// Why the data path could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The HBONE port cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
}

/// An open connection, for `status` and diagnosis.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// Which way.
    pub direction: Direction,
    /// The caller's address: the application's, or the peer host's.
    pub source: SocketAddr,
    /// What was dialled: the virtual address, or the own address and the application's port.
    pub destination: SocketAddr,
    /// Host name of the service; empty if none.
    pub service: Arc<str>,
    /// Who is at the other end; none for plain TCP.
    pub peer: Option<SpiffeId>,
    /// Bytes from this host to the peer.
    pub bytes_out: u64,
    /// Bytes from the peer to this host.
    pub bytes_in: u64,
    /// How long it has been open.
    pub age: Duration,
}

/// What one endpoint said to a trial connection.
#[derive(Debug, Clone)]
pub struct ProbeResult {
    /// Which.
    pub candidate: Candidate,
    /// How far it came.
    pub outcome: Result<(), CallError>,
    /// Who answered, if the connection was accepted.
    pub peer: Option<SpiffeId>,
    /// The gateways that were tried, in their order, for one in another network.
    pub gateways: Vec<GatewayTry>,
}

/// The running data path. Dropping it changes nothing: it runs until its tasks are stopped.
pub struct Dataplane {
    pub(crate) context: Arc<Context>,
    servers: Vec<Server>,
    /// Serves what comes by sessions that this host holds.
    pub(crate) reverse: Reverse,
    capture: Mutex<Option<Arc<Capture>>>,
    /// The servers' sockets once more, for another process.
    listeners: Mutex<Vec<StdListener>>,
    draining: TaskGroup,
}

impl std::fmt::Debug for Dataplane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dataplane")
            .field("connections", &self.context.flows.len())
            .field("listening", &self.listening())
            .finish_non_exhaustive()
    }
}

impl Dataplane {
    /// Opens the listeners and starts.
    ///
    /// # Errors
    /// When a listener cannot be opened.
    #[allow(
        clippy::unused_async,
        reason = "listeners are tokio's: it must be called inside a runtime"
    )]
    pub async fn start(inputs: Inputs, tasks: &TaskGroup) -> Result<Self, StartError> {
        let Inputs {
            world,
            identity,
            own,
            plan,
            mut capture,
            listeners,
            metrics,
            access_log,
            settings,
        } = inputs;
        // The receiver alone is for the loop; the rest answers for its counters.
        let events = mem::replace(&mut capture.events, mpsc::channel(1).1);
        let parts = Parts {
            world,
            identity,
            own,
            plan,
            metrics,
            access_log,
            settings,
            listeners,
        };
        let dataplane = Self::assemble(parts, tasks)?;
        *lock(&dataplane.capture) = Some(Arc::new(capture));
        dataplane.take(events, tasks);
        Ok(dataplane)
    }

    /// Without capture.
    pub(crate) fn assemble(parts: Parts, tasks: &TaskGroup) -> Result<Self, StartError> {
        let Parts {
            world,
            identity,
            own,
            plan,
            metrics,
            access_log,
            settings,
            listeners: mut inherited,
        } = parts;
        let observer: Arc<dyn Observe> = Arc::new(Observer(Arc::clone(&metrics)));
        let admits = world.clone();
        let admit = move |peer: &Peer| peer.device.is_none_or(|device| !admits.peek().is_revoked(device));
        let pool = Pool::new(
            Arc::clone(&identity),
            settings.pool,
            Arc::new(admit),
            Arc::clone(&observer),
            tasks,
        );
        let listen = settings.hbone_listen.clone();
        let limits = settings.server;
        let context = Arc::new(Context {
            world,
            own,
            plan,
            metrics,
            access: access_log,
            settings,
            flows: Flows::default(),
            endpoints: Endpoints::default(),
            pool,
            gateway_names: GatewayNames::default(),
            handed_over: AtomicBool::new(false),
        });
        let inbound = Arc::new(Inbound {
            context: Arc::clone(&context),
        });
        let (mut servers, mut listeners) = (Vec::new(), Vec::new());
        for address in listen {
            let known = inherited
                .iter()
                .position(|listener| listener.local_addr().is_ok_and(|local| local == address));
            let known = known.map(|place| inherited.swap_remove(place));
            let server = known.map_or_else(|| bind(address), Ok).and_then(|listener| {
                listeners.push(listener.try_clone()?);
                serve(
                    TcpListener::from_std(listener)?,
                    &identity,
                    Arc::clone(&inbound),
                    limits,
                    Arc::clone(&observer),
                    tasks,
                )
            });
            match server {
                Ok(server) => servers.push(server),
                // A host without IPv6 has nobody who could reach it there.
                Err(error) if address.is_ipv6() && error.raw_os_error() == Some(AFNOSUPPORT) => {
                    tracing::info!(%address, "this host has no IPv6");
                }
                Err(source) => return Err(StartError::Listen { address, source }),
            }
        }
        let reverse = Reverse::new(&identity, &inbound, limits, &observer, tasks).map_err(StartError::Tls)?;
        let mut watched = servers.clone();
        watched.push(reverse.server().clone());
        let watch = Watch {
            context: Arc::clone(&context),
            identity,
            servers: watched,
            inbound,
        };
        tasks.spawn_until_stopped("dataplane watch", watch.run());
        Ok(Self {
            context,
            servers,
            reverse,
            capture: Mutex::new(None),
            listeners: Mutex::new(listeners),
            draining: tasks.child("dataplane drain"),
        })
    }

    fn take(&self, mut events: mpsc::Receiver<Captured>, tasks: &TaskGroup) {
        let context = Arc::clone(&self.context);
        let names = Arc::new(Names::new(Arc::clone(&context), DNS_PORT));
        let (group, draining) = (tasks.clone(), self.draining.clone());
        tasks.spawn_until_stopped("dataplane events", async move {
            while let Some(event) = events.recv().await {
                match event {
                    // Nothing is sent: the next try of the application finds the next agent.
                    Captured::Connect(held) if draining.is_stopping() => held.refuse(Refusal::Silent),
                    Captured::Connect(held) => {
                        group.spawn_until_stopped("outbound", outbound::serve(Arc::clone(&context), held));
                    }
                    Captured::Dns(query) => match names.answer(&query.bytes) {
                        Ok(Some(reply)) => query.reply(&reply),
                        Ok(None) => {}
                        Err(NotOurs) => {
                            let names = Arc::clone(&names);
                            group.spawn_until_stopped("forward dns", async move {
                                if let Some(reply) = names.forward(&query.bytes, true).await {
                                    query.reply(&reply);
                                }
                            });
                        }
                    },
                    Captured::DnsTcp(socket) => {
                        let names = Arc::clone(&names);
                        group.spawn_until_stopped("dns tcp", async move { names.serve_tcp(socket).await });
                    }
                    Captured::Ping(ping) => {
                        if answers_ping(&context.world.load(), ping.destination()) {
                            ping.reply();
                        }
                    }
                }
            }
        });
    }

    /// Where HBONE is served.
    pub fn listening(&self) -> Vec<SocketAddr> {
        self.servers.iter().map(Server::local_addr).collect()
    }

    /// Open connections of both directions.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        self.context.flows.infos()
    }

    /// How many of them.
    pub fn connection_count(&self) -> usize {
        self.context.flows.len()
    }

    /// Counters of the capture.
    pub fn capture_stats(&self) -> Option<CaptureStats> {
        lock(&self.capture).as_ref().map(|capture| capture.stats())
    }

    /// The sockets on which HBONE is served, for another process.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn share_listeners(&self) -> io::Result<Vec<OwnedFd>> {
        let listeners = lock(&self.listeners);
        listeners
            .iter()
            .map(|listener| Ok(listener.try_clone()?.into()))
            .collect()
    }

    /// Stops the packet loop for another process; see [`Capture::freeze`]. `None` after [`Self::hand_over`].
    ///
    /// # Errors
    /// When the device or its descriptors are gone; everything goes on as before.
    pub async fn freeze(&self) -> Result<Option<Frozen>, CaptureError> {
        let capture = lock(&self.capture).clone();
        match capture {
            Some(capture) => capture.freeze().await.map(Some),
            None => Ok(None),
        }
    }

    /// Goes on after [`Self::freeze`].
    pub fn resume(&self) {
        let capture = lock(&self.capture).clone();
        if let Some(capture) = capture {
            capture.resume();
        }
    }

    /// Another process goes on with device and listeners. What is open here runs on; peers are told to open their next
    /// streams elsewhere, and none is opened to them. Call it after [`Self::freeze`], once the other process serves.
    pub fn hand_over(&self) -> Option<OpenFlows> {
        self.context.handed_over.store(true, Ordering::Release);
        let capture = lock(&self.capture).take();
        let open = capture.map(|capture| capture.give_away());
        lock(&self.listeners).clear();
        self.servers.iter().for_each(Server::drain);
        self.reverse.drain_later();
        self.context.pool.drain();
        open
    }

    /// True if no connection is open and no peer is connected to this process.
    pub fn is_idle(&self) -> bool {
        self.context.flows.len() == 0
            && self.servers.iter().all(|server| server.connections().is_empty())
            && self.reverse.server().connections().is_empty()
    }

    /// Takes nothing new, lets open connections end until the deadline of the settings, then cuts them.
    pub async fn drain(&self) {
        self.draining.stop();
        // A socket that is kept for another process would go on to take connections.
        lock(&self.listeners).clear();
        self.servers.iter().for_each(Server::drain);
        self.reverse.server().drain();
        let flows = &self.context.flows;
        let wait = async |deadline: Instant| {
            while flows.len() > 0 && Instant::now() < deadline {
                sleep(Duration::from_millis(20)).await;
            }
        };
        wait(Instant::now() + self.context.settings.drain).await;
        // Held connections were still being made with it.
        self.context.pool.drain();
        let left = flows.len();
        if left > 0 {
            tracing::info!(left, "connections are cut at the deadline of the drain");
            flows.cut_all("drained");
            wait(Instant::now() + CUT_GRACE).await;
        }
        self.servers.iter().for_each(Server::cut);
        self.reverse.server().cut();
        self.context.pool.cut();
    }

    /// Tries TLS and CONNECT to each endpoint of a destination; the application there is connected to and left at
    /// once.
    pub async fn probe(&self, destination: &Destination) -> Vec<ProbeResult> {
        let probes = destination.candidates.iter().map(async |candidate| {
            let probed = outbound::probe(&self.context, destination, candidate, PROBE_TIMEOUT);
            let (outcome, peer, gateways) = probed.await;
            ProbeResult {
                candidate: candidate.clone(),
                outcome,
                peer: peer.map(|peer| peer.id.clone()),
                gateways,
            }
        });
        join_all(probes).await
    }
}

/// `EAFNOSUPPORT`.
const AFNOSUPPORT: i32 = nix::errno::Errno::EAFNOSUPPORT as i32;

/// [`Inputs`] without capture.
pub(crate) struct Parts {
    pub(crate) world: Reader<Snapshot>,
    pub(crate) identity: Arc<LiveIdentity>,
    pub(crate) own: Own,
    pub(crate) plan: AddressPlan,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access_log: AccessLog,
    pub(crate) settings: Settings,
    pub(crate) listeners: Vec<StdListener>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bind(address: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// True if some port of the service at a virtual address has a healthy endpoint.
fn answers_ping(world: &Snapshot, address: IpAddr) -> bool {
    let Some(service) = world.service_by_address(address) else {
        return false;
    };
    let source = world.source();
    service
        .ports
        .iter()
        .any(|map| resolve(world, &source, address, map.service_port).is_ok())
}

/// Wall clock, Unix seconds.
fn now_unix() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// Wakes for changes of the world and of the own identity, and decides again about what is open.
struct Watch {
    context: Arc<Context>,
    identity: Arc<LiveIdentity>,
    servers: Vec<Server>,
    inbound: Arc<Inbound>,
}

impl Watch {
    async fn run(self) {
        let mut world = self.context.world.clone();
        let mut look = interval(IDENTITY_LOOK);
        let mut bytes = interval(BYTES_EVERY);
        let mut generations = self.generations();
        let mut policies = Vec::new();
        self.name_gateways(&self.context.world.load());
        loop {
            tokio::select! {
                changed = world.changed() => {
                    let Some(world) = changed else { return };
                    self.decide_again(&world, &mut policies);
                    self.name_gateways(&world);
                }
                _ = look.tick() => {
                    let now = self.generations();
                    if now != generations {
                        generations = now;
                        self.recheck();
                    }
                    self.retire();
                }
                _ = bytes.tick() => self.context.flows.flush(),
            }
        }
    }

    fn generations(&self) -> (u64, u64) {
        let current = self.identity.current();
        (current.certificate_generation, current.bundle_generation)
    }

    fn decide_again(&self, world: &Snapshot, before: &mut Vec<Arc<tombolo_authz::Policy>>) {
        let flows = &self.context.flows;
        flows.cut_revoked(|device| world.is_revoked(device), &self.context.metrics);
        self.recheck();
        let Some(own) = world.own_workload() else { return };
        let policies = world.policies_for(own);
        let same =
            policies.len() == before.len() && policies.iter().zip(&*before).all(|(a, b)| Arc::ptr_eq(a, b));
        if !same {
            flows.decide_again(&policies, &self.context.metrics);
            *before = policies.into_iter().cloned().collect();
        }
    }

    /// A gateway of the own network dials for all callers of other networks: it is not one source among many.
    fn name_gateways(&self, world: &Snapshot) {
        let gateways = world.gateways(networks::home_of(&world.own().network));
        let own = |gateway: &Gateway| {
            let listed = match &gateway.address {
                GatewayHost::Address(address) => Some(*address),
                GatewayHost::Hostname(_) => None,
            };
            let record = world.workload(&gateway.uid);
            let addresses = record.map(|record| record.addresses.to_vec()).unwrap_or_default();
            addresses.into_iter().chain(listed)
        };
        let named: Vec<IpAddr> = gateways.iter().flat_map(own).collect();
        self.servers
            .iter()
            .for_each(|server| server.name_sources(named.iter().copied()));
    }

    /// Connections of peers that have expired take no new streams.
    fn retire(&self) {
        let now = now_unix();
        self.context.pool.retire(now);
        self.servers.iter().for_each(|server| server.retire(now));
    }

    fn recheck(&self) {
        let now = now_unix();
        self.context.pool.recheck(now);
        self.servers
            .iter()
            .for_each(|server| server.recheck(now, |peer| self.inbound.admit(peer)));
    }
}

/// Counts what the tunnel does.
struct Observer(Arc<Metrics>);

impl Observe for Observer {
    fn handshake(&self, side: Side, result: &'static str) {
        self.0
            .handshakes
            .get_or_create(&HandshakeLabels {
                side: side.as_str(),
                result,
            })
            .inc();
    }

    fn connections(&self, side: Side, change: i64) {
        self.0
            .tunnel_connections
            .get_or_create(&SideLabels { side: side.as_str() })
            .inc_by(change);
    }

    fn limited(&self, limit: &'static str) {
        count_refusal(&self.0, Direction::Inbound, limit);
    }
}
