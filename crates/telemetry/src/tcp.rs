use crate::Direction;
use prometheus_client::{
    encoding::{EncodeLabelSet, LabelSetEncoder},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, RwLock},
};

/// Most label sets kept: about 600 bytes each on the wire, so a scrape stays below 5 MiB.
const LABEL_SETS_MAX: usize = 2_000;

/// The labels of Istio's standard TCP metrics; empty values are written as `unknown`, as Istio does.
///
/// Source: Istio, "Istio Standard Metrics".
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TcpLabels {
    /// Outbound reports as `source`, inbound as `destination`.
    pub direction: Direction,
    /// Workload (owner) name of the caller.
    pub source_workload: Arc<str>,
    /// Its namespace.
    pub source_workload_namespace: Arc<str>,
    /// Its SPIFFE id.
    pub source_principal: Arc<str>,
    /// Its canonical service.
    pub source_canonical_service: Arc<str>,
    /// Its canonical revision.
    pub source_canonical_revision: Arc<str>,
    /// Its cluster.
    pub source_cluster: Arc<str>,
    /// Host name of the service that was called.
    pub destination_service: Arc<str>,
    /// Its short name.
    pub destination_service_name: Arc<str>,
    /// Its namespace.
    pub destination_service_namespace: Arc<str>,
    /// Workload (owner) name of the called.
    pub destination_workload: Arc<str>,
    /// Its namespace.
    pub destination_workload_namespace: Arc<str>,
    /// Its SPIFFE id.
    pub destination_principal: Arc<str>,
    /// Its canonical service.
    pub destination_canonical_service: Arc<str>,
    /// Its canonical revision.
    pub destination_canonical_revision: Arc<str>,
    /// Its cluster.
    pub destination_cluster: Arc<str>,
    /// True if the connection runs in mutual TLS.
    pub mutual_tls: bool,
    /// Envoy's response flags, `-` for none.
    pub response_flags: &'static str,
}

impl TcpLabels {
    /// Everything unknown.
    pub fn unknown(direction: Direction) -> Self {
        Self::filled(direction, &Arc::from(""))
    }

    fn filled(direction: Direction, value: &Arc<str>) -> Self {
        let value = || Arc::clone(value);
        Self {
            direction,
            source_workload: value(),
            source_workload_namespace: value(),
            source_principal: value(),
            source_canonical_service: value(),
            source_canonical_revision: value(),
            source_cluster: value(),
            destination_service: value(),
            destination_service_name: value(),
            destination_service_namespace: value(),
            destination_workload: value(),
            destination_workload_namespace: value(),
            destination_principal: value(),
            destination_canonical_service: value(),
            destination_canonical_revision: value(),
            destination_cluster: value(),
            mutual_tls: true,
            response_flags: "-",
        }
    }
}

impl EncodeLabelSet for TcpLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let reporter = match self.direction {
            Direction::Inbound => "destination",
            Direction::Outbound => "source",
        };
        let security = if self.mutual_tls { "mutual_tls" } else { "unknown" };
        [
            ("reporter", reporter),
            ("source_workload", &*self.source_workload),
            ("source_canonical_service", &*self.source_canonical_service),
            ("source_canonical_revision", &*self.source_canonical_revision),
            ("source_workload_namespace", &*self.source_workload_namespace),
            ("source_principal", &*self.source_principal),
            ("source_app", &*self.source_canonical_service),
            ("source_version", &*self.source_canonical_revision),
            ("source_cluster", &*self.source_cluster),
            ("destination_service", &*self.destination_service),
            (
                "destination_service_namespace",
                &*self.destination_service_namespace,
            ),
            ("destination_service_name", &*self.destination_service_name),
            ("destination_workload", &*self.destination_workload),
            (
                "destination_canonical_service",
                &*self.destination_canonical_service,
            ),
            (
                "destination_canonical_revision",
                &*self.destination_canonical_revision,
            ),
            (
                "destination_workload_namespace",
                &*self.destination_workload_namespace,
            ),
            ("destination_principal", &*self.destination_principal),
            ("destination_app", &*self.destination_canonical_service),
            ("destination_version", &*self.destination_canonical_revision),
            ("destination_cluster", &*self.destination_cluster),
            ("request_protocol", "tcp"),
            ("response_flags", self.response_flags),
            ("connection_security_policy", security),
        ]
        .map(|(name, value)| (name, if value.is_empty() { "unknown" } else { value }))
        .encode(encoder)
    }
}

