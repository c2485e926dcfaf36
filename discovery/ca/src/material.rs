//! What an authority signs with, read from a folder and found to fit together.

use crate::{
    CaError,
    files::{CA_CERT, CA_KEY, CERT_CHAIN, EXTRA_ROOTS, ROOT_CERT, read, read_optional},
};
use rcgen::{Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use std::path::Path;
use tombolo_identity::{TrustBundle, certificates_from_pem};
use tombolo_types::TrustDomain;
use x509_parser::prelude::{FromDer as _, X509Certificate};

pub(crate) struct Material {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    /// What the issuer signs with.
    pub(crate) certificate: CertificateDer<'static>,
    /// Unix seconds.
    pub(crate) not_after: u64,
    /// A moment at which every certificate here has begun, Unix seconds.
    pub(crate) begun: u64,
    /// Sent between certificate and roots.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) bundle: TrustBundle,
}

impl Material {
    /// Reads the files and checks them against each other; an error names the file to look at.
    pub(crate) fn read(dir: &Path, td: &TrustDomain, chain_needed: bool) -> Result<Self, CaError> {
        let fault = |name: &str, cause: String| CaError::File {
            path: dir.join(name),
            cause,
        };
        let list = |name: &str| {
            certificates_from_pem(&read(dir, name)?).map_err(|error| fault(name, error.to_string()))
        };

        let certificate = list(CA_CERT)?.swap_remove(0);
        let parsed = parse(&certificate).map_err(|cause| fault(CA_CERT, cause))?;
        check_signer(&parsed).map_err(|cause| fault(CA_CERT, cause.to_owned()))?;
        let key = read_key(&read(dir, CA_KEY)?).map_err(|cause| fault(CA_KEY, cause.to_owned()))?;
        if key.public_key_raw() != parsed.public_key().subject_public_key.data.as_ref() {
            return Err(fault(CA_KEY, format!("it is not the key of {CA_CERT}")));
        }
        let chain = if chain_needed || read_optional(dir, CERT_CHAIN)?.is_some() {
            list(CERT_CHAIN)?
        } else {
            Vec::new()
        };
        let mut roots = read(dir, ROOT_CERT)?;
        let own_roots =
            TrustBundle::from_pem(td.clone(), &roots).map_err(|error| fault(ROOT_CERT, error.to_string()))?;
        check_path(&certificate, &chain, own_roots.roots()).map_err(|(name, cause)| fault(name, cause))?;
        if let Some(extra) = read_optional(dir, EXTRA_ROOTS)? {
            certificates_from_pem(&extra).map_err(|error| fault(EXTRA_ROOTS, error.to_string()))?;
            roots.push('\n');
            roots.push_str(&extra);
        }
        let bundle = TrustBundle::from_pem(td.clone(), &roots)
            .map_err(|error| fault(EXTRA_ROOTS, error.to_string()))?;

        let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
        let mut begun = seconds(parsed.validity().not_before);
        for other in &chain {
            let parsed = parse(other).map_err(|cause| fault(CERT_CHAIN, cause))?;
            begun = begun.max(seconds(parsed.validity().not_before));
        }
        let not_after = seconds(parsed.validity().not_after);
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(|error| fault(CA_CERT, error.to_string()))?;
        let certificate = certificate.clone();
        Ok(Self {
            issuer,
            certificate,
            not_after,
            begun,
            chain,
            bundle,
        })
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    X509Certificate::from_der(certificate)
        .map(|(_, parsed)| parsed)
        .map_err(|error| error.to_string())
}

/// True if the key of `signer` signed the certificate.
pub(crate) fn is_signed_by(certificate: &CertificateDer<'_>, signer: &CertificateDer<'_>) -> bool {
    let (Ok(certificate), Ok(signer)) = (parse(certificate), parse(signer)) else {
        return false;
    };
    // The name first: it costs nothing.
    certificate.issuer().as_raw() == signer.subject().as_raw()
        && certificate.verify_signature(Some(signer.public_key())).is_ok()
}

/// Organization and common name of a certificate that has one of each.
pub(crate) fn names_of(certificate: &CertificateDer<'_>) -> Option<(String, String)> {
    let parsed = parse(certificate).ok()?;
    let organization = parsed.subject().iter_organization().next()?.as_str().ok()?;
    let common = parsed.subject().iter_common_name().next()?.as_str().ok()?;
    Some((organization.to_owned(), common.to_owned()))
}

fn check_signer(certificate: &X509Certificate<'_>) -> Result<(), &'static str> {
    let constraints = certificate
        .basic_constraints()
        .map_err(|_| "its basic constraints are damaged")?;
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err("it is not a CA certificate (basic constraints CA:TRUE)");
    }
    let usage = certificate.key_usage().map_err(|_| "its key usage is damaged")?;
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err("its key usage does not allow it to sign certificates (keyCertSign)");
    }
    Ok(())
}

/// PKCS#8, PKCS#1 or SEC1. Never says anything of the content.
fn read_key(pem: &str) -> Result<KeyPair, &'static str> {
    if pem.contains("ENCRYPTED") {
        return Err("it is encrypted; decrypt it first: openssl pkey -in ca-key.pem -out plain.pem");
    }
    let der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| "it is not a PEM private key")?;
    KeyPair::try_from(&der).map_err(|_| "it is not an RSA, ECDSA or Ed25519 private key")
}

/// Walks from the signing certificate to a root; at a gap says which file lacks what.
fn check_path(
    certificate: &CertificateDer<'_>,
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
) -> Result<(), (&'static str, String)> {
    if !roots.contains(certificate) && !chain.contains(certificate) {
        return Err((
            CERT_CHAIN,
            format!("it does not hold {CA_CERT}; peers could not follow its signatures to a root"),
        ));
    }
    let mut current = certificate;
    // At most once over the chain: a circle ends too.
    for _ in 0..=chain.len() {
        if roots.contains(current) {
            return Ok(());
        }
        let parsed = parse(current).map_err(|cause| (CERT_CHAIN, cause))?;
        let signed_by = |other: &&CertificateDer<'_>| {
            parse(other).is_ok_and(|other| {
                other.subject().as_raw() == parsed.issuer().as_raw()
                    && parsed.verify_signature(Some(other.public_key())).is_ok()
            })
        };
        if roots.iter().any(|root| signed_by(&root)) {
            return Ok(());
        }
        let next = chain.iter().filter(|other| *other != current).find(signed_by);
        let Some(next) = next else {
            let (subject, issuer) = (parsed.subject().to_string(), parsed.issuer().to_string());
            let file = if parsed.subject().as_raw() == parsed.issuer().as_raw() {
                ROOT_CERT
            } else {
                CERT_CHAIN
            };
            let cause =
                format!("\"{subject}\" is signed by \"{issuer}\", which is neither in it nor in {ROOT_CERT}");
            return Err((file, cause));
        };
        current = next;
    }
    Err((CERT_CHAIN, format!("it does not lead to {ROOT_CERT}")))
}
