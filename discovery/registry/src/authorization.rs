//! AuthorizationPolicy to what a layer 4 proxy evaluates.
//!
//! Source: Istio pilot/pkg/serviceregistry/kube/controller/ambient/authorization.go. Two differences, both towards the
//! stricter side: a DENY rule whose HTTP part falls away is enforced by its remainder (there an empty match makes the
//! whole rule silent), and trust domains are evaluated (there they are dropped, which widens an ALLOW rule).

use crate::content::ip_bytes;
use ipnet::IpNet;
use std::net::IpAddr;
use tombolo_config::{
    Action, AuthorizationPolicySpec, Diagnostic, Object, annotation,
    security::{Condition, Operation, Rule, Source},
};
use tombolo_proto::istio::security::{
    Action as WireAction, Address, Authorization, Clause, Match, Rule as WireRule, Scope,
    ServiceAccountMatch, StringMatch, string_match::MatchType,
};

/// A policy as it is sent; `None` if no layer 4 proxy evaluates it.
pub(crate) struct Converted {
    pub(crate) authorization: Option<Authorization>,
    pub(crate) warnings: Vec<Diagnostic>,
}

/// Labels that the policy selects by; `None` where it is for a namespace or the mesh. A selector without labels is none:
/// read otherwise it would apply to nobody, which is weaker.
pub(crate) fn selector(
    spec: &AuthorizationPolicySpec,
) -> Option<&std::collections::BTreeMap<String, String>> {
    spec.selector
        .as_ref()
        .map(|selector| &selector.match_labels)
        .filter(|labels| !labels.is_empty())
}

/// Converts a policy.
pub(crate) fn convert(object: &Object<AuthorizationPolicySpec>, root_namespace: &str) -> Converted {
    let (spec, metadata) = (&object.spec, &object.metadata);
    let mut warnings = Vec::new();
    if spec.target_ref.is_some() || !spec.target_refs.is_empty() {
        let reason = "is for gateways and waypoints: agents do not enforce this policy";
        warnings.push(Diagnostic::warning("spec.targetRefs", reason));
        return Converted {
            authorization: None,
            warnings,
        };
    }
    let action = match spec.action {
        Action::Allow => WireAction::Allow,
        Action::Deny => WireAction::Deny,
        Action::Audit | Action::Custom => {
            let reason = "this action needs layer 7: agents do not enforce this policy";
            warnings.push(Diagnostic::warning("spec.action", reason));
            return Converted {
                authorization: None,
                warnings,
            };
        }
    };
    let scope = match (selector(spec), metadata.namespace == root_namespace) {
        (Some(_), _) => Scope::WorkloadSelector,
        (None, true) => Scope::Global,
        (None, false) => Scope::Namespace,
    };
    let rules = spec.rules.iter().enumerate().filter_map(|(index, rule)| {
        let at = format!("spec.rules[{index}]");
        self::rule(rule, action, &metadata.namespace, &at, &mut warnings)
    });
    let authorization = Authorization {
        name: metadata.name.clone(),
        namespace: metadata.namespace.clone(),
        scope: scope.into(),
        action: action.into(),
        rules: rules.collect(),
        dry_run: metadata
            .annotations
            .get(annotation::DRY_RUN)
            .is_some_and(|value| value == "true"),
        extensions: Vec::new(),
    };
    Converted {
        authorization: Some(authorization),
        warnings,
    }
}

