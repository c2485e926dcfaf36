//! istio.v1.auth.IstioCertificateService: certificates for clients of Istio's own kind, such as ztunnel.
//!
//! Source: istiod's CA server. The identity is the authenticated caller's; of the request only the public key counts.

use crate::{
    audit::{Audit, Line},
    bearer::Bearer,
    caller::{Authenticators, Caller, link_of},
    metrics::Metrics,
    trust::Trust,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tombolo_ca::{CaError, Issued};
use tombolo_identity::{certificates_from_pem, certificates_to_pem};
use tombolo_proto::{
    istio::v1::auth::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::IstioCertificateService,
    },
    tombolo::v1::TrustBundle,
    type_url, unpack,
};
use tombolo_registry::{MeshSettings, World};
use tombolo_runtime::Reader;
use tombolo_types::{TrustDomain, reserved_namespace};
use tonic::{Request, Response, Status, metadata::MetadataMap};

/// Bytes of a certificate request.
const CSR_MAX: usize = 16 * 1024;
/// What ztunnel asks for in shared mode: somebody else's identity.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// The service.
#[derive(Debug, Clone)]
pub struct CertificateService {
    /// The CA that signs.
    pub trust: Trust,
    /// How the own trust domain is called.
    pub settings: MeshSettings,
    /// Who calls.
    pub authenticators: Authenticators,
    /// What the tokens of callers say.
    pub bearer: Arc<Bearer>,
    /// The roots of all trust domains.
    pub world: Reader<World>,
    /// Audit log.
    pub audit: Arc<Audit>,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let link = link_of(&request);
        let caller = self
            .authenticators
            .identify(&link, request.metadata())
            .await
            .map(|(caller, _)| caller);
        let (who, issued) = match caller {
            Ok(caller) => {
                let issued = self.issue(&caller, request.get_ref());
                let issued = issued.map(|issued| self.with_roots(issued, request.metadata()));
                (caller.to_string(), issued)
            }
            // The one text for a credential that does not hold, whatever the reason; ours has a code where there is one.
            Err(refusal) if refusal.code.is_none() => (
                "anonymous".into(),
                Err(Status::unauthenticated("request authenticate failure")),
            ),
            Err(refusal) => ("anonymous".into(), Err(refusal.into())),
        };
        let line = Line {
            who,
            from: link.from_where(),
            verb: "create-certificate".into(),
            object: "Certificate".into(),
            result: issued
                .as_ref()
                .map_or_else(|status| format!("refused: {}", status.message()), |_| "ok".into()),
            ..Line::default()
        };
        if line.result != "ok" {
            self.audit.write_bounded(line)
        } else {
            self.audit.write(line)
        }
        let issued = issued?;
        self.trust.issued_without_device(issued.not_after).await;
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: issued.cert_chain,
        }))
    }
}

impl CertificateService {
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "every other failure is the authority's own"
    )]
    fn issue(&self, caller: &Caller, request: &IstioCertificateRequest) -> Result<Issued, Status> {
        let Caller::Workload { id, device } = caller else {
            return Err(Status::unauthenticated("request authenticate failure"));
        };
        // A device renews by its device key, where each renewal is counted: by its certificate alone a copy of it could
        // go on for ever without being noticed.
        if device.is_some() {
            return Err(Status::permission_denied(
                "the certificate of an enrolled device is renewed by tombolo.v1.Enrollment/Renew",
            ));
        }
        if reserved_namespace(&id.namespace) {
            return Err(Status::unauthenticated("request authenticate failure"));
        }
        let impersonated = request
            .metadata
            .as_ref()
            .and_then(|metadata| metadata.fields.get(IMPERSONATED));
        if impersonated.is_some_and(|value| !is_empty(value)) {
            return Err(Status::unauthenticated(
                "request impersonation authentication failure",
            ));
        }
        if request.csr.len() > CSR_MAX {
            return Err(Status::invalid_argument("the certificate request is too long"));
        }
        // It may have shown a certificate for a name that the trust domain is about to lose.
        let mut id = id.clone();
        if self.settings.is_own(&id.trust_domain) {
            id.trust_domain = self.settings.trust_domain.clone();
        }
        let ttl = u64::try_from(request.validity_duration)
            .map(Duration::from_secs)
            .unwrap_or_default();
        let issued = self
            .trust
            .authority()
            .issue(&request.csr, &id, None, ttl, SystemTime::now())
            .map_err(|error| match error {
                CaError::Csr(_) | CaError::Ttl { .. } => Status::invalid_argument(error.to_string()),
                CaError::Reserved(_) => Status::unauthenticated("request authenticate failure"),
                _ => Status::internal(error.to_string()),
            })?;
        self.metrics.certificates.inc();
        Ok(issued)
    }
}

