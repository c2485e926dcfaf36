//! Counters of discovery, for a scraper.

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use std::sync::atomic::Ordering;

use crate::{fleet::View, listener::ListenerCounters, telemetry::PushedMetrics};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    call: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabels {
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

/// The counters. Made once; updated where things happen.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Responses sent to subscribers.
    pub pushes: Counter,
    /// Resources in them.
    pub pushed_resources: Counter,
    /// Refusals of resources by subscribers.
    pub nacks: Counter,
    /// Certificates issued.
    pub certificates: Counter,
    calls: Family<CallLabels, Counter>,
    pushes_of_metrics: Family<ResultLabels, Counter>,
    members: Family<StateLabels, Gauge>,
    federation_refusals: Family<CodeLabels, Counter>,
    clusters: Family<StateLabels, Gauge>,
    pushed_members: Gauge,
    pushed_bytes: Gauge,
    subscribers: Gauge,
    world_version: Gauge,
    accepted: Gauge,
    limited: Gauge,
    failed: Gauge,
    forwarded: Gauge,
    impostors: Gauge,
}

/// States of members, so that a state that nobody is in any more reads 0.
const STATES: [&str; 5] = ["Healthy", "Unhealthy", "Suspect", "Away", "Revoked"];

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            pushes: Counter::default(),
            pushed_resources: Counter::default(),
            nacks: Counter::default(),
            certificates: Counter::default(),
            calls: Family::default(),
            pushes_of_metrics: Family::default(),
            members: Family::default(),
            federation_refusals: Family::default(),
            clusters: Family::default(),
            pushed_members: Gauge::default(),
            pushed_bytes: Gauge::default(),
            subscribers: Gauge::default(),
            world_version: Gauge::default(),
            accepted: Gauge::default(),
            limited: Gauge::default(),
            failed: Gauge::default(),
            forwarded: Gauge::default(),
            impostors: Gauge::default(),
        };
        let r = &mut metrics.registry;
        r.register(
            "tombolo_discovery_pushes",
            "xDS responses sent",
            metrics.pushes.clone(),
        );
        r.register(
            "tombolo_discovery_pushed_resources",
            "Resources in xDS responses",
            metrics.pushed_resources.clone(),
        );
        r.register(
            "tombolo_discovery_nacks",
            "Refusals of resources by subscribers",
            metrics.nacks.clone(),
        );
        r.register(
            "tombolo_discovery_certificates",
            "Certificates issued",
            metrics.certificates.clone(),
        );
        r.register(
            "tombolo_discovery_enrollment_calls",
            "Calls of the enrolment API",
            metrics.calls.clone(),
        );
        r.register(
            "tombolo_discovery_members",
            "Enrolled devices by state",
            metrics.members.clone(),
        );
        r.register(
            "tombolo_discovery_federation_refusals",
            "What was refused of other clusters, by code",
            metrics.federation_refusals.clone(),
        );
        r.register(
            "tombolo_discovery_clusters",
            "Other clusters by state: Current, Stale",
            metrics.clusters.clone(),
        );
        r.register(
            "tombolo_discovery_metrics_pushes",
            "Metrics pushed by members",
            metrics.pushes_of_metrics.clone(),
        );
        r.register(
            "tombolo_discovery_metrics_members",
            "Members whose pushed metrics are kept",
            metrics.pushed_members.clone(),
        );
        r.register(
            "tombolo_discovery_metrics_bytes",
            "Bytes of pushed metrics that are kept",
            metrics.pushed_bytes.clone(),
        );
        r.register(
            "tombolo_discovery_subscribers",
            "xDS streams",
            metrics.subscribers.clone(),
        );
        r.register(
            "tombolo_discovery_world_version",
            "Version of the published world",
            metrics.world_version.clone(),
        );
        r.register(
            "tombolo_discovery_connections_accepted",
            "Connections through their handshake",
            metrics.accepted.clone(),
        );
        r.register(
            "tombolo_discovery_connections_limited",
            "Connections closed by a limit",
            metrics.limited.clone(),
        );
        r.register(
            "tombolo_discovery_handshakes_failed",
            "TLS handshakes that failed",
            metrics.failed.clone(),
        );
        r.register(
            "tombolo_discovery_connections_forwarded",
            "Connections whose source a gateway has named",
            metrics.forwarded.clone(),
        );
        r.register(
            "tombolo_discovery_connections_impostors",
            "Connections closed because they named another source and came from no gateway",
            metrics.impostors.clone(),
        );
        metrics
    }
}

impl Metrics {
    /// Counts a call of the enrolment API.
    pub fn enrollment(&self, call: &'static str, ok: bool) {
        let result = if ok { "ok" } else { "refused" };
        self.calls.get_or_create(&CallLabels { call, result }).inc();
    }

    /// Counts a push of metrics by a member.
    pub fn pushed(&self, ok: bool) {
        let result = if ok { "ok" } else { "refused" };
        self.pushes_of_metrics
            .get_or_create(&ResultLabels { result })
            .inc();
    }

    /// Counts what was refused of another cluster.
    pub fn federation_refused(&self, code: tombolo_types::Code) {
        let code = code.to_string();
        self.federation_refusals.get_or_create(&CodeLabels { code }).inc();
    }

    /// How many other clusters there are, and how many of them cannot be reached.
    pub fn set_clusters(&self, all: usize, stale: usize) {
        let counts = [("Current", all.saturating_sub(stale)), ("Stale", stale)];
        for (state, count) in counts {
            let gauge = self.clusters.get_or_create(&StateLabels { state });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// The text that a scraper reads.
    pub fn encode(
        &self,
        view: &View,
        subscribers: usize,
        world_version: u64,
        listener: &ListenerCounters,
        pushed: &PushedMetrics,
    ) -> String {
        let as_gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        for state in STATES {
            let count = view
                .members
                .values()
                .filter(|member| member.state().state == state)
                .count();
            self.members
                .get_or_create(&StateLabels { state })
                .set(as_gauge(count as u64));
        }
        let (members, bytes) = pushed.held();
        self.pushed_members.set(as_gauge(members as u64));
        self.pushed_bytes.set(as_gauge(bytes as u64));
        self.subscribers.set(as_gauge(subscribers as u64));
        self.world_version.set(as_gauge(world_version));
        self.accepted
            .set(as_gauge(listener.accepted.load(Ordering::Relaxed)));
        self.limited
            .set(as_gauge(listener.limited.load(Ordering::Relaxed)));
        self.failed.set(as_gauge(listener.failed.load(Ordering::Relaxed)));
        self.forwarded
            .set(as_gauge(listener.forwarded.load(Ordering::Relaxed)));
        self.impostors
            .set(as_gauge(listener.impostors.load(Ordering::Relaxed)));
        let mut text = String::new();
        // Encoding into a string fails only if a metric is registered wrongly: then there is nothing to show.
        if encode(&mut text, &self.registry).is_err() {
            text.clear();
        }
        text
    }
}
