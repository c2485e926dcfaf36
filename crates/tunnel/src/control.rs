use crate::TlsError;
use futures_util::task::AtomicWaker;
use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Waker},
};
use tokio::time::Instant;

/// Close at once.
pub(crate) const CUT: u8 = 1;
/// Take no new streams, tell the peer so.
pub(crate) const DRAIN: u8 = 1 << 1;
/// A stream moves much data: larger windows.
pub(crate) const GROW: u8 = 1 << 2;
/// The driver has ended.
pub(crate) const CLOSED: u8 = 1 << 3;
/// It ended because the peer was silent.
pub(crate) const SILENT: u8 = 1 << 4;
/// It is there to be called: without streams it is not idle.
pub(crate) const HELD: u8 = 1 << 5;

/// What the streams of a connection, its driver and its owner tell each other.
#[derive(Debug)]
pub(crate) struct Control {
    flags: AtomicU8,
    streams: AtomicUsize,
    unanswered: AtomicUsize,
    driver: AtomicWaker,
    epoch: Instant,
    idle_since_ms: AtomicU64,
    tls_failure: OnceLock<TlsError>,
}

impl Control {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            flags: AtomicU8::new(0),
            streams: AtomicUsize::new(0),
            unanswered: AtomicUsize::new(0),
            driver: AtomicWaker::new(),
            epoch: Instant::now(),
            idle_since_ms: AtomicU64::new(0),
            tls_failure: OnceLock::new(),
        })
    }

    pub(crate) fn register(&self, cx: &Context<'_>) {
        self.driver.register(cx.waker());
    }

    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags.load(Ordering::Acquire) & flag != 0
    }

    /// Sets a flag and wakes the driver if it was not set.
    pub(crate) fn set(&self, flag: u8) {
        if self.flags.fetch_or(flag, Ordering::AcqRel) & flag == 0 {
            self.driver.take().as_ref().map(Waker::wake_by_ref);
        }
    }

    /// Notes why TLS failed; HTTP/2 keeps only a text of it.
    pub(crate) fn tls_failed(&self, error: TlsError) {
        // The first one is the cause.
        let _ = self.tls_failure.set(error);
    }

    pub(crate) fn tls_failure(&self) -> Option<&TlsError> {
        self.tls_failure.get()
    }

    pub(crate) fn streams(&self) -> usize {
        self.streams.load(Ordering::Acquire)
    }

    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::Acquire)
    }

    /// Takes a place if fewer than `max` streams are open.
    pub(crate) fn try_lease(self: &Arc<Self>, max: usize) -> Option<Lease> {
        self.streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |streams| {
                (streams < max).then_some(streams + 1)
            })
            .ok()?;
        Some(Lease(Arc::clone(self)))
    }

    /// Seconds without a stream; 0 while there is one.
    pub(crate) fn idle_seconds(&self) -> u64 {
        if self.streams() > 0 {
            return 0;
        }
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        now.saturating_sub(self.idle_since_ms.load(Ordering::Acquire)) / 1000
    }
}

/// The place of one stream in its connection.
#[derive(Debug)]
pub(crate) struct Lease(Arc<Control>);

impl Lease {
    pub(crate) fn control(&self) -> &Arc<Control> {
        &self.0
    }

    /// Counts a request until its answer: meanwhile a silent peer is noticed sooner.
    pub(crate) fn asks(&self) -> Unanswered {
        self.0.unanswered.fetch_add(1, Ordering::AcqRel);
        Unanswered(Arc::clone(&self.0))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let now = u64::try_from(self.0.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.idle_since_ms.store(now, Ordering::Release);
        // Whoever waits to end the connection with its last stream.
        if self.0.streams.fetch_sub(1, Ordering::AcqRel) == 1 && self.0.has(DRAIN) {
            self.0.driver.take().as_ref().map(Waker::wake_by_ref);
        }
    }
}

/// See [`Lease::asks`].
pub(crate) struct Unanswered(Arc<Control>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.unanswered.fetch_sub(1, Ordering::AcqRel);
    }
}
