use crate::{
    ConnectRefusal, bundle, pem,
    tls::provider,
    verify::{self, Usage},
    workload::is_self_issued,
};
use rustls::{
    CertificateError, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::{Arc, Mutex, PoisonError};
use tombolo_types::SpiffeId;

#[derive(Debug, Default)]
struct Seen {
    /// Checked, but the server has not signed the handshake yet: anybody can replay certificates.
    candidate: Option<String>,
    roots: Option<String>,
    refusal: Option<ConnectRefusal>,
}

/// What came of the last handshake by a pin. Cheap to clone; clones share it.
#[derive(Debug, Clone, Default)]
pub struct PinnedRoots(Arc<Mutex<Seen>>);

impl PinnedRoots {
    /// The certificate that the pin stood for, as PEM; `None` until a server has proven to be discovery.
    pub fn get(&self) -> Option<String> {
        self.lock(|seen| seen.roots.clone())
    }

    /// Why the server was refused; `None` if it was not, or no certificate has come yet.
    pub fn refusal(&self) -> Option<ConnectRefusal> {
        self.lock(|seen| seen.refusal.clone())
    }

    fn lock<T>(&self, read: impl FnOnce(&mut Seen) -> T) -> T {
        read(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Lets in exactly discovery, known only by the pin of its root.
#[derive(Debug)]
pub(crate) struct PinnedServer {
    pin: [u8; 32],
    discovery: SpiffeId,
    seen: PinnedRoots,
}

impl PinnedServer {
    pub(crate) fn new(pin: [u8; 32], discovery: SpiffeId, seen: PinnedRoots) -> Self {
        Self { pin, discovery, seen }
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<String, ConnectRefusal> {
        let pinned: Vec<_> = others
            .iter()
            .filter(|c| bundle::root_pin(c).is_ok_and(|pin| pin == self.pin))
            .collect();
        // The self-signed form is kept for later where both are there: other programs take only that as a root.
        let Some(root) = pinned
            .iter()
            .find(|c| is_self_issued(c))
            .or_else(|| pinned.first())
        else {
            return Err(ConnectRefusal::PinMismatch);
        };
        let ids = verify::spiffe_ids(leaf).map_err(|error| ConnectRefusal::Other(error.to_string()))?;
        let not_discovery = || ConnectRefusal::NotDiscovery {
            seen: ids.iter().map(ToString::to_string).collect(),
        };
        let anchors = [bundle::anchor(root).map_err(|error| ConnectRefusal::Other(error.to_string()))?];
        verify::chain(&anchors, leaf, others, now, Usage::Server)
            .map_err(|error| refusal(error, not_discovery))?;
        if ids.as_slice() != std::slice::from_ref(&self.discovery) {
            return Err(not_discovery());
        }
        Ok(pem::certificates_to_pem([*root]))
    }
}

/// The reasons that a user can act on; the rest in the verifier's words.
fn refusal(error: Error, not_discovery: impl FnOnce() -> ConnectRefusal) -> ConnectRefusal {
    #[allow(clippy::wildcard_enum_match_arm, reason = "rustls's lists are open")]
    match error {
        Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => {
            ConnectRefusal::Expired {
                server_not_after: not_after.as_secs(),
                now: time.as_secs(),
            }
        }
        Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => {
            ConnectRefusal::NotYetValid {
                server_not_before: not_before.as_secs(),
                now: time.as_secs(),
            }
        }
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            ConnectRefusal::PinMismatch
        }
        Error::InvalidCertificate(CertificateError::InvalidPurposeContext { .. }) => not_discovery(),
        other => ConnectRefusal::Other(other.to_string()),
    }
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let checked = self.check(leaf, others, now);
        self.seen.lock(|seen| match checked {
            Ok(roots) => {
                *seen = Seen {
                    candidate: Some(roots),
                    roots: None,
                    refusal: None,
                };
                Ok(ServerCertVerified::assertion())
            }
            Err(refusal) => {
                *seen = Seen {
                    candidate: None,
                    roots: None,
                    refusal: Some(refusal.clone()),
                };
                Err(refusal.into())
            }
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &provider().signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let valid = verify_tls13_signature(
            message,
            certificate,
            signature,
            &provider().signature_verification_algorithms,
        );
        self.seen.lock(|seen| match valid {
            Ok(_) => seen.roots = seen.candidate.take(),
            // A stranger with copies of discovery's certificates.
            Err(_) => {
                *seen = Seen {
                    refusal: Some(ConnectRefusal::PinMismatch),
                    ..Seen::default()
                }
            }
        });
        valid
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
