//! The own trust domain while it has several names: a policy that names one of them means all, and so does an identity.
//!
//! Source: Istio's `trustDomainAliases` (pilot/pkg/security/trustdomain), which widens principals in the same way.

use crate::{MeshSettings, Registry};
use std::borrow::Cow;
use tombolo_config::{AuthorizationPolicySpec, Object, ServiceEntrySpec, WorkloadEntrySpec};
use tombolo_types::{SpiffeId, TrustDomain};

/// The condition that is about principals.
const PRINCIPAL: &str = "source.principal";

/// What a value of a policy says of the trust domain. `rest` begins after the first slash.
enum Said<'a> {
    /// One, and what follows.
    Exact(&'a str, Option<&'a str>),
    /// All that end so.
    Suffix(&'a str, Option<&'a str>),
    /// All that begin so, whatever follows.
    Prefix(&'a str),
}

impl<'a> Said<'a> {
    fn of(value: &'a str) -> Self {
        let (head, rest) = match value.split_once('/') {
            Some((head, rest)) => (head, Some(rest)),
            None => (value, None),
        };
        match (head.strip_prefix('*'), head.strip_suffix('*'), rest) {
            (Some(suffix), _, _) => Self::Suffix(suffix, rest),
            (None, Some(prefix), None) => Self::Prefix(prefix),
            (None, _, _) => Self::Exact(head, rest),
        }
    }

    fn is_of(&self, name: &TrustDomain) -> bool {
        match self {
            Self::Exact(one, _) => name.as_str() == *one,
            Self::Suffix(suffix, _) => name.as_str().ends_with(suffix),
            Self::Prefix(prefix) => name.as_str().starts_with(prefix),
        }
    }

    /// The same for another trust domain.
    fn with(&self, name: &TrustDomain, is_principal: bool) -> String {
        match self {
            Self::Exact(_, Some(rest)) | Self::Suffix(_, Some(rest)) => format!("{name}/{rest}"),
            Self::Prefix(_) if is_principal => format!("{name}/*"),
            Self::Exact(_, None) | Self::Suffix(_, None) | Self::Prefix(_) => name.to_string(),
        }
    }
}

/// Adds to a list of principals or trust domains what its values mean under the other names.
fn widen(values: &mut Vec<String>, settings: &MeshSettings, is_principal: bool) {
    let mut more = Vec::new();
    for value in values.iter() {
        let said = Said::of(value);
        // `td` alone is no principal, and `*suffix` is the end of a whole one.
        let partial = is_principal && matches!(said, Said::Exact(_, None) | Said::Suffix(_, None));
        if partial || !settings.own_names().any(|name| said.is_of(name)) {
            continue;
        }
        let others = settings.own_names().chain(&settings.former);
        let others = others.filter(|name| !said.is_of(name));
        more.extend(others.map(|name| said.with(name, is_principal)));
    }
    for value in more {
        if !values.contains(&value) {
            values.push(value);
        }
    }
}

/// Every list of a policy that is about trust domains, and whether it is one of principals.
fn lists(spec: &mut AuthorizationPolicySpec) -> impl Iterator<Item = (&mut Vec<String>, bool)> {
    spec.rules.iter_mut().flat_map(|rule| {
        let sources = rule.from.iter_mut().filter_map(|from| from.source.as_mut());
        let sources = sources.flat_map(|source| {
            [
                (&mut source.principals, true),
                (&mut source.not_principals, true),
                (&mut source.trust_domains, false),
                (&mut source.not_trust_domains, false),
            ]
        });
        let when = rule.when.iter_mut().filter(|when| when.key == PRINCIPAL);
        let when = when.flat_map(|when| [(&mut when.values, true), (&mut when.not_values, true)]);
        sources.chain(when)
    })
}

/// A policy in which every name of the own trust domain stands for all that are believed, and for those that it had:
/// connections that these let in are the same peers.
pub(crate) fn widened<'a>(
    policy: &'a Object<AuthorizationPolicySpec>,
    settings: &MeshSettings,
) -> Cow<'a, Object<AuthorizationPolicySpec>> {
    if settings.also.is_empty() && settings.former.is_empty() {
        return Cow::Borrowed(policy);
    }
    let mut policy = policy.clone();
    for (list, is_principal) in lists(&mut policy.spec) {
        widen(list, settings, is_principal);
    }
    Cow::Owned(policy)
}

