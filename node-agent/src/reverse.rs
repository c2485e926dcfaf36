//! The way in to a host that can only dial out: sessions that it holds with every gateway of its network.
//!
//! A session runs over QUIC, which survives a change of this host's address, or over TLS on TCP where UDP is dropped. Each
//! is replaced by a new one before it is given up: calls that run in the old one go on there.

use crate::agent::{Agent, Phase};
use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tombolo_control_client::{Problem, backoff::Backoff};
use tombolo_dataplane::{Dataplane, ReverseEnd, Transport};
use tombolo_destination::{Gateway, GatewayHost, Index as _};
use tombolo_identity::LiveIdentity;
use tombolo_proto::tombolo::agent::v1::ReverseSession;
use tombolo_runtime::{Reader, TaskGroup};
use tombolo_snapshot::Snapshot;
use tombolo_tunnel::OpenError;
use tombolo_types::{Code, networks};

/// Between two tries to reach a gateway: at once after a short outage, and no storm after a long one.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(15));
/// How often a session is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// One over QUIC: how fine its silence is measured.
const LOOK_QUIC: Duration = Duration::from_millis(250);
/// Something comes over QUIC every second, and its acknowledgement a round trip later. If nothing has come for so long, and twice
/// the round trip where that is long, another way is tried beside it: QUIC itself gives up after 3 s.
const SILENT_AFTER: Duration = Duration::from_millis(1500);
/// A session that ends sooner was not wanted by the gateway: it is not opened again at once.
const LIVED: Duration = Duration::from_secs(5);
/// So long nothing is said of a host without a session: at the start, and when gateways are replaced.
const GRACE: Duration = Duration::from_secs(3);

/// One gateway, as far as this host's session with it goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Held {
    /// `host:port`.
    pub(crate) gateway: String,
    /// How the session runs; none: there is none.
    pub(crate) transport: Option<Transport>,
    /// Why there is none.
    pub(crate) problem: String,
}

/// What `tombolo status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Report {
    /// The network whose gateways are the way in; none: this host can be dialled.
    pub(crate) network: Option<Arc<str>>,
    /// By uid of the gateway's record.
    pub(crate) gateways: BTreeMap<Arc<str>, Held>,
    /// True once it has gone on for so long that it should be said.
    pub(crate) settled: bool,
}

impl Report {
    fn is_cut_off(&self) -> bool {
        self.network.is_some() && self.gateways.values().all(|held| held.transport.is_none())
    }

    /// The finding of a host that nobody can call.
    pub(crate) fn problem(&self) -> Option<Problem> {
        let network = self.network.as_ref()?;
        if !self.settled || !self.is_cut_off() {
            return None;
        }
        let told: Vec<_> = self
            .gateways
            .values()
            .map(|held| format!("{}: {}", held.gateway, held.problem))
            .collect();
        let cause = if told.is_empty() && network.is_empty() {
            "no gateway of the default network is known".to_owned()
        } else if told.is_empty() {
            format!("no gateway of the network {network} is known")
        } else {
            told.join("; ")
        };
        Some(Problem::new(Code::NoReverseSession, cause))
    }

    /// As the admin API says it.
    pub(crate) fn sessions(&self) -> Vec<ReverseSession> {
        let session = |held: &Held| ReverseSession {
            gateway: held.gateway.clone(),
            transport: held
                .transport
                .map_or_else(String::new, |transport| transport.to_string()),
            problem: held.problem.clone(),
        };
        self.gateways.values().map(session).collect()
    }
}

/// Holds the sessions while the group runs. When it is stopped they go on: another process has taken over, or the data
/// path drains.
pub(crate) fn follow(agent: &Arc<Agent>, tasks: &TaskGroup) {
    let (agent, group) = (Arc::clone(agent), tasks.child("reverse"));
    tasks.spawn_until_stopped("reverse sessions", async move {
        let Some(enrolled) = agent.enrolled.get() else {
            return;
        };
        let mut dataplanes = agent.dataplane.subscribe();
        let mut phase = agent.phase.subscribe();
        loop {
            let dataplane = dataplanes.borrow_and_update().clone();
            let keepers = group.child("reverse");
            let held = async {
                match dataplane {
                    Some(dataplane) => {
                        let all = All {
                            dataplane,
                            identity: Arc::clone(&enrolled.identity),
                            report: agent.reverse.clone(),
                            quic_retry: agent.settings.quic_retry(),
                            tasks: keepers.clone(),
                            keepers: BTreeMap::new(),
                        };
                        all.run(enrolled.world.clone()).await;
                    }
                    None => std::future::pending().await,
                }
            };
            let draining = tokio::select! {
                () = held => true,
                changed = dataplanes.changed() => changed.is_err(),
                _ = phase.wait_for(|phase| *phase == Phase::Draining) => true,
            };
            keepers.stop();
            if draining {
                return;
            }
            // They have ended with the data path.
            agent.reverse.send_modify(|report| report.gateways.clear());
        }
    });
}

