use crate::{
    failure::{self, Failure},
    output::{self, Format, Output},
    sockets::{self, Sockets},
    text,
};
use serde_json::{Value, json};
use std::{fmt::Write as _, process::ExitCode};
use tombolo_proto::tombolo::agent::v1::{
    Finding, HostResolver, PortGuard, ReverseSession, StatusRequest, StatusResponse,
};
use tombolo_types::Code;

/// What this host is in the mesh and how it is. Exits with 1 if something is wrong.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn run(args: Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let answer = sockets
        .agent()
        .await?
        .status(StatusRequest {})
        .await
        .map_err(sockets::agent_failure)?;
    let status = answer.into_inner();
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => output::value(format, &value(&status))?,
        Format::Name => output::line(format!("{}/{}", status.namespace, status.workload_name)),
        Format::Table | Format::Wide => output::print(&shown(&status)),
    }
    super::version::warn_of_skew("the agent", &status.version);
    let broken = status.findings.iter().any(|finding| finding.severity == "error")
        || !matches!(status.state.as_str(), "Serving" | "Degraded");
    Ok(ExitCode::from(if broken { failure::ERROR } else { failure::OK }))
}

/// A finding on lines of its own.
pub(crate) fn finding(finding: &Finding) -> String {
    let cause = if finding.cause.is_empty() {
        String::new()
    } else {
        format!(" {}", finding.cause)
    };
    format!(
        "{} {}:{cause}\n          next: {}\n",
        finding.code, finding.severity, finding.next
    )
}

pub(crate) fn shown(status: &StatusResponse) -> String {
    let mut shown = String::new();
    let mut field = |name: &str, value: &str| {
        let name = if name.is_empty() {
            String::new()
        } else {
            format!("{name}:")
        };
        let _ = writeln!(shown, "{name:<14}{value}");
    };
    field("State", &status.state);
    if !status.workload_name.is_empty() {
        let now = status.now_unix_ms;
        field("Identity", &status.identity);
        field(
            "Workload",
            &format!(
                "{}/{} (device {})",
                status.namespace, status.workload_name, status.device_id
            ),
        );
        if !status.hostnames.is_empty() {
            field("Called", &status.hostnames.join(", "));
        }
        let ports = if status.declared_ports.is_empty() {
            "none".to_owned()
        } else {
            status.declared_ports.join(", ")
        };
        field("Delivers", &format!("ports: {ports}"));
        field(
            "Network",
            if status.network.is_empty() {
                "(default)"
            } else {
                &status.network
            },
        );
        if status.certificate_expires_unix_ms > 0 {
            let expires = status.certificate_expires_unix_ms;
            field(
                "Certificate",
                &format!("until {} ({})", text::time(expires), text::relative(expires, now)),
            );
        }
        let connected = if status.control_connected {
            "connected to"
        } else {
            "NOT connected; last tried"
        };
        field("Discovery", &format!("{connected} {}", status.control_endpoint));
        let from = match (status.snapshot_unix_ms, status.snapshot_from_disk) {
            (0, _) => "nothing received yet".to_owned(),
            (at, true) => format!("from disk, {} old", text::age(now - at)),
            (at, false) => format!("last change {}", text::relative(at, now)),
        };
        let counts = format!(
            "{} services, {} workloads, {} policies",
            status.services, status.workloads, status.policies
        );
        field("Knows", &format!("{counts} ({from})"));
        field(
            "Captures",
            &if status.captured.is_empty() {
                "nothing".to_owned()
            } else {
                format!(
                    "{} (addresses of the mesh, nothing else)",
                    status.captured.join(", ")
                )
            },
        );
        if let Some(line) = resolver(status) {
            field("Names", &line);
        }
        for (n, line) in plaintext(status).iter().enumerate() {
            field(if n == 0 { "Plaintext" } else { "" }, line);
        }
        if let Some(line) = reverse(status) {
            field("Reverse", &line);
        }
        let mut connections = status.open_connections.to_string();
        if status.previous_processes > 0 {
            let _ = write!(
                connections,
                ", and {} in the process before the last reload",
                status.previous_connections
            );
        }
        field("Connections", &connections);
    }
    for one in &status.findings {
        shown.push('\n');
        shown.push_str(&finding(one));
    }
    shown
}