/// True for a policy that means something else once `gone` is no name of the trust domain any more and only `kept` is.
pub fn policy_needs_name(spec: &AuthorizationPolicySpec, gone: &TrustDomain, kept: &TrustDomain) -> bool {
    let mut spec = spec.clone();
    lists(&mut spec).any(|(list, _)| list.iter().any(|value| needs(value, list, gone, kept)))
}

/// True for a value that is about `gone`, where the list does not say the same about `kept`.
fn needs(value: &str, list: &[String], gone: &TrustDomain, kept: &TrustDomain) -> bool {
    let said = Said::of(value);
    if !said.is_of(gone) || said.is_of(kept) {
        return false;
    }
    let (as_principal, as_domain) = (said.with(kept, true), said.with(kept, false));
    !list
        .iter()
        .any(|other| *other == as_principal || *other == as_domain)
}

/// True for a service whose endpoints are said to be of `gone`, and not of `kept` too.
pub fn service_needs_name(spec: &ServiceEntrySpec, gone: &TrustDomain, kept: &TrustDomain) -> bool {
    let names = &spec.subject_alt_names;
    let ids = names.iter().filter_map(|name| name.parse::<SpiffeId>().ok());
    ids.filter(|id| id.trust_domain == *gone).any(|id| {
        let renamed = SpiffeId {
            trust_domain: kept.clone(),
            ..id
        };
        !names.contains(&renamed.to_string())
    })
}

impl Registry {
    /// True while the own trust domain has several names: then services name the identities of their endpoints, for
    /// callers that know no names beside that of a workload's record.
    pub(crate) fn is_renamed(&self) -> bool {
        !self.settings.also.is_empty()
    }

    /// Who an endpoint is, under every name; nobody, if its service account is no name.
    pub(crate) fn identities(&self, namespace: &str, spec: &WorkloadEntrySpec) -> Vec<String> {
        let account = if spec.service_account.is_empty() {
            "default"
        } else {
            &spec.service_account
        };
        let names = self.settings.own_names();
        let ids = names.filter_map(|name| SpiffeId::new(name.clone(), namespace, account).ok());
        ids.map(|id| id.to_string()).collect()
    }

