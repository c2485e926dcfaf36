use crate::{
    Action, ConnId, Crypto, Event, Exports, MemberKey, Now, Own, Record, Refusal, Saved, ServiceName, World,
    connection::{Connection, Peer},
    limits,
    membership::{Member, Membership},
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tombolo_proto::tombolo::federation::v1 as pb;
use tombolo_types::{Code, TrustDomain};

/// An admission that waits for the first contact of the joining cluster.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) record: Record,
    pub(crate) signed: pb::Signed,
    pub(crate) invite_id: [u8; 16],
    pub(crate) expires_unix_ms: i64,
}

/// A member as `tombolo cluster list` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// The record that holds, and what follows from it.
    pub member: Member,
    /// A session is up.
    pub connected: bool,
    /// It said last that it holds exactly the membership that is held here, roots of members among it.
    pub in_step: bool,
    /// Nothing was heard of it for a while.
    pub stale: bool,
    /// State of its exports that is held.
    pub seq: u64,
    /// Services that it exports and that were taken.
    pub services: usize,
    /// It exports something that was refused.
    pub refused: bool,
    /// Names of its trust domain that it believes itself, as it said last, the one that it makes certificates for first.
    pub believes: Vec<TrustDomain>,
    /// Version of its program as it said last; empty: it has not been heard since the start.
    pub version: Arc<str>,
    /// Why it ended the last session, in its own words; empty: it did not, or a session is up.
    pub said: String,
}

/// A cluster that was admitted and has not come yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joining {
    /// What it will be.
    pub record: Record,
    /// Unix milliseconds: when it is forgotten.
    pub expires_unix_ms: i64,
}

/// One discovery's part in a set of clusters. See the crate's page for how a shell drives it.
#[derive(Debug)]
pub struct Federation<C> {
    pub(crate) own: Own,
    pub(crate) crypto: C,
    pub(crate) epoch: u64,
    pub(crate) instance: u64,
    pub(crate) membership: Membership,
    pub(crate) profile_version: u64,
    pub(crate) admissions: BTreeMap<Arc<str>, Admission>,
    pub(crate) wanted: Exports,
    pub(crate) exports: Exports,
    /// What of `wanted` is not in `exports`, and why.
    pub(crate) refused: Arc<BTreeMap<ServiceName, Refusal>>,
    pub(crate) seq: u64,
    pub(crate) connections: BTreeMap<ConnId, Connection>,
    pub(crate) peers: BTreeMap<Arc<str>, Peer>,
    pub(crate) world: Arc<World>,
    pub(crate) changed: BTreeSet<Arc<str>>,
    pub(crate) out: Vec<Action>,
    pub(crate) audited: BTreeMap<(Arc<str>, Code), Duration>,
    pub(crate) raised_at: Option<Duration>,
    pub(crate) admissions_checked: Duration,
    pub(crate) random: u64,
}

impl<C: Crypto> Federation<C> {
    /// Starts from what the store holds; from nothing, the cluster founds a set of its own. `seed` is drawn at each
    /// start and must differ from that of every earlier one.
    pub fn start(own: Own, crypto: C, saved: &Saved, seed: u64, now: Now) -> (Self, Vec<Action>) {
        let stored = saved
            .get("self")
            .and_then(|value| pb::StoredSelf::decode(value.as_slice()).ok())
            .unwrap_or_default();
        let founder_key = MemberKey::try_from(stored.founder_key.as_slice());
        let (founder, founder_key) = match founder_key {
            Ok(key) if !stored.founder.is_empty() => (Arc::from(stored.founder), key),
            _ => (own.cluster.clone(), crypto.public_key()),
        };
        let mut core = Self {
            own,
            crypto,
            epoch: stored.epoch.saturating_add(1),
            instance: seed,
            membership: Membership::new(founder, founder_key),
            profile_version: stored.profile_version,
            admissions: BTreeMap::new(),
            wanted: Exports::default(),
            exports: Exports::default(),
            refused: Arc::default(),
            seq: 1,
            connections: BTreeMap::new(),
            peers: BTreeMap::new(),
            world: Arc::default(),
            changed: BTreeSet::new(),
            out: Vec::new(),
            audited: BTreeMap::new(),
            raised_at: None,
            admissions_checked: now.monotonic,
            random: seed,
        };
        let mut writes = vec![core.self_write()];
        core.load(saved, &mut writes, now);
        if core.membership.view().is_empty() && core.is_founder() {
            let record = core.founding_record();
            core.take_own(record, &mut writes);
        }
        core.out.push(Action::Persist(writes));
        core.follow(&BTreeMap::new(), &BTreeMap::new(), Vec::new(), now);
        core.settle_names(now);
        core.load_imports(saved);
        core.refresh_profile(now);
        let actions = core.finish(now);
        (core, actions)
    }

