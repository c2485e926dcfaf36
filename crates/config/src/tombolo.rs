//! Our own kinds, `tombolo.io/v1`.

use crate::{Metadata, is_default};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, net::IpAddr};

/// The right to enrol into a WorkloadGroup. The secret half never leaves its maker.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct JoinTokenSpec {
    /// Ed25519 public key of the token's seed, standard base64.
    pub public_key: String,
    /// Group in the same namespace.
    pub workload_group: String,
    /// How many devices may use it.
    pub uses: u32,
    /// RFC 3339.
    pub expires: String,
    /// Sources that may use it; none: any.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cidr: Vec<String>,
}

/// Status of a [`JoinTokenSpec`]: who used it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinTokenStatus {
    /// SHA-256 of the device public keys that used it, hex.
    #[serde(default, skip_serializing_if = "is_default")]
    pub used: Vec<String>,
}

/// An enrolled VM. Named by its device id, in the namespace of its workload.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct DeviceSpec {
    /// SubjectPublicKeyInfo of the device key, DER, standard base64.
    pub public_key: String,
    /// Group it enrolled into.
    pub workload_group: String,
    /// Service account it becomes.
    pub service_account: String,
    /// Its WorkloadEntry.
    pub workload_entry: String,
    /// Network id.
    #[serde(default, skip_serializing_if = "is_default")]
    pub network: String,
    /// What the host calls itself; a claim.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hostname: String,
    /// Of the registration; advanced by each renewal.
    #[serde(default, skip_serializing_if = "is_default")]
    pub generation: u64,
    /// SHA-256 of the key in the CSR of this generation, hex.
    #[serde(default, skip_serializing_if = "is_default")]
    pub csr_digest: String,
    /// The answer given for this generation, PEM, so that a repeat gets the same.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cert_chain: Vec<String>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "is_default")]
    pub enrolled_at: String,
    /// Revoked, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Revoked>,
    /// Another key came with a used generation and was refused; waits for a person.
    #[serde(default, skip_serializing_if = "is_default")]
    pub clone_refused: bool,
    /// Version of the agent at its last contact.
    #[serde(default, skip_serializing_if = "is_default")]
    pub agent_version: String,
}

/// When and why a device was revoked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Revoked {
    /// RFC 3339.
    pub at: String,
    /// For people.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reason: String,
}

/// Annotations and labels with a meaning here.
pub mod annotation {
    /// WorkloadGroup: comma-separated label keys that a node may set itself.
    pub const NODE_LABELS: &str = "tombolo.io/node-labels";
    /// WorkloadGroup: comma-separated CIDRs in which a node may claim addresses.
    pub const ADDRESS_CIDRS: &str = "tombolo.io/address-cidrs";
    /// WorkloadGroup: `"true"` delivers every port but 22 and the mesh's own.
    pub const DELIVER_ALL_PORTS: &str = "tombolo.io/deliver-all-ports";
    /// WorkloadGroup: comma-separated ports that are delivered to loopback.
    pub const DELIVER_LOOPBACK: &str = "tombolo.io/deliver-loopback";
    /// WorkloadGroup: `outbound` says that its VMs only dial out; they are called through the gateways of their network.
    pub const REACH: &str = "tombolo.io/reach";
    /// WorkloadEntry of a gateway: comma-separated `host:port` under which callers outside of its network reach it;
    /// 15008 at the address of the entry by default.
    pub const GATEWAY_ADDRESS: &str = "tombolo.io/gateway-address";
    /// WorkloadEntry of a gateway: port of QUIC at the same hosts.
    pub const GATEWAY_QUIC_PORT: &str = "tombolo.io/gateway-quic-port";
    /// Label of a ServiceEntry or a Namespace: `"true"` exports the service, or those of the namespace, to other
    /// clusters; `"false"` does not.
    pub const GLOBAL: &str = "istio.io/global";
    /// WorkloadEntry: the WorkloadGroup that it was made from.
    pub const AUTO_REGISTRATION_GROUP: &str = "istio.io/autoRegistrationGroup";
    /// WorkloadEntry, label or annotation: `http` says that it takes HBONE.
    pub const TUNNEL: &str = "networking.istio.io/tunnel";
    /// WorkloadEntry: `"true"` makes it unhealthy until its status says otherwise.
    pub const HEALTH_CHECKS_ENABLED: &str = "proxy.istio.io/health-checks-enabled";
    /// ServiceEntry, label: `"false"` makes a service without addresses headless.
    pub const ENABLE_AUTOALLOCATE_IP: &str = "networking.istio.io/enable-autoallocate-ip";
    /// ServiceEntry: preference for near endpoints.
    pub const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";
    /// AuthorizationPolicy: `"true"` only logs.
    pub const DRY_RUN: &str = "istio.io/dry-run";
    /// Label: name for telemetry.
    pub const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
    /// Label: revision for telemetry.
    pub const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";