    /// An identity that was written for a service, under every name of its trust domain.
    pub(crate) fn written_identities(&self, written: &str) -> Vec<String> {
        let Ok(id) = written.parse::<SpiffeId>() else {
            return Vec::new(); // for TLS that the application speaks
        };
        let mut all = vec![written.to_owned()];
        if self.settings.is_own(&id.trust_domain) {
            let others = self.settings.own_names().filter(|name| **name != id.trust_domain);
            all.extend(others.map(|name| {
                let renamed = SpiffeId {
                    trust_domain: name.clone(),
                    ..id.clone()
                };
                renamed.to_string()
            }));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn td(text: &str) -> TrustDomain {
        text.parse().unwrap()
    }

    fn settings(also: &[&str], former: &[&str]) -> MeshSettings {
        MeshSettings {
            also: also.iter().map(|name| td(name)).collect(),
            former: former.iter().map(|name| td(name)).collect(),
            ..MeshSettings::new(td("new.example"))
        }
    }

    #[test]
    fn a_name_means_all_names() {
        let moving = settings(&["old.example"], &["first.example"]);
        let check = |value: &str, is_principal, more: &[&str]| {
            let mut values = vec![value.to_owned()];
            widen(&mut values, &moving, is_principal);
            assert_eq!(values[1..], *more, "{value}");
        };
        check(
            "old.example/ns/shop/sa/web",
            true,
            &["new.example/ns/shop/sa/web", "first.example/ns/shop/sa/web"],
        );
        check(
            "new.example/ns/shop/sa/*",
            true,
            &["old.example/ns/shop/sa/*", "first.example/ns/shop/sa/*"],
        );
        check("old.*", true, &["new.example/*", "first.example/*"]);
        check(
            "*w.example/ns/shop/sa/web",
            true,
            &["old.example/ns/shop/sa/web", "first.example/ns/shop/sa/web"],
        );
        // These mean all of them as they are, or none.
        for value in [
            "*",
            "*/ns/shop/sa/web",
            "*.example/ns/shop/sa/web",
            "*/sa/web",
            "web",
        ] {
            check(value, true, &[]);
        }
        for value in [
            "west.example/ns/shop/sa/web",
            "first.example/ns/shop/sa/web",
            "new.example",
        ] {
            check(value, true, &[]);
        }
        check("old.example", false, &["new.example", "first.example"]);
        check("old*", false, &["new.example", "first.example"]);
        check("*", false, &[]);
        check("west.example", false, &[]);
        let mut both = vec![
            "old.example/ns/a/sa/b".to_owned(),
            "new.example/ns/a/sa/b".to_owned(),
        ];
        widen(&mut both, &moving, true);
        assert_eq!(both.len(), 3, "{both:?}");
    }

    fn policy(source: serde_json::Value) -> Object<AuthorizationPolicySpec> {
        let json = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "shop"},
            "spec": {"rules": [{"from": [{"source": source}],
                "when": [{"key": "source.principal", "notValues": ["old.example/ns/a/sa/b"]}]}]}});
        let found = tombolo_config::Resource::from_json(&json).unwrap();
        let tombolo_config::Resource::AuthorizationPolicy(object) = found else {
            panic!("{json}")
        };
        object
    }

    #[test]
    fn every_list_of_a_policy_is_widened() {
        let one =
            policy(json!({"notPrincipals": ["old.example/ns/a/sa/b"], "notTrustDomains": ["new.example"]}));
        let wide = widened(&one, &settings(&["old.example"], &[]));
        let source = wide.spec.rules[0].from[0].source.as_ref().unwrap();
        assert_eq!(source.not_principals.len(), 2);
        assert_eq!(source.not_trust_domains, ["new.example", "old.example"]);
        assert_eq!(wide.spec.rules[0].when[0].not_values.len(), 2);
        assert!(matches!(widened(&one, &settings(&[], &[])), Cow::Borrowed(_)));
        // After the move only the new name counts, for connections of the old one too.
        let after = widened(&one, &settings(&[], &["old.example"]));
        let source = after.spec.rules[0].from[0].source.as_ref().unwrap();
        assert_eq!(source.not_principals, ["old.example/ns/a/sa/b"]);
        assert_eq!(source.not_trust_domains, ["new.example", "old.example"]);
    }

    #[test]
    fn who_still_needs_a_name() {
        let check = |value: &str| {
            let list = [value.to_owned(), "new.example/ns/both/sa/x".to_owned()];
            needs(value, &list, &td("old.example"), &td("new.example"))
        };
        assert!(check("old.example/ns/shop/sa/web") && check("old*") && check("old.example"));
        assert!(!check("old.example/ns/both/sa/x"), "both are named");
        assert!(!check("*.example/ns/x/sa/y") && !check("new.example/ns/x/sa/y") && !check("*"));
        let one = policy(json!({"namespaces": ["shop"]}));
        let (old, new) = (td("old.example"), td("new.example"));
        assert!(policy_needs_name(&one.spec, &old, &new), "a condition names it");
        assert!(!policy_needs_name(&one.spec, &td("other.example"), &new));
        let service = |names: &[&str]| ServiceEntrySpec {
            subject_alt_names: names.iter().map(|&name| name.to_owned()).collect(),
            ..ServiceEntrySpec::default()
        };
        let (of_old, of_new) = ("spiffe://old.example/ns/a/sa/b", "spiffe://new.example/ns/a/sa/b");
        assert!(service_needs_name(&service(&[of_old]), &old, &new));
        assert!(!service_needs_name(&service(&[of_old, of_new]), &old, &new));
        assert!(!service_needs_name(&service(&["db.example.org"]), &old, &new));
    }
}
