//! What a gateway counts. Per service, never per caller: the number of label sets is the number of services.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use std::sync::Arc;
use tombolo_telemetry::{HandshakeLabels, Metrics as Common, SideLabels};
use tombolo_tunnel::{Observe, Side};

/// Label sets of services; further ones count as `other`.
const SERVICES_MAX: usize = 4096;

/// Labels of calls.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct CallLabels {
    /// Host name of the service; empty if there is none.
    pub(crate) service: String,
    /// `ok` or why not: a fixed vocabulary.
    pub(crate) result: &'static str,
}

/// Label of connections that a port has carried.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct PortLabels {
    /// `hbone`, `reverse`, `discovery`, `passthrough`, `refused`.
    pub(crate) kind: &'static str,
}

/// Label of what a limit has closed or refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct LimitLabels {
    /// `unproven`, `discovery_rate`, `discovery_connections`, `sidecars`, `sessions`; of calls `calls_max`,
    /// `calls_per_peer_max`, `dials_max`, `drain`, `streams`; `connection_idle`.
    pub(crate) limit: &'static str,
}

/// Label of what runs over one or the other transport.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TransportLabels {
    /// `quic` or `tcp`.
    pub(crate) transport: &'static str,
}

/// Labels of bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ByteLabels {
    /// Host name of the service.
    pub(crate) service: String,
    /// `to` or `from` the endpoint.
    pub(crate) direction: &'static str,
}

/// The metrics of a gateway.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) common: Arc<Common>,
    calls: Family<CallLabels, Counter>,
    bytes: Family<ByteLabels, Counter>,
    /// Calls that run.
    pub(crate) open: Gauge,
    /// Accepted connections by what they turned out to be.
    pub(crate) accepted: Family<PortLabels, Counter>,
    limited: Family<LimitLabels, Counter>,
    /// Devices that hold a reverse session.
    pub(crate) sessions: Gauge,
    sessions_over: Family<TransportLabels, Gauge>,
    calls_over: Family<TransportLabels, Counter>,
    /// Endpoints that rest after failures.
    pub(crate) resting: Gauge,
    services: std::sync::Mutex<std::collections::HashSet<String>>,
}

impl Metrics {
    pub(crate) fn new() -> Arc<Self> {
        let metrics = Self {
            common: Arc::new(Common::new()),
            calls: Family::default(),
            bytes: Family::default(),
            open: Gauge::default(),
            accepted: Family::default(),
            limited: Family::default(),
            sessions: Gauge::default(),
            sessions_over: Family::default(),
            calls_over: Family::default(),
            resting: Gauge::default(),
            services: std::sync::Mutex::default(),
        };
        metrics.common.register(|registry| {
            registry.register(
                "tombolo_gateway_calls",
                "Calls by service and result",
                metrics.calls.clone(),
            );
            registry.register(
                "tombolo_gateway_bytes",
                "Bytes passed on, encrypted by the ends",
                metrics.bytes.clone(),
            );
            registry.register(
                "tombolo_gateway_open_calls",
                "Calls that run",
                metrics.open.clone(),
            );
            registry.register(
                "tombolo_gateway_accepted",
                "Accepted connections by what they carry",
                metrics.accepted.clone(),
            );
            registry.register(
                "tombolo_gateway_limited",
                "What a limit has closed or refused",
                metrics.limited.clone(),
            );
            registry.register(
                "tombolo_gateway_reverse_sessions",
                "Devices that hold a reverse session",
                metrics.sessions.clone(),
            );
            registry.register(
                "tombolo_gateway_transport_sessions",
                "Devices that hold a reverse session, by what it runs over",
                metrics.sessions_over.clone(),
            );
            registry.register(
                "tombolo_gateway_transport_calls",
                "Calls by what they came over",
                metrics.calls_over.clone(),
            );
            registry.register(
                "tombolo_gateway_resting_endpoints",
                "Endpoints that rest after failures",
                metrics.resting.clone(),
            );
        });
        Arc::new(metrics)
    }

    /// Bounded: a caller can only name services that exist, but a mesh may have very many.
    fn service(&self, service: &str) -> String {
        let mut known = self
            .services
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if known.contains(service) || known.len() < SERVICES_MAX {
            known.insert(service.to_owned());
            return service.to_owned();
        }
        "other".to_owned()
    }

    pub(crate) fn call(&self, service: &str, result: &'static str) {
        let service = self.service(service);
        self.calls.get_or_create(&CallLabels { service, result }).inc();
    }

    pub(crate) fn bytes(&self, service: &str, to: u64, from: u64) {
        let service = self.service(service);
        for (direction, count) in [("to", to), ("from", from)] {
            let labels = ByteLabels {
                service: service.clone(),
                direction,
            };
            self.bytes.get_or_create(&labels).inc_by(count);
        }
    }

    pub(crate) fn accepted(&self, kind: &'static str) {
        self.accepted.get_or_create(&PortLabels { kind }).inc();
    }

    /// A call has come over `quic` or `tcp`.
    pub(crate) fn transport(&self, transport: &'static str) {
        self.calls_over
            .get_or_create(&TransportLabels { transport })
            .inc();
    }

    /// Devices with a session, by what their newest one runs over.
    pub(crate) fn hold(&self, counts: [(&'static str, usize); 2]) {
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.sessions
            .set(gauge(counts.iter().map(|(_, count)| count).sum()));
        for (transport, count) in counts {
            self.sessions_over
                .get_or_create(&TransportLabels { transport })
                .set(gauge(count));
        }
    }

    /// Closed by a limit: refused as well.
    pub(crate) fn limited(&self, limit: &'static str) {
        self.accepted("refused");
        self.over(limit, 1);
    }

    /// Calls refused or ended by a limit, or connections that had served their time.
    pub(crate) fn over(&self, limit: &'static str, count: u64) {
        if count > 0 {
            self.limited.get_or_create(&LimitLabels { limit }).inc_by(count);
        }
    }
}

impl Observe for Metrics {
    fn handshake(&self, side: Side, result: &'static str) {
        let labels = HandshakeLabels {
            side: side.as_str(),
            result,
        };
        self.common.handshakes.get_or_create(&labels).inc();
    }

    fn connections(&self, side: Side, change: i64) {
        let labels = SideLabels { side: side.as_str() };
        self.common
            .tunnel_connections
            .get_or_create(&labels)
            .inc_by(change);
    }

    fn limited(&self, limit: &'static str) {
        self.over(limit, 1);
    }
}
