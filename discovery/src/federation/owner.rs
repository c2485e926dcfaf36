//! The owner task: every event of federation goes through the core here, one after the other.

mod acts;
mod names;
mod verbs;

use super::{Command, Federation, Outgoing, Refused, Shown, ShownMember, convert, keep::Keeper, stopping};
use crate::{
    audit::{Audit, Line},
    fleet::{Fleet, Offered},
    metrics::Metrics,
    refusal::Refusal,
};
use anyhow::Context as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tombolo_federation::{
    Action, ConnId, Ed25519, Event, Federation as Core, Now, Own, Saved, ServiceName, limits,
};
use tombolo_identity::{LiveIdentity, TrustBundle, WorkloadIdentity};
use tombolo_registry::MeshSettings;
use tombolo_runtime::{Reader, TaskGroup};
use tombolo_store::Store;
use tombolo_types::{Code, TrustDomain};

/// A store that refused is asked again after so long.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Imports are written at most so often: they are only for the next start.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);
/// Last refusals that are remembered of one member.
const REFUSED_MAX: usize = 16;

static CONNECTIONS: AtomicU64 = AtomicU64::new(1);

/// The name of a new connection.
pub(super) fn next_conn() -> ConnId {
    ConnId(CONNECTIONS.fetch_add(1, Ordering::Relaxed))
}

/// What federation works with.
pub struct FederationConfig {
    /// Name of this cluster.
    pub cluster: String,
    /// Mesh.
    pub settings: MeshSettings,
    /// Roots of the own CA.
    pub roots_pem: String,
    /// Where other clusters reach this discovery; empty: its gateways, then `advertise`.
    pub endpoints: Vec<String>,
    /// Where agents reach it.
    pub advertise: Vec<String>,
    /// Where membership is kept.
    pub store: Arc<dyn Store>,
    /// Where the member key and imports are kept.
    pub dir: PathBuf,
    /// What this cluster offers, and where imports go.
    pub fleet: Fleet,
    /// Audit log.
    pub audit: Arc<Audit>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The own certificate.
    pub live: Arc<LiveIdentity>,
}

impl std::fmt::Debug for FederationConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FederationConfig")
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

struct Owner {
    config: FederationConfig,
    core: Core<Ed25519>,
    keeper: Keeper,
    handle: Federation,
    tasks: TaskGroup,
    clock: Instant,
    offered: Reader<Offered>,
    outgoing: BTreeMap<ConnId, Outgoing>,
    /// Roots by which peers may come, as they are in force.
    roots: BTreeSet<(TrustDomain, String)>,
    /// The own roots are others than those in force.
    roots_changed: bool,
    /// Clusters whose imports the registry holds.
    imported: BTreeSet<Arc<str>>,
    heard: BTreeMap<Arc<str>, i64>,
    refused: BTreeMap<Arc<str>, BTreeMap<Code, Refused>>,
    /// As it was told to the fleet last.
    refused_exports: Arc<BTreeMap<ServiceName, tombolo_federation::Refusal>>,
    dial_failures: BTreeMap<Arc<str>, String>,
    saves: BTreeSet<Arc<str>>,
    save_at: Option<Instant>,
    /// The own certificate, as the sessions of now were dialled with.
    identity: Option<Arc<WorkloadIdentity>>,
    /// What was in the store before a join that is not settled.
    before_join: Option<Saved>,
    /// The store refused: when it is tried again.
    broken: Option<Instant>,
}

fn unix_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// Loads the membership and starts the owner.
///
/// # Errors
/// When the store or the member key cannot be read.
pub async fn start(config: FederationConfig, tasks: &TaskGroup) -> anyhow::Result<Federation> {
    let mut keeper = Keeper::open(Arc::clone(&config.store), &config.dir)
        .with_context(|| format!("{} cannot be made", config.dir.display()))?;
    let key = keeper
        .member_key()
        .with_context(|| format!("the member key in {} cannot be used", config.dir.display()))?;
    let saved = keeper.load().await.context("the membership cannot be read")?;
    let (commands_tx, commands_rx) = mpsc::channel(super::COMMANDS_MAX);
    let bundle = TrustBundle::from_pem(config.settings.trust_domain.clone(), &config.roots_pem)?;
    let handle = Federation {
        commands_tx,
        trusted: LiveIdentity::new(None, vec![Arc::new(bundle)]),
        mesh_domain: config.settings.mesh_domain.as_str().into(),
    };
    let offered = config.fleet.offered();
    let clock = Instant::now();
    let own = own(&config, &offered.load());
    let now = Now {
        monotonic: Duration::ZERO,
        unix_ms: unix_ms(),
    };
    let (core, actions) = Core::start(own, key, &saved, rand::random(), now);
    let identity = config.live.current().identity.clone();
    let mut owner = Owner {
        config,
        core,
        keeper,
        handle: handle.clone(),
        tasks: tasks.clone(),
        clock,
        offered,
        outgoing: BTreeMap::new(),
        roots: BTreeSet::new(),
        roots_changed: true,
        imported: BTreeSet::new(),
        heard: BTreeMap::new(),
        refused: BTreeMap::new(),
        refused_exports: Arc::default(),
        dial_failures: BTreeMap::new(),
        saves: BTreeSet::new(),
        save_at: None,
        identity,
        before_join: None,
        broken: None,
    };
    owner.act(actions).await;
    anyhow::ensure!(owner.broken.is_none(), "the membership cannot be written");
    owner.trust();
    owner.exported().await;
    // An agent that comes back must find what it had: imports of the last run are in the first answer.
    owner.config.fleet.published().await;
    tasks.spawn("federation owner", owner.run(commands_rx));
    Ok(handle)
}

