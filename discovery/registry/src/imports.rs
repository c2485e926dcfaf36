//! Services, gateways and roots of other clusters.
//!
//! Source: Istio's coalesced workload per remote network and service
//! (pilot/pkg/serviceregistry/kube/controller/ambient), here also per locality.
//!
//! An imported service has no object here, and yet a virtual address that must not change: agents and applications hold
//! it. It is given as to every service and kept by the caller beside the store ([`Registry::allocate_imported`],
//! [`Registry::set_imported_vips`]). A hash of the name instead would need no keeping, but two of the few ten thousand
//! IPv4 addresses collide early, and who gets the address would depend on who came first.

use crate::{
    Registry,
    content::{self, ObjectKey, Output, key},
    exports::{Export, ServicePort},
    networks::{NetworkGateway, is_host},
    registry::Producer,
    services::app_protocol,
    state::{Claimant, HostAddresses},
    vips::Claim,
    workloads::locality,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};
use tombolo_config::Kind;
use tombolo_proto::istio::workload::{
    Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus, WorkloadType,
};
use tombolo_types::{Hostname, SpiffeId, TrustDomain, check_label, networks};

/// The share of one cluster in the load of a service is bounded: it says its capacity itself.
const CAPACITY_MAX: u32 = 1_000_000;
/// Imports are younger than every object: a service or an address of this cluster's own comes first.
const CREATED: i64 = i64::MAX;
/// Starts the name of what stands for an imported service among the objects. No object is named so.
const KEY_PREFIX: &str = "~imported/";

/// What another cluster says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imports {
    /// Its trust domain: its identities count only there, and in the other names of it.
    pub trust_domain: TrustDomain,
    /// Other names of that trust domain while it is renamed: by the same roots, an identity of one is that of another.
    pub also: Vec<TrustDomain>,
    /// Names that it had: they let nobody in, and connections that they let in run on.
    pub former: Vec<TrustDomain>,
    /// Roots of that trust domain (PEM).
    pub roots_pem: String,
    /// Its roots make identities of this mesh's own trust domain too, as agreed when it was admitted. Without that,
    /// roots of a cluster that names our trust domain are passed over.
    pub shares_trust_domain: bool,
    /// Its mesh domain: there a service has the name `<name>.<namespace>.svc.<mesh domain>`. Empty: the same as ours.
    pub mesh_domain: String,
    /// Not heard of lately. What it said last is served on.
    pub stale: bool,
    /// Ways into its networks.
    pub gateways: Vec<ImportedGateway>,
    /// What it exports.
    pub services: Vec<Export>,
}

impl Imports {
    /// Every name of its trust domain, the one that it makes certificates for first.
    pub(crate) fn names(&self) -> impl Iterator<Item = &TrustDomain> {
        std::iter::once(&self.trust_domain).chain(&self.also)
    }
}

/// A gateway of another cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedGateway {
    /// IP address or DNS name.
    pub address: String,
    /// HBONE over TCP.
    pub hbone_port: u16,
    /// QUIC, where it is served.
    pub quic_port: Option<u16>,
    /// Namespace of its identity.
    pub namespace: String,
    /// Service account of its identity.
    pub service_account: String,
    /// `region/zone/subzone`, as far as known.
    pub locality: String,
    /// The network that it leads into, as that cluster calls it.
    pub network: String,
}

/// The virtual addresses of an imported service, kept by the caller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImportedVip {
    /// Of the service.
    pub namespace: String,
    /// `<name>.<namespace>.svc.<mesh domain>` of this mesh.
    pub host: String,
    /// IPv4; `None` if the prefix is used up.
    pub v4: Option<Ipv4Addr>,
    /// IPv6; `None` if the prefix is used up.
    pub v6: Option<Ipv6Addr>,
}

/// Name here of a network of another cluster: `<cluster>`, or `<cluster>/<network>`. Members that only dial out are
/// behind the same gateways as the others.
pub fn foreign_network(cluster: &str, network: &str) -> String {
    match networks::home_of(network) {
        "" => cluster.to_owned(),
        home => format!("{cluster}/{home}"),
    }
}

pub(crate) fn imported_key(namespace: &str, host: &str) -> ObjectKey {
    ObjectKey {
        kind: Kind::ServiceEntry,
        namespace: namespace.into(),
        name: format!("{KEY_PREFIX}{host}").into(),
    }
}

