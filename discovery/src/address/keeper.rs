//! Keeps the addresses of members true: after a move, behind a NAT, and when two claim the same.

use super::{Choice, choose};
use crate::{
    conditions::{self, ADDRESS_CONFLICT, ADDRESS_PENDING, Condition},
    fleet::{Fleet, View},
    objects::{self, ObjectError, Objects},
    refusal::is_race,
};
use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use ipnet::IpNet;
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_rustls::TlsConnector;
use tombolo_config::{Object, Resource, WorkloadEntrySpec, WorkloadGroupSpec, annotation};
use tombolo_identity::LiveIdentity;
use tombolo_registry::MeshSettings;
use tombolo_runtime::TaskGroup;
use tombolo_store::Write;
use tombolo_types::{Code, DeviceId, SpiffeId};

/// Reports that wait; more are dropped, the next stream says it again.
const SEEN_MAX: usize = 1024;
/// The first dial-backs come at this interval, while an agent starts.
const DIAL_BACK_FAST: Duration = Duration::from_secs(2);
/// Then at this one.
const DIAL_BACK_SLOW: Duration = Duration::from_secs(30);
/// So many fast ones.
const FAST_TRIES: u32 = 15;
/// TCP and TLS of one dial-back.
const DIAL_BACK_TIMEOUT: Duration = Duration::from_secs(2);
/// A transaction that raced is tried again so often.
const RACES_MAX: usize = 5;

struct Seen {
    device: DeviceId,
    /// None where it says nothing about the node's own address.
    source: Option<IpAddr>,
    claimed: Vec<IpAddr>,
}

struct Waiting {
    candidates: Vec<IpAddr>,
    next: Instant,
    tries: u32,
}

/// The handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AddressKeeper {
    seen_tx: mpsc::Sender<Seen>,
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} from {:?}", self.device, self.source)
    }
}

impl AddressKeeper {
    /// Starts the keeper.
    pub fn start(
        objects: Objects,
        fleet: Fleet,
        settings: MeshSettings,
        live: Arc<LiveIdentity>,
        port: u16,
        tasks: &TaskGroup,
    ) -> Self {
        let (seen_tx, seen_rx) = mpsc::channel(SEEN_MAX);
        let keeper = Keeper {
            objects,
            fleet,
            settings,
            live,
            port,
            waiting: BTreeMap::new(),
        };
        tasks.spawn_until_stopped("address keeper", keeper.run(seen_rx));
        Self { seen_tx }
    }

    /// A control stream of a device came from `source`, if that is known, and the node claims these addresses.
    pub fn seen(&self, device: DeviceId, source: Option<IpAddr>, claimed: Vec<IpAddr>) {
        let _ = self.seen_tx.try_send(Seen {
            device,
            source,
            claimed,
        }); // full: the next stream says it again
    }
}

struct Keeper {
    objects: Objects,
    fleet: Fleet,
    settings: MeshSettings,
    live: Arc<LiveIdentity>,
    port: u16,
    waiting: BTreeMap<DeviceId, Waiting>,
}

/// Dials of the addresses that devices seem to have left; true: it is still there.
type Moves = FuturesUnordered<BoxFuture<'static, (Seen, bool)>>;

impl Keeper {
    async fn run(mut self, mut seen_rx: mpsc::Receiver<Seen>) {
        let mut moves = Moves::new();
        loop {
            let next = self.waiting.values().map(|waiting| waiting.next).min();
            let sleep = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let done = tokio::select! {
                seen = seen_rx.recv() => match seen {
                    Some(seen) => self.review(seen, Some(&mut moves)).await,
                    None => return,
                },
                Some((seen, stays)) = moves.next() => {
                    if stays {
                        tracing::warn!(device = %seen.device, source = ?seen.source,
                            "a stream of this device comes from elsewhere while it still answers at its address: a copy?");
                        continue;
                    }
                    self.review(seen, None).await
                }
                () = sleep => self.dial_back().await,
            };
            if let Err(error) = done {
                tracing::warn!(%error, "an address is not settled yet");
            }
        }
    }

