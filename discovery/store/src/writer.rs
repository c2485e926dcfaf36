//! The one thread that writes. What queues up while a commit waits for the disk goes into the next commit together.

use crate::{
    Change, Event, Key, StoreError, Stored, Write, record,
    redb_store::{META, OBJECTS, REVISION},
    window::Window,
};
use redb::{Database, Durability, ReadableTable as _};
use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

/// Most transactions in one commit.
const GROUP_MAX: usize = 256;
/// Most bytes of one value. etcd, which Kubernetes objects must fit in, takes 1.5 MiB.
pub(crate) const VALUE_BYTES_MAX: usize = 4 << 20;

/// One transaction and who waits for it.
pub(crate) struct Request {
    pub(crate) writes: Vec<Write>,
    pub(crate) reply: oneshot::Sender<Result<Vec<Stored>, StoreError>>,
}

pub(crate) struct Writer {
    pub(crate) database: Arc<Database>,
    pub(crate) window: Arc<Window>,
    pub(crate) head_tx: watch::Sender<u64>,
    pub(crate) now_unix_ms: fn() -> i64,
    /// Commits made so far.
    pub(crate) commits: Arc<AtomicU64>,
}

/// A transaction that passed its checks: what it gives back and what watchers see.
type Applied = Result<Vec<Change>, StoreError>;

impl Writer {
    /// Runs until every sender is gone and the queue is empty.
    pub(crate) fn run(self, mut requests: mpsc::Receiver<Request>) {
        let mut failed: Option<String> = None;
        while let Some(first) = requests.blocking_recv() {
            let mut group = vec![first];
            while group.len() < GROUP_MAX {
                let Ok(next) = requests.try_recv() else { break };
                group.push(next);
            }
            let outcome = match &failed {
                None => self.commit(&group),
                Some(cause) => Err(cause.clone()),
            };
            match outcome {
                Ok(results) => self.publish(group, results),
                Err(cause) => {
                    // After a failed fsync nobody knows what is on the disk: only opening again finds out.
                    for request in group {
                        let _ = request.reply.send(Err(StoreError::Failed(cause.clone())));
                    }
                    failed = Some(cause);
                }
            }
        }
    }

    fn publish(&self, group: Vec<Request>, results: Vec<Applied>) {
        let done = results.iter().flatten().flatten();
        self.window.append(done.map(|change| Event {
            resource_version: change.stored().resource_version,
            change: change.clone(),
        }));
        self.head_tx.send_replace(self.window.head());
        for (request, result) in group.into_iter().zip(results) {
            let stored = result.map(|changes| {
                changes
                    .into_iter()
                    .map(|change| match change {
                        Change::Put(s) | Change::Delete(s) => s,
                    })
                    .collect()
            });
            // The caller may have gone; what is written is written.
            let _ = request.reply.send(stored);
        }
    }

    /// Everything of the group that passes its checks in one durable commit. An error is the disk's.
    fn commit(&self, group: &[Request]) -> Result<Vec<Applied>, String> {
        let text = |error: redb::Error| error.to_string();
        let mut transaction = self.database.begin_write().map_err(|error| text(error.into()))?;
        transaction
            .set_durability(Durability::Immediate)
            .map_err(|error| error.to_string())?;
        // Two fsyncs: a commit slot becomes the current one only after it is known to be on the disk.
        transaction.set_two_phase_commit(true);
        let before = self.window.head();
        let mut revision = before;
        let mut results = Vec::with_capacity(group.len());
        {
            let mut objects = transaction
                .open_table(OBJECTS)
                .map_err(|error| text(error.into()))?;
            for request in group {
                // A transaction is checked whole before any of it is applied, so a refused one leaves nothing.
                results.push(match check(&objects, &request.writes).map_err(text)? {
                    Err(refused) => Err(refused),
                    Ok(found) => Ok(apply(
                        &mut objects,
                        &request.writes,
                        found,
                        &mut revision,
                        (self.now_unix_ms)(),
                    )
                    .map_err(|error| text(error.into()))?),
                });
            }
            let mut meta = transaction.open_table(META).map_err(|error| text(error.into()))?;
            meta.insert(REVISION, revision)
                .map_err(|error| text(error.into()))?;
        }
        if revision == before {
            transaction.abort().map_err(|error| text(error.into()))?;
        } else {
            transaction.commit().map_err(|error| text(error.into()))?;
            self.commits.fetch_add(1, Ordering::Relaxed);
        }
        Ok(results)
    }
}

