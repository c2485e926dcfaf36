//! What is remembered of a connection, and of a member across its connections.

use crate::{ConnId, ExportedGateway, ExportedService, Exports, ServiceName};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tombolo_types::TrustDomain;

/// A change that arrives in parts.
#[derive(Debug)]
pub(crate) struct Receiving {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) next_part: u32,
    pub(crate) bytes: usize,
    pub(crate) count: usize,
    pub(crate) services: Vec<ExportedService>,
    pub(crate) removed: Vec<ServiceName>,
    pub(crate) gateways: Option<Arc<[ExportedGateway]>>,
    pub(crate) mesh_domain: Option<Arc<str>>,
    pub(crate) refused: bool,
}

#[derive(Debug)]
pub(crate) struct Connection {
    /// The member that this side dialled.
    pub(crate) dialled: Option<Arc<str>>,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) exporter: [u8; 32],
    pub(crate) opened: Duration,
    pub(crate) heard: Duration,
    pub(crate) heartbeat_at: Duration,
    /// Who it is: set by a Hello whose proof fits.
    pub(crate) peer: Option<Arc<str>>,
    pub(crate) instance: u64,
    /// The peer's Start has come.
    pub(crate) started: bool,
    /// What the peer holds, or will when it has read what was sent.
    pub(crate) sent: Option<(u64, Exports)>,
    /// The state that the peer has not acknowledged yet: one at a time, later ones are merged meanwhile.
    pub(crate) outstanding: Option<u64>,
    pub(crate) full_at: Option<Duration>,
    pub(crate) receiving: Option<Receiving>,
    /// A full export was asked for: changes are passed over until it comes.
    pub(crate) resyncing: bool,
    /// The held exports are what the peer exports now.
    pub(crate) synced: bool,
    pub(crate) records_at: Duration,
    /// Digest of the membership that the peer said it holds.
    pub(crate) digest: Option<u64>,
    /// Forged records that came over it.
    pub(crate) forged: usize,
}

/// What is held of a member's exports.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) epoch: u64,
    pub(crate) instance: u64,
    pub(crate) seq: u64,
    pub(crate) exports: Exports,
    /// Something of it was refused: a wider grant asks for everything again.
    pub(crate) refused: bool,
}

impl Held {
    /// What was refused may be taken now: the next session begins with everything.
    pub(crate) fn start_over(&mut self) {
        if self.refused {
            self.seq = 0;
        }
    }
}

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) active: Option<ConnId>,
    pub(crate) heard: Duration,
    pub(crate) stale: bool,
    /// Since when the present session is good.
    pub(crate) good_since: Option<Duration>,
    /// How long it must be good before `stale` ends.
    pub(crate) hold: Duration,
    pub(crate) cleared_at: Option<Duration>,
    pub(crate) dialling: Option<Duration>,
    pub(crate) next_dial: Duration,
    pub(crate) failures: u32,
    /// Its session is to move to a new connection: that of before shows an old certificate of this side.
    pub(crate) renewing: bool,
    /// Version of its program, as its last Hello said.
    pub(crate) version: Arc<str>,
    /// Names of its trust domain that it believes itself, as its last Hello said, the one that it makes certificates
    /// for first.
    pub(crate) names: Vec<TrustDomain>,
    /// Names that its record gave it once, and gives it no more.
    pub(crate) former: BTreeSet<TrustDomain>,
    /// Why it ended the last session.
    pub(crate) said: String,
    /// Highest epoch, and the instance that had it.
    pub(crate) seen: Option<(u64, u64)>,
    pub(crate) held: Held,
}

impl Peer {
    pub(crate) fn new(next_dial: Duration) -> Self {
        Self {
            active: None,
            heard: Duration::ZERO,
            stale: true,
            good_since: None,
            hold: Duration::ZERO,
            cleared_at: None,
            dialling: None,
            next_dial,
            failures: 0,
            renewing: false,
            version: "".into(),
            names: Vec::new(),
            former: BTreeSet::new(),
            said: String::new(),
            seen: None,
            held: Held::default(),
        }
    }
}