/// The network whose gateways are the way in to this host, and these: healthy ones, and those that are held already.
/// `None` for the network: this host can be dialled. `None` for all: not known yet.
fn wanted(world: &Snapshot, held: impl Fn(&str) -> bool) -> Option<(Option<Arc<str>>, Vec<Gateway>)> {
    let own = world.own_workload()?;
    if !networks::is_outbound(&own.network) {
        return Some((None, Vec::new()));
    }
    let home = networks::home_of(&own.network);
    let mut listed = world.gateways(&own.network);
    if listed.is_empty() {
        listed = world.gateways(home);
    }
    // One that is lost to discovery may be well: its session ends by itself, or not at all.
    let wanted = listed.iter().filter(|one| one.healthy || held(&one.uid));
    Some((Some(home.into()), wanted.cloned().collect()))
}

struct Keeper {
    gateway: watch::Sender<Gateway>,
    session: Kept,
    tasks: TaskGroup,
}

type Kept = Arc<Mutex<Option<ReverseEnd>>>;

/// Every session of one data path.
struct All {
    dataplane: Arc<Dataplane>,
    identity: Arc<LiveIdentity>,
    report: watch::Sender<Report>,
    quic_retry: Duration,
    tasks: TaskGroup,
    keepers: BTreeMap<Arc<str>, Keeper>,
}

impl All {
    async fn run(mut self, mut world: Reader<Snapshot>) {
        let mut report = self.report.subscribe();
        let mut cut_off_since = None;
        loop {
            self.reconcile(&world.load());
            let cut_off = report.borrow_and_update().is_cut_off();
            let since = cut_off.then(|| *cut_off_since.get_or_insert_with(Instant::now));
            cut_off_since = since;
            let due = since.map(|since| since + GRACE);
            let over = due.is_some_and(|due| due <= Instant::now());
            self.report.send_if_modified(|report| {
                let changed = report.settled != over;
                report.settled = over;
                changed
            });
            let grace = async {
                match due.filter(|_| !over) {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = world.changed() => if changed.is_none() { return },
                changed = report.changed() => if changed.is_err() { return },
                () = grace => {}
            }
        }
    }

    fn reconcile(&mut self, world: &Snapshot) {
        let held = |uid: &str| self.keepers.contains_key(uid);
        let Some((network, gateways)) = wanted(world, held) else {
            return;
        };
        let gone: Vec<_> = self
            .keepers
            .keys()
            .filter(|uid| !gateways.iter().any(|gateway| gateway.uid == **uid))
            .cloned()
            .collect();
        for uid in gone {
            if let Some(keeper) = self.keepers.remove(&uid) {
                tracing::info!(gateway = %name(&keeper.gateway.borrow()), "not a gateway of this host's network any more");
                keeper.tasks.stop();
                let session = keeper
                    .session
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                if let Some(session) = session {
                    session.drain();
                }
            }
            self.report
                .send_modify(|report| drop(report.gateways.remove(&uid)));
        }
        self.report.send_if_modified(|report| {
            let changed = report.network != network;
            report.network = network;
            changed
        });
        for gateway in gateways {
            match self.keepers.get(&gateway.uid) {
                Some(keeper) => {
                    keeper.gateway.send_if_modified(|known| {
                        let changed = *known != gateway;
                        *known = gateway;
                        changed
                    });
                }
                None => self.keep(gateway),
            }
        }
    }

    fn keep(&mut self, gateway: Gateway) {
        let uid = Arc::clone(&gateway.uid);
        let (sender, receiver) = watch::channel(gateway);
        let session = Kept::default();
        let tasks = self.tasks.child("reverse session");
        let one = One {
            dataplane: Arc::clone(&self.dataplane),
            identity: Arc::clone(&self.identity),
            report: self.report.clone(),
            uid: Arc::clone(&uid),
            session: Arc::clone(&session),
            quic: Quic {
                again: self.quic_retry,
                silent_until: None,
            },
        };
        one.say(&receiver.borrow(), None, "being dialled");
        tasks.spawn_until_stopped("reverse session", one.run(receiver));
        let keeper = Keeper {
            gateway: sender,
            session,
            tasks,
        };
        self.keepers.insert(uid, keeper);
    }
}

/// `host:port` of a gateway.
fn name(gateway: &Gateway) -> String {
    let port = gateway.hbone_port;
    match &gateway.address {
        GatewayHost::Address(address) => SocketAddr::new(*address, port).to_string(),
        GatewayHost::Hostname(host) => format!("{host}:{port}"),
    }
}

/// Whether QUIC is worth a try.
#[derive(Debug, Clone, Copy)]
struct Quic {
    /// After a failure: not for so long.
    again: Duration,
    silent_until: Option<Instant>,
}

impl Quic {
    fn is_due(&self, now: Instant) -> bool {
        self.silent_until.is_none_or(|until| until <= now)
    }

