//! istio.v1.auth.IstioCertificateService: certificates for clients of Istio's own kind, such as ztunnel.
//!
//! Source: istiod's CA server. The identity is the authenticated caller's; of the request only the public key counts.

use crate::{
    audit::{Audit, Line},
    caller::{Authenticators, Caller, link_of},
    metrics::Metrics,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tombolo_ca::{Authority, CaError};
use tombolo_proto::istio::v1::auth::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::IstioCertificateService,
};
use tombolo_types::reserved_namespace;
use tonic::{Request, Response, Status};

/// Bytes of a certificate request.
const CSR_MAX: usize = 16 * 1024;
/// What ztunnel asks for in shared mode: somebody else's identity.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// The service.
#[derive(Debug, Clone)]
pub struct CertificateService {
    /// Certificate authority.
    pub authority: Arc<Authority>,
    /// Who calls.
    pub authenticators: Authenticators,
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
            Ok(caller) => (caller.to_string(), self.issue(&caller, request.get_ref())),
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
        Ok(Response::new(IstioCertificateResponse { cert_chain: issued? }))
    }
}

impl CertificateService {
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "every other failure is the authority's own"
    )]
    fn issue(&self, caller: &Caller, request: &IstioCertificateRequest) -> Result<Vec<String>, Status> {
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
        let ttl = u64::try_from(request.validity_duration)
            .map(Duration::from_secs)
            .unwrap_or_default();
        let issued = self
            .authority
            .issue(&request.csr, id, None, ttl, SystemTime::now())
            .map_err(|error| match error {
                CaError::Csr(_) | CaError::Ttl { .. } => Status::invalid_argument(error.to_string()),
                CaError::Reserved(_) => Status::unauthenticated("request authenticate failure"),
                _ => Status::internal(error.to_string()),
            })?;
        self.metrics.certificates.inc();
        Ok(issued.cert_chain)
    }
}

fn is_empty(value: &prost_types::Value) -> bool {
    match &value.kind {
        None | Some(prost_types::value::Kind::NullValue(_)) => true,
        Some(prost_types::value::Kind::StringValue(text)) => text.is_empty(),
        Some(_) => false,
    }
}
