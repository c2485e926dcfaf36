use crate::{Action, Policy, policy::Subject};
use std::net::IpAddr;
use tombolo_types::{NamespacedName, SpiffeId};

/// What is known of a connection when it is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection<'a> {
    /// Identity that the caller proved; none on a plaintext connection.
    pub source: Option<&'a SpiffeId>,
    /// Caller's address as the kernel sees it. IPv4 in IPv6 form counts as IPv4.
    pub source_ip: IpAddr,
    /// Address of the workload that it is for.
    pub destination_ip: IpAddr,
    /// Port of the application, after port mapping.
    pub destination_port: u16,
}

/// May it connect?
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Allow {
        /// The first ALLOW policy that matched; none if there is no ALLOW policy at all.
        policy: Option<NamespacedName>,
    },
    /// No.
    Deny {
        /// The first DENY policy that matched; none if there are ALLOW policies and none matched.
        policy: Option<NamespacedName>,
        /// [`Verdict::DENIED`] or [`Verdict::NOT_ALLOWED`]: stable, a metric label.
        reason: &'static str,
    },
}

impl Verdict {
    /// A DENY policy matched.
    pub const DENIED: &'static str = "denied_by_policy";
    /// There are ALLOW policies and none matched.
    pub const NOT_ALLOWED: &'static str = "not_allowed_by_any_policy";

    /// True for [`Verdict::Allow`].
    pub fn is_allow(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }

    /// The policy that decided, if one did.
    pub fn policy(&self) -> Option<&NamespacedName> {
        match self {
            Self::Allow { policy } | Self::Deny { policy, .. } => policy.as_ref(),
        }
    }
}

/// A verdict, and what it would be if dry-run policies were enforced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What holds.
    pub verdict: Verdict,
    /// What would hold with dry-run policies enforced beside the others, if that differs in allow or deny: for the log
    /// only.
    pub dry_run: Option<Verdict>,
}

/// Decides on a connection by the policies that apply to the workload, in any order.
///
/// A matching DENY refuses; else without any ALLOW policy the connection is let in; else a matching ALLOW lets it in.
/// Dry-run policies are skipped.
///
/// Source: Istio AuthorizationPolicy as ztunnel evaluates it.
pub fn decide<'p>(policies: impl Iterator<Item = &'p Policy>, connection: &Connection<'_>) -> Verdict {
    decide_with_dry_run(policies.filter(|policy| !policy.dry_run), connection).verdict
}

/// As [`decide`], and says beside it what dry-run policies would have changed.
pub fn decide_with_dry_run<'p>(
    policies: impl Iterator<Item = &'p Policy>,
    connection: &Connection<'_>,
) -> Decision {
    let subject = Subject::new(connection);
    let mut enforced = Tally::default();
    let mut with_dry_run = Tally::default();
    let mut any_dry_run = false;
    for policy in policies {
        any_dry_run |= policy.dry_run;
        // A policy that cannot change either tally any more is not evaluated.
        if with_dry_run.settled(policy) && (policy.dry_run || enforced.settled(policy)) {
            continue;
        }
        let matched = policy.matches(&subject);
        with_dry_run.count(policy, matched);
        if !policy.dry_run {
            enforced.count(policy, matched);
        }
    }
    let verdict = enforced.verdict();
    let dry_run = any_dry_run
        .then(|| with_dry_run.verdict())
        .filter(|other| other.is_allow() != verdict.is_allow());
    Decision { verdict, dry_run }
}

/// What was seen of a set of policies so far.
#[derive(Default)]
struct Tally<'p> {
    deny: Option<&'p Policy>,
    allow: Option<&'p Policy>,
    any_allow: bool,
}

impl<'p> Tally<'p> {
    fn settled(&self, policy: &Policy) -> bool {
        match policy.action {
            Action::Deny => self.deny.is_some(),
            Action::Allow => self.deny.is_some() || self.allow.is_some(),
        }
    }

    fn count(&mut self, policy: &'p Policy, matched: bool) {
        match policy.action {
            Action::Deny if matched && self.deny.is_none() => self.deny = Some(policy),
            Action::Deny => {}
            Action::Allow => {
                self.any_allow = true;
                if matched && self.allow.is_none() {
                    self.allow = Some(policy);
                }
            }
        }
    }

    fn verdict(&self) -> Verdict {
        let key = |policy: &Policy| policy.key.clone();
        match (self.deny, self.allow) {
            (Some(deny), _) => Verdict::Deny {
                policy: Some(key(deny)),
                reason: Verdict::DENIED,
            },
            (None, Some(allow)) => Verdict::Allow {
                policy: Some(key(allow)),
            },
            (None, None) if self.any_allow => Verdict::Deny {
                policy: None,
                reason: Verdict::NOT_ALLOWED,
            },
            (None, None) => Verdict::Allow { policy: None },
        }
    }
}

#[cfg(test)]
mod tests;
