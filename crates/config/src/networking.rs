//! Istio's networking.istio.io kinds. Every field of the schema is read, also those that are not evaluated here.
//!
//! Source: istio.io/api networking/v1 workload_group.proto, workload_entry.proto, service_entry.proto (JSON names).

use crate::is_default;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What VMs of one sort have in common.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct WorkloadGroupSpec {
    /// Labels and annotations that each WorkloadEntry of the group gets.
    #[serde(default, skip_serializing_if = "is_default")]
    pub metadata: GroupMetadata,
    /// The entry that each VM of the group becomes; its address is left empty.
    pub template: WorkloadEntrySpec,
    /// How an agent asks its application whether it is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<Probe>,
}

/// Metadata for the entries of a group.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct GroupMetadata {
    /// Labels, over those of the template.
    #[serde(default, skip_serializing_if = "is_default")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "is_default")]
    pub annotations: BTreeMap<String, String>,
}

/// One endpoint. Also a group's template and an inline endpoint of a ServiceEntry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct WorkloadEntrySpec {
    /// IP address, DNS name or `unix://` path; may be empty where a network is named.
    #[serde(default, skip_serializing_if = "is_default")]
    pub address: String,
    /// Port name to number: overrides the target port of a service's port of that name.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ports: BTreeMap<String, u32>,
    /// For selection, beside those in the metadata.
    #[serde(default, skip_serializing_if = "is_default")]
    pub labels: BTreeMap<String, String>,
    /// Network id; empty: the mesh's own.
    #[serde(default, skip_serializing_if = "is_default")]
    pub network: String,
    /// `region/zone/subzone`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub locality: String,
    /// Share of connections among equals; 0 is 1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub weight: u32,
    /// Service account in the same namespace; empty: `default`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub service_account: String,
}

/// A readiness probe in Kubernetes' shape. Times are seconds; 0 takes the default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Probe {
    /// Wait before the first probe; default 0.
    #[serde(default, skip_serializing_if = "is_default")]
    pub initial_delay_seconds: u32,
    /// Limit of one probe; default 1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub timeout_seconds: u32,
    /// From one probe to the next; default 10.
    #[serde(default, skip_serializing_if = "is_default")]
    pub period_seconds: u32,
    /// Successes in a row to become healthy; default 1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub success_threshold: u32,
    /// Failures in a row to become unhealthy; default 1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub failure_threshold: u32,
    /// Healthy on status 200 to 399.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpProbe>,
    /// Healthy when the port accepts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpProbe>,
    /// Healthy when the command ends with 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecProbe>,
    /// Healthy when grpc.health.v1 says SERVING.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcProbe>,
}

/// HTTP probe.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpProbe {
    /// Path; default `/`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub path: String,
    /// Port on this host.
    pub port: u32,
    /// Host name or address; default this host.
    #[serde(default, skip_serializing_if = "is_default")]
    pub host: String,
    /// HTTP or HTTPS; default HTTP.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scheme: String,
    /// Sent with the request.
    #[serde(default, skip_serializing_if = "is_default")]
    pub http_headers: Vec<HttpHeader>,
}

/// A header of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpHeader {
    /// Name.
    #[serde(default)]
    pub name: String,
    /// Value.
    #[serde(default)]
    pub value: String,
}

/// TCP probe.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TcpProbe {
    /// Host name or address; default this host.
    #[serde(default, skip_serializing_if = "is_default")]
    pub host: String,
    /// Port.
    pub port: u32,
}

/// Command probe.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ExecProbe {
    /// Program and arguments; no shell.
    pub command: Vec<String>,
}

/// gRPC probe.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct GrpcProbe {
    /// Port on this host.
    #[serde(default)]
    pub port: u32,
    /// Service of the health request.
    #[serde(default, skip_serializing_if = "is_default")]
    pub service: String,
}

/// A service and where it lives.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServiceEntrySpec {
    /// Host names; may start with `*.`.
    pub hosts: Vec<String>,
    /// Virtual addresses or prefixes; none: one is allocated.
    #[serde(default, skip_serializing_if = "is_default")]
    pub addresses: Vec<String>,
    /// Ports.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ports: Vec<ServicePort>,
    /// Inside or outside of the mesh.
    #[serde(default, skip_serializing_if = "is_default")]
    pub location: Location,
    /// How endpoints are found.
    #[serde(default, skip_serializing_if = "is_default")]
    pub resolution: Resolution,
    /// Endpoints written here; excludes `workload_selector`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub endpoints: Vec<WorkloadEntrySpec>,
    /// Endpoints chosen by label, in the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_selector: Option<WorkloadSelector>,
    /// Namespaces that see it: `*`, `.`, `~` or names; none is `*`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub export_to: Vec<String>,
    /// SPIFFE ids that a server of it may have, beside those of its endpoints.
    #[serde(default, skip_serializing_if = "is_default")]
    pub subject_alt_names: Vec<String>,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServicePort {
    /// What clients connect to.
    pub number: u32,
    /// HTTP, HTTPS, GRPC, HTTP2, MONGO, TCP, TLS, ...; empty: unknown.
    #[serde(default, skip_serializing_if = "is_default")]
    pub protocol: String,
    /// Unique in the service.
    pub name: String,
    /// What the endpoint listens on; 0: `number`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub target_port: u32,
}

/// Labels that choose WorkloadEntries.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct WorkloadSelector {
    /// All must be there. None chooses nothing.
    #[serde(default, skip_serializing_if = "is_default")]
    pub labels: BTreeMap<String, String>,
}

/// Where a service lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Location {
    /// Outside.
    #[default]
    MeshExternal,
    /// Inside.
    MeshInternal,
}

/// How the endpoints of a service are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// The address that the client used.
    #[default]
    None,
    /// As written or selected.
    Static,
    /// By DNS, every address.
    Dns,
    /// By DNS, the first address.
    DnsRoundRobin,
    /// By DNS at the time of the request, for wildcard hosts.
    DynamicDns,
}
