//! Source: Istio pkg/config/validation (ValidateAuthorizationPolicy, ValidatePeerAuthentication) and the CEL rules of
//! the CRDs.

use super::{Findings, names};
use crate::{
    Action, AuthorizationPolicySpec, Diagnostic, LabelSelector, Object, PeerAuthenticationSpec, nearest,
    security::{Condition, Operation, Source, TargetRef},
};

/// Attributes of a condition that end with `[name]`.
const KEYED_ATTRIBUTES: [&str; 3] = [
    "request.headers",
    "request.auth.claims",
    "experimental.envoy.filters.",
];
/// Attributes of a condition. Source: Istio's list of authorization policy conditions.
const ATTRIBUTES: [&str; 10] = [
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "destination.ip",
    "destination.port",
    "connection.sni",
];

pub(super) fn authorization_policy(findings: &mut Findings, object: &Object<AuthorizationPolicySpec>) {
    let spec = &object.spec;
    let namespace = object.metadata.namespace.as_str();
    let targets = [
        spec.selector.is_some(),
        spec.target_ref.is_some(),
        !spec.target_refs.is_empty(),
    ];
    if targets.iter().filter(|given| **given).count() > 1 {
        findings.error(
            "spec.targetRefs",
            "only one of targetRefs, targetRef and selector may be set",
        );
    }
    selector(findings, spec.selector.as_ref());
    if let Some(target) = &spec.target_ref {
        target_ref(findings, "spec.targetRef", target, namespace);
    }
    for (index, target) in spec.target_refs.iter().enumerate() {
        target_ref(findings, &format!("spec.targetRefs[{index}]"), target, namespace);
    }
    match spec.action {
        Action::Custom | Action::Deny if spec.rules.is_empty() => {
            let reason =
                "without a rule it never fires; write `rules: [{}]` to make it fire for every connection";
            findings.error("spec.rules", reason);
        }
        Action::Allow | Action::Deny | Action::Audit | Action::Custom => {}
    }
    let provider = spec
        .provider
        .as_ref()
        .map_or("", |provider| provider.name.as_str());
    match (spec.action, &spec.provider) {
        (Action::Custom, _) if provider.is_empty() => {
            findings.error("spec.provider.name", "is required with action CUSTOM");
        }
        (Action::Allow | Action::Deny | Action::Audit, Some(_)) => {
            findings.error("spec.provider", "is allowed only with action CUSTOM");
        }
        _ => {}
    }
    for (index, rule) in spec.rules.iter().enumerate() {
        let at = format!("spec.rules[{index}]");
        for (index, from) in rule.from.iter().enumerate() {
            let at = format!("{at}.from[{index}].source");
            match &from.source {
                Some(source) => self::source(findings, &at, source),
                None => findings.error(at, "is required"),
            }
        }
        for (index, to) in rule.to.iter().enumerate() {
            let at = format!("{at}.to[{index}].operation");
            match &to.operation {
                Some(operation) => self::operation(findings, &at, operation),
                None => findings.error(at, "is required"),
            }
        }
        for (index, when) in rule.when.iter().enumerate() {
            condition(findings, &format!("{at}.when[{index}]"), when);
        }
    }
}

fn selector(findings: &mut Findings, selector: Option<&LabelSelector>) {
    let Some(selector) = selector else { return };
    findings.labels("spec.selector.matchLabels", &selector.match_labels);
    if selector.match_labels.is_empty() {
        findings.warn(
            "spec.selector.matchLabels",
            "without a label it applies as if there were no selector",
        );
    }
}

fn target_ref(findings: &mut Findings, at: &str, target: &TargetRef, namespace: &str) {
    for (field, value) in [("kind", &target.kind), ("name", &target.name)] {
        if value.is_empty() {
            findings.error(format!("{at}.{field}"), "is required");
        }
    }
    if !target.namespace.is_empty() && target.namespace != namespace {
        findings.error(format!("{at}.namespace"), "must be the namespace of the policy");
    }
}

