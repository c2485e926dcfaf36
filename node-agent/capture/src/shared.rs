use crate::{
    CaptureConfig, addresses,
    device::Tun,
    listener::{CaptureListener, abort},
};
use std::{
    collections::HashMap,
    net::TcpStream,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};
use tokio::sync::oneshot;
use tombolo_flow::{FlowId, FlowTable, Refusal, Sources};

/// What the packet loop and the owners of captured things have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) tun: Tun,
    pub(crate) config: CaptureConfig,
    pub(crate) listeners: Vec<CaptureListener>,
    pub(crate) counters: Counters,
    /// Held for a table operation, never over a system call on the device.
    state: Mutex<State>,
}

/// The table, and who waits for a socket.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) table: FlowTable,
    pub(crate) waiters: HashMap<FlowId, oneshot::Sender<TcpStream>>,
    pub(crate) sources_read: Instant,
}

/// Counted by whoever does it.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) read_packets: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_packets: AtomicU64,
    pub(crate) write_errors: AtomicU64,
    pub(crate) events_dropped: AtomicU64,
    pub(crate) accept_errors: AtomicU64,
}

impl Shared {
    pub(crate) fn new(
        tun: Tun,
        config: CaptureConfig,
        listeners: Vec<CaptureListener>,
        table: FlowTable,
    ) -> Self {
        let state = State {
            table,
            waiters: HashMap::new(),
            sources_read: Instant::now(),
        };
        Self {
            tun,
            config,
            listeners,
            counters: Counters::default(),
            state: Mutex::new(state),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A panic while it was held is a defect of the table; its worst outcome is a wrong entry.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a frame; a failure is counted, the sender's TCP repeats.
    pub(crate) fn write(&self, frame: &[u8]) {
        match self.tun.write(frame) {
            Ok(()) => self.counters.written_packets.fetch_add(1, Relaxed),
            Err(error) => {
                tracing::trace!(%error, "a frame was not written");
                self.counters.write_errors.fetch_add(1, Relaxed)
            }
        };
    }

    /// Reads the addresses of this host again. True if the filter has changed.
    pub(crate) fn refresh_sources(&self) -> bool {
        let addresses = match addresses::host_addresses() {
            Ok(addresses) => addresses,
            Err(error) => {
                tracing::warn!(%error, "the addresses of this host cannot be read");
                return false;
            }
        };
        let sources = Sources::new(addresses, self.config.allowed_sources.clone());
        let mut state = self.state();
        state.sources_read = Instant::now();
        let changed = *state.table.sources() != sources;
        if changed {
            state.table.set_sources(sources);
        }
        changed
    }

    /// Refuses a held connection; nothing happens if it is not held any more.
    pub(crate) fn refuse(&self, id: FlowId, with: Refusal) {
        let frame = self.state().table.refuse(id, with);
        if let Some(frame) = frame {
            self.write(&frame);
        }
    }

    /// Gives a socket to whoever waits for it.
    pub(crate) fn hand_over(&self, id: FlowId, stream: TcpStream) {
        let waiter = self.state().waiters.remove(&id);
        let unwanted = match waiter {
            Some(waiter) => waiter.send(stream).err(),
            None => Some(stream),
        };
        if let Some(stream) = unwanted {
            abort(stream);
        }
    }
}
