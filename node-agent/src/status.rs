use crate::{
    agent::{Agent, Enrolled, Phase},
    guard::DeclaredPort,
    names::Verdict,
    notify,
};
use std::sync::Arc;
use tombolo_capture::netd::HostNames;
use tombolo_control_client::{ControlStatus, Health, Problem, host};
use tombolo_proto::tombolo::agent::v1::{Finding, HostResolver, PortGuard, StatusResponse};
use tombolo_runtime::TaskGroup;
use tombolo_types::{Code, Severity, far_apart};

/// A finding as the admin API says it.
pub(crate) fn finding(problem: &Problem) -> Finding {
    let entry = problem.code.entry();
    let severity = match entry.severity {
        Severity::Info => "ok",
        Severity::Warning => "warning",
        Severity::Error => "error",
    };
    let cause = if problem.cause.is_empty() {
        entry.title.to_owned()
    } else {
        problem.cause.clone()
    };
    Finding {
        code: entry.id.to_owned(),
        severity: severity.to_owned(),
        cause,
        next: entry.next.to_owned(),
    }
}

/// What the agent is: the one word that CLI, readiness and systemd show.
pub(crate) fn state(agent: &Agent, findings: &[Problem]) -> &'static str {
    match *agent.phase.borrow() {
        Phase::NotEnrolled if findings.iter().any(|problem| problem.code != Code::NotEnrolled) => {
            return "Failed";
        }
        Phase::NotEnrolled => return "NotEnrolled",
        Phase::Draining => return "Draining",
        Phase::Enrolled => {}
    }
    let known = agent.enrolled.get().is_some_and(|enrolled| {
        let world = enrolled.world.load();
        world.addresses_synced() && world.policies_synced()
    });
    let serves = agent.dataplane.borrow().is_some() && *agent.names.borrow() != Verdict::Unknown;
    // Whom the host asks for names is its administrator's choice: the agent does all of its part.
    let mut own = findings
        .iter()
        .filter(|problem| !matches!(problem.code, Code::NamesNotAsked | Code::VersionSkew));
    if !known || !serves {
        "Starting"
    } else if own.next().is_none() {
        "Serving"
    } else {
        "Degraded"
    }
}

/// Everything that is not as it should be.
pub(crate) fn findings(agent: &Agent) -> Vec<Problem> {
    let Some(enrolled) = agent.enrolled.get() else {
        let obstacle = agent.obstacle.borrow().clone();
        return vec![obstacle.unwrap_or_else(|| Problem::new(Code::NotEnrolled, ""))];
    };
    let status = enrolled.control.status();
    // What was damaged on disk is whole again once everything was received anew; the log keeps it.
    let mut found = if status.synced {
        Vec::new()
    } else {
        enrolled.problems.clone()
    };
    found.extend(agent.obstacle.borrow().clone());
    if let Verdict::NotFound(problem) = &*agent.names.borrow() {
        found.push(problem.clone());
    }
    found.extend(agent.guard.borrow().problem.clone());
    found.extend(agent.reverse.borrow().problem());
    let policies_synced = enrolled.world.load().policies_synced();
    found.extend(judged(
        &status,
        &enrolled.health.borrow(),
        policies_synced,
        host::now_unix(),
    ));
    found
}

/// The findings that follow from how the host stands with discovery and with its application.
fn judged(status: &ControlStatus, health: &Health, policies_synced: bool, now_unix: u64) -> Vec<Problem> {
    let mut found = Vec::new();
    if let Some(problem) = status.stream_problem.as_ref().filter(|_| !status.connected) {
        // It was reached and said no: that it cannot be reached would be wrong.
        let refused = matches!(
            problem.code,
            Code::DeviceRevoked | Code::DeviceClone | Code::DeviceUnknown | Code::Forbidden
        );
        if refused || !matches!(problem.code, Code::Unreachable | Code::NoControlPlane) {
            found.push(problem.clone());
        }
        if !refused {
            found.push(Problem::new(Code::NoControlPlane, &problem.cause));
        }
    }
    if let Some(problem) = &status.renewal_problem {
        if problem.code != Code::Unreachable {
            found.push(problem.clone());
        }
        let code = if status.certificate_not_after <= now_unix {
            Code::CertificateExpired
        } else {
            Code::CertificateExpiring
        };
        // Without its keys it does not renew by itself, as these would say.
        if problem.code != Code::StateLost {
            found.push(Problem::new(code, &problem.cause));
        }
    }
    found.extend(status.snapshot_problem.clone());
    let own = env!("CARGO_PKG_VERSION");
    if far_apart(own, &status.discovery_version) {
        let cause = format!("this agent is {own}, discovery {}", status.discovery_version);
        found.push(Problem::new(Code::VersionSkew, cause));
    }
    if !policies_synced {
        found.push(Problem::new(Code::NoPolicyYet, ""));
    }
    match health {
        Health::Unhealthy(reason) => found
            .push(Problem::from_message(reason).unwrap_or_else(|| Problem::new(Code::ProbeFailing, reason))),
        Health::Unknown | Health::Healthy => {}
    }
    if let Some(last) = status.rejected.last() {
        found.push(Problem::new(
            Code::ResourceRefused,
            format!("{last} ({} in all)", status.rejected.len()),
        ));
    }
    found
}

