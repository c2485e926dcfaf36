//! Source: Istio pkg/config/validation (ValidateWorkloadGroup, ValidateWorkloadEntry, ValidateServiceEntry) and the CEL
//! rules of the CRDs.

use super::{
    Findings,
    names::{self, Endpoint},
};
use crate::{
    Diagnostic, Kind, Object, Probe, Resolution, ServiceEntrySpec, WorkloadEntrySpec, WorkloadGroupSpec,
    annotation,
};
use std::collections::BTreeSet;
use tombolo_types::ports::NEVER_DELIVERED;

pub(super) fn workload_group(findings: &mut Findings, object: &Object<WorkloadGroupSpec>) {
    let spec = &object.spec;
    findings.not_reserved(Kind::WorkloadGroup, &object.metadata.namespace);
    findings.labels("spec.metadata.labels", &spec.metadata.labels);
    for key in spec.metadata.annotations.keys() {
        findings.check(
            names::key_path("spec.metadata.annotations", key),
            names::label_key(key),
        );
    }
    if !spec.template.address.is_empty() {
        findings.error("spec.template.address", "must be empty: each VM brings its own");
    }
    entry_fields(findings, "spec.template", &spec.template);
    for (name, &port) in &spec.template.ports {
        if port == 22 || u16::try_from(port).is_ok_and(|port| NEVER_DELIVERED.contains(&port)) {
            let path = names::key_path("spec.template.ports", name);
            findings.warn(
                path,
                format!("port {port} is never delivered to a VM through the mesh"),
            );
        }
    }
    if spec.template.labels.is_empty() && spec.metadata.labels.is_empty() {
        findings.warn(
            "spec.metadata.labels",
            "no label: no ServiceEntry can select the VMs of this group",
        );
    }
    if let Some(probe) = &spec.probe {
        self::probe(findings, probe);
    }
    annotations(findings, object);
}

/// The annotations that change what a group's VMs may do must mean what they say.
fn annotations(findings: &mut Findings, object: &Object<WorkloadGroupSpec>) {
    for (key, value) in &object.metadata.annotations {
        let path = names::key_path("metadata.annotations", key);
        let items = || value.split(',').map(str::trim).filter(|item| !item.is_empty());
        match key.as_str() {
            annotation::NODE_LABELS => items().for_each(|item| {
                findings.check(
                    path.clone(),
                    names::label_key(item).map_err(|reason| format!("{item:.80?} {reason}")),
                );
            }),
            annotation::ADDRESS_CIDRS => {
                items().for_each(|item| findings.check(path.clone(), names::ip_or_cidr(item)))
            }
            annotation::DELIVER_LOOPBACK => {
                items().for_each(|item| findings.check(path.clone(), names::port_text(item)));
            }
            annotation::DELIVER_ALL_PORTS if value != "true" && value != "false" => {
                findings.error(path, format!("{value:.80?} is neither \"true\" nor \"false\""));
            }
            annotation::REACH if value != "outbound" => {
                findings.error(path, format!("{value:.80?} is not \"outbound\""));
            }
            _ => {}
        }
    }
}

fn probe(findings: &mut Findings, probe: &Probe) {
    let given = [
        probe.http_get.is_some(),
        probe.tcp_socket.is_some(),
        probe.exec.is_some(),
        probe.grpc.is_some(),
    ];
    if given.iter().filter(|given| **given).count() != 1 {
        findings.error(
            "spec.probe",
            "needs exactly one of httpGet, tcpSocket, exec, grpc",
        );
    }
    if let Some(http) = &probe.http_get {
        findings.check("spec.probe.httpGet.port", names::port(http.port));
        if !(http.scheme.is_empty()
            || http.scheme.eq_ignore_ascii_case("http")
            || http.scheme.eq_ignore_ascii_case("https"))
        {
            findings.error(
                "spec.probe.httpGet.scheme",
                format!("{:.80?} is neither HTTP nor HTTPS", http.scheme),
            );
        }
        for (index, header) in http.http_headers.iter().enumerate() {
            if header.name.is_empty() {
                findings.error(
                    format!("spec.probe.httpGet.httpHeaders[{index}].name"),
                    "is required",
                );
            }
        }
    }
    if let Some(tcp) = &probe.tcp_socket {
        findings.check("spec.probe.tcpSocket.port", names::port(tcp.port));
    }
    if let Some(grpc) = &probe.grpc {
        findings.check("spec.probe.grpc.port", names::port(grpc.port));
    }
    if probe
        .exec
        .as_ref()
        .is_some_and(|exec| exec.command.first().is_none_or(String::is_empty))
    {
        findings.error("spec.probe.exec.command", "needs a program");
    }
}