    /// All of ours.
    pub const OURS: [&str; 7] = [
        NODE_LABELS,
        ADDRESS_CIDRS,
        DELIVER_ALL_PORTS,
        DELIVER_LOOPBACK,
        REACH,
        GATEWAY_ADDRESS,
        GATEWAY_QUIC_PORT,
    ];
}

/// What the annotations of a WorkloadGroup allow its VMs. A part that cannot be read allows nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupOptions {
    /// Label keys that a node may set itself.
    pub node_labels: BTreeSet<String>,
    /// Where a node may claim addresses.
    pub address_cidrs: Vec<IpNet>,
    /// Every port but 22 and the mesh's own is delivered.
    pub deliver_all_ports: bool,
    /// Ports that are delivered to loopback.
    pub loopback_ports: BTreeSet<u16>,
    /// Its VMs only dial out.
    pub outbound_only: bool,
}

impl GroupOptions {
    /// Reads them from the metadata of a group.
    pub fn of(metadata: &Metadata) -> Self {
        let text = |key: &str| metadata.annotations.get(key).map_or("", String::as_str);
        let items = |key: &str| {
            text(key)
                .split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
        };
        Self {
            node_labels: items(annotation::NODE_LABELS).map(str::to_owned).collect(),
            address_cidrs: items(annotation::ADDRESS_CIDRS)
                .filter_map(|item| {
                    item.parse()
                        .ok()
                        .or_else(|| item.parse::<IpAddr>().ok().map(IpNet::from))
                })
                .collect(),
            deliver_all_ports: text(annotation::DELIVER_ALL_PORTS) == "true",
            loopback_ports: items(annotation::DELIVER_LOOPBACK)
                .filter_map(|item| item.parse().ok())
                .collect(),
            outbound_only: text(annotation::REACH) == "outbound",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_group() {
        let mut metadata = Metadata::named("shop", "catalog");
        assert_eq!(GroupOptions::of(&metadata), GroupOptions::default());
        for (key, value) in [
            (annotation::NODE_LABELS, "version, zone"),
            (annotation::ADDRESS_CIDRS, "10.0.0.0/8,192.0.2.1,x"),
            (annotation::DELIVER_ALL_PORTS, "true"),
            (annotation::DELIVER_LOOPBACK, "8080,70000"),
            (annotation::REACH, "outbound"),
        ] {
            metadata.annotations.insert(key.to_owned(), value.to_owned());
        }
        let options = GroupOptions::of(&metadata);
        assert_eq!(
            options.node_labels,
            BTreeSet::from(["version".to_owned(), "zone".to_owned()])
        );
        assert_eq!(
            options.address_cidrs,
            ["10.0.0.0/8".parse().unwrap(), "192.0.2.1/32".parse().unwrap()]
        );
        assert!(options.deliver_all_ports && options.outbound_only);
        assert_eq!(options.loopback_ports, BTreeSet::from([8080]));
    }
}