/// The whole answer of `tombolo status`.
pub(crate) fn response(agent: &Agent) -> StatusResponse {
    let problems = findings(agent);
    let mut response = StatusResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        state: state(agent, &problems).to_owned(),
        findings: problems.iter().map(finding).collect(),
        captured: agent.captured.borrow().clone(),
        now_unix_ms: host::now_unix_ms(),
        resolver: Some(resolver(&agent.host_names.borrow())),
        ..Default::default()
    };
    let (processes, connections) = agent.previous.counts();
    response.previous_processes = u32::try_from(processes).unwrap_or(u32::MAX);
    response.previous_connections = connections;
    if let Some(dataplane) = agent.dataplane.borrow().as_ref() {
        response.open_connections = u64::try_from(dataplane.connections().len()).unwrap_or(u64::MAX);
    }
    if let Some(enrolled) = agent.enrolled.get() {
        describe(enrolled, &mut response);
        response.plaintext = agent.guard.borrow().ports.iter().map(plaintext).collect();
        let reverse = agent.reverse.borrow();
        response.reverse = reverse.sessions();
        response.outbound_only = reverse.network.is_some();
    }
    response
}

fn plaintext(declared: &DeclaredPort) -> PortGuard {
    PortGuard {
        port: declared.port.into(),
        stance: declared.stance.as_str().to_owned(),
        why: declared.why.clone(),
    }
}

fn resolver(names: &HostNames) -> HostResolver {
    HostResolver {
        name: names.resolver.clone(),
        backend: names.backend.clone(),
    }
}

fn describe(enrolled: &Enrolled, response: &mut StatusResponse) {
    let registration = enrolled.control.registration();
    let status = enrolled.control.status();
    let world = enrolled.world.load();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    response.identity = registration.identity.to_string();
    response.workload_name.clone_from(&registration.workload_name);
    response.namespace.clone_from(&registration.namespace);
    response.device_id = registration.device.to_string();
    response.network.clone_from(&registration.network);
    response.mesh_domain.clone_from(&registration.mesh_domain);
    response.trust_domain = registration.trust_domain.to_string();
    response.service_account.clone_from(&registration.service_account);
    response.hostnames.clone_from(&registration.hostnames);
    if let Some(own) = world.own_workload() {
        // The registry knows of services that were made since the registration.
        let names: Vec<String> = own
            .services
            .keys()
            .map(|service| service.name.to_string())
            .collect();
        if !names.is_empty() {
            response.hostnames = names;
        }
    }
    let not_after = enrolled
        .identity
        .current()
        .identity
        .as_ref()
        .map_or(0, |identity| identity.not_after());
    response.certificate_expires_unix_ms = i64::try_from(not_after.saturating_mul(1000)).unwrap_or(i64::MAX);
    response.control_connected = status.connected;
    response.discovery_version = status.discovery_version;
    response.control_endpoint = status.endpoint;
    response.snapshot_from_disk = status.last_change_unix_ms == 0 && enrolled.snapshot_unix_ms != 0;
    response.snapshot_unix_ms = if status.last_change_unix_ms == 0 {
        enrolled.snapshot_unix_ms
    } else {
        status.last_change_unix_ms
    };
    response.services = count(world.service_count());
    response.workloads = count(world.workload_count());
    response.policies = count(world.policy_count());
    if let Some(exposure) = world.exposure() {
        let loopback = |on: bool| if on { " (loopback)" } else { "" };
        response.declared_ports = exposure
            .ports
            .iter()
            .map(|port| format!("{}{}", port.port, loopback(port.loopback)))
            .collect();
        if exposure.all_ports {
            response.declared_ports.push("*".to_owned());
        }
    }
}

