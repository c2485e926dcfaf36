//! Certificate requests come from anybody: of one only the public key is used, after it was found strong and the
//! request was found signed by it.

use crate::CaError;
use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{
        OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA,
        OID_SIG_ED25519,
    },
    prelude::FromDer as _,
    public_key::PublicKey,
};

/// Most bytes of a PEM request. One for RSA 8192 has about 3,000.
const CSR_BYTES_MAX: usize = 16 << 10;
/// RSA moduli in bits. Above, one request would cost what a hundred do.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

pub(crate) fn public_key(csr_pem: &str) -> Result<SubjectPublicKeyInfo, CaError> {
    if csr_pem.len() > CSR_BYTES_MAX {
        return Err(CaError::Csr("it has more than 16 KiB"));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(csr_pem.as_bytes())
        .map_err(|_| CaError::Csr("it is not a PEM certificate request"))?;
    let Ok(([], request)) = X509CertificationRequest::from_der(&der) else {
        return Err(CaError::Csr("it is not a PKCS#10 certificate request"));
    };
    let key = &request.certification_request_info.subject_pki;
    strong(key)?;
    let signature = &request.signature_algorithm.algorithm;
    if *signature == OID_PKCS1_SHA1WITHRSA || *signature == OID_SHA1_WITH_RSA {
        return Err(CaError::Csr("it is signed with SHA-1"));
    }
    request
        .verify_signature()
        .map_err(|_| CaError::Csr("its signature does not fit its key"))?;
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| CaError::Csr("its public key has an unknown form"))
}

fn strong(key: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> Result<(), CaError> {
    let algorithm = &key.algorithm;
    if algorithm.algorithm == OID_SIG_ED25519 {
        return Ok(());
    }
    if algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = algorithm
            .parameters
            .as_ref()
            .and_then(|parameters| parameters.as_oid().ok());
        return match curve {
            Some(curve) if curve == OID_EC_P256 || curve == OID_NIST_EC_P384 => Ok(()),
            _ => Err(CaError::Csr("of elliptic curves, P-256 and P-384 are taken")),
        };
    }
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) if RSA_BITS.contains(&rsa.key_size()) => Ok(()),
        Ok(PublicKey::RSA(_)) => Err(CaError::Csr("RSA keys need 2048 to 8192 bits")),
        _ => Err(CaError::Csr(
            "keys are ECDSA P-256 or P-384, Ed25519, or RSA of 2048 bits or more",
        )),
    }
}
