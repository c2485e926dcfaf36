//! Names of a member's trust domain: given and taken while it is renamed.
//!
//! A record names one trust domain and, during a renaming, others: identities of all of them are the member's, by the
//! same roots. Whoever may change the record gives and takes them. The member itself has no say in it but the founder.

use crate::{Action, Crypto, Federation, Now, Refusal, Standing, limits::ALIASES_MAX};
use tombolo_types::{Code, TrustDomain};

/// A change of the names of a member's trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NameChange {
    /// One more.
    Add(TrustDomain),
    /// One less. When it was the first one, the other one takes its place.
    Drop {
        /// Which.
        name: TrustDomain,
        /// Also while the member says that it believes identities of it.
        force: bool,
    },
}

impl<C: Crypto> Federation<C> {
    /// The name of the own trust domain to show to a member after so many failures: all that this cluster may be known
    /// by, in turn. First comes the first one of the own record: every member that holds any record of this cluster
    /// knows it, also one that has not heard of the latest change.
    pub(crate) fn shown_after(&self, failures: u32) -> TrustDomain {
        let listed = self.own_member().into_iter();
        let listed = listed.flat_map(|member| member.record.names());
        let own = std::iter::once(&self.own.trust_domain).chain(&self.own.also);
        let mut all: Vec<&TrustDomain> = Vec::new();
        for name in listed.chain(own) {
            if !all.contains(&name) {
                all.push(name);
            }
        }
        let turn = usize::try_from(failures).unwrap_or(0) % all.len().max(1);
        (*all.get(turn).unwrap_or(&&self.own.trust_domain)).clone()
    }

    /// True for a name of the own trust domain that the own record gives, and that counts.
    pub fn is_listed(&self, name: &TrustDomain) -> bool {
        self.own_member().is_some_and(|member| member.has_name(name))
    }

    /// Gives a member another name of its trust domain, or takes one. A change that is made already is none.
    ///
    /// # Errors
    /// [`Code::TrustDomainTaken`] for a name of another member; [`Code::TrustDomainInUse`] for one that the member
    /// believes itself, unless forced; [`Code::InvalidRequest`] for one that cannot be taken; [`Code::MemberLimitReached`]; and
    /// as [`Self::remove`].
    pub fn change_names(
        &mut self,
        cluster: &str,
        change: &NameChange,
        now: Now,
    ) -> Result<Vec<Action>, Refusal> {
        let changed = match change {
            NameChange::Add(name) => self.check_new_name(cluster, name)?,
            NameChange::Drop { name, force } => {
                self.check_old_name(cluster, name, *force)?;
                true
            }
        };
        if changed {
            self.restate(cluster, now, |record| match change {
                NameChange::Add(name) => drop(record.aliases.insert(name.clone())),
                NameChange::Drop { name, .. } => {
                    if record.trust_domain == *name
                        && let Some(other) = record.aliases.pop_first()
                    {
                        record.trust_domain = other;
                    } else {
                        record.aliases.remove(name);
                    }
                }
            })?;
        }
        Ok(self.finish(now))
    }

    /// False: it has that name already.
    fn check_new_name(&self, cluster: &str, name: &TrustDomain) -> Result<bool, Refusal> {
        let view = self.membership.view();
        let member = view
            .get(cluster)
            .filter(|member| member.standing != Standing::Removed)
            .ok_or_else(|| Refusal::new(Code::MemberUnknown, cluster))?;
        let record = &member.record;
        let taken = |by: &str| {
            let cause = format!("{name} is that of {by}");
            Err(Refusal::new(Code::TrustDomainTaken, cause))
        };
        let others = view
            .values()
            .filter(|other| *other.record.cluster != *cluster && other.standing != Standing::Removed);
        for other in others {
            let both = other.record.share_trust_domain && record.share_trust_domain;
            if other.record.has_name(name) && !both {
                return taken(&other.record.cluster);
            }
        }
        let waiting = self.admissions.values();
        for admission in waiting.filter(|admission| *admission.record.cluster != *cluster) {
            if admission.record.has_name(name) {
                return taken(&admission.record.cluster);
            }
        }
        if *cluster != *self.own.cluster && self.own.trust_domain == *name && !self.is_listed(name) {
            return taken(&self.own.cluster);
        }
        if record.has_name(name) {
            return Ok(false);
        }
        if record.aliases.len() >= ALIASES_MAX {
            let cause = format!("{cluster} has {} trust domains", record.names().count());
            return Err(Refusal::new(Code::MemberLimitReached, cause));
        }
        Ok(true)
    }

    fn check_old_name(&self, cluster: &str, name: &TrustDomain, force: bool) -> Result<(), Refusal> {
        let member = self.membership.view().get(cluster);
        let member = member.ok_or_else(|| Refusal::new(Code::MemberUnknown, cluster))?;
        let record = &member.record;
        let usage = |cause: String| Err(Refusal::new(Code::InvalidRequest, cause));
        if !record.has_name(name) {
            let names: Vec<&str> = record.names().map(TrustDomain::as_str).collect();
            return usage(format!("{name} is none of {cluster}: {}", names.join(", ")));
        }
        if record.aliases.is_empty() {
            return usage(format!("{name} is all that {cluster} has"));
        }
        if record.trust_domain == *name && record.aliases.len() > 1 {
            return usage(format!(
                "drop the others of {cluster} first: one must take its place"
            ));
        }
        let mut believed = self.peers.get(cluster).into_iter().flat_map(|peer| &peer.names);
        let used = if *cluster == *self.own.cluster {
            self.own.trust_domain == *name || self.own.also.contains(name)
        } else {
            believed.any(|believed| believed == name)
        };
        if used && !force {
            let cause = format!("{cluster} believes identities of {name}");
            return Err(Refusal::new(Code::TrustDomainInUse, cause));
        }
        Ok(())
    }

    /// A founder without others says who it is itself: when its trust domain was renamed nobody has to be asked.
    pub(crate) fn settle_names(&mut self, now: Now) {
        if !self.is_founder() || self.membership.live_count() != 1 || !self.admissions.is_empty() {
            return;
        }
        let Some(member) = self.own_member() else { return };
        let (name, also) = (&self.own.trust_domain, &self.own.also);
        let same = member.record.trust_domain == *name && member.record.aliases.iter().eq(also.iter());
        if same {
            return;
        }
        let (own, name) = (self.own.cluster.clone(), name.clone());
        let aliases = also.iter().filter(|other| **other != name).take(ALIASES_MAX);
        let aliases = aliases.cloned().collect();
        // The founder may: it is asked above.
        let _ = self.restate(&own, now, |record| {
            record.trust_domain = name;
            record.aliases = aliases;
        });
    }
}

#[cfg(test)]
mod tests;