/// Keeps the line that `systemctl status` shows.
pub(crate) fn follow(agent: &Arc<Agent>, tasks: &TaskGroup) {
    let agent = Arc::clone(agent);
    tasks.spawn_until_stopped("status line", async move {
        let Some(enrolled) = agent.enrolled.get() else {
            return;
        };
        let (mut control, mut dataplane) = (enrolled.control.watch_status(), agent.dataplane.subscribe());
        let (mut health, mut names) = (enrolled.health.subscribe(), agent.names.subscribe());
        let (mut guard, mut reverse) = (agent.guard.subscribe(), agent.reverse.subscribe());
        let mut obstacle = agent.obstacle.subscribe();
        let mut last = String::new();
        loop {
            let problems = findings(&agent);
            let first = problems
                .first()
                .map_or_else(String::new, |problem| format!(": {problem}"));
            let name = enrolled.control.registration().workload_name.clone();
            let line = format!("{} as {name}{first}", state(&agent, &problems));
            if line != last {
                notify::status(&line);
                last = line;
            }
            let changed = tokio::select! {
                changed = control.changed() => changed.is_ok(),
                changed = dataplane.changed() => changed.is_ok(),
                changed = health.changed() => changed.is_ok(),
                changed = names.changed() => changed.is_ok(),
                changed = guard.changed() => changed.is_ok(),
                changed = reverse.changed() => changed.is_ok(),
                changed = obstacle.changed() => changed.is_ok(),
            };
            if !changed {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named_once_and_only_then() {
        let unreachable = Problem::new(Code::Unreachable, "d:15012: Connection refused");
        let good = || ControlStatus {
            connected: true,
            certificate_not_after: 1000,
            ..Default::default()
        };
        let away = || ControlStatus {
            connected: false,
            stream_problem: Some(unreachable.clone()),
            ..good()
        };
        let codes = |status: &ControlStatus, health: &Health, policies| {
            let found = judged(status, health, policies, 500);
            found
                .iter()
                .map(|problem| problem.code.entry().id)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let healthy = &Health::Healthy;
        assert_eq!(codes(&good(), healthy, true), "");
        assert_eq!(
            codes(
                &ControlStatus {
                    connected: false,
                    ..good()
                },
                healthy,
                true
            ),
            "",
            "not tried yet"
        );
        assert_eq!(codes(&away(), healthy, true), "TMB0302");
        let posed = Problem::new(Code::NotDiscovery, "d:15012 is a VM");
        assert_eq!(
            codes(
                &ControlStatus {
                    stream_problem: Some(posed),
                    ..away()
                },
                healthy,
                true
            ),
            "TMB0111 TMB0302"
        );
        let revoked = Problem::new(Code::DeviceRevoked, "stolen");
        assert_eq!(
            codes(
                &ControlStatus {
                    stream_problem: Some(revoked),
                    ..away()
                },
                healthy,
                true
            ),
            "TMB0120"
        );
        let late = |not_after| ControlStatus {
            certificate_not_after: not_after,
            renewal_problem: Some(unreachable.clone()),
            ..good()
        };
        assert_eq!(codes(&late(1000), healthy, true), "TMB0304");
        assert_eq!(codes(&late(400), healthy, true), "TMB0303");
        let clone = ControlStatus {
            renewal_problem: Some(Problem::new(Code::DeviceClone, "")),
            ..good()
        };
        assert_eq!(codes(&clone, healthy, true), "TMB0121 TMB0304");
        assert_eq!(codes(&good(), healthy, false), "TMB0305");
        assert_eq!(
            codes(&good(), &Health::Unhealthy("connection refused".into()), true),
            "TMB0306"
        );
        let refused = Health::Unhealthy(Code::ProbeRefused.message("exec probes are not run"));
        assert_eq!(codes(&good(), &refused, true), "TMB0308");
        let old = ControlStatus {
            discovery_version: "0.4.0".into(),
            ..good()
        };
        assert_eq!(codes(&old, healthy, true), "TMB0510");
        let nack = ControlStatus {
            rejected: vec!["shop/x: no".into()],
            ..good()
        };
        assert_eq!(codes(&nack, &Health::Unknown, true), "TMB0309");
    }
}
