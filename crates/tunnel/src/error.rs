use h2::Reason;
use std::{io, sync::Arc, time::Duration};
use tombolo_identity::PeerRefusal;

/// Why a TLS connection was not made. Cheap to clone: all who waited for one connection are told.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The peer's certificate was refused by us.
    #[error("the peer's certificate was refused: {0}")]
    Peer(PeerRefusal),
    /// The peer refused ours, or the handshake: its alert.
    #[error("the peer refused the handshake: alert {0:?}")]
    Alert(rustls::AlertDescription),
    /// Another failure.
    #[error("{0}")]
    Protocol(rustls::Error),
    /// No certificate of our own yet.
    #[error("this host has no certificate yet")]
    NoIdentity,
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        if let rustls::Error::AlertReceived(alert) = error {
            return Self::Alert(alert);
        }
        match PeerRefusal::find(&error) {
            Some(refusal) => Self::Peer(refusal.clone()),
            None => Self::Protocol(error),
        }
    }
}

impl TlsError {
    /// A metric label.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Peer(_) => "wrong_peer",
            Self::Alert(_) => "alert",
            Self::Protocol(_) => "protocol",
            Self::NoIdentity => "no_identity",
        }
    }
}

/// Why a stream was not opened.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// TCP: refused, unreachable, reset.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// TLS.
    #[error("TLS: {0}")]
    Tls(TlsError),
    /// The peer answered the CONNECT with another status than 200.
    #[error("the peer answered {0}")]
    Status(u16),
    /// The peer reset the stream before it answered.
    #[error("the peer reset the stream: {0}")]
    Reset(Reason),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The peer broke HTTP/2.
    #[error("HTTP/2: {0}")]
    Protocol(Arc<h2::Error>),
    /// The pool is being drained.
    #[error("this host is shutting down")]
    Draining,
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

impl OpenError {
    /// From an error of a stream or connection.
    pub(crate) fn from_h2(error: h2::Error) -> Self {
        if error.is_io() {
            return Self::Io(Arc::new(
                error
                    .into_io()
                    .unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
            ));
        }
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Protocol(Arc::new(error)),
        }
    }

    /// True if the peer was never reached or did not answer: another endpoint may, and this one should rest.
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Io(_) | Self::Timeout(_) | Self::Tls(_) | Self::Protocol(_) | Self::Reset(_)
        )
    }

    /// Stable reason: a metric label and log field.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Io(_) => "connect_failed",
            Self::Tls(TlsError::Peer(_)) => "wrong_peer_identity",
            Self::Tls(_) => "tls_failed",
            Self::Status(401) => "denied_by_peer",
            Self::Status(503) => "refused_by_application",
            Self::Status(_) => "refused_by_peer",
            Self::Reset(_) => "stream_reset",
            Self::Timeout(_) => "connect_timeout",
            Self::Protocol(_) => "protocol_error",
            Self::Draining => "draining",
        }
    }
}
