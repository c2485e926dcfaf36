use crate::{
    convert::{self, Interner},
    names::{self, Bundle},
    own::{ExposedPort, Exposure, Own},
    policies::Policies,
    registry::{Registry, is_virtual},
    resource::{Held, Rejected, check_name, open},
};
use imbl::OrdMap;
use std::{collections::HashMap, net::IpAddr, sync::Arc};
use tombolo_authz::Policy;
use tombolo_destination::{Gateway, Index, Locality, Service, Source, Workload};
use tombolo_dns::{Addresses, Names};
use tombolo_proto::{istio::security, istio::workload as wds, tombolo::v1, type_url, xds};
use tombolo_types::{AddressPlan, DeviceId, Hostname, NamespacedName, NetworkAddress, TrustDomain, networks};

/// One version of the world. Cheap to clone; readers keep a clone and never see it change.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub(crate) version: u64,
    pub(crate) plan: AddressPlan,
    pub(crate) own: Arc<Own>,
    pub(crate) addresses_synced: bool,
    pub(crate) policies_synced: bool,
    pub(crate) registry: Registry,
    pub(crate) policies: Policies,
    /// Sorted device ids by resource name; there is one resource, "devices".
    pub(crate) revocations: OrdMap<Arc<str>, Arc<Held<Vec<u64>>>>,
    pub(crate) bundles: OrdMap<TrustDomain, Arc<Held<Bundle>>>,
    pub(crate) exposure: Option<Arc<Held<Exposure>>>,
    /// Ways into networks, by network.
    pub(crate) gateways: OrdMap<Arc<str>, Arc<Held<Vec<Gateway>>>>,
    /// Services that other trust domains may call.
    pub(crate) exported: OrdMap<NamespacedName, Arc<Held<()>>>,
}

impl Snapshot {
    /// Knows nothing yet.
    pub fn empty(plan: AddressPlan, own: Own) -> Self {
        Self {
            version: 0,
            plan,
            own: Arc::new(own),
            addresses_synced: false,
            policies_synced: false,
            registry: Registry::default(),
            policies: Policies::default(),
            revocations: OrdMap::new(),
            bundles: OrdMap::new(),
            exposure: None,
            gateways: OrdMap::new(),
            exported: OrdMap::new(),
        }
    }

    /// Applies one incremental response. Good resources are taken; bad ones are returned, each is a part of the NACK,
    /// and what was held under their names before stays. A type that is not known here is refused whole.
    pub fn apply(
        &mut self,
        type_url: &str,
        resources: Vec<xds::Resource>,
        removed: &[String],
    ) -> Vec<Rejected> {
        self.version += 1;
        for name in removed {
            self.remove(type_url, name);
        }
        let mut interner = Interner::default();
        let rejected = resources
            .into_iter()
            .filter_map(|resource| self.upsert(type_url, resource, &mut interner).err())
            .collect();
        match type_url {
            type_url::ADDRESS => self.addresses_synced = true,
            type_url::AUTHORIZATION => self.policies_synced = true,
            _ => {}
        }
        rejected
    }

