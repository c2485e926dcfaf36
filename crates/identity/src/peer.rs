use crate::{
    Current, IdentityError,
    serial::{device_of, unsigned},
    verify::{self, Usage},
    workload::validity,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::time::Duration;
use tombolo_types::{DeviceId, SpiffeId};

/// Who is on the other side of a finished handshake.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its identity: the first parsable SPIFFE id. The handshake proved this one (a client that found a later id in
    /// its list of expected ones proved that one).
    pub id: SpiffeId,
    /// Every parsable SPIFFE id. Those of another trust domain than `id`'s are only said, not proven.
    pub ids: Vec<SpiffeId>,
    /// The device that the serial number names; meaningful for certificates of our CA.
    pub device: Option<DeviceId>,
    /// Serial number, unsigned big-endian without leading zeros.
    pub serial: Vec<u8>,
    /// End of validity, Unix seconds.
    pub not_after: u64,
    /// The presented chain, its certificate first: kept to check it again when roots change.
    pub chain: Vec<CertificateDer<'static>>,
}

/// Reads who presented a chain. It checks nothing: call it after a handshake that did.
///
/// # Errors
/// When the chain is empty, unreadable, or carries no SPIFFE id.
pub fn peer_of(chain: &[CertificateDer<'_>]) -> Result<Peer, IdentityError> {
    let leaf = chain.first().ok_or(IdentityError::NoIdentity)?;
    let ids = verify::spiffe_ids(leaf)?;
    let id = ids.first().cloned().ok_or(IdentityError::NoIdentity)?;
    let certificate = webpki::EndEntityCert::try_from(leaf)
        .map_err(|error| IdentityError::Certificate(error.to_string()))?;
    let serial = unsigned(certificate.serial()).to_vec();
    let (_, not_after) = validity(leaf)?;
    let chain = chain
        .iter()
        .map(|certificate| certificate.clone().into_owned())
        .collect();
    Ok(Peer {
        id,
        ids,
        device: device_of(&serial),
        serial,
        not_after,
        chain,
    })
}

/// Whether the roots of now still vouch for a peer that an older set of roots let in. Retired roots do, and a name that
/// the trust domain had counts still.
///
/// A certificate that has expired while its connection lived does not count against it, as it does not on any live
/// connection: only the roots are in question. An unreadable chain is not trusted.
pub fn still_trusted(current: &Current, chain: &[CertificateDer<'_>], now_unix: u64) -> bool {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return false;
    };
    let ends = chain
        .iter()
        .map(|certificate| validity(certificate).map(|(_, not_after)| not_after));
    let Ok(first_end) = ends
        .collect::<Result<Vec<_>, _>>()
        .map(|ends| ends.into_iter().min().unwrap_or(0))
    else {
        return false;
    };
    let Some(id) = verify::spiffe_ids(leaf)
        .ok()
        .and_then(|ids| ids.into_iter().next())
    else {
        return false;
    };
    let Some(bundle) = current.once(&id.trust_domain) else {
        return false;
    };
    let when = UnixTime::since_unix_epoch(Duration::from_secs(now_unix.min(first_end)));
    verify::chain(bundle.once(), leaf, intermediates, when, Usage::Any).is_ok()
}

/// Whether the CA that signs now, the first root of the own bundle, signed the certificate in use. While a root is
/// exchanged one that did not is renewed early: its root goes soon. True where there is no certificate.
pub fn is_of_first_root(current: &Current) -> bool {
    let Some(identity) = &current.identity else {
        return true;
    };
    let first = current
        .bundle(&identity.id().trust_domain)
        .and_then(|bundle| bundle.anchors().first());
    let (Some(first), Some((leaf, others))) = (first, identity.chain().split_first()) else {
        return true;
    };
    let middle = identity.not_before() + (identity.not_after() - identity.not_before()) / 2;
    let when = UnixTime::since_unix_epoch(Duration::from_secs(middle));
    verify::chain(std::slice::from_ref(first), leaf, others, when, Usage::Any).is_ok()
}

/// Whether the certificate in use is for the name that certificates of its trust domain are made for now. While a trust
/// domain is renamed one that is not is renewed early: its name goes soon. True where there is no certificate.
pub fn is_of_signing_name(current: &Current) -> bool {
    let Some(identity) = &current.identity else {
        return true;
    };
    let held = &identity.id().trust_domain;
    let mut all = current.bundles.iter();
    !all.any(|bundle| bundle.also().contains(held) || bundle.former().contains(held))
}
