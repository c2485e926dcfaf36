//! Processes that have handed over and still serve what was open then: told of every new world, counted, drained.

use crate::{
    agent::Agent,
    handover::{self, Hello, Message, receive, send, send_file},
};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tombolo_capture::handover::Packets;
use tombolo_runtime::{Reader, TaskGroup};
use tombolo_snapshot::Snapshot;

/// One answers at once.
const PATIENCE: Duration = Duration::from_secs(2);
/// Changes that come together are told together; well within the second that a revocation may take.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// Most of them: with one more, the oldest is drained. Each is a process with its own memory.
pub(crate) const PREVIOUS_MAX: usize = 3;

/// In the place of [`Previous::since_unix_ms`] until the process has said it.
const UNKNOWN: i64 = i64::MIN;

/// One of them.
#[derive(Debug, Clone)]
pub(crate) struct Previous {
    pub(crate) version: String,
    /// When it handed over, Unix milliseconds.
    pub(crate) since_unix_ms: i64,
    pub(crate) connections: u64,
}

/// All of them by process id, and how they are told to drain.
#[derive(Debug)]
pub(crate) struct All {
    list: watch::Sender<BTreeMap<u32, Previous>>,
    /// All that handed over before this time, Unix milliseconds, are to end.
    drain_until: watch::Sender<i64>,
}

impl Default for All {
    fn default() -> Self {
        Self {
            list: watch::Sender::new(BTreeMap::new()),
            drain_until: watch::Sender::new(i64::MIN),
        }
    }
}

impl All {
    /// How many, and their connections.
    pub(crate) fn counts(&self) -> (usize, u64) {
        let list = self.list.borrow();
        (
            list.len(),
            list.values().map(|previous| previous.connections).sum(),
        )
    }

    /// Has the oldest drained where there are too many. The main process does it for those that it finds: it is there
    /// to repeat it, when the one that asked for the reload is not.
    fn limit(&self) {
        let mut since: Vec<i64> = self
            .list
            .borrow()
            .values()
            .map(|previous| previous.since_unix_ms)
            .filter(|&since| since != UNKNOWN)
            .collect();
        since.sort_unstable();
        let over = since.len().saturating_sub(PREVIOUS_MAX);
        let Some(&latest) = over.checked_sub(1).and_then(|last| since.get(last)) else {
            return;
        };
        let told = self.drain_until.send_if_modified(|until| {
            let more = *until < latest;
            *until = (*until).max(latest);
            more
        });
        if told {
            tracing::warn!(
                processes = since.len(),
                "the oldest of the processes before is drained: no more than {PREVIOUS_MAX} are kept"
            );
        }
    }

    /// Drains all and waits until they are gone.
    pub(crate) async fn drain(&self) {
        self.drain_until.send_replace(i64::MAX);
        let mut list = self.list.subscribe();
        let _ = list.wait_for(BTreeMap::is_empty).await;
    }
}

