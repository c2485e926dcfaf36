//! The table of keys: what becomes of each.

/// What becomes of a key of `cluster.env` or `proxyMetadata`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Taken over, or not needed any more.
    Taken(&'static str),
    /// Without a counterpart.
    Lost(&'static str),
}

pub(super) fn fate(key: &str) -> Fate {
    use Fate::{Lost, Taken};
    match key {
        "ISTIO_NAMESPACE" | "POD_NAMESPACE" => Taken("namespace of the WorkloadGroup"),
        "ISTIO_META_WORKLOAD_NAME" | "ISTIO_META_AUTO_REGISTER_GROUP" => {
            Taken("name of the WorkloadGroup; every VM that joins gets its WorkloadEntry by itself")
        }
        "ISTIO_SERVICE" => Taken("the service of the group"),
        "SERVICE_ACCOUNT" => Taken("template.serviceAccount"),
        "ISTIO_META_NETWORK" => Taken("template.network"),
        "ISTIO_METAJSON_LABELS" => Taken("labels of the group"),
        "CANONICAL_SERVICE" | "CANONICAL_REVISION" => {
            Taken("read from the labels service.istio.io/canonical-name and -revision, as in Istio")
        }
        "ISTIO_META_POD_PORTS" => Taken("template.ports"),
        "ISTIO_INBOUND_PORTS" => Taken(
            "template.ports, or every port by the annotation tombolo.io/deliver-all-ports; nothing on the real interface is redirected",
        ),
        "ISTIO_LOCAL_EXCLUDE_PORTS" => {
            Taken("not needed: only declared ports are delivered, never 22, and nothing is redirected")
        }
        "ISTIO_SERVICE_CIDR" => Taken("not needed: only the mesh's own virtual addresses are captured"),
        "ISTIO_META_DNS_CAPTURE" | "ISTIO_META_DNS_AUTO_ALLOCATE" => {
            Taken("always on, for names of the mesh only; other names of the host are never touched")
        }
        "TRUST_DOMAIN" => Taken("the mesh has its trust domain from tombolo-discovery init"),
        "ISTIO_META_CLUSTER_ID" | "ISTIO_META_MESH_ID" => {
            Taken("the mesh has its own from tombolo-discovery init")
        }
        "CA_ADDR" | "ISTIOD_SAN" | "ISTIO_PILOT_PORT" | "PILOT_ADDRESS" => {
            Taken("the join token says where discovery is and who it must be")
        }
        "ISTIO_SVC_IP" => Taken(
            "an agent takes its own addresses; one that is not on the host (1:1 NAT) needs the group's annotation tombolo.io/address-cidrs",
        ),
        "REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION" => Taken("not needed: probes go to the host itself"),
        "PROV_CERT" | "OUTPUT_CERTS" => {
            Lost("certificates are the agent's own and are not written elsewhere")
        }
        "IDENTITY_PATH_PREFIX"
        | "ISTIO_AGENT_FLAGS"
        | "EXIT_ON_ZERO_ACTIVE_CONNECTIONS"
        | "ISTIO_CP_AUTH"
        | "ISTIO_CUSTOM_IP_TABLES"
        | "ISTIO_INBOUND_INTERCEPTION_MODE"
        | "ISTIO_META_INTERCEPTION_MODE"
        | "ISTIO_OUTBOUND_PORTS"
        | "ISTIO_INBOUND_EXCLUDE_PORTS"
        | "ISTIO_SERVICE_EXCLUDE_CIDR" => Lost("of Envoy or iptables on the VM; there is neither"),
        "CREDENTIAL_FETCHER_TYPE" | "CREDENTIAL_IDENTITY_PROVIDER" | "GCP_METADATA" | "PLATFORM" => {
            Lost("identities of a cloud are not taken: a VM joins by a token")
        }
        _ => Lost("unknown key: look up what reads it on the VM"),
    }
}

/// Why a key of ProxyConfig has no counterpart.
pub(super) fn of_proxy_config(key: &str) -> &'static str {
    match key {
        "tracing"
        | "envoyAccessLogService"
        | "envoyMetricsService"
        | "extraStatTags"
        | "proxyStatsMatcher"
        | "zipkinAddress"
        | "tracingServiceName" => {
            "Envoy's telemetry; the agent has Istio's TCP metrics and an access log (docs/OPERATIONS.md, metrics)"
        }
        "binaryPath"
        | "configPath"
        | "customConfigFile"
        | "proxyBootstrapTemplatePath"
        | "serviceCluster"
        | "proxyAdminPort"
        | "statusPort"
        | "statsdUdpAddress"
        | "parentShutdownDuration"
        | "runtimeValues"
        | "controlPlaneAuthPolicy"
        | "interceptionMode"
        | "sds"
        | "availabilityZone"
        | "proxyHeaders" => "of Envoy; there is none on the VM",
        "holdApplicationUntilProxyStarts" => {
            "order your unit After=tombolo-agent.service: it is ready when it serves"
        }
        "image" | "privateKeyProvider" | "caCertificatesPem" | "meshId" => {
            "the mesh decides this, not the VM"
        }
        _ => "unknown key",
    }
}
