//! Statements of members, and everything that follows when they change who is one.

use crate::{
    Action, Crypto, Federation, Now, Profile, Record, Refusal, Standing, Write,
    connection::Peer,
    limits,
    membership::{Member, Slot},
    saved::record_key,
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tombolo_proto::tombolo::federation::v1 as pb;
use tombolo_types::{Code, TrustDomain};

impl<C: Crypto> Federation<C> {
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
    pub(crate) fn follow(
        &mut self,
        before: &BTreeMap<Arc<str>, Member>,
        counted: &BTreeMap<Slot, pb::Signed>,
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
                self.renamed(cluster, before.get(cluster), member);
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
        for (cluster, member) in &after {
            let lost =
                |member: &Member| member.is_live() && member.aliases.len() < member.record.aliases.len();
            if lost(member) && !before.get(cluster).is_some_and(lost) {
                let lost = member.record.aliases.difference(&member.aliases);
                let lost: Vec<&str> = lost.map(TrustDomain::as_str).collect();
                let cause = format!("trust domain {}, as another name", lost.join(", "));
                self.audit(Refusal::new(Code::MemberContested, cause).of(cluster), now);
            }
        }
        if differing.contains(&self.own.cluster) {
            let first = |view: &BTreeMap<Arc<str>, Member>| {
                let own = view.get(&self.own.cluster);
                own.map(|own| own.record.trust_domain.clone())
            };
            if first(before) != first(&after) {
                self.renew(); // another name is shown from now on
            }
            self.refresh_exports(now);
            if !is_member {
                self.audit(self.no_member(), now);
            }
        }
    }
    /// A session under a name that is not the member's any more ends; it comes back under one that is.
    fn renamed(&mut self, cluster: &Arc<str>, before: Option<&Member>, member: &Member) {
        let Some(peer) = self.peers.get_mut(cluster) else {
            return;
        };
        let had = before.into_iter().flat_map(Member::names);
        let lost: Vec<&TrustDomain> = had.filter(|name| !member.has_name(name)).collect();
        if !lost.is_empty() {
            peer.former.extend(lost.into_iter().cloned());
            while peer.former.len() > limits::ALIASES_MAX {
                peer.former.pop_first();
            }
            let cluster = cluster.clone();
            self.out.push(Action::SaveImports { cluster });
        }
        peer.former.retain(|name| !member.has_name(name));
        let Some(conn) = peer.active else { return };
        let shown = self.connections.get(&conn).map(|open| &open.trust_domain);
        if shown.is_some_and(|shown| !member.has_name(shown)) {
            peer.held.start_over();
            self.drop_connection(conn);
        }
    }
}
