use crate::{
    Crypto, MemberKey, Profile, Record, Refusal,
    codec::digest,
    limits::{DEPTH_MAX, MEMBERS_MAX, RECORDS_MAX, VERSION_JUMP_MAX},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_proto::tombolo::federation::v1::Signed;
use tombolo_types::{Code, TrustDomain};

/// What a cluster is to the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// A member.
    Live,
    /// It was one.
    Removed,
    /// Its trust domain belongs to another member, and not both share it.
    Contested,
}

/// A cluster as the chain of admits shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The record that holds.
    pub record: Arc<Record>,
    /// What it says about itself.
    pub profile: Option<Arc<Profile>>,
    /// Member or not.
    pub standing: Standing,
    /// The aliases of the record that count: those that belong to no other member.
    pub aliases: BTreeSet<TrustDomain>,
}

impl Member {
    /// Its root certificates.
    pub fn roots_pem(&self) -> &str {
        self.profile
            .as_ref()
            .map_or(&self.record.roots_pem, |profile| &profile.roots_pem)
    }

    /// `host:port` of its discovery.
    pub fn endpoints(&self) -> &[String] {
        self.profile
            .as_ref()
            .map_or(&self.record.endpoints, |profile| &profile.endpoints)
    }

    /// Every name of its trust domain that counts, the first one of its record first.
    pub fn names(&self) -> impl Iterator<Item = &TrustDomain> {
        std::iter::once(&self.record.trust_domain).chain(&self.aliases)
    }

    /// True for a name of its trust domain that counts.
    pub fn has_name(&self, trust_domain: &TrustDomain) -> bool {
        self.names().any(|name| name == trust_domain)
    }

    /// Names by which its discovery may come: one that is no member any more learns so under each that it had.
    pub(crate) fn may_come_as(&self, trust_domain: &TrustDomain) -> bool {
        if self.is_live() {
            self.has_name(trust_domain)
        } else {
            self.record.has_name(trust_domain)
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.standing == Standing::Live
    }
}

#[derive(Debug, Clone)]
struct Statement {
    record: Arc<Record>,
    signed: Signed,
    /// Key that the signature was checked with.
    signer_key: MemberKey,
}

/// Slot of a statement: whom it is about, who says it.
pub(crate) type Slot = (Arc<str>, Arc<str>);

/// The statements of admitting members, and the set of members that follows from them.
///
/// **Invariant:** the view is a function of the founder's key and the statements held, never of the order in which
/// they came. The statement of the signer nearest to the founder holds; among signers equally near, the one with the
/// lower name. So whoever may admit can take a name away from one equally near or further away, and nobody else can;
/// removing that signer gives it back. Aliases come after the trust domains that are stated equally near: an alias that
/// another member has does not count, and the member that it was given stays one.
/// **Invariant:** a statement counts only while its signer is a live member with the right to admit, in the
/// incarnation that signed, with the key that signed. The founder's key always counts: it is the root of the set.
#[derive(Debug)]
pub(crate) struct Membership {
    founder: Arc<str>,
    founder_key: MemberKey,
    statements: BTreeMap<Slot, Statement>,
    profiles: BTreeMap<Arc<str>, (Arc<Profile>, Signed)>,
    view: BTreeMap<Arc<str>, Member>,
    digest: u64,
}

impl Membership {
    pub(crate) fn new(founder: Arc<str>, founder_key: MemberKey) -> Self {
        Self {
            founder,
            founder_key,
            statements: BTreeMap::new(),
            profiles: BTreeMap::new(),
            view: BTreeMap::new(),
            digest: 0,
        }
    }

    pub(crate) fn founder(&self) -> (&Arc<str>, &MemberKey) {
        (&self.founder, &self.founder_key)
    }

    pub(crate) fn view(&self) -> &BTreeMap<Arc<str>, Member> {
        &self.view
    }

    pub(crate) fn live(&self, cluster: &str) -> Option<&Member> {
        self.view.get(cluster).filter(|member| member.is_live())
    }

    pub(crate) fn live_count(&self) -> usize {
        self.view.values().filter(|member| member.is_live()).count()
    }

