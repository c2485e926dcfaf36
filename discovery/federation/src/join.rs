//! How a cluster comes into the set: an invite is redeemed at one member, and the first contact makes it known.

use crate::{
    Action, Crypto, Federation, Grant, MemberKey, Now, Record, Refusal, Standing, Write,
    codec::Writer,
    federation::Admission,
    limits::{ADMISSION_GRACE, ADMISSIONS_MAX, DEPTH_MAX, MEMBERS_MAX},
    membership::Membership,
    record::sign,
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_proto::tombolo::federation::v1 as pb;
use tombolo_types::{Code, InviteToken, TrustDomain};

/// An invite as the store of the inviting discovery keeps it (ClusterInvite).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invite {
    /// Its name.
    pub id: [u8; 16],
    /// Public half of the seed in the token.
    pub public_key: MemberKey,
    /// The one cluster that may use it.
    pub cluster: Arc<str>,
    /// The trust domain that this cluster must have.
    pub trust_domain: TrustDomain,
    /// What it may export.
    pub namespaces: Grant,
    /// It may admit others.
    pub may_admit: bool,
    /// Its trust domain may be that of another member that says the same.
    pub share_trust_domain: bool,
    /// End of its life.
    pub expires_unix_ms: i64,
    /// The member key that used it.
    pub used_by: Option<MemberKey>,
}

/// What invite key and member key sign at a join: this connection and everything that is asked for.
fn join_proof(exporter: &[u8; 32], request: &pb::JoinRequest) -> Vec<u8> {
    Writer::new(b"tombolo join\0\x01")
        .bytes(exporter)
        .bytes(&request.invite_id)
        .text(&request.cluster)
        .text(&request.trust_domain)
        .bytes(&request.member_key)
        .text(&request.roots_pem)
        .texts(request.endpoints.iter().map(String::as_str))
        .flag(request.share_trust_domain)
        .finish()
}

impl<C: Crypto> Federation<C> {
    /// Checks whether an invite for `cluster` could be used: for the plan that the operator sees before it is made.
    ///
    /// # Errors
    /// [`Code::MayNotAdmit`], [`Code::MemberExists`], [`Code::MemberRemoved`] (only whoever removed it, or stands above,
    /// takes it back), [`Code::TrustDomainTaken`], [`Code::MemberLimitReached`].
    pub fn check_invite(
        &self,
        cluster: &str,
        trust_domain: &TrustDomain,
        share_trust_domain: bool,
    ) -> Result<(), Refusal> {
        let own = self.own_member().ok_or_else(|| self.no_member())?;
        let refuse = |code, cause: &str| Err(Refusal::new(code, cause));
        if !own.record.may_admit {
            return refuse(Code::MayNotAdmit, &self.own.cluster);
        }
        if own.record.rank >= DEPTH_MAX as u64 {
            return refuse(
                Code::MemberLimitReached,
                "this cluster stands too far from the founder",
            );
        }
        if cluster == self.own.cluster.as_ref() || cluster == self.membership.founder().0.as_ref() {
            return refuse(Code::MemberExists, cluster);
        }
        let view = self.membership.view();
        match view
            .get(cluster)
            .map(|member| (member.standing, &member.record.admitted_by))
        {
            Some((Standing::Live | Standing::Contested, _)) => return refuse(Code::MemberExists, cluster),
            // Its removal stands nearer to the founder, or beside: a statement from here would not count.
            Some((Standing::Removed, by))
                if *by != self.own.cluster && !self.membership.is_ancestor(&self.own.cluster, cluster) =>
            {
                return Err(Refusal::new(
                    Code::MemberRemoved,
                    format!("{cluster} was admitted by {by}; invite it there, or on the founder"),
                ));
            }
            Some((Standing::Removed, _)) | None => {}
        }
        let taken = view.values().find(|member| {
            member.is_live()
                && member.record.has_name(trust_domain)
                && member.record.cluster.as_ref() != cluster
                && !(share_trust_domain && member.record.share_trust_domain)
        });
        if let Some(member) = taken {
            return Err(Refusal::new(
                Code::TrustDomainTaken,
                format!("{trust_domain} is that of {}", member.record.cluster),
            ));
        }
        if self.membership.live_count() + self.admissions.len() >= MEMBERS_MAX {
            return refuse(Code::MemberLimitReached, cluster);
        }
        Ok(())
    }