    /// Takes what happened and says what to do. Never fails and never panics, whatever a peer sent.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Action> {
        match event {
            Event::Connected {
                conn,
                dialled,
                trust_domain,
                exporter,
            } => self.connected(conn, dialled, trust_domain, exporter, now),
            Event::DialFailed { cluster } => self.dial_failed(&cluster, now),
            Event::Received { conn, message } => self.received(conn, message, now),
            Event::Closed { conn } => self.closed(conn, now),
            Event::Broken { conn, cause } => {
                self.refuse(conn, Refusal::new(Code::PeerProtocol, cause), now);
            }
            Event::Renewed => self.renew(),
            Event::Exports(exports) => {
                self.wanted = exports;
                self.refresh_exports(now);
            }
            Event::Tick => {}
        }
        self.finish(now)
    }

    /// The merged world of now.
    pub fn world(&self) -> Arc<World> {
        self.world.clone()
    }

    /// True while the own cluster is a member of its set (a set of one counts).
    pub fn is_member(&self) -> bool {
        self.own_member().is_some()
    }

    /// All clusters of the set, removed and contested ones too, by name.
    pub fn members(&self) -> Vec<MemberStatus> {
        let status = |member: &Member| {
            let peer = self.peers.get(&member.record.cluster);
            MemberStatus {
                member: member.clone(),
                connected: peer.is_some_and(|peer| peer.active.is_some()),
                in_step: peer
                    .and_then(|peer| self.connections.get(&peer.active?))
                    .is_some_and(|session| session.digest == Some(self.membership.digest())),
                stale: peer.is_some_and(|peer| peer.stale),
                seq: peer.map_or(0, |peer| peer.held.seq),
                services: peer.map_or(0, |peer| peer.held.exports.services.len()),
                refused: peer.is_some_and(|peer| peer.held.refused),
                believes: peer.map(|peer| peer.names.clone()).unwrap_or_default(),
                version: peer.map(|peer| peer.version.clone()).unwrap_or_default(),
                said: peer.map(|peer| peer.said.clone()).unwrap_or_default(),
            }
        };
        self.membership.view().values().map(status).collect()
    }

    /// Clusters whose invite was redeemed here and that have not come yet, by name: a join that failed half way is
    /// among them until it is repeated, removed or expires.
    pub fn joining(&self) -> Vec<Joining> {
        let one = |admission: &Admission| Joining {
            record: admission.record.clone(),
            expires_unix_ms: admission.expires_unix_ms,
        };
        self.admissions.values().map(one).collect()
    }

    /// Own start counter: raised at each start.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What this cluster exports after its grant and the limits, and the number of that state.
    pub fn exports(&self) -> (&Exports, u64) {
        (&self.exports, self.seq)
    }

    /// What this cluster wants to export and its grant or the limits refuse. The same `Arc` until it changes.
    pub fn refused_exports(&self) -> &Arc<BTreeMap<ServiceName, Refusal>> {
        &self.refused
    }

    pub(crate) fn own_member(&self) -> Option<&Member> {
        self.membership
            .live(&self.own.cluster)
            .filter(|member| member.record.key == self.crypto.public_key())
    }

    pub(crate) fn is_founder(&self) -> bool {
        let (founder, key) = self.membership.founder();
        *founder == self.own.cluster && *key == self.crypto.public_key()
    }

    pub(crate) fn no_member(&self) -> Refusal {
        Refusal::new(Code::MemberRemoved, &self.own.cluster)
    }

    pub(crate) fn audit(&mut self, refusal: Refusal, now: Now) {
        let key = (refusal.cluster.clone(), refusal.code);
        let last = self.audited.get(&key);
        if last.is_some_and(|last| now.monotonic < *last + limits::AUDIT_INTERVAL) {
            return;
        }
        self.audited.insert(key, now.monotonic);
        self.out.push(Action::Audit(refusal));
    }

    /// A number below `limit` (SplitMix64): jitter only.
    pub(crate) fn random(&mut self, limit: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit.max(1)
    }
}
