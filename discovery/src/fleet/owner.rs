//! The owner task: every change of registry, liveness and health happens here, one after the other.

mod intake;
mod upkeep;

use super::{
    Event, Fleet, Report, View,
    damping::{Damping, Heard},
    dial,
    liveness::{Action, Liveness},
    memory::{self, Memory},
    offers::{Exported, Offered, Offers},
    vips,
};
use crate::objects::{ObjectError, Objects};
use futures_util::StreamExt as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tombolo_config::{DeviceSpec, Kind, Object, Resource};
use tombolo_registry::{MeshSettings, Registry, Watermark, World};
use tombolo_runtime::{Publisher, TaskGroup, published};
use tombolo_store::Watch;
use tombolo_types::{Code, DeviceId, TrustDomain};

/// A change is pushed when nothing has followed it for so long.
const QUIET: Duration = Duration::from_millis(10);
/// And at the latest so long after the first one.
const PUSH_DELAY_MAX: Duration = Duration::from_millis(100);
/// How often what is remembered of members is written, at most.
const REMEMBER_INTERVAL: Duration = Duration::from_secs(1);
/// Events that wait for the owner; senders wait when it is full.
const EVENTS_MAX: usize = 4096;
/// Control streams at once; more are refused. Each holds a place for its farewell.
const STREAMS_MAX: usize = 65_536;
/// Events taken in one turn before anything is published.
const TURN_MAX: usize = 512;
/// A deleted device is remembered as revoked so long, and an ended token so long: no certificate lives longer.
const TOMBSTONE_LIFE: Duration = Duration::from_secs(8 * 24 * 3600);
/// Tombstones are looked through, and a failed write is tried again, at this interval.
const SWEEP_INTERVAL: Duration = Duration::from_secs(600);
/// A VIP that could not be written is tried again after so long.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// What an agent reports when it stops on purpose: it holds until the agent is back, not longer.
pub const DRAINING: &str = "draining";

/// What the owner works with.
pub struct OwnerConfig {
    /// Store.
    pub objects: Objects,
    /// Mesh.
    pub settings: MeshSettings,
    /// Roots by trust domain.
    pub bundles: Vec<(TrustDomain, String)>,
    /// Where to remember members.
    pub memory_path: PathBuf,
    /// Where to remember the highest virtual address.
    pub vips_path: PathBuf,
    /// Where to remember the virtual addresses of other clusters' services.
    pub imported_vips_path: PathBuf,
    /// Namespaces whose services are all exported; `*`: every one that is not reserved.
    pub export_namespaces: BTreeSet<String>,
    /// Port that the witness dials; 15008 but in tests.
    pub witness_port: u16,
    /// Nobody is taken out by suspicion for so long after the start.
    pub start_grace: Duration,
}

impl std::fmt::Debug for OwnerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnerConfig")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

type EntryKey = (String, String);
type ObjectName = (Kind, String, String);

struct Entry {
    network: String,
    address: Option<IpAddr>,
    locality: String,
    health_checked: bool,
    status: Option<serde_json::Value>,
}

pub(super) struct Owner {
    objects: Objects,
    settings: MeshSettings,
    memory_path: PathBuf,
    vips_path: PathBuf,
    vips_written: Option<Watermark>,
    witness_port: u16,
    pub(super) registry: Registry,
    liveness: Liveness,
    /// Every object that was taken, so that a new listing shows what is gone.
    present: BTreeSet<ObjectName>,
    entries: BTreeMap<EntryKey, Entry>,
    devices: BTreeMap<DeviceId, Object<DeviceSpec>>,
    reports: BTreeMap<DeviceId, Report>,
    damping: Damping,
    /// Enrolled while we run: with a probe they are unhealthy until the first report.
    fresh: BTreeSet<DeviceId>,
    /// Last health told to the registry; true is what it assumes.
    chosen: BTreeMap<DeviceId, bool>,
    memory: Memory,
    loading: bool,
    view: View,
    view_changed: bool,
    view_tx: Publisher<View>,
    world_tx: Publisher<World>,
    revoked_tx: Publisher<BTreeSet<DeviceId>>,
    pub(super) offers: Offers,
    dirty: Option<Dirty>,
    remember_at: Option<Instant>,
    retry_at: Option<Instant>,
    sweep_at: Instant,
    events_tx: mpsc::Sender<Event>,
    tasks: TaskGroup,
}

