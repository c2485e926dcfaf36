use rustls::{CertificateError, Error, OtherError};
use std::{error::Error as StdError, io, sync::Arc};
use tombolo_types::{Code, SpiffeId};

/// Why a peer's certificate was refused although (or before) its chain was sound. It travels inside
/// [`rustls::CertificateError::Other`]; [`Self::find`] gets it back. The peer is sent `certificate_unknown`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerRefusal {
    /// No parsable SPIFFE id.
    #[error("its certificate carries no workload identity")]
    NoIdentity,
    /// An id of a trust domain that no bundle is there for.
    #[error("it is {seen}, of a trust domain that this mesh does not know")]
    UnknownTrustDomain {
        /// What it says it is; nobody vouched for it.
        seen: SpiffeId,
    },
    /// Sound, but somebody else.
    #[error("it is {}, expected {}", list(seen), list(expected))]
    WrongIdentity {
        /// Any of these would have done.
        expected: Vec<SpiffeId>,
        /// What it is; the first is vouched for.
        seen: Vec<SpiffeId>,
    },
}

impl PeerRefusal {
    /// Finds it in a TLS error, an `io::Error` around one, or any error that has one of them as its source.
    pub fn find<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        find(error)
    }
}

impl From<PeerRefusal> for Error {
    fn from(refusal: PeerRefusal) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
    }
}

/// Why the first connection to discovery, by the pin of a join token, was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectRefusal {
    /// No certificate of the pinned key, or its key did not sign what was presented.
    #[error("the root certificate of the server is not the one that the token pins")]
    PinMismatch,
    /// A certificate of the pinned root, but not discovery's.
    #[error("the server is {}, not discovery", if seen.is_empty() { "nobody of this mesh".to_owned() } else { seen.join(", ") })]
    NotDiscovery {
        /// The identities in its certificate.
        seen: Vec<String>,
    },
    /// Past its end by the clock of this host.
    #[error(
        "the clock of this host says {}, the server's certificate ended at {}", utc(*now), utc(*server_not_after)
    )]
    Expired {
        /// Unix seconds.
        server_not_after: u64,
        /// This host's clock, Unix seconds.
        now: u64,
    },
    /// Before its beginning by the clock of this host.
    #[error(
        "the clock of this host says {}, the server's certificate begins at {}", utc(*now), utc(*server_not_before)
    )]
    NotYetValid {
        /// Unix seconds.
        server_not_before: u64,
        /// This host's clock, Unix seconds.
        now: u64,
    },
    /// Anything else that is wrong with the certificates.
    #[error("the server's certificate is not usable: {0}")]
    Other(String),
}

impl ConnectRefusal {
    /// The code that the user sees. What is not usable at all cannot be the server of the token either.
    pub fn code(&self) -> Code {
        match self {
            Self::PinMismatch | Self::Other(_) => Code::PinMismatch,
            Self::NotDiscovery { .. } => Code::NotDiscovery,
            Self::Expired { .. } | Self::NotYetValid { .. } => Code::ClockSkew,
        }
    }

    /// Finds it in a TLS error, an `io::Error` around one, or any error that has one of them as its source.
    pub fn find<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        find(error)
    }
}

impl From<ConnectRefusal> for Error {
    fn from(refusal: ConnectRefusal) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
    }
}

/// A time as people and programs read it: RFC 3339, UTC, whole seconds.
pub fn utc(unix_seconds: u64) -> String {
    let time = i64::try_from(unix_seconds)
        .ok()
        .and_then(|seconds| x509_parser::time::ASN1Time::from_timestamp(seconds).ok())
        .map(|time| time.to_datetime());
    time.map_or_else(
        || format!("{unix_seconds} s after 1970"),
        |t| {
            let (month, day) = (u8::from(t.month()), t.day());
            let (hour, minute, second) = t.to_hms();
            format!(
                "{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z",
                t.year()
            )
        },
    )
}

fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    // Error chains are short; the bound only guards against one that is its own source.
    for _ in 0..16 {
        let error = next?;
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        if let Some(Error::InvalidCertificate(CertificateError::Other(OtherError(inner)))) =
            error.downcast_ref()
            && let Some(found) = inner.downcast_ref::<T>()
        {
            return Some(found);
        }
        // io::Error passes over what it wraps when it is asked for its source.
        next = match error.downcast_ref::<io::Error>() {
            Some(io) => io
                .get_ref()
                .map(|inner| -> &'a (dyn StdError + 'static) { inner }),
            None => error.source(),
        };
    }
    None
}

fn list(ids: &[SpiffeId]) -> String {
    if ids.is_empty() {
        return "nobody".to_owned();
    }
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_readable() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(1_767_225_599), "2025-12-31T23:59:59Z");
        assert_eq!(utc(u64::MAX), "18446744073709551615 s after 1970");
        let refusal = ConnectRefusal::NotYetValid {
            server_not_before: 3_600,
            now: 0,
        };
        let text = refusal.to_string();
        assert!(
            text.contains("1970-01-01T00:00:00Z") && text.contains("1970-01-01T01:00:00Z"),
            "{text}"
        );
    }

    #[test]
    fn refusals_are_found_through_wrappers() {
        let tls: Error = PeerRefusal::NoIdentity.into();
        assert_eq!(PeerRefusal::find(&tls), Some(&PeerRefusal::NoIdentity));
        assert_eq!(ConnectRefusal::find(&tls), None);
        let wrapped = io::Error::other(io::Error::other(tls));
        assert_eq!(PeerRefusal::find(&wrapped), Some(&PeerRefusal::NoIdentity));
        assert_eq!(
            PeerRefusal::find(&io::Error::from(io::ErrorKind::UnexpectedEof)),
            None
        );
    }
}
