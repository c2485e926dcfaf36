//! Source: Istio pkg/config/validation (ValidateWorkloadGroup, ValidateWorkloadEntry).

use super::{
    Findings,
    names::{self, Endpoint},
};
use crate::{Kind, Object, Probe, WorkloadEntrySpec, WorkloadGroupSpec, annotation};
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
}
