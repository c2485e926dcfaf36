//! What is said of a connection: labels and the access log line.

use crate::{
    flows::{CutReason, Flow},
    through::Through,
};
use std::{net::SocketAddr, sync::Arc};
use tombolo_destination::{Index as _, Service, Tunnel, Workload};
use tombolo_identity::Peer;
use tombolo_snapshot::{Own, Snapshot};
use tombolo_telemetry::{AccessEntry, AccessLog, Direction, Metrics, Party, RefusalLabels, TcpLabels};
use tombolo_types::{NamespacedName, NetworkAddress, Reject};

/// The labels of a workload on one side.
struct Side {
    workload: Arc<str>,
    namespace: Arc<str>,
    principal: Arc<str>,
    canonical_service: Arc<str>,
    canonical_revision: Arc<str>,
    cluster: Arc<str>,
}

impl Side {
    /// From the record; the identity is what TLS has proven, else what is expected.
    fn new(record: Option<&Workload>, peer: Option<&Peer>) -> Self {
        let principal = match peer {
            Some(peer) => peer.id.to_string(),
            None => expected(record).unwrap_or_default(),
        };
        let none = || Arc::from("");
        match record {
            Some(record) => Self {
                workload: Arc::clone(&record.workload_name),
                namespace: Arc::clone(&record.namespace),
                principal: principal.into(),
                canonical_service: Arc::clone(&record.canonical_name),
                canonical_revision: Arc::clone(&record.canonical_revision),
                cluster: Arc::clone(&record.cluster_id),
            },
            None => Self {
                workload: none(),
                namespace: peer.map_or_else(none, |peer| Arc::clone(&peer.id.namespace)),
                principal: principal.into(),
                canonical_service: none(),
                canonical_revision: none(),
                cluster: none(),
            },
        }
    }
}

/// The identity that a workload has to prove. One outside the mesh is reached without TLS and proves none.
fn expected(record: Option<&Workload>) -> Option<String> {
    let record = record.filter(|record| record.tunnel == Tunnel::Hbone)?;
    record.identity().ok().map(|id| id.to_string())
}

/// The record of whoever calls, by the address that is seen or, behind a NAT, the one that the caller names; only if
/// it fits the identity that TLS has proven: workloads may share an address, and a caller's own words are not believed.
/// `network`: where the named address means something, for a caller that has come through a gateway.
pub(crate) fn caller_record<'s>(
    world: &'s Snapshot,
    own: &Own,
    peer: &Peer,
    seen: SocketAddr,
    (named, network): (Option<SocketAddr>, Option<&str>),
) -> Option<&'s Arc<Workload>> {
    let theirs = network.map_or_else(|| Arc::clone(&own.network), Arc::from);
    let seen = (Some(seen), Arc::clone(&own.network));
    [seen, (named, theirs)]
        .into_iter()
        .find_map(|(address, network)| {
            let address = NetworkAddress {
                network,
                address: address?.ip().to_canonical(),
            };
            world
                .workload_by_address(&address)
                .filter(|record| record.identity().is_ok_and(|id| world.is_same(&id, &peer.id)))
        })
}

/// Labels of a connection.
pub(crate) fn labels(
    direction: Direction,
    source: (Option<&Workload>, Option<&Peer>),
    destination: (Option<&Workload>, Option<&Peer>),
    service: Option<&Service>,
    mutual_tls: bool,
    response_flags: &'static str,
) -> TcpLabels {
    let (source, destination) = (
        Side::new(source.0, source.1),
        Side::new(destination.0, destination.1),
    );
    let none = || Arc::from("");
    TcpLabels {
        direction,
        source_workload: source.workload,
        source_workload_namespace: source.namespace,
        source_principal: source.principal,
        source_canonical_service: source.canonical_service,
        source_canonical_revision: source.canonical_revision,
        source_cluster: source.cluster,
        destination_service: service.map_or_else(none, |service| Arc::clone(&service.key.name)),
        destination_service_name: service.map_or_else(none, |service| Arc::clone(&service.name)),
        destination_service_namespace: service
            .map_or_else(none, |service| Arc::clone(&service.key.namespace)),
        destination_workload: destination.workload,
        destination_workload_namespace: destination.namespace,
        destination_principal: destination.principal,
        destination_canonical_service: destination.canonical_service,
        destination_canonical_revision: destination.canonical_revision,
        destination_cluster: destination.cluster,
        mutual_tls,
        response_flags,
    }
}