pub(super) fn workload_entry(findings: &mut Findings, path: &str, spec: &WorkloadEntrySpec) {
    if spec.address.is_empty() {
        if spec.network.is_empty() {
            findings.error(format!("{path}.address"), "is required where no network is named");
        }
    } else {
        let at = format!("{path}.address");
        match names::endpoint(&spec.address) {
            Ok(Endpoint::Unix) if !spec.ports.is_empty() => {
                findings.error(format!("{path}.ports"), "a unix socket has no ports");
            }
            Ok(Endpoint::Ip(ip)) => {
                let link_local = match ip {
                    std::net::IpAddr::V4(ip) => ip.is_link_local(),
                    std::net::IpAddr::V6(ip) => ip.is_unicast_link_local(),
                };
                if ip.is_unspecified() || ip.is_multicast() {
                    findings.error(at, format!("{ip} is not the address of a host"));
                } else if ip.is_loopback() || link_local {
                    findings.warn(at, format!("{ip} is another host for each caller"));
                }
            }
            Ok(Endpoint::Unix | Endpoint::Host) => {}
            Err(reason) => findings.error(at, reason),
        }
    }
    entry_fields(findings, path, spec);
}

/// Fields that a template has, too.
fn entry_fields(findings: &mut Findings, path: &str, spec: &WorkloadEntrySpec) {
    for (name, &number) in &spec.ports {
        let at = names::key_path(&format!("{path}.ports"), name);
        findings.check(at.clone(), tombolo_types::check_label("port name", name));
        findings.check(at, names::port(number));
    }
    findings.labels(&format!("{path}.labels"), &spec.labels);
    findings.check(format!("{path}.network"), names::network(&spec.network));
    if !spec.locality.is_empty() {
        findings.check(format!("{path}.locality"), names::locality(&spec.locality));
    }
    if !spec.service_account.is_empty() {
        let at = format!("{path}.serviceAccount");
        findings.check(at, names::subdomain("service account", &spec.service_account));
    }
}

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
    use crate::validate::tests::{findings, findings_with};
    use serde_json::{Value, json};

    fn group(spec: Value, expected: &[&str]) {
        assert_eq!(findings("wg", spec), expected);
    }

    #[test]
    fn workload_groups() {
        group(
            json!({"metadata": {"labels": {"app": "a"}}, "template": {"ports": {"http": 8080}, "serviceAccount": "a"},
                "probe": {"httpGet": {"port": 8080, "path": "/healthz"}, "periodSeconds": 5}}),
            &[],
        );
        group(json!({}), &["spec.template: is required"]);
        group(
            json!({"template": {"address": "10.0.0.1", "labels": {"app": "a"}}}),
            &["spec.template.address: must be empty: each VM brings its own"],
        );
        group(
            json!({"template": {"ports": {"http": 0, "Web": 80, "ssh": 22}, "labels": {"app": "a"}}}),
            &[
                "spec.template.ports.Web: port name \"Web\": use lower case letters, digits and '-', starting and \
                 ending with a letter or digit",
                "spec.template.ports.http: 0 is not a port: 1 to 65535",
                "warning: spec.template.ports.ssh: port 22 is never delivered to a VM through the mesh",
            ],
        );
        group(
            json!({"template": {"ports": {"http": "8080"}, "labels": {"app": "a"}}}),
            &["spec.template.ports.http: must be a whole number from 0 that fits, not the text \"8080\""],
        );
        group(
            json!({"template": {"labels": {"app": "a"}}, "probe": {"tcpSocket": {"port": 0}, "exec": {"command": []}}}),
            &[
                "spec.probe: needs exactly one of httpGet, tcpSocket, exec, grpc",
                "spec.probe.tcpSocket.port: 0 is not a port: 1 to 65535",
                "spec.probe.exec.command: needs a program",
            ],
        );
        group(
            json!({"template": {}}),
            &["warning: spec.metadata.labels: no label: no ServiceEntry can select the VMs of this group"],
        );
    }

    #[test]
    fn nobody_becomes_a_workload_of_a_reserved_namespace() {
        for namespace in ["tombolo-system", "istio-system", "kube-system"] {
            let found = findings_with(
                "wg",
                json!({"name": "x", "namespace": namespace}),
                json!({"template": {"labels": {"app": "a"}}}),
            );
            assert_eq!(
                found,
                [format!(
                    "metadata.namespace: {namespace} is reserved: no WorkloadGroup may be there"
                )]
            );
        }
    }

    #[test]
    fn annotations_of_a_group_mean_what_they_say() {
        let found = findings_with(
            "wg",
            json!({"name": "x", "namespace": "shop", "annotations": {
                "tombolo.io/node-labels": "version, a b", "tombolo.io/address-cidrs": "10.0.0.0/8,nonsense",
                "tombolo.io/deliver-all-ports": "yes", "tombolo.io/deliver-loopback": "8080,http",
                "tombolo.io/reach": "inbound", "tombolo.io/gateway-address": "gw.example:443"}}),
            json!({"template": {"labels": {"app": "a"}}}),
        );
        assert_eq!(
            found,
            [
                "warning: metadata.annotations[\"tombolo.io/gateway-address\"]: has an effect on a WorkloadEntry only",
                "metadata.annotations[\"tombolo.io/address-cidrs\"]: \"nonsense\" is not an IP address or CIDR",
                "metadata.annotations[\"tombolo.io/deliver-all-ports\"]: \"yes\" is neither \"true\" nor \"false\"",
                "metadata.annotations[\"tombolo.io/deliver-loopback\"]: \"http\" is not a port: 1 to 65535",
                "metadata.annotations[\"tombolo.io/node-labels\"]: \"a b\" is not a label key: [prefix/]name, a name \
                 of at most 63 letters, digits, '-', '_' and '.'",
                "metadata.annotations[\"tombolo.io/reach\"]: \"inbound\" is not \"outbound\"",
            ]
        );
    }

    #[test]
    fn workload_entries() {
        let check = |spec: Value, expected: &[&str]| assert_eq!(findings("we", spec), expected);
        check(
            json!({"address": "10.0.0.1", "weight": 0, "locality": "eu/a/1"}),
            &[],
        );
        check(json!({"network": "n1"}), &[]);
        check(
            json!({}),
            &["spec.address: is required where no network is named"],
        );
        check(
            json!({"address": "unix:///x", "ports": {"http": 80}}),
            &["spec.ports: a unix socket has no ports"],
        );
        check(json!({"address": "unix:///x"}), &[]);
        check(
            json!({"address": "127.0.0.1"}),
            &["warning: spec.address: 127.0.0.1 is another host for each caller"],
        );
        check(
            json!({"address": "0.0.0.0"}),
            &["spec.address: 0.0.0.0 is not the address of a host"],
        );
        check(
            json!({"address": "10.0.0.1", "weight": -1}),
            &["spec.weight: must be a whole number from 0 that fits, not -1"],
        );
        check(
            json!({"address": "10.0.0.1", "serviceAccount": "A", "locality": "a//b", "network": "a/b"}),
            &[
                "spec.network: \"a/b\" is not a network id: at most 63 letters, digits, '-', '_' and '.'",
                "spec.locality: \"a//b\" is not a locality: region, region/zone or region/zone/subzone",
                "spec.serviceAccount: service account \"A\": use lower case letters, digits and '-', starting and \
                 ending with a letter or digit",
            ],
        );
    }

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
