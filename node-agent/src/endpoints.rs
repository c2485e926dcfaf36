//! Metrics and readiness over HTTP.

use crate::{agent::Agent, handover::Kind, status};
use http::StatusCode;
use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
};
use tombolo_runtime::{TaskGroup, http as endpoint};
use tombolo_types::Code;

/// Starts both. A port that is taken is said and no reason to be out of the mesh: discovery beside an agent has the
/// same readiness port.
pub(crate) fn serve(
    agent: &Arc<Agent>,
    inherited: (Option<TcpListener>, Option<TcpListener>),
    tasks: &TaskGroup,
) {
    let metrics = Arc::clone(agent);
    let route = move |path: &str| match path {
        "/metrics" | "/stats/prometheus" => Some(endpoint::Answer {
            content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
            ..endpoint::Answer::text(text(&metrics))
        }),
        _ => None,
    };
    let listen = (agent.settings.metrics_listen, inherited.0);
    bind(agent, Kind::Metrics, listen, Arc::new(route), tasks);
    let ready = Arc::clone(agent);
    let route = move |path: &str| (path == "/healthz/ready").then(|| readiness(&ready));
    let listen = (agent.settings.readiness_listen, inherited.1);
    bind(agent, Kind::Readiness, listen, Arc::new(route), tasks);
}

fn bind(
    agent: &Agent,
    kind: Kind,
    (address, inherited): (SocketAddr, Option<TcpListener>),
    route: Arc<endpoint::Route>,
    tasks: &TaskGroup,
) {
    // One that was handed over, unless the configuration has another address by now.
    let inherited = inherited.filter(|listener| listener.local_addr().is_ok_and(|local| local == address));
    let serve = || {
        let listener = inherited.map_or_else(|| TcpListener::bind(address), Ok)?;
        listener.set_nonblocking(true)?;
        agent.front.keep(kind, listener.try_clone().map(Into::into));
        endpoint::serve_on(tokio::net::TcpListener::from_std(listener)?, route, tasks)
    };
    if let Err(error) = serve() {
        tracing::warn!(
            "{}",
            Code::EndpointTaken.message(format_args!("{address}: {error}"))
        );
    }
}

fn readiness(agent: &Agent) -> endpoint::Answer {
    let problems = status::findings(agent);
    match status::state(agent, &problems) {
        "Serving" | "Degraded" => endpoint::Answer::text("ready\n"),
        state => {
            let reason = problems
                .first()
                .map_or_else(String::new, |problem| format!(": {problem}"));
            endpoint::Answer::status(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("not ready, {state}{reason}\n"),
            )
        }
    }
}

/// The families of the data path, and gauges of what the agent knows.
pub(crate) fn text(agent: &Agent) -> String {
    let mut text = agent.metrics.encode();
    text.truncate(text.trim_end().strip_suffix("# EOF").map_or(text.len(), str::len));
    let mut gauge = |name: &str, help: &str, value: u64| {
        text.push_str(&format!(
            "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n"
        ));
    };
    let problems = status::findings(agent);
    let ready = matches!(status::state(agent, &problems), "Serving" | "Degraded");
    gauge(
        "tombolo_agent_ready",
        "1 while the agent serves.",
        u64::from(ready),
    );
    gauge(
        "tombolo_agent_findings",
        "Things that are not as they should be: tombolo status.",
        problems.len() as u64,
    );
    if let Some(enrolled) = agent.enrolled.get() {
        let (control, world) = (enrolled.control.status(), enrolled.world.load());
        gauge(
            "tombolo_control_client_connected",
            "1 while a control stream is open.",
            u64::from(control.connected),
        );
        gauge(
            "tombolo_control_client_last_change_timestamp_seconds",
            "When the last change was received; 0 before the first.",
            u64::try_from(control.last_change_unix_ms / 1000).unwrap_or(0),
        );
        gauge(
            "tombolo_control_client_certificate_expiry_timestamp_seconds",
            "When the certificate expires.",
            control.certificate_not_after,
        );
        gauge(
            "tombolo_snapshot_services",
            "Services known.",
            world.service_count() as u64,
        );
        gauge(
            "tombolo_snapshot_workloads",
            "Workloads known.",
            world.workload_count() as u64,
        );
        gauge(
            "tombolo_snapshot_policies",
            "Policies known.",
            world.policy_count() as u64,
        );
    }
    text.push_str("# EOF\n");
    text
}
