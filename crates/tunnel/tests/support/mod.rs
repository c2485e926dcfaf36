//! A mesh for tests: a root and certificates of workloads.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test takes what it needs, from different places"
)]

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};
use tombolo_identity::{LiveIdentity, TrustBundle, WorkloadIdentity};
use tombolo_types::{DeviceId, SpiffeId, TrustDomain};

/// A root of a trust domain.
pub struct Mesh {
    trust_domain: TrustDomain,
    issuer: Issuer<'static, KeyPair>,
    root_pem: String,
    serial: AtomicU8,
}

impl Mesh {
    pub fn new(trust_domain: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::OrganizationName, trust_domain);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root_pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self {
            trust_domain: trust_domain.parse().unwrap(),
            issuer,
            root_pem,
            serial: AtomicU8::new(1),
        }
    }

    pub fn id(&self, namespace: &str, service_account: &str) -> SpiffeId {
        SpiffeId::new(self.trust_domain.clone(), namespace, service_account).unwrap()
    }

    pub fn bundle(&self) -> Arc<TrustBundle> {
        Arc::new(TrustBundle::from_pem(self.trust_domain.clone(), &self.root_pem).unwrap())
    }

    /// A certificate of an hour.
    pub fn issue(&self, id: &SpiffeId, device: DeviceId) -> Arc<WorkloadIdentity> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::minutes(2);
        params.not_after = now + time::Duration::hours(1);
        // Device id, then 11 bytes.
        let mut serial = device.0.to_be_bytes().to_vec();
        serial.extend([
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            8,
            9,
            10,
            self.serial.fetch_add(1, Ordering::Relaxed),
        ]);
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let leaf = params.signed_by(&key, &self.issuer).unwrap().pem();
        Arc::new(WorkloadIdentity::from_pem(&leaf, &key.serialize_pem()).unwrap())
    }

    /// A workload with its certificate and this root.
    pub fn workload(&self, namespace: &str, service_account: &str, device: u64) -> Arc<LiveIdentity> {
        let identity = self.issue(&self.id(namespace, service_account), DeviceId(device));
        LiveIdentity::new(Some(identity), vec![self.bundle()])
    }
}

pub fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}