    /// Takes a statement. `Ok(false)`: it is held already.
    ///
    /// # Errors
    /// [`Code::MembershipOld`] when a later one is held or its signer no longer counts; [`Code::MembershipTooNew`],
    /// [`Code::MembershipForged`], [`Code::MemberLimitReached`].
    pub(crate) fn offer(&mut self, signed: &Signed, crypto: &impl Crypto) -> Result<bool, Refusal> {
        let record = Record::decode(&signed.body)?;
        let forged = |what: &str| Refusal::new(Code::MembershipForged, format!("{}: {what}", record.cluster));
        let slot: Slot = (record.cluster.clone(), record.admitted_by.clone());
        let held = self.statements.get(&slot);
        if let Some(held) = held {
            if held.signed.body == signed.body {
                return Ok(false);
            }
            let rank = |record: &Record, body: &[u8]| (record.rank(), body.to_vec());
            if rank(&held.record, &held.signed.body) > rank(&record, &signed.body) {
                return Err(Refusal::new(Code::MembershipOld, &record.cluster));
            }
        }
        let (held_incarnation, held_version) =
            held.map_or((0, 0), |held| (held.record.incarnation, held.record.version));
        if record.incarnation > held_incarnation.saturating_add(VERSION_JUMP_MAX)
            || record.version > held_version.saturating_add(VERSION_JUMP_MAX)
        {
            return Err(Refusal::new(
                Code::MembershipTooNew,
                format!(
                    "{}: version {}.{}",
                    record.cluster, record.incarnation, record.version
                ),
            ));
        }
        let signer_key = if record.admitted_by == self.founder {
            if (record.cluster == self.founder) != (record.rank == 0)
                || record.admitter_incarnation != 1
                || (record.cluster == self.founder && record.key != self.founder_key)
            {
                return Err(forged("not what a founder says"));
            }
            self.founder_key
        } else if record.cluster == self.founder {
            return Err(forged("only the founder speaks about the founder"));
        } else {
            let Some(signer) = self.view.get(&record.admitted_by) else {
                return Err(Refusal::new(
                    Code::MemberUnknown,
                    format!(
                        "{}: its admitting cluster {} is unknown",
                        record.cluster, record.admitted_by
                    ),
                ));
            };
            let leaves = record.cluster == record.admitted_by;
            if leaves && (!record.removed || record.incarnation != record.admitter_incarnation) {
                return Err(forged("nobody admits itself"));
            }
            if !leaves
                && signer.record.rank >= record.rank
                && signer.record.incarnation == record.admitter_incarnation
            {
                return Err(forged("its admitting cluster does not stand above it"));
            }
            let speaks = if leaves {
                !signer.record.removed
            } else {
                signer.is_live() && signer.record.may_admit
            };
            if !speaks || signer.record.incarnation != record.admitter_incarnation {
                // It may have had the right once: whoever passes its statements on is behind, not lying.
                let once = !signer.is_live()
                    || signer.record.may_admit
                    || signer.record.version > 1
                    || record.admitter_incarnation < signer.record.incarnation;
                return Err(if once {
                    Refusal::new(
                        Code::MembershipOld,
                        format!("{}: its admitting cluster no longer admits", record.cluster),
                    )
                } else {
                    forged("its admitting cluster may not admit")
                });
            }
            signer.record.key
        };
        if !crypto.verify(&signer_key, &signed.body, &signed.signature) {
            return Err(forged("the signature does not fit"));
        }
        if held.is_none()
            && (self.statements.len() >= RECORDS_MAX || (!record.removed && self.live_count() >= MEMBERS_MAX))
        {
            return Err(Refusal::new(Code::MemberLimitReached, &record.cluster));
        }
        self.statements.insert(
            slot,
            Statement {
                record: Arc::new(record),
                signed: signed.clone(),
                signer_key,
            },
        );
        self.recompute();
        Ok(true)
    }

    /// Takes what a member says about itself. `Ok(false)`: it, or a later one, is held already.
    ///
    /// # Errors
    /// As [`Self::offer`]; [`Code::MemberUnknown`] for a cluster that is no member.
    pub(crate) fn offer_profile(&mut self, signed: &Signed, crypto: &impl Crypto) -> Result<bool, Refusal> {
        let profile = Profile::decode(&signed.body)?;
        let member = self
            .live(&profile.cluster)
            .ok_or_else(|| Refusal::new(Code::MemberUnknown, &profile.cluster))?;
        let forged =
            |what: &str| Refusal::new(Code::MembershipForged, format!("{}: {what}", profile.cluster));
        let held = self.profiles.get(&profile.cluster);
        let held_version = held.map_or(0, |(held, _)| held.version);
        let rank = |version: u64, body: &[u8]| (version, body.to_vec());
        if member.record.key != profile.key {
            return Err(Refusal::new(
                Code::MembershipOld,
                format!("{}: of another key", profile.cluster),
            ));
        }
        if held.is_some_and(|(held, by)| rank(held.version, &by.body) >= rank(profile.version, &signed.body))
        {
            return Ok(false);
        }
        if profile.version > held_version.saturating_add(VERSION_JUMP_MAX) {
            return Err(Refusal::new(Code::MembershipTooNew, &profile.cluster));
        }
        if !crypto.verify(&profile.key, &signed.body, &signed.signature) {
            return Err(forged("the signature does not fit"));
        }
        self.profiles
            .insert(profile.cluster.clone(), (Arc::new(profile), signed.clone()));
        self.recompute();
        Ok(true)
    }