/// Changes that are not published yet.
struct Dirty {
    first: Instant,
    last: Instant,
    /// A revocation, a removal or an endpoint that is out: not debounced.
    urgent: bool,
}

/// Loads everything from the store, publishes it, and starts the owner.
///
/// # Errors
/// When the store cannot be read.
pub async fn start(config: OwnerConfig, tasks: &TaskGroup) -> Result<Fleet, ObjectError> {
    let now = Instant::now();
    let (events_tx, events_rx) = mpsc::channel(EVENTS_MAX);
    let (gone_tx, gone_rx) = mpsc::channel(STREAMS_MAX);
    let (view_tx, view) = published(View::default());
    let (world_tx, world) = published(World::empty());
    let (revoked_tx, revoked) = published(BTreeSet::new());
    let (offered_tx, offered) = published(Offered::default());
    let (exported_tx, exported) = published(Exported::default());
    let mut registry = Registry::new(config.settings.clone());
    config
        .bundles
        .iter()
        .for_each(|(trust_domain, pem)| registry.set_bundle(trust_domain, pem));
    registry.set_export_rules(config.export_namespaces);
    let offers = Offers::open(offered_tx, exported_tx, config.imported_vips_path, &mut registry);
    let mut owner = Owner {
        registry,
        liveness: Liveness::new(now, config.start_grace),
        present: BTreeSet::new(),
        entries: BTreeMap::new(),
        devices: BTreeMap::new(),
        reports: BTreeMap::new(),
        damping: Damping::default(),
        fresh: BTreeSet::new(),
        chosen: BTreeMap::new(),
        memory: memory::read(&config.memory_path),
        loading: true,
        view: View {
            in_grace: true,
            ..View::default()
        },
        view_changed: true,
        view_tx,
        world_tx,
        revoked_tx,
        offers,
        dirty: None,
        remember_at: None,
        retry_at: None,
        sweep_at: now + SWEEP_INTERVAL,
        events_tx: events_tx.clone(),
        tasks: tasks.clone(),
        objects: config.objects,
        settings: config.settings,
        memory_path: config.memory_path,
        vips_written: vips::read(&config.vips_path),
        vips_path: config.vips_path,
        witness_port: config.witness_port,
    };
    if let Some(watermark) = owner.vips_written {
        owner.registry.raise_vip_watermark(watermark);
    }
    let watch = owner.load(now).await?;
    if owner.devices.is_empty() {
        // The grace is for those who were there before and have not come back yet: a new mesh has none.
        owner.liveness.end_grace(now);
    }
    owner.settle(now).await;
    owner.publish_world();
    owner.publish_view();
    tasks.spawn("fleet owner", owner.run(events_rx, gone_rx, watch));
    Ok(Fleet {
        events_tx,
        gone_tx,
        view,
        world,
        revoked,
        offered,
        exported,
    })
}

impl Owner {
    async fn run(
        mut self,
        mut events_rx: mpsc::Receiver<Event>,
        mut gone_rx: mpsc::Receiver<DeviceId>,
        watch: Watch,
    ) {
        let mut watch = Box::pin(watch);
        let tasks = self.tasks.clone();
        let (mut events, mut gone) = (Vec::new(), Vec::new());
        loop {
            let now = Instant::now();
            self.liveness.handle_timeout(now);
            for (device, report) in self.damping.poll(now) {
                self.reports.insert(device, report);
                self.refresh(device, now);
            }
            self.act(now);
            self.settle(now).await;
            self.sweep(now).await;
            if self.dirty.as_ref().is_some_and(|d| d.urgent || now >= d.due()) {
                self.publish_world();
            }
            self.publish_view();
            self.offer(now);
            self.remember(now);
            let sleep = tokio::time::sleep_until(self.wake().into());
            tokio::select! {
                biased;
                () = tasks.stopped() => break,
                _ = events_rx.recv_many(&mut events, TURN_MAX) => {}
                _ = gone_rx.recv_many(&mut gone, TURN_MAX) => {
                    // A stream says that it is up before it says that it is gone: in this order here too.
                    while let Ok(event) = events_rx.try_recv() {
                        events.push(event);
                    }
                }
                item = watch.next() => self.take(item, &mut watch).await,
                () = sleep => {}
            }
            let now = Instant::now();
            events.drain(..).for_each(|event| self.handle(event, now));
            gone.drain(..)
                .for_each(|device| self.liveness.handle_disconnected(device, now));
        }
        memory::write(&self.memory_path, &self.recollect());
    }

