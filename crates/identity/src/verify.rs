//! Chain and name checks, shared by every verifier.

use crate::{Current, IdentityError, PeerRefusal};
use rustls::{CertificateError, Error, ExtendedKeyPurpose, OtherError};
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use std::{cell::Cell, sync::Arc};
use tombolo_types::SpiffeId;
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage};

/// id-kp-serverAuth and id-kp-clientAuth, the content of their OBJECT IDENTIFIERs. Source: RFC 5280 4.2.1.12.
const SERVER_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01];
const CLIENT_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02];

/// What the peer's certificate must be good for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Usage {
    Server,
    Client,
    /// Was checked when the connection was made.
    Any,
}

/// Demands the usage in the certificate itself; a CA certificate only may not exclude it (webpki asks about each
/// certificate of a path in turn, the peer's own first, and does not say which it is).
struct StrictLeaf {
    usage: Usage,
    leaf_seen: Cell<bool>,
}

impl ExtendedKeyUsageValidator for StrictLeaf {
    fn validate(&self, usages: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let leaf = !self.leaf_seen.replace(true);
        let oid = match self.usage {
            Usage::Server => SERVER_AUTH,
            Usage::Client => CLIENT_AUTH,
            Usage::Any => return Ok(()),
        };
        if leaf {
            KeyUsage::required(oid).validate(usages)
        } else {
            KeyUsage::required_if_present(oid).validate(usages)
        }
    }
}

/// Builds a path from `leaf` over any of `intermediates` (in any order) to one of `anchors`.
pub(crate) fn chain(
    anchors: &[TrustAnchor<'_>],
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    usage: Usage,
) -> Result<(), Error> {
    let certificate = EndEntityCert::try_from(leaf).map_err(tls_error)?;
    let usage = StrictLeaf {
        usage,
        leaf_seen: Cell::new(false),
    };
    certificate
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            anchors,
            intermediates,
            now,
            usage,
            None,
            None,
        )
        .map(|_path| ())
        .map_err(tls_error)
}

/// Every parsable SPIFFE id of a certificate in its order. Other URIs are passed over.
pub(crate) fn spiffe_ids(leaf: &CertificateDer<'_>) -> Result<Vec<SpiffeId>, IdentityError> {
    let certificate =
        EndEntityCert::try_from(leaf).map_err(|error| IdentityError::Certificate(error.to_string()))?;
    Ok(certificate
        .valid_uri_names()
        .filter_map(|uri| uri.parse().ok())
        .collect())
}

/// Checks a peer: which identity it shows, and that a root of that identity's own trust domain vouches for it.
///
/// With `expected` one of the peer's ids must be in the list, and it is that one whose trust domain must vouch: a
/// second URI of a foreign trust domain never borrows the first one's root. Where bundles say that a trust domain has
/// several names, the same workload under another one of them is as good.
pub(crate) fn peer(
    current: &Current,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    usage: Usage,
    expected: Option<&[SpiffeId]>,
) -> Result<(), Error> {
    let ids = spiffe_ids(leaf).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let Some(first) = ids.first() else {
        return Err(PeerRefusal::NoIdentity.into());
    };
    let vouched = |id: &SpiffeId| match current.bundle(&id.trust_domain) {
        None => Err(PeerRefusal::UnknownTrustDomain { seen: id.clone() }.into()),
        Some(bundle) => chain(bundle.anchors(), leaf, intermediates, now, usage),
    };
    let Some(expected) = expected else {
        return vouched(first);
    };
    let mut refused = None;
    let is_expected = |id: &&SpiffeId| expected.iter().any(|one| current.is_same(one, id));
    for id in ids.iter().filter(is_expected) {
        match vouched(id) {
            Ok(()) => return Ok(()),
            Err(error) => refused = Some(error),
        }
    }
    if let Some(error) = refused {
        return Err(error);
    }
    // The chain comes first: an id that nobody vouches for is not worth telling.
    vouched(first)?;
    Err(PeerRefusal::WrongIdentity {
        expected: expected.to_vec(),
        seen: ids,
    }
    .into())
}

/// webpki's verdict as rustls says it, so that the peer gets the fitting alert.
pub(crate) fn tls_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "webpki's list is open and most of it concerns CRLs"
    )]
    let certificate = match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::InvalidCertValidity => CertificateError::Expired,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::RequiredEkuNotFoundContext(context) => CertificateError::InvalidPurposeContext {
            required: purpose(context.required.oid_values().collect()),
            presented: context.present.into_iter().map(purpose).collect(),
        },
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    Error::InvalidCertificate(certificate)
}

fn purpose(oid: Vec<usize>) -> ExtendedKeyPurpose {
    match oid.as_slice() {
        KeyUsage::SERVER_AUTH_REPR => ExtendedKeyPurpose::ServerAuth,
        KeyUsage::CLIENT_AUTH_REPR => ExtendedKeyPurpose::ClientAuth,
        _ => ExtendedKeyPurpose::Other(oid),
    }
}
