use crate::{Event, StoreError};
use futures_util::{Stream, StreamExt as _};
use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};
use tokio::sync::watch;

/// Most events that a watcher takes over at once. It holds no more than this beside the shared window.
const BATCH_MAX: usize = 64;

/// The last events, shared by all watchers: each has only a cursor into it, so a slow watcher costs nothing and is
/// told so ([`StoreError::TooOld`]) once the window has moved past it.
#[derive(Debug)]
pub(crate) struct Window {
    kept: Mutex<Kept>,
    head: AtomicU64,
    events_max: usize,
    bytes_max: usize,
    /// Taken along by each watcher; its sender lives with the writer, so that watchers end with it.
    heads: watch::Receiver<u64>,
}

#[derive(Debug)]
struct Kept {
    events: VecDeque<Event>,
    bytes: usize,
    /// Every event after this revision is in `events`.
    floor: u64,
}

impl Window {
    /// A window without a past, at the revision that the store was opened at.
    pub(crate) fn new(revision: u64, events_max: usize, bytes_max: usize) -> (Arc<Self>, watch::Sender<u64>) {
        let (head_tx, heads) = watch::channel(revision);
        let kept = Mutex::new(Kept {
            events: VecDeque::new(),
            bytes: 0,
            floor: revision,
        });
        let window = Self {
            kept,
            head: AtomicU64::new(revision),
            events_max: events_max.max(1),
            bytes_max,
            heads,
        };
        (Arc::new(window), head_tx)
    }

    /// Revision of the last event.
    pub(crate) fn head(&self) -> u64 {
        self.head.load(Ordering::Acquire)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing in here panics half way; a poisoned lock still guards a whole value.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the events of a commit, in order. The caller wakes the watchers after it.
    pub(crate) fn append(&self, events: impl IntoIterator<Item = Event>) {
        let mut kept = self.kept();
        for event in events {
            self.head.store(event.resource_version, Ordering::Release);
            kept.bytes += size(&event);
            kept.events.push_back(event);
        }
        while kept.events.len() > self.events_max || (kept.bytes > self.bytes_max && kept.events.len() > 1) {
            let Some(oldest) = kept.events.pop_front() else {
                break;
            };
            kept.bytes -= size(&oldest);
            kept.floor = oldest.resource_version;
        }
    }

    fn after(&self, cursor: u64) -> Result<VecDeque<Event>, StoreError> {
        let kept = self.kept();
        if cursor < kept.floor {
            return Err(StoreError::TooOld);
        }
        let start = kept
            .events
            .partition_point(|event| event.resource_version <= cursor);
        Ok(kept.events.iter().skip(start).take(BATCH_MAX).cloned().collect())
    }

    /// Follows everything after `since`.
    pub(crate) fn watch(self: &Arc<Self>, since: u64) -> Result<Watch, StoreError> {
        if since < self.kept().floor {
            return Err(StoreError::TooOld);
        }
        let follower = Follower {
            heads: self.heads.clone(),
            window: Arc::clone(self),
            cursor: since,
            batch: VecDeque::new(),
            ended: false,
        };
        let events = futures_util::stream::unfold(follower, Follower::next);
        Ok(Watch(Box::pin(events.fuse())))
    }
}

/// Roughly what an event costs in memory.
fn size(event: &Event) -> usize {
    let stored = event.change.stored();
    stored.value.len() + stored.key.name.len() + stored.key.namespace.len() + 256
}

struct Follower {
    window: Arc<Window>,
    heads: watch::Receiver<u64>,
    cursor: u64,
    batch: VecDeque<Event>,
    ended: bool,
}

impl Follower {
    async fn next(mut self) -> Option<(Result<Event, StoreError>, Self)> {
        loop {
            if let Some(event) = self.batch.pop_front() {
                self.cursor = event.resource_version;
                return Some((Ok(event), self));
            }
            if self.ended {
                return None;
            }
            // Marked as seen before the window is read: what comes in between wakes us again.
            self.heads.borrow_and_update();
            match self.window.after(self.cursor) {
                Err(error) => {
                    self.ended = true;
                    return Some((Err(error), self));
                }
                Ok(batch) if !batch.is_empty() => self.batch = batch,
                Ok(_) => self.heads.changed().await.ok()?,
            }
        }
    }
}

/// The writes after a revision, in order, each once. Ends after [`StoreError::TooOld`], and when the store is closed.
///
/// Cancel-safe: an event is lost only with the stream itself.
pub struct Watch(Pin<Box<dyn Stream<Item = Result<Event, StoreError>> + Send>>);

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

impl Stream for Watch {
    type Item = Result<Event, StoreError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(context)
    }
}