impl CertificateService {
    /// The chain with all roots that the caller is to believe.
    fn with_roots(&self, mut issued: Issued, headers: &MetadataMap) -> Issued {
        let token = headers.get("authorization").and_then(|value| value.to_str().ok());
        let token = token.and_then(|text| text.strip_prefix("Bearer "));
        let all = token.is_some_and(|token| self.bearer.is_for_all_roots(token));
        if let Some(roots) = issued.cert_chain.last_mut() {
            add_roots(
                roots,
                &self.world.load(),
                self.trust.authority().trust_domain(),
                all,
            );
        }
        issued
    }
}

/// Adds to the roots of `own` those of other clusters that share this trust domain, or those of every trust domain. A
/// client of this kind cannot tell them apart: each makes every identity for it.
fn add_roots(roots: &mut String, world: &World, own: &TrustDomain, all: bool) {
    let bundles = world.resources(type_url::TRUST_BUNDLE).into_iter().flatten();
    let bundles = bundles.filter(|(name, _)| all || ***name == *own.as_str());
    let mut known = certificates_from_pem(roots).unwrap_or_default();
    for (_, compiled) in bundles {
        let Ok(bundle) = unpack::<TrustBundle>(&compiled.any) else {
            continue;
        };
        for root in certificates_from_pem(&bundle.roots_pem).unwrap_or_default() {
            if !known.contains(&root) {
                roots.push_str(&certificates_to_pem([&root]));
                known.push(root);
            }
        }
    }
}

fn is_empty(value: &prost_types::Value) -> bool {
    match &value.kind {
        None | Some(prost_types::value::Kind::NullValue(_)) => true,
        Some(prost_types::value::Kind::StringValue(text)) => text.is_empty(),
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_ca::Authority;
    use tombolo_registry::{Imports, Registry};

    #[test]
    fn roots_of_others_only_for_who_shares_or_asks() {
        let now = SystemTime::now();
        let root = |trust_domain: &str| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("ca");
            let authority = Authority::create(&path, &trust_domain.parse().unwrap(), now).unwrap();
            authority.roots_pem().to_owned()
        };
        let (own, shared, foreign) = (root("mesh.example"), root("mesh.example"), root("west.example"));
        let td: TrustDomain = "mesh.example".parse().unwrap();
        let mut registry = Registry::new(MeshSettings::new(td.clone()));
        registry.set_bundle(&td, &own);
        for (cluster, trust_domain, roots_pem) in [
            ("east", "mesh.example", &shared),
            ("west", "west.example", &foreign),
        ] {
            let imports = Imports {
                trust_domain: trust_domain.parse().unwrap(),
                also: Vec::new(),
                former: Vec::new(),
                roots_pem: roots_pem.clone(),
                shares_trust_domain: true,
                mesh_domain: String::new(),
                stale: false,
                gateways: Vec::new(),
                services: Vec::new(),
            };
            registry.set_imports(cluster, Some(imports));
        }
        let world = registry.publish();
        let given = |all| {
            let mut roots = own.clone();
            add_roots(&mut roots, &world, &td, all);
            certificates_from_pem(&roots).unwrap()
        };
        let of = |texts: &[&String]| {
            let all = texts.iter().flat_map(|text| certificates_from_pem(text).unwrap());
            all.collect::<Vec<_>>()
        };
        assert_eq!(given(false), of(&[&own, &shared]));
        assert_eq!(given(true), of(&[&own, &shared, &foreign]));
    }
}