/// The host of an imported service; `None` for the key of an object.
pub(crate) fn imported_host(key: &ObjectKey) -> Option<&str> {
    key.name.strip_prefix(KEY_PREFIX)
}

fn claimant(key: &ObjectKey) -> Claimant {
    // Filed with instances, whose claims come after those of services.
    Claimant {
        instance: true,
        created: CREATED,
        object: key.clone(),
    }
}

impl Registry {
    /// Replaces what a cluster says about itself; `None` removes all of it. Nothing that an import says reaches
    /// further than its own cluster: identities of other trust domains are left out of it, and a service, host or
    /// address of this registry's own objects comes first.
    ///
    /// A cluster whose name is no DNS label is passed over.
    pub fn set_imports(&mut self, cluster: &str, imports: Option<Imports>) {
        if check_label("cluster", cluster).is_err() {
            return;
        }
        let cluster: Arc<str> = cluster.into();
        let old = self.imports.remove(&cluster);
        if let Some(imports) = imports.clone() {
            self.imports.insert(cluster.clone(), imports);
        }
        let facts = |imports: &Option<Imports>| {
            imports
                .as_ref()
                .map(|i| (i.trust_domain.clone(), i.also.clone(), i.mesh_domain.clone()))
        };
        let roots = |imports: &Option<Imports>| {
            imports.as_ref().map(|i| {
                let names: Vec<TrustDomain> = i.names().chain(&i.former).cloned().collect();
                (names, i.also.len(), i.roots_pem.clone(), i.shares_trust_domain)
            })
        };
        if roots(&old) != roots(&imports) {
            self.dirty.insert(Producer::Mesh);
        }
        let all_anew = facts(&old) != facts(&imports);
        let (before, after) = (self.by_key(old.as_ref()), self.by_key(imports.as_ref()));
        let keys: BTreeSet<&ObjectKey> = before.keys().chain(after.keys()).collect();
        for key in keys {
            if all_anew || before.get(key) != after.get(key) {
                self.set_imported(key, &cluster, after.get(key).cloned());
            }
        }
        let lists = |imports: &Option<Imports>| imports.as_ref().map(|i| i.gateways.clone());
        if all_anew || lists(&old) != lists(&imports) {
            let all = [&old, &imports].into_iter().flatten().flat_map(|i| &i.gateways);
            let touched = all.map(|gateway| foreign_network(&cluster, &gateway.network).into());
            let touched = touched.collect();
            self.refresh_networks(touched);
        }
    }

    /// What a cluster said last.
    pub fn imports(&self, cluster: &str) -> Option<&Imports> {
        self.imports.get(cluster)
    }

    /// Its services by the key that stands for them here; the first of several of one name.
    fn by_key(&self, imports: Option<&Imports>) -> BTreeMap<ObjectKey, Export> {
        let mut found = BTreeMap::new();
        for service in imports.iter().flat_map(|imports| &imports.services) {
            let named = [("namespace", &service.namespace), ("service", &service.name)];
            if named.iter().any(|(what, name)| check_label(what, name).is_err()) {
                continue;
            }
            let host = service.host(&self.settings.mesh_domain);
            if host.parse::<Hostname>().is_ok() {
                found
                    .entry(imported_key(&service.namespace, &host))
                    .or_insert_with(|| service.clone());
            }
        }
        found
    }

    fn set_imported(&mut self, key: &ObjectKey, cluster: &Arc<str>, said: Option<Export>) {
        let clusters = self.imported.entry(key.clone()).or_default();
        match said {
            Some(service) => _ = clusters.insert(cluster.clone(), service),
            None => _ = clusters.remove(cluster),
        }
        let gone = clusters.is_empty();
        if gone {
            self.imported.remove(key);
        }
        let host: Arc<str> = imported_host(key).unwrap_or_default().into();
        let claimed = self
            .hosts
            .get(&host)
            .is_some_and(|claims| claims.contains(&claimant(key)));
        if claimed == gone {
            let (one, none) = (BTreeSet::from([host.clone()]), BTreeSet::new());
            let (before, after) = if gone { (&one, &none) } else { (&none, &one) };
            self.set_hosts(&claimant(key), before, after);
        }
        let networks = self.said_of(key).flat_map(|(cluster, _, service)| {
            let networks = service.endpoints.iter().map(|endpoint| &endpoint.network);
            networks.map(move |network| Arc::from(foreign_network(cluster, network)))
        });
        let networks = networks.collect();
        self.set_places(key, networks);
        self.vip_dirty.insert(key.clone());
        self.mark(key.clone());
        // A service of the same name here names the identities of these endpoints too.
        if let Some(owner) = self
            .owner(&key.namespace, &host)
            .map(|owner| owner.object.clone())
        {
            self.mark(owner);
        }
    }