    fn failed(&mut self, now: Instant) {
        self.silent_until = Some(now + self.again);
    }
}

/// Listens to a session over QUIC.
#[derive(Debug, Clone, Copy)]
struct Ears {
    datagrams: u64,
    since: Instant,
}

impl Ears {
    fn new(now: Instant) -> Self {
        Self {
            datagrams: 0,
            since: now,
        }
    }

    /// True if nothing has come for too long. `heard`: datagrams so far and the round trip; none where nothing can be heard.
    fn is_silent(&mut self, heard: Option<(u64, Duration)>, now: Instant) -> bool {
        let Some((datagrams, round_trip)) = heard else {
            return false;
        };
        if datagrams != self.datagrams {
            (self.datagrams, self.since) = (datagrams, now);
        }
        now.duration_since(self.since) >= SILENT_AFTER.max(Duration::from_secs(1) + 2 * round_trip)
    }
}

/// What has become of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// It is over.
    Ended,
    /// A better one is to be made before it is given up.
    Renew,
    /// QUIC may work now.
    TryQuic,
    /// QUIC may have ended.
    TryTcp,
}

/// What is looked at while a session runs.
struct Seen<'a> {
    /// The gateway that was dialled, and as it is listed now.
    gateway: (&'a Gateway, &'a Gateway),
    transport: Transport,
    /// Of this host's certificate.
    generation: (u64, u64),
    /// This host still has the address that the session was dialled from.
    has_address: bool,
    /// Nothing has come over QUIC for too long.
    silent: bool,
    quic: Quic,
    now: Instant,
}

/// Decides about a session that runs.
fn judge(seen: &Seen<'_>) -> Option<What> {
    let (was, is) = seen.gateway;
    let moved = was.address != is.address
        || was.hbone_port != is.hbone_port
        || was.quic_port != is.quic_port
        || was.expected != is.expected;
    // One that was lost and is back may have started anew and know nothing of the session.
    let back = !was.healthy && is.healthy;
    if moved || back || seen.generation.0 != seen.generation.1 {
        return Some(What::Renew);
    }
    match seen.transport {
        Transport::Tcp if !seen.has_address => Some(What::Ended),
        Transport::Tcp if is.quic_port.is_some() && seen.quic.is_due(seen.now) => Some(What::TryQuic),
        Transport::Quic if seen.silent => Some(What::TryTcp),
        Transport::Tcp | Transport::Quic => None,
    }
}

/// The session with one gateway.
struct One {
    dataplane: Arc<Dataplane>,
    identity: Arc<LiveIdentity>,
    report: watch::Sender<Report>,
    uid: Arc<str>,
    session: Kept,
    quic: Quic,
}

impl One {
    async fn run(mut self, mut gateway: watch::Receiver<Gateway>) {
        let mut backoff = BACKOFF;
        loop {
            let dialled = gateway.borrow_and_update().clone();
            let generation = self.generation();
            match self.dial(&dialled).await {
                Ok(session) => {
                    self.replace(&dialled, session);
                    let began = Instant::now();
                    if self.hold(dialled, generation, &mut gateway).await == What::Renew {
                        continue;
                    }
                    let listed = gateway.borrow().clone();
                    self.lost(&listed, "the session has ended");
                    if began.elapsed() >= LIVED {
                        backoff.reset();
                    }
                }
                Err(error) => {
                    // An older session may still be there: it is as good until it ends.
                    if self.kept().is_none() {
                        self.lost(&dialled, &error.to_string());
                    }
                }
            }
            tokio::select! {
                () = sleep(backoff.next(rand::random())) => {}
                changed = gateway.changed() => if changed.is_err() { return },
            }
        }
    }

