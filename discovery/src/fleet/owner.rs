//! The owner task: every change of registry, liveness and health happens here, one after the other.

use super::{
    Event, Fleet, Member, Report, View, dial,
    liveness::{Action, Liveness, Remembered},
    memory::{self, MemberMemory, Memory},
};
use crate::objects::{self, ObjectError, Objects};
use futures_util::{FutureExt as _, StreamExt as _};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tombolo_config::{DeviceSpec, Kind, Object, Resource, WorkloadEntrySpec, annotation};
use tombolo_registry::{Allocation, Health, MeshSettings, Registry, World};
use tombolo_runtime::{Publisher, TaskGroup, published};
use tombolo_store::{Change, Event as StoreEvent, StoreError, Watch};
use tombolo_types::{DeviceId, TrustDomain};

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
/// A revoked device that was deleted is remembered so long: no certificate lives longer.
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
    /// Port that the witness dials; 15008 but in tests.
    pub witness_port: u16,
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
    health_checked: bool,
    status: Option<serde_json::Value>,
}

struct Owner {
    objects: Objects,
    settings: MeshSettings,
    memory_path: PathBuf,
    witness_port: u16,
    registry: Registry,
    liveness: Liveness,
    /// Every object that was taken, so that a new listing shows what is gone.
    present: BTreeSet<ObjectName>,
    entries: BTreeMap<EntryKey, Entry>,
    devices: BTreeMap<DeviceId, Object<DeviceSpec>>,
    reports: BTreeMap<DeviceId, Report>,
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
    let mut registry = Registry::new(config.settings.clone());
    config
        .bundles
        .iter()
        .for_each(|(trust_domain, pem)| registry.set_bundle(trust_domain, pem));
    let mut owner = Owner {
        registry,
        liveness: Liveness::new(now),
        present: BTreeSet::new(),
        entries: BTreeMap::new(),
        devices: BTreeMap::new(),
        reports: BTreeMap::new(),
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
        dirty: None,
        remember_at: None,
        retry_at: None,
        sweep_at: now + SWEEP_INTERVAL,
        events_tx: events_tx.clone(),
        tasks: tasks.clone(),
        objects: config.objects,
        settings: config.settings,
        memory_path: config.memory_path,
        witness_port: config.witness_port,
    };
    let watch = owner.load(now).await?;
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
            self.act(now);
            self.settle(now).await;
            self.sweep(now).await;
            if self.dirty.as_ref().is_some_and(|d| d.urgent || now >= d.due()) {
                self.publish_world();
            }
            self.publish_view();
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
        [liveness, dirty, self.remember_at, self.retry_at]
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
                if self.devices.contains_key(&device) {
                    self.reports.insert(device, report);
                    self.refresh(device, now);
                }
            }
            Event::Dialled {
                device,
                endpoint,
                found,
            } => self.liveness.handle_dialled(device, endpoint, found, now),
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
                    tombolo_types::Code::BrakeEngaged.message("control streams were lost within seconds of each other")
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

    /// Takes what the watch has, without waiting, up to a turn.
    async fn take(&mut self, first: Option<Result<StoreEvent, StoreError>>, watch: &mut Pin<Box<Watch>>) {
        let now = Instant::now();
        let mut next = Some(first);
        for _ in 0..TURN_MAX {
            match next {
                None => return,
                Some(Some(Ok(event))) => {
                    match &event.change {
                        Change::Put(stored) => match objects::read(stored) {
                            Ok(resource) => self.upsert(resource, now),
                            Err(error) => tracing::error!(%error, "an object is left out"),
                        },
                        Change::Delete(stored) => {
                            let key = &stored.key;
                            if let Some(kind) = Kind::of(&key.group, &key.kind) {
                                self.remove(kind, &key.namespace, &key.name, now);
                            }
                        }
                    }
                    self.view.resource_version = self.view.resource_version.max(event.resource_version);
                    self.view_changed = true;
                }
                Some(Some(Err(_)) | None) => {
                    // Fell behind: list again.
                    tracing::warn!("the watch of the store was cut; everything is read again");
                    self.loading = true;
                    match self.load(now).await {
                        Ok(new) => *watch = Box::pin(new),
                        Err(error) => {
                            tracing::error!(%error, "the store cannot be read");
                            tokio::time::sleep(RETRY_INTERVAL).await;
                        }
                    }
                    return;
                }
            }
            next = watch.next().now_or_never();
        }
    }

    /// Reads all objects; returns the watch that continues where the listing began.
    async fn load(&mut self, now: Instant) -> Result<Watch, ObjectError> {
        let (mut resources, version) = self.objects.list(None, None).await?;
        let found: BTreeSet<ObjectName> = resources.iter().map(name_of).collect();
        let gone: Vec<ObjectName> = self.present.difference(&found).cloned().collect();
        gone.iter()
            .for_each(|(kind, namespace, name)| self.remove(*kind, namespace, name, now));
        // Devices last: they look at their entries.
        resources.sort_by_key(|resource| resource.kind() == Kind::Device);
        resources
            .into_iter()
            .for_each(|resource| self.upsert(resource, now));
        self.loading = false;
        self.view.resource_version = version;
        self.view_changed = true;
        Ok(self.objects.store().watch(version)?)
    }

    fn upsert(&mut self, resource: Resource, now: Instant) {
        self.present.insert(name_of(&resource));
        match &resource {
            Resource::WorkloadEntry(entry) => self.upsert_entry(entry, now),
            Resource::Device(device) => self.upsert_device(device, now),
            Resource::JoinToken(token) => {
                self.view
                    .tokens
                    .insert(token.metadata.name.clone(), token.metadata.namespace.clone());
            }
            Resource::WorkloadGroup(_)
            | Resource::ServiceEntry(_)
            | Resource::AuthorizationPolicy(_)
            | Resource::PeerAuthentication(_) => {}
        }
        self.registry.upsert(resource);
        self.mark(now, false);
    }

    fn upsert_entry(&mut self, entry: &Object<WorkloadEntrySpec>, now: Instant) {
        let key = (entry.metadata.namespace.clone(), entry.metadata.name.clone());
        let network = if entry.spec.network.is_empty() {
            &self.settings.network
        } else {
            &entry.spec.network
        };
        let health_checked = entry
            .metadata
            .annotations
            .get(annotation::HEALTH_CHECKS_ENABLED)
            .is_some_and(|value| value == "true");
        let new = Entry {
            network: network.clone(),
            address: entry.spec.address.parse().ok(),
            health_checked,
            status: entry.status.clone(),
        };
        self.forget_address(&key);
        if let Some(address) = new.address {
            self.view
                .by_address
                .insert((new.network.clone(), address), key.clone());
        }
        self.entries.insert(key.clone(), new);
        if let Some(device) = self.view.by_entry.get(&key).copied() {
            self.place(device, now);
        }
    }

    fn forget_address(&mut self, key: &EntryKey) {
        if let Some(old) = self.entries.get(key)
            && let Some(address) = old.address
        {
            let slot = (old.network.clone(), address);
            if self.view.by_address.get(&slot) == Some(key) {
                self.view.by_address.remove(&slot);
            }
        }
    }

    fn upsert_device(&mut self, device: &Object<DeviceSpec>, now: Instant) {
        let Ok(id) = device.metadata.name.parse::<DeviceId>() else {
            return;
        };
        let old = self.devices.insert(id, device.clone());
        let is_new = old.is_none();
        if device.spec.revoked.is_some() && self.view.revoked.insert(id).is_none() {
            self.publish_revoked(now);
        }
        let entry = (
            device.metadata.namespace.clone(),
            device.spec.workload_entry.clone(),
        );
        if entry.1.is_empty() {
            // A tombstone: deleted, and its certificates are refused until they have expired.
            if let Some(old) = old {
                self.view
                    .by_entry
                    .remove(&(old.metadata.namespace, old.spec.workload_entry));
            }
            self.drop_member(id, now);
            return;
        }
        self.view.by_entry.insert(entry, id);
        if is_new && self.loading {
            let known = self.memory.get(&id.to_string()).cloned().unwrap_or_default();
            let (network, endpoint) = self.endpoint_of(id);
            self.liveness.load(id, network, endpoint, &known.liveness);
            if let Some(report) = known.report.filter(|report| report.message != DRAINING) {
                self.reports.insert(id, report);
            }
        } else if is_new {
            self.fresh.insert(id);
        }
        self.place(id, now);
    }

    /// Network and endpoint of a device, from its WorkloadEntry.
    fn endpoint_of(&self, id: DeviceId) -> (Arc<str>, Option<SocketAddr>) {
        let entry = self.devices.get(&id).and_then(|device| {
            self.entries.get(&(
                device.metadata.namespace.clone(),
                device.spec.workload_entry.clone(),
            ))
        });
        match entry {
            Some(entry) => {
                let endpoint = entry
                    .address
                    .map(|address| SocketAddr::new(address, self.witness_port));
                (entry.network.as_str().into(), endpoint)
            }
            None => (self.settings.network.as_str().into(), None),
        }
    }

    /// Tells liveness where a device is.
    fn place(&mut self, id: DeviceId, now: Instant) {
        if self.view.revoked.contains(&id) {
            self.liveness.remove(id);
        } else {
            let (network, endpoint) = self.endpoint_of(id);
            self.liveness.upsert(id, network, endpoint, now);
        }
        self.refresh(id, now);
    }

    fn remove(&mut self, kind: Kind, namespace: &str, name: &str, now: Instant) {
        self.present
            .remove(&(kind, namespace.to_owned(), name.to_owned()));
        match kind {
            Kind::WorkloadEntry => {
                let key = (namespace.to_owned(), name.to_owned());
                self.forget_address(&key);
                self.entries.remove(&key);
                if let Some(device) = self.view.by_entry.get(&key).copied() {
                    self.place(device, now);
                }
            }
            Kind::Device => {
                if let Ok(id) = name.parse::<DeviceId>() {
                    self.forget_device(id, now);
                }
            }
            Kind::JoinToken => {
                self.view.tokens.remove(name);
            }
            Kind::WorkloadGroup
            | Kind::ServiceEntry
            | Kind::AuthorizationPolicy
            | Kind::PeerAuthentication => {}
        }
        self.registry.remove(kind, namespace, name);
        self.mark(now, true);
    }

    fn forget_device(&mut self, id: DeviceId, now: Instant) {
        if let Some(device) = self.devices.remove(&id) {
            let entry = (device.metadata.namespace, device.spec.workload_entry);
            if self.view.by_entry.get(&entry) == Some(&id) {
                self.view.by_entry.remove(&entry);
            }
        }
        self.drop_member(id, now);
        if self.view.revoked.remove(&id).is_some() {
            self.publish_revoked(now);
        }
    }

    fn drop_member(&mut self, id: DeviceId, now: Instant) {
        self.liveness.remove(id);
        self.reports.remove(&id);
        self.fresh.remove(&id);
        self.chosen.remove(&id);
        self.view.members.remove(&id);
        self.view_changed = true;
        self.remember_at.get_or_insert(now + REMEMBER_INTERVAL);
    }

    fn publish_revoked(&mut self, now: Instant) {
        let revoked: BTreeSet<DeviceId> = self.view.revoked.iter().copied().collect();
        self.registry.set_revoked(revoked.clone());
        self.revoked_tx.publish(revoked);
        self.mark(now, true);
    }

    /// Writes a device's state into the view, and into the registry if clients may not choose it any more, or again.
    fn refresh(&mut self, id: DeviceId, now: Instant) {
        let Some(device) = self
            .devices
            .get(&id)
            .filter(|device| !device.spec.workload_entry.is_empty())
        else {
            return;
        };
        let (namespace, entry_name) = (
            device.metadata.namespace.clone(),
            device.spec.workload_entry.clone(),
        );
        let entry = self.entries.get(&(namespace.clone(), entry_name.clone()));
        let report = self.reports.get(&id).cloned();
        let mut member = Member {
            address: entry.and_then(|entry| entry.address),
            entry_status: entry.and_then(|entry| entry.status.clone()),
            standing: entry.and_then(|_| self.liveness.standing(id)),
            awaits_report: report.is_none()
                && self.fresh.contains(&id)
                && entry.is_some_and(|entry| entry.health_checked),
            report,
            since_unix_ms: jiff::Timestamp::now().as_millisecond(),
            device: device.clone(),
        };
        if let Some(old) = self.view.members.get(&id)
            && old.state().state == member.state().state
        {
            member.since_unix_ms = old.since_unix_ms;
        }
        let (chosen, reason) = (member.is_chosen(), member.state().reason);
        self.view.members.insert(id, Arc::new(member));
        self.view_changed = true;
        self.remember_at.get_or_insert(now + REMEMBER_INTERVAL);
        if self.chosen.insert(id, chosen).unwrap_or(true) != chosen {
            let health = if chosen {
                Health::Healthy
            } else {
                Health::Unhealthy {
                    reason: reason.clone(),
                }
            };
            tracing::info!(device = %id, entry = %format_args!("{namespace}/{entry_name}"), chosen, reason, "endpoint");
            self.registry.set_health(&namespace, &entry_name, health);
            self.mark(now, !chosen);
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

    /// Gives the VIPs that are still to be given, and persists them before anything is published.
    async fn settle(&mut self, now: Instant) {
        if self.dirty.is_none() && self.retry_at.is_none_or(|at| at > now) {
            return;
        }
        self.retry_at = None;
        let mut by_object: BTreeMap<ObjectName, Vec<Allocation>> = BTreeMap::new();
        for allocation in self.registry.allocate() {
            let name = (
                allocation.kind,
                allocation.namespace.clone(),
                allocation.name.clone(),
            );
            by_object.entry(name).or_default().push(allocation);
        }
        if by_object.is_empty() {
            return;
        }
        // All in one transaction; one that raced with another writer goes alone.
        match self.persist(&by_object).await {
            Ok(resources) => resources
                .into_iter()
                .for_each(|resource| self.registry.upsert(resource)),
            Err(_) => {
                for (name, allocations) in by_object {
                    let title = format!("{} {}/{}", name.0, name.1, name.2);
                    match self.persist(&BTreeMap::from([(name, allocations)])).await {
                        Ok(resources) => resources
                            .into_iter()
                            .for_each(|resource| self.registry.upsert(resource)),
                        Err(error) => {
                            tracing::warn!(%error, object = title, "a VIP is not given yet");
                            self.retry_at = Some(now + RETRY_INTERVAL);
                        }
                    }
                }
            }
        }
    }

    async fn persist(
        &self,
        wanted: &BTreeMap<ObjectName, Vec<Allocation>>,
    ) -> Result<Vec<Resource>, ObjectError> {
        let mut writes = Vec::new();
        for ((kind, namespace, name), allocations) in wanted {
            // Deleted meanwhile: the watch says so.
            let Some(mut resource) = self.objects.get(*kind, namespace, name).await? else {
                continue;
            };
            allocations
                .iter()
                .for_each(|allocation| allocation.persist(&mut resource));
            writes.push(objects::update(&resource, false));
        }
        let (stored, _) = self.objects.commit(writes).await?;
        stored.iter().map(objects::read).collect()
    }

    fn publish_world(&mut self) {
        self.dirty = None;
        let world = self.registry.publish();
        if world.version != self.world_tx.load().version {
            self.world_tx.publish_arc(world);
        }
    }

    fn publish_view(&mut self) {
        self.view.in_grace = self.liveness.in_grace();
        self.view.braked = self.liveness.braked().cloned().collect();
        if std::mem::take(&mut self.view_changed) || self.view_tx.load().in_grace != self.view.in_grace {
            self.view_tx.publish(self.view.clone());
        }
    }

    fn recollect(&self) -> Memory {
        let of = |id: &DeviceId| {
            let remembered = self.liveness.remember(*id).unwrap_or_default();
            let memory = MemberMemory {
                liveness: remembered,
                report: self.reports.get(id).cloned(),
            };
            (memory
                != MemberMemory {
                    liveness: Remembered::default(),
                    report: None,
                })
            .then(|| (id.to_string(), memory))
        };
        self.devices.keys().filter_map(of).collect()
    }

    fn remember(&mut self, now: Instant) {
        if self.remember_at.is_none_or(|at| at > now) {
            return;
        }
        self.remember_at = None;
        let memory = self.recollect();
        if memory != self.memory {
            self.memory.clone_from(&memory);
            let path = self.memory_path.clone();
            drop(tokio::task::spawn_blocking(move || memory::write(&path, &memory)));
        }
    }

    /// Removes tombstones whose certificates have expired.
    async fn sweep(&mut self, now: Instant) {
        if now < self.sweep_at {
            return;
        }
        self.sweep_at = now + SWEEP_INTERVAL;
        let life = i64::try_from(TOMBSTONE_LIFE.as_millis()).unwrap_or(i64::MAX);
        let limit = jiff::Timestamp::now().as_millisecond() - life;
        let expired = |device: &&Object<DeviceSpec>| {
            device.spec.workload_entry.is_empty()
                && device
                    .spec
                    .revoked
                    .as_ref()
                    .and_then(|r| tombolo_config::unix_ms(&r.at))
                    .is_some_and(|at| at < limit)
        };
        let writes: Vec<_> = self
            .devices
            .values()
            .filter(expired)
            .map(|d| objects::delete(&Resource::Device(d.clone())))
            .collect();
        if writes.is_empty() {
            return;
        }
        if let Err(error) = self.objects.commit(writes).await {
            tracing::warn!(%error, "deleted devices are not forgotten yet");
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
