use crate::Settings;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tombolo_capture::Capture;
use tombolo_destination::{Candidate, Destination};
use tombolo_identity::LiveIdentity;
use tombolo_runtime::{Reader, TaskGroup};
use tombolo_snapshot::{Own, Snapshot};
use tombolo_telemetry::{AccessLog, Direction, Metrics};
use tombolo_tunnel::OpenError;
use tombolo_types::{AddressPlan, SpiffeId};

/// What the data path works with.
#[derive(Debug)]
pub struct Inputs {
    /// The world, as discovery sends it.
    pub world: Reader<Snapshot>,
    /// This host's certificate and the trust bundles.
    pub identity: Arc<LiveIdentity>,
    /// Who this host is.
    pub own: Own,
    /// The mesh's virtual addresses.
    pub plan: AddressPlan,
    /// What applications do.
    pub capture: Capture,
    /// Where is counted.
    pub metrics: Arc<Metrics>,
    /// Where is told.
    pub access_log: AccessLog,
    /// What the host has set.
    pub settings: Settings,
}

/// Why the data path could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The HBONE port cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// An open connection, for `status` and diagnosis.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// Which way.
    pub direction: Direction,
    /// The caller's address: the application's, or the peer host's.
    pub source: SocketAddr,
    /// What was dialled: the virtual address, or the own address and port.
    pub destination: SocketAddr,
    /// Host name of the service; empty if none.
    pub service: Arc<str>,
    /// Who is at the other end; none for plain TCP.
    pub peer: Option<SpiffeId>,
    /// Bytes from this host to the peer.
    pub bytes_out: u64,
    /// Bytes from the peer to this host.
    pub bytes_in: u64,
    /// How long it has been open.
    pub age: Duration,
}

/// What one endpoint said to a trial connection.
#[derive(Debug, Clone)]
pub struct ProbeResult {
    /// Which.
    pub candidate: Candidate,
    /// How far it came.
    pub outcome: Result<(), OpenError>,
    /// Who answered, if TLS was made.
    pub peer: Option<SpiffeId>,
}

/// The running data path.
#[derive(Debug)]
pub struct Dataplane {}

impl Dataplane {
    /// Opens the listeners and starts.
    ///
    /// # Errors
    /// When a listener cannot be opened.
    pub async fn start(inputs: Inputs, tasks: &TaskGroup) -> Result<Self, StartError> {
        let _ = (inputs, tasks);
        todo!()
    }

    /// Open connections of both directions.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        todo!()
    }

    /// Takes nothing new, lets open connections end until the deadline of the settings, then cuts them.
    pub async fn drain(&self) {
        todo!()
    }

    /// Tries TLS and CONNECT to each endpoint of a destination; the local application there is connected to and left
    /// at once.
    pub async fn probe(&self, destination: &Destination) -> Vec<ProbeResult> {
        let _ = destination;
        todo!()
    }
}
