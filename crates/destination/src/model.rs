use ipnet::IpNet;
use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock},
};
use tombolo_types::{Hostname, NameError, NamespacedName, NetworkAddress, SpiffeId, TrustDomain, ports};

/// Region, zone and subzone, empty where unknown.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Locality {
    /// For example `eu-west`.
    pub region: Arc<str>,
    /// For example `eu-west-1`.
    pub zone: Arc<str>,
    /// For example a rack.
    pub subzone: Arc<str>,
}

/// How an endpoint is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Tunnel {
    /// Plain TCP: the endpoint is not in the mesh.
    #[default]
    None,
    /// HTTP CONNECT over mutual TLS on port 15008.
    Hbone,
}

/// What a port speaks, as far as the registry was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum AppProtocol {
    /// Not told.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC.
    Grpc,
    /// Bytes.
    Tcp,
    /// TLS of the application itself.
    Tls,
}

/// A port of a service and where it is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortMap {
    /// Port that clients dial at the virtual address.
    pub service_port: u16,
    /// Port of the application on the endpoint. 0: each endpoint says its own (a named target port).
    pub target_port: u16,
    /// What is spoken there.
    pub app_protocol: AppProtocol,
}

/// Where a gateway or waypoint is found.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayTarget {
    /// By service or workload name.
    Hostname(NamespacedName),
    /// By address.
    Address(NetworkAddress),
}

/// A gateway or waypoint and its HBONE port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// Where it is.
    pub target: GatewayTarget,
    /// Its HBONE port, 15008 if the control plane named none.
    pub hbone_port: u16,
}

/// One instance: a VM, a pod, a gateway. Built once per version and then shared, never changed.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Key of the record.
    pub uid: Arc<str>,
    /// Name, for example of its WorkloadEntry.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
    /// Trust domain of its identity.
    pub trust_domain: TrustDomain,
    /// Addresses within `network`, the preferred one first.
    pub addresses: Vec<IpAddr>,
    /// Network that the addresses belong to.
    pub network: Arc<str>,
    /// Cluster that owns it.
    pub cluster_id: Arc<str>,
    /// Kubernetes node; empty for a VM.
    pub node: Arc<str>,
    /// Per-instance name; empty if it has none.
    pub hostname: Arc<str>,
    /// Where it stands.
    pub locality: Locality,
    /// How it is spoken to.
    pub tunnel: Tunnel,
    /// False: takes no new connections unless the service's health policy says otherwise.
    pub healthy: bool,
    /// Share of connections relative to other endpoints. 0: takes none.
    pub capacity: u32,
    /// Canonical service name, for telemetry.
    pub canonical_name: Arc<str>,
    /// Canonical revision, for telemetry.
    pub canonical_revision: Arc<str>,
    /// Name of the owner (deployment, WorkloadGroup), for telemetry.
    pub workload_name: Arc<str>,
    /// Services that it is an endpoint of, with its own ports for each.
    pub services: BTreeMap<NamespacedName, Vec<PortMap>>,
    /// Policies that select it.
    pub policies: Vec<NamespacedName>,
    /// Way into its network for callers outside.
    pub gateway: Option<GatewayAddress>,
    /// Waypoint in front of it.
    pub waypoint: Option<GatewayAddress>,
    expected: Expected,
}

/// A workload's identity as a list of one, computed at first use. Not shown: whether it was computed means nothing.
#[derive(Clone, Default)]
struct Expected(OnceLock<Result<Arc<[SpiffeId]>, NameError>>);

impl fmt::Debug for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("_")
    }
}

impl Workload {
    /// Starts a record: healthy, capacity 1, no addresses, no services, cluster `Kubernetes`, default network.
    pub fn new(
        uid: impl Into<Arc<str>>,
        trust_domain: TrustDomain,
        namespace: impl Into<Arc<str>>,
        service_account: impl Into<Arc<str>>,
    ) -> Self {
        let empty: Arc<str> = "".into();
        Self {
            uid: uid.into(),
            name: empty.clone(),
            namespace: namespace.into(),
            service_account: service_account.into(),
            trust_domain,
            addresses: Vec::new(),
            network: empty.clone(),
            cluster_id: "Kubernetes".into(),
            node: empty.clone(),
            hostname: empty.clone(),
            locality: Locality::default(),
            tunnel: Tunnel::None,
            healthy: true,
            capacity: 1,
            canonical_name: empty.clone(),
            canonical_revision: empty.clone(),
            workload_name: empty,
            services: BTreeMap::new(),
            policies: Vec::new(),
            gateway: None,
            waypoint: None,
            expected: Expected::default(),
        }
    }

