use crate::{
    CaptureError, Captured, Frozen, FrozenListener, addresses,
    device::Tun,
    listener::{self, CaptureListener},
    pump::Pump,
    shared::Shared,
};
use ipnet::IpNet;
use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tombolo_flow::{FlowConfig, FlowTable};
use tombolo_runtime::TaskGroup;
use tombolo_types::AddressPlan;

/// Events that wait beside held connections: DNS queries and pings. One more is dropped and counted; a resolver asks
/// again.
const DATAGRAMS_MAX: usize = 1024;

/// What is captured, and within which limits.
#[derive(Debug, Clone)]
pub struct CaptureConfig {
    /// VIP prefixes and mesh0's own addresses.
    pub plan: AddressPlan,
    /// IPv4 is offered.
    pub ipv4: bool,
    /// IPv6 is offered.
    pub ipv6: bool,
    /// Most connections held at once; one more is refused by RST. 4,096 cost about a megabyte.
    pub pending_max: usize,
    /// Longest hold of a connection, then RST. 10 s: applications rarely wait longer, and the kernel has sent the SYN
    /// four times by then.
    pub hold: Duration,
    /// Prefixes whose packets are taken beside those from the host's own addresses: bridges that were opted in.
    pub allowed_sources: Vec<IpNet>,
    /// Links whose prefixes are taken likewise, as the links have them at the time; those that are not there count for
    /// nothing.
    pub allowed_links: Vec<String>,
}

impl CaptureConfig {
    /// The ordinary limits for a plan, both families, no bridges.
    pub fn new(plan: AddressPlan) -> Self {
        Self {
            plan,
            ipv4: true,
            ipv6: true,
            pending_max: 4096,
            hold: Duration::from_secs(10),
            allowed_sources: Vec::new(),
            allowed_links: Vec::new(),
        }
    }
}

/// Counters and gauges of the packet loop.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CaptureStats {
    /// Frames read from the device; a super-segment is one.
    pub read_packets: u64,
    /// Their bytes, headers included.
    pub read_bytes: u64,
    /// Frames written to the device.
    pub written_packets: u64,
    /// Frames that the kernel did not take.
    pub write_errors: u64,
    /// Events that nobody took in time.
    pub events_dropped: u64,
    /// Failed accepts: mostly no descriptor left.
    pub accept_errors: u64,
    /// Connections in the table now, closed ones that linger included.
    pub flows: usize,
    /// Connections held or waiting for their socket now.
    pub pending: usize,
    /// Packets that went no further, by reason.
    pub rejects: Vec<(&'static str, u64)>,
}

/// The running capture of a host.
#[derive(Debug)]
pub struct Capture {
    /// What was captured. `None` when the device is gone (mesh0 was removed): the agent has to start again.
    pub events: mpsc::Receiver<Captured>,
    pub(crate) shared: Arc<Shared>,
    /// For what is told after a resumption.
    pub(crate) events_tx: mpsc::WeakSender<Captured>,
    pub(crate) tasks: TaskGroup,
}

fn flow_config(config: &CaptureConfig) -> FlowConfig {
    FlowConfig {
        plan: config.plan,
        ipv4: config.ipv4,
        ipv6: config.ipv6,
        pending_max: config.pending_max,
        hold: config.hold,
        seed: RandomState::new().build_hasher().finish(),
    }
}

impl Capture {
    /// Takes over the TUN descriptor from netd and starts the packet loop in `tasks`. mesh0 must have its addresses,
    /// or get them later; nothing is captured before its routes are set.
    ///
    /// # Errors
    /// When the device or the listeners on mesh0's own addresses cannot be used.
    #[allow(clippy::unused_async, reason = "it needs the runtime that it starts tasks in")]
    pub async fn start(tun: OwnedFd, config: CaptureConfig, tasks: &TaskGroup) -> Result<Self, CaptureError> {
        Self::start_with(tun, &[], config, tasks).await
    }

