//! Who may do what: the one table of roles, and the one place where it is evaluated.
//!
//! A workload certificate holds no role: it may only register, report for and deregister its own device, and that is
//! decided where those calls are served.

use std::fmt;
use tombolo_types::reserved_namespace;

/// What an operator may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Reads.
    Viewer,
    /// Reads, and makes tokens: the right to become the service accounts of a namespace's groups.
    TokenIssuer,
    /// Everything within namespaces.
    NamespaceAdmin,
    /// Everything.
    MeshAdmin,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Reads one or lists many.
    Read,
    /// Makes a new one.
    Create,
    /// Changes one.
    Update,
    /// Removes one.
    Delete,
    /// Revokes a device, or readmits it.
    Revoke,
}

/// To what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thing {
    /// WorkloadGroup.
    WorkloadGroup,
    /// WorkloadEntry.
    WorkloadEntry,
    /// ServiceEntry, and what says whether it is exported: ServiceExport, Namespace.
    ServiceEntry,
    /// AuthorizationPolicy and PeerAuthentication.
    Policy,
    /// JoinToken.
    JoinToken,
    /// A bearer token.
    Bearer,
    /// An enrolled device.
    Vm,
    /// The audit log.
    Audit,
    /// What the mesh is: names, pin, health. Everybody with a role may read it.
    Mesh,
    /// The right to become a gateway: to carry the calls of a network.
    Gateway,
    /// Another cluster, an invite for one, and the roots that are believed.
    Cluster,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Self; 5] = [Self::Read, Self::Create, Self::Update, Self::Delete, Self::Revoke];
}

impl Thing {
    /// All things.
    pub const ALL: [Self; 11] = [
        Self::WorkloadGroup,
        Self::WorkloadEntry,
        Self::ServiceEntry,
        Self::Policy,
        Self::JoinToken,
        Self::Bearer,
        Self::Vm,
        Self::Audit,
        Self::Mesh,
        Self::Gateway,
        Self::Cluster,
    ];

    /// By the kind of a resource.
    pub fn of_kind(kind: &str) -> Option<Self> {
        match kind {
            "WorkloadGroup" => Some(Self::WorkloadGroup),
            "WorkloadEntry" => Some(Self::WorkloadEntry),
            // Who may publish a service may say that it is exported: the label of a ServiceEntry says as much.
            "ServiceEntry" | "ServiceExport" | "Namespace" => Some(Self::ServiceEntry),
            "AuthorizationPolicy" | "PeerAuthentication" => Some(Self::Policy),
            "JoinToken" => Some(Self::JoinToken),
            "Device" => Some(Self::Vm),
            _ => None,
        }
    }

    /// Not of a namespace.
    fn is_of_the_mesh(self) -> bool {
        matches!(self, Self::Audit | Self::Cluster | Self::Gateway | Self::Mesh)
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Create => "create",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Revoke => "revoke",
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::TokenIssuer => "token-issuer",
            Self::NamespaceAdmin => "namespace-admin",
            Self::MeshAdmin => "mesh-admin",
        })
    }
}

/// A role and where it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Which role.
    pub role: Role,
    /// In which namespaces; empty: in all that are not reserved.
    pub namespaces: Vec<String>,
}

use Thing as T;
use Verb as V;

const CONFIG: &[Thing] = &[T::WorkloadGroup, T::WorkloadEntry, T::ServiceEntry, T::Policy];
const TOKENS: &[Thing] = &[T::JoinToken, T::Bearer];
const READABLE: &[Thing] = &[
    T::WorkloadGroup,
    T::WorkloadEntry,
    T::ServiceEntry,
    T::Policy,
    T::JoinToken,
    T::Vm,
    T::Mesh,
    T::Cluster,
];
const CHANGE: &[Verb] = &[V::Create, V::Update, V::Delete];
const ISSUE: &[Verb] = &[V::Create, V::Delete];

/// The table: a role may do any of the verbs to any of the things.
const TABLE: &[(Role, &[Verb], &[Thing])] = &[
    (Role::Viewer, &[V::Read], READABLE),
    (Role::TokenIssuer, &[V::Read], READABLE),
    (Role::TokenIssuer, ISSUE, TOKENS),
    (Role::NamespaceAdmin, &[V::Read], READABLE),
    (Role::NamespaceAdmin, CHANGE, CONFIG),
    (Role::NamespaceAdmin, ISSUE, TOKENS),
    (Role::NamespaceAdmin, &[V::Delete, V::Revoke], &[T::Vm]),
    (Role::MeshAdmin, &Verb::ALL, &Thing::ALL),
];

/// Things that are never made in a reserved namespace, by nobody: they would make identities of the system.
const NEVER_RESERVED: &[Thing] = &[T::WorkloadGroup, T::WorkloadEntry, T::JoinToken, T::Bearer];