    /// The view, from the founder outward: first what the founder says of itself, then whom it admits, then whom
    /// those admit.
    fn recompute(&mut self) {
        let mut view: BTreeMap<Arc<str>, Member> = BTreeMap::new();
        let mut holders: BTreeMap<TrustDomain, bool> = BTreeMap::new();
        // Who speaks at each distance from the founder: incarnation and key that a statement must be of.
        let mut speakers: BTreeMap<u64, BTreeMap<Arc<str>, (u64, MemberKey)>> = BTreeMap::new();
        // First the founder about itself, then about others: its key admits, whatever has become of it as a member.
        let founder = BTreeMap::from([(self.founder.clone(), (1, self.founder_key))]);
        self.decide(&founder, 0, true, &mut view, &mut holders, &mut speakers);
        speakers.insert(0, founder);
        for rank in 0..=DEPTH_MAX as u64 {
            if let Some(at) = speakers.remove(&rank) {
                self.decide(&at, rank, false, &mut view, &mut holders, &mut speakers);
            }
        }
        self.view = view;
        self.digest = self.compute_digest();
    }

    /// What the speakers of one distance say of clusters that nobody nearer spoke of.
    fn decide(
        &self,
        at: &BTreeMap<Arc<str>, (u64, MemberKey)>,
        rank: u64,
        of_itself: bool,
        view: &mut BTreeMap<Arc<str>, Member>,
        holders: &mut BTreeMap<TrustDomain, bool>,
        speakers: &mut BTreeMap<u64, BTreeMap<Arc<str>, (u64, MemberKey)>>,
    ) {
        let mut fresh = Vec::new();
        for ((cluster, signer), statement) in &self.statements {
            let record = &statement.record;
            let by = (record.admitter_incarnation, statement.signer_key);
            if at.get(signer) != Some(&by)
                || (cluster == signer) != of_itself
                || (record.rank > rank) == of_itself
                || view.contains_key(cluster)
            {
                continue;
            }
            let standing = self.standing(record, holders);
            if standing == Standing::Live {
                fresh.push(cluster);
                holders.insert(record.trust_domain.clone(), record.share_trust_domain);
                if record.may_admit {
                    let speaker = (record.incarnation, record.key);
                    speakers
                        .entry(record.rank)
                        .or_default()
                        .insert(cluster.clone(), speaker);
                }
            }
            let profile = self.profiles.get(cluster).map(|(profile, _)| profile.clone());
            let member = Member {
                record: record.clone(),
                profile: profile.filter(|profile| profile.key == record.key),
                standing,
                aliases: BTreeSet::new(),
            };
            view.insert(cluster.clone(), member);
        }
        for cluster in fresh {
            let Some(member) = view.get_mut(cluster) else {
                continue;
            };
            let record = &member.record;
            let free = |name: &&TrustDomain| {
                let held = holders.get(*name);
                held.is_none_or(|shared| *shared && record.share_trust_domain)
            };
            member.aliases = record.aliases.iter().filter(free).cloned().collect();
            let taken = member.aliases.iter();
            holders.extend(taken.map(|name| (name.clone(), record.share_trust_domain)));
        }
    }

    fn standing(&self, record: &Record, holders: &BTreeMap<TrustDomain, bool>) -> Standing {
        let left = self
            .statements
            .get(&(record.cluster.clone(), record.cluster.clone()))
            .is_some_and(|own| {
                own.record.removed
                    && own.record.incarnation == record.incarnation
                    && own.signer_key == record.key
            });
        if record.removed || left {
            Standing::Removed
        } else if holders
            .get(&record.trust_domain)
            .is_some_and(|shared| !(*shared && record.share_trust_domain))
        {
            Standing::Contested
        } else {
            Standing::Live
        }
    }

    /// Forgets statements that can never count again, and profiles of nobody. Returns what went.
    pub(crate) fn forget(&mut self) -> (Vec<Slot>, Vec<Arc<str>>) {
        let view = &self.view;
        let founder = &self.founder;
        let mut slots = Vec::new();
        self.statements.retain(|(cluster, signer), statement| {
            let dead = signer != founder
                && cluster != signer
                && view.get(signer).is_some_and(|member| {
                    member.standing == Standing::Removed
                        || member.record.incarnation > statement.record.admitter_incarnation
                });
            if dead {
                slots.push((cluster.clone(), signer.clone()));
            }
            !dead
        });
        let mut profiles = Vec::new();
        self.profiles.retain(|cluster, (profile, _)| {
            let fits = view
                .get(cluster)
                .is_some_and(|member| member.record.key == profile.key);
            if !fits {
                profiles.push(cluster.clone());
            }
            fits
        });
        self.digest = self.compute_digest();
        (slots, profiles)
    }

