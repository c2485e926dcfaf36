//! Names of trust domains: one that is being renamed has several, and identities of each are the same workloads.

use crate::{Own, Snapshot};
use std::sync::Arc;
use tombolo_proto::tombolo::v1;
use tombolo_types::{SpiffeId, TrustDomain};

/// Roots of a trust domain, and its other names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bundle {
    pub(crate) roots_pem: String,
    pub(crate) also: Vec<TrustDomain>,
    pub(crate) former: Vec<TrustDomain>,
}

/// Reads a bundle; its own name is looked at by the caller.
pub(crate) fn bundle(message: v1::TrustBundle) -> Result<Bundle, String> {
    if message.roots_pem.trim().is_empty() {
        return Err("has no roots".to_owned());
    }
    let read = |names: &[String]| {
        let all = names.iter().map(|name| name.parse::<TrustDomain>());
        all.collect::<Result<Vec<_>, _>>()
            .map_err(|error| error.to_string())
    };
    Ok(Bundle {
        also: read(&message.also)?,
        former: read(&message.former)?,
        roots_pem: message.roots_pem,
    })
}

impl Snapshot {
    /// Names that a trust domain has beside this one, and names that it had. Empty where its bundle says none: of several
    /// names the one that certificates are made for says the others.
    pub fn names_of(&self, trust_domain: &TrustDomain) -> (&[TrustDomain], &[TrustDomain]) {
        self.bundles
            .get(trust_domain)
            .map_or((&[], &[]), |held| (&held.item.also, &held.item.former))
    }

    /// True for two names of one trust domain that are believed now, and for one name.
    pub fn is_same_domain(&self, one: &TrustDomain, other: &TrustDomain) -> bool {
        let mut bundles = self.bundles.iter();
        one == other
            || bundles.any(|(name, held)| {
                let named = |asked| name == asked || held.item.also.contains(asked);
                named(one) && named(other)
            })
    }

    /// True for two identities of one workload, whose trust domain may have several names.
    pub fn is_same(&self, one: &SpiffeId, other: &SpiffeId) -> bool {
        (&one.namespace, &one.service_account) == (&other.namespace, &other.service_account)
            && self.is_same_domain(&one.trust_domain, &other.trust_domain)
    }

    /// True for an identity of the own trust domain, whatever it is called now.
    pub fn is_own(&self, trust_domain: &TrustDomain) -> bool {
        self.is_same_domain(&self.own.trust_domain, trust_domain)
    }

    /// True for a name by which somebody may look for the discovery of the own trust domain: one that it has, or had.
    pub fn is_name_of_own(&self, trust_domain: &TrustDomain) -> bool {
        self.is_own(trust_domain)
            || self
                .bundles
                .iter()
                .any(|(name, held)| self.is_own(name) && held.item.former.contains(trust_domain))
    }

    /// The own workload is called otherwise from now on, by a new registration.
    pub fn set_own(&mut self, own: Own) {
        if *self.own != own {
            self.version += 1;
            self.own = Arc::new(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::snapshot::tests::{self, resource};
    use tombolo_proto::{tombolo::v1, type_url};
    use tombolo_types::TrustDomain;

    fn bundle(name: &str, also: &[&str], former: &[&str]) -> tombolo_proto::xds::Resource {
        let texts = |all: &[&str]| all.iter().map(|&text| text.to_owned()).collect();
        let message = v1::TrustBundle {
            trust_domain: name.into(),
            roots_pem: "PEM".into(),
            also: texts(also),
            former: texts(former),
        };
        resource(name, &message)
    }

    #[test]
    fn one_trust_domain_with_several_names() {
        let td = |text: &str| text.parse::<TrustDomain>().unwrap();
        let mut snapshot = tests::empty(); // of mesh.example
        let told = [
            bundle("new.example", &["mesh.example"], &["first.example"]),
            bundle("mesh.example", &[], &[]),
            bundle("west.example", &["sunset.example"], &["mesh.example.org"]),
        ];
        assert_eq!(snapshot.apply(type_url::TRUST_BUNDLE, told.into(), &[]), []);
        for (name, own, found) in [
            ("mesh.example", true, true),
            ("new.example", true, true),
            ("first.example", false, true),
            ("west.example", false, false),
            ("sunset.example", false, false),
            ("mesh.example.org", false, false),
            ("unknown.example", false, false),
        ] {
            assert_eq!(
                (snapshot.is_own(&td(name)), snapshot.is_name_of_own(&td(name))),
                (own, found),
                "{name}"
            );
        }
        assert!(snapshot.is_same_domain(&td("sunset.example"), &td("west.example")));
        let id = |text: &str| format!("spiffe://{text}").parse().unwrap();
        let web = id("mesh.example/ns/shop/sa/web");
        assert!(snapshot.is_same(&web, &id("new.example/ns/shop/sa/web")));
        assert!(!snapshot.is_same(&web, &id("new.example/ns/shop/sa/db")));
        assert!(!snapshot.is_same(&web, &id("first.example/ns/shop/sa/web")));
        // A name that is none is refused, and what was there stays.
        let bad = bundle("new.example", &["Not A Name"], &[]);
        assert_eq!(snapshot.apply(type_url::TRUST_BUNDLE, vec![bad], &[]).len(), 1);
        assert!(snapshot.is_own(&td("new.example")));
    }
}
