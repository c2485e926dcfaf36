use crate::{
    IdentityError, TrustBundle,
    bundle::{hex, parse},
    pem, serial,
    tls::provider,
    verify::{self, Usage},
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use std::{fmt, sync::Arc, time::Duration};
use tombolo_types::{DeviceId, SpiffeId};
use zeroize::Zeroizing;

/// A certificate chain with its private key: who this process is. `Debug` shows no key.
pub struct WorkloadIdentity {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key_pem: Zeroizing<String>,
    certified: Arc<CertifiedKey>,
    serial: Vec<u8>,
    not_before: u64,
    not_after: u64,
}

impl fmt::Debug for WorkloadIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadIdentity")
            .field("id", &self.id.to_string())
            .field("serial", &hex(&self.serial))
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl WorkloadIdentity {
    /// Reads a chain (the certificate first) and its private key (PKCS#8, PKCS#1 or SEC1).
    ///
    /// # Errors
    /// When a text is damaged, the certificate carries no SPIFFE id, or the key belongs to another certificate.
    pub fn from_pem(chain: &str, key: &str) -> Result<Self, IdentityError> {
        Self::from_der(pem::certificates_from_pem(chain)?, key)
    }

    /// Reads the answer of an Istio CA: certificate, intermediates, and all roots in the last element. Gives the
    /// roots too. The certificate must verify against those roots and belong to `key_pem`.
    ///
    /// # Errors
    /// As [`Self::from_pem`], and when there are fewer than two elements or the chain does not lead to the roots.
    /// Source: istio `IstioCertificateResponse.cert_chain`.
    pub fn from_issued(cert_chain: &[String], key_pem: &str) -> Result<(Self, String), IdentityError> {
        let [chain @ .., roots] = cert_chain else {
            return Err(IdentityError::ShortChain(0));
        };
        if chain.is_empty() {
            return Err(IdentityError::ShortChain(cert_chain.len()));
        }
        let mut certificates = Vec::new();
        for element in chain {
            certificates.extend(pem::certificates_from_pem(element)?);
        }
        let identity = Self::from_der(certificates, key_pem)?;
        let bundle = TrustBundle::from_pem(identity.id.trust_domain.clone(), roots)?;
        identity.verify_against(&bundle)?;
        Ok((identity, bundle.to_pem()))
    }

    fn from_der(chain: Vec<CertificateDer<'static>>, key: &str) -> Result<Self, IdentityError> {
        let key = pem::private_key(key)?;
        let leaf = chain.first().ok_or(IdentityError::NoIdentity)?;
        let id = verify::spiffe_ids(leaf)?
            .into_iter()
            .next()
            .ok_or(IdentityError::NoIdentity)?;
        let (not_before, not_after) = validity(leaf)?;
        let serial = serial::unsigned(parse(leaf)?.raw_serial()).to_vec();
        // Self-signed certificates stay at home: a peer has the root or does not believe it, and they cost bytes in
        // every handshake. Discovery adds them again for clients that know a root only by its pin.
        let presented: Vec<_> = chain
            .iter()
            .enumerate()
            .filter(|(i, c)| *i == 0 || !is_self_issued(c))
            .map(|(_, c)| c.clone())
            .collect();
        let key_pem = pem::encode(label(&key), key.secret_der());
        let certified = CertifiedKey::from_der(presented, key, &provider()).map_err(|error| {
            if matches!(error, rustls::Error::InconsistentKeys(_)) {
                IdentityError::KeyMismatch
            } else {
                IdentityError::Key("not a key that TLS can sign with")
            }
        })?;
        Ok(Self {
            id,
            chain,
            key_pem,
            certified: Arc::new(certified),
            serial,
            not_before,
            not_after,
        })
    }

    /// Checked in the middle of its life: there is no clock here, and its first minutes are backdated and may lie
    /// before the birth of a fresh root.
    fn verify_against(&self, bundle: &TrustBundle) -> Result<(), IdentityError> {
        let middle = self.not_before + (self.not_after - self.not_before) / 2;
        let now = UnixTime::since_unix_epoch(Duration::from_secs(middle));
        verify::chain(
            bundle.anchors(),
            &self.chain[0],
            &self.chain[1..],
            now,
            Usage::Any,
        )
        .map_err(|error| IdentityError::NotVerified {
            id: self.id.clone(),
            cause: error.to_string(),
        })
    }

    /// The first SPIFFE id of the certificate.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The chain as it was given: the certificate first, roots included if they were in it.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The chain as PEM.
    pub fn chain_pem(&self) -> String {
        pem::certificates_to_pem(&self.chain)
    }

    /// The private key as PEM, in the form it was given (PKCS#8 for keys made here). It is a secret.
    pub fn key_pem(&self) -> Zeroizing<String> {
        self.key_pem.clone()
    }

    /// Start of validity, Unix seconds.
    pub fn not_before(&self) -> u64 {
        self.not_before
    }

    /// End of validity, Unix seconds; the certificate is valid in that second.
    pub fn not_after(&self) -> u64 {
        self.not_after
    }

    /// Serial number, unsigned big-endian without leading zeros.
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// The device that the serial number names, for certificates of our CA.
    pub fn device(&self) -> Option<DeviceId> {
        serial::device_of(&self.serial)
    }

    /// When to renew, Unix seconds: half of its life, 1 % of the life earlier (0.0) to 1 % later (1.0), so that a
    /// fleet started together does not renew together. `jitter_0_1` outside 0 to 1 is brought into it.
    pub fn renew_at(&self, jitter_0_1: f64) -> u64 {
        let jitter = if jitter_0_1.is_finite() {
            jitter_0_1.clamp(0.0, 1.0)
        } else {
            0.5
        };
        let life = (self.not_after - self.not_before) as f64;
        self.not_before + (life * (0.49 + 0.02 * jitter)) as u64
    }

    /// What HBONE presents.
    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

fn label(key: &PrivateKeyDer<'_>) -> &'static str {
    match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        PrivateKeyDer::Pkcs8(_) | _ => "PRIVATE KEY",
    }
}

pub(crate) fn is_self_issued(certificate: &CertificateDer<'_>) -> bool {
    parse(certificate).is_ok_and(|c| c.tbs_certificate.subject.as_raw() == c.tbs_certificate.issuer.as_raw())
}

/// Unix seconds of notBefore and notAfter, in order.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Result<(u64, u64), IdentityError> {
    let parsed = parse(certificate)?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    let (from, to) = (
        seconds(parsed.validity().not_before),
        seconds(parsed.validity().not_after),
    );
    if from > to {
        return Err(IdentityError::Certificate("it ends before it begins".into()));
    }
    Ok((from, to))
}
