use arc_swap::{ArcSwap, Guard};
use std::sync::Arc;
use tokio::sync::watch;

/// Makes a value that one owner replaces and many read: by [`Reader::load`] per flow (no lock, no waiting), by
/// [`Reader::changed`] where a task must wake.
pub fn published<T>(initial: T) -> (Publisher<T>, Reader<T>) {
    let value = Arc::new(ArcSwap::from_pointee(initial));
    let (version_tx, version_rx) = watch::channel(0);
    (
        Publisher {
            value: Arc::clone(&value),
            version_tx,
        },
        Reader { value, version_rx },
    )
}

/// The owner's side. Not `Clone`: one owner per mutable thing.
#[derive(Debug)]
pub struct Publisher<T> {
    value: Arc<ArcSwap<T>>,
    version_tx: watch::Sender<u64>,
}

impl<T> Publisher<T> {
    /// Replaces the value, then wakes the readers.
    pub fn publish(&self, value: T) {
        self.publish_arc(Arc::new(value));
    }

    /// As [`Self::publish`], for a value that is shared already.
    pub fn publish_arc(&self, value: Arc<T>) {
        self.value.store(value);
        self.version_tx.send_modify(|version| *version += 1);
    }

    /// The present value.
    pub fn load(&self) -> Arc<T> {
        self.value.load_full()
    }
}

/// A reader's side; cheap to clone. Each clone sees each change once, and only the latest of several.
#[derive(Debug)]
pub struct Reader<T> {
    value: Arc<ArcSwap<T>>,
    version_rx: watch::Receiver<u64>,
}

impl<T> Clone for Reader<T> {
    fn clone(&self) -> Self {
        Self {
            value: Arc::clone(&self.value),
            version_rx: self.version_rx.clone(),
        }
    }
}

impl<T> Reader<T> {
    /// The present value, for keeping.
    pub fn load(&self) -> Arc<T> {
        self.value.load_full()
    }

    /// The present value, for a short look: must not be held over an await.
    pub fn peek(&self) -> Guard<Arc<T>> {
        self.value.load()
    }

    /// Waits for a value newer than the last one this reader was woken for; `None` when the owner is gone.
    ///
    /// Cancel-safe: a change is not lost, the next call returns at once.
    pub async fn changed(&mut self) -> Option<Arc<T>> {
        self.version_rx.changed().await.ok()?;
        Some(self.load())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn readers_wake_once_for_several_changes() {
        let (publisher, mut reader) = published(1);
        let mut late = reader.clone();
        publisher.publish(2);
        publisher.publish(3);
        assert_eq!(reader.changed().await.as_deref(), Some(&3));
        drop(publisher);
        assert_eq!(reader.changed().await, None);
        assert_eq!(
            late.changed().await.as_deref(),
            Some(&3),
            "a clone has its own mark"
        );
        assert_eq!(*late.peek().as_ref(), 3);
    }
}