fn sockets(run_dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(handover::folder(run_dir))
        .into_iter()
        .flatten()
        .flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The process that listens at a socket: its number is the name.
fn number(path: &Path) -> Option<u32> {
    path.file_stem()?.to_str()?.parse().ok()
}

/// Connects to one; a socket that nobody serves is removed.
async fn connect(path: &Path) -> io::Result<(Packets, Hello)> {
    let packets = Packets::connect(path).inspect_err(|error| {
        if error.kind() == io::ErrorKind::ConnectionRefused {
            let _ = std::fs::remove_file(path);
        }
    })?;
    send(&packets, &Message::Hello(Hello::new(0)), &[]).await?;
    let said = receive(&packets, PATIENCE).await?.0;
    if let Message::Hello(hello) = &said
        && hello.check().is_ok()
    {
        return Ok((packets, hello.clone()));
    }
    Err(io::Error::other(format!("it said {said:?}")))
}

/// The connections that those processes serve, for an agent that starts without having been handed them: the one that
/// had them died.
pub(crate) async fn open_flows(run_dir: &Path) -> Vec<Vec<u8>> {
    let mut tables = Vec::new();
    for path in sockets(run_dir) {
        let asked = async {
            let (packets, hello) = connect(&path).await?;
            send(&packets, &Message::Flows, &[]).await?;
            loop {
                match receive(&packets, PATIENCE).await? {
                    (Message::OpenFlows, descriptors) => {
                        return Ok((hello.pid, handover::file(descriptors)?));
                    }
                    (Message::Connections { .. }, _) => {}
                    (other, _) => return Err(io::Error::other(format!("it said {other:?}"))),
                }
            }
        };
        match asked.await {
            Ok((pid, table)) => {
                tracing::info!(
                    pid,
                    bytes = table.len(),
                    "connections of a process before are taken over"
                );
                tables.push(table);
            }
            Err(error) => tracing::debug!(%error, path = %path.display(), "no process before"),
        }
    }
    tables
}

/// Follows all that are there now. Call it once this process is the main one and enrolled.
pub(crate) fn follow(agent: &Arc<Agent>, run_dir: &Path, tasks: &TaskGroup) {
    let Some(enrolled) = agent.enrolled.get() else {
        return;
    };
    for path in sockets(run_dir) {
        let Some(pid) = number(&path) else { continue };
        let (agent, world) = (Arc::clone(agent), enrolled.world.clone());
        // Known at once: a drain that comes next waits for it.
        agent.previous.list.send_modify(|list| {
            list.entry(pid).or_insert_with(|| Previous {
                version: String::new(),
                since_unix_ms: UNKNOWN,
                connections: 0,
            });
        });
        tasks.spawn_until_stopped("process before", async move {
            let (packets, hello) = match connect(&path).await {
                Ok(connected) => connected,
                Err(error) => {
                    tracing::debug!(%error, path = %path.display(), "no process before");
                    agent.previous.list.send_modify(|list| drop(list.remove(&pid)));
                    return;
                }
            };
            let previous = Previous {
                version: hello.version.clone(),
                since_unix_ms: hello.since_unix_ms,
                connections: 0,
            };
            tracing::info!(
                pid,
                version = previous.version,
                "a process before serves on what was open then"
            );
            agent
                .previous
                .list
                .send_modify(|list| drop(list.insert(pid, previous)));
            agent.previous.limit();
            let end = converse(&agent, &packets, pid, hello.since_unix_ms, world).await;
            tracing::debug!(pid, ?end, "a process before is gone");
            agent.previous.list.send_modify(|list| drop(list.remove(&pid)));
            let _ = std::fs::remove_file(path);
        });
    }
}

async fn converse(
    agent: &Agent,
    packets: &Packets,
    pid: u32,
    since_unix_ms: i64,
    mut world: Reader<Snapshot>,
) -> io::Result<()> {
    let mut drain = agent.previous.drain_until.subscribe();
    let (mut tell, mut drained) = (Some(Instant::now()), false);
    loop {
        // Not held over the answer: a guard must not cross an await.
        let told = async { drain.wait_for(|until| *until >= since_unix_ms).await.is_ok() };
        let due = async {
            match tell {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            received = packets.receive() => {
                let Some((bytes, _)) = received? else { return Ok(()) };
                if let Ok(Message::Connections { count }) = serde_json::from_slice(&bytes) {
                    agent.previous.list.send_if_modified(|list| {
                        let Some(previous) = list.get_mut(&pid) else { return false };
                        std::mem::replace(&mut previous.connections, count) != count
                    });
                }
            }
            changed = world.changed(), if tell.is_none() => {
                if changed.is_none() {
                    return Ok(());
                }
                tell = Some(Instant::now() + DEBOUNCE);
            }
            () = due => {
                tell = None;
                let bytes = world.load().encode();
                send_file(packets, &Message::World, &bytes).await?;
            }
            told = told, if !drained => {
                if !told {
                    return Ok(());
                }
                drained = true;
                let said = timeout(PATIENCE, send(packets, &Message::Drain, &[])).await;
                said.map_err(io::Error::from)??;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(since: &[i64]) -> All {
        let all = All::default();
        for (pid, &since_unix_ms) in (1..).zip(since) {
            let previous = Previous {
                version: String::new(),
                since_unix_ms,
                connections: 1,
            };
            all.list.send_modify(|list| drop(list.insert(pid, previous)));
            all.limit();
        }
        all
    }

    #[test]
    fn the_newest_three_are_kept_in_whatever_order_they_are_found() {
        for (since, until) in [
            (&[10, 20, 30][..], i64::MIN),
            (&[10, 20, 30, 40], 10),
            (&[40, 10, 30, 20], 10),
            (&[50, 40, 30, 20, 10], 20),
            // One that has not said it yet is not the oldest.
            (&[UNKNOWN, 20, 30, 40], i64::MIN),
        ] {
            assert_eq!(*all(since).drain_until.borrow(), until, "{since:?}");
        }
    }

    #[tokio::test]
    async fn a_drain_waits_for_all_of_them() {
        let all = Arc::new(all(&[10, UNKNOWN]));
        assert_eq!(all.counts(), (2, 2));
        let gone = Arc::clone(&all);
        let drained = async { all.drain().await };
        let ends = async {
            for pid in [1, 2] {
                tokio::task::yield_now().await;
                assert_eq!(*gone.drain_until.borrow(), i64::MAX);
                gone.list.send_modify(|list| drop(list.remove(&pid)));
            }
        };
        tokio::join!(drained, ends);
        assert_eq!(all.counts(), (0, 0));
    }
}