    /// When there is something to do without an event.
    fn wake(&self) -> Instant {
        let liveness = self.liveness.poll_timeout().map(|(at, _)| at);
        let dirty = self.dirty.as_ref().map(Dirty::due);
        [
            liveness,
            dirty,
            self.damping.poll_timeout(),
            self.remember_at,
            self.retry_at,
            self.offers.poll_timeout(),
        ]
        .into_iter()
        .flatten()
        .fold(self.sweep_at, Instant::min)
    }

    fn handle(&mut self, event: Event, now: Instant) {
        match event {
            Event::Connected(device) => {
                if self
                    .reports
                    .get(&device)
                    .is_some_and(|report| report.message == DRAINING)
                {
                    self.reports.remove(&device);
                }
                self.liveness.handle_connected(device, now);
                self.refresh(device, now);
            }
            Event::Report(device, report) => {
                if !self.devices.contains_key(&device) {
                    return;
                }
                match self.damping.hear(device, report, self.reports.get(&device), now) {
                    Heard::Now(report) => {
                        self.reports.insert(device, report);
                        self.refresh(device, now);
                    }
                    Heard::Nothing => {}
                    Heard::Later(first) => {
                        if first {
                            tracing::warn!(%device, "{}", Code::HealthFlaps.message(format_args!("device {device}")));
                        }
                        self.refresh(device, now);
                    }
                }
            }
            Event::Dialled {
                device,
                endpoint,
                found,
            } => self.liveness.handle_dialled(device, endpoint, found, now),
            Event::Imports(cluster, imports) => {
                let urgent = imports.is_none();
                self.registry
                    .set_imports(&cluster, imports.map(|imports| *imports));
                self.mark(now, urgent);
            }
            Event::RefusedExports(refused) => {
                self.registry.set_refused_exports(refused);
                self.mark(now, true);
            }
            Event::Bundle(trust_domain, roots_pem) => {
                self.registry.set_bundle(&trust_domain, &roots_pem);
                self.mark(now, true);
            }
            Event::Published(told) => {
                self.offers.await_publication(told);
                self.mark(now, true);
            }
        }
    }

    fn act(&mut self, now: Instant) {
        while let Some(action) = self.liveness.poll_action() {
            match action {
                Action::Dial { device, endpoint } => {
                    let events_tx = self.events_tx.clone();
                    self.tasks.spawn_until_stopped("witness dial", async move {
                        let found = dial::dial(endpoint).await;
                        let _ = events_tx
                            .send(Event::Dialled {
                                device,
                                endpoint,
                                found,
                            })
                            .await; // we are stopping
                    });
                }
                Action::Changed(device) => self.refresh(device, now),
                Action::Brake {
                    network,
                    engaged: true,
                } => tracing::warn!(
                    network = %network,
                    "{}",
                    Code::BrakeEngaged.message("control streams were lost within seconds of each other")
                ),
                Action::Brake {
                    network,
                    engaged: false,
                } => {
                    tracing::info!(network = %network, "the brake is released: most members are back");
                }
            }
            self.view_changed = true;
        }
    }

    fn mark(&mut self, now: Instant, urgent: bool) {
        let dirty = self.dirty.get_or_insert(Dirty {
            first: now,
            last: now,
            urgent,
        });
        dirty.last = now;
        dirty.urgent |= urgent;
    }

    fn publish_world(&mut self) {
        self.dirty = None;
        let world = self.registry.publish();
        if world.version != self.world_tx.load().version {
            self.world_tx.publish_arc(world);
        }
        self.offers.published(Instant::now());
    }

    fn publish_view(&mut self) {
        self.view.in_grace = self.liveness.in_grace();
        self.view.braked = self.liveness.braked().cloned().collect();
        if std::mem::take(&mut self.view_changed) || self.view_tx.load().in_grace != self.view.in_grace {
            self.view_tx.publish(self.view.clone());
        }
    }
}

impl Dirty {
    fn due(&self) -> Instant {
        (self.last + QUIET).min(self.first + PUSH_DELAY_MAX)
    }
}

fn name_of(resource: &Resource) -> ObjectName {
    (
        resource.kind(),
        resource.namespace().to_owned(),
        resource.name().to_owned(),
    )
}
