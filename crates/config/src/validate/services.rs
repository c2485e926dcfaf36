//! Source: Istio pkg/config/validation (ValidateServiceEntry) and the CEL rules of the CRD.

use super::{
    Findings,
    names::{self, Endpoint},
    workloads::workload_entry,
};
use crate::{Diagnostic, Object, Resolution, ServiceEntrySpec};
use std::collections::BTreeSet;

pub(super) fn service_entry(findings: &mut Findings, object: &Object<ServiceEntrySpec>) {
    let spec = &object.spec;
    if spec.hosts.is_empty() {
        findings.error("spec.hosts", "needs at least one host");
    }
    let mut seen = BTreeSet::new();
    for (index, host) in spec.hosts.iter().enumerate() {
        let at = format!("spec.hosts[{index}]");
        match names::host(host) {
            Ok(host) if !seen.insert(host.clone()) => findings.error(at, format!("{host} is there twice")),
            Ok(host) if host.is_wildcard() && spec.resolution == Resolution::Static => {
                findings.warn(
                    at,
                    "a wildcard host has no virtual address and is not answered by agents",
                );
            }
            Ok(_) => {}
            Err(reason) => findings.error(at, reason),
        }
    }
    for (index, address) in spec.addresses.iter().enumerate() {
        let at = format!("spec.addresses[{index}]");
        findings.check(at.clone(), names::ip_or_cidr(address));
        if address.contains('/') && !matches!(spec.resolution, Resolution::None | Resolution::Static) {
            findings.error(
                at,
                "CIDR addresses are allowed only with resolution NONE or STATIC",
            );
        }
    }
    service_ports(findings, spec);
    match &spec.workload_selector {
        Some(_) if !spec.endpoints.is_empty() => {
            findings.error(
                "spec.workloadSelector",
                "only one of workloadSelector and endpoints may be set",
            );
        }
        Some(selector) => {
            findings.labels("spec.workloadSelector.labels", &selector.labels);
            if selector.labels.is_empty() {
                findings.warn(
                    "spec.workloadSelector.labels",
                    "without a label nothing is selected",
                );
            }
        }
        None => {}
    }
    endpoints(findings, spec);
    export_to(findings, spec);
    super::export::global_label(findings, &object.metadata);
    for (index, name) in spec.subject_alt_names.iter().enumerate() {
        if name.is_empty() {
            findings.error(format!("spec.subjectAltNames[{index}]"), "is empty");
        }
    }
    // Of a resource that is right in itself.
    if findings.0.iter().all(|finding| finding.warning) && !spec.ports.is_empty() {
        unreached(findings, spec);
    }
}

fn service_ports(findings: &mut Findings, spec: &ServiceEntrySpec) {
    let (mut numbers, mut names_seen) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in spec.ports.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        findings.check(format!("{at}.number"), names::port(port.number));
        findings.check(
            format!("{at}.name"),
            tombolo_types::check_label("port name", &port.name),
        );
        if port.target_port != 0 {
            findings.check(format!("{at}.targetPort"), names::port(port.target_port));
        }
        if !numbers.insert(port.number) {
            findings.error(
                format!("{at}.number"),
                format!("port {} is there twice", port.number),
            );
        }
        if !names_seen.insert(&port.name) {
            findings.error(format!("{at}.name"), format!("{:.80?} is there twice", port.name));
        }
        if let Err((reason, nearest)) = names::protocol(&port.protocol) {
            findings
                .0
                .push(Diagnostic::error(format!("{at}.protocol"), reason).with_nearest(nearest));
        } else if port.protocol.eq_ignore_ascii_case("udp") {
            findings.warn(
                format!("{at}.protocol"),
                "UDP is not carried by the mesh yet: the port is left out",
            );
        }
    }
    if spec.ports.is_empty() {
        findings.warn("spec.ports", "without a port nothing can connect");
    }
}

/// What is valid for others, and that no VM gets through to.
fn unreached(findings: &mut Findings, spec: &ServiceEntrySpec) {
    match spec.resolution {
        Resolution::None if spec.addresses.is_empty() => findings.warn(
            "spec.resolution",
            "NONE without addresses: its hosts get no virtual address and VMs cannot call them by name",
        ),
        Resolution::Dns | Resolution::DnsRoundRobin | Resolution::DynamicDns
            if spec.workload_selector.is_none()
                && !spec
                    .endpoints
                    .iter()
                    .any(|endpoint| endpoint.address.parse::<std::net::IpAddr>().is_ok()) =>
        {
            findings.warn(
                "spec.resolution",
                "agents do not look endpoints up: VMs cannot call its hosts through the mesh",
            );
        }
        Resolution::None
        | Resolution::Static
        | Resolution::Dns
        | Resolution::DnsRoundRobin
        | Resolution::DynamicDns => {}
    }
}

