//! Certificates of every kind, good and bad.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose as Eku, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use time::{Duration, OffsetDateTime};
use tombolo_identity::{LiveIdentity, TrustBundle, WorkloadIdentity, certificates_to_pem, root_pin};
use tombolo_types::{SpiffeId, TrustDomain};

pub(crate) const CATALOG: &str = "spiffe://mesh.example/ns/shop/sa/catalog";
pub(crate) const WEBAPP: &str = "spiffe://mesh.example/ns/shop/sa/webapp";
pub(crate) const DISCOVERY: &str = "spiffe://mesh.example/ns/tombolo-system/sa/discovery";
pub(crate) const FOREIGN: &str = "spiffe://other.example/ns/shop/sa/catalog";

pub(crate) fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub(crate) fn td(text: &str) -> TrustDomain {
    text.parse().unwrap()
}

pub(crate) struct Root(pub(crate) CertifiedIssuer<'static, KeyPair>);

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::now_utc() - Duration::days(400);
    params.not_after = OffsetDateTime::now_utc() + Duration::days(400);
    params
}

impl Root {
    pub(crate) fn new(name: &str) -> Self {
        Self(CertifiedIssuer::self_signed(ca_params(name), KeyPair::generate().unwrap()).unwrap())
    }

    /// An intermediate CA under this one.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        Self(CertifiedIssuer::signed_by(ca_params(name), KeyPair::generate().unwrap(), &self.0).unwrap())
    }

    /// This root's name and key, signed by another root.
    pub(crate) fn cross_signed_by(&self, name: &str, old: &Self) -> CertificateDer<'static> {
        ca_params(name)
            .signed_by(self.0.key(), &old.0)
            .unwrap()
            .der()
            .clone()
    }

    pub(crate) fn der(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    pub(crate) fn pem(&self) -> String {
        certificates_to_pem([self.0.der()])
    }

    pub(crate) fn pin(&self) -> [u8; 32] {
        root_pin(self.0.der()).unwrap()
    }

    pub(crate) fn bundle(&self, trust_domain: &str) -> Arc<TrustBundle> {
        Arc::new(TrustBundle::from_pem(td(trust_domain), &self.pem()).unwrap())
    }

    pub(crate) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.0
    }

    /// An ordinary certificate, good for an hour.
    pub(crate) fn issue(&self, uri: &str) -> WorkloadIdentity {
        Leaf::new(&[uri]).by(self)
    }

    /// An identity that believes this root.
    pub(crate) fn live(&self, uri: &str) -> Arc<LiveIdentity> {
        LiveIdentity::new(Some(Arc::new(self.issue(uri))), vec![self.bundle("mesh.example")])
    }
}

/// A certificate to be made, with everything that can be wrong about it.
pub(crate) struct Leaf {
    uris: Vec<String>,
    pub(crate) ekus: Vec<Eku>,
    pub(crate) from: Duration,
    pub(crate) to: Duration,
    pub(crate) serial: Option<Vec<u8>>,
    /// Follow the certificate in its chain.
    pub(crate) others: Vec<CertificateDer<'static>>,
}

impl Leaf {
    pub(crate) fn new(uris: &[&str]) -> Self {
        Self {
            uris: uris.iter().map(|uri| (*uri).to_owned()).collect(),
            ekus: vec![Eku::ServerAuth, Eku::ClientAuth],
            from: Duration::minutes(-2),
            to: Duration::hours(1),
            serial: None,
            others: Vec::new(),
        }
    }

    pub(crate) fn pems(&self, issuer: &Root) -> (String, String) {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = self
            .uris
            .iter()
            .map(|uri| SanType::URI(uri.as_str().try_into().unwrap()))
            .collect();
        params.extended_key_usages = self.ekus.clone();
        params.not_before = OffsetDateTime::now_utc() + self.from;
        params.not_after = OffsetDateTime::now_utc() + self.to;
        params.serial_number = self.serial.as_deref().map(SerialNumber::from_slice);
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, issuer.issuer()).unwrap();
        (
            certificates_to_pem(std::iter::once(leaf.der()).chain(&self.others)),
            key.serialize_pem(),
        )
    }

    pub(crate) fn by(&self, issuer: &Root) -> WorkloadIdentity {
        let (chain, key) = self.pems(issuer);
        WorkloadIdentity::from_pem(&chain, &key).unwrap()
    }
}

pub(crate) fn now() -> u64 {
    u64::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap()
}
