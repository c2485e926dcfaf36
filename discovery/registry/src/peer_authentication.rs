//! PeerAuthentication as policies that deny plaintext.
//!
//! Source: Istio pilot/pkg/serviceregistry/kube/controller/ambient/authorization.go. One difference: DISABLE of a port
//! is PERMISSIVE everywhere, also below a STRICT namespace.

use crate::authorization::presence;
use tombolo_config::{LabelSelector, MtlsMode, PeerAuthenticationSpec};
use tombolo_proto::istio::security::{Action, Authorization, Clause, Match, Rule, Scope};

/// Name of the policy that denies plaintext on every port. `_` cannot be in the name of an object.
pub(crate) const STATIC_STRICT: &str = "istio_converted_static_strict";
/// Name of the policy that admits nobody, of meshes founded so.
pub(crate) const DEFAULT_DENY: &str = "tombolo-default-deny";

/// Labels that it selects by; `None` where it is for a namespace or the mesh.
pub(crate) fn selector(spec: &PeerAuthenticationSpec) -> Option<&std::collections::BTreeMap<String, String>> {
    spec.selector
        .as_ref()
        .map(|LabelSelector { match_labels }| match_labels)
        .filter(|labels| !labels.is_empty())
}

/// The mode that it sets; `None` where it leaves that to the wider policy.
pub(crate) fn mode(spec: &PeerAuthenticationSpec) -> Option<MtlsMode> {
    spec.mtls
        .as_ref()
        .map(|mtls| mtls.mode)
        .filter(|mode| *mode != MtlsMode::Unset)
}

/// What the policy of a workload comes to, below a namespace or mesh that is strict or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Plaintext is admitted.
    Permissive,
    /// Plaintext is denied on every port.
    Strict,
    /// Plaintext is denied as this says: on all ports but `except`, or on `only`.
    Ports {
        except: Option<Vec<u32>>,
        only: Vec<u32>,
    },
}

/// Combines modes of a workload policy and its ports.
pub(crate) fn effect(spec: &PeerAuthenticationSpec, wider_is_strict: bool) -> Effect {
    let strict = match mode(spec) {
        Some(mode) => mode == MtlsMode::Strict,
        None => wider_is_strict,
    };
    // A port that leaves it open has the mode of the workload.
    let ports = |wanted: fn(MtlsMode) -> bool| {
        let chosen = spec.port_level_mtls.iter().filter(|(_, mtls)| wanted(mtls.mode));
        let mut ports: Vec<u32> = chosen.filter_map(|(port, _)| port.parse().ok()).collect();
        ports.sort_unstable();
        ports
    };
    let open = ports(|mode| matches!(mode, MtlsMode::Permissive | MtlsMode::Disable));
    let closed = ports(|mode| mode == MtlsMode::Strict);
    match (strict, open.is_empty(), closed.is_empty()) {
        (true, true, _) => Effect::Strict,
        (true, false, _) => Effect::Ports {
            except: Some(open),
            only: Vec::new(),
        },
        (false, _, true) => Effect::Permissive,
        (false, _, false) => Effect::Ports {
            except: None,
            only: closed,
        },
    }
}

/// Name of the policy that a PeerAuthentication with ports becomes.
pub(crate) fn converted_name(name: &str) -> String {
    format!("converted_peer_authentication_{name}")
}

/// The policy for ports; `None` where one of all ports says the same.
pub(crate) fn convert(namespace: &str, name: &str, effect: &Effect) -> Option<Authorization> {
    let Effect::Ports { except, only } = effect else {
        return None;
    };
    let ports = match except {
        Some(except) => Match {
            not_destination_ports: except.clone(),
            ..Match::default()
        },
        None => Match {
            destination_ports: only.clone(),
            ..Match::default()
        },
    };
    let rule = Rule {
        clauses: vec![anonymous(), Clause { matches: vec![ports] }],
    };
    Some(denying(namespace, converted_name(name), vec![rule]))
}

/// The policy that denies plaintext on every port.
pub(crate) fn static_strict(root_namespace: &str) -> Authorization {
    denying(
        root_namespace,
        STATIC_STRICT.to_owned(),
        vec![Rule {
            clauses: vec![anonymous()],
        }],
    )
}

