//! `tombolo why`: a connection that an application here would make, hop by hop, each judged by what this host knows.

mod plain;

use crate::{agent::Agent, status};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::time::timeout;
use tombolo_authz::{Action, Connection, Verdict, decide};
use tombolo_config::nearest;
use tombolo_control_client::{Problem, host};
use tombolo_dataplane::{CallError, GatewayTry, ProbeResult};
use tombolo_destination::{Candidate, Destination, Index as _, Service, Tunnel, Workload, resolve};
use tombolo_dns::Names as _;
use tombolo_proto::tombolo::agent::v1::{Finding, Hop, WhyResponse};
use tombolo_snapshot::Snapshot;
use tombolo_tunnel::{OpenError, ThroughError, TlsError};
use tombolo_types::{Code, SpiffeId, networks};
use tonic::Status;

/// The host's resolver may be the very thing that is broken.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// All endpoints are tried at once, each within the data path's own limits.
const PROBE_TIMEOUT: Duration = Duration::from_secs(15);
/// The hops, in their order.
const HOPS: [&str; 7] = [
    "name",
    "vip",
    "policy",
    "endpoint",
    "gateway",
    "tls",
    "application",
];
/// Endpoints named in one line.
const NAMED_MAX: usize = 5;

/// Hops so far. After a broken one the rest is skipped.
#[derive(Debug, Default)]
struct Walk {
    hops: Vec<Hop>,
    broken: bool,
}

impl Walk {
    fn push(&mut self, result: &str, detail: impl Into<String>, finding: Option<Finding>) {
        let Some(name) = HOPS.get(self.hops.len()) else {
            return;
        };
        self.hops.push(Hop {
            name: (*name).to_owned(),
            result: result.to_owned(),
            detail: detail.into(),
            finding,
        });
    }

    fn ok(&mut self, detail: impl Into<String>) {
        self.push("ok", detail, None);
    }

    fn skip(&mut self, detail: impl Into<String>) {
        self.push("skipped", detail, None);
    }

    fn broken(&mut self, code: Code, cause: impl Into<String>, next: Option<String>) {
        let cause = cause.into();
        let mut finding = status::finding(&Problem::new(code, &cause));
        if let Some(next) = next {
            finding.next = next;
        }
        self.push("broken", code.entry().title, Some(finding));
        self.broken = true;
    }

    fn finish(mut self) -> WhyResponse {
        while self.hops.len() < HOPS.len() {
            self.skip("");
        }
        WhyResponse {
            reachable: !self.broken,
            hops: self.hops,
        }
    }
}

/// Walks from this host to `host:port`.
pub(crate) async fn walk(agent: &Agent, host: &str, port: u16) -> Result<WhyResponse, Status> {
    let enrolled = agent.enrolled.get();
    let enrolled = enrolled.ok_or_else(|| Status::failed_precondition(Code::NotEnrolled.message("")))?;
    let world = enrolled.world.load();
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let mut walk = Walk::default();

    let resolved = match host.parse::<IpAddr>() {
        Ok(_) => Ok(Vec::new()),
        Err(_) => look_up(&host, port).await,
    };
    let dataplane = agent.dataplane.borrow().clone();
    let obstacle = dataplane.is_none().then(|| {
        let known = agent.obstacle.borrow().clone();
        known.unwrap_or_else(|| Problem::new(Code::NetdUnreachable, "the data path has not started yet"))
    });
    let Some(vip) = name(&mut walk, &world, &host, &resolved, obstacle.as_ref()) else {
        return Ok(walk.finish());
    };
    if world.service_by_address(vip).is_none()
        && let Some(plain) = plain::Plain::find(&world, vip, port)
    {
        let outcome = plain.connect().await;
        plain.judge(&mut walk, &world, &outcome);
        return Ok(walk.finish());
    }
    let Some(service) = virtual_address(&mut walk, &world, vip, port) else {
        return Ok(walk.finish());
    };
    let identity = enrolled.identity.current().identity.clone();
    let endpoints = Endpoints::of(&world, &service, vip, port);
    policy(
        &mut walk,
        &world,
        identity.as_ref().map(|identity| identity.id()),
        &endpoints,
    );
    if walk.broken {
        return Ok(walk.finish());
    }
    let Some(destination) = usable(&mut walk, &endpoints) else {
        return Ok(walk.finish());
    };
    if let Some(problem) = obstacle {
        walk.broken(problem.code, problem.cause, None);
        return Ok(walk.finish());
    }
    let Some(dataplane) = dataplane else {
        return Ok(walk.finish());
    };
    let results = timeout(PROBE_TIMEOUT, dataplane.probe(destination))
        .await
        .unwrap_or_default();
    peers(&mut walk, &world, &results);
    Ok(walk.finish())
}

