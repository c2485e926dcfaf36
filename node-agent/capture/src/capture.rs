use crate::{CaptureError, Captured};
use ipnet::IpNet;
use std::{os::fd::OwnedFd, time::Duration};
use tokio::sync::mpsc;
use tombolo_runtime::TaskGroup;
use tombolo_types::AddressPlan;

/// What is captured, and within which limits.
#[derive(Debug, Clone)]
pub struct CaptureConfig {
    /// VIP prefixes and mesh0's own addresses.
    pub plan: AddressPlan,
    /// Offer IPv4.
    pub ipv4: bool,
    /// Offer IPv6.
    pub ipv6: bool,
    /// Most held connections at once (4,096).
    pub pending_max: usize,
    /// Longest hold of a connection (10 s).
    pub hold: Duration,
    /// Prefixes beside the host's own addresses whose packets are taken: bridges opted in.
    pub allowed_sources: Vec<IpNet>,
}

/// Counters of the capture loop.
#[derive(Debug, Clone, Default)]
pub struct CaptureStats {}

/// The running capture.
#[derive(Debug)]
pub struct Capture {
    /// What was captured. Ends when the device is gone.
    pub events: mpsc::Receiver<Captured>,
}

impl Capture {
    /// Starts.
    ///
    /// # Errors
    /// When the device or the listeners cannot be used.
    pub async fn start(tun: OwnedFd, config: CaptureConfig, tasks: &TaskGroup) -> Result<Self, CaptureError> {
        let _ = (tun, config, tasks);
        todo!()
    }

    /// Counters.
    pub fn stats(&self) -> CaptureStats {
        todo!()
    }
}
