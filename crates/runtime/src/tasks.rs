use std::{future::Future, time::Duration};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{
    future::FutureExt as _,
    sync::{CancellationToken, WaitForCancellationFuture},
    task::TaskTracker,
};

/// The tasks of one owner: each has a name, all are told to stop together and are waited for.
///
/// Cheap to clone; clones share the group. Spawn nothing outside a group.
#[derive(Debug, Clone)]
pub struct TaskGroup {
    name: &'static str,
    tracker: TaskTracker,
    stop: CancellationToken,
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every task ended by itself.
    Complete,
    /// So many were still running at the deadline.
    Cut(usize),
}

impl TaskGroup {
    /// An empty group.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// A group that stops when this one does, and can be stopped alone; it is waited for by its own drain.
    pub fn child(&self, name: &'static str) -> Self {
        Self {
            name,
            tracker: TaskTracker::new(),
            stop: self.stop.child_token(),
        }
    }

    /// Starts a task. It ends by itself when it sees [`Self::stopped`]; `name` is for diagnosis.
    #[allow(clippy::disallowed_methods, reason = "the one place where tasks start")]
    pub fn spawn<F>(&self, name: &'static str, task: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        tracing::trace!(group = self.name, task = name, "task starts");
        self.tracker.spawn(task)
    }

    /// Starts a task that is cut where it waits when the group stops.
    pub fn spawn_until_stopped<F>(
        &self,
        name: &'static str,
        task: F,
    ) -> tokio::task::JoinHandle<Option<F::Output>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.spawn(name, until_stopped(task, self.stop.clone()))
    }

    /// Tells every task of this group and its children to stop. Idempotent.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Waits until the group was told to stop. Cancel-safe.
    pub fn stopped(&self) -> WaitForCancellationFuture<'_> {
        self.stop.cancelled()
    }

    /// True once the group was told to stop.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// The stop token, for code that takes one.
    pub fn token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Tasks running now.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// True if no task is running.
    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Waits for all tasks to end, at most `deadline`. Tell them to stop first.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        self.tracker.close();
        let waited = tokio::time::timeout(deadline, self.tracker.wait()).await;
        if waited.is_ok() {
            return Drained::Complete;
        }
        let left = self.tracker.len();
        tracing::warn!(
            group = self.name,
            left,
            "tasks were still running at the deadline of the drain"
        );
        Drained::Cut(left)
    }
}

/// Not an async block: each of those would hold the task twice, before and after its first poll.
fn until_stopped<F: Future>(task: F, stop: CancellationToken) -> impl Future<Output = Option<F::Output>> {
    task.with_cancellation_token_owned(stop)
}

/// Waits for SIGTERM or SIGINT and returns its name.
///
/// # Errors
/// When the handlers cannot be installed.
pub async fn stop_signal() -> std::io::Result<&'static str> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => Ok("SIGTERM"),
        _ = int.recv() => Ok("SIGINT"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn being_stoppable_costs_a_task_little() {
        let task = async {
            let large = [0_u8; 1000];
            std::future::pending::<()>().await;
            large
        };
        let bare = size_of_val(&task);
        let stoppable = size_of_val(&until_stopped(task, CancellationToken::new()));
        assert!(stoppable <= bare + 160, "{bare} {stoppable}");
    }

    #[tokio::test]
    async fn stop_reaches_children_and_drain_waits() {
        let group = TaskGroup::new("parent");
        let child = group.child("child");
        let inner = child.clone();
        child.spawn("waits", async move { inner.stopped().await });
        let cut = child.spawn_until_stopped("cut", std::future::pending::<()>());
        assert_eq!(child.drain(Duration::from_millis(5)).await, Drained::Cut(2));
        group.stop();
        assert_eq!(child.drain(Duration::from_secs(5)).await, Drained::Complete);
        assert_eq!(cut.await.unwrap(), None);
    }
}
