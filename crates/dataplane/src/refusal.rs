//! The one table of what a refusal means to whom.

use http::StatusCode;
use tombolo_capture::Refusal;
use tombolo_tunnel::{Ended, OpenError, TlsError};
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

/// Why a stream was not opened, as a refusal.
pub(crate) fn reject_of(error: &OpenError) -> Reject {
    let class = match error {
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
    Reject::new(class, error.reason()).with_detail(error)
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
            let shown = shown(&reject_of(&error));
            assert_eq!((shown.flag, shown.refusal), (flag, refusal), "{error}");
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
