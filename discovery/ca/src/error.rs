use std::{path::PathBuf, time::Duration};
use tombolo_identity::IdentityError;
use tombolo_types::{SpiffeId, TrustDomain};

/// Why a certificate was not issued, or an authority not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// The request (CSR) is damaged, badly signed, or for a weak key.
    #[error("the certificate request is refused: {0}")]
    Csr(&'static str),
    /// Longer than allowed. It is not shortened silently: the client would renew too late.
    #[error("a life of {} s was asked for, at most {} s are allowed", asked.as_secs(), max.as_secs())]
    Ttl {
        /// What was asked for.
        asked: Duration,
        /// The limit.
        max: Duration,
    },
    /// A setting outside 1 h to 7 d, or a default above the maximum.
    #[error("certificates may live 1 h to 7 d: default {} s, maximum {} s", default.as_secs(), max.as_secs())]
    TtlLimits {
        /// The default that was set.
        default: Duration,
        /// The maximum that was set.
        max: Duration,
    },
    /// An identity of a reserved namespace, by the ordinary way.
    #[error("{0} lies in a reserved namespace")]
    Reserved(SpiffeId),
    /// An identity that is not one of the system's, by the system's way.
    #[error("{0} is not discovery or a gateway of this trust domain")]
    NotSystem(SpiffeId),
    /// An identity of another trust domain.
    #[error("{id} is not of the trust domain {ours}")]
    ForeignTrustDomain {
        /// The identity that was asked for.
        id: SpiffeId,
        /// The authority's trust domain.
        ours: TrustDomain,
    },
    /// A DNS name or identity that does not fit a certificate.
    #[error("{0:?} cannot stand in a certificate")]
    Name(String),
    /// The signing certificate has ended.
    #[error("the signing certificate of the authority has expired. Next: tombolo trust rotate, or renew {path}", path = .0.display())]
    SignerExpired(PathBuf),
    /// The signing operation failed.
    #[error("signing failed: {0}")]
    Signing(String),
    /// The folder is not empty: an authority is never overwritten.
    #[error("{} holds an authority or other files already; nothing was changed", .0.display())]
    AlreadyExists(PathBuf),
    /// The private key can be read by others.
    #[error("{} can be read by others (mode {mode:04o}). Next: chmod 0600 {}", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file is missing, unreadable, or does not fit the others.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong with it; never its content.
        cause: String,
    },
    /// The authority belongs to another trust domain.
    #[error("{} is the authority of {found}, not of {wanted}", path.display())]
    WrongTrustDomain {
        /// The folder.
        path: PathBuf,
        /// Whose authority it is.
        found: String,
        /// Whose was wanted.
        wanted: TrustDomain,
    },
    /// A certificate just issued could not be read back.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl CaError {
    /// True if the request is at fault and repeating it is useless: INVALID_ARGUMENT over gRPC, where istiod says the
    /// same. False is the authority's own trouble.
    pub fn is_request(&self) -> bool {
        matches!(
            self,
            Self::Csr(_)
                | Self::Ttl { .. }
                | Self::Reserved(_)
                | Self::NotSystem(_)
                | Self::ForeignTrustDomain { .. }
                | Self::Name(_)
        )
    }
}