    /// Clusters that export a service, with what they say about it.
    fn said_of<'a>(
        &'a self,
        key: &ObjectKey,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Imports, &'a Export)> + use<'a> {
        let clusters = self.imported.get(key).into_iter().flatten();
        clusters.filter_map(|(cluster, service)| Some((cluster, self.imports.get(cluster)?, service)))
    }

    /// Identities of a service's endpoints in other clusters, each in the trust domain of its cluster, and in every name
    /// of that while it is renamed: an endpoint has its new certificate sooner or later than the others.
    pub(crate) fn imported_identities(&self, namespace: &str, host: &str) -> BTreeSet<String> {
        let key = imported_key(namespace, host);
        let said = self.said_of(&key).flat_map(|(_, imports, service)| {
            let ids = service.sans.iter().filter_map(|text| text.parse().ok());
            let own = ids.filter(|id: &SpiffeId| imports.names().any(|name| *name == id.trust_domain));
            own.flat_map(|id| {
                imports.names().map(move |name| SpiffeId {
                    trust_domain: name.clone(),
                    ..id.clone()
                })
            })
        });
        said.map(|id| id.to_string()).collect()
    }

    pub(crate) fn imported_gateways(&self, network: &str) -> Vec<NetworkGateway> {
        let mut found = Vec::new();
        for (cluster, imports) in &self.imports {
            for gateway in &imports.gateways {
                let id = SpiffeId::new(
                    imports.trust_domain.clone(),
                    &gateway.namespace,
                    &gateway.service_account,
                );
                if foreign_network(cluster, &gateway.network) != network
                    || gateway.hbone_port == 0
                    || id.is_err()
                    || !is_host(&gateway.address)
                {
                    continue;
                }
                found.push(NetworkGateway {
                    network: network.to_owned(),
                    address: gateway.address.clone(),
                    hbone_port: gateway.hbone_port,
                    quic_port: gateway.quic_port.filter(|port| *port != 0),
                    trust_domain: imports.trust_domain.clone(),
                    namespace: gateway.namespace.clone(),
                    service_account: gateway.service_account.clone(),
                    cluster: cluster.to_string(),
                    locality: gateway.locality.clone(),
                    healthy: true,
                });
            }
        }
        found
    }

    /// All resources of an imported service: itself, unless a service here has its name, and its endpoints.
    pub(crate) fn imported_outputs(&self, key: &ObjectKey) -> Vec<Output> {
        let Some(host) = imported_host(key).filter(|_| self.imported.contains_key(key)) else {
            return Vec::new();
        };
        let mut outputs = Vec::new();
        if self.owns(key, host) {
            outputs.push(content::service(self.imported_service(key, host)));
        }
        for (cluster, imports, service) in self.said_of(key) {
            outputs.extend(
                self.split_horizon(cluster, imports, service, host)
                    .into_iter()
                    .map(content::workload),
            );
        }
        outputs
    }

    fn imported_service(&self, object: &ObjectKey, host: &str) -> Service {
        let mut ports: BTreeMap<u32, Port> = BTreeMap::new();
        let mut name = "";
        for (_, _, service) in self.said_of(object) {
            name = &service.name;
            for port in carried(&service.ports) {
                ports.entry(port.service_port).or_insert(port);
            }
        }
        let vips = self.vips_of(object, CREATED, &host.into());
        Service {
            name: name.to_owned(),
            namespace: object.namespace.to_string(),
            hostname: host.to_owned(),
            addresses: self.everywhere(&vips),
            ports: ports.into_values().collect(),
            subject_alt_names: self
                .imported_identities(&object.namespace, host)
                .into_iter()
                .collect(),
            canonical: self.is_canonical(object, host),
            ..Service::default()
        }
    }