    /// Redeems an invite. The answer may be sent when the actions are done. The new member is held back, unknown to
    /// the others, until its first session with this discovery: a join that fails in between leaves nothing behind.
    /// Idempotent for the same member key.
    ///
    /// # Errors
    /// [`Code::InviteProof`] before anything else is told; [`Code::InviteMismatch`], [`Code::InviteSpent`],
    /// [`Code::InviteExpired`], [`Code::MemberVersion`], [`Code::MemberExists`] for a key that is another member's, and
    /// as [`Self::check_invite`].
    pub fn redeem(
        &mut self,
        invite: &Invite,
        request: &pb::JoinRequest,
        exporter: &[u8; 32],
        now: Now,
    ) -> Result<(pb::JoinResponse, Vec<Action>), Refusal> {
        let proof = join_proof(exporter, request);
        let bad = |cause: &str| Refusal::new(Code::InviteProof, cause);
        let key = MemberKey::try_from(request.member_key.as_slice()).map_err(|_| bad("the member key"))?;
        if request.invite_id != invite.id
            || !self
                .crypto
                .verify(&invite.public_key, &proof, &request.invite_signature)
            || !self.crypto.verify(&key, &proof, &request.member_signature)
        {
            return Err(bad("a signature does not fit"));
        }
        if !crate::hello::versions_fit(&self.own.version, &request.version) {
            return Err(Refusal::new(
                Code::MemberVersion,
                format!("{:?} here, {:?} there", self.own.version, request.version),
            ));
        }
        if request.cluster != *invite.cluster || request.trust_domain != invite.trust_domain.as_str() {
            return Err(Refusal::new(
                Code::InviteMismatch,
                format!(
                    "it is for {} of {}, not {:?} of {:?}",
                    invite.cluster, invite.trust_domain, request.cluster, request.trust_domain
                ),
            ));
        }
        let cluster = invite.cluster.clone();
        if let Some(used_by) = invite.used_by {
            let waits = self
                .admissions
                .get(&cluster)
                .filter(|a| a.invite_id == invite.id && a.record.key == key);
            let member = self
                .membership
                .live(&cluster)
                .filter(|member| member.record.key == key);
            if used_by != key || (waits.is_none() && member.is_none()) {
                return Err(Refusal::new(Code::InviteSpent, &cluster));
            }
            // The answer was lost: the same again.
            let pending = waits.map(|admission| admission.signed.clone());
            return Ok((self.join_response(pending), self.finish(now)));
        }
        if now.unix_ms >= invite.expires_unix_ms {
            return Err(Refusal::new(Code::InviteExpired, &cluster));
        }
        self.check_invite(&cluster, &invite.trust_domain, invite.share_trust_domain)?;
        if invite.share_trust_domain != request.share_trust_domain {
            return Err(Refusal::new(
                Code::TrustDomainTaken,
                "both sides must say --share-trust-domain, or neither",
            ));
        }
        let pending_key = self
            .admissions
            .iter()
            .any(|(other, a)| *other != cluster && a.record.key == key);
        if key == self.crypto.public_key() || self.key_in_use(&key) || pending_key {
            return Err(Refusal::new(Code::MemberExists, "the key of another member"));
        }
        if self.admissions.len() >= ADMISSIONS_MAX {
            return Err(Refusal::new(Code::MemberLimitReached, "too many joins under way"));
        }
        let own = self.own_member().ok_or_else(|| self.no_member())?.record.clone();
        let (incarnation, _) = self.membership.highest(&cluster, &own.cluster);
        let record = Record {
            cluster: cluster.clone(),
            trust_domain: invite.trust_domain.clone(),
            aliases: BTreeSet::new(),
            key,
            roots_pem: request.roots_pem.clone(),
            endpoints: request.endpoints.clone(),
            namespaces: invite.namespaces.clone(),
            may_admit: invite.may_admit,
            share_trust_domain: invite.share_trust_domain,
            incarnation: incarnation + 1,
            version: 1,
            removed: false,
            admitted_by: own.cluster.clone(),
            rank: own.rank + 1,
            admitter_incarnation: own.incarnation,
        };
        record
            .check()
            .map_err(|refusal| Refusal::new(Code::InviteMismatch, refusal.cause))?;
        let signed = sign(&self.crypto, record.encode());
        let grace = i64::try_from(ADMISSION_GRACE.as_millis()).unwrap_or(i64::MAX);
        let expires_unix_ms = invite.expires_unix_ms.max(now.unix_ms.saturating_add(grace));
        let stored = pb::StoredAdmission {
            record: Some(signed.clone()),
            invite_id: invite.id.to_vec(),
            expires_unix_ms,
        };
        self.out.push(Action::Persist(vec![
            Write::InviteUsed { id: invite.id, key },
            Write::Put {
                key: format!("admission/{cluster}"),
                value: stored.encode_to_vec(),
            },
        ]));
        let response = self.join_response(Some(signed.clone()));
        let invite_id = invite.id;
        let admission = Admission {
            record,
            signed,
            invite_id,
            expires_unix_ms,
        };
        self.admissions.insert(cluster, admission);
        Ok((response, self.finish(now)))
    }

