//! What the shell asks about roots: whose certificates may open a stream, and whose trust domain is shared.

use crate::{Action, Crypto, Federation, Now, Record, Refusal};
use std::collections::BTreeSet;
use tombolo_types::TrustDomain;

impl<C: Crypto> Federation<C> {
    /// Roots by which a peer may be discovery of a trust domain: those of every member whose record is held, under each
    /// name of it (a removed one learns its removal that way), and of clusters whose invite was redeemed and that have not come yet.
    pub fn peer_roots(&self) -> BTreeSet<(TrustDomain, String)> {
        let own = &self.own.cluster;
        let members = self.membership.view().values();
        let members = members
            .filter(|member| member.record.cluster != *own)
            .map(|member| (&*member.record, member.roots_pem()));
        let waiting = self.admissions.values();
        let waiting = waiting.map(|admission| (&admission.record, admission.record.roots_pem.as_str()));
        let named = |(record, roots): (&Record, &str)| {
            let names: Vec<_> = record
                .names()
                .map(|name| (name.clone(), roots.to_owned()))
                .collect();
            names
        };
        members.chain(waiting).flat_map(named).collect()
    }

    /// The founder says whether its own trust domain may be that of another member.
    ///
    /// # Errors
    /// As [`Self::remove`]: only the founder says it of itself.
    pub fn set_share_trust_domain(&mut self, share: bool, now: Now) -> Result<Vec<Action>, Refusal> {
        let own = self.own.cluster.clone();
        if self
            .own_member()
            .is_some_and(|member| member.record.share_trust_domain == share)
        {
            return Ok(self.finish(now));
        }
        self.rewrite(&own, now, |record| record.share_trust_domain = share)
    }
}
