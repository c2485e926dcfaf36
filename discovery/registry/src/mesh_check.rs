use crate::{MeshSettings, authorization, peer_authentication};
use ipnet::IpNet;
use std::net::IpAddr;
use tombolo_config::{
    AuthorizationPolicySpec, Diagnostic, MtlsMode, Object, PeerAuthenticationSpec, Resource,
    ServiceEntrySpec, WorkloadEntrySpec, annotation, nearest,
};
use tombolo_types::{Hostname, SpiffeId};

/// What the settings of the mesh say about a resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshCheck {
    /// Refusals and warnings.
    pub diagnostics: Vec<Diagnostic>,
    /// Hosts that only a mesh-admin may publish: names outside of the namespace's own `.svc.<mesh domain>`.
    pub needs_mesh_admin: Vec<String>,
}

impl MeshCheck {
    /// The findings that refuse it.
    pub fn refusals(&self) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics.iter().filter(|found| !found.warning)
    }

    fn error(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        self.diagnostics.push(Diagnostic::error(path, reason));
    }

    fn warn(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        self.diagnostics.push(Diagnostic::warning(path, reason));
    }
}

/// Checks a valid resource against the mesh it is for, and says which parts of it are not enforced as written.
/// `protected_hosts` are names that nobody may publish, because agents need them to reach discovery or a gateway.
pub fn validate_in_mesh(resource: &Resource, mesh: &MeshSettings, protected_hosts: &[String]) -> MeshCheck {
    let mut check = MeshCheck::default();
    match resource {
        Resource::ServiceEntry(object) => service_entry(&mut check, object, mesh, protected_hosts),
        Resource::WorkloadEntry(object) => endpoint(&mut check, "spec.address", &object.spec, mesh),
        Resource::AuthorizationPolicy(object) => authorization_policy(&mut check, object, mesh),
        Resource::PeerAuthentication(object) => peer_policy(&mut check, object, mesh),
        Resource::WorkloadGroup(_)
        | Resource::ServiceExport(_)
        | Resource::Namespace(_)
        | Resource::JoinToken(_)
        | Resource::Device(_) => {}
    }
    let title = resource.title();
    check.diagnostics = check
        .diagnostics
        .into_iter()
        .map(|found| found.of(0, &title))
        .collect();
    check
}

fn service_entry(
    check: &mut MeshCheck,
    object: &Object<ServiceEntrySpec>,
    mesh: &MeshSettings,
    protected: &[String],
) {
    let (spec, namespace) = (&object.spec, object.metadata.namespace.as_str());
    for (index, host) in spec.hosts.iter().enumerate() {
        let at = format!("spec.hosts[{index}]");
        let Ok(host) = host.parse::<Hostname>() else {
            continue;
        };
        if let Some(name) = protected.iter().find(|name| covers(&host, name)) {
            check.error(
                at,
                format!("{host} would take {name} over, which agents need to reach the mesh"),
            );
            continue;
        }
        match place(&host, namespace, &mesh.mesh_domain) {
            Place::Own => {}
            Place::Elsewhere => check.needs_mesh_admin.push(host.to_string()),
            Place::Refused(reason) => check.error(at, format!("{host} {reason}")),
        }
    }
    for (index, address) in spec.addresses.iter().enumerate() {
        let net = address
            .parse::<IpNet>()
            .ok()
            .or_else(|| address.parse::<IpAddr>().ok().map(IpNet::from));
        let overlaps = |net: &IpNet| {
            [IpNet::V4(mesh.plan.v4), IpNet::V6(mesh.plan.v6)]
                .iter()
                .any(|own| own.contains(net) || net.contains(own))
        };
        if net.as_ref().is_some_and(overlaps) {
            let reason =
                format!("{address} is within the mesh's virtual addresses: leave it out to be given one");
            check.error(format!("spec.addresses[{index}]"), reason);
        }
    }
    for (index, spec) in spec.endpoints.iter().enumerate() {
        endpoint(check, &format!("spec.endpoints[{index}].address"), spec, mesh);
    }
    let special = |namespace: &&String| matches!(namespace.as_str(), "*" | "." | "~");
    if spec
        .export_to
        .iter()
        .any(|other| !special(&other) && other != namespace)
    {
        check.warn(
            "spec.exportTo",
            "a list of namespaces cannot be enforced: only its own namespace sees it",
        );
    }
    for (index, name) in spec.subject_alt_names.iter().enumerate() {
        if name.parse::<SpiffeId>().is_err() {
            let reason = format!("{name:.80?} is no SPIFFE id: not used for mutual TLS within the mesh");
            check.warn(format!("spec.subjectAltNames[{index}]"), reason);
        }
    }
    let known = ["PreferClose", "PreferSameZone", "PreferSameNode", "PreferAny"];
    let preference = object.metadata.annotations.get(annotation::TRAFFIC_DISTRIBUTION);
    if let Some(preference) = preference.filter(|value| !known.contains(&value.as_str())) {
        let path = format!("metadata.annotations[{:?}]", annotation::TRAFFIC_DISTRIBUTION);
        let found = Diagnostic::warning(
            path,
            format!("unknown preference {preference:.80?}, without effect"),
        );
        check
            .diagnostics
            .push(found.with_nearest(nearest(preference, known)));
    }
}