fn endpoints(findings: &mut Findings, spec: &ServiceEntrySpec) {
    let given = !spec.endpoints.is_empty();
    match spec.resolution {
        Resolution::None if given => {
            findings.error("spec.endpoints", "must be empty with resolution NONE");
        }
        Resolution::DynamicDns if given => {
            findings.error("spec.endpoints", "must be empty with resolution DYNAMIC_DNS");
        }
        Resolution::DnsRoundRobin if spec.endpoints.len() > 1 => {
            findings.error("spec.endpoints", "resolution DNS_ROUND_ROBIN allows one endpoint");
        }
        Resolution::Dns | Resolution::DnsRoundRobin if !given && spec.workload_selector.is_none() => {
            for (index, host) in spec
                .hosts
                .iter()
                .enumerate()
                .filter(|(_, host)| host.starts_with('*'))
            {
                let reason =
                    format!("{host:.80?} cannot be looked up: name endpoints, or use resolution DYNAMIC_DNS");
                findings.error(format!("spec.hosts[{index}]"), reason);
            }
        }
        Resolution::None
        | Resolution::Static
        | Resolution::Dns
        | Resolution::DnsRoundRobin
        | Resolution::DynamicDns => {}
    }
    let ports: BTreeSet<&str> = spec.ports.iter().map(|port| port.name.as_str()).collect();
    for (index, endpoint) in spec.endpoints.iter().enumerate() {
        let at = format!("spec.endpoints[{index}]");
        workload_entry(findings, &at, endpoint);
        if spec.resolution == Resolution::Static
            && matches!(names::endpoint(&endpoint.address), Ok(Endpoint::Host))
        {
            let reason = format!(
                "{:.80?} must be an IP address with resolution STATIC",
                endpoint.address
            );
            findings.error(format!("{at}.address"), reason);
        }
        for name in endpoint
            .ports
            .keys()
            .filter(|name| !ports.contains(name.as_str()))
        {
            let path = names::key_path(&format!("{at}.ports"), name);
            let nearest = crate::nearest(name, ports.iter().copied());
            findings
                .0
                .push(Diagnostic::error(path, "is not a port of this ServiceEntry").with_nearest(nearest));
        }
    }
}

