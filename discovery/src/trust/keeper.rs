//! The owner of the own trust: makes the steps and puts them into force.

use super::{
    Asked, COMMANDS_MAX, Command, HOUR_SECONDS, Rotation, Status, Trust,
    holders::{Holders, holders, outstanding, told},
    names::{OwnNames, Renaming},
    record::{Kept, Place, Record, Step},
};
use crate::{
    certificate::ServerNames, federation::Federation, fleet::Fleet, objects::Objects, refusal::Refusal,
    state::StateDir, xds::Subscribers,
};
use anyhow::Context as _;
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::{Notify, mpsc};
use tombolo_ca::{Authority, TtlLimits};
use tombolo_config::{Kind, Resource};
use tombolo_identity::{LiveIdentity, certificates_to_pem};
use tombolo_proto::type_url;
use tombolo_runtime::{Publisher, Reader, TaskGroup, published};
use tombolo_store::Store;
use tombolo_types::{Code, TrustDomain};

/// How long a host may be away and still follow a change of roots, and how long connections of an old root may run on.
pub(super) const KEPT: Duration = Duration::from_secs(90 * 24 * 3600);
/// How often is looked for what is kept no longer.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3600);

/// The CA as the store and the disk have it, not kept by anybody yet.
#[derive(Debug)]
pub struct Opened {
    place: Place,
    record: Record,
    version: Option<u64>,
    limits: TtlLimits,
    authority_tx: Publisher<Authority>,
    authority: Reader<Authority>,
    step_tx: Publisher<&'static str>,
    step: Reader<&'static str>,
    names: OwnNames,
    commands: (mpsc::Sender<Command>, mpsc::Receiver<Command>),
}

/// What the owner works on.
pub struct TrustConfig {
    /// The own certificate and the roots of this mesh.
    pub live: Arc<LiveIdentity>,
    /// What the own certificate says.
    pub names: ServerNames,
    /// Where join tokens are.
    pub objects: Objects,
    /// Where members are told.
    pub fleet: Fleet,
    /// Where other clusters are told.
    pub federation: Federation,
    /// Who has acknowledged what.
    pub subscribers: Subscribers,
    /// Wakes whoever opens discovery anew.
    pub again: Arc<Notify>,
}

impl std::fmt::Debug for TrustConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrustConfig").finish_non_exhaustive()
    }
}

/// Opens the CA that signs, at the step that the store says. `founding` is the name that the mesh was founded with.
///
/// # Errors
/// When the record or a CA that it names cannot be read.
pub async fn open(
    store: Arc<dyn Store>,
    state: &StateDir,
    founding: &TrustDomain,
    limits: TtlLimits,
) -> anyhow::Result<Opened> {
    let place = Place {
        store,
        state: state.clone(),
        founding: founding.clone(),
    };
    let (record, version) = place.load().await.context("the state of trust cannot be read")?;
    name_strays(&place, &record);
    let mut authority = place.open(&record, now_unix())?;
    authority.set_limits(limits)?;
    let (authority_tx, authority) = published(authority);
    let (step_tx, step) = published(under_way(&record));
    let names = record.names.own(founding);
    Ok(Opened {
        names,
        place,
        record,
        version,
        limits,
        authority_tx,
        authority,
        step_tx,
        step,
        commands: mpsc::channel(COMMANDS_MAX),
    })
}

/// The step of whatever is exchanged.
fn under_way(record: &Record) -> &'static str {
    match (&record.step, &record.names.step) {
        (Step::Steady, renaming) => renaming.name(),
        (rotation, _) => rotation.name(),
    }
}

impl Opened {
    /// How the trust domain is called, for as long as discovery is open.
    pub fn names(&self) -> &OwnNames {
        &self.names
    }

    /// The handle; commands wait until [`start`].
    pub fn handle(&self) -> Trust {
        Trust {
            authority: self.authority.clone(),
            step: self.step.clone(),
            commands_tx: self.commands.0.clone(),
        }
    }
}

/// Starts the owner.
pub fn start(opened: Opened, config: TrustConfig, tasks: &TaskGroup) {
    let Opened {
        place,
        record,
        version,
        limits,
        authority_tx,
        step_tx,
        names,
        commands: (_, commands_rx),
        ..
    } = opened;
    let owner = Owner {
        names,
        closing: false,
        place,
        record,
        version,
        limits,
        authority_tx,
        step_tx,
        config,
    };
    tasks.spawn_until_stopped("trust owner", owner.run(commands_rx));
}

