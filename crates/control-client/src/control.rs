use crate::{
    ControlStatus, Health, Problem, Registration, State, certificates::Certificates, push::MetricsPush,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};
use tombolo_identity::LiveIdentity;
use tombolo_runtime::{Publisher, Reader, TaskGroup};
use tombolo_snapshot::Snapshot;
use tombolo_types::Code;

mod restore;
mod stream;

use restore::trust;
pub use restore::{Restored, restore};
use stream::Stream;

/// Changes are written to disk so soon, and then at most so often: a restart without discovery goes by what is there, a
/// policy that has just come among it.
const PERSIST_DEBOUNCE_MIN: Duration = Duration::from_millis(50);
/// A churn of thousands of endpoints is a few writes: writing takes at most an eighth of the time.
const PERSIST_DEBOUNCE_MAX: Duration = Duration::from_secs(1);
/// A snapshot that the disk did not take is written again.
const PERSIST_RETRY: Duration = Duration::from_secs(2);
/// For a write that is under way.
const RETIRE_MAX: Duration = Duration::from_secs(2);

/// What a control client works on.
#[derive(Debug)]
pub struct Inputs {
    /// The state directory.
    pub state: Arc<State>,
    /// From [`restore`].
    pub registration: Registration,
    /// From [`restore`]; certificate and bundles are replaced in it.
    pub identity: Arc<LiveIdentity>,
    /// Where each new version of the world goes; its present value is where the client starts.
    pub publisher: Arc<Publisher<Snapshot>>,
    /// The other end of it.
    pub world: Reader<Snapshot>,
    /// What is reported about the application.
    pub health: watch::Receiver<Health>,
    /// Version of the program, for the node's metadata.
    pub version: String,
    /// Metrics for discovery to show to a scraper; none: nothing is pushed.
    pub metrics: Option<MetricsPush>,
}

/// A running control client: stream, certificate and snapshot file, each a task of the group.
#[derive(Debug, Clone)]
pub struct Control {
    status: watch::Receiver<ControlStatus>,
    registration: watch::Receiver<Arc<Registration>>,
    /// What writes to the state directory.
    writers: TaskGroup,
    stream: TaskGroup,
}

/// Takes a snapshot of a process that has taken over from this one, in its own encoding: policies, revocations and
/// trust bundles come into force for what is still open here.
///
/// # Errors
/// When this version cannot read it.
pub fn follow(
    bytes: &[u8],
    publisher: &Publisher<Snapshot>,
    identity: &LiveIdentity,
    registration: &Registration,
) -> Result<(), Problem> {
    let snapshot = restore::read(bytes, registration).map_err(|error| {
        Problem::new(
            Code::StateCorrupt,
            format!("a snapshot of the running agent: {error}"),
        )
    })?;
    trust(&snapshot, identity);
    publisher.publish(snapshot);
    Ok(())
}

impl Control {
    /// Starts it. It runs until the group stops, whatever discovery does.
    pub fn run(inputs: Inputs, tasks: &TaskGroup) -> Self {
        Self::run_when(inputs, watch::channel(true).1, tasks)
    }

    /// Starts it once `go` is true: until then another process has the state directory, and what it renews meanwhile is
    /// read again.
    pub fn run_when(inputs: Inputs, go: watch::Receiver<bool>, tasks: &TaskGroup) -> Self {
        let Inputs {
            state,
            registration,
            identity,
            publisher,
            world,
            health,
            version,
            metrics,
        } = inputs;
        let (status_tx, status) = watch::channel(ControlStatus::default());
        let (registration_tx, registration) = watch::channel(Arc::new(registration));
        let certificates = Certificates {
            state: Arc::clone(&state),
            live: Arc::clone(&identity),
            world: world.clone(),
            registration: registration_tx,
            status: status_tx.clone(),
        };
        let stream = Stream {
            snapshot: Snapshot::clone(&publisher.load()),
            state: Arc::clone(&state),
            identity,
            publisher,
            health,
            registration: registration.clone(),
            status: status_tx.clone(),
            version,
            metrics,
        };
        let (writers, streams) = (tasks.child("state writers"), tasks.child("control stream"));
        let (gate, waited) = (go.clone(), !*go.borrow());
        writers.spawn_until_stopped("certificate renewal", async move {
            if opened(gate).await {
                if waited {
                    certificates.read_again();
                }
                certificates.run().await;
            }
        });
        let gate = go.clone();
        streams.spawn_until_stopped("control stream", async move {
            if opened(gate).await {
                stream.run().await;
            }
        });
        let stop = writers.token();
        writers.spawn("snapshot file", async move {
            let stopped = stop.clone();
            if stop.run_until_cancelled(opened(go)).await == Some(true) {
                persist(state, world, status_tx, async move { stopped.cancelled().await }).await;
            }
        });
        Self {
            status,
            registration,
            writers,
            stream: streams,
        }
    }

    /// Writes nothing more to the state directory: it is another process's from now on. The stream stays, so that
    /// discovery never sees this node without one.
    pub async fn retire(&self) {
        self.writers.stop();
        self.writers.drain(RETIRE_MAX).await;
    }

    /// Ends the stream.
    pub fn close_stream(&self) {
        self.stream.stop();
    }

    /// How the node stands with discovery.
    pub fn status(&self) -> ControlStatus {
        self.status.borrow().clone()
    }

    /// Wakes on each change of the status.
    pub fn watch_status(&self) -> watch::Receiver<ControlStatus> {
        self.status.clone()
    }

    /// The registration as of the last renewal.
    pub fn registration(&self) -> Arc<Registration> {
        Arc::clone(&self.registration.borrow())
    }

    /// Wakes on each change of the registration.
    pub fn watch_registration(&self) -> watch::Receiver<Arc<Registration>> {
        self.registration.clone()
    }
}

/// Waits for the gate; false if it never opens.
async fn opened(mut go: watch::Receiver<bool>) -> bool {
    go.wait_for(|go| *go).await.is_ok()
}

/// Writes the snapshot after changes, and what is left to write when the group stops.
async fn persist(
    state: Arc<State>,
    mut world: Reader<Snapshot>,
    status: watch::Sender<ControlStatus>,
    stop: impl Future<Output = ()>,
) {
    let mut stop = std::pin::pin!(stop);
    let (mut stopped, mut failed) = (false, false);
    let mut debounce = PERSIST_DEBOUNCE_MIN;
    while !stopped {
        tokio::select! {
            changed = world.changed() => stopped = changed.is_none(),
            () = tokio::time::sleep(PERSIST_RETRY), if failed => {}
            () = &mut stop => return,
        }
        if !stopped {
            tokio::select! {
                () = tokio::time::sleep(debounce) => {}
                () = &mut stop => stopped = true,
            }
        }
        let (snapshot, state) = (world.load(), Arc::clone(&state));
        let began = Instant::now();
        let saved = tokio::task::spawn_blocking(move || state.save_snapshot(&snapshot.encode())).await;
        debounce = (began.elapsed() * 8).clamp(PERSIST_DEBOUNCE_MIN, PERSIST_DEBOUNCE_MAX);
        let problem = saved.ok().and_then(Result::err).map(|error| {
            let text = "the snapshot is not stored, and a restart without discovery would serve an older one";
            Problem::new(error.problem().code, format!("{text}: {error}"))
        });
        if let Some(problem) = &problem
            && !failed
        {
            tracing::warn!("{problem}");
        }
        failed = problem.is_some();
        status.send_if_modified(|status| {
            let changed = status.snapshot_problem != problem;
            status.snapshot_problem = problem;
            changed
        });
    }
}