/// What an application here would be told: the C library's answer, not ours.
async fn look_up(host: &str, port: u16) -> Result<Vec<IpAddr>, String> {
    match timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((host, port))).await {
        Ok(Ok(addresses)) => Ok(addresses.map(|address| address.ip().to_canonical()).collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs())),
    }
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let mut items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    let more = items.len().saturating_sub(NAMED_MAX);
    items.truncate(NAMED_MAX);
    let text = items.join(", ");
    if more == 0 {
        text
    } else {
        format!("{text} and {more} more")
    }
}

/// Does the mesh know the name, and does this host's resolver ask the mesh for it?
fn name(
    walk: &mut Walk,
    world: &Snapshot,
    host: &str,
    resolved: &Result<Vec<IpAddr>, String>,
    obstacle: Option<&Problem>,
) -> Option<IpAddr> {
    if let Ok(address) = host.parse() {
        walk.skip("an address was given");
        return Some(address);
    }
    let told = match resolved {
        Ok(addresses) if addresses.is_empty() => "this host's resolver knows no address of it".to_owned(),
        Ok(addresses) => format!("this host's resolver says {}", list(addresses)),
        Err(error) => format!("this host's resolver says: {error}"),
    };
    let addresses = resolved.as_deref().unwrap_or_default();
    let Some(known) = world.find(host, &world.own().namespace) else {
        // A short name that the host's own search list has completed.
        if let Some(vip) = addresses
            .iter()
            .find(|address| world.service_by_address(**address).is_some())
        {
            walk.ok(format!("{host} is {vip}"));
            return Some(*vip);
        }
        let meant = nearest_host(world, host);
        let meant = meant.map_or_else(String::new, |meant| format!("; did you mean {meant}?"));
        walk.broken(Code::NameUnknown, format!("{host}: {told}{meant}"), None);
        return None;
    };
    let vips: Vec<IpAddr> = known
        .v4
        .iter()
        .copied()
        .map(IpAddr::V4)
        .chain(known.v6.iter().copied().map(IpAddr::V6))
        .collect();
    if vips.is_empty() {
        walk.broken(
            Code::NoEndpoint,
            format!("{host} is in the mesh but has no address yet: no endpoint has one"),
            None,
        );
        return None;
    }
    match addresses.iter().find(|address| vips.contains(address)) {
        Some(vip) => {
            walk.ok(format!("{host} is {vip}, and this host's resolver says so"));
            Some(*vip)
        }
        None if let Some(obstacle) = obstacle => {
            let cause = format!("{}; without it nobody answers for {host} here", obstacle.cause);
            walk.broken(obstacle.code, cause, None);
            None
        }
        None => {
            walk.broken(
                Code::NameNotResolved,
                format!("the mesh says {}, {told}", list(&vips)),
                None,
            );
            None
        }
    }
}

/// The name that was probably meant: another service beside it, or the same service elsewhere. Only the first label is
/// compared, else the domain that all names share would make them all alike.
fn nearest_host(world: &Snapshot, host: &str) -> Option<String> {
    let own = &world.own().namespace;
    let (label, parent) = host.split_once('.').unwrap_or((host, ""));
    let visible: Vec<(&str, &str)> = world
        .services()
        .map(|service| service.hostname.as_str())
        .filter(|known| world.find(known, own).is_some())
        .filter_map(|known| known.split_once('.'))
        .collect();
    let beside = visible.iter().filter(|(_, of)| {
        if parent.is_empty() {
            of.split('.').next() == Some(own)
        } else {
            *of == parent
        }
    });
    if let Some(meant) = nearest(label, beside.clone().map(|(known, _)| *known)) {
        let (known, of) = beside.into_iter().find(|(known, _)| *known == meant)?;
        return Some(format!("{known}.{of}"));
    }
    let same = visible.iter().filter(|(known, _)| *known == label);
    same.map(|(known, of)| format!("{known}.{of}")).min()
}