pub(super) fn now_unix() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

pub(super) fn now_unix_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

pub(super) struct Owner {
    pub(super) place: Place,
    pub(super) record: Record,
    pub(super) version: Option<u64>,
    limits: TtlLimits,
    authority_tx: Publisher<Authority>,
    step_tx: Publisher<&'static str>,
    pub(super) config: TrustConfig,
    /// In force since discovery opened.
    pub(super) names: OwnNames,
    /// A step of a renaming is written: discovery is about to open anew, and this owner does nothing more.
    pub(super) closing: bool,
}

impl Owner {
    async fn run(mut self, mut commands_rx: mpsc::Receiver<Command>) {
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                command = commands_rx.recv() => match command {
                    Some(command) => self.take(command).await,
                    None => return,
                },
                _ = sweep.tick() => self.sweep().await,
            }
        }
    }

    async fn take(&mut self, command: Command) {
        // Nobody waits for an answer any more when `send` fails: the caller has gone.
        if self.closing {
            return; // the caller hears that discovery is stopping
        }
        match command {
            Command::Show(reply) => drop(reply.send(self.status().await)),
            Command::Rotate(asked, reply) => drop(reply.send(self.rotate(asked).await)),
            Command::ShowNames(reply) => drop(reply.send(self.name_status().await)),
            Command::Migrate(asked, reply) => {
                let answer = self.migrate(asked).await;
                let _ = reply.send(answer);
                if self.closing {
                    self.config.again.notify_one();
                }
            }
            Command::Other(until) => self.note_other(until).await,
        }
    }

    async fn sweep(&mut self) {
        let mut record = self.record.clone();
        if record.sweep(now_unix())
            && let Err(refusal) = self.make(record).await
        {
            tracing::warn!(%refusal, "roots that are over are still kept");
        }
    }

    async fn note_other(&mut self, until: u64) {
        let until = until.div_ceil(HOUR_SECONDS) * HOUR_SECONDS;
        if until <= self.record.others_until {
            return;
        }
        let record = Record {
            others_until: until,
            ..self.record.clone()
        };
        match self.place.save(&record, self.version).await {
            Ok(version) => (self.record, self.version) = (record, Some(version)),
            Err(error) => tracing::warn!(%error, "the end of a certificate is not remembered"),
        }
    }

    /// Writes the record and puts it into force.
    async fn make(&mut self, record: Record) -> Result<(), Refusal> {
        // What cannot be opened is not written.
        let mut authority = self.place.open(&record, now_unix()).map_err(Refusal::internal)?;
        authority.set_limits(self.limits).map_err(Refusal::internal)?;
        let (identity, others) = self
            .config
            .names
            .issue(&authority, SystemTime::now())
            .map_err(Refusal::internal)?;
        let version = self.place.save(&record, self.version).await?;
        (self.record, self.version) = (record, Some(version));
        self.step_tx.publish(under_way(&self.record));
        let bundles = self.names.bundles(&authority.bundle());
        let bundle_pem = authority.bundle_pem();
        self.authority_tx.publish(authority);
        // The roots first: nobody may hold a certificate whose root is not published.
        let bundles = bundles.into_iter().map(Arc::new).collect();
        self.config.live.set_bundles(bundles);
        self.config.live.set_identities(identity, others);
        let trust_domain = self.names.signing.clone();
        self.config
            .fleet
            .set_bundle(trust_domain, bundle_pem.clone())
            .await;
        self.config.federation.set_roots(bundle_pem).await?;
        self.config.fleet.published().await;
        Ok(())
    }

    pub(super) async fn holders(&self) -> Result<Holders, Refusal> {
        let clusters = self.config.federation.show().await?;
        let world = self.config.fleet.world().load();
        let version = world
            .resources(type_url::TRUST_BUNDLE)
            .and_then(|all| all.get(self.names.signing.as_str()))
            .map(|compiled| compiled.version.to_string())
            .unwrap_or_default();
        let rows = self.config.subscribers.list();
        Ok(holders(
            &self.config.fleet.view(),
            &rows,
            &version,
            &clusters,
            now_unix_ms(),
        ))
    }

    /// Join tokens that name the old root and could still be used.
    pub(super) async fn tokens_before(&self, since_unix_ms: i64) -> Result<usize, Refusal> {
        let (tokens, _) = self.config.objects.list(Some(Kind::JoinToken), None).await?;
        let now = now_unix_ms();
        let live = tokens.iter().filter(|token| {
            let Resource::JoinToken(token) = token else {
                return false;
            };
            let time = |text: &str| tombolo_config::unix_ms(text).unwrap_or_default();
            let created = token.metadata.creation_timestamp.as_deref().map_or(0, time);
            created < since_unix_ms && time(&token.spec.expires) > now
        });
        Ok(live.count())
    }

    async fn status(&self) -> Result<Status, Refusal> {
        let holders = self.holders().await?;
        let now = now_unix();
        let mut status = Status {
            step: self.record.step.name(),
            retired_pem: self.record.retired.iter().map(|kept| kept.pem.as_str()).collect(),
            ..Status::default()
        };
        let beside = |name: &str| -> Result<String, Refusal> {
            let other = self.place.authority(name).map_err(Refusal::internal)?;
            Ok(other.roots_pem().to_owned())
        };
        match &self.record.step {
            Step::Steady => {
                status.next = vec!["start"];
                if !self.record.retired.is_empty() {
                    status.next.push("cut");
                    status.notes.push(
                        "a retired root lets nobody in; connections that it let in run on, and cut ends them"
                            .into(),
                    );
                }
            }
            Step::Started {
                next,
                since_unix_ms,
                by,
            } => {
                (status.since_unix_ms, status.by) = (*since_unix_ms, by.clone());
                status.next = vec!["switch", "abort"];
                status.beside_pem = beside(next)?;
                status.blockers.clone_from(&holders.behind);
                if !holders.away.is_empty() {
                    status.notes.push(format!(
                        "{} enrolled VMs are away: they follow when they come back, within 90 days of finish",
                        holders.away.len()
                    ));
                }
                if !holders.by_certificate.is_empty() {
                    status.notes.push(format!(
                        "{} clients of other kinds take the new root with their next certificate; until then they follow the old root's signature under the new one",
                        holders.by_certificate.len()
                    ));
                }
            }
            Step::Switched {
                previous,
                since_unix_ms,
                by,
                others_until,
            } => {
                (status.since_unix_ms, status.by) = (*since_unix_ms, by.clone());
                status.next = vec!["finish"];
                status.beside_pem = beside(previous)?;
                status.blockers.clone_from(&holders.behind);
                let signs = self.authority_tx.load();
                let view = self.config.fleet.view();
                status
                    .blockers
                    .extend(outstanding(&view, &signs, *others_until, now));
                let tokens = self.tokens_before(*since_unix_ms).await?;
                if tokens > 0 {
                    status.notes.push(format!(
                        "{tokens} join tokens were made before the switch and name the old root: finish ends them"
                    ));
                }
            }
        }
        status.holders = holders;
        Ok(status)
    }

    async fn rotate(&mut self, asked: Asked) -> Result<Status, Refusal> {
        if self.record.names.step != Renaming::Steady {
            return Err(Refusal::new(
                Code::TrustStep,
                "the trust domain is being renamed: finish or abort that first (tombolo trust migrate)",
            ));
        }
        let status = self.status().await?;
        let name = asked.rotation.as_str();
        if !status.next.contains(&name) {
            let next = status.next.join(" or ");
            return Err(Refusal::new(
                Code::TrustStep,
                format_args!(
                    "the rotation is {}, after which {next} may come, not {name}",
                    status.step
                ),
            ));
        }
        if asked.rotation == Rotation::Start && !self.authority_tx.load().is_root() {
            return Err(Refusal::new(
                Code::TrustStep,
                "this CA is an intermediate of another one, which has to make the new root",
            ));
        }
        if asked.dry_run {
            return Ok(status);
        }
        let waits = matches!(asked.rotation, Rotation::Switch | Rotation::Finish);
        if waits && !status.blockers.is_empty() && !asked.force {
            return Err(Refusal::new(Code::TrustBehind, told(&status.blockers)));
        }
        let done = match asked.rotation {
            Rotation::Start => self.begin(asked.by).await,
            Rotation::Switch => self.switch(asked.by).await,
            Rotation::Finish => self.finish().await,
            Rotation::Abort => self.abort().await,
            Rotation::Cut => self.cut().await,
        };
        done?;
        tracing::info!(step = name, "the root of this trust domain is rotated");
        self.status().await
    }

    async fn begin(&mut self, by: String) -> Result<(), Refusal> {
        let next = format!("ca-{:08x}", rand::random::<u32>());
        let folder = self.place.folder(&next);
        // Folders of CAs are all of the name that the mesh was founded with.
        let signs = self
            .place
            .authority(&self.record.signing)
            .map_err(Refusal::internal)?;
        let (now, made) = (SystemTime::now(), folder.clone());
        let made = tokio::task::spawn_blocking(move || {
            let next = signs.create_next(&made, now)?;
            signs.cross_sign(&next, KEPT, now).map(drop)
        });
        let made = made.await.map_err(Refusal::internal)?;
        let started = match made {
            Ok(()) => {
                let step = Step::Started {
                    next,
                    since_unix_ms: now_unix_ms(),
                    by,
                };
                let record = Record {
                    step,
                    ..self.record.clone()
                };
                self.make(record).await
            }
            Err(error) => Err(Refusal::internal(error)),
        };
        let refers =
            matches!(&self.record.step, Step::Started { next, .. } if self.place.folder(next) == folder);
        if !refers {
            let _ = std::fs::remove_dir_all(&folder); // nothing refers to it
        }
        started
    }

    /// The old CA's signature under the root of the signing one, for the time from now.
    fn cross(&self, old: &str, new: &str) -> Result<Kept, Refusal> {
        let open = |name: &str| self.place.authority(name).map_err(Refusal::internal);
        let (old, new) = (open(old)?, open(new)?);
        let pem = old
            .cross_sign(&new, KEPT, SystemTime::now())
            .map_err(Refusal::internal)?;
        Ok(Kept {
            pem,
            until: (now_unix() + KEPT.as_secs()).min(old.not_after()),
        })
    }

    async fn switch(&mut self, by: String) -> Result<(), Refusal> {
        let Step::Started { next, .. } = &self.record.step else {
            return Err(Refusal::internal("no root is coming"));
        };
        let (next, previous) = (next.clone(), self.record.signing.clone());
        let mut record = Record {
            signing: next.clone(),
            others_until: 0,
            step: Step::Switched {
                previous: previous.clone(),
                since_unix_ms: now_unix_ms(),
                by,
                others_until: self.record.others_until,
            },
            ..self.record.clone()
        };
        record.crosses.insert(0, self.cross(&previous, &next)?);
        self.make(record).await
    }

    async fn finish(&mut self) -> Result<(), Refusal> {
        let Step::Switched { previous, .. } = &self.record.step else {
            return Err(Refusal::internal("no root is leaving"));
        };
        let previous = previous.clone();
        let old = self.place.authority(&previous).map_err(Refusal::internal)?;
        let mut record = Record {
            step: Step::Steady,
            ..self.record.clone()
        };
        // Again, so that it holds from now on; and for the last time: the key that could do it goes.
        let cross = self.cross(&previous, &record.signing)?;
        match record.crosses.first_mut() {
            Some(first) => *first = cross,
            None => record.crosses.push(cross),
        }
        record.retired.push(Kept {
            pem: certificates_to_pem(old.bundle().roots()),
            until: now_unix() + KEPT.as_secs(),
        });
        self.make(record).await?;
        self.remove(&previous);
        Ok(())
    }

    async fn abort(&mut self) -> Result<(), Refusal> {
        let Step::Started { next, .. } = &self.record.step else {
            return Err(Refusal::internal("no root is coming"));
        };
        let next = next.clone();
        self.make(Record {
            step: Step::Steady,
            ..self.record.clone()
        })
        .await?;
        self.remove(&next);
        Ok(())
    }

    async fn cut(&mut self) -> Result<(), Refusal> {
        self.make(Record {
            retired: Vec::new(),
            ..self.record.clone()
        })
        .await
    }

    /// The key of a CA that signs no more.
    fn remove(&self, name: &str) {
        let folder = self.place.folder(name);
        if let Err(error) = std::fs::remove_dir_all(&folder) {
            tracing::warn!(%error, folder = %folder.display(), "the key of a root that is gone is still on disk: remove it");
        }
    }
}

/// Says which folders of CAs no step needs: a stop at the wrong moment leaves one behind. They are not removed here: the
/// store may be an older copy.
fn name_strays(place: &Place, record: &Record) {
    let needed = |name: &str| {
        name == record.signing
            || match &record.step {
                Step::Steady => false,
                Step::Started { next, .. } => name == next,
                Step::Switched { previous, .. } => name == previous,
            }
    };
    for entry in std::fs::read_dir(place.state.path())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if (name == "ca" || name.starts_with("ca-")) && !needed(&name) {
            tracing::warn!(
                folder = %entry.path().display(),
                "the key of a root that no step of a rotation needs is on disk: remove it, unless the store is an older copy"
            );
        }
    }
}