    fn upsert(
        &mut self,
        type_url: &str,
        resource: xds::Resource,
        interner: &mut Interner,
    ) -> Result<(), Rejected> {
        let rejected = |name: String| |reason: String| Rejected { name, reason };
        match type_url {
            type_url::ADDRESS => {
                let (name, message, payload) = open::<wds::Address>(type_url, resource)?;
                match message.r#type {
                    Some(wds::address::Type::Workload(wire)) => {
                        let checked = convert::workload(interner, &wire).and_then(|record| {
                            check_name(&name, &record.uid)?;
                            Ok(record)
                        });
                        let record = checked.map_err(rejected(name))?;
                        self.registry
                            .upsert_workload(Held::new(record, payload), &self.own);
                    }
                    Some(wds::address::Type::Service(wire)) => {
                        let checked = convert::service(interner, &wire).and_then(|record| {
                            check_name(&name, &record.key)?;
                            Ok(record)
                        });
                        let record = checked.map_err(rejected(name))?;
                        self.registry
                            .upsert_service(Held::new(record, payload), &self.plan, &self.own);
                    }
                    None => return Err(rejected(name)("is neither a workload nor a service".to_owned())),
                }
            }
            type_url::AUTHORIZATION => {
                let (name, message, payload) = open::<security::Authorization>(type_url, resource)?;
                let checked = convert::policy(&message).and_then(|record| {
                    check_name(&name, &record.key)?;
                    Ok(record)
                });
                self.policies
                    .upsert(Held::new(checked.map_err(rejected(name))?, payload));
            }
            type_url::REVOCATIONS => {
                let (name, message, payload) = open::<v1::Revocations>(type_url, resource)?;
                let mut devices = message.device_ids;
                devices.sort_unstable();
                self.revocations.insert(name.into(), Held::new(devices, payload));
            }
            type_url::TRUST_BUNDLE => {
                let (name, message, payload) = open::<v1::TrustBundle>(type_url, resource)?;
                let checked = message
                    .trust_domain
                    .parse::<TrustDomain>()
                    .map_err(|error| error.to_string());
                let checked = checked.and_then(|trust_domain| {
                    check_name(&name, &trust_domain)?;
                    Ok((trust_domain, names::bundle(message)?))
                });
                let (trust_domain, bundle) = checked.map_err(rejected(name))?;
                self.bundles.insert(trust_domain, Held::new(bundle, payload));
            }
            type_url::SERVICE_VIP => {
                let (name, message, payload) = open::<v1::ServiceVip>(type_url, resource)?;
                let key = NamespacedName::new(message.namespace.as_str(), message.hostname.as_str());
                let checked = check_name(&name, &key).and_then(|()| self.read_vips(&message.vips));
                let vips = checked.map_err(rejected(name))?;
                self.registry
                    .upsert_override(key, Held::new(vips, payload), &self.plan, &self.own);
            }
            type_url::EXPOSURE => {
                let (name, message, payload) = open::<v1::Exposure>(type_url, resource)?;
                let checked = check_name(&name, self.exposure_name()).and_then(|()| read_exposure(&message));
                self.exposure = Some(Held::new(checked.map_err(rejected(name))?, payload));
            }
            type_url::NETWORK_GATEWAYS => {
                let (name, message, payload) = open::<v1::NetworkGateways>(type_url, resource)?;
                let checked = check_name(&name, networks::resource_name(&message.network)).and_then(|()| {
                    let read = |wire| convert::network_gateway(interner, wire);
                    message.gateways.iter().map(read).collect::<Result<Vec<_>, _>>()
                });
                let gateways = checked.map_err(rejected(name))?;
                self.gateways
                    .insert(message.network.into(), Held::new(gateways, payload));
            }
            type_url::EXPORTED_SERVICE => {
                let (name, message, payload) = open::<v1::ExportedService>(type_url, resource)?;
                let key = NamespacedName::new(message.namespace.as_str(), message.hostname.as_str());
                check_name(&name, &key).map_err(rejected(name))?;
                self.exported.insert(key, Held::new((), payload));
            }
            _ => {
                return Err(rejected(resource.name)(format!(
                    "is of the unknown type {type_url:?}"
                )));
            }
        }
        Ok(())
    }

    fn remove(&mut self, type_url: &str, name: &str) {
        let key = || name.parse::<NamespacedName>().ok();
        match type_url {
            // A workload's uid first; a service's name has exactly one slash.
            type_url::ADDRESS => {
                if !self.registry.remove_workload(name, &self.own)
                    && let Some(key) = key()
                {
                    self.registry.remove_service(&key, &self.plan, &self.own);
                }
            }
            type_url::AUTHORIZATION => {
                if let Some(key) = key() {
                    self.policies.remove(&key);
                }
            }
            type_url::REVOCATIONS => _ = self.revocations.remove(name),
            type_url::TRUST_BUNDLE => {
                if let Ok(trust_domain) = name.parse::<TrustDomain>() {
                    self.bundles.remove(&trust_domain);
                }
            }
            type_url::SERVICE_VIP => {
                if let Some(key) = key() {
                    self.registry.remove_override(&key, &self.plan, &self.own);
                }
            }
            type_url::EXPOSURE if name == self.exposure_name() => self.exposure = None,
            type_url::NETWORK_GATEWAYS => {
                let network = if name == networks::DEFAULT_NETWORK_RESOURCE {
                    ""
                } else {
                    name
                };
                self.gateways.remove(network);
            }
            type_url::EXPORTED_SERVICE => {
                if let Some(key) = key() {
                    self.exported.remove(&key);
                }
            }
            _ => {}
        }
    }

    fn exposure_name(&self) -> String {
        format!("{}/{}", self.own.namespace, self.own.workload_name)
    }

    fn read_vips(&self, texts: &[String]) -> Result<Vec<IpAddr>, String> {
        let read = |text: &String| match text.parse() {
            Ok(address) if is_virtual(&self.plan, address) => Ok(address),
            Ok(_) => Err(format!(
                "has the address {text}, which is not one that this mesh gives to services"
            )),
            Err(_) => Err(format!("has the address {text:?}, which is none")),
        };
        texts.iter().map(read).collect()
    }

    /// Resource name to version held, for `initial_resource_versions` of a new stream. Empty for an unknown type.
    pub fn held(&self, type_url: &str) -> HashMap<String, String> {
        let mut held = HashMap::new();
        self.each_held(type_url, &mut |name, version, _| {
            _ = held.insert(name.to_owned(), version.to_owned())
        });
        held
    }

    /// Calls `each` with name, version and payload of every resource of a type.
    pub(crate) fn each_held(&self, type_url: &str, each: &mut dyn FnMut(&str, &str, &[u8])) {
        match type_url {
            type_url::ADDRESS => {
                self.registry
                    .services
                    .iter()
                    .for_each(|(key, h)| each(&key.to_string(), &h.version, &h.raw));
                self.registry
                    .workloads
                    .iter()
                    .for_each(|(uid, h)| each(uid, &h.version, &h.raw));
            }
            type_url::AUTHORIZATION => {
                self.policies
                    .held()
                    .iter()
                    .for_each(|(key, h)| each(&key.to_string(), &h.version, &h.raw));
            }
            type_url::REVOCATIONS => self
                .revocations
                .iter()
                .for_each(|(name, h)| each(name, &h.version, &h.raw)),
            type_url::TRUST_BUNDLE => self
                .bundles
                .iter()
                .for_each(|(td, h)| each(td.as_str(), &h.version, &h.raw)),
            type_url::SERVICE_VIP => {
                self.registry
                    .overrides
                    .iter()
                    .for_each(|(key, h)| each(&key.to_string(), &h.version, &h.raw));
            }
            type_url::EXPOSURE => {
                self.exposure
                    .iter()
                    .for_each(|h| each(&self.exposure_name(), &h.version, &h.raw));
            }
            type_url::NETWORK_GATEWAYS => self
                .gateways
                .iter()
                .for_each(|(network, h)| each(networks::resource_name(network), &h.version, &h.raw)),
            type_url::EXPORTED_SERVICE => self
                .exported
                .iter()
                .for_each(|(key, h)| each(&key.to_string(), &h.version, &h.raw)),
            _ => {}
        }
    }

    /// Counts applied responses. Within one process two clones with the same version are the same.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Who this agent is.
    pub fn own(&self) -> &Own {
        &self.own
    }

    /// The mesh's virtual addresses.
    pub fn plan(&self) -> &AddressPlan {
        &self.plan
    }

    /// What ranks of endpoints are measured from: the own record's place if it is known, else the registration's. The
    /// record alone says that this member only dials out, which makes its network another one than its home.
    pub fn source(&self) -> Source {
        let record = self.own_workload();
        Source {
            network: record.map_or_else(|| self.own.network.clone(), |workload| workload.network.clone()),
            namespace: self.own.namespace.clone(),
            cluster_id: self.own.cluster_id.clone(),
            node: record.map_or_else(|| "".into(), |workload| workload.node.clone()),
            locality: record.map_or_else(Locality::default, |workload| workload.locality.clone()),
        }
    }

    /// The record with this agent's namespace, name and service account.
    pub fn own_workload(&self) -> Option<&Arc<Workload>> {
        self.registry.own_workload()
    }

    /// What this agent may deliver, if discovery said so.
    pub fn exposure(&self) -> Option<&Exposure> {
        self.exposure.as_deref().map(|held| &*held.item)
    }

    /// Policies that apply to a workload: those of its namespace, global ones, those that it names.
    pub fn policies_for(&self, workload: &Workload) -> Vec<&Arc<Policy>> {
        self.policies.of(workload)
    }

    /// Policies that a workload names and that are not held: they are not evaluated.
    pub fn missing_policies<'w>(&self, workload: &'w Workload) -> impl Iterator<Item = &'w NamespacedName> {
        workload
            .policies
            .iter()
            .filter(|key| !self.policies.held().contains_key(*key))
    }

    /// One policy.
    pub fn policy(&self, key: &NamespacedName) -> Option<&Arc<Policy>> {
        self.policies.held().get(key).map(|held| &held.item)
    }

    /// All policies, by key.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.held().values().map(|held| &held.item)
    }

    /// True once a set of policies was received, now or in the life of a snapshot read from disk.
    pub fn policies_synced(&self) -> bool {
        self.policies_synced
    }

    /// True once a set of workloads and services was received, now or in the life of a snapshot read from disk.
    pub fn addresses_synced(&self) -> bool {
        self.addresses_synced
    }

    /// True if a device was revoked.
    pub fn is_revoked(&self, device: DeviceId) -> bool {
        self.revocations
            .values()
            .any(|held| held.item.binary_search(&device.0).is_ok())
    }

    /// The service that a full host name means for a client in a namespace: itself, else the most specific wildcard.
    pub fn service_by_host(&self, host: &str, client_namespace: &str) -> Option<&Arc<Service>> {
        let host: Hostname = host.parse().ok()?;
        let find = |host: &Hostname| {
            self.registry
                .by_host(host, client_namespace, &self.own.mesh_domain)
        };
        if let Some(placed) = find(&host) {
            return Some(&placed.service);
        }
        let mut rest = host.as_str();
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(placed) = format!("*.{parent}")
                .parse()
                .ok()
                .and_then(|wildcard| find(&wildcard))
            {
                return Some(&placed.service);
            }
            rest = parent;
        }
        None
    }

    /// The virtual addresses of a service: those that its name is answered with, IPv4 first.
    pub fn vips(&self, key: &NamespacedName) -> Vec<IpAddr> {
        self.registry
            .placed(key)
            .map_or_else(Vec::new, |placed| placed.vips.to_vec())
    }

    /// A workload by its uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.registry.workloads.get(uid).map(|held| &held.item)
    }

    /// All services, by key.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.registry.services.values().map(|held| &held.item)
    }

    /// All workloads, in no order that means anything.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.registry.workloads.values().map(|held| &held.item)
    }

    /// How many services.
    pub fn service_count(&self) -> usize {
        self.registry.services.len()
    }

    /// How many workloads.
    pub fn workload_count(&self) -> usize {
        self.registry.workloads.len()
    }

    /// How many policies.
    pub fn policy_count(&self) -> usize {
        self.policies.held().len()
    }

    /// Networks that gateways lead into, and these gateways, by network.
    pub fn networks(&self) -> impl Iterator<Item = (&str, &[Gateway])> {
        self.gateways
            .iter()
            .map(|(network, held)| (&**network, held.item.as_slice()))
    }

    /// True for a service that other trust domains may call. Gateways alone are told; elsewhere it is never true.
    pub fn is_exported(&self, service: &NamespacedName) -> bool {
        self.exported.contains_key(service)
    }

    /// Trust domains and their roots (PEM), by trust domain.
    pub fn trust_bundles(&self) -> impl Iterator<Item = (&TrustDomain, &str)> {
        self.bundles
            .iter()
            .map(|(trust_domain, held)| (trust_domain, held.item.roots_pem.as_str()))
    }
}