fn export_to(findings: &mut Findings, spec: &ServiceEntrySpec) {
    let mut seen = BTreeSet::new();
    for (index, namespace) in spec.export_to.iter().enumerate() {
        let at = format!("spec.exportTo[{index}]");
        match namespace.as_str() {
            "*" | "~" if spec.export_to.len() > 1 => {
                findings.error(at.clone(), format!("{namespace:?} stands alone"));
            }
            "*" | "." | "~" => {}
            other => findings.check(at.clone(), tombolo_types::check_label("namespace", other)),
        }
        if !seen.insert(namespace) {
            findings.error(at, format!("{namespace:.80?} is there twice"));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::validate::tests::findings;
    use serde_json::{Value, json};

    fn service(spec: Value, expected: &[&str]) {
        let mut spec = spec;
        if spec.get("ports").is_none() {
            spec["ports"] = json!([{"number": 80, "name": "http", "protocol": "HTTP"}]);
        }
        assert_eq!(findings("se", spec), expected);
    }

    #[test]
    fn service_entries() {
        service(
            json!({"hosts": ["a.b", "*.c.d"], "addresses": ["10.0.0.0/24"], "location": "MESH_INTERNAL",
                "resolution": "NONE", "exportTo": ["."], "subjectAltNames": ["spiffe://td/ns/a/sa/b"]}),
            &[],
        );
        service(json!({"hosts": []}), &["spec.hosts: needs at least one host"]);
        service(
            json!({"hosts": ["a.b"]}),
            &[
                "warning: spec.resolution: NONE without addresses: its hosts get no virtual address and VMs cannot call them by name",
            ],
        );
        let unreached = "warning: spec.resolution: agents do not look endpoints up: VMs cannot call its hosts through the mesh";
        service(json!({"hosts": ["a.b"], "resolution": "DNS"}), &[unreached]);
        service(
            json!({"hosts": ["a.b"], "resolution": "DNS", "endpoints": [{"address": "10.0.0.1"}]}),
            &[],
        );
        service(json!({}), &["spec.hosts: is required"]);
        service(
            json!({"hosts": ["*", "a", "A.", "b_c"]}),
            &[
                "spec.hosts[0]: \"*\" alone is not a host; write *.example.org",
                "spec.hosts[2]: a is there twice",
                "spec.hosts[3]: host name \"b_c\": use lower case letters, digits and '-', starting and ending with a \
                 letter or digit",
            ],
        );
        service(
            json!({"hosts": ["a.b"], "resolution": "DNS", "addresses": ["10.0.0.0/24", "x"]}),
            &[
                "spec.addresses[0]: CIDR addresses are allowed only with resolution NONE or STATIC",
                "spec.addresses[1]: \"x\" is not an IP address or CIDR",
            ],
        );
        service(
            json!({"hosts": ["a.b"], "resolution": "STATIC", "workloadSelector": {"labels": {"app": "a"}},
                "endpoints": [{"address": "10.0.0.1"}]}),
            &["spec.workloadSelector: only one of workloadSelector and endpoints may be set"],
        );
        service(
            json!({"hosts": ["a.b"], "resolution": "NONE", "endpoints": [{"address": "10.0.0.1"}]}),
            &["spec.endpoints: must be empty with resolution NONE"],
        );
        service(
            json!({"hosts": ["a.b"], "resolution": "DNS_ROUND_ROBIN",
                "endpoints": [{"address": "a.c"}, {"address": "b.c"}]}),
            &["spec.endpoints: resolution DNS_ROUND_ROBIN allows one endpoint"],
        );
        service(
            json!({"hosts": ["a.b"], "resolution": "STATIC",
                "endpoints": [{"address": "a.c", "ports": {"htpp": 8080}}]}),
            &[
                "spec.endpoints[0].address: \"a.c\" must be an IP address with resolution STATIC",
                "spec.endpoints[0].ports.htpp: is not a port of this ServiceEntry; did you mean http?",
            ],
        );
        service(
            json!({"hosts": ["*.a.b"], "resolution": "DNS"}),
            &["spec.hosts[0]: \"*.a.b\" cannot be looked up: name endpoints, or use resolution DYNAMIC_DNS"],
        );
        service(
            json!({"hosts": ["a.b"], "exportTo": ["*", "B", "x", "x"]}),
            &[
                "spec.exportTo[0]: \"*\" stands alone",
                "spec.exportTo[1]: namespace \"B\": use lower case letters, digits and '-', starting and ending with \
                 a letter or digit",
                "spec.exportTo[3]: \"x\" is there twice",
            ],
        );
        service(
            json!({"hosts": ["a.b"], "resolution": "static"}),
            &["spec.resolution: unknown value \"static\"; did you mean STATIC?"],
        );
    }

    #[test]
    fn ports_of_a_service() {
        service(
            json!({"hosts": ["a.b"], "ports": [
                {"number": 0, "name": "a", "protocol": "HTTP"},
                {"number": 80, "name": "A", "protocol": "HTTTP"},
                {"number": 80, "name": "a", "protocol": "quic-and-more", "targetPort": 70000},
                {"number": 53, "name": "dns", "protocol": "udp"}]}),
            &[
                "spec.ports[0].number: 0 is not a port: 1 to 65535",
                "spec.ports[1].name: port name \"A\": use lower case letters, digits and '-', starting and ending \
                 with a letter or digit",
                "spec.ports[1].protocol: unknown protocol \"HTTTP\"; did you mean HTTP?",
                "spec.ports[2].targetPort: 70000 is not a port: 1 to 65535",
                "spec.ports[2].number: port 80 is there twice",
                "spec.ports[2].name: \"a\" is there twice",
                "spec.ports[2].protocol: unknown protocol \"quic-and-more\"; known are TCP, HTTP, HTTPS, HTTP2, GRPC, \
                 GRPC-WEB, TLS, UDP, MONGO, REDIS, MYSQL, HTTP_PROXY, HBONE",
                "warning: spec.ports[3].protocol: UDP is not carried by the mesh yet: the port is left out",
            ],
        );
        service(
            json!({"hosts": ["a.b"], "ports": []}),
            &["warning: spec.ports: without a port nothing can connect"],
        );
        service(
            json!({"hosts": ["a.b"], "ports": [{"number": 80}]}),
            &["spec.ports[0].name: is required"],
        );
    }
}
