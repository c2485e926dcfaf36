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
    time::{sleep, timeout},
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

    /// Makes room for one more.
    pub(crate) fn make_room(&self) {
        let mut since: Vec<i64> = self
            .list
            .borrow()
            .values()
            .map(|previous| previous.since_unix_ms)
            .collect();
        since.sort_unstable();
        if since.len() >= PREVIOUS_MAX
            && let Some(&latest) = since.get(since.len() - PREVIOUS_MAX)
        {
            tracing::warn!(
                processes = since.len(),
                "the oldest of the processes before is drained: no more than {PREVIOUS_MAX} are kept"
            );
            self.drain_until
                .send_modify(|until| *until = (*until).max(latest));
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

/// Connects to one; a socket that nobody serves is removed.
async fn connect(path: &Path) -> io::Result<(Packets, Hello)> {
    let packets = Packets::connect(path).inspect_err(|error| {
        if error.kind() == io::ErrorKind::ConnectionRefused {
            let _ = std::fs::remove_file(path);
        }
    })?;
    send(&packets, &Message::Hello(Hello::new(0)), &[]).await?;
    match receive(&packets, PATIENCE).await?.0 {
        Message::Hello(hello) if hello.check().is_ok() => Ok((packets, hello)),
        other => Err(io::Error::other(format!("it said {other:?}"))),
    }
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
        let (agent, world) = (Arc::clone(agent), enrolled.world.clone());
        tasks.spawn_until_stopped("process before", async move {
            let (packets, hello) = match connect(&path).await {
                Ok(connected) => connected,
                Err(error) => {
                    tracing::debug!(%error, path = %path.display(), "no process before");
                    return;
                }
            };
            let pid = hello.pid;
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
            let end = converse(&agent, &packets, &hello, world).await;
            tracing::debug!(pid, ?end, "a process before is gone");
            agent.previous.list.send_modify(|list| drop(list.remove(&pid)));
            let _ = std::fs::remove_file(path);
        });
    }
}

async fn converse(
    agent: &Agent,
    packets: &Packets,
    hello: &Hello,
    mut world: Reader<Snapshot>,
) -> io::Result<()> {
    let mut drain = agent.previous.drain_until.subscribe();
    let (mut tell, mut drained) = (true, false);
    loop {
        // Not held over the answer: a guard must not cross an await.
        let told = async {
            drain
                .wait_for(|until| *until >= hello.since_unix_ms)
                .await
                .is_ok()
        };
        if tell {
            let snapshot = world.load();
            send_file(packets, &Message::World, &snapshot.encode()).await?;
            tell = false;
        }
        tokio::select! {
            received = packets.receive() => {
                let Some((bytes, _)) = received? else { return Ok(()) };
                if let Ok(Message::Connections { count }) = serde_json::from_slice(&bytes) {
                    agent.previous.list.send_if_modified(|list| {
                        let Some(previous) = list.get_mut(&hello.pid) else { return false };
                        std::mem::replace(&mut previous.connections, count) != count
                    });
                }
            }
            changed = world.changed() => {
                if changed.is_none() {
                    return Ok(());
                }
                sleep(DEBOUNCE).await;
                tell = true;
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