/// `None`: the rule is left out.
fn rule(
    rule: &Rule,
    action: WireAction,
    namespace: &str,
    at: &str,
    warnings: &mut Vec<Diagnostic>,
) -> Option<WireRule> {
    let mut lost: Vec<String> = Vec::new();
    let mut alternatives: Vec<Vec<Match>> = Vec::new();
    if !rule.to.is_empty() {
        let operations = rule.to.iter().filter_map(|to| to.operation.as_ref());
        alternatives.push(
            operations
                .map(|operation| self::operation(operation, &mut lost))
                .collect(),
        );
    }
    if !rule.from.is_empty() {
        let sources = rule.from.iter().filter_map(|from| from.source.as_ref());
        alternatives.push(
            sources
                .map(|source| self::source(source, namespace, &mut lost))
                .collect(),
        );
    }
    for when in &rule.when {
        alternatives.push(vec![condition(when, &mut lost)]);
    }
    lost.sort();
    lost.dedup();
    if lost.is_empty() {
        let clauses = alternatives
            .into_iter()
            .map(|matches| Clause { matches })
            .collect();
        return Some(WireRule { clauses });
    }
    let lost = lost.join(", ");
    if action == WireAction::Allow {
        let reason =
            format!("{lost} cannot be evaluated at layer 4: this ALLOW rule is left out and admits nobody");
        warnings.push(Diagnostic::warning(at, reason));
        return None;
    }
    // An alternative of which nothing remains is true for everybody, and so is its clause.
    let empty = Match::default();
    let mut clauses: Vec<Clause> = Vec::new();
    for matches in alternatives {
        if !matches.is_empty() && !matches.contains(&empty) {
            clauses.push(Clause { matches });
        }
    }
    let reason = if clauses.is_empty() {
        // Denying everybody would be stricter still, but would cut what the rule never spoke of; istiod decides the same.
        clauses.push(Clause { matches: vec![empty] });
        format!(
            "{lost} cannot be evaluated at layer 4 and nothing else is in this DENY rule: it never fires on agents"
        )
    } else {
        format!(
            "{lost} cannot be evaluated at layer 4: this DENY rule is enforced without it, for more connections"
        )
    };
    warnings.push(Diagnostic::warning(at, reason));
    Some(WireRule { clauses })
}

fn operation(operation: &Operation, lost: &mut Vec<String>) -> Match {
    let http: [(&str, &[String]); 6] = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    lost.extend(
        http.iter()
            .filter(|(_, values)| !values.is_empty())
            .map(|(field, _)| (*field).to_owned()),
    );
    Match {
        destination_ports: ports(&operation.ports),
        not_destination_ports: ports(&operation.not_ports),
        ..Match::default()
    }
}

fn source(source: &Source, namespace: &str, lost: &mut Vec<String>) -> Match {
    let http: [(&str, &[String]); 4] = [
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ];
    lost.extend(
        http.iter()
            .filter(|(_, values)| !values.is_empty())
            .map(|(field, _)| (*field).to_owned()),
    );
    let mut principals = texts(&source.principals);
    let mut not_principals = texts(&source.not_principals);
    // A trust domain is the first part of a principal. Values of one list are OR, so a positive one cannot stand beside
    // principals; a negative one can.
    match source
        .trust_domains
        .iter()
        .map(|domain| trust_domain(domain))
        .collect::<Option<Vec<_>>>()
    {
        Some(domains) if principals.is_empty() => principals = domains,
        Some(domains) if domains.is_empty() => {}
        Some(_) | None => lost.push("trustDomains".to_owned()),
    }
    match source
        .not_trust_domains
        .iter()
        .map(|domain| trust_domain(domain))
        .collect::<Option<Vec<_>>>()
    {
        Some(domains) => not_principals.extend(domains),
        None => lost.push("notTrustDomains".to_owned()),
    }
    Match {
        principals,
        not_principals,
        namespaces: texts(&source.namespaces),
        not_namespaces: texts(&source.not_namespaces),
        source_ips: addresses(&source.ip_blocks),
        not_source_ips: addresses(&source.not_ip_blocks),
        service_accounts: service_accounts(&source.service_accounts, namespace),
        not_service_accounts: service_accounts(&source.not_service_accounts, namespace),
        ..Match::default()
    }
}