    fn join_response(&self, pending: Option<pb::Signed>) -> pb::JoinResponse {
        let (founder, key) = self.membership.founder();
        let records = self
            .membership
            .signed_records()
            .into_iter()
            .map(|(_, signed)| signed);
        pb::JoinResponse {
            version: self.own.version.clone(),
            features: Vec::new(),
            founder: founder.to_string(),
            founder_key: key.0.to_vec(),
            records: records.chain(pending).collect(),
            profiles: self
                .membership
                .signed_profiles()
                .into_iter()
                .map(|(_, signed)| signed)
                .collect(),
            inviter: self.own.cluster.to_string(),
        }
    }

    /// The first contact of a cluster whose invite was redeemed: from now on it is a member for all.
    pub(crate) fn confirm_admission(&mut self, cluster: &Arc<str>, now: Now) -> Result<(), Refusal> {
        let Some(admission) = self.admissions.remove(cluster) else {
            return Ok(());
        };
        let key = format!("admission/{cluster}");
        self.take(std::slice::from_ref(&admission.signed), &[], None, now);
        // After the record is stored, so that a crash in between loses neither.
        self.out.push(Action::Persist(vec![Write::Delete { key }]));
        match self.membership.live(cluster) {
            Some(member) if member.record.key == admission.record.key => Ok(()),
            Some(_) | None => Err(Refusal::new(Code::MemberUnknown, cluster)),
        }
    }

    /// What the joining side asks with: on a connection whose server showed the root of the token's pin.
    ///
    /// # Errors
    /// [`Code::InviteMismatch`] when the invite names another cluster; [`Code::FederatedAlready`].
    pub fn join_request(
        &self,
        token: &InviteToken,
        invite_key: &C,
        exporter: &[u8; 32],
        share_trust_domain: bool,
    ) -> Result<pb::JoinRequest, Refusal> {
        self.check_join()?;
        if token.cluster != *self.own.cluster {
            return Err(Refusal::new(
                Code::InviteMismatch,
                format!("it is for {:?}, this is {}", token.cluster, self.own.cluster),
            ));
        }
        let mut request = pb::JoinRequest {
            version: self.own.version.clone(),
            features: Vec::new(),
            invite_id: token.id.to_vec(),
            cluster: self.own.cluster.to_string(),
            trust_domain: self.own.trust_domain.to_string(),
            member_key: self.crypto.public_key().0.to_vec(),
            roots_pem: self.own.roots_pem.clone(),
            endpoints: self.own.endpoints.clone(),
            invite_signature: Vec::new(),
            member_signature: Vec::new(),
            share_trust_domain,
        };
        let proof = join_proof(exporter, &request);
        request.invite_signature = invite_key.sign(&proof);
        request.member_signature = self.crypto.sign(&proof);
        Ok(request)
    }

