//! tombolo.v1.Enrollment: joining the mesh, renewing, leaving.
//!
//! The device key is the credential of everything after the first call. Every call signs over the TLS exporter, so
//! nothing that was heard or stolen can be replayed on another connection. Each refusal has its own code, is audited,
//! and leaves nothing half done: an enrolment is one transaction.

mod entry;
mod gateway;
mod leave;
mod redeem;
mod renew;

pub(crate) use entry::follow;
pub(crate) use gateway::{Place, group_of};
pub(crate) use renew::{expiry, trust_domain_of};

use crate::{
    audit::{Audit, Line},
    caller::link_of,
    fleet::Fleet,
    listener::Link,
    metrics::Metrics,
    objects::Objects,
    refusal::Refusal,
    trust::Trust,
};
use std::{
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::{Semaphore, SemaphorePermit};
use tombolo_ca::{CaError, Issued};
use tombolo_config::{Object, WorkloadEntrySpec, WorkloadGroupSpec};
use tombolo_proto::tombolo::v1::{self as pb, enrollment_server::Enrollment};
use tombolo_registry::MeshSettings;
use tombolo_runtime::fair;
use tombolo_types::{DeviceId, SpiffeId, TrustDomain};
use tonic::{Request, Response, Status};

/// Redemptions at once, and as many renewals of hosts that show no certificate: a flood of attempts delays no renewal of a
/// member.
const STRANGERS_MAX: usize = 16;
/// Calls of strangers that wait for their turn, of each kind; more are told to come again.
const QUEUE_MAX: usize = 1024;
/// And of one source.
const QUEUE_PER_SOURCE_MAX: usize = 32;
/// Renewals and farewells of members at once.
const RENEWING_MAX: usize = 64;
/// Bytes of a certificate request.
const CSR_MAX: usize = 16 * 1024;
/// A transaction that raced with another one is tried again so often.
const RACES_MAX: usize = 8;

/// What enrolment works with.
#[derive(Debug)]
pub struct Context {
    /// Store.
    pub objects: Objects,
    /// Fleet.
    pub fleet: Fleet,
    /// The own roots and the CA that signs.
    pub trust: Trust,
    /// Mesh.
    pub settings: MeshSettings,
    /// `host:port` of discovery, in order of preference.
    pub endpoints: Vec<String>,
    /// Audit log.
    pub audit: Arc<Audit>,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

/// The service.
#[derive(Debug, Clone)]
pub struct EnrollmentService {
    context: Arc<Context>,
    enrolling: Turns,
    /// Renewals by the device key alone, after an absence.
    returning: Turns,
    renewing: Arc<Semaphore>,
}

/// Turns of callers who have shown no certificate.
#[derive(Debug, Clone)]
struct Turns {
    queue: Arc<fair::Places>,
    at_once: Arc<Semaphore>,
}

impl Turns {
    fn new() -> Self {
        Self {
            queue: fair::Places::new(QUEUE_MAX, QUEUE_PER_SOURCE_MAX),
            at_once: Arc::new(Semaphore::new(STRANGERS_MAX)),
        }
    }

    /// Waits for a turn. Cancel-safe.
    async fn turn(&self, link: &Link) -> Result<(fair::Place, SemaphorePermit<'_>), Status> {
        let source = link
            .remote
            .map_or(Ipv4Addr::UNSPECIFIED.into(), |remote| remote.ip());
        let place = self
            .queue
            .enter(source)
            .ok_or_else(|| Refusal::busy("many hosts enrol at once; try again"))?;
        let turn = self.at_once.acquire().await.map_err(|_| stopping())?;
        Ok((place, turn))
    }
}

fn stopping() -> Status {
    Status::unavailable("discovery is stopping")
}

/// A certificate with the digest of its key.
struct Certified {
    chain: Vec<String>,
    key_digest: String,
}

impl EnrollmentService {
    /// Ready to be served.
    pub fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            enrolling: Turns::new(),
            returning: Turns::new(),
            renewing: Arc::new(Semaphore::new(RENEWING_MAX)),
        }
    }

    /// A turn to renew or leave: members who show their certificate do not wait behind those who show none. Cancel-safe.
    async fn turn_of(&self, link: &Link) -> Result<(Option<fair::Place>, SemaphorePermit<'_>), Status> {
        if link.peer.is_some() {
            let turn = self.renewing.acquire().await.map_err(|_| stopping())?;
            return Ok((None, turn));
        }
        let (place, turn) = self.returning.turn(link).await?;
        Ok((Some(place), turn))
    }
}