fn own(config: &FederationConfig, offered: &Offered) -> Own {
    Own {
        cluster: config.cluster.as_str().into(),
        trust_domain: config.settings.trust_domain.clone(),
        also: config.settings.also.clone(),
        roots_pem: config.roots_pem.clone(),
        endpoints: endpoints(config, offered),
        version: env!("CARGO_PKG_VERSION").into(),
        share_trust_domain: false,
    }
}

fn same(a: Option<&Arc<WorkloadIdentity>>, b: Option<&Arc<WorkloadIdentity>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

/// Where other clusters reach this discovery: a gateway passes what is for it on, and is made to be reached.
fn endpoints(config: &FederationConfig, offered: &Offered) -> Vec<String> {
    if !config.endpoints.is_empty() {
        return config.endpoints.clone();
    }
    let at = |address: &str, port: u16| match address.parse::<IpAddr>() {
        Ok(IpAddr::V6(v6)) => format!("[{v6}]:{port}"),
        Ok(IpAddr::V4(_)) | Err(_) => format!("{address}:{port}"),
    };
    let gateways = offered.gateways.iter();
    let gateways: BTreeSet<String> = gateways
        .map(|gateway| at(&gateway.address, gateway.hbone_port))
        .collect();
    let mut all: Vec<String> = gateways.into_iter().collect();
    for endpoint in &config.advertise {
        if !all.contains(endpoint) {
            all.push(endpoint.clone());
        }
    }
    all.truncate(limits::ENDPOINTS_MAX);
    all
}

impl Owner {
    fn now(&self) -> Now {
        Now {
            monotonic: self.clock.elapsed(),
            unix_ms: unix_ms(),
        }
    }

    async fn run(mut self, mut commands_rx: mpsc::Receiver<Command>) {
        let tasks = self.tasks.clone();
        loop {
            let sleep = tokio::time::sleep_until(self.wake().into());
            tokio::select! {
                biased;
                () = tasks.stopped() => break,
                command = commands_rx.recv() => match command {
                    Some(command) => self.take(command).await,
                    None => break,
                },
                changed = self.offered.changed() => match changed {
                    Some(_) => self.exported().await,
                    None => break,
                },
                () = sleep => {}
            }
            let now = Instant::now();
            if self.broken.is_some_and(|at| at <= now) {
                self.restart().await;
            }
            let identity = self.config.live.current().identity.clone();
            if !same(identity.as_ref(), self.identity.as_ref()) {
                self.identity = identity;
                self.feed(Event::Renewed).await;
            }
            let due = self.core.next_timeout().map(|(at, _)| at);
            if self.broken.is_none() && due.is_some_and(|at| at <= self.clock.elapsed()) {
                self.feed(Event::Tick).await;
            }
            if self.save_at.is_some_and(|at| at <= now) {
                self.save();
            }
        }
        self.save();
        for (_, outgoing) in std::mem::take(&mut self.outgoing) {
            outgoing.closing.cancel();
        }
    }

    fn wake(&self) -> Instant {
        let core = self.core.next_timeout().map(|(at, _)| self.clock + at);
        let core = core.filter(|_| self.broken.is_none());
        let far = Instant::now() + Duration::from_secs(60);
        [core, self.save_at, self.broken]
            .into_iter()
            .flatten()
            .fold(far, Instant::min)
    }

    /// One event through the core.
    async fn feed(&mut self, event: Event) {
        if self.broken.is_some() {
            return;
        }
        let actions = self.core.handle(event, self.now());
        self.act(actions).await;
    }

    /// What this cluster exports, and where it is reached, as of now.
    async fn exported(&mut self) {
        let offered = self.offered.load();
        let exports = convert::exports(&offered, &self.config.settings.mesh_domain);
        self.feed(Event::Exports(exports)).await;
        if self.broken.is_some() {
            return;
        }
        let endpoints = endpoints(&self.config, &offered);
        let set = self
            .core
            .set_profile(self.config.roots_pem.clone(), endpoints, self.now());
        match set {
            Ok(actions) => drop(self.act(actions).await),
            Err(refusal) => tracing::warn!("{refusal}"),
        }
    }

    /// Everything again from the store: after it refused a write, and after a join that was taken back.
    async fn restart(&mut self) {
        self.broken = None;
        for (_, outgoing) in std::mem::take(&mut self.outgoing) {
            outgoing.closing.cancel();
        }
        let loaded = match self.keeper.load().await {
            Ok(saved) => self
                .keeper
                .member_key()
                .map(|key| (saved, key))
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let (saved, key) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::error!(error, "the membership cannot be read");
                self.broken = Some(Instant::now() + RETRY_INTERVAL);
                return;
            }
        };
        let own = own(&self.config, &self.offered.load());
        let (core, actions) = Core::start(own, key, &saved, rand::random(), self.now());
        self.core = core;
        self.act(actions).await;
        let world = self.core.world();
        let gone = self.imported.iter().filter(|c| !world.clusters.contains_key(*c));
        for cluster in gone.cloned().collect::<Vec<_>>() {
            self.forget(&cluster).await;
        }
        self.trust();
        Box::pin(self.exported()).await;
    }

    fn audit(&self, who: String, from: String, verb: &str, object: String, result: Result<(), &Refusal>) {
        let line = Line {
            who,
            from,
            verb: verb.into(),
            object,
            result: result.map_or_else(|refusal| format!("refused: {refusal}"), |()| "ok".into()),
            ..Line::default()
        };
        if line.who == crate::audit::ANONYMOUS {
            self.config.audit.write_bounded(line);
        } else {
            self.config.audit.write(line);
        }
    }
}
