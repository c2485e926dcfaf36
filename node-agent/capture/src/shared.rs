use crate::{
    CaptureConfig, addresses,
    device::Tun,
    listener::{CaptureListener, abort},
    masquerade::Masquerade,
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
use tokio::sync::{oneshot, watch};
use tombolo_flow::{FlowId, FlowTable, HeldFlow, Refusal, Sources};

/// What the packet loop and the owners of captured things have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) tun: Tun,
    pub(crate) config: CaptureConfig,
    pub(crate) listeners: Vec<CaptureListener>,
    pub(crate) counters: Counters,
    pub(crate) masquerade: Masquerade,
    /// Held for a table operation, never over a system call on the device.
    state: Mutex<State>,
    /// Wakes for each change of [`State::phase`].
    pub(crate) phase: watch::Sender<Phase>,
    /// True while the packet loop has stopped because of the phase.
    pub(crate) stopped: watch::Sender<bool>,
}

/// Whether this process is the one that reads the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It is.
    Running,
    /// New connections are held without being told; those in between are let through.
    Quiet,
    /// Besides, none is delivered any more.
    Settling,
    /// Nothing is read.
    Frozen,
    /// Another process is.
    Gone,
}

impl Phase {
    /// True while nobody may deliver a connection, and nobody knows yet who will.
    fn is_undecided(self) -> bool {
        matches!(self, Self::Settling | Self::Frozen)
    }
}

/// The table, and who waits for a socket.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) table: FlowTable,
    pub(crate) waiters: HashMap<FlowId, oneshot::Sender<TcpStream>>,
    pub(crate) sources_read: Instant,
    pub(crate) phase: Phase,
    /// Held since the packet loop has gone quiet.
    pub(crate) untold: Vec<HeldFlow>,
    /// Refused while the packet loop is frozen.
    pub(crate) refused: Vec<(FlowId, Refusal)>,
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
    /// Connections of others under an address of this host, refused.
    pub(crate) masqueraded: AtomicU64,
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
            phase: Phase::Running,
            untold: Vec::new(),
            refused: Vec::new(),
        };
        let opted_in = !config.allowed_sources.is_empty() || !config.allowed_links.is_empty();
        Self {
            masquerade: Masquerade::new(tun.name(), opted_in),
            tun,
            config,
            listeners,
            counters: Counters::default(),
            state: Mutex::new(state),
            phase: watch::Sender::new(Phase::Running),
            stopped: watch::Sender::new(false),
        }
    }

    /// Changes the phase; what is done under the lock sees either the old or the new one.
    pub(crate) fn enter(&self, phase: Phase) {
        self.state().phase = phase;
        self.phase.send_replace(phase);
    }

    /// Waits until it is known who delivers connections; false if another process does. Cancel-safe.
    pub(crate) async fn decided(&self) -> bool {
        let mut phase = self.phase.subscribe();
        let decided = phase.wait_for(|phase| !phase.is_undecided()).await;
        decided.is_ok_and(|phase| *phase != Phase::Gone)
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
        let mut prefixes = self.config.allowed_sources.clone();
        match addresses::link_prefixes(&self.config.allowed_links) {
            Ok(of_links) => prefixes.extend(of_links),
            Err(error) => tracing::warn!(%error, "the addresses of the bridges cannot be read"),
        }
        let sources = Sources::new(addresses, prefixes);
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
        let frame = {
            let mut state = self.state();
            match state.phase {
                Phase::Running | Phase::Quiet | Phase::Settling => state.table.refuse(id, with),
                Phase::Frozen => {
                    state.refused.push((id, with));
                    None
                }
                // The other process decides by itself.
                Phase::Gone => None,
            }
        };
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
