//! What operators ask for: removal, grants, leaving.

use crate::{Action, Crypto, Federation, Grant, Now, Record, Refusal, Standing, record::sign};
use tombolo_proto::tombolo::federation::v1 as pb;
use tombolo_types::Code;

impl<C: Crypto> Federation<C> {
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
        self.rewrite(cluster, now, |record| {
            record.removed = true;
            // Members of each release read a removal, and it comes under the first name to learn of it.
            record.aliases.clear();
        })
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
        record.aliases.clear();
        record.admitted_by = own;
        record.admitter_incarnation = record.incarnation;
        record.version += 1;
        let body = record.encode();
        let statements = vec![sign(&self.crypto, body)];
        self.take(&statements, &[], None, now);
        Ok(self.finish(now))
    }

    /// A statement of the own cluster about another, as an answer to the present one; adopts the members that the
    /// other admitted when it loses the right.
    pub(crate) fn rewrite(
        &mut self,
        cluster: &str,
        now: Now,
        change: impl FnOnce(&mut Record),
    ) -> Result<Vec<Action>, Refusal> {
        self.restate(cluster, now, change)?;
        Ok(self.finish(now))
    }

    /// The same, without the end of a call.
    pub(crate) fn restate(
        &mut self,
        cluster: &str,
        now: Now,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), Refusal> {
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
        Ok(())
    }
}