    /// One workload for each network and locality of a cluster in which the service has endpoints.
    fn split_horizon(&self, cluster: &str, imports: &Imports, service: &Export, host: &str) -> Vec<Workload> {
        let mut places: BTreeMap<(String, &str), (u32, u32)> = BTreeMap::new();
        for endpoint in &service.endpoints {
            let place = (
                foreign_network(cluster, &endpoint.network),
                endpoint.locality.as_str(),
            );
            let (healthy, capacity) = places.entry(place).or_default();
            *healthy = healthy.saturating_add(endpoint.healthy);
            *capacity = capacity.saturating_add(endpoint.capacity);
        }
        let ports = PortList {
            ports: carried(&service.ports).collect(),
        };
        let same_domain = imports.mesh_domain.is_empty() || imports.mesh_domain == self.settings.mesh_domain;
        let hostname = if same_domain {
            String::new()
        } else {
            service.host(&imports.mesh_domain)
        };
        let one = |((network, place), (healthy, capacity)): ((String, &str), (u32, u32))| {
            let separator = if place.is_empty() { "" } else { "/" };
            let namespace = &service.namespace;
            let status = if healthy > 0 {
                WorkloadStatus::Healthy
            } else {
                WorkloadStatus::Unhealthy
            };
            let capacity = if capacity > 0 { capacity } else { healthy };
            Workload {
                uid: format!("{network}/SplitHorizonWorkload/{cluster}/{namespace}/{host}{separator}{place}"),
                name: format!("{}.{cluster}", service.name),
                namespace: namespace.clone(),
                hostname: hostname.clone(),
                network_gateway: self.network_gateway(&network),
                network,
                tunnel_protocol: TunnelProtocol::Hbone.into(),
                trust_domain: imports.trust_domain.to_string(),
                cluster_id: cluster.to_owned(),
                canonical_name: service.name.clone(),
                canonical_revision: "latest".to_owned(),
                workload_name: service.name.clone(),
                workload_type: WorkloadType::Pod.into(),
                services: [(key(namespace, host), ports.clone())].into(),
                status: status.into(),
                capacity: Some(capacity.clamp(1, CAPACITY_MAX)),
                locality: locality(place),
                ..Workload::default()
            }
        };
        places.into_iter().map(one).collect()
    }

    /// Roots by trust domain: those set here, and those of other clusters. Clusters of one trust domain add up.
    pub(crate) fn merged_bundles(&self) -> BTreeMap<TrustDomain, String> {
        let mut merged = self.bundles.clone();
        for imports in self.imports.values() {
            for name in self.believed_names(imports) {
                add_roots(merged.entry(name.clone()).or_default(), &imports.roots_pem);
            }
        }
        merged.retain(|_, roots| !roots.is_empty());
        merged
    }

