//! The one table of what a refusal means to whom.

use crate::through::gateway_reason;
use http::StatusCode;
use tombolo_capture::Refusal;
use tombolo_tunnel::{Ended, OpenError, ThroughError, TlsError};
use tombolo_types::{Reject, RejectClass};

/// What a class of refusal looks like from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Answer to a CONNECT. Source: ztunnel.
    pub(crate) status: StatusCode,
    /// Envoy's response flag.
    pub(crate) flag: &'static str,
    /// What the application's connect() reads.
    pub(crate) refusal: Refusal,
}

/// The table.
pub(crate) fn shown(reject: &Reject) -> Shown {
    let (status, flag, refusal) = match reject.class {
        RejectClass::Local => (StatusCode::SERVICE_UNAVAILABLE, "UF", Refusal::Reset),
        RejectClass::PeerMisbehaved => (StatusCode::BAD_REQUEST, "UPE", Refusal::Reset),
        RejectClass::PeerIncompatible => (StatusCode::BAD_REQUEST, "UPE", Refusal::Reset),
        RejectClass::PolicyDenied => (StatusCode::UNAUTHORIZED, "UAEX", Refusal::Reset),
        RejectClass::NoRoute => (StatusCode::SERVICE_UNAVAILABLE, "NR", Refusal::Reset),
        RejectClass::UpstreamUnhealthy => match reject.reason {
            // Somebody is there and says no.
            "refused_by_application" => (StatusCode::SERVICE_UNAVAILABLE, "UF", Refusal::Reset),
            "no_healthy_endpoint" | "no_valid_destination" => {
                (StatusCode::SERVICE_UNAVAILABLE, "UH", Refusal::HostUnreachable)
            }
            _ => (StatusCode::SERVICE_UNAVAILABLE, "UF", Refusal::HostUnreachable),
        },
        RejectClass::ControlPlaneStale => (StatusCode::SERVICE_UNAVAILABLE, "NC", Refusal::HostUnreachable),
        RejectClass::Overload => (StatusCode::SERVICE_UNAVAILABLE, "UO", Refusal::Reset),
    };
    Shown {
        status,
        flag,
        refusal,
    }
}

/// Why a candidate did not take a call.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// One of the own network.
    #[error(transparent)]
    Direct(#[from] OpenError),
    /// One behind gateways.
    #[error(transparent)]
    Through(ThroughError),
}

impl CallError {
    /// The error, whoever it came from.
    pub fn open_error(&self) -> Option<&OpenError> {
        match self {
            Self::Direct(error) => Some(error),
            Self::Through(ThroughError::Gateway(error) | ThroughError::Endpoint(error)) => Some(error),
            Self::Through(_) => None,
        }
    }

    /// A policy has decided: another endpoint is not asked.
    pub(crate) fn is_denial(&self) -> bool {
        matches!(self.open_error(), Some(OpenError::Status(401)))
    }

    /// Nothing was heard in time; with more patience it may be.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(self.open_error(), Some(OpenError::Timeout(_)))
    }
}

/// Why a stream was not opened, as a refusal.
pub(crate) fn reject_of(error: &CallError) -> Reject {
    let (cause, reason) = match error {
        CallError::Direct(cause) | CallError::Through(ThroughError::Endpoint(cause)) => {
            (cause, cause.reason())
        }
        CallError::Through(ThroughError::Gateway(cause)) => (cause, gateway_reason(cause)),
        CallError::Through(_) => return Reject::new(RejectClass::Local, "unknown").with_detail(error),
    };
    let class = match cause {
        OpenError::Status(401) => RejectClass::PolicyDenied,
        OpenError::Status(400) => RejectClass::PeerIncompatible,
        OpenError::Tls(TlsError::Peer(_)) => RejectClass::PeerMisbehaved,
        OpenError::Draining => RejectClass::Overload,
        OpenError::Io(_)
        | OpenError::Tls(_)
        | OpenError::Status(_)
        | OpenError::Reset(_)
        | OpenError::Timeout(_)
        | OpenError::Protocol(_)
        | _ => RejectClass::UpstreamUnhealthy,
    };
    Reject::new(class, reason).with_detail(error)
}

/// Flag and reason of a connection that has been open; `client_is_local`: the application here has connected.
pub(crate) fn ended(ended: &Ended, client_is_local: bool) -> (&'static str, &'static str) {
    match (ended, client_is_local) {
        (Ended::Complete, _) => ("-", ""),
        (Ended::ApplicationReset(_), true) => ("DC", "client_reset"),
        (Ended::ApplicationReset(_), false) => ("UC", "application_reset"),
        (Ended::PeerReset(_), true) => ("UC", "peer_reset"),
        (Ended::PeerReset(_), false) => ("DC", "client_reset"),
        (Ended::PeerLost, true) => ("UC", "peer_lost"),
        (Ended::PeerLost, false) => ("DC", "client_lost"),
        // Whoever cuts says why; this is for what comes unsaid.
        _ => ("UAEX", "cut"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io, sync::Arc, time::Duration};

    #[test]
    fn what_applications_and_peers_read() {
        let io = |kind: io::ErrorKind| OpenError::Io(Arc::new(kind.into()));
        for (error, flag, refusal) in [
            (OpenError::Status(401), "UAEX", Refusal::Reset),
            (OpenError::Status(503), "UF", Refusal::Reset),
            (OpenError::Status(400), "UPE", Refusal::Reset),
            (
                io(io::ErrorKind::ConnectionRefused),
                "UF",
                Refusal::HostUnreachable,
            ),
            (OpenError::Timeout(Duration::ZERO), "UF", Refusal::HostUnreachable),
            (
                OpenError::Tls(TlsError::NoIdentity),
                "UF",
                Refusal::HostUnreachable,
            ),
        ] {
            let shown = shown(&reject_of(&error.clone().into()));
            assert_eq!((shown.flag, shown.refusal), (flag, refusal), "{error}");
        }
        // An endpoint behind a gateway is heard like any; a gateway that says no is not the application.
        for (error, reason, refusal) in [
            (
                ThroughError::Endpoint(OpenError::Status(503)),
                "refused_by_application",
                Refusal::Reset,
            ),
            (
                ThroughError::Endpoint(OpenError::Status(401)),
                "denied_by_peer",
                Refusal::Reset,
            ),
            (
                ThroughError::Gateway(OpenError::Status(401)),
                "denied_by_gateway",
                Refusal::Reset,
            ),
            (
                ThroughError::Gateway(OpenError::Status(503)),
                "refused_by_gateway",
                Refusal::HostUnreachable,
            ),
            (
                ThroughError::Gateway(io(io::ErrorKind::ConnectionRefused)),
                "gateway_unreachable",
                Refusal::HostUnreachable,
            ),
        ] {
            let reject = reject_of(&CallError::Through(error));
            assert_eq!((reject.reason, shown(&reject).refusal), (reason, refusal));
        }
        let unknown = shown(&Reject::new(RejectClass::NoRoute, "unknown_port"));
        assert_eq!((unknown.flag, unknown.refusal), ("NR", Refusal::Reset));
        let nobody = shown(&Reject::new(
            RejectClass::UpstreamUnhealthy,
            "no_healthy_endpoint",
        ));
        assert_eq!((nobody.flag, nobody.refusal), ("UH", Refusal::HostUnreachable));
        assert_eq!(
            shown(&Reject::new(RejectClass::PolicyDenied, "x")).status,
            StatusCode::UNAUTHORIZED
        );
    }
}