fn source(findings: &mut Findings, at: &str, source: &Source) {
    let lists: [(&str, &[String]); 14] = [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
    ];
    not_empty(findings, at, &lists);
    for (field, values) in lists {
        for (index, value) in values.iter().enumerate() {
            let at = format!("{at}.{field}[{index}]");
            match field {
                "ipBlocks" | "notIpBlocks" | "remoteIpBlocks" | "notRemoteIpBlocks" => {
                    findings.check(at, names::ip_or_cidr(value));
                }
                "serviceAccounts" | "notServiceAccounts" => findings.check(at, service_account(value)),
                _ => text_match(findings, &at, value),
            }
        }
    }
    let accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let others = [
        &source.principals,
        &source.not_principals,
        &source.namespaces,
        &source.not_namespaces,
    ];
    if accounts && others.iter().any(|list| !list.is_empty()) {
        findings.error(
            format!("{at}.serviceAccounts"),
            "cannot be combined with principals or namespaces",
        );
    }
}

/// `name` or `namespace/name`; compared as a whole, so a wildcard would match nothing.
fn service_account(value: &str) -> Result<(), String> {
    let (namespace, name) = value
        .split_once('/')
        .map_or((None, value), |(ns, name)| (Some(ns), name));
    let good = namespace.is_none_or(|ns| tombolo_types::check_label("namespace", ns).is_ok())
        && names::subdomain("service account", name).is_ok();
    if good {
        Ok(())
    } else {
        Err(format!(
            "{value:.80?} is not NAME or NAMESPACE/NAME (no wildcards)"
        ))
    }
}

fn operation(findings: &mut Findings, at: &str, operation: &Operation) {
    let lists: [(&str, &[String]); 8] = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    not_empty(findings, at, &lists);
    for (field, values) in lists {
        for (index, value) in values.iter().enumerate() {
            let at = format!("{at}.{field}[{index}]");
            match field {
                "ports" | "notPorts" => findings.check(at, names::port_text(value)),
                _ if value.is_empty() => findings.error(at, "is empty"),
                _ => {}
            }
        }
    }
}

fn not_empty(findings: &mut Findings, at: &str, lists: &[(&str, &[String])]) {
    if lists.iter().all(|(_, values)| values.is_empty()) {
        let fields: Vec<&str> = lists.iter().map(|(field, _)| *field).collect();
        findings.error(at, format!("needs at least one of {}", fields.join(", ")));
    }
}

/// A value with a wildcard at one end.
fn text_match(findings: &mut Findings, at: &str, value: &str) {
    if value.is_empty() {
        findings.error(at, "is empty");
    } else if value.starts_with("spiffe://") {
        findings.warn(
            at,
            "principals are compared without spiffe://: this never matches",
        );
    } else if value != "*" {
        let inner = value
            .strip_prefix('*')
            .or_else(|| value.strip_suffix('*'))
            .unwrap_or(value);
        if inner.contains('*') {
            findings.warn(
                at,
                "* is a wildcard at one end only; elsewhere it stands for itself",
            );
        }
    }
}

fn condition(findings: &mut Findings, at: &str, condition: &Condition) {
    let key = condition.key.as_str();
    let keyed = |attribute: &&&str| {
        key.strip_prefix(**attribute).is_some_and(|rest| {
            attribute.ends_with('.') && !rest.is_empty()
                || rest.len() > 2 && rest.starts_with('[') && rest.ends_with(']')
        })
    };
    if key.is_empty() {
        findings.error(format!("{at}.key"), "is required");
    } else if !ATTRIBUTES.contains(&key) && KEYED_ATTRIBUTES.iter().find(keyed).is_none() {
        let nearest = nearest(key, ATTRIBUTES);
        let known = if nearest.is_some() {
            String::new()
        } else {
            format!("; known are {}", ATTRIBUTES.join(", "))
        };
        let reason = format!("unknown attribute {key:.80?}{known}");
        findings
            .0
            .push(Diagnostic::error(format!("{at}.key"), reason).with_nearest(nearest));
    }
    if condition.values.is_empty() && condition.not_values.is_empty() {
        findings.error(at, "needs values or notValues");
    }
    for (field, values) in [
        ("values", &condition.values),
        ("notValues", &condition.not_values),
    ] {
        for (index, value) in values.iter().enumerate() {
            let at = format!("{at}.{field}[{index}]");
            match key {
                "source.ip" | "remote.ip" | "destination.ip" => findings.check(at, names::ip_or_cidr(value)),
                "destination.port" => findings.check(at, names::port_text(value)),
                _ => text_match(findings, &at, value),
            }
        }
    }
}