/// Whose name a host is.
enum Place {
    /// The namespace's own.
    Own,
    /// Nobody's here.
    Elsewhere,
    /// Not to be had.
    Refused(String),
}

fn place(host: &Hostname, namespace: &str, mesh_domain: &str) -> Place {
    let wildcard = host.is_wildcard();
    let name = host.as_str().trim_start_matches("*.");
    let within = |name: &str, domain: &str| {
        name.strip_suffix(domain)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let services = format!("svc.{mesh_domain}");
    if wildcard && within(&services, name) {
        return Place::Refused("would answer for other namespaces".to_owned());
    }
    if within(name, &services) {
        let inner = name
            .strip_suffix(&services)
            .unwrap_or_default()
            .trim_end_matches('.');
        let (rest, owner) = inner.rsplit_once('.').unwrap_or(("", inner));
        return match (owner, rest) {
            ("", _) => Place::Refused("is the domain of all services".to_owned()),
            (owner, _) if owner != namespace => Place::Refused(format!("belongs to namespace {owner}")),
            (_, "") if !wildcard => {
                Place::Refused(format!("is no service: write NAME.{namespace}.{services}"))
            }
            _ => Place::Own,
        };
    }
    if name == mesh_domain {
        return Place::Refused("is the domain of the mesh".to_owned());
    }
    if !name.contains('.') {
        let reason = if wildcard {
            "would answer for a whole top-level domain"
        } else {
            "is a single label"
        };
        return Place::Refused(format!("{reason}: hosts answer such names themselves"));
    }
    Place::Elsewhere
}

fn covers(host: &Hostname, name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    match host.as_str().strip_prefix('*') {
        Some(suffix) => name.ends_with(suffix),
        None => host.as_str() == name,
    }
}

fn endpoint(check: &mut MeshCheck, at: &str, spec: &WorkloadEntrySpec, mesh: &MeshSettings) {
    if spec
        .address
        .parse::<IpAddr>()
        .is_ok_and(|ip| mesh.plan.contains(ip))
    {
        check.error(
            at,
            format!(
                "{} is a virtual address of the mesh: no host has it",
                spec.address
            ),
        );
    }
}

fn authorization_policy(
    check: &mut MeshCheck,
    object: &Object<AuthorizationPolicySpec>,
    mesh: &MeshSettings,
) {
    check
        .diagnostics
        .extend(authorization::convert(object, &mesh.root_namespace).warnings);
}

fn peer_policy(check: &mut MeshCheck, object: &Object<PeerAuthenticationSpec>, mesh: &MeshSettings) {
    let spec = &object.spec;
    if peer_authentication::selector(spec).is_some() && object.metadata.namespace == mesh.root_namespace {
        check.warn(
            "spec.selector",
            "a selector in the root namespace selects nothing: this policy has no effect",
        );
    }
    let why = "agents always take mutual TLS: DISABLE is enforced as PERMISSIVE";
    if spec
        .mtls
        .as_ref()
        .is_some_and(|mtls| mtls.mode == MtlsMode::Disable)
    {
        check.warn("spec.mtls.mode", why);
    }
    for (port, _) in spec
        .port_level_mtls
        .iter()
        .filter(|(_, mtls)| mtls.mode == MtlsMode::Disable)
    {
        check.warn(format!("spec.portLevelMtls.{port}.mode"), why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn check(kind: &str, namespace: &str, spec: Value) -> MeshCheck {
        let kind = tombolo_config::Kind::find(kind).unwrap();
        let json = json!({"apiVersion": kind.api_version(), "kind": kind.name(),
            "metadata": {"name": "x", "namespace": namespace}, "spec": spec});
        let settings = MeshSettings::new("mesh.example".parse().unwrap());
        validate_in_mesh(
            &Resource::from_json(&json).unwrap(),
            &settings,
            &["discovery.example.org".to_owned()],
        )
    }

    fn text(check: &MeshCheck) -> Vec<String> {
        let shown = |found: &Diagnostic| {
            format!(
                "{}{}: {}",
                if found.warning { "warning: " } else { "" },
                found.path,
                found.reason
            )
        };
        check.diagnostics.iter().map(shown).collect()
    }

    #[test]
    fn nobody_publishes_under_another_namespace() {
        for (host, refusal, admin) in [
            ("catalog.shop.svc.mesh.internal", None, false),
            ("a.catalog.shop.svc.mesh.internal", None, false),
            ("*.shop.svc.mesh.internal", None, false),
            (
                "catalog.bank.svc.mesh.internal",
                Some("belongs to namespace bank"),
                false,
            ),
            (
                "a.shop.bank.svc.mesh.internal",
                Some("belongs to namespace bank"),
                false,
            ),
            (
                "shop.svc.mesh.internal",
                Some("is no service: write NAME.shop.svc.mesh.internal"),
                false,
            ),
            ("svc.mesh.internal", Some("is the domain of all services"), false),
            ("mesh.internal", Some("is the domain of the mesh"), false),
            (
                "*.svc.mesh.internal",
                Some("would answer for other namespaces"),
                false,
            ),
            (
                "*.mesh.internal",
                Some("would answer for other namespaces"),
                false,
            ),
            ("*.internal", Some("would answer for other namespaces"), false),
            (
                "*.bank.svc.mesh.internal",
                Some("belongs to namespace bank"),
                false,
            ),
            (
                "CATALOG.BANK.SVC.MESH.INTERNAL.",
                Some("belongs to namespace bank"),
                false,
            ),
            ("console.mesh.internal", None, true),
            ("deb.example.org", None, true),
            ("*.example.net", None, true),
            ("catalog.shop.svc.cluster.local", None, true),
            ("xsvc.mesh.internal", None, true),
            (
                "db",
                Some("is a single label: hosts answer such names themselves"),
                false,
            ),
            (
                "*.com",
                Some("would answer for a whole top-level domain: hosts answer such names themselves"),
                false,
            ),
            (
                "discovery.example.org",
                Some("would take discovery.example.org over, which agents need to reach the mesh"),
                false,
            ),
            (
                "*.example.org",
                Some("would take discovery.example.org over, which agents need to reach the mesh"),
                false,
            ),
        ] {
            let found = check("se", "shop", json!({"hosts": [host], "resolution": "NONE"}));
            let lower = host.to_lowercase();
            let expected: Vec<String> = refusal
                .map(|reason| format!("spec.hosts[0]: {} {reason}", lower.trim_end_matches('.')))
                .into_iter()
                .collect();
            assert_eq!(text(&found), expected, "{host}");
            assert_eq!(!found.needs_mesh_admin.is_empty(), admin, "{host}");
        }
    }

    #[test]
    fn virtual_addresses_belong_to_the_mesh() {
        for address in ["240.240.0.9", "240.240.1.0/24", "240.0.0.0/4", "2001:2::5"] {
            let spec =
                json!({"hosts": ["a.shop.svc.mesh.internal"], "resolution": "NONE", "addresses": [address]});
            assert_eq!(check("se", "shop", spec).refusals().count(), 1, "{address}");
        }
        let spec = json!({"hosts": ["a.shop.svc.mesh.internal"], "resolution": "STATIC", "addresses": ["10.0.0.1"],
            "endpoints": [{"address": "240.240.0.9"}]});
        assert_eq!(
            text(&check("se", "shop", spec)),
            ["spec.endpoints[0].address: 240.240.0.9 is a virtual address of the mesh: no host has it"]
        );
        assert_eq!(
            check("we", "shop", json!({"address": "2001:2::5"}))
                .refusals()
                .count(),
            1
        );
        assert_eq!(
            check("we", "shop", json!({"address": "2001:db8::5"})),
            MeshCheck::default()
        );
    }

    #[test]
    fn what_is_not_enforced_as_written_is_said() {
        assert_eq!(
            text(&check(
                "ap",
                "shop",
                json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]})
            )),
            [
                "warning: spec.rules[0]: methods cannot be evaluated at layer 4: this ALLOW rule is left out and admits \
              nobody"
            ]
        );
        let by_label = json!({"selector": {"matchLabels": {"a": "b"}}, "mtls": {"mode": "DISABLE"},
            "portLevelMtls": {"80": {"mode": "DISABLE"}}});
        assert_eq!(
            text(&check("pa", "istio-system", by_label)),
            [
                "warning: spec.selector: a selector in the root namespace selects nothing: this policy has no effect",
                "warning: spec.mtls.mode: agents always take mutual TLS: DISABLE is enforced as PERMISSIVE",
                "warning: spec.portLevelMtls.80.mode: agents always take mutual TLS: DISABLE is enforced as PERMISSIVE",
            ]
        );
        let spec = json!({"hosts": ["a.shop.svc.mesh.internal"], "exportTo": [".", "bank"],
            "subjectAltNames": ["a.example.org", "spiffe://mesh.example/ns/shop/sa/a"]});
        assert_eq!(
            text(&check("se", "shop", spec)),
            [
                "warning: spec.exportTo: a list of namespaces cannot be enforced: only its own namespace sees it",
                "warning: spec.subjectAltNames[0]: \"a.example.org\" is no SPIFFE id: not used for mutual TLS within \
                 the mesh",
            ]
        );
    }
}
