//! What is left of a process that has handed over: it serves what was open then, by the policies of now, until the
//! last of it has ended.

use crate::{
    agent::Agent,
    handover::{self, Hello, Message, receive, send, send_file},
    reload::HandedOver,
};
use std::{collections::HashSet, io, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, interval, sleep, timeout},
};
use tombolo_capture::{OpenFlows, handover::Packets};
use tombolo_control_client::follow;
use tombolo_runtime::{TaskGroup, stop_signal};
use tombolo_telemetry::Direction;

/// Longest wait for the new process's own control stream. It has a limit of its own below this.
const ONLINE_MAX: Duration = Duration::from_secs(10);
/// How often is looked whether it is done, and told how much is open.
const LOOK: Duration = Duration::from_millis(250);
/// So long it lives at least: handshakes that were under way become connections.
const LINGER_MIN: Duration = Duration::from_secs(2);
/// Who connects says hello at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs until nothing is open any more, the limit is over, or it is told to end; what is open then gets the time of a
/// drain.
pub(crate) async fn run(agent: &Arc<Agent>, handed: HandedOver, tasks: &TaskGroup) {
    let HandedOver {
        packets,
        listener,
        path,
        since_unix_ms,
        flows,
    } = handed;
    let drain = watch::Sender::new(false);
    let served = Arc::new(Served {
        agent: Arc::clone(agent),
        flows,
        since_unix_ms,
        drain: drain.clone(),
    });
    let control = Arc::clone(agent);
    tasks.spawn_until_stopped("hand-over", async move {
        // Online, or the end of the new process: discovery must not hear of a host that is not served.
        let _ = timeout(ONLINE_MAX, packets.receive()).await;
        if let Some(enrolled) = control.enrolled.get() {
            enrolled.control.close_stream();
        }
    });
    let group = tasks.clone();
    tasks.spawn_until_stopped("questions", async move {
        let Some(listener) = listener else { return };
        loop {
            match listener.accept().await {
                Ok(packets) => {
                    let served = Arc::clone(&served);
                    group.spawn_until_stopped("question", async move {
                        if let Err(error) = served.answer(&packets).await {
                            tracing::debug!(%error, "the main process is gone");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "a question was not accepted");
                    sleep(LOOK).await;
                }
            }
        }
    });
    let mut drained = drain.subscribe();
    let limit = agent.settings.reload_linger();
    let cause = tokio::select! {
        () = idle(agent) => None,
        () = sleep(limit) => Some("the limit reload_linger_seconds is over"),
        _ = drained.wait_for(|drain| *drain) => Some("the main process says so"),
        signal = stop_signal() => signal.ok(),
    };
    let dataplane = agent.dataplane.borrow().clone();
    if let (Some(cause), Some(dataplane)) = (cause, dataplane) {
        let connections = dataplane.connection_count();
        tracing::info!(connections, cause, "the process before the reload drains");
        tokio::select! {
            () = dataplane.drain() => {}
            _ = stop_signal(), if cause != "SIGTERM" => {}
        }
    }
    tracing::info!("the process before the reload has ended");
    let _ = std::fs::remove_file(path);
}

/// Twice in a row: what is between two states is seen by the second look.
async fn idle(agent: &Agent) {
    sleep(LINGER_MIN).await;
    let mut looks = 0;
    while looks < 2 {
        let idle = agent
            .dataplane
            .borrow()
            .as_ref()
            .is_none_or(|dataplane| dataplane.is_idle());
        looks = if idle { looks + 1 } else { 0 };
        sleep(LOOK).await;
    }
}

struct Served {
    agent: Arc<Agent>,
    flows: Option<OpenFlows>,
    since_unix_ms: i64,
    drain: watch::Sender<bool>,
}

impl Served {
    async fn answer(&self, packets: &Packets) -> io::Result<()> {
        let (Message::Hello(hello), _) = receive(packets, PATIENCE).await? else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        send(packets, &Message::Hello(Hello::new(self.since_unix_ms)), &[]).await?;
        hello.check().map_err(io::Error::other)?;
        let mut looks = interval(LOOK);
        let mut said = None;
        loop {
            let received = tokio::select! {
                received = packets.receive() => received?,
                _ = looks.tick() => {
                    let dataplane = self.agent.dataplane.borrow().clone();
                    let count = dataplane.map_or(0, |dataplane| dataplane.connection_count());
                    if said != Some(count) {
                        said = Some(count);
                        let count = u64::try_from(count).unwrap_or(u64::MAX);
                        send(packets, &Message::Connections { count }, &[]).await?;
                    }
                    continue;
                }
            };
            let Some((bytes, descriptors)) = received else {
                return Ok(());
            };
            match serde_json::from_slice(&bytes) {
                Ok(Message::World) => self.world(&handover::file(descriptors)?),
                Ok(Message::Drain) => drop(self.drain.send_replace(true)),
                Ok(Message::Flows) => send_file(packets, &Message::OpenFlows, &self.open_flows()).await?,
                // A later version may say more.
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn world(&self, bytes: &[u8]) {
        let Some(enrolled) = self.agent.enrolled.get() else {
            return;
        };
        let registration = enrolled.control.registration();
        let begun = Instant::now();
        if let Err(problem) = follow(bytes, &enrolled.publisher, &enrolled.identity, &registration) {
            // Policies that cannot be read cannot be kept: what is open ends within the time of a drain.
            tracing::warn!("{problem}");
            self.drain.send_replace(true);
        }
        tracing::trace!(took = ?begun.elapsed(), "a new world for what was open before the reload");
    }

    /// The connections of applications that are still open.
    fn open_flows(&self) -> Vec<u8> {
        let dataplane = self.agent.dataplane.borrow().clone();
        let open = dataplane
            .map(|dataplane| dataplane.connections())
            .unwrap_or_default();
        let open: HashSet<_> = open
            .into_iter()
            .filter(|connection| connection.direction == Direction::Outbound)
            .map(|connection| (connection.source, connection.destination))
            .collect();
        let keep = |source, destination| open.contains(&(source, destination));
        self.flows
            .as_ref()
            .map_or_else(Vec::new, |flows| flows.export(keep))
    }
}
