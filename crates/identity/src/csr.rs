use crate::{IdentityError, pem};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use std::fmt;
use tombolo_types::SpiffeId;
use zeroize::Zeroizing;

/// A fresh private key and the request for its certificate. `Debug` shows no key.
#[derive(Clone)]
pub struct KeyAndCsr {
    /// PKCS#8 PEM. It is a secret.
    pub key_pem: Zeroizing<String>,
    /// PKCS#10 PEM.
    pub csr_pem: String,
}

impl fmt::Debug for KeyAndCsr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyAndCsr")
            .field("csr_pem", &self.csr_pem)
            .finish_non_exhaustive()
    }
}

/// Makes an ECDSA P-256 key and a request as ztunnel's: empty subject, the wanted id as a critical URI. A CA of ours
/// takes only the public key from it; `None` leaves the id out.
///
/// # Errors
/// When the system gives no randomness.
pub fn generate_csr(id: Option<&SpiffeId>) -> Result<KeyAndCsr, IdentityError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
        .map_err(|_| IdentityError::Key("the system gives no randomness"))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(id) = id {
        let uri = id.to_string().try_into().map_err(|_| IdentityError::NoIdentity)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
    }
    let csr = params
        .serialize_request(&key)
        .map_err(|error| IdentityError::Certificate(error.to_string()))?;
    Ok(KeyAndCsr {
        key_pem: pem::encode("PRIVATE KEY", key.serialized_der()),
        csr_pem: pem::encode("CERTIFICATE REQUEST", csr.der()).as_str().to_owned(),
    })
}