    /// A cluster joins another set only from a set of its own without others, after it was removed from one, or from one
    /// that it was admitted to and never spoke with: its process ended in the middle of the join.
    fn check_join(&self) -> Result<(), Refusal> {
        let alone = self.is_founder() && self.membership.live_count() <= 1 && self.admissions.is_empty();
        let half = !self.is_founder()
            && self.admissions.is_empty()
            && self
                .peers
                .values()
                .all(|peer| peer.active.is_none() && peer.held.seq == 0);
        if alone || half || !self.is_member() {
            Ok(())
        } else {
            Err(Refusal::new(
                Code::FederatedAlready,
                format!("{} clusters", self.membership.live_count()),
            ))
        }
    }

    /// Takes the answer to a join: checks every signature from the founder on, and that this cluster is in it as it
    /// asked. Nothing changes when it is refused.
    ///
    /// # Errors
    /// [`Code::FederatedAlready`], [`Code::MemberVersion`], [`Code::MembershipForged`].
    pub fn accept(&mut self, response: &pb::JoinResponse, now: Now) -> Result<Vec<Action>, Refusal> {
        if !crate::hello::versions_fit(&self.own.version, &response.version) {
            return Err(Refusal::new(
                Code::MemberVersion,
                format!("{:?} here, {:?} there", self.own.version, response.version),
            ));
        }
        let forged = |cause: &str| Refusal::new(Code::MembershipForged, cause);
        let key =
            MemberKey::try_from(response.founder_key.as_slice()).map_err(|_| forged("the founder's key"))?;
        let same_set = self.membership.founder() == (&Arc::from(response.founder.as_str()), &key);
        if !(same_set && self.is_member()) {
            self.check_join()?;
        }
        let mut membership = Membership::new(response.founder.as_str().into(), key);
        for signed in &response.records {
            match membership.offer(signed, &self.crypto) {
                Ok(_) => {}
                Err(refusal) if refusal.code == Code::MembershipOld => {}
                Err(refusal) => return Err(refusal),
            }
        }
        let own = membership
            .live(&self.own.cluster)
            .map(|member| member.record.clone());
        let own = own.ok_or_else(|| forged("this cluster is not in the answer"))?;
        if own.key != self.crypto.public_key() || !own.has_name(&self.own.trust_domain) {
            return Err(forged("another key or trust domain than this cluster's"));
        }
        if membership.live(&response.inviter).is_none() {
            return Err(forged("the inviting cluster is no member"));
        }
        if same_set && self.is_member() {
            // A repeated answer of the set that this cluster is in already.
            self.take(&response.records, &response.profiles, None, now);
            return Ok(self.finish(now));
        }
        // Nothing of the former set stays.
        let mut writes: Vec<Write> = self
            .membership
            .held_slots()
            .map(|slot| Write::Delete {
                key: crate::saved::record_key(slot),
            })
            .collect();
        writes.extend(self.membership.held_profiles().map(|cluster| Write::Delete {
            key: format!("profile/{cluster}"),
        }));
        self.membership = Membership::new(response.founder.as_str().into(), key);
        writes.push(self.self_write());
        self.out.push(Action::Persist(writes));
        for cluster in self.peers.keys().cloned().collect::<Vec<_>>() {
            self.drop_peer(&cluster, Code::MemberUnknown);
        }
        self.take(&response.records, &response.profiles, None, now);
        // The inviter holds the admission: it is dialled at once, and lets the others know.
        if let Some(peer) = self.peers.get_mut(response.inviter.as_str()) {
            peer.next_dial = now.monotonic;
        }
        self.merge_persists();
        Ok(self.finish(now))
    }

    /// Makes one transaction of what was asked for so far: half a change of set must not be found after a crash.
    fn merge_persists(&mut self) {
        let mut puts: BTreeMap<String, Write> = BTreeMap::new();
        let mut others = Vec::new();
        for action in std::mem::take(&mut self.out) {
            match action {
                Action::Persist(writes) => {
                    for write in writes {
                        let key = match &write {
                            Write::Put { key, .. } | Write::Delete { key } => key.clone(),
                            Write::InviteUsed { .. } => "invite".to_owned(),
                        };
                        puts.insert(key, write);
                    }
                }
                other @ (Action::SaveImports { .. }
                | Action::Send { .. }
                | Action::Dial { .. }
                | Action::Close { .. }
                | Action::Publish { .. }
                | Action::Audit(_)) => others.push(other),
            }
        }
        self.out.push(Action::Persist(puts.into_values().collect()));
        self.out.extend(others);
    }
}
