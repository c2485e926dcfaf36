use crate::{
    Action, ConnId, Crypto, Event, Exports, Grant, MemberKey, Now, Profile, Record, Refusal, Standing, World,
    Write,
    connection::{Connection, Peer},
    limits::{self, ROOTS_BYTES_MAX, SERVICES_MAX},
    membership::{Member, Membership},
    record::sign,
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tombolo_proto::tombolo::federation::v1 as pb;
use tombolo_types::{Code, TrustDomain};

/// What a discovery is when it starts.
#[derive(Debug, Clone)]
pub struct Own {
    /// Name of the cluster, a DNS label.
    pub cluster: Arc<str>,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// Its root certificates.
    pub roots_pem: String,
    /// `host:port` where others reach this discovery (mostly through its gateways); none: it only dials.
    pub endpoints: Vec<String>,
    /// Semantic version of the program.
    pub version: String,
    /// The own trust domain may be shared; said when the set is founded.
    pub share_trust_domain: bool,
}

/// What the store holds: keys and values of [`Write::Put`], and `imports/<cluster>`.
pub type Saved = BTreeMap<String, Vec<u8>>;

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
    /// Nothing was heard of it for a while.
    pub stale: bool,
    /// State of its exports that is held.
    pub seq: u64,
    /// Services that it exports and that were taken.
    pub services: usize,
    /// It exports something that was refused.
    pub refused: bool,
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
            Event::Exports(exports) => {
                self.wanted = exports;
                self.refresh_exports(now);
            }
            Event::Tick => {}
        }
        self.finish(now)
    }

    /// Changes what this cluster says about itself: all roots that are valid during a rotation, and where it is.
    ///
    /// # Errors
    /// [`Code::Usage`] when an endpoint or the roots are out of bounds.
    pub fn set_profile(
        &mut self,
        roots_pem: String,
        endpoints: Vec<String>,
        now: Now,
    ) -> Result<Vec<Action>, Refusal> {
        let profile = Profile {
            cluster: self.own.cluster.clone(),
            key: self.crypto.public_key(),
            version: 1,
            roots_pem,
            endpoints,
        };
        profile
            .check()
            .map_err(|refusal| Refusal::new(Code::Usage, refusal.cause))?;
        debug_assert!(profile.roots_pem.len() <= ROOTS_BYTES_MAX);
        self.own.roots_pem = profile.roots_pem;
        self.own.endpoints = profile.endpoints;
        self.refresh_profile(now);
        Ok(self.finish(now))
    }

    /// Ends the membership of a cluster, for all. Members that it admitted stay: the own cluster answers for them
    /// from now on.
    ///
    /// # Errors
    /// [`Code::MemberUnknown`]; [`Code::MayNotAdmit`] when the own cluster stands not on its chain of admits.
    pub fn remove(&mut self, cluster: &str, now: Now) -> Result<Vec<Action>, Refusal> {
        if let Some((cluster, _)) = self.admissions.get_key_value(cluster) {
            // The joining side may hold its record already: it takes a removal to make that worth nothing.
            let cluster = cluster.clone();
            self.confirm_admission(&cluster, now)?;
        }
        self.rewrite(cluster, now, |record| record.removed = true)
    }

    /// Changes what a member may do.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn set_grant(
        &mut self,
        cluster: &str,
        namespaces: Grant,
        may_admit: bool,
        now: Now,
    ) -> Result<Vec<Action>, Refusal> {
        self.rewrite(cluster, now, |record| {
            record.namespaces = namespaces;
            record.may_admit = may_admit;
        })
    }

    /// The own cluster leaves the set.
    ///
    /// # Errors
    /// [`Code::MayNotAdmit`] while members depend on it: it is the founder of others, or admitted some.
    pub fn leave(&mut self, now: Now) -> Result<Vec<Action>, Refusal> {
        let own = self.own.cluster.clone();
        let member = self.own_member().ok_or_else(|| self.no_member())?.clone();
        if self
            .membership
            .admitted_by(&own)
            .iter()
            .any(|child| child.is_live())
        {
            return Err(Refusal::new(
                Code::MayNotAdmit,
                "it admitted members; the founder can take them over: remove this cluster there",
            ));
        }
        let mut record = (*member.record).clone();
        record.removed = true;
        record.admitted_by = own;
        record.admitter_incarnation = record.incarnation;
        record.version += 1;
        let body = record.encode();
        let statements = vec![sign(&self.crypto, body)];
        self.take(&statements, &[], None, now);
        Ok(self.finish(now))
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
                stale: peer.is_some_and(|peer| peer.stale),
                seq: peer.map_or(0, |peer| peer.held.seq),
                services: peer.map_or(0, |peer| peer.held.exports.services.len()),
                refused: peer.is_some_and(|peer| peer.held.refused),
            }
        };
        self.membership.view().values().map(status).collect()
    }

    /// Own start counter: raised at each start.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What this cluster exports after its grant and the limits, and the number of that state.
    pub fn exports(&self) -> (&Exports, u64) {
        (&self.exports, self.seq)
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

    fn founding_record(&self) -> Record {
        Record {
            cluster: self.own.cluster.clone(),
            trust_domain: self.own.trust_domain.clone(),
            key: self.crypto.public_key(),
            roots_pem: self.own.roots_pem.clone(),
            endpoints: self.own.endpoints.clone(),
            namespaces: Grant::All,
            may_admit: true,
            share_trust_domain: self.own.share_trust_domain,
            incarnation: 1,
            version: 1,
            removed: false,
            admitted_by: self.own.cluster.clone(),
            rank: 0,
            admitter_incarnation: 1,
        }
    }

    /// A statement of the own cluster about another, as an answer to the present one; adopts the members that the
    /// other admitted when it loses the right.
    pub(crate) fn rewrite(
        &mut self,
        cluster: &str,
        now: Now,
        change: impl FnOnce(&mut Record),
    ) -> Result<Vec<Action>, Refusal> {
        let own = self.own_member().ok_or_else(|| self.no_member())?.record.clone();
        let member = self
            .membership
            .live(cluster)
            .or_else(|| {
                self.membership
                    .view()
                    .get(cluster)
                    .filter(|m| m.standing == Standing::Contested)
            })
            .ok_or_else(|| Refusal::new(Code::MemberUnknown, cluster))?;
        let itself = cluster == own.cluster.as_ref();
        let may = if itself {
            self.is_founder()
        } else {
            own.may_admit && self.membership.is_ancestor(&own.cluster, cluster)
        };
        if !may {
            return Err(Refusal::new(
                Code::MayNotAdmit,
                format!("{cluster} was admitted by {}", member.record.admitted_by),
            ));
        }
        let mut record = (*member.record).clone();
        change(&mut record);
        let mut records = vec![record.clone()];
        if !itself && (record.removed || !record.may_admit) {
            // Those that it removed too: their removal must not be forgotten with it.
            records.extend(
                self.membership
                    .admitted_by(cluster)
                    .iter()
                    .map(|child| (*child.record).clone()),
            );
        }
        let statements: Vec<pb::Signed> = records
            .into_iter()
            .map(|mut record| {
                let (_, version) = self.membership.highest(&record.cluster, &own.cluster);
                record.version = record.version.max(version) + 1;
                record.admitted_by = own.cluster.clone();
                record.admitter_incarnation = own.incarnation;
                sign(&self.crypto, record.encode())
            })
            // First those that are adopted: between the two writes nobody is without a signer that counts.
            .rev()
            .collect();
        self.take(&statements, &[], None, now);
        Ok(self.finish(now))
    }

    fn take_own(&mut self, record: Record, writes: &mut Vec<Write>) {
        let signed = sign(&self.crypto, record.encode());
        if self.membership.offer(&signed, &self.crypto) == Ok(true) {
            writes.push(Write::Put {
                key: record_key(&(record.cluster, record.admitted_by)),
                value: signed.encode_to_vec(),
            });
        }
    }

    pub(crate) fn self_write(&self) -> Write {
        let (founder, founder_key) = self.membership.founder();
        Write::Put {
            key: "self".into(),
            value: pb::StoredSelf {
                epoch: self.epoch,
                founder: founder.to_string(),
                founder_key: founder_key.0.to_vec(),
                profile_version: self.profile_version,
            }
            .encode_to_vec(),
        }
    }

    /// Reads records, profiles and admissions, checking each signature again; what does not fit is dropped.
    fn load(&mut self, saved: &Saved, writes: &mut Vec<Write>, now: Now) {
        let signed = |prefix: &'static str| {
            let of = saved.iter().filter(move |(key, _)| key.starts_with(prefix));
            of.map(|(key, value)| {
                (
                    key.clone(),
                    pb::Signed::decode(value.as_slice()).unwrap_or_default(),
                )
            })
            .collect::<Vec<_>>()
        };
        let mut left = signed("record/");
        // Admitting members come before admitted ones in no order of keys: go on as long as one more fits.
        loop {
            let before = left.len();
            left.retain(|(_, record)| self.membership.offer(record, &self.crypto).is_err());
            if left.len() == before {
                break;
            }
        }
        for (key, profile) in signed("profile/") {
            if self.membership.offer_profile(&profile, &self.crypto).is_err() {
                left.push((key, profile));
            }
        }
        for (key, _) in left {
            self.audit(
                Refusal::new(Code::MembershipOld, format!("{key} in the store does not count")),
                now,
            );
            writes.push(Write::Delete { key });
        }
        for (key, value) in saved.iter().filter(|(key, _)| key.starts_with("admission/")) {
            let admission = pb::StoredAdmission::decode(value.as_slice())
                .ok()
                .and_then(|stored| {
                    let signed = stored.record?;
                    Some(Admission {
                        record: Record::decode(&signed.body).ok()?,
                        signed,
                        invite_id: stored.invite_id.try_into().ok()?,
                        expires_unix_ms: stored.expires_unix_ms,
                    })
                });
            match admission {
                Some(admission) => drop(
                    self.admissions
                        .insert(admission.record.cluster.clone(), admission),
                ),
                None => writes.push(Write::Delete { key: key.clone() }),
            }
        }
    }

    /// Takes statements and profiles that came from `from` (`None`: the own cluster made them), and follows what
    /// changed. Returns how many were forged.
    pub(crate) fn take(
        &mut self,
        records: &[pb::Signed],
        profiles: &[pb::Signed],
        from: Option<&Arc<str>>,
        now: Now,
    ) -> usize {
        let before = self.membership.view().clone();
        let counted: BTreeMap<_, _> = self.membership.signed_records().into_iter().collect();
        let mut writes = Vec::new();
        let mut forged = 0;
        let mut refuse = |core: &mut Self, refusal: Refusal| {
            forged += usize::from(refusal.code == Code::MembershipForged);
            // A peer that was away sends what is old by now: that is how it learns.
            if refusal.code != Code::MembershipOld {
                core.audit(from.map_or(refusal.clone(), |from| refusal.of(from)), now);
            }
        };
        for signed in records {
            match self.membership.offer(signed, &self.crypto) {
                Ok(false) => {}
                Ok(true) => {
                    if let Ok(record) = Record::decode(&signed.body) {
                        writes.push(Write::Put {
                            key: record_key(&(record.cluster, record.admitted_by)),
                            value: signed.encode_to_vec(),
                        });
                    }
                }
                Err(refusal) => refuse(self, refusal),
            }
        }
        for signed in profiles {
            match self.membership.offer_profile(signed, &self.crypto) {
                Ok(false) => {}
                Ok(true) => {
                    if let Ok(profile) = Profile::decode(&signed.body) {
                        writes.push(Write::Put {
                            key: format!("profile/{}", profile.cluster),
                            value: signed.encode_to_vec(),
                        });
                    }
                }
                Err(refusal) => refuse(self, refusal),
            }
        }
        if !writes.is_empty() {
            self.follow(&before, &counted, writes, now);
        }
        forged
    }

    /// Persists what was taken, tells the peers, and brings everything that depends on the view in line with it.
    fn follow(
        &mut self,
        before: &BTreeMap<Arc<str>, Member>,
        counted: &BTreeMap<crate::membership::Slot, pb::Signed>,
        mut writes: Vec<Write>,
        now: Now,
    ) {
        let (slots, profiles) = self.membership.forget();
        writes.extend(slots.iter().map(|slot| Write::Delete {
            key: record_key(slot),
        }));
        writes.extend(profiles.iter().map(|cluster| Write::Delete {
            key: format!("profile/{cluster}"),
        }));
        let after = self.membership.view().clone();
        let differing: BTreeSet<Arc<str>> = before
            .keys()
            .chain(after.keys())
            .filter(|cluster| before.get(*cluster) != after.get(*cluster))
            .cloned()
            .collect();
        let is_member = self.is_member();
        let mut gone = Vec::new();
        for cluster in &differing {
            if *cluster == self.own.cluster {
                continue;
            }
            let (old, new) = (before.get(cluster), after.get(cluster));
            let live = new.filter(|member| member.is_live() && is_member);
            let same_key = old
                .zip(new)
                .is_none_or(|(old, new)| old.record.key == new.record.key);
            if self.peers.contains_key(cluster) && (live.is_none() || !same_key) {
                writes.push(Write::Delete {
                    key: format!("imports/{cluster}"),
                });
                gone.push(cluster.clone());
            }
        }
        if !is_member {
            gone = self.peers.keys().cloned().collect();
            writes.extend(gone.iter().map(|cluster| Write::Delete {
                key: format!("imports/{cluster}"),
            }));
        }
        if !writes.is_empty() {
            self.out.push(Action::Persist(writes));
        }
        // Whoever is removed learns it by the same message as the others.
        let fresh: Vec<pb::Signed> = self
            .membership
            .signed_records()
            .into_iter()
            .filter(|(slot, signed)| counted.get(slot) != Some(signed))
            .map(|(_, signed)| signed)
            .collect();
        let profiles: Vec<pb::Signed> = self
            .membership
            .signed_profiles()
            .into_iter()
            .filter(|(cluster, _)| differing.contains(cluster))
            .map(|(_, signed)| signed)
            .collect();
        self.tell_all(&fresh, &profiles);
        for cluster in gone {
            let code = if is_member {
                Code::MemberRemoved
            } else {
                Code::MemberUnknown
            };
            self.drop_peer(&cluster, code);
        }
        for (cluster, member) in &after {
            if *cluster == self.own.cluster || !member.is_live() || !is_member {
                continue;
            }
            if !self.peers.contains_key(cluster) {
                let courtesy = if self.own.cluster > *cluster && !self.own.endpoints.is_empty() {
                    limits::DIAL_COURTESY
                } else {
                    Duration::ZERO
                };
                self.peers
                    .insert(cluster.clone(), Peer::new(now.monotonic + courtesy));
                self.changed.insert(cluster.clone());
            } else if differing.contains(cluster) {
                self.refilter(cluster, now);
            }
        }
        // It came by way of another member.
        let known: Vec<Arc<str>> = self
            .admissions
            .iter()
            .filter(|(cluster, admission)| {
                self.membership
                    .live(cluster)
                    .is_some_and(|member| member.record.key == admission.record.key)
            })
            .map(|(cluster, _)| cluster.clone())
            .collect();
        for cluster in known {
            self.admissions.remove(&cluster);
            let key = format!("admission/{cluster}");
            self.out.push(Action::Persist(vec![Write::Delete { key }]));
        }
        for (cluster, member) in &after {
            let contested = member.standing == Standing::Contested;
            if contested
                && before
                    .get(cluster)
                    .is_none_or(|old| old.standing != Standing::Contested)
            {
                let cause = format!("trust domain {}", member.record.trust_domain);
                self.audit(Refusal::new(Code::MemberContested, cause).of(cluster), now);
            }
        }
        if differing.contains(&self.own.cluster) {
            self.refresh_exports(now);
            if !is_member {
                self.audit(self.no_member(), now);
            }
        }
    }

    /// Filters what is wanted by the own grant and the limits; counts the state when it differs.
    pub(crate) fn refresh_exports(&mut self, now: Now) {
        let mut refused = Vec::new();
        let exports = match self.own_member() {
            None => Exports::default(),
            Some(member) => {
                let record = member.record.clone();
                let mut services = crate::Services::new();
                for (name, service) in &self.wanted.services {
                    let known = self
                        .exports
                        .services
                        .get(name)
                        .is_some_and(|held| Arc::ptr_eq(held, service));
                    let checked = if known {
                        Ok(service.clone())
                    } else {
                        (**service).clone().checked().map(Arc::new)
                    };
                    let result = checked.and_then(|service| {
                        service.check_exporter(&record.trust_domain, &record.namespaces)?;
                        if *name != service.name {
                            return Err(Refusal::new(Code::ExportInvalid, name));
                        }
                        if services.len() >= SERVICES_MAX {
                            return Err(Refusal::new(
                                Code::ExportTooLarge,
                                format!("over {SERVICES_MAX} services"),
                            ));
                        }
                        Ok(service)
                    });
                    match result {
                        Ok(service) => drop(services.insert(name.clone(), service)),
                        Err(refusal) => refused.push(refusal),
                    }
                }
                let (gateways, more) = crate::exports::check_gateways(self.wanted.gateways.to_vec());
                refused.extend(more);
                Exports { services, gateways }
            }
        };
        let own = self.own.cluster.clone();
        for refusal in refused {
            self.audit(refusal.of(&own), now);
        }
        if exports != self.exports {
            self.exports = exports;
            self.seq += 1;
            self.flush_all(now);
        }
    }

    /// Signs a new profile when the held one does not say what is true.
    pub(crate) fn refresh_profile(&mut self, now: Now) {
        let Some(member) = self.own_member() else { return };
        let held = member.profile.as_ref().map_or(0, |profile| profile.version);
        let same = member.roots_pem() == self.own.roots_pem && member.endpoints() == self.own.endpoints;
        if same && held <= self.profile_version {
            return;
        }
        self.profile_version = self.profile_version.max(held) + u64::from(!same);
        self.out.push(Action::Persist(vec![self.self_write()]));
        if same {
            return;
        }
        let profile = Profile {
            cluster: self.own.cluster.clone(),
            key: self.crypto.public_key(),
            version: self.profile_version,
            roots_pem: self.own.roots_pem.clone(),
            endpoints: self.own.endpoints.clone(),
        };
        let signed = sign(&self.crypto, profile.encode());
        self.take(&[], &[signed], None, now);
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

/// Where a statement is kept.
pub(crate) fn record_key((cluster, signer): &crate::membership::Slot) -> String {
    format!("record/{cluster}/{signer}")
}