/// How a connection came out.
pub(crate) struct Outcome<'a> {
    pub(crate) flags: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) detail: &'a str,
    pub(crate) policy: Option<&'a NamespacedName>,
}

impl<'a> Outcome<'a> {
    pub(crate) fn cut(cut: &'a CutReason) -> Self {
        Self {
            flags: cut.flag,
            reason: cut.reason,
            detail: "",
            policy: cut.policy.as_ref(),
        }
    }

    pub(crate) fn refused(reject: &'a Reject, policy: Option<&'a NamespacedName>) -> Self {
        let flags = crate::refusal::shown(reject).flag;
        Self {
            flags,
            reason: reject.reason,
            detail: &reject.detail,
            policy,
        }
    }
}

/// Who is at both ends, for the log.
pub(crate) struct Ends<'a> {
    pub(crate) source: Option<&'a Workload>,
    pub(crate) destination: Option<&'a Workload>,
    /// Address of the endpoint or of the application, if one was chosen.
    pub(crate) upstream: Option<SocketAddr>,
    /// The gateway on the way, if there is one.
    pub(crate) through: Option<&'a Through>,
}

/// Writes the line, if it is wanted.
pub(crate) fn log(access: AccessLog, flow: &Flow, ends: &Ends<'_>, outcome: &Outcome<'_>) {
    if !access.wants(outcome.flags != "-") {
        return;
    }
    let proven = flow.peer.as_ref().map(|peer| peer.id.to_string());
    let (source_id, destination_id) = match flow.direction {
        Direction::Inbound => (proven, expected(ends.destination)),
        Direction::Outbound => (
            expected(ends.source),
            proven.or_else(|| expected(ends.destination)),
        ),
    };
    let party = |record: Option<&Workload>| -> (Arc<str>, Arc<str>) {
        record.map_or_else(
            || ("".into(), "".into()),
            |w| (Arc::clone(&w.name), Arc::clone(&w.namespace)),
        )
    };
    let (source, mut destination) = (party(ends.source), party(ends.destination));
    if let Some(through) = ends.through {
        // The record stands for all that are behind the gateway: the one that took the call has named itself.
        destination.0 = (*through.workload).into();
    }
    let policy = outcome.policy.map(ToString::to_string);
    let (to, from) = (flow.monitor.to_stream(), flow.monitor.from_stream());
    let (bytes_sent, bytes_received) = match flow.direction {
        Direction::Outbound => (to, from),
        Direction::Inbound => (from, to),
    };
    access.write(&AccessEntry {
        direction: flow.direction,
        source: Party {
            address: Some(flow.source),
            identity: source_id.as_deref().unwrap_or_default(),
            workload: &source.0,
            namespace: &source.1,
        },
        destination: Party {
            address: Some(ends.upstream.unwrap_or(flow.destination)),
            identity: destination_id.as_deref().unwrap_or_default(),
            workload: &destination.0,
            namespace: &destination.1,
        },
        gateway: ends.through.map_or("", |through| &*through.gateway),
        service: &flow.service,
        bytes_sent,
        bytes_received,
        duration: flow.started.elapsed(),
        flags: outcome.flags,
        reason: outcome.reason,
        detail: outcome.detail,
        policy: policy.as_deref().unwrap_or_default(),
    });
}

/// Counts a refusal.
pub(crate) fn count_refusal(metrics: &Metrics, direction: Direction, reason: &'static str) {
    metrics
        .refused
        .get_or_create(&RefusalLabels {
            direction: direction.as_str(),
            reason,
        })
        .inc();
}