fn virtual_address(walk: &mut Walk, world: &Snapshot, vip: IpAddr, port: u16) -> Option<Arc<Service>> {
    let Some(service) = world.service_by_address(vip) else {
        let outside = if world.plan().contains(vip) {
            ""
        } else {
            "; it is no address of the mesh at all"
        };
        walk.broken(
            Code::NameUnknown,
            format!("no service has the address {vip}{outside}"),
            None,
        );
        return None;
    };
    let hidden = resolve(world, &world.source(), vip, port)
        .err()
        .is_some_and(|reject| reject.reason == "unknown_address");
    if hidden {
        walk.broken(
            Code::NameUnknown,
            format!("{} is visible in its own namespace only", service.hostname),
            None,
        );
        return None;
    }
    if service.port(port).is_none() {
        let ports = list(service.ports.iter().map(|port| port.service_port));
        let ports = if ports.is_empty() {
            "none".to_owned()
        } else {
            ports
        };
        let next = format!(
            "tombolo describe se -n {} {}",
            service.key.namespace, service.name
        );
        walk.broken(
            Code::PortUnknown,
            format!("{} has the ports: {ports}; not {port}", service.hostname),
            Some(next),
        );
        return None;
    }
    walk.ok(format!(
        "{vip}:{port} is {} of namespace {}",
        service.hostname, service.key.namespace
    ));
    Some(Arc::clone(service))
}

/// The endpoints of a service for a port: all of them, and those that may be chosen.
struct Endpoints {
    all: Vec<(Arc<Workload>, u16)>,
    usable: Result<Destination, tombolo_types::Reject>,
}

impl Endpoints {
    fn of(world: &Snapshot, service: &Service, vip: IpAddr, port: u16) -> Self {
        let mut all = Vec::new();
        let common = service.port(port).map_or(port, |map| map.target_port);
        world.endpoints(&service.key, &mut |workload| {
            let own = workload.services.get(&service.key);
            let own = own.and_then(|ports| ports.iter().find(|map| map.service_port == port));
            all.push((Arc::clone(workload), own.map_or(common, |map| map.target_port)));
        });
        Self {
            all,
            usable: resolve(world, &world.source(), vip, port),
        }
    }

    /// Where an endpoint serves, as far as that is known: one behind a gateway may have no address.
    fn target(&self, workload: &Workload) -> SocketAddr {
        let port = self.all.iter().find(|(one, _)| one.uid == workload.uid);
        let address = workload.addresses.first().copied();
        (
            address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
            port.map_or(0, |(_, port)| *port),
        )
            .into()
    }
}

/// What the policies that this host holds say of it as the caller.
fn policy(walk: &mut Walk, world: &Snapshot, source: Option<&SpiffeId>, endpoints: &Endpoints) {
    if !world.policies_synced() {
        walk.skip("this host has received no policies yet");
        return;
    }
    let targets: Vec<(&Arc<Workload>, SocketAddr)> = match &endpoints.usable {
        Ok(destination) => destination
            .candidates
            .iter()
            // What holds in another cluster is not known here.
            .filter(|c| !c.workload.is_split_horizon())
            .map(|c| match c.via {
                None => (&c.workload, c.address),
                Some(_) => (&c.workload, endpoints.target(&c.workload)),
            })
            .collect(),
        Err(_) => {
            let address = |workload: &Workload| {
                workload
                    .addresses
                    .first()
                    .copied()
                    .unwrap_or(Ipv4Addr::UNSPECIFIED.into())
            };
            endpoints
                .all
                .iter()
                .map(|(workload, port)| (workload, (address(workload), *port).into()))
                .collect()
        }
    };
    if targets.is_empty() {
        walk.skip(match &endpoints.usable {
            Ok(_) => "the endpoints are in other clusters, which decide themselves",
            Err(_) => "there is no endpoint",
        });
        return;
    }
    let own = host::addresses(Some(world.plan()));
    let (mut allowed, mut denied) = (0usize, None);
    for (workload, address) in &targets {
        let policies = world.policies_for(workload);
        let source_ip = own.iter().find(|ip| ip.is_ipv4() == address.is_ipv4()).copied();
        let connection = Connection {
            source,
            source_ip: source_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
            destination_ip: address.ip(),
            destination_port: address.port(),
        };
        match decide(policies.iter().map(|policy| policy.as_ref()), &connection) {
            Verdict::Allow { .. } => allowed += 1,
            Verdict::Deny {
                policy: Some(policy), ..
            } => {
                let next = format!(
                    "tombolo get ap -n {} {} -o yaml; change or delete it",
                    policy.namespace, policy.name
                );
                denied.get_or_insert((format!("{policy} denies"), next));
            }
            Verdict::Deny { policy: None, .. } => {
                let allow = policies
                    .iter()
                    .filter(|p| p.action == Action::Allow && !p.dry_run)
                    .map(|p| &p.key);
                let next = format!(
                    "tombolo get ap -n {} -o yaml; add a rule that allows it",
                    workload.namespace
                );
                denied.get_or_insert((format!("no ALLOW policy matches ({})", list(allow)), next));
            }
        }
    }
    let who = source.map_or_else(|| "a caller without identity".to_owned(), ToString::to_string);
    match denied {
        Some((cause, next)) if allowed == 0 => {
            walk.broken(Code::PolicyDenies, format!("{cause} {who}"), Some(next))
        }
        Some((cause, _)) => walk.ok(format!(
            "{allowed} of {} endpoints admit {who}; elsewhere {cause}",
            targets.len()
        )),
        None => walk.ok(format!("{who} is admitted")),
    }
}

