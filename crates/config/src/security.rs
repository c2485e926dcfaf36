//! Istio's security.istio.io kinds. Every field of the schema is read, also those that are not evaluated here.
//!
//! Source: istio.io/api security/v1beta1 authorization_policy.proto, peer_authentication.proto (JSON names).

use crate::is_default;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Who may connect to what.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct AuthorizationPolicySpec {
    /// Workloads it applies to; none: the namespace, or the mesh where it is in the root namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// Gateways or services whose waypoint applies it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_ref: Option<TargetRef>,
    /// As `target_ref`, several.
    #[serde(default, skip_serializing_if = "is_default")]
    pub target_refs: Vec<TargetRef>,
    /// Any of them fires the policy. None: it never fires.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rules: Vec<Rule>,
    /// What firing means.
    #[serde(default, skip_serializing_if = "is_default")]
    pub action: Action,
    /// Of a CUSTOM action.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<Provider>,
}

/// Labels that choose workloads.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct LabelSelector {
    /// All must be there. None is the same as no selector.
    #[serde(default, skip_serializing_if = "is_default")]
    pub match_labels: BTreeMap<String, String>,
}

/// A Gateway API object.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TargetRef {
    /// API group.
    #[serde(default, skip_serializing_if = "is_default")]
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Only the policy's own is allowed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub namespace: String,
}

/// What firing means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Action {
    /// Admitted; and where any ALLOW policy applies, nothing else is.
    #[default]
    Allow,
    /// Refused.
    Deny,
    /// Logged; needs layer 7.
    Audit,
    /// An external authorizer decides; needs layer 7.
    Custom,
}

/// The external authorizer of a CUSTOM action.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Provider {
    /// Name in the mesh configuration.
    #[serde(default, skip_serializing_if = "is_default")]
    pub name: String,
}

/// from AND to AND every when. Nothing in it: fires always.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    /// Any of them; none: everybody.
    #[serde(default, skip_serializing_if = "is_default")]
    pub from: Vec<From>,
    /// Any of them; none: everything.
    #[serde(default, skip_serializing_if = "is_default")]
    pub to: Vec<To>,
    /// All of them.
    #[serde(default, skip_serializing_if = "is_default")]
    pub when: Vec<Condition>,
}

/// Wraps a source.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct From {
    /// Who.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

/// Wraps an operation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct To {
    /// What.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<Operation>,
}

/// Who: fields are AND, values of one field OR; a `not_` field must not match.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Source {
    /// `<trust domain>/ns/<namespace>/sa/<service account>`, with `*` at one end.
    #[serde(default, skip_serializing_if = "is_default")]
    pub principals: Vec<String>,
    /// See `principals`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_principals: Vec<String>,
    /// From a JWT; layer 7.
    #[serde(default, skip_serializing_if = "is_default")]
    pub request_principals: Vec<String>,
    /// See `request_principals`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_request_principals: Vec<String>,
    /// Namespace of the peer's certificate.
    #[serde(default, skip_serializing_if = "is_default")]
    pub namespaces: Vec<String>,
    /// See `namespaces`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_namespaces: Vec<String>,
    /// Address of the connection.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ip_blocks: Vec<String>,
    /// See `ip_blocks`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_ip_blocks: Vec<String>,
    /// Address from X-Forwarded-For; layer 7.
    #[serde(default, skip_serializing_if = "is_default")]
    pub remote_ip_blocks: Vec<String>,
    /// See `remote_ip_blocks`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_remote_ip_blocks: Vec<String>,
    /// `namespace/name`, or a name in the policy's namespace; any trust domain.
    #[serde(default, skip_serializing_if = "is_default")]
    pub service_accounts: Vec<String>,
    /// See `service_accounts`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_service_accounts: Vec<String>,
    /// Trust domain of the peer's certificate.
    #[serde(default, skip_serializing_if = "is_default")]
    pub trust_domains: Vec<String>,
    /// See `trust_domains`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_trust_domains: Vec<String>,
}

/// What: fields are AND, values of one field OR; a `not_` field must not match.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Operation {
    /// HTTP host; layer 7.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hosts: Vec<String>,
    /// See `hosts`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_hosts: Vec<String>,
    /// Port of the workload, as text.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ports: Vec<String>,
    /// See `ports`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_ports: Vec<String>,
    /// HTTP method; layer 7.
    #[serde(default, skip_serializing_if = "is_default")]
    pub methods: Vec<String>,
    /// See `methods`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_methods: Vec<String>,
    /// HTTP path; layer 7.
    #[serde(default, skip_serializing_if = "is_default")]
    pub paths: Vec<String>,
    /// See `paths`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_paths: Vec<String>,
}

/// An attribute and its values.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Condition {
    /// Attribute, for example `source.ip`.
    pub key: String,
    /// Any of them.
    #[serde(default, skip_serializing_if = "is_default")]
    pub values: Vec<String>,
    /// None of them.
    #[serde(default, skip_serializing_if = "is_default")]
    pub not_values: Vec<String>,
}

/// Whether plaintext is admitted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PeerAuthenticationSpec {
    /// Workloads it applies to; none: the namespace, or the mesh where it is in the root namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// For all ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<Mtls>,
    /// By port of the workload; only with a selector.
    #[serde(default, skip_serializing_if = "is_default")]
    pub port_level_mtls: BTreeMap<String, Mtls>,
}

/// Wraps a mode.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Mtls {
    /// The mode.
    #[serde(default, skip_serializing_if = "is_default")]
    pub mode: MtlsMode,
}

/// Whether plaintext is admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MtlsMode {
    /// As the wider policy says.
    #[default]
    Unset,
    /// Plaintext is expected; admitted here as PERMISSIVE.
    Disable,
    /// Both.
    Permissive,
    /// Only mutual TLS.
    Strict,
}