    /// As [`Self::start`], with connections that other processes still serve: from [`crate::OpenFlows::export`]. A
    /// table that cannot be read is left out.
    ///
    /// # Errors
    /// As [`Self::start`].
    #[allow(clippy::unused_async, reason = "it needs the runtime that it starts tasks in")]
    pub async fn start_with(
        tun: OwnedFd,
        known: &[Vec<u8>],
        config: CaptureConfig,
        tasks: &TaskGroup,
    ) -> Result<Self, CaptureError> {
        let tun = Tun::attach(tun).map_err(CaptureError::Device)?;
        let listeners = listener::bind_all(&config.plan, tun.name(), config.ipv4, config.ipv6)?;
        let mut table = FlowTable::new(flow_config(&config), Instant::now());
        for bytes in known {
            if let Err(error) = table.add(bytes, Instant::now()) {
                tracing::warn!(%error, "connections of another process are lost");
            }
        }
        Ok(Self::run(Shared::new(tun, config, listeners, table), tasks))
    }

    /// Goes on where another process has stopped: with its device, its listeners and its connections. Those that it
    /// held are events again, as if their SYN had just been read.
    ///
    /// # Errors
    /// When the device, a listener or the table cannot be used.
    #[allow(clippy::unused_async, reason = "it needs the runtime that it starts tasks in")]
    pub async fn adopt(
        frozen: Frozen,
        config: CaptureConfig,
        tasks: &TaskGroup,
    ) -> Result<Self, CaptureError> {
        let tun = Tun::attach(frozen.tun).map_err(CaptureError::Device)?;
        let mut listeners = Vec::new();
        for FrozenListener(socket) in frozen.listeners {
            listeners.extend(CaptureListener::adopt(socket).map_err(CaptureError::Device)?);
        }
        let table = FlowTable::import(flow_config(&config), &frozen.table, Instant::now())?;
        Ok(Self::run(Shared::new(tun, config, listeners, table), tasks))
    }

    fn run(shared: Shared, tasks: &TaskGroup) -> Self {
        let (events_tx, events) = mpsc::channel(shared.config.pending_max + DATAGRAMS_MAX);
        let shared = Arc::new(shared);
        let tasks = tasks.child("capture");
        shared.refresh_sources();
        addresses::watch(&shared, &tasks);
        let pump = Pump::new(Arc::clone(&shared), events_tx.clone());
        let held = shared.state().table.held();
        pump.tell(held);
        tasks.spawn_until_stopped("capture", pump.run());
        Self {
            events,
            shared,
            events_tx: events_tx.downgrade(),
            tasks,
        }
    }

    /// Says which families are offered from now on; open connections of the other run on.
    pub fn set_families(&self, ipv4: bool, ipv6: bool) {
        self.shared.state().table.set_families(ipv4, ipv6);
    }

    /// Counters and gauges.
    pub fn stats(&self) -> CaptureStats {
        self.monitor().stats()
    }

    /// A handle that reads the counters, for the owner of metrics.
    pub fn monitor(&self) -> CaptureMonitor {
        CaptureMonitor {
            shared: Arc::clone(&self.shared),
        }
    }
}

/// Reads the counters of a running capture; cheap to clone. It keeps the device attached.
#[derive(Debug, Clone)]
pub struct CaptureMonitor {
    shared: Arc<Shared>,
}

impl CaptureMonitor {
    /// Counters and gauges.
    pub fn stats(&self) -> CaptureStats {
        let counters = &self.shared.counters;
        let state = self.shared.state();
        CaptureStats {
            read_packets: counters.read_packets.load(Relaxed),
            read_bytes: counters.read_bytes.load(Relaxed),
            written_packets: counters.written_packets.load(Relaxed),
            write_errors: counters.write_errors.load(Relaxed),
            events_dropped: counters.events_dropped.load(Relaxed),
            accept_errors: counters.accept_errors.load(Relaxed),
            flows: state.table.len(),
            pending: state.table.pending(),
            rejects: state
                .table
                .rejects()
                .map(|(reject, count)| (reject.reason(), count))
                .chain([("masqueraded", counters.masqueraded.load(Relaxed))])
                .collect(),
        }
    }
}