    /// Rank of the signer of a statement, if the statement counts now.
    fn counts(&self, (cluster, signer): &Slot, statement: &Statement) -> Option<u64> {
        if *signer == self.founder {
            return Some(0);
        }
        let member = self.view.get(signer)?;
        let same = member.record.incarnation == statement.record.admitter_incarnation
            && member.record.key == statement.signer_key;
        let speaks = if cluster == signer {
            !member.record.removed
        } else {
            member.is_live() && member.record.may_admit
        };
        let above = cluster == signer || statement.record.rank > member.record.rank;
        (same && speaks && above).then_some(member.record.rank)
    }

    /// Every statement that counts, also those that another one overrides: all members must hold the same to come to
    /// the same view when a signer loses its right. Admitting members before those that they admitted.
    pub(crate) fn signed_records(&self) -> Vec<(Slot, Signed)> {
        let mut out: Vec<(u64, &Slot, &Statement)> = self
            .statements
            .iter()
            .filter_map(|(slot, statement)| Some((self.counts(slot, statement)?, slot, statement)))
            .collect();
        out.sort_by_key(|(rank, slot, _)| (*rank, slot.0 != slot.1, *slot));
        out.into_iter()
            .map(|(_, slot, statement)| (slot.clone(), statement.signed.clone()))
            .collect()
    }

    pub(crate) fn signed_profiles(&self) -> Vec<(Arc<str>, Signed)> {
        self.profiles
            .iter()
            .filter(|(cluster, _)| self.live(cluster).is_some())
            .map(|(cluster, (_, signed))| (cluster.clone(), signed.clone()))
            .collect()
    }

    /// Equal on two members that hold the same.
    pub(crate) fn digest(&self) -> u64 {
        self.digest
    }

    fn compute_digest(&self) -> u64 {
        let records = self.signed_records();
        let profiles = self.signed_profiles();
        let bodies = records.iter().map(|(_, signed)| signed.body.as_slice());
        digest(bodies.chain(profiles.iter().map(|(_, signed)| signed.body.as_slice())))
    }

    pub(crate) fn held_slots(&self) -> impl Iterator<Item = &Slot> {
        self.statements.keys()
    }

    pub(crate) fn held_profiles(&self) -> impl Iterator<Item = &Arc<str>> {
        self.profiles.keys()
    }

    /// Highest incarnation and version that anybody was seen to state of a cluster.
    pub(crate) fn highest(&self, cluster: &str, signer: &str) -> (u64, u64) {
        let about = self
            .statements
            .iter()
            .filter(|((about, _), _)| about.as_ref() == cluster);
        let incarnation = about
            .clone()
            .map(|(_, statement)| statement.record.incarnation)
            .max();
        let version = about
            .filter(|((_, by), _)| by.as_ref() == signer)
            .map(|(_, statement)| statement.record.version)
            .max();
        (incarnation.unwrap_or(0), version.unwrap_or(0))
    }

    /// True if `ancestor` stands on the chain of admits of `cluster`.
    pub(crate) fn is_ancestor(&self, ancestor: &str, cluster: &str) -> bool {
        let mut at = cluster;
        for _ in 0..=DEPTH_MAX {
            let Some(member) = self.view.get(at) else {
                return false;
            };
            let by = member.record.admitted_by.as_ref();
            if by == ancestor && by != at {
                return true;
            }
            if by == at {
                return false;
            }
            at = &member.record.admitted_by;
        }
        false
    }

    /// Whom `cluster` admitted itself, removed ones too.
    pub(crate) fn admitted_by(&self, cluster: &str) -> Vec<&Member> {
        self.view
            .values()
            .filter(|member| {
                member.record.admitted_by.as_ref() == cluster && member.record.cluster.as_ref() != cluster
            })
            .collect()
    }

    /// The records that make `cluster` a member, from the founder on.
    pub(crate) fn chain(&self, cluster: &str) -> Vec<Signed> {
        let mut chain = Vec::new();
        let mut at = cluster;
        while let Some(member) = self.view.get(at).filter(|_| chain.len() <= DEPTH_MAX) {
            let slot = (member.record.cluster.clone(), member.record.admitted_by.clone());
            chain.extend(
                self.statements
                    .get(&slot)
                    .map(|statement| statement.signed.clone()),
            );
            if member.record.admitted_by.as_ref() == at {
                break;
            }
            at = &member.record.admitted_by;
        }
        chain.reverse();
        chain
    }
}