/// Decides. `namespace` is `None` for a question about all namespaces and for things of the mesh.
pub fn allowed(grants: &[Grant], verb: Verb, thing: Thing, namespace: Option<&str>) -> bool {
    let reserved = namespace.is_some_and(reserved_namespace);
    if reserved && matches!(verb, V::Create | V::Update) && NEVER_RESERVED.contains(&thing) {
        return false;
    }
    grants.iter().any(|grant| {
        let covers = match (grant.role, namespace) {
            (Role::MeshAdmin, _) => true,
            _ if thing.is_of_the_mesh() => true,
            // Policies of the root namespace hold for the whole mesh: not for who rules a namespace.
            (Role::Viewer, Some(_)) if reserved => grant.namespaces.is_empty(),
            (_, Some(_)) if reserved => false,
            (_, Some(namespace)) => {
                grant.namespaces.is_empty() || grant.namespaces.iter().any(|n| n == namespace)
            }
            (_, None) => grant.namespaces.is_empty(),
        };
        covers
            && TABLE.iter().any(|(role, verbs, things)| {
                *role == grant.role && verbs.contains(&verb) && things.contains(&thing)
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(role: Role, namespaces: &[&str]) -> Vec<Grant> {
        vec![Grant {
            role,
            namespaces: namespaces.iter().map(|n| (*n).to_owned()).collect(),
        }]
    }

    /// Letters of the verbs that are allowed, in the order of `Verb::ALL`.
    fn row(role: Role, thing: Thing, namespace: Option<&str>) -> String {
        let grants = grant(role, &["shop"]);
        Verb::ALL
            .iter()
            .zip("rcudk".chars())
            .map(|(verb, letter)| {
                if allowed(&grants, *verb, thing, namespace) {
                    letter
                } else {
                    '-'
                }
            })
            .collect()
    }

    #[test]
    fn every_role_verb_and_thing() {
        // thing: viewer, token-issuer, namespace-admin, mesh-admin, each in its own namespace.
        let expected = [
            (T::WorkloadGroup, ["r----", "r----", "rcud-", "rcudk"]),
            (T::WorkloadEntry, ["r----", "r----", "rcud-", "rcudk"]),
            (T::ServiceEntry, ["r----", "r----", "rcud-", "rcudk"]),
            (T::Policy, ["r----", "r----", "rcud-", "rcudk"]),
            (T::JoinToken, ["r----", "rc-d-", "rc-d-", "rcudk"]),
            (T::Bearer, ["-----", "-c-d-", "-c-d-", "rcudk"]),
            (T::Vm, ["r----", "r----", "r--dk", "rcudk"]),
            (T::Audit, ["-----", "-----", "-----", "rcudk"]),
            (T::Mesh, ["r----", "r----", "r----", "rcudk"]),
            (T::Cluster, ["r----", "r----", "r----", "rcudk"]),
            (T::Gateway, ["-----", "-----", "-----", "rcudk"]),
        ];
        let roles = [
            Role::Viewer,
            Role::TokenIssuer,
            Role::NamespaceAdmin,
            Role::MeshAdmin,
        ];
        for (thing, rows) in expected {
            for (role, want) in roles.iter().zip(rows) {
                assert_eq!(row(*role, thing, Some("shop")), want, "{role} {thing:?}");
            }
        }
        assert_eq!(expected.len(), Thing::ALL.len());
    }

    #[test]
    fn a_grant_ends_at_its_namespace() {
        for role in [Role::Viewer, Role::TokenIssuer, Role::NamespaceAdmin] {
            for thing in Thing::ALL.into_iter().filter(|t| !t.is_of_the_mesh()) {
                for namespace in [Some("other"), Some("istio-system"), Some("tombolo-system"), None] {
                    assert_eq!(
                        row(role, thing, namespace),
                        "-----",
                        "{role} {thing:?} {namespace:?}"
                    );
                }
            }
        }
        // A grant for all namespaces: reading everywhere, ruling nowhere reserved.
        let everywhere = grant(Role::NamespaceAdmin, &[]);
        assert!(allowed(&everywhere, V::Create, T::Policy, Some("other")));
        assert!(!allowed(&everywhere, V::Create, T::Policy, Some("istio-system")));
        assert!(allowed(
            &grant(Role::Viewer, &[]),
            V::Read,
            T::Policy,
            Some("istio-system")
        ));
        assert!(allowed(&grant(Role::Viewer, &[]), V::Read, T::Vm, None));
    }

    #[test]
    fn nobody_makes_identities_in_reserved_namespaces() {
        let admin = grant(Role::MeshAdmin, &[]);
        for namespace in ["tombolo-system", "istio-system", "kube-system"] {
            for thing in NEVER_RESERVED {
                assert!(
                    !allowed(&admin, V::Create, *thing, Some(namespace)),
                    "{thing:?} {namespace}"
                );
            }
            assert!(
                allowed(&admin, V::Create, T::Policy, Some(namespace)),
                "mesh-wide policies"
            );
            assert!(
                allowed(&admin, V::Delete, T::WorkloadGroup, Some(namespace)),
                "cleaning up"
            );
        }
    }

    #[test]
    fn without_a_grant_nothing() {
        for verb in Verb::ALL {
            for thing in Thing::ALL {
                assert!(!allowed(&[], verb, thing, Some("shop")));
            }
        }
    }
}