/// Values and notValues of a condition stand in one match.
fn condition(when: &Condition, lost: &mut Vec<String>) -> Match {
    let (values, not_values) = (&when.values, &when.not_values);
    match when.key.as_str() {
        "source.ip" => Match {
            source_ips: addresses(values),
            not_source_ips: addresses(not_values),
            ..Match::default()
        },
        "source.namespace" => Match {
            namespaces: texts(values),
            not_namespaces: texts(not_values),
            ..Match::default()
        },
        "source.principal" => Match {
            principals: texts(values),
            not_principals: texts(not_values),
            ..Match::default()
        },
        "destination.ip" => Match {
            destination_ips: addresses(values),
            not_destination_ips: addresses(not_values),
            ..Match::default()
        },
        "destination.port" => Match {
            destination_ports: ports(values),
            not_destination_ports: ports(not_values),
            ..Match::default()
        },
        other => {
            lost.push(other.to_owned());
            Match::default()
        }
    }
}

fn text(match_type: MatchType) -> StringMatch {
    StringMatch {
        match_type: Some(match_type),
    }
}

/// Any peer with an identity.
pub(crate) fn presence() -> StringMatch {
    text(MatchType::Presence(()))
}

fn texts(values: &[String]) -> Vec<StringMatch> {
    let one = |value: &String| {
        if value == "*" {
            presence()
        } else if let Some(suffix) = value.strip_prefix('*') {
            text(MatchType::Suffix(suffix.to_owned()))
        } else if let Some(prefix) = value.strip_suffix('*') {
            text(MatchType::Prefix(prefix.to_owned()))
        } else {
            text(MatchType::Exact(value.clone()))
        }
    };
    values.iter().map(one).collect()
}

/// A trust domain as a match of principals; `None` for a suffix, which principals cannot say.
fn trust_domain(domain: &str) -> Option<StringMatch> {
    Some(match domain.split_once('*') {
        None => text(MatchType::Prefix(format!("{domain}/"))),
        Some(("", "")) => presence(),
        Some((prefix, "")) => text(MatchType::Prefix(prefix.to_owned())),
        Some(_) => return None,
    })
}

fn service_accounts(values: &[String], namespace: &str) -> Vec<ServiceAccountMatch> {
    let one = |value: &String| {
        let (namespace, name) = value.split_once('/').unwrap_or((namespace, value));
        ServiceAccountMatch {
            namespace: namespace.to_owned(),
            service_account: name.to_owned(),
        }
    };
    values.iter().map(one).collect()
}

fn ports(values: &[String]) -> Vec<u32> {
    values
        .iter()
        .filter_map(|value| value.parse::<u16>().ok())
        .map(u32::from)
        .collect()
}