    /// Checks the address of a device against where it is now. One that seems to have moved is first dialled where it
    /// was (into `moves`; without, that is done): a copy of a device must not draw its calls away.
    async fn review(&mut self, seen: Seen, mut moves: Option<&mut Moves>) -> Result<(), ObjectError> {
        for _ in 0..RACES_MAX {
            let view = self.fleet.view();
            let Some((group, mut entry)) = self.load(&view, seen.device).await? else {
                return Ok(());
            };
            let current = entry.spec.address.parse::<IpAddr>().ok();
            let holds = |address: IpAddr| Some(address) == seen.source || seen.claimed.contains(&address);
            if current.is_some_and(|address| holds(address) || seen.claimed.is_empty()) {
                self.waiting.remove(&seen.device);
                return Ok(());
            }
            if let (Some(address), Some(moves), Some(id)) =
                (current, moves.as_deref_mut(), self.identity(&view, seen.device))
            {
                let (live, device, endpoint) = (
                    Arc::clone(&self.live),
                    seen.device,
                    SocketAddr::new(address, self.port),
                );
                moves.push(Box::pin(async move {
                    let stays = shows(&live, &id, device, endpoint).await;
                    (seen, stays)
                }));
                return Ok(());
            }
            let cidrs = cidrs_of(&group);
            let choice = choose(seen.source, &seen.claimed, &cidrs, &self.settings.plan);
            let before = entry.clone();
            let placed = place(&self.objects, &view, &mut entry, &choice, &self.settings.network).await?;
            self.wait(seen.device, &entry);
            if entry == before {
                return Ok(());
            }
            let mut writes = vec![objects::update(&Resource::from(entry), true)];
            writes.extend(placed.evicted);
            match self.objects.commit(writes).await {
                Err(error) if is_race(&error) => {}
                Err(error) => return Err(error),
                Ok(_) => {
                    tracing::info!(device = %seen.device, source = ?seen.source, taken = ?choice.taken, "address reviewed");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn wait(&mut self, device: DeviceId, entry: &Object<WorkloadEntrySpec>) {
        let candidates = conditions::candidates(entry.status.as_ref());
        if candidates.is_empty() {
            self.waiting.remove(&device);
        } else {
            self.waiting.insert(
                device,
                Waiting {
                    candidates,
                    next: Instant::now() + DIAL_BACK_FAST / 4,
                    tries: 0,
                },
            );
        }
    }

    /// Who answers where a device is.
    fn identity(&self, view: &View, device: DeviceId) -> Option<SpiffeId> {
        let device = &view.members.get(&device)?.device;
        let (namespace, account) = (&device.metadata.namespace, &device.spec.service_account);
        SpiffeId::new(self.settings.trust_domain.clone(), namespace, account).ok()
    }

    async fn load(
        &self,
        view: &View,
        device: DeviceId,
    ) -> Result<Option<(Object<WorkloadGroupSpec>, Object<WorkloadEntrySpec>)>, ObjectError> {
        let Some(member) = view.members.get(&device) else {
            return Ok(None);
        };
        let (namespace, spec) = (&member.device.metadata.namespace, &member.device.spec);
        let group = self
            .objects
            .workload_group(namespace, &spec.workload_group)
            .await?;
        let entry = self
            .objects
            .workload_entry(namespace, &spec.workload_entry)
            .await?;
        Ok(entry.map(|entry| (group.unwrap_or_default(), entry)))
    }

    /// Dials the candidates of every device whose turn it is.
    async fn dial_back(&mut self) -> Result<(), ObjectError> {
        let (now, view) = (Instant::now(), self.fleet.view());
        self.waiting.retain(|device, _| {
            view.members
                .get(device)
                .is_some_and(|member| member.is_connected())
        });
        let due: Vec<(DeviceId, Vec<IpAddr>)> = self
            .waiting
            .iter_mut()
            .filter(|(_, waiting)| waiting.next <= now)
            .map(|(device, waiting)| {
                waiting.tries += 1;
                waiting.next = now
                    + if waiting.tries < FAST_TRIES {
                        DIAL_BACK_FAST
                    } else {
                        DIAL_BACK_SLOW
                    };
                (*device, waiting.candidates.clone())
            })
            .collect();
        for (device, candidates) in due {
            let Some(id) = self.identity(&view, device) else {
                continue;
            };
            // A silent candidate costs its whole timeout: all at once.
            let dials = candidates
                .iter()
                .map(|address| shows(&self.live, &id, device, SocketAddr::new(*address, self.port)));
            let shown = futures_util::future::join_all(dials).await;
            if let Some(address) = candidates
                .iter()
                .zip(shown)
                .find(|(_, shown)| *shown)
                .map(|(address, _)| *address)
            {
                self.take(device, address).await?;
            }
        }
        Ok(())
    }

    /// The device has shown its certificate at the address: it is its own, whoever held it.
    async fn take(&mut self, device: DeviceId, address: IpAddr) -> Result<(), ObjectError> {
        for _ in 0..RACES_MAX {
            let view = self.fleet.view();
            let Some((_, mut entry)) = self.load(&view, device).await? else {
                return Ok(());
            };
            let network = network_of(&entry, &self.settings.network);
            let (mut writes, mut evicted) = (Vec::new(), None);
            if let Some((namespace, holder)) = view.by_address.get(&(network, address))
                && (namespace, holder) != (&entry.metadata.namespace, &entry.metadata.name)
                && let Some(old) = self.objects.workload_entry(namespace, holder).await?
            {
                evicted = view.by_entry.get(&(namespace.clone(), holder.clone())).copied();
                writes.push(evict(old, address));
            }
            settle(&mut entry, address);
            writes.push(objects::update(&Resource::from(entry), true));
            match self.objects.commit(writes).await {
                Err(error) if is_race(&error) => {}
                Err(error) => return Err(error),
                Ok(_) => {
                    tracing::info!(%device, %address, "address taken: the device showed its certificate there");
                    self.waiting.remove(&device);
                    if let Some(other) = evicted {
                        let next = Instant::now() + DIAL_BACK_SLOW;
                        self.waiting.insert(
                            other,
                            Waiting {
                                candidates: vec![address],
                                next,
                                tries: FAST_TRIES,
                            },
                        );
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// CIDRs in which the nodes of a group may claim addresses.
pub(crate) fn cidrs_of(group: &Object<WorkloadGroupSpec>) -> Vec<IpNet> {
    let text = group.metadata.annotations.get(annotation::ADDRESS_CIDRS);
    text.map(|text| {
        text.split(',')
            .filter_map(|cidr| cidr.trim().parse().ok())
            .collect()
    })
    .unwrap_or_default()
}

fn network_of(entry: &Object<WorkloadEntrySpec>, default: &str) -> String {
    if entry.spec.network.is_empty() {
        default.to_owned()
    } else {
        entry.spec.network.clone()
    }
}

/// How a choice was written into an entry.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    /// The write that takes the address away from an entry whose device is gone.
    pub(crate) evicted: Option<Write>,
    /// Coded messages for the node.
    pub(crate) warnings: Vec<String>,
}

/// Writes a choice into an entry, unless another live member holds the address.
pub(crate) async fn place(
    objects: &Objects,
    view: &View,
    entry: &mut Object<WorkloadEntrySpec>,
    choice: &Choice,
    default_network: &str,
) -> Result<Placed, ObjectError> {
    let mut placed = Placed::default();
    for address in &choice.refused {
        placed.warnings.push(
            Code::AddressRefused.message(format_args!("{address} is of a class that nobody may claim")),
        );
    }
    let Some(address) = choice.taken else {
        let message = Code::AddressRefused.message("none of its addresses is the source of its connection or in the group's CIDRs; it is registered without one until a dial of port 15008 shows its certificate");
        pending(entry, ADDRESS_PENDING, &choice.candidates, &message);
        placed.warnings.push(message);
        return Ok(placed);
    };
    let slot = (network_of(entry, default_network), address);
    if let Some((namespace, holder)) = view.by_address.get(&slot)
        && (namespace, holder) != (&entry.metadata.namespace, &entry.metadata.name)
    {
        let live = view
            .member_of_entry(namespace, holder)
            .is_none_or(|member| matches!(member.state().state, "Healthy" | "Unhealthy" | "Suspect"));
        if live {
            let message =
                Code::AddressConflict.message(format_args!("{address} is held by {namespace}/{holder}"));
            pending(entry, ADDRESS_CONFLICT, &[address], &message);
            placed.warnings.push(message);
            return Ok(placed);
        }
        if let Some(old) = objects.workload_entry(namespace, holder).await? {
            placed.evicted = Some(evict(old, address));
        }
    }
    settle(entry, address);
    Ok(placed)
}

fn settle(entry: &mut Object<WorkloadEntrySpec>, address: IpAddr) {
    entry.spec.address = address.to_string();
    conditions::set_candidates(&mut entry.status, &[]);
    conditions::clear(&mut entry.status, ADDRESS_CONFLICT);
    conditions::clear(&mut entry.status, ADDRESS_PENDING);
}

fn pending(entry: &mut Object<WorkloadEntrySpec>, kind: &'static str, candidates: &[IpAddr], message: &str) {
    entry.spec.address.clear();
    conditions::set_candidates(&mut entry.status, candidates);
    let other = if kind == ADDRESS_CONFLICT {
        ADDRESS_PENDING
    } else {
        ADDRESS_CONFLICT
    };
    conditions::clear(&mut entry.status, other);
    let reason = message.split(' ').next().unwrap_or_default().to_owned();
    let since_unix_ms = jiff::Timestamp::now().as_millisecond();
    conditions::set(
        &mut entry.status,
        &Condition {
            kind,
            status: true,
            reason,
            message: message.into(),
            since_unix_ms,
        },
    );
}

/// Takes the address away from its holder, which may win it back by a dial-back.
fn evict(mut holder: Object<WorkloadEntrySpec>, address: IpAddr) -> Write {
    let message = Code::AddressConflict.message(format_args!("another device was found at {address}"));
    pending(&mut holder, ADDRESS_CONFLICT, &[address], &message);
    objects::update(&Resource::from(holder), true)
}

/// True if the device's own certificate is presented at the endpoint.
async fn shows(live: &Arc<LiveIdentity>, id: &SpiffeId, device: DeviceId, endpoint: SocketAddr) -> bool {
    let dial = async {
        let config = tombolo_identity::hbone_client_config(live, vec![id.clone()]).ok()?;
        let socket = TcpStream::connect(endpoint).await.ok()?;
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector
            .connect(tombolo_identity::hbone_server_name(), socket)
            .await
            .ok()?;
        let peer = tombolo_identity::peer_of(stream.get_ref().1.peer_certificates()?).ok()?;
        (peer.device == Some(device)).then_some(())
    };
    matches!(tokio::time::timeout(DIAL_BACK_TIMEOUT, dial).await, Ok(Some(())))
}
