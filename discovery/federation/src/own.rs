//! What the own cluster says: its record as a founder, its profile, its exports.

use crate::{
    Action, Crypto, Exports, Federation, Grant, Now, Profile, Record, Refusal, ServiceName,
    limits::{ROOTS_BYTES_MAX, SERVICES_MAX},
    record::sign,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_types::{Code, TrustDomain};

/// What a discovery is when it starts.
#[derive(Debug, Clone)]
pub struct Own {
    /// Name of the cluster, a DNS label.
    pub cluster: Arc<str>,
    /// Its trust domain: certificates are made for it.
    pub trust_domain: TrustDomain,
    /// Other names of the trust domain that are believed here while it is renamed.
    pub also: Vec<TrustDomain>,
    /// Its root certificates.
    pub roots_pem: String,
    /// `host:port` where others reach this discovery (mostly through its gateways); none: it only dials.
    pub endpoints: Vec<String>,
    /// Semantic version of the program.
    pub version: String,
    /// The own trust domain may be shared; said when the set is founded.
    pub share_trust_domain: bool,
}

impl<C: Crypto> Federation<C> {
    /// Changes what this cluster says about itself: all roots that are valid during a rotation, and where it is.
    ///
    /// # Errors
    /// [`Code::InvalidRequest`] when an endpoint or the roots are out of bounds.
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
            .map_err(|refusal| Refusal::new(Code::InvalidRequest, refusal.cause))?;
        debug_assert!(profile.roots_pem.len() <= ROOTS_BYTES_MAX);
        self.own.roots_pem = profile.roots_pem;
        self.own.endpoints = profile.endpoints;
        self.refresh_profile(now);
        Ok(self.finish(now))
    }

    pub(crate) fn founding_record(&self) -> Record {
        Record {
            cluster: self.own.cluster.clone(),
            trust_domain: self.own.trust_domain.clone(),
            aliases: BTreeSet::new(),
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

    /// Filters what is wanted by the own grant and the limits; counts the state when it differs.
    pub(crate) fn refresh_exports(&mut self, now: Now) {
        let mut refused = Vec::new();
        let mut kept_back: BTreeMap<ServiceName, Refusal> = BTreeMap::new();
        let exports = match self.own_member() {
            None => Exports::default(),
            Some(member) => {
                let member = member.clone();
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
                        service.check_exporter(&member)?;
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
                        Err(refusal) => {
                            kept_back.insert(name.clone(), refusal.clone());
                            refused.push(refusal);
                        }
                    }
                }
                let (gateways, more) = crate::exports::check_gateways(self.wanted.gateways.to_vec());
                refused.extend(more);
                let mesh_domain = self.wanted.mesh_domain.clone();
                Exports {
                    services,
                    gateways,
                    mesh_domain,
                }
            }
        };
        if *self.refused != kept_back {
            self.refused = Arc::new(kept_back);
        }
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
}