/// The four counters of one label set. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct TcpMetrics {
    /// `istio_tcp_connections_opened_total`.
    pub opened: Counter,
    /// `istio_tcp_connections_closed_total`.
    pub closed: Counter,
    /// `istio_tcp_sent_bytes_total`: from the called to the caller, as Istio counts a response.
    pub sent: Counter,
    /// `istio_tcp_received_bytes_total`: from the caller to the called.
    pub received: Counter,
}

#[derive(Debug)]
pub(crate) struct TcpFamilies {
    opened: Family<TcpLabels, Counter>,
    closed: Family<TcpLabels, Counter>,
    sent: Family<TcpLabels, Counter>,
    received: Family<TcpLabels, Counter>,
    // One lookup a connection instead of four, and the bound.
    known: RwLock<HashMap<TcpLabels, TcpMetrics>>,
}

impl TcpFamilies {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let mut family = |name: &str, help: &str| {
            let family = Family::<TcpLabels, Counter>::default();
            registry.register(name, help, family.clone());
            family
        };
        Self {
            opened: family("istio_tcp_connections_opened", "Connections opened"),
            closed: family("istio_tcp_connections_closed", "Connections closed"),
            sent: family("istio_tcp_sent_bytes", "Bytes sent in response"),
            received: family("istio_tcp_received_bytes", "Bytes received in request"),
            known: RwLock::default(),
        }
    }

    pub(crate) fn handles(&self, labels: &TcpLabels) -> TcpMetrics {
        if let Ok(known) = self.known.read()
            && let Some(found) = known.get(labels)
        {
            return found.clone();
        }
        let Ok(mut known) = self.known.write() else {
            return TcpMetrics::default();
        };
        let other;
        let labels = if known.len() < LABEL_SETS_MAX {
            labels
        } else {
            other = TcpLabels::filled(labels.direction, &Arc::from("other"));
            &other
        };
        known
            .entry(labels.clone())
            .or_insert_with(|| TcpMetrics {
                opened: self.opened.get_or_create_owned(labels),
                closed: self.closed.get_or_create_owned(labels),
                sent: self.sent.get_or_create_owned(labels),
                received: self.received.get_or_create_owned(labels),
            })
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Metrics;

    #[test]
    fn labels_are_istios() {
        let metrics = Metrics::new();
        let labels = TcpLabels {
            source_principal: "spiffe://mesh.example/ns/shop/sa/webapp".into(),
            response_flags: "UAEX",
            ..TcpLabels::unknown(Direction::Inbound)
        };
        metrics.tcp(&labels).opened.inc();
        metrics.tcp(&labels).opened.inc();
        let text = metrics.encode();
        let line = text
            .lines()
            .find(|line| line.starts_with("istio_tcp_connections_opened_total{"))
            .unwrap();
        assert!(line.ends_with(" 2"), "{line}");
        for part in [
            "reporter=\"destination\"",
            "source_principal=\"spiffe://mesh.example/ns/shop/sa/webapp\"",
            "source_workload=\"unknown\"",
            "connection_security_policy=\"mutual_tls\"",
            "response_flags=\"UAEX\"",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }

    #[test]
    fn label_sets_are_bounded() {
        let metrics = Metrics::new();
        for i in 0..LABEL_SETS_MAX + 50 {
            let labels = TcpLabels {
                source_workload: format!("w{i}").into(),
                ..TcpLabels::unknown(Direction::Outbound)
            };
            metrics.tcp(&labels).closed.inc();
        }
        let text = metrics.encode();
        let lines: Vec<_> = text
            .lines()
            .filter(|l| l.starts_with("istio_tcp_connections_closed_total{"))
            .collect();
        assert_eq!(lines.len(), LABEL_SETS_MAX + 1);
        let other = lines
            .iter()
            .find(|line| line.contains("source_workload=\"other\""))
            .unwrap();
        assert!(other.ends_with(" 50"), "{other}");
    }
}
