//! The read-only HTTP endpoints: metrics and debug on loopback, readiness.

use crate::{
    fleet::Fleet,
    listener::ListenerCounters,
    metrics::Metrics,
    telemetry::{self, PushedMetrics},
    xds::Subscribers,
};
use serde_json::{Map, Value, json};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};
use tombolo_registry::World;
use tombolo_runtime::http::{Answer, Route};

/// What the endpoints show.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Fleet.
    pub fleet: Fleet,
    /// Subscribers.
    pub subscribers: Subscribers,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What members have pushed.
    pub pushed: PushedMetrics,
    /// `host:port` under which a scraper reaches the debug endpoint, for its list of targets.
    pub scraped_at: Arc<std::sync::OnceLock<String>>,
    /// Counters of the listener.
    pub listener: Arc<ListenerCounters>,
    /// True while discovery serves.
    pub ready: Arc<AtomicBool>,
}

impl Shown {
    /// Metrics and debug.
    pub fn debug_route(self) -> Arc<Route> {
        Arc::new(move |path| match path {
            "/metrics" => {
                let version = self.fleet.world().peek().version;
                let text = self.metrics.encode(
                    &self.fleet.view(),
                    self.subscribers.len(),
                    version,
                    &self.listener,
                    &self.pushed,
                );
                Some(Answer::text(text))
            }
            "/debug/world" => Some(Answer::json(world_json(&self.fleet.world().load()).to_string())),
            "/debug/subscribers" => Some(Answer::json(
                serde_json::to_string(&self.subscribers.list()).unwrap_or_default(),
            )),
            "/debug/members" => Some(Answer::json(self.members_json().to_string())),
            "/healthz" => Some(self.readiness()),
            "/http_sd" => {
                let address = self.scraped_at.get().map_or("", String::as_str);
                Some(telemetry::http_sd(&self.pushed, &self.fleet.view(), address))
            }
            _ => {
                let rest = path.strip_prefix(telemetry::PAGES)?;
                telemetry::page(&self.pushed, &self.fleet.view(), rest, Instant::now())
            }
        })
    }

    /// Readiness.
    pub fn readiness_route(self) -> Arc<Route> {
        Arc::new(move |path| match path {
            "/healthz/ready" | "/healthz" => Some(self.readiness()),
            _ => None,
        })
    }

    fn readiness(&self) -> Answer {
        if self.ready.load(Ordering::Relaxed) {
            Answer::text("ready\n")
        } else {
            Answer::status(
                http::StatusCode::SERVICE_UNAVAILABLE,
                "not ready: starting or stopping\n",
            )
        }
    }

    fn members_json(&self) -> Value {
        let view = self.fleet.view();
        let row = |member: &crate::fleet::Member| {
            let state = member.state();
            json!({
                "namespace": member.device.metadata.namespace,
                "workloadEntry": member.device.spec.workload_entry,
                "address": member.address.map(|address| address.to_string()),
                "state": state.state,
                "reason": state.reason,
            })
        };
        Value::Object(
            view.members
                .iter()
                .map(|(id, member)| (id.to_string(), row(member)))
                .collect(),
        )
    }
}

fn world_json(world: &World) -> Value {
    let mut types = Map::new();
    for url in World::TYPES {
        let resources = world.resources(url).into_iter().flatten();
        let versions: Map<String, Value> = resources
            .map(|(name, compiled)| (name.to_string(), Value::String(compiled.version.to_string())))
            .collect();
        types.insert(url.into(), Value::Object(versions));
    }
    json!({ "version": world.version, "types": types })
}
