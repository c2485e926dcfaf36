use crate::{IdentityError, pem};
use aws_lc_rs::digest;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use std::fmt;
use tombolo_types::TrustDomain;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The roots that may vouch for identities of one trust domain. Several are live at once while a root is exchanged.
///
/// The first root is the one whose CA signs now. A retired root lets nobody in any more; connections that it let in run
/// on. In a text it is a block `RETIRED CERTIFICATE`, which every reader of certificates passes over: whoever does not
/// know retired roots does not believe them.
#[derive(Clone, PartialEq, Eq)]
pub struct TrustBundle {
    trust_domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    retired: Vec<CertificateDer<'static>>,
    /// Anchors, then the retired ones.
    once: Vec<TrustAnchor<'static>>,
    also: Vec<TrustDomain>,
    former: Vec<TrustDomain>,
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pins: Vec<_> = self
            .roots
            .iter()
            .filter_map(|root| root_pin(root).ok())
            .map(|pin| hex(&pin))
            .collect();
        f.debug_struct("TrustBundle")
            .field("trust_domain", &self.trust_domain)
            .field("roots", &pins)
            .field("retired", &self.retired.len())
            .field("also", &self.also)
            .field("former", &self.former)
            .finish()
    }
}

impl TrustBundle {
    /// Reads one or more concatenated certificates, and retired ones if there are any; repeated ones count once. What is
    /// a root is not retired.
    ///
    /// # Errors
    /// When there is no certificate, or one that cannot be a trust anchor.
    pub fn from_pem(trust_domain: TrustDomain, pem: &str) -> Result<Self, IdentityError> {
        let mut bundle = Self {
            trust_domain,
            roots: Vec::new(),
            anchors: Vec::new(),
            retired: Vec::new(),
            once: Vec::new(),
            also: Vec::new(),
            former: Vec::new(),
        };
        for root in pem::certificates_from_pem(pem)? {
            if bundle.roots.contains(&root) {
                continue;
            }
            bundle.anchors.push(anchor(&root)?);
            bundle.roots.push(root);
        }
        bundle.once.clone_from(&bundle.anchors);
        for root in pem::retired_from_pem(pem)? {
            if bundle.roots.contains(&root) || bundle.retired.contains(&root) {
                continue;
            }
            bundle.once.push(anchor(&root)?);
            bundle.retired.push(root);
        }
        Ok(bundle)
    }

    /// Says which other names this trust domain has, and which it had. An identity of another name is the same workload
    /// as that of this one, wherever an identity is expected; its own bundle vouches for it. Former names let nobody in,
    /// and connections that they let in run on.
    #[must_use]
    pub fn with_names(mut self, also: Vec<TrustDomain>, former: Vec<TrustDomain>) -> Self {
        (self.also, self.former) = (also, former);
        self
    }

    /// Adds retired roots, the certificates of a text. What is a root stays one.
    ///
    /// # Errors
    /// As [`Self::from_pem`].
    pub fn with_retired(self, pem: &str) -> Result<Self, IdentityError> {
        let roots = pem::certificates_from_pem(pem)?;
        let text = format!("{}{}", self.to_pem(), pem::retired_to_pem(&roots));
        let Self { also, former, .. } = self;
        Ok(Self::from_pem(self.trust_domain, &text)?.with_names(also, former))
    }

    /// Whose identities these roots vouch for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Other names of the same trust domain. Set on the name that certificates are made for now.
    pub fn also(&self) -> &[TrustDomain] {
        &self.also
    }

    /// Names that the trust domain had.
    pub fn former(&self) -> &[TrustDomain] {
        &self.former
    }

    /// The same roots for another name, which has no names beside it.
    #[must_use]
    pub fn named(&self, trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            also: Vec::new(),
            former: Vec::new(),
            ..self.clone()
        }
    }

    /// The roots in the order they were given.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Roots that let nobody in any more, while connections that they let in run on.
    pub fn retired(&self) -> &[CertificateDer<'static>] {
        &self.retired
    }

    /// All roots, concatenated; then the retired ones as blocks of their own kind.
    pub fn to_pem(&self) -> String {
        let mut text = pem::certificates_to_pem(&self.roots);
        text.push_str(&pem::retired_to_pem(&self.retired));
        text
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// What may have let a live connection in.
    pub(crate) fn once(&self) -> &[TrustAnchor<'static>] {
        &self.once
    }
}

pub(crate) fn anchor(root: &CertificateDer<'_>) -> Result<TrustAnchor<'static>, IdentityError> {
    webpki::anchor_from_trusted_cert(root)
        .map(|anchor| anchor.to_owned())
        .map_err(|error| IdentityError::Certificate(format!("not usable as a root: {error}")))
}

pub(crate) fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IdentityError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => Err(IdentityError::Certificate("bytes follow its end".into())),
        Err(error) => Err(IdentityError::Certificate(error.to_string())),
    }
}

/// SHA-256 of the certificate's SubjectPublicKeyInfo: what a join token pins.
///
/// A root keeps its pin when it is issued again or cross-signed with the same key. The same value as
/// `openssl x509 -pubkey -noout | openssl pkey -pubin -outform der | sha256sum`.
///
/// # Errors
/// When it is not a certificate.
pub fn root_pin(cert: &CertificateDer<'_>) -> Result<[u8; 32], IdentityError> {
    let parsed = parse(cert)?;
    let mut pin = [0; 32];
    pin.copy_from_slice(digest::digest(&digest::SHA256, parsed.tbs_certificate.subject_pki.raw).as_ref());
    Ok(pin)
}

/// What people want to know of a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootFacts {
    /// Distinguished name.
    pub subject: String,
    /// Unix seconds.
    pub not_before: u64,
    /// Unix seconds.
    pub not_after: u64,
}

/// Reads them.
///
/// # Errors
/// When it is no certificate.
pub fn root_facts(certificate: &CertificateDer<'_>) -> Result<RootFacts, IdentityError> {
    let (not_before, not_after) = crate::workload::validity(certificate)?;
    let subject = parse(certificate)?.subject().to_string();
    Ok(RootFacts {
        subject,
        not_before,
        not_after,
    })
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
