//! Handing the packet loop to another process, and taking it back when that process does not come up.

use crate::{
    Capture, CaptureError, Captured, PendingFlow,
    shared::{Phase, Shared},
};
use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout};
use tombolo_flow::FlowTable;

/// So long connections that are being made may come through, while new ones are only held: most need a millisecond or
/// two, and each that comes through need not be begun anew.
const QUIET: Duration = Duration::from_millis(10);
/// Longest wait for connections between the delivered SYN and the socket: the kernel needs microseconds, a busy
/// machine's scheduler more.
const SETTLE_MAX: Duration = Duration::from_millis(100);
/// How often is looked meanwhile.
const LOOK: Duration = Duration::from_micros(500);
/// The packet loop stops after the turn it is in.
const STOP_MAX: Duration = Duration::from_secs(1);

/// What another process needs to go on.
#[derive(Debug)]
pub struct Frozen {
    /// The attached device.
    pub tun: OwnedFd,
    /// The listeners on mesh0's own addresses.
    pub listeners: Vec<FrozenListener>,
    /// The connections.
    pub table: Vec<u8>,
}

/// A listener that is handed over.
#[derive(Debug)]
pub struct FrozenListener(pub OwnedFd);

impl AsFd for FrozenListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The connections of a process that has handed over, as they were then.
#[derive(Debug)]
pub struct OpenFlows(FlowTable);

impl OpenFlows {
    /// Those that `keep` (application, destination) still wants, for a process that knows nothing of them.
    pub fn export(&self, keep: impl Fn(SocketAddr, SocketAddr) -> bool) -> Vec<u8> {
        self.0.export_open(std::time::Instant::now(), keep)
    }
}

impl Capture {
    /// Stops the packet loop between two packets and says what another process needs to go on. Until [`Self::resume`]
    /// or [`Self::give_away`] nothing is read, and whoever accepts a connection waits. New connections are not told of
    /// from the start of the call on.
    ///
    /// # Errors
    /// When descriptors cannot be duplicated, or the device is gone; everything goes on as before.
    pub async fn freeze(&self) -> Result<Frozen, CaptureError> {
        let shared = &self.shared;
        shared.enter(Phase::Quiet);
        sleep(QUIET).await;
        shared.enter(Phase::Settling);
        let end = Instant::now() + SETTLE_MAX;
        while shared.state().table.accepting() > 0 && Instant::now() < end {
            sleep(LOOK).await;
        }
        shared.enter(Phase::Frozen);
        let mut stopped = shared.stopped.subscribe();
        let frozen = match timeout(STOP_MAX, stopped.wait_for(|stopped| *stopped)).await {
            Ok(Ok(_)) => share(shared),
            Ok(Err(_)) | Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        };
        frozen.map_err(|error| {
            self.resume();
            CaptureError::Device(error)
        })
    }

    /// Goes on, as if nothing had been.
    pub fn resume(&self) {
        let (untold, refused) = {
            let mut state = self.shared.state();
            let state = &mut *state;
            state.phase = Phase::Running;
            (
                std::mem::take(&mut state.untold),
                std::mem::take(&mut state.refused),
            )
        };
        self.shared.phase.send_replace(Phase::Running);
        for (id, with) in refused {
            self.shared.refuse(id, with);
        }
        let Some(events) = self.events_tx.upgrade() else {
            return;
        };
        for held in untold {
            let flow = PendingFlow::new(&self.shared, held.id, held.source, held.destination);
            // Dropped, it is refused: there is room for all that may be held.
            let _ = events.try_send(Captured::Connect(flow));
        }
    }

    /// The other process goes on: this one touches the device no more, and lets go of it with the last answer that is
    /// under way.
    pub fn give_away(&self) -> OpenFlows {
        self.shared.enter(Phase::Gone);
        self.tasks.stop();
        let mut state = self.shared.state();
        let config = tombolo_flow::FlowConfig {
            plan: self.shared.config.plan,
            ipv4: false,
            ipv6: false,
            pending_max: 0,
            hold: Duration::ZERO,
            seed: 0,
        };
        let empty = FlowTable::new(config, std::time::Instant::now());
        OpenFlows(std::mem::replace(&mut state.table, empty))
    }
}

fn share(shared: &Arc<Shared>) -> io::Result<Frozen> {
    let listeners = shared
        .listeners
        .iter()
        .map(|listener| listener.share().map(FrozenListener));
    Ok(Frozen {
        tun: shared.tun.share()?,
        listeners: listeners.collect::<Result<_, _>>()?,
        table: shared.state().table.export(std::time::Instant::now()),
    })
}