fn usable<'a>(walk: &mut Walk, endpoints: &'a Endpoints) -> Option<&'a Destination> {
    match &endpoints.usable {
        Ok(destination) => {
            let names = destination.candidates.iter().map(|c| match &c.via {
                None => format!("{} ({})", c.workload.name, c.address),
                Some(via) => format!("those in {}", network(&via.network)),
            });
            let (usable, all) = (destination.candidates.len(), endpoints.all.len());
            let which = list(names);
            walk.ok(if destination.candidates.iter().any(|c| c.via.is_some()) {
                format!("of {all} known these can take it: {which}")
            } else {
                format!("{usable} of {all} can take it: {which}")
            });
            Some(destination)
        }
        Err(reject) if reject.reason == "no_valid_destination" => {
            let mut networks: Vec<_> = endpoints
                .all
                .iter()
                .filter(|(workload, _)| workload.healthy)
                .map(|(workload, _)| network(&workload.network))
                .collect();
            networks.sort_unstable();
            networks.dedup();
            walk.ok(format!(
                "of {} known none is in this network",
                endpoints.all.len()
            ));
            walk.broken(
                Code::GatewayUnreachable,
                format!("no gateway is known that leads into {}", list(networks)),
                Some("enrol one there: tombolo token create --gateway".to_owned()),
            );
            None
        }
        Err(reject) => {
            let sick = endpoints
                .all
                .iter()
                .filter(|(workload, _)| !workload.healthy)
                .map(|(workload, _)| &workload.name);
            let sick = list(sick);
            let sick = if sick.is_empty() {
                String::new()
            } else {
                format!("; unhealthy: {sick}")
            };
            let names = || {
                let nowhere = endpoints
                    .all
                    .iter()
                    .filter(|(workload, _)| workload.addresses.is_empty() && !workload.hostname.is_empty());
                nowhere.map(|(workload, _)| &workload.hostname)
            };
            if !endpoints.all.is_empty() && names().count() == endpoints.all.len() {
                let cause = format!("nobody looks them up here: {}", list(names()));
                walk.broken(Code::EndpointNames, cause, None);
                return None;
            }
            walk.broken(
                Code::NoEndpoint,
                format!("{} endpoints known, {reject}{sick}", endpoints.all.len()),
                None,
            );
            None
        }
    }
}

/// A network as people call it.
fn network(name: &str) -> String {
    let home = networks::home_of(name);
    match (home, networks::is_outbound(name)) {
        ("", false) => "the default network".to_owned(),
        ("", true) => "the default network, dialling out only".to_owned(),
        (home, false) => format!("network {home}"),
        (home, true) => format!("network {home}, dialling out only"),
    }
}

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

fn peers(walk: &mut Walk, world: &Snapshot, results: &[ProbeResult]) {
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

#[cfg(test)]
#[path = "why_tests.rs"]
mod tests;