fn addresses(values: &[String]) -> Vec<Address> {
    let one = |value: &String| {
        let net = value
            .parse::<IpNet>()
            .ok()
            .or_else(|| value.parse::<IpAddr>().ok().map(IpNet::from))?;
        Some(Address {
            address: ip_bytes(net.addr()),
            length: net.prefix_len().into(),
        })
    };
    values.iter().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tombolo_config::Resource;

    fn converted(namespace: &str, annotations: Value, spec: Value) -> Converted {
        let json = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": namespace, "annotations": annotations}, "spec": spec});
        let Resource::AuthorizationPolicy(object) = Resource::from_json(&json).unwrap() else {
            panic!("{json}")
        };
        convert(&object, "istio-system")
    }

    /// The rules in a short notation: clauses joined by `&`, matches by `|`, rules one per string.
    fn rules(spec: Value) -> (Vec<String>, usize) {
        let converted = converted("shop", json!({}), spec);
        let rules = converted.authorization.unwrap().rules;
        (rules.iter().map(rule_text).collect(), converted.warnings.len())
    }

    fn rule_text(rule: &WireRule) -> String {
        let clauses = rule.clauses.iter().map(|clause| {
            format!(
                "({})",
                clause
                    .matches
                    .iter()
                    .map(match_text)
                    .collect::<Vec<_>>()
                    .join(" | ")
            )
        });
        clauses.collect::<Vec<_>>().join(" & ")
    }

    fn match_text(found: &Match) -> String {
        let mut parts: Vec<String> = Vec::new();
        let texts = |values: &[StringMatch]| {
            let one = |value: &StringMatch| match value.match_type.clone().unwrap() {
                MatchType::Exact(text) => format!("={text}"),
                MatchType::Prefix(text) => format!("{text}*"),
                MatchType::Suffix(text) => format!("*{text}"),
                MatchType::Presence(()) => "*".to_owned(),
            };
            values.iter().map(one).collect::<Vec<_>>().join(",")
        };
        let ips = |values: &[Address]| {
            values
                .iter()
                .map(|a| format!("{:?}/{}", a.address, a.length))
                .collect::<Vec<_>>()
                .join(",")
        };
        let accounts = |values: &[ServiceAccountMatch]| {
            values
                .iter()
                .map(|a| format!("{}/{}", a.namespace, a.service_account))
                .collect::<Vec<_>>()
                .join(",")
        };
        for (name, value) in [
            ("ns", texts(&found.namespaces)),
            ("!ns", texts(&found.not_namespaces)),
            ("p", texts(&found.principals)),
            ("!p", texts(&found.not_principals)),
            ("src", ips(&found.source_ips)),
            ("!src", ips(&found.not_source_ips)),
            ("dst", ips(&found.destination_ips)),
            ("!dst", ips(&found.not_destination_ips)),
            ("port", format!("{:?}", found.destination_ports).replace("[]", "")),
            (
                "!port",
                format!("{:?}", found.not_destination_ports).replace("[]", ""),
            ),
            ("sa", accounts(&found.service_accounts)),
            ("!sa", accounts(&found.not_service_accounts)),
        ] {
            if !value.is_empty() {
                parts.push(format!("{name} {value}"));
            }
        }
        parts.join(" ")
    }

    fn check(spec: Value, expected: &[&str], warnings: usize) {
        let (found, warned) = rules(spec.clone());
        assert_eq!(found, expected, "{spec}");
        assert_eq!(warned, warnings, "{spec}");
    }

    #[test]
    fn scope_action_and_dry_run() {
        let of = |namespace: &str, annotations: Value, spec: Value| {
            let found = converted(namespace, annotations, spec).authorization.unwrap();
            (found.scope(), found.action(), found.dry_run)
        };
        let by_label = json!({"selector": {"matchLabels": {"app": "a"}}});
        assert_eq!(
            of("shop", json!({}), json!({})),
            (Scope::Namespace, WireAction::Allow, false)
        );
        assert_eq!(
            of("istio-system", json!({}), json!({})),
            (Scope::Global, WireAction::Allow, false)
        );
        assert_eq!(
            of("shop", json!({}), by_label.clone()),
            (Scope::WorkloadSelector, WireAction::Allow, false)
        );
        assert_eq!(of("istio-system", json!({}), by_label).0, Scope::WorkloadSelector);
        assert_eq!(of("shop", json!({}), json!({"selector": {}})).0, Scope::Namespace);
        let deny = json!({"action": "DENY", "rules": [{}]});
        assert_eq!(
            of("shop", json!({"istio.io/dry-run": "true"}), deny),
            (Scope::Namespace, WireAction::Deny, true)
        );
    }

    #[test]
    fn what_agents_do_not_enforce_is_left_out_and_said() {
        for spec in [
            json!({"action": "AUDIT", "rules": [{}]}),
            json!({"action": "CUSTOM", "provider": {"name": "x"}, "rules": [{}]}),
            json!({"targetRefs": [{"kind": "Service", "name": "a"}]}),
            json!({"targetRef": {"kind": "Gateway", "name": "a"}}),
        ] {
            let found = converted("shop", json!({}), spec);
            assert!(found.authorization.is_none());
            assert_eq!(found.warnings.len(), 1);
        }
    }

    #[test]
    fn layer_4_fields() {
        check(json!({}), &[], 0);
        check(json!({"rules": [{}]}), &[""], 0);
        check(
            json!({"rules": [{"from": [{"source": {"principals": ["*", "td/*", "*/sa/b", "td/ns/a/sa/b"],
                "notNamespaces": ["x"]}}, {"source": {"serviceAccounts": ["a", "bank/b"], "notIpBlocks": ["10.0.0.0/8"]}}],
                "to": [{"operation": {"ports": ["80", "443"]}}, {"operation": {"notPorts": ["22"]}}]}]}),
            &[
                "(port [80, 443] | !port [22]) & (!ns =x p *,td/*,*/sa/b,=td/ns/a/sa/b | !src [10, 0, 0, 0]/8 sa \
               shop/a,bank/b)",
            ],
            0,
        );
        check(
            json!({"rules": [{"when": [
                {"key": "source.ip", "values": ["10.0.0.1"], "notValues": ["10.0.0.0/24"]},
                {"key": "source.namespace", "values": ["a"]},
                {"key": "source.principal", "notValues": ["*"]},
                {"key": "destination.ip", "values": ["2001:db8::/32"]},
                {"key": "destination.port", "values": ["80"], "notValues": ["81"]}]}]}),
            &[
                "(src [10, 0, 0, 1]/32 !src [10, 0, 0, 0]/24) & (ns =a) & (!p *) & (dst [32, 1, 13, 184, 0, 0, 0, 0, 0, \
               0, 0, 0, 0, 0, 0, 0]/32) & (port [80] !port [81])",
            ],
            0,
        );
    }

    #[test]
    fn an_allow_rule_with_an_http_field_admits_nobody() {
        for field in [
            json!({"to": [{"operation": {"ports": ["80"], "methods": ["GET"]}}]}),
            json!({"to": [{"operation": {"ports": ["80"]}}, {"operation": {"notPaths": ["/x"]}}]}),
            json!({"from": [{"source": {"namespaces": ["a"], "requestPrincipals": ["*"]}}]}),
            json!({"from": [{"source": {"notRemoteIpBlocks": ["10.0.0.0/8"]}}]}),
            json!({"when": [{"key": "request.headers[x]", "values": ["a"]}]}),
            json!({"from": [{"source": {"namespaces": ["a"], "trustDomains": ["*.example"]}}]}),
            json!({"from": [{"source": {"principals": ["td/ns/a/sa/b"], "trustDomains": ["td"]}}]}),
        ] {
            check(
                json!({"rules": [field, {"from": [{"source": {"namespaces": ["b"]}}]}]}),
                &["(ns =b)"],
                1,
            );
        }
    }

    #[test]
    fn a_deny_rule_is_enforced_without_its_http_part() {
        let deny =
            |rule: Value, expected: &str| check(json!({"action": "DENY", "rules": [rule]}), &[expected], 1);
        deny(
            json!({"to": [{"operation": {"ports": ["80"], "methods": ["GET"]}}]}),
            "(port [80])",
        );
        deny(
            json!({"from": [{"source": {"namespaces": ["a"]}}], "to": [{"operation": {"methods": ["GET"]}}]}),
            "(ns =a)",
        );
        // GET on any port or anything on port 80: without the method, everything.
        deny(
            json!({"from": [{"source": {"namespaces": ["a"]}}],
                "to": [{"operation": {"ports": ["80"]}}, {"operation": {"methods": ["GET"]}}]}),
            "(ns =a)",
        );
        deny(
            json!({"from": [{"source": {"namespaces": ["a"]}}],
                "when": [{"key": "request.headers[x]", "values": ["y"]}]}),
            "(ns =a)",
        );
        // Nothing remains: one empty match, which never matches.
        deny(json!({"to": [{"operation": {"methods": ["GET"]}}]}), "()");
        deny(
            json!({"from": [{"source": {"notRequestPrincipals": ["*"]}}]}),
            "()",
        );
    }

    #[test]
    fn trust_domains_are_parts_of_principals() {
        check(
            json!({"rules": [{"from": [{"source": {"trustDomains": ["td", "a*"], "namespaces": ["x"]}},
                {"source": {"principals": ["td/ns/a/sa/b"], "notTrustDomains": ["evil"]}}]}]}),
            &["(ns =x p td/*,a* | p =td/ns/a/sa/b !p evil/*)"],
            0,
        );
    }
}