    /// Its SPIFFE id.
    ///
    /// # Errors
    /// When namespace or service account are not valid names: such a workload cannot prove who it is.
    pub fn identity(&self) -> Result<SpiffeId, NameError> {
        self.expected().map(|ids| ids[0].clone())
    }

    /// Its identity as the shared list of one that candidates carry.
    pub(crate) fn expected(&self) -> Result<&Arc<[SpiffeId]>, NameError> {
        self.expected
            .0
            .get_or_init(|| {
                let id = SpiffeId::new(self.trust_domain.clone(), &self.namespace, &self.service_account)?;
                Ok(Arc::new([id]))
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// True for a record that stands for all endpoints of a service in another network and locality. It has no identity
    /// of its own: whom a peer must prove to be is what the service says.
    ///
    /// Source: Istio's uid `<network>/SplitHorizonWorkload/...`.
    pub fn is_split_horizon(&self) -> bool {
        self.uid
            .strip_prefix(&*self.network)
            .is_some_and(|rest| rest.starts_with("/SplitHorizonWorkload/"))
    }

    /// Its HBONE address by the first of its addresses, if it has any.
    pub fn hbone(&self) -> Option<SocketAddr> {
        self.addresses
            .first()
            .map(|&ip| SocketAddr::new(ip, ports::HBONE))
    }
}

/// Which equality counts when endpoints are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same Kubernetes node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}

/// What ranks mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    /// All endpoints are equal.
    #[default]
    Unspecified,
    /// Only endpoints that match every scope.
    Strict,
    /// Nearest endpoints first, farther ones when those fail.
    Failover,
    /// Original destination. A virtual address has none, so all endpoints are equal.
    Passthrough,
}

/// How endpoints of a service are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct LoadBalancing {
    /// Scopes, the most important first.
    pub scopes: Vec<Scope>,
    /// What they mean.
    pub mode: Mode,
    /// True: unhealthy endpoints take connections too.
    pub allow_unhealthy: bool,
}

/// Address families in which a name is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum IpFamilies {
    /// Whatever there is.
    #[default]
    Automatic,
    /// IPv4 only.
    V4Only,
    /// IPv6 only.
    V6Only,
    /// Both.
    Dual,
}

/// Who sees a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Its own namespace.
    Namespace,
}

/// A named service. Its endpoints are the workloads that name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Namespace and host name.
    pub key: NamespacedName,
    /// Name, for telemetry.
    pub name: Arc<str>,
    /// Host name.
    pub hostname: Hostname,
    /// Addresses of single hosts; those within the mesh's prefixes are virtual.
    pub addresses: Vec<NetworkAddress>,
    /// Addresses that are prefixes, with their network. Kept for those who list a service; never dialled.
    pub prefixes: Vec<(Arc<str>, IpNet)>,
    /// Ports.
    pub ports: Vec<PortMap>,
    /// Identities that its endpoints may have beside their own.
    pub subject_alt_names: Vec<SpiffeId>,
    /// How endpoints are chosen.
    pub load_balancing: LoadBalancing,
    /// True: preferred among services of the same host name.
    pub canonical: bool,
    /// Who sees it.
    pub visibility: Visibility,
    /// Families in which its name is answered.
    pub ip_families: IpFamilies,
    /// Waypoint in front of it.
    pub waypoint: Option<GatewayAddress>,
    /// Calls of ingress gateways pass the waypoint too.
    pub ingress_use_waypoint: bool,
}

impl Service {
    /// Starts a record: no addresses, no ports, public.
    pub fn new(namespace: impl Into<Arc<str>>, hostname: Hostname) -> Self {
        let name: Arc<str> = hostname.as_str().into();
        Self {
            key: NamespacedName::new(namespace, name.clone()),
            name,
            hostname,
            addresses: Vec::new(),
            prefixes: Vec::new(),
            ports: Vec::new(),
            subject_alt_names: Vec::new(),
            load_balancing: LoadBalancing::default(),
            canonical: false,
            visibility: Visibility::Public,
            ip_families: IpFamilies::Automatic,
            waypoint: None,
            ingress_use_waypoint: false,
        }
    }

    /// The port that clients dial as `port`.
    pub fn port(&self, port: u16) -> Option<&PortMap> {
        self.ports.iter().find(|map| map.service_port == port)
    }
}