impl Context {
    fn hello() -> pb::Hello {
        pb::Hello {
            version: env!("CARGO_PKG_VERSION").into(),
            features: Vec::new(),
        }
    }

    fn exporter(link: &Link) -> Result<[u8; 32], Refusal> {
        link.exporter
            .ok_or_else(|| Refusal::precondition("this call needs TLS"))
    }

    /// A certificate for a device of a service account.
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "every other failure is the authority's own"
    )]
    fn certify(
        &self,
        csr: &str,
        namespace: &str,
        service_account: &str,
        device: DeviceId,
    ) -> Result<Certified, Refusal> {
        if csr.len() > CSR_MAX {
            return Err(Refusal::invalid("the certificate request is too long"));
        }
        let id = SpiffeId::new(self.settings.trust_domain.clone(), namespace, service_account)
            .map_err(Refusal::internal)?;
        let (device, now) = (Some(device), SystemTime::now());
        let authority = self.trust.authority();
        // Whether this device may be a gateway was settled when its token was made.
        let issued = if id == SpiffeId::gateway(self.settings.trust_domain.clone()) {
            authority.issue_system(csr, &id, device, Duration::ZERO, now)
        } else {
            authority.issue(csr, &id, device, Duration::ZERO, now)
        };
        let issued: Issued = issued.map_err(|error| match error {
            CaError::Csr(_) => Refusal::invalid(error),
            CaError::Reserved(_) => Refusal::new(tombolo_types::Code::Reserved, error),
            _ => Refusal::internal(error),
        })?;
        self.metrics.certificates.inc();
        let key_digest = key_digest(&issued.cert_chain)?;
        Ok(Certified {
            chain: issued.cert_chain,
            key_digest,
        })
    }

    /// What an agent needs to know about itself.
    async fn registration(
        &self,
        device: DeviceId,
        spec: &tombolo_config::DeviceSpec,
        group: &Object<WorkloadGroupSpec>,
        entry: &Object<WorkloadEntrySpec>,
    ) -> Result<pb::Registration, Refusal> {
        let namespace = &entry.metadata.namespace;
        let (services, _) = self
            .objects
            .list(Some(tombolo_config::Kind::ServiceEntry), Some(namespace))
            .await?;
        let place = Place {
            network: &spec.network,
            outbound_only: gateway::is_outbound_only(group),
            gateway: gateway::is_gateway(&self.settings.trust_domain, namespace, &spec.service_account),
        };
        let probe_json = group
            .spec
            .probe
            .as_ref()
            .and_then(|probe| serde_json::to_string(probe).ok());
        Ok(pb::Registration {
            device_id: device.to_string(),
            workload_name: spec.workload_entry.clone(),
            namespace: namespace.clone(),
            service_account: spec.service_account.clone(),
            workload_group: spec.workload_group.clone(),
            trust_domain: self.settings.trust_domain.to_string(),
            cluster_id: self.settings.cluster_id.clone(),
            network: spec.network.clone(),
            mesh_domain: self.settings.mesh_domain.clone(),
            vip_prefixes: self.settings.plan.prefixes().to_vec(),
            discovery_endpoints: self.endpoints_for(place).await?,
            generation: spec.generation,
            hostnames: entry::hostnames(entry, &services),
            probe_json: probe_json.unwrap_or_default(),
            other_names: {
                let names = self.settings.also.iter().chain(&self.settings.former);
                names.map(ToString::to_string).collect()
            },
        })
    }

    /// True for a chain that can be given out again: it is of the name that certificates are made for now.
    fn is_of_signing_name(&self, chain: &[String]) -> bool {
        trust_domain_of(chain).is_some_and(|name| name == self.settings.trust_domain)
    }

    /// The audit line of a call, and its result in the counters.
    fn record(&self, link: &Link, verb: &'static str, act: &Act, result: Result<(), &Refusal>) {
        let who = if act.who.is_empty() {
            "anonymous".to_owned()
        } else {
            act.who.clone()
        };
        let line = Line {
            who,
            from: link.from_where(),
            verb: verb.into(),
            object: act.object.clone(),
            before: act.before.clone(),
            after: act.after.clone(),
            result: result.map_or_else(|refusal| format!("refused: {refusal}"), |()| "ok".into()),
            ..Line::default()
        };
        self.metrics.enrollment(verb, result.is_ok());
        if act.who.is_empty() && result.is_err() {
            self.audit.write_bounded(line);
        } else {
            self.audit.write(line);
        }
    }
}