fn read_exposure(message: &v1::Exposure) -> Result<Exposure, String> {
    let port = |declared: &v1::DeclaredPort| match u16::try_from(declared.port) {
        Ok(port) if port != 0 => Ok(ExposedPort {
            port,
            loopback: declared.loopback,
        }),
        Ok(_) | Err(_) => Err(format!("declares the port {}", declared.port)),
    };
    Ok(Exposure {
        ports: message.ports.iter().map(port).collect::<Result<_, _>>()?,
        all_ports: message.all_ports,
    })
}

impl Index for Snapshot {
    fn service_by_address(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.registry.by_service_address(address)
    }

    fn service(&self, key: &NamespacedName) -> Option<&Arc<Service>> {
        self.registry.placed(key).map(|placed| &placed.service)
    }

    fn workload_by_address(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.registry.by_address(address)
    }

    fn endpoints(&self, key: &NamespacedName, each: &mut dyn FnMut(&Arc<Workload>)) {
        self.registry.endpoints(key).for_each(each);
    }

    fn gateways(&self, network: &str) -> &[Gateway] {
        self.gateways
            .get(network)
            .map_or(&[], |held| held.item.as_slice())
    }
}

impl Names for Snapshot {
    fn find(&self, host: &str, client_namespace: &str) -> Option<Addresses> {
        let host: Hostname = host.parse().ok()?;
        let placed = self
            .registry
            .by_host(&host, client_namespace, &self.own.mesh_domain)?;
        let mut found = Addresses {
            headless: placed.headless,
            ..Addresses::default()
        };
        for address in &*placed.vips {
            match address {
                IpAddr::V4(v4) => found.v4.push(*v4),
                IpAddr::V6(v6) => found.v6.push(*v6),
            }
        }
        Some(found)
    }

    fn is_mesh_name(&self, host: &str) -> bool {
        let domain = &*self.own.mesh_domain;
        host.strip_suffix(domain)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    fn mesh_domain(&self) -> &str {
        &self.own.mesh_domain
    }

    fn is_mesh_address(&self, address: IpAddr) -> bool {
        self.plan.contains(address)
    }

    fn host_of(&self, address: IpAddr) -> Option<String> {
        let service = self
            .registry
            .by_service_address(address)
            .filter(|_| self.plan.contains(address))?;
        (!service.hostname.is_wildcard()).then(|| service.hostname.to_string())
    }
}

#[cfg(test)]
pub(crate) mod tests;