pub(super) fn peer_authentication(findings: &mut Findings, object: &Object<PeerAuthenticationSpec>) {
    let spec = &object.spec;
    selector(findings, spec.selector.as_ref());
    let selects = spec
        .selector
        .as_ref()
        .is_some_and(|selector| !selector.match_labels.is_empty());
    if !spec.port_level_mtls.is_empty() && !selects {
        findings.error("spec.portLevelMtls", "requires a selector");
    }
    for port in spec.port_level_mtls.keys() {
        findings.check(
            names::key_path("spec.portLevelMtls", port),
            names::port_text(port),
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::validate::tests::findings;
    use serde_json::{Value, json};

    fn policy(spec: Value, expected: &[&str]) {
        assert_eq!(findings("ap", spec), expected);
    }

    #[test]
    fn good_policies() {
        for spec in [
            json!({}),
            json!({"rules": [{}]}),
            json!({"action": "DENY", "rules": [{}]}),
            json!({"rules": [{"from": [], "to": []}]}),
            json!({"selector": {"matchLabels": {"app": "a"}}, "rules": [{
                "from": [{"source": {"principals": ["*", "td/ns/a/sa/*"], "notIpBlocks": ["10.0.0.0/8"]}},
                    {"source": {"serviceAccounts": ["a", "shop/b"]}}],
                "to": [{"operation": {"ports": ["80"], "methods": ["GET"], "paths": ["/a*"]}}],
                "when": [{"key": "source.ip", "values": ["10.0.0.1"]},
                    {"key": "request.headers[x-a]", "notValues": ["b"]},
                    {"key": "request.auth.claims[iss]", "values": ["*x"]}]}]}),
            json!({"action": "CUSTOM", "provider": {"name": "ext"}, "rules": [{}]}),
            json!({"targetRefs": [{"kind": "Service", "group": "", "name": "a"}]}),
        ] {
            policy(spec, &[]);
        }
    }

    #[test]
    fn policies_without_a_meaning_are_refused() {
        policy(
            json!({"action": "DENY"}),
            &[
                "spec.rules: without a rule it never fires; write `rules: [{}]` to make it fire for every connection",
            ],
        );
        policy(
            json!({"action": "CUSTOM", "rules": [{}]}),
            &["spec.provider.name: is required with action CUSTOM"],
        );
        policy(
            json!({"provider": {"name": "a"}}),
            &["spec.provider: is allowed only with action CUSTOM"],
        );
        policy(
            json!({"selector": {"matchLabels": {"a": "b"}}, "targetRefs": [{"kind": "", "name": "a", "namespace": "x"}]}),
            &[
                "spec.targetRefs: only one of targetRefs, targetRef and selector may be set",
                "spec.targetRefs[0].kind: is required",
                "spec.targetRefs[0].namespace: must be the namespace of the policy",
            ],
        );
        policy(
            json!({"selector": {}}),
            &["warning: spec.selector.matchLabels: without a label it applies as if there were no selector"],
        );
        policy(
            json!({"action": "DENNY"}),
            &["spec.action: unknown value \"DENNY\"; did you mean DENY?"],
        );
        policy(
            json!({"rules": [[]]}),
            &["spec.rules[0]: must be a mapping, not a list"],
        );
        policy(
            json!({"rules": [{"from": null}]}),
            &["spec.rules[0].from: must not be null: write a value, {}, or leave the field out"],
        );
        policy(
            json!({"rules": [{"form": [{"source": {"namespaces": ["a"]}}]}]}),
            &["spec.rules[0].form: unknown field; did you mean from?"],
        );
    }

    #[test]
    fn sources_operations_and_conditions() {
        policy(
            json!({"rules": [{"from": [{}, {"source": {}}, {"source": {"principals": []}}]}]}),
            &[
                "spec.rules[0].from[0].source: is required",
                "spec.rules[0].from[1].source: needs at least one of principals, notPrincipals, requestPrincipals, \
                 notRequestPrincipals, namespaces, notNamespaces, ipBlocks, notIpBlocks, remoteIpBlocks, \
                 notRemoteIpBlocks, serviceAccounts, notServiceAccounts, trustDomains, notTrustDomains",
                "spec.rules[0].from[2].source: needs at least one of principals, notPrincipals, requestPrincipals, \
                 notRequestPrincipals, namespaces, notNamespaces, ipBlocks, notIpBlocks, remoteIpBlocks, \
                 notRemoteIpBlocks, serviceAccounts, notServiceAccounts, trustDomains, notTrustDomains",
            ],
        );
        policy(
            json!({"rules": [{"from": [{"source": {"serviceAccounts": ["a*", "a/b/c"], "namespaces": [""],
                "principals": ["spiffe://td/ns/a/sa/b", "a*b"], "ipBlocks": ["x"]}}]}]}),
            &[
                "warning: spec.rules[0].from[0].source.principals[0]: principals are compared without spiffe://: this \
                 never matches",
                "warning: spec.rules[0].from[0].source.principals[1]: * is a wildcard at one end only; elsewhere it \
                 stands for itself",
                "spec.rules[0].from[0].source.namespaces[0]: is empty",
                "spec.rules[0].from[0].source.ipBlocks[0]: \"x\" is not an IP address or CIDR",
                "spec.rules[0].from[0].source.serviceAccounts[0]: \"a*\" is not NAME or NAMESPACE/NAME (no wildcards)",
                "spec.rules[0].from[0].source.serviceAccounts[1]: \"a/b/c\" is not NAME or NAMESPACE/NAME (no \
                 wildcards)",
                "spec.rules[0].from[0].source.serviceAccounts: cannot be combined with principals or namespaces",
            ],
        );
        policy(
            json!({"rules": [{"to": [{"operation": {"ports": ["http", "80"], "paths": [""]}}, {}]}]}),
            &[
                "spec.rules[0].to[0].operation.ports[0]: \"http\" is not a port: 1 to 65535",
                "spec.rules[0].to[0].operation.paths[0]: is empty",
                "spec.rules[0].to[1].operation: is required",
            ],
        );
        policy(
            json!({"rules": [{"when": [{"key": "source.ipp", "values": ["a"]}, {"key": "destination.port"},
                {"key": "destination.port", "values": ["x"]}]}]}),
            &[
                "spec.rules[0].when[0].key: unknown attribute \"source.ipp\"; did you mean source.ip?",
                "spec.rules[0].when[1]: needs values or notValues",
                "spec.rules[0].when[2].values[0]: \"x\" is not a port: 1 to 65535",
            ],
        );
        policy(
            json!({"rules": [{"to": [{"operation": {"ports": [80]}}]}]}),
            &["spec.rules[0].to[0].operation.ports[0]: must be a string, not 80"],
        );
    }

    #[test]
    fn peer_authentications() {
        let check = |spec: Value, expected: &[&str]| assert_eq!(findings("pa", spec), expected);
        check(json!({"mtls": {"mode": "STRICT"}}), &[]);
        check(
            json!({"selector": {"matchLabels": {"a": "b"}}, "mtls": {"mode": "STRICT"},
                "portLevelMtls": {"8080": {"mode": "DISABLE"}}}),
            &[],
        );
        check(
            json!({"portLevelMtls": {"8080": {"mode": "DISABLE"}, "0": {}}}),
            &[
                "spec.portLevelMtls: requires a selector",
                "spec.portLevelMtls.0: 0 is not a port: 1 to 65535",
            ],
        );
        check(
            json!({"mtls": {"mode": "STRIKT"}}),
            &["spec.mtls.mode: unknown value \"STRIKT\"; did you mean STRICT?"],
        );
    }
}
