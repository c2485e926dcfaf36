//! The hops that are dialled: gateway, the endpoint's TLS, its application.

use super::{Walk, list, network, plain};
use std::time::Duration;
use tombolo_dataplane::{CallError, GatewayTry, ProbeResult};
use tombolo_destination::{Candidate, Tunnel};
use tombolo_snapshot::Snapshot;
use tombolo_tunnel::{OpenError, ThroughError, TlsError};
use tombolo_types::{Code, networks};

/// All endpoints are tried at once, each within the data path's own limits.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(15);

/// How far a failure came: the farthest one says most about what is wrong.
fn progress(error: &CallError) -> u8 {
    let far = |error: &OpenError| {
        if matches!(error, OpenError::Status(_)) {
            3
        } else if matches!(error, OpenError::Reset(_) | OpenError::Protocol(_)) {
            2
        } else if matches!(error, OpenError::Tls(_)) {
            1
        } else {
            0
        }
    };
    match error {
        CallError::Through(ThroughError::Gateway(error)) => far(error),
        CallError::Direct(error) | CallError::Through(ThroughError::Endpoint(error)) => 4 + far(error),
        CallError::Through(_) | _ => 0,
    }
}

/// The gateways that were tried and what they said.
fn tried(gateways: &[GatewayTry]) -> String {
    list(gateways.iter().map(|tried| match &tried.outcome {
        Ok(()) => format!("{}: passes the call on", tried.gateway),
        Err(ThroughError::Gateway(error)) => format!("{}: {error}", tried.gateway),
        Err(error) => format!("{}: passes the call on; then {error}", tried.gateway),
    }))
}

/// The hop before the endpoint's own TLS, where that was reached.
fn passed(walk: &mut Walk, result: &ProbeResult) {
    match &result.candidate.via {
        None => walk.skip("the endpoint is in this network"),
        Some(via) => {
            let session = if networks::is_outbound(&via.network) {
                ", into a session that the endpoint holds with it"
            } else {
                ""
            };
            walk.ok(format!(
                "{}: {}{session}",
                network(&via.network),
                tried(&result.gateways)
            ));
        }
    }
}

/// Where an endpoint is, for people.
fn place(result: &ProbeResult) -> String {
    match &result.candidate.via {
        None => result.candidate.address.to_string(),
        Some(via) => format!("{} in {}", via.authority, network(&via.network)),
    }
}

pub(super) fn peers(walk: &mut Walk, world: &Snapshot, results: &[ProbeResult]) {
    let failures = || {
        results
            .iter()
            .filter_map(|result| Some((result, result.outcome.as_ref().err()?)))
    };
    let accepted: Vec<_> = results.iter().filter(|result| result.outcome.is_ok()).collect();
    if let Some(first) = accepted.first() {
        passed(walk, first);
        let who = first.peer.as_ref().map_or_else(
            || "it is not in the mesh: plain TCP".to_owned(),
            ToString::to_string,
        );
        walk.ok(format!(
            "{} of {} endpoints answer: {who}",
            accepted.len(),
            results.len()
        ));
        let rest = failures().map(|(result, error)| format!("{}: {error}", result.candidate.workload.name));
        let rest = list(rest);
        let rest = if rest.is_empty() {
            String::new()
        } else {
            format!(" (not: {rest})")
        };
        walk.ok(format!("{} accepts the connection{rest}", place(first)));
        return;
    }
    let Some((result, error)) = failures().max_by_key(|(_, error)| progress(error)) else {
        walk.skip("");
        walk.broken(
            Code::EndpointUnreachable,
            format!("no answer within {} s", PROBE_TIMEOUT.as_secs()),
            None,
        );
        return;
    };
    if let CallError::Through(ThroughError::Gateway(error)) = error {
        gateway_failed(walk, result, error);
        return;
    }
    passed(walk, result);
    let all = || {
        list(failures().map(|(r, error)| match r.candidate.via {
            None => format!("{} ({}): {error}", r.candidate.workload.name, r.candidate.hbone),
            Some(_) => format!("{}: {error}", place(r)),
        }))
    };
    match error.open_error() {
        Some(OpenError::Status(code)) => refused(walk, world, result, *code),
        Some(error @ OpenError::Tls(TlsError::NoIdentity)) => {
            walk.broken(Code::CertificateExpired, error.to_string(), None);
        }
        Some(OpenError::Tls(_)) => walk.broken(Code::PeerIdentity, all(), None),
        Some(_) if let Some(why) = guarded(world, result) => {
            let cause = format!("{why}, and {} is dialled in plaintext: {}", place(result), all());
            let next = "Let the endpoint speak for itself in the mesh: enrol it, and select it by labels instead of \
                        writing its address";
            walk.broken(Code::PlaintextRefused, cause, Some(next.to_owned()));
        }
        Some(_) | None => walk.broken(Code::EndpointUnreachable, all(), None),
    }
}