/// Who looks up names on this host, and what was done about it.
pub(crate) fn resolver(status: &StatusResponse) -> Option<String> {
    let found = status.resolver.as_ref().filter(|found| !found.name.is_empty())?;
    let HostResolver { name, backend } = found;
    let domain = &status.mesh_domain;
    Some(match backend.as_str() {
        "" if status
            .findings
            .iter()
            .any(|one| one.code == Code::NamesNotAsked.entry().id) =>
        {
            format!("looked up by {name}, which does not ask the mesh")
        }
        "" => {
            format!("looked up by {name}, as this host's owner has set it up; tombolo-netd changed nothing")
        }
        "resolv-conf" => format!("all looked up by this agent first, then by {name} (names: resolv-conf)"),
        backend => format!("looked up by {name}, which asks the mesh for {domain} (names: {backend})"),
    })
}

/// The way in to a host that only dials out.
fn reverse(status: &StatusResponse) -> Option<String> {
    if !status.outbound_only {
        return None;
    }
    let mut transports: Vec<&str> = status
        .reverse
        .iter()
        .map(|session| session.transport.as_str())
        .filter(|transport| !transport.is_empty())
        .collect();
    let (up, all) = (transports.len(), status.reverse.len());
    transports.sort_unstable();
    transports.dedup();
    let how = if up == 0 {
        String::new()
    } else {
        format!(" ({})", transports.join(", "))
    };
    let s = if all == 1 { "" } else { "s" };
    let mut line = format!("{up} of {all} gateway{s}{how}");
    for session in status.reverse.iter().filter(|one| one.transport.is_empty()) {
        let _ = write!(line, "; {}: {}", session.gateway, session.problem);
    }
    Some(line)
}

/// A line for each declared port: who may call it past the mesh, and why.
fn plaintext(status: &StatusResponse) -> Vec<String> {
    let line = |declared: &PortGuard| {
        let word = match declared.stance.as_str() {
            "partly" => "guarded, but to addresses that a policy admits",
            "unguarded" => "OPEN",
            word => word,
        };
        format!("{} {word}: {}", port(declared), declared.why)
    };
    let mut lines: Vec<String> = status.plaintext.iter().map(line).collect();
    if !lines.is_empty() {
        lines.push("ports that are not declared are not the mesh's to close".to_owned());
    }
    lines
}

fn port(declared: &PortGuard) -> String {
    match declared.port {
        0 => "other ports".to_owned(),
        port => port.to_string(),
    }
}

pub(crate) fn findings(findings: &[Finding]) -> Vec<Value> {
    let one = |f: &Finding| json!({"code": f.code, "severity": f.severity, "cause": f.cause, "next": f.next});
    findings.iter().map(one).collect()
}