/// What is known of a call for its audit line; filled in as the call goes on.
#[derive(Debug, Default)]
struct Act {
    /// Empty until the caller has proved something.
    who: String,
    object: String,
    before: Option<String>,
    after: Option<String>,
}

/// SHA-256 of the SubjectPublicKeyInfo that a chain's leaf certifies, hex.
fn key_digest(chain: &[String]) -> Result<String, Refusal> {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};
    let leaf = chain.first().ok_or_else(|| Refusal::internal("an empty chain"))?;
    let der = CertificateDer::from_pem_slice(leaf.as_bytes()).map_err(Refusal::internal)?;
    let digest = tombolo_identity::root_pin(&der).map_err(Refusal::internal)?;
    Ok(digest.iter().map(|b| format!("{b:02x}")).collect())
}

fn server_time() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

#[tonic::async_trait]
impl Enrollment for EnrollmentService {
    async fn preflight(
        &self,
        request: Request<pb::PreflightRequest>,
    ) -> Result<Response<pb::PreflightResponse>, Status> {
        let settings = &self.context.settings;
        // By the name that is asked for: a token of before a renaming knows only that one.
        let asked = link_of(&request).asked;
        let known = |name: &TrustDomain| settings.is_own(name) || settings.former.contains(name);
        let trust_domain = asked.filter(|name| known(name));
        let token = self.context.token_facts(&request.into_inner().token_id).await;
        Ok(Response::new(pb::PreflightResponse {
            hello: Some(Context::hello()),
            server_time_unix_ms: server_time(),
            trust_domain: trust_domain
                .as_ref()
                .unwrap_or(&settings.trust_domain)
                .to_string(),
            mesh_domain: settings.mesh_domain.clone(),
            vip_prefixes: settings.plan.prefixes().to_vec(),
            token,
        }))
    }

    async fn enroll(
        &self,
        request: Request<pb::EnrollRequest>,
    ) -> Result<Response<pb::EnrollResponse>, Status> {
        let link = link_of(&request);
        let _turn = self.enrolling.turn(&link).await?;
        let mut act = Act::default();
        let result = self.context.enroll(&link, &request.into_inner(), &mut act).await;
        self.context
            .record(&link, "enroll", &act, result.as_ref().map(|_| ()));
        Ok(Response::new(result?))
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        let link = link_of(&request);
        let _turn = self.turn_of(&link).await?;
        let mut act = Act::default();
        let result = self.context.renew(&link, &request.into_inner(), &mut act).await;
        self.context
            .record(&link, "renew", &act, result.as_ref().map(|_| ()));
        Ok(Response::new(result?))
    }

    async fn leave(&self, request: Request<pb::LeaveRequest>) -> Result<Response<pb::LeaveResponse>, Status> {
        let link = link_of(&request);
        let _turn = self.turn_of(&link).await?;
        let mut act = Act::default();
        let result = self.context.leave(&link, &request.into_inner(), &mut act).await;
        self.context
            .record(&link, "leave", &act, result.as_ref().map(|_| ()));
        result?;
        Ok(Response::new(pb::LeaveResponse {}))
    }
}