    /// Names of another cluster's trust domain that its roots are believed for: never one of the own trust domain, unless
    /// that was agreed.
    fn believed_names<'a>(&self, imports: &'a Imports) -> impl Iterator<Item = &'a TrustDomain> {
        let names = imports.names();
        names.filter(|name| imports.shares_trust_domain || !self.settings.is_own(name))
    }

    /// Other names that each trust domain of other clusters has, and those that it had.
    pub(crate) fn imported_names(&self) -> BTreeMap<TrustDomain, OtherNames> {
        let mut found: BTreeMap<TrustDomain, OtherNames> = BTreeMap::new();
        for imports in self.imports.values() {
            let mut names = self.believed_names(imports);
            let Some(first) = names.next().filter(|first| !self.settings.is_own(first)) else {
                continue;
            };
            let other = found.entry(first.clone()).or_default();
            other.also.extend(names.cloned());
            let former = imports.former.iter();
            let former = former.filter(|name| !self.settings.is_own(name));
            other.former.extend(former.cloned());
        }
        found
    }

    /// Virtual addresses of imported services that are still to be given. The caller persists them and hands them to
    /// [`Self::set_imported_vips`] before it publishes; until then each call gives the same answer.
    pub fn allocate_imported(&mut self) -> Vec<ImportedVip> {
        let given = self.give_addresses();
        let imported = given.into_iter().filter_map(|(claim, v4, v6)| {
            imported_host(&claim.object)?;
            Some(ImportedVip {
                namespace: claim.object.namespace.to_string(),
                host: claim.host.to_string(),
                v4,
                v6,
            })
        });
        imported.collect()
    }

    /// Virtual addresses that the caller has persisted: all at the start, each new one after. They are held for a
    /// service that is not there, too, until [`Self::drop_imported_vip`].
    pub fn set_imported_vips(&mut self, vips: impl IntoIterator<Item = ImportedVip>) {
        for vip in vips {
            let key = imported_key(&vip.namespace, &vip.host);
            let given = [vip.v4.map(IpAddr::V4), vip.v6.map(IpAddr::V6)];
            let addresses = given.into_iter().flatten().collect();
            self.replace_imported_vips(&key, Some(BTreeMap::from([(vip.host.into(), addresses)])));
        }
    }

    /// Gives addresses back, for example when the cluster was removed that exported the service.
    pub fn drop_imported_vip(&mut self, namespace: &str, host: &str) {
        self.replace_imported_vips(&imported_key(namespace, host), None);
    }

    fn replace_imported_vips(&mut self, key: &ObjectKey, new: Option<HostAddresses>) {
        let old = self.imported_vips.remove(key);
        if let Some(new) = &new {
            self.imported_vips.insert(key.clone(), new.clone());
        }
        let (old, new) = (old.as_ref(), new.as_ref());
        self.set_addresses(key, old.map(|old| (CREATED, old)), new.map(|new| (CREATED, new)));
        self.vip_dirty.insert(key.clone());
        self.mark(key.clone());
    }

    /// Persisted virtual addresses whose service no cluster exports any more.
    pub fn unused_imported_vips(&self) -> Vec<(String, String)> {
        let unused = self
            .imported_vips
            .keys()
            .filter(|key| !self.imported.contains_key(*key));
        let named =
            unused.filter_map(|key| Some((key.namespace.to_string(), imported_host(key)?.to_owned())));
        named.collect()
    }

    /// The claim of an imported service to an address; none if nobody exports it.
    pub(crate) fn imported_claim(&self, key: &ObjectKey) -> Option<(i64, Arc<str>)> {
        let host = imported_host(key).filter(|_| self.imported.contains_key(key))?;
        Some((CREATED, host.into()))
    }

    /// What an imported service is said to hold.
    pub(crate) fn imported_addresses(&self, claim: &Claim) -> Option<&HostAddresses> {
        self.imported_vips.get(&claim.object)
    }
}

/// What a trust domain is or was called beside its name.
#[derive(Debug, Default)]
pub(crate) struct OtherNames {
    pub(crate) also: BTreeSet<TrustDomain>,
    pub(crate) former: BTreeSet<TrustDomain>,
}

/// Adds the certificates of a text to another one, each once.
fn add_roots(roots: &mut String, pem: &str) {
    for certificate in certificates(pem) {
        if !certificates(roots).any(|known| known == certificate) {
            if !(roots.is_empty() || roots.ends_with('\n')) {
                roots.push('\n');
            }
            roots.push_str(certificate);
            roots.push('\n');
        }
    }
}

/// Ports as seen from here: behind the gateway the endpoint's own target port is used.
fn carried(ports: &[ServicePort]) -> impl Iterator<Item = Port> {
    let tcp = ports
        .iter()
        .filter(|port| port.port != 0 && !port.protocol.eq_ignore_ascii_case("udp"));
    tcp.map(|port| Port {
        service_port: port.port.into(),
        target_port: port.port.into(),
        app_protocol: app_protocol(&port.protocol).into(),
    })
}

/// The certificates of a PEM text, each with its frame; retired ones too, whose frame says so.
fn certificates(pem: &str) -> impl Iterator<Item = &str> {
    const KINDS: [(&str, &str); 2] = [
        ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"),
        (
            "-----BEGIN RETIRED CERTIFICATE-----",
            "-----END RETIRED CERTIFICATE-----",
        ),
    ];
    let mut rest = pem;
    std::iter::from_fn(move || {
        let starts = KINDS
            .iter()
            .filter_map(|(begin, end)| Some((rest.find(begin)?, end)));
        let (start, close) = starts.min_by_key(|(start, _)| *start)?;
        let end = start + rest[start..].find(close)? + close.len();
        let found = &rest[start..end];
        rest = &rest[end..];
        Some(found)
    })
}