/// The policy that admits nobody: an ALLOW policy without a rule, so that every other ALLOW policy still counts.
pub(crate) fn default_deny(root_namespace: &str) -> Authorization {
    Authorization {
        name: DEFAULT_DENY.to_owned(),
        namespace: root_namespace.to_owned(),
        scope: Scope::Global.into(),
        action: Action::Allow.into(),
        ..Authorization::default()
    }
}

fn denying(namespace: &str, name: String, rules: Vec<Rule>) -> Authorization {
    Authorization {
        name,
        namespace: namespace.to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        rules,
        dry_run: false,
        extensions: Vec::new(),
    }
}

/// Matches a peer without an identity.
fn anonymous() -> Clause {
    Clause {
        matches: vec![Match {
            not_principals: vec![presence()],
            ..Match::default()
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use MtlsMode::{Disable, Permissive, Strict, Unset};
    use tombolo_config::security::Mtls;

    fn spec(mode: Option<MtlsMode>, ports: &[(&str, MtlsMode)]) -> PeerAuthenticationSpec {
        PeerAuthenticationSpec {
            selector: Some(LabelSelector {
                match_labels: [("app".to_owned(), "a".to_owned())].into(),
            }),
            mtls: mode.map(|mode| Mtls { mode }),
            port_level_mtls: ports
                .iter()
                .map(|(port, mode)| ((*port).to_owned(), Mtls { mode: *mode }))
                .collect(),
        }
    }

    #[test]
    fn modes_of_workload_ports_and_wider_policy() {
        let except = |ports: &[u32]| Effect::Ports {
            except: Some(ports.to_vec()),
            only: vec![],
        };
        let only = |ports: &[u32]| Effect::Ports {
            except: None,
            only: ports.to_vec(),
        };
        for (mode, ports, wider, expected) in [
            (None, &[][..], false, Effect::Permissive),
            (None, &[], true, Effect::Strict),
            (Some(Unset), &[], true, Effect::Strict),
            (Some(Permissive), &[], true, Effect::Permissive),
            (Some(Disable), &[], true, Effect::Permissive),
            (Some(Strict), &[], false, Effect::Strict),
            (Some(Strict), &[("80", Strict)], false, Effect::Strict),
            (
                Some(Strict),
                &[("80", Permissive), ("443", Strict), ("8", Disable)],
                false,
                except(&[8, 80]),
            ),
            (
                Some(Permissive),
                &[("80", Strict), ("443", Permissive)],
                true,
                only(&[80]),
            ),
            (Some(Permissive), &[("443", Permissive)], true, Effect::Permissive),
            (None, &[("80", Permissive)], true, except(&[80])),
            (None, &[("80", Unset)], true, Effect::Strict),
            (None, &[("80", Permissive)], false, Effect::Permissive),
            (None, &[("80", Strict)], false, only(&[80])),
            (None, &[("80", Strict)], true, Effect::Strict),
        ] {
            assert_eq!(
                effect(&spec(mode, ports), wider),
                expected,
                "{mode:?} {ports:?} {wider}"
            );
        }
    }

    #[test]
    fn strict_with_an_open_port_is_one_rule() {
        let found = convert(
            "shop",
            "x",
            &Effect::Ports {
                except: Some(vec![80]),
                only: vec![],
            },
        )
        .unwrap();
        assert_eq!(
            (found.name.as_str(), found.action(), found.scope()),
            (
                "converted_peer_authentication_x",
                Action::Deny,
                Scope::WorkloadSelector
            )
        );
        assert_eq!(
            found.rules,
            [Rule {
                clauses: vec![
                    Clause {
                        matches: vec![Match {
                            not_principals: vec![presence()],
                            ..Match::default()
                        }]
                    },
                    Clause {
                        matches: vec![Match {
                            not_destination_ports: vec![80],
                            ..Match::default()
                        }]
                    },
                ]
            }]
        );
        assert!(convert("shop", "x", &Effect::Strict).is_none());
    }
}