    fn generation(&self) -> u64 {
        self.identity.current().certificate_generation
    }

    /// The session, if one runs.
    fn kept(&self) -> Option<ReverseEnd> {
        let kept = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clone().filter(|session| !session.is_ended())
    }

    async fn dial(&mut self, gateway: &Gateway) -> Result<ReverseEnd, OpenError> {
        // Where UDP was dropped last time it is tried again beside a session over TCP: until then nobody can call this host.
        if gateway.quic_port.is_some() && self.quic.silent_until.is_none() {
            match self.dial_quic(gateway).await {
                Ok(session) => return Ok(session),
                Err(error) => tracing::debug!(gateway = name(gateway), %error, "not over QUIC"),
            }
        }
        self.dataplane.hold_reverse(gateway, Transport::Tcp).await
    }

    async fn dial_quic(&mut self, gateway: &Gateway) -> Result<ReverseEnd, OpenError> {
        let held = self.dataplane.hold_reverse(gateway, Transport::Quic).await;
        self.quic.silent_until = None;
        if held.is_err() {
            self.quic.failed(Instant::now());
        }
        held
    }

    /// Runs until the session is over or another is to be made.
    async fn hold(
        &mut self,
        mut dialled: Gateway,
        generation: u64,
        gateway: &mut watch::Receiver<Gateway>,
    ) -> What {
        let mut ears = Ears::new(Instant::now());
        loop {
            let Some(mut session) = self.kept() else {
                return What::Ended;
            };
            let (transport, local) = (session.transport, session.local);
            tokio::select! {
                () = session.ended() => return What::Ended,
                changed = gateway.changed() => if changed.is_err() { return What::Ended },
                () = sleep(if transport == Transport::Quic { LOOK_QUIC } else { LOOK }) => {}
            }
            let is = gateway.borrow_and_update().clone();
            let seen = Seen {
                gateway: (&dialled, &is),
                transport,
                generation: (generation, self.generation()),
                has_address: transport == Transport::Quic || UdpSocket::bind((local, 0)).is_ok(),
                silent: ears.is_silent(session.heard(), Instant::now()),
                quic: self.quic,
                now: Instant::now(),
            };
            match judge(&seen) {
                Some(What::TryQuic) => {
                    if let Ok(better) = self.dial_quic(&is).await {
                        self.replace(&is, better);
                    }
                }
                Some(What::TryTcp) => {
                    let other = tokio::select! {
                        other = self.dataplane.hold_reverse(&is, Transport::Tcp) => other,
                        () = session.ended() => return What::Ended,
                    };
                    match other {
                        // QUIC is silent still: the network is there, but not for UDP.
                        Ok(other) if ears.is_silent(session.heard(), Instant::now()) => {
                            self.quic.failed(Instant::now());
                            self.replace(&is, other);
                        }
                        Ok(other) => other.drain(),
                        Err(error) => {
                            tracing::debug!(gateway = name(&is), %error, "silent over QUIC, and not over TCP");
                        }
                    }
                }
                Some(What::Ended) => {
                    tracing::info!(gateway = name(&is), %local, "this host's address is gone; the session is made anew");
                    session.cut();
                    // The gateway is not to blame: at once.
                    return What::Renew;
                }
                Some(What::Renew) => return What::Renew,
                None => dialled.healthy = is.healthy,
            }
        }
    }

    /// The old session takes no new calls; those that run in it go on.
    fn replace(&self, gateway: &Gateway, session: ReverseEnd) {
        let transport = session.transport;
        tracing::info!(gateway = name(gateway), %transport, "holds a reverse session");
        let mut kept = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = kept.replace(session) {
            old.drain();
        }
        drop(kept);
        self.say(gateway, Some(transport), "");
    }

    fn lost(&self, gateway: &Gateway, why: &str) {
        let told = self.say(gateway, None, why);
        if told {
            tracing::warn!(gateway = name(gateway), why, "no reverse session");
        }
    }

    /// True if it was not said before.
    fn say(&self, gateway: &Gateway, transport: Option<Transport>, problem: &str) -> bool {
        let held = Held {
            gateway: name(gateway),
            transport,
            problem: problem.to_owned(),
        };
        self.report.send_if_modified(|report| {
            let before = report.gateways.insert(Arc::clone(&self.uid), held.clone());
            before.as_ref() != Some(&held)
        })
    }
}

#[cfg(test)]
#[path = "reverse_tests.rs"]
mod tests;
