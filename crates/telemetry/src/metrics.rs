use crate::tcp::{TcpFamilies, TcpLabels, TcpMetrics};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use std::sync::{Mutex, PoisonError};

/// Labels of refused connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusalLabels {
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// The reason of the reject: a fixed vocabulary.
    pub reason: &'static str,
}

/// Labels of TLS handshakes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandshakeLabels {
    /// `client` or `server`.
    pub side: &'static str,
    /// `ok` or why not: a fixed vocabulary.
    pub result: &'static str,
}

/// A label `side`: `client` or `server`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SideLabels {
    /// `client` or `server`.
    pub side: &'static str,
}

/// Labels of name lookups.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DnsLabels {
    /// `answered`, `forwarded`, `failed`, `dropped`, `overload`.
    pub result: &'static str,
}

/// Labels of calls through gateways.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct GatewayLabels {
    /// The network that the gateway leads into.
    pub network: String,
    /// `host:port` of the gateway.
    pub gateway: String,
    /// `ok` or why not: a fixed vocabulary.
    pub result: &'static str,
}

/// The metrics of one process.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    tcp: TcpFamilies,
    /// Outbound flows whose first packet is held until a peer has accepted.
    pub held: Gauge,
    /// Connections that were refused.
    pub refused: Family<RefusalLabels, Counter>,
    /// Open HBONE connections between hosts.
    pub tunnel_connections: Family<SideLabels, Gauge>,
    /// TLS handshakes.
    pub handshakes: Family<HandshakeLabels, Counter>,
    /// Calls that were tried through gateways of other networks.
    pub gateway_calls: Family<GatewayLabels, Counter>,
    /// Name lookups.
    pub dns: Family<DnsLabels, Counter>,
    /// Payload bytes from local applications into tunnels.
    pub bytes_out: Counter,
    /// Payload bytes from tunnels to local applications.
    pub bytes_in: Counter,
    /// Live connections cut by a policy change or a revocation.
    pub cut: Family<RefusalLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// With every family registered and no value yet.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let tcp = TcpFamilies::register(&mut registry);
        macro_rules! register {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let held = register!(
            "tombolo_dataplane_held_flows",
            "Outbound flows whose SYN is held",
            Gauge::default()
        );
        let refused = register!(
            "tombolo_dataplane_refused",
            "Connections that were refused",
            Family::default()
        );
        let cut = register!(
            "tombolo_dataplane_cut",
            "Live connections that were cut",
            Family::default()
        );
        let tunnel_connections = register!(
            "tombolo_tunnel_connections",
            "Open HBONE connections between hosts",
            Family::default()
        );
        let handshakes = register!(
            "tombolo_tunnel_handshakes",
            "TLS handshakes between hosts",
            Family::default()
        );
        let gateway_calls = register!(
            "tombolo_dataplane_gateway_calls",
            "Calls tried through gateways of other networks, by result",
            Family::default()
        );
        let dns = register!("tombolo_dns_queries", "Name lookups by result", Family::default());
        let bytes_out = register!(
            "tombolo_dataplane_sent_bytes",
            "Payload bytes from local applications into tunnels",
            Counter::default()
        );
        let bytes_in = register!(
            "tombolo_dataplane_received_bytes",
            "Payload bytes from tunnels to local applications",
            Counter::default()
        );
        let registry = Mutex::new(registry);
        Self {
            registry,
            tcp,
            held,
            refused,
            tunnel_connections,
            handshakes,
            gateway_calls,
            dns,
            bytes_out,
            bytes_in,
            cut,
        }
    }

    /// Handles of Istio's TCP metrics for a label set; keep them for the life of a connection.
    ///
    /// Over the bound of label sets all further ones share one with the value `other`.
    pub fn tcp(&self, labels: &TcpLabels) -> TcpMetrics {
        self.tcp.handles(labels)
    }

    /// Registers metrics of another crate, for example a collector.
    pub fn register(&self, register: impl FnOnce(&mut Registry)) {
        register(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The text that a scraper reads (OpenMetrics 1.0).
    pub fn encode(&self) -> String {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::with_capacity(16 * 1024);
        // Writing to a String fails only if a metric's own encoder does: what was written so far is still true.
        if encode(&mut text, &registry).is_err() {
            tracing::warn!("a metric could not be encoded; the scrape is cut short");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_there_and_others_may_join() {
        let metrics = Metrics::new();
        metrics.held.inc();
        metrics
            .tunnel_connections
            .get_or_create(&SideLabels { side: "server" })
            .inc();
        metrics
            .handshakes
            .get_or_create(&HandshakeLabels {
                side: "server",
                result: "ok",
            })
            .inc();
        metrics.dns.get_or_create(&DnsLabels { result: "answered" }).inc();
        metrics.register(|registry| registry.register("tombolo_x", "X", Gauge::<i64>::default()));
        let text = metrics.encode();
        for line in [
            "tombolo_dataplane_held_flows 1",
            "tombolo_tunnel_connections{side=\"server\"} 1",
            "tombolo_tunnel_handshakes_total{side=\"server\",result=\"ok\"} 1",
            "tombolo_dns_queries_total{result=\"answered\"} 1",
            "tombolo_dataplane_sent_bytes_total 0",
            "tombolo_x 0",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