type Objects<'t> = redb::Table<'t, &'static [u8], &'static [u8]>;
/// What each write of a transaction found in its place.
type Found = Vec<Option<(Stored, Uuid)>>;

fn check(objects: &Objects<'_>, writes: &[Write]) -> Result<Result<Found, StoreError>, redb::Error> {
    let mut keys = HashSet::new();
    let mut all = Vec::with_capacity(writes.len());
    for write in writes {
        let key = write.key();
        if !keys.insert(key) {
            return Ok(Err(StoreError::Repeated(key.clone())));
        }
        let found = match objects.get(key.to_bytes().as_slice())? {
            None => None,
            Some(bytes) => match record::decode(key.clone(), bytes.value()) {
                None => {
                    return Ok(Err(StoreError::Failed(format!(
                        "{key} is stored in an unknown form"
                    ))));
                }
                some => some,
            },
        };
        if let Err(refused) = verdict(write, found.as_ref().map(|(stored, _)| stored)) {
            return Ok(Err(refused));
        }
        all.push(found);
    }
    Ok(Ok(all))
}

fn verdict(write: &Write, found: Option<&Stored>) -> Result<(), StoreError> {
    let key = write.key();
    let version = match (write, found) {
        (Write::Create { .. }, None) => None,
        (Write::Create { .. }, Some(_)) => return Err(StoreError::AlreadyExists(key.clone())),
        (Write::Update { .. } | Write::Delete { .. }, None) => return Err(StoreError::NotFound(key.clone())),
        (Write::Update { resource_version, .. }, Some(found)) => Some((*resource_version, found)),
        (Write::Delete { resource_version, .. }, Some(found)) => {
            resource_version.map(|version| (version, found))
        }
    };
    match version {
        Some((expected, found)) if expected != found.resource_version => Err(StoreError::Conflict {
            key: key.clone(),
            expected,
            found: found.resource_version,
        }),
        _ => Ok(()),
    }
}

/// What the caller can be told before the queue: names and sizes.
pub(crate) fn check_form(writes: &[Write]) -> Result<(), StoreError> {
    for write in writes {
        write.key().check()?;
        let (Write::Create { value, .. } | Write::Update { value, .. }) = write else {
            continue;
        };
        if value.len() > VALUE_BYTES_MAX {
            let (key, limit) = (write.key().clone(), VALUE_BYTES_MAX);
            return Err(StoreError::TooLarge {
                key,
                bytes: value.len(),
                limit,
            });
        }
    }
    Ok(())
}

fn apply(
    objects: &mut Objects<'_>,
    writes: &[Write],
    found: Found,
    revision: &mut u64,
    now_unix_ms: i64,
) -> Result<Vec<Change>, redb::StorageError> {
    let mut changes = Vec::with_capacity(writes.len());
    for (write, found) in writes.iter().zip(found) {
        *revision += 1;
        changes.push(match (write, found) {
            (Write::Delete { key, .. }, Some((stored, _))) => {
                objects.remove(key.to_bytes().as_slice())?;
                Change::Delete(Stored {
                    resource_version: *revision,
                    ..stored
                })
            }
            (
                Write::Update {
                    key,
                    value,
                    bump_generation,
                    ..
                },
                Some((stored, uid)),
            ) => {
                let generation = stored.generation + u64::from(*bump_generation);
                let stored = Stored {
                    resource_version: *revision,
                    generation,
                    value: value.clone(),
                    ..stored
                };
                put(objects, key, &stored, uid)?;
                Change::Put(stored)
            }
            (Write::Create { key, value } | Write::Update { key, value, .. }, _) => {
                let uid = Uuid::new_v4();
                let stored = Stored {
                    key: key.clone(),
                    uid: uid.to_string(),
                    resource_version: *revision,
                    generation: 1,
                    created_unix_ms: now_unix_ms,
                    value: value.clone(),
                };
                put(objects, key, &stored, uid)?;
                Change::Put(stored)
            }
            (Write::Delete { .. }, None) => unreachable!("checked: a deletion found its object"),
        });
    }
    Ok(changes)
}

fn put(objects: &mut Objects<'_>, key: &Key, stored: &Stored, uid: Uuid) -> Result<(), redb::StorageError> {
    objects.insert(key.to_bytes().as_slice(), record::encode(stored, uid).as_slice())?;
    Ok(())
}
