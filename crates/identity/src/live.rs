use crate::{TrustBundle, WorkloadIdentity, bundle, tls::CONTROL_PREFIX, workload::is_self_issued};
use arc_swap::ArcSwap;
use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use std::sync::Arc;
use tombolo_types::{SpiffeId, TrustDomain};

/// The certificate and the roots of one moment. Never changes; a new one takes its place.
#[derive(Debug, Clone)]
pub struct Current {
    /// Who we are; `None` before enrolment.
    pub identity: Option<Arc<WorkloadIdentity>>,
    /// Certificates of a server that is dialled under several names, beside `identity`: which one is shown is said by the
    /// name that the client asks for.
    pub others: Vec<Arc<WorkloadIdentity>>,
    /// Whom we believe, one bundle per trust domain.
    pub bundles: Vec<Arc<TrustBundle>>,
    /// Goes up by one with each new certificate. A pooled connection that was made under an older one takes no new
    /// streams.
    pub certificate_generation: u64,
    /// Goes up by one with each change of roots. A connection made under an older one is checked again
    /// ([`crate::still_trusted`]).
    pub bundle_generation: u64,
}

impl Current {
    /// The roots of a trust domain.
    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<&Arc<TrustBundle>> {
        self.bundles
            .iter()
            .find(|bundle| bundle.trust_domain() == trust_domain)
    }

    /// True for two names of one trust domain that is being renamed, and for one name.
    pub fn is_same_domain(&self, one: &TrustDomain, other: &TrustDomain) -> bool {
        let named =
            |bundle: &TrustBundle, name| bundle.trust_domain() == name || bundle.also().contains(name);
        one == other
            || self
                .bundles
                .iter()
                .any(|bundle| named(bundle, one) && named(bundle, other))
    }

    /// True for two identities of one workload, whose trust domain may have several names.
    pub fn is_same(&self, one: &SpiffeId, other: &SpiffeId) -> bool {
        one == other
            || ((&one.namespace, &one.service_account) == (&other.namespace, &other.service_account)
                && self.is_same_domain(&one.trust_domain, &other.trust_domain))
    }

    /// What may have let in a peer of this name: also where the name is one that its trust domain had.
    pub(crate) fn once(&self, trust_domain: &TrustDomain) -> Option<&Arc<TrustBundle>> {
        let former = || {
            let mut all = self.bundles.iter();
            all.find(|bundle| bundle.former().contains(trust_domain))
        };
        self.bundle(trust_domain).or_else(former)
    }
}

/// The certificate and roots in use, replaced while connections are made: every handshake reads them once, so a new
/// certificate or root needs no new TLS configuration and no restart.
#[derive(Debug)]
pub struct LiveIdentity {
    current: ArcSwap<Current>,
}

impl LiveIdentity {
    /// Starts with generation 0 of both. Of two bundles for one trust domain the first counts.
    pub fn new(identity: Option<Arc<WorkloadIdentity>>, bundles: Vec<Arc<TrustBundle>>) -> Arc<Self> {
        let current = Current {
            identity,
            others: Vec::new(),
            bundles,
            certificate_generation: 0,
            bundle_generation: 0,
        };
        Arc::new(Self {
            current: ArcSwap::from_pointee(current),
        })
    }

    /// The state of this moment. Load it once per decision.
    pub fn current(&self) -> Arc<Current> {
        self.current.load_full()
    }

    /// Presents another certificate from the next handshake on.
    pub fn set_identity(&self, identity: Arc<WorkloadIdentity>) {
        self.current.rcu(|current| Current {
            identity: Some(Arc::clone(&identity)),
            certificate_generation: current.certificate_generation + 1,
            ..Current::clone(current)
        });
    }

    /// As [`Self::set_identity`], with certificates for other names that the client may ask for.
    pub fn set_identities(&self, identity: Arc<WorkloadIdentity>, others: Vec<Arc<WorkloadIdentity>>) {
        self.current.rcu(|current| Current {
            identity: Some(Arc::clone(&identity)),
            others: others.clone(),
            certificate_generation: current.certificate_generation + 1,
            ..Current::clone(current)
        });
    }

    /// Believes exactly these roots from the next handshake on. The same roots again change nothing, not even the
    /// generation: no connection has to be checked again for them.
    pub fn set_bundles(&self, bundles: Vec<Arc<TrustBundle>>) {
        self.current.rcu(|current| {
            let same = current.bundles == bundles;
            Current {
                bundles: bundles.clone(),
                bundle_generation: current.bundle_generation + u64::from(!same),
                ..Current::clone(current)
            }
        });
    }

    pub(crate) fn load(&self) -> arc_swap::Guard<Arc<Current>> {
        self.current.load()
    }
}

/// Presents the current certificate, on either side.
#[derive(Debug)]
pub(crate) struct Presents(pub(crate) Arc<LiveIdentity>);

impl Presents {
    fn certified(&self) -> Option<Arc<CertifiedKey>> {
        self.0
            .load()
            .identity
            .as_ref()
            .map(|identity| Arc::clone(identity.certified()))
    }
}

impl ResolvesServerCert for Presents {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }
}

impl ResolvesClientCert for Presents {
    fn resolve(&self, _root_hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }

    fn has_certs(&self) -> bool {
        self.0.load().identity.is_some()
    }
}

/// Presents the current certificate, and after it every certificate that a client may hold only the pin of: what its
/// chain has, and all roots of its own trust domain. A client that asks for `discovery.<trust domain>` of another name
/// is shown the certificate for that one.
#[derive(Debug)]
pub(crate) struct PresentsWithRoots(pub(crate) Arc<LiveIdentity>);

impl ResolvesServerCert for PresentsWithRoots {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.0.load();
        let signing = current.identity.as_ref()?;
        let asked = hello
            .server_name()
            .and_then(|name| name.strip_prefix(CONTROL_PREFIX));
        let others = &current.others;
        let other = others
            .iter()
            .find(|other| asked.is_some_and(|name| name == other.id().trust_domain.as_str()));
        let identity = other.unwrap_or(signing);
        let mut chain = identity.certified().cert.clone();
        let own = current.bundle(&signing.id().trust_domain);
        let roots = own.map(|bundle| bundle.roots()).unwrap_or_default();
        let with = identity
            .chain()
            .iter()
            .skip(1)
            .filter(|certificate| is_self_issued(certificate));
        for root in with.chain(roots) {
            if !chain.contains(root) {
                chain.push(root.clone());
            }
        }
        debug_assert!(
            chain
                .iter()
                .all(|certificate| bundle::root_pin(certificate).is_ok())
        );
        Some(Arc::new(CertifiedKey::new(
            chain,
            Arc::clone(&identity.certified().key),
        )))
    }
}
