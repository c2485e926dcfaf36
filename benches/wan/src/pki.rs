//! A root and the certificates of the two ends and of the gateway.

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, SerialNumber,
};
use std::sync::Arc;
use tombolo_identity::{LiveIdentity, TrustBundle, WorkloadIdentity};
use tombolo_types::{SpiffeId, TrustDomain};

/// A root of a trust domain.
pub(crate) struct Pki {
    trust_domain: TrustDomain,
    issuer: Issuer<'static, KeyPair>,
    root_pem: String,
}

impl Pki {
    pub(crate) fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root_pem = params.self_signed(&key)?.pem();
        Ok(Self {
            trust_domain: "mesh.example".parse()?,
            issuer: Issuer::new(params, key),
            root_pem,
        })
    }

    pub(crate) fn id(&self, service_account: &str) -> Result<SpiffeId> {
        Ok(SpiffeId::new(
            self.trust_domain.clone(),
            "bench",
            service_account,
        )?)
    }

    /// A workload with a certificate of an hour.
    pub(crate) fn workload(&self, service_account: &str, device: u64) -> Result<Arc<LiveIdentity>> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(self.id(service_account)?.to_string().try_into()?)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::minutes(2);
        params.not_after = now + time::Duration::hours(1);
        // Device id, then 11 bytes.
        let serial = [device.to_be_bytes().as_slice(), &[1; 11]].concat();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let leaf = params.signed_by(&key, &self.issuer)?.pem();
        let identity = Arc::new(WorkloadIdentity::from_pem(&leaf, &key.serialize_pem())?);
        let bundle = Arc::new(TrustBundle::from_pem(self.trust_domain.clone(), &self.root_pem)?);
        Ok(LiveIdentity::new(Some(identity), vec![bundle]))
    }
}