fn value(status: &StatusResponse) -> Value {
    let at = |unix_ms: i64| {
        if unix_ms == 0 {
            Value::Null
        } else {
            json!(text::time(unix_ms))
        }
    };
    let plaintext = |declared: &PortGuard| {
        let port = match declared.port {
            0 => json!("*"),
            port => json!(port),
        };
        json!({"port": port, "stance": declared.stance, "why": declared.why})
    };
    let plaintext: Vec<Value> = status.plaintext.iter().map(plaintext).collect();
    let session = |held: &ReverseSession| {
        let transport = (!held.transport.is_empty()).then_some(&held.transport);
        json!({"gateway": held.gateway, "transport": transport, "problem": held.problem})
    };
    let reverse: Vec<Value> = status.reverse.iter().map(session).collect();
    json!({
        "outboundOnly": status.outbound_only,
        "reverse": reverse,
        "plaintext": plaintext,
        "resolver": status.resolver.as_ref().map(|found| json!({"name": found.name, "backend": found.backend})),
        "version": status.version, "discoveryVersion": status.discovery_version, "state": status.state, "identity": status.identity,
        "workloadName": status.workload_name, "namespace": status.namespace, "serviceAccount": status.service_account,
        "hostnames": status.hostnames, "deviceId": status.device_id, "network": status.network,
        "trustDomain": status.trust_domain, "meshDomain": status.mesh_domain,
        "certificateExpires": at(status.certificate_expires_unix_ms), "controlConnected": status.control_connected,
        "controlEndpoint": status.control_endpoint, "lastChange": at(status.snapshot_unix_ms),
        "snapshotFromDisk": status.snapshot_from_disk, "services": status.services, "workloads": status.workloads,
        "policies": status.policies, "openConnections": status.open_connections,
        "previousProcesses": status.previous_processes, "previousConnections": status.previous_connections, "captured": status.captured,
        "declaredPorts": status.declared_ports, "findings": findings(&status.findings), "now": at(status.now_unix_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_that_its_owner_has_set_up_is_no_trouble() {
        let mut status = StatusResponse {
            mesh_domain: "mesh.internal".into(),
            resolver: Some(HostResolver {
                name: "dnsmasq (127.0.0.1)".into(),
                backend: String::new(),
            }),
            ..Default::default()
        };
        let line = resolver(&status).unwrap();
        assert!(line.contains("as this host's owner has set it up"), "{line}");
        status.findings.push(Finding {
            code: "TMB0313".into(),
            ..Default::default()
        });
        let line = resolver(&status).unwrap();
        assert_eq!(
            line,
            "looked up by dnsmasq (127.0.0.1), which does not ask the mesh"
        );
    }

    #[test]
    fn the_way_in_to_a_host_that_only_dials_out() {
        let session = |gateway: &str, transport: &str, problem: &str| ReverseSession {
            gateway: gateway.into(),
            transport: transport.into(),
            problem: problem.into(),
        };
        let mut status = StatusResponse::default();
        assert_eq!(reverse(&status), None);
        status.outbound_only = true;
        assert_eq!(reverse(&status).unwrap(), "0 of 0 gateways");
        status.reverse = vec![session("a:443", "quic", ""), session("b:443", "quic", "")];
        assert_eq!(reverse(&status).unwrap(), "2 of 2 gateways (quic)");
        status.reverse[1] = session("b:443", "", "no answer within 3s");
        assert_eq!(
            reverse(&status).unwrap(),
            "1 of 2 gateways (quic); b:443: no answer within 3s"
        );
        assert_eq!(value(&status)["reverse"][0]["transport"], "quic");
        assert!(value(&status)["reverse"][1]["transport"].is_null());
    }

    #[test]
    fn a_host_without_discovery() {
        let status = StatusResponse {
            state: "Degraded".into(),
            identity: "spiffe://mesh.example/ns/shop/sa/catalog".into(),
            workload_name: "catalog-1".into(),
            namespace: "shop".into(),
            device_id: "00000000000000ab".into(),
            certificate_expires_unix_ms: 7_200_000,
            snapshot_unix_ms: 1_000,
            snapshot_from_disk: true,
            control_endpoint: "d:15012".into(),
            now_unix_ms: 61_000,
            captured: vec!["240.240.0.0/16".into()],
            plaintext: [("guarded", 8080), ("unguarded", 9090), ("open", 0)]
                .map(|(stance, port)| PortGuard {
                    port,
                    stance: stance.into(),
                    why: "PeerAuthentication says STRICT".into(),
                })
                .into(),
            findings: vec![Finding {
                code: "TMB0302".into(),
                severity: "warning".into(),
                cause: "d:15012: Connection refused".into(),
                next: "tombolo status".into(),
            }],
            ..Default::default()
        };
        let text = shown(&status);
        for part in [
            "NOT connected; last tried d:15012",
            "from disk, 60s old",
            "TMB0302 warning: d:15012",
            "ports: none",
            "Captures:     240.240.0.0/16 (addresses of the mesh, nothing else)\n",
            "Plaintext:    8080 guarded: PeerAuthentication says STRICT\n              9090 OPEN: Peer",
            "other ports open: ",
            "not declared are not the mesh's",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert_eq!(value(&status)["controlConnected"], false);
        let plaintext = value(&status)["plaintext"].clone();
        assert_eq!(plaintext[0]["port"], 8080);
        assert_eq!(
            (&plaintext[2]["port"], &plaintext[1]["stance"]),
            (&json!("*"), &json!("unguarded"))
        );
        let idle = shown(&StatusResponse {
            state: "NotEnrolled".into(),
            ..Default::default()
        });
        assert_eq!(idle, "State:        NotEnrolled\n");
    }
}