/// Why an endpoint that is dialled in plaintext refuses that, if a policy closes its port.
fn guarded(world: &Snapshot, result: &ProbeResult) -> Option<String> {
    let Candidate {
        workload,
        address,
        via,
        ..
    } = &result.candidate;
    let plaintext = via.is_none() && workload.tunnel == Tunnel::None;
    if !plaintext {
        return None;
    }
    plain::denies_plaintext(world, workload, *address)
}

/// No gateway has passed the call on: that it is not the endpoint's fault is half of the answer.
fn gateway_failed(walk: &mut Walk, result: &ProbeResult, error: &OpenError) {
    let where_to = result
        .candidate
        .via
        .as_ref()
        .map_or_else(String::new, |via| format!("{}: ", network(&via.network)));
    let cause = format!("{where_to}{}", tried(&result.gateways));
    let via = result.candidate.via.as_ref();
    let dials_out = via.is_some_and(|via| networks::is_outbound(&via.network));
    match error {
        OpenError::Status(401 | 403) => {
            let cause = format!("{cause} (the gateway asks the endpoint's policies before it dials)");
            walk.broken(Code::PolicyDenies, cause, None);
        }
        OpenError::Status(_) if dials_out => walk.broken(
            Code::GatewayRefuses,
            format!("{cause} (the endpoint only dials out: it must hold a session with that gateway)"),
            Some(
                "Its log names the reason: journalctl -u tombolo-gateway. On the endpoint: tombolo status lists its \
                 sessions (Reverse:), TMB0315 there says why it has none"
                    .to_owned(),
            ),
        ),
        OpenError::Status(_) => walk.broken(Code::GatewayRefuses, cause, None),
        OpenError::Tls(TlsError::NoIdentity) => {
            walk.broken(Code::CertificateExpired, error.to_string(), None);
        }
        OpenError::Tls(_) => walk.broken(
            Code::PeerIdentity,
            format!("gateway of {cause}"),
            Some(
                "The address was reused, or somebody poses as the gateway: tombolo vm list -n tombolo-system"
                    .to_owned(),
            ),
        ),
        OpenError::Io(_)
        | OpenError::Reset(_)
        | OpenError::Timeout(_)
        | OpenError::Protocol(_)
        | OpenError::Draining
        | _ => walk.broken(Code::GatewayUnreachable, cause, None),
    }
}

/// The endpoint proved itself and said no.
fn refused(walk: &mut Walk, world: &Snapshot, result: &ProbeResult, status: u16) {
    let address = result.candidate.address;
    let place = place(result);
    // A record of another network stands for all endpoints there.
    let name = match result.candidate.via {
        None => result.candidate.workload.name.to_string(),
        Some(_) => "an endpoint".to_owned(),
    };
    let who = result
        .peer
        .as_ref()
        .map_or_else(String::new, |peer| format!(": {peer}"));
    walk.ok(format!("{name} answers{who}"));
    // By address: an endpoint written in a ServiceEntry is another record of the same host.
    let own = result.candidate.via.is_none()
        && world
            .own_workload()
            .is_some_and(|own| own.addresses.contains(&address.ip()));
    let port = address.port();
    let declared = world
        .exposure()
        .is_none_or(|e| e.all_ports || e.ports.iter().any(|p| p.port == port));
    let (code, cause) = match status {
        401 | 403 => {
            let cause = format!(
                "{name} answered {status}: a policy that this host does not see, or sees otherwise, denies"
            );
            (Code::PolicyDenies, cause)
        }
        503 if own && !declared => (
            Code::PortNotDeclared,
            format!("this host itself is the endpoint; port {port}"),
        ),
        503 => {
            let cause =
                format!("{name} answered 503: nothing listens at {place}, or the port is not declared there");
            (Code::ApplicationRefuses, cause)
        }
        other => (Code::ApplicationRefuses, format!("{name} answered {other}")),
    };
    walk.broken(code, cause, None);
}
