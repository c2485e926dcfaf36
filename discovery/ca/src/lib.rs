//! The certificate authority (skeleton: bodies follow).
#![allow(
    clippy::todo,
    unused_variables,
    missing_docs,
    clippy::missing_errors_doc,
    reason = "skeleton"
)]
use std::{
    net::IpAddr,
    path::Path,
    time::{Duration, SystemTime},
};
use tombolo_identity::{TrustBundle, WorkloadIdentity};
use tombolo_types::{DeviceId, SpiffeId, TrustDomain};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    #[error("the certificate request is refused: {0}")]
    Csr(String),
    #[error("ttl")]
    Ttl { asked: Duration, max: Duration },
    #[error("reserved {0}")]
    Reserved(SpiffeId),
    #[error("{0}")]
    Other(String),
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TtlLimits {
    pub default: Duration,
    pub max: Duration,
}
#[derive(Debug)]
pub struct Authority(());
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    pub cert_chain: Vec<String>,
    pub serial: Vec<u8>,
    pub not_after: u64,
}
impl Authority {
    pub fn create(dir: &Path, td: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        todo!()
    }
    pub fn open(dir: &Path, td: &TrustDomain) -> Result<Self, CaError> {
        todo!()
    }
    pub fn import(dir: &Path, cacerts_dir: &Path, td: &TrustDomain) -> Result<Self, CaError> {
        todo!()
    }
    pub fn trust_domain(&self) -> &TrustDomain {
        todo!()
    }
    pub fn roots_pem(&self) -> &str {
        todo!()
    }
    pub fn root_pin(&self) -> [u8; 32] {
        todo!()
    }
    pub fn bundle(&self) -> TrustBundle {
        todo!()
    }
    pub fn limits(&self) -> TtlLimits {
        todo!()
    }
    pub fn set_limits(&mut self, limits: TtlLimits) -> Result<(), CaError> {
        todo!()
    }
    /// `ttl` zero asks for the default; above the maximum is an error.
    pub fn issue(
        &self,
        csr_pem: &str,
        id: &SpiffeId,
        device: Option<DeviceId>,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        todo!()
    }
    /// For `tombolo-system` identities (discovery, gateway) only.
    pub fn issue_system(
        &self,
        csr_pem: &str,
        id: &SpiffeId,
        device: Option<DeviceId>,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        todo!()
    }
    pub fn issue_server(
        &self,
        id: &SpiffeId,
        dns: &[String],
        ips: &[IpAddr],
        ttl: Duration,
        now: SystemTime,
    ) -> Result<WorkloadIdentity, CaError> {
        todo!()
    }
}
