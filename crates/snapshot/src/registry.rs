use crate::{
    claims::{ByKey, ByRight, ByUid, Claims, Map, claim, release},
    own::Own,
    resource::Held,
};
use imbl::OrdMap;
use std::{net::IpAddr, sync::Arc};
use tombolo_destination::{IpFamilies, Service, Visibility, Workload};
use tombolo_types::{AddressPlan, Hostname, NamespacedName, NetworkAddress};

type ByUidMap = OrdMap<Arc<str>, Arc<Workload>>;

/// A service as it is found by name and address.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) service: Arc<Service>,
    /// Addresses within the mesh's prefixes, filtered by the families of the service.
    pub(crate) vips: Arc<[IpAddr]>,
    /// No address of its own: `vips` are those of its instances.
    pub(crate) headless: bool,
}

/// Workloads, services and the virtual addresses given to services by override, with every index over them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registry {
    pub(crate) workloads: Map<Arc<str>, Arc<Held<Workload>>>,
    by_address: Map<NetworkAddress, Claims<ByUid>>,
    endpoints: Map<NamespacedName, ByUidMap>,
    /// Records with this agent's own name; more than one only while it is being replaced.
    own: ByUidMap,
    pub(crate) services: OrdMap<NamespacedName, Arc<Held<Service>>>,
    pub(crate) overrides: OrdMap<NamespacedName, Arc<Held<Vec<IpAddr>>>>,
    placed: Map<NamespacedName, Placed>,
    by_host: Map<Hostname, Claims<ByKey>>,
    by_service_address: Map<IpAddr, Claims<ByRight>>,
}

impl Registry {
    pub(crate) fn upsert_workload(&mut self, held: Arc<Held<Workload>>, own: &Own) {
        let new = &held.item;
        if let Some(old) = self.workloads.insert(new.uid.clone(), held.clone()) {
            self.forget_workload(&old.item, Some(new), own);
        }
        for &address in &new.addresses {
            let at = NetworkAddress {
                network: new.network.clone(),
                address,
            };
            claim(&mut self.by_address, at, ByUid(new.clone()));
        }
        for key in new.services.keys() {
            self.endpoints
                .entry(key.clone())
                .or_default()
                .insert(new.uid.clone(), new.clone());
        }
        if is_own(new, own) {
            self.own.insert(new.uid.clone(), new.clone());
        }
    }

    /// False if there is no such workload.
    pub(crate) fn remove_workload(&mut self, uid: &str, own: &Own) -> bool {
        let Some(old) = self.workloads.remove(uid) else {
            return false;
        };
        self.forget_workload(&old.item, None, own);
        true
    }

    /// Takes a workload out of every index where `new` does not take its place.
    fn forget_workload(&mut self, old: &Arc<Workload>, new: Option<&Workload>, own: &Own) {
        for &address in &old.addresses {
            if new.is_none_or(|new| new.network != old.network || !new.addresses.contains(&address)) {
                let at = NetworkAddress {
                    network: old.network.clone(),
                    address,
                };
                release(&mut self.by_address, &at, &ByUid(old.clone()));
            }
        }
        for key in old.services.keys() {
            if new.is_none_or(|new| !new.services.contains_key(key)) {
                take_out(&mut self.endpoints, key, &old.uid);
            }
        }
        if new.is_none_or(|new| !is_own(new, own)) {
            self.own.remove(&old.uid);
        }
    }

    pub(crate) fn upsert_service(&mut self, held: Arc<Held<Service>>, plan: &AddressPlan, own: &Own) {
        let key = held.item.key.clone();
        self.services.insert(key.clone(), held);
        self.place(&key, plan, own);
    }

    pub(crate) fn remove_service(&mut self, key: &NamespacedName, plan: &AddressPlan, own: &Own) {
        if self.services.remove(key).is_some() {
            self.place(key, plan, own);
        }
    }

    pub(crate) fn upsert_override(
        &mut self,
        key: NamespacedName,
        held: Arc<Held<Vec<IpAddr>>>,
        plan: &AddressPlan,
        own: &Own,
    ) {
        self.overrides.insert(key.clone(), held);
        self.place(&key, plan, own);
    }

    pub(crate) fn remove_override(&mut self, key: &NamespacedName, plan: &AddressPlan, own: &Own) {
        if self.overrides.remove(key).is_some() {
            self.place(key, plan, own);
        }
    }

    /// Puts the service of a key where names and addresses find it, anew: one of the parts that make it has changed.
    fn place(&mut self, key: &NamespacedName, plan: &AddressPlan, own: &Own) {
        if let Some(old) = self.placed.remove(key) {
            release(
                &mut self.by_host,
                &old.service.hostname,
                &ByKey(old.service.clone()),
            );
            for (address, by_right) in address_claims(&old, own) {
                release(&mut self.by_service_address, &address, &by_right);
            }
        }
        let Some(new) = self.compose(key, plan) else {
            return;
        };
        claim(
            &mut self.by_host,
            new.service.hostname.clone(),
            ByKey(new.service.clone()),
        );
        for (address, by_right) in address_claims(&new, own) {
            claim(&mut self.by_service_address, address, by_right);
        }
        self.placed.insert(key.clone(), new);
    }

    fn compose(&self, key: &NamespacedName, plan: &AddressPlan) -> Option<Placed> {
        let given = self.overrides.get(key).map(|held| held.item.as_slice());
        let service = self.services.get(key)?.item.clone();
        let families = |address: &IpAddr| match service.ip_families {
            IpFamilies::V4Only => address.is_ipv4(),
            IpFamilies::V6Only => address.is_ipv6(),
            IpFamilies::Automatic | IpFamilies::Dual => true,
        };
        let own = service
            .addresses
            .iter()
            .map(|at| at.address)
            .filter(|&address| is_virtual(plan, address));
        let mut vips: Vec<IpAddr> = own
            .chain(given.unwrap_or(&[]).iter().copied())
            .filter(families)
            .collect();
        vips.sort_unstable();
        vips.dedup();
        let headless = service.addresses.is_empty() && service.prefixes.is_empty();
        Some(Placed {
            service,
            vips: vips.into(),
            headless,
        })
    }

    /// True if no index holds anything.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.workloads.is_empty()
            && self.by_address.is_empty()
            && self.endpoints.is_empty()
            && self.own.is_empty()
            && self.services.is_empty()
            && self.overrides.is_empty()
            && self.placed.is_empty()
            && self.by_host.is_empty()
            && self.by_service_address.is_empty()
    }

    pub(crate) fn placed(&self, key: &NamespacedName) -> Option<&Placed> {
        self.placed.get(key)
    }

    pub(crate) fn by_service_address(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.by_service_address
            .get(&address)
            .map(|claims| &claims.first().service)
    }

    pub(crate) fn by_address(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.by_address.get(address).map(|claims| &claims.first().0)
    }

    pub(crate) fn own_workload(&self) -> Option<&Arc<Workload>> {
        self.own.values().next()
    }

    pub(crate) fn endpoints(&self, key: &NamespacedName) -> impl Iterator<Item = &Arc<Workload>> {
        self.endpoints.get(key).into_iter().flat_map(OrdMap::values)
    }

    /// The service that exactly this host name means for a client in a namespace.
    ///
    /// Among several: the client's namespace, then a canonical one, then the first by namespace.
    pub(crate) fn by_host(
        &self,
        host: &Hostname,
        client_namespace: &str,
        mesh_domain: &str,
    ) -> Option<&Placed> {
        if !may_be_answered(host, mesh_domain) {
            return None;
        }
        let rightful = namespace_of(host.as_str(), mesh_domain);
        let seen = |service: &Service| {
            let own = *service.key.namespace == *client_namespace;
            (own || service.visibility == Visibility::Public)
                && rightful.is_none_or(|namespace| namespace == &*service.key.namespace)
        };
        let all = self.by_host.get(host)?.all();
        let preferred = |service: &Service| (*service.key.namespace != *client_namespace, !service.canonical);
        let best = all
            .iter()
            .map(|ByKey(one)| one)
            .filter(|one| seen(one))
            .min_by_key(|one| preferred(one))?;
        self.placed.get(&best.key)
    }
}

/// Where a service is found by address: its virtual addresses, and its own ones in this agent's network.
fn address_claims(placed: &Placed, own: &Own) -> Vec<(IpAddr, ByRight)> {
    let service = &placed.service;
    let siblings = |address: &IpAddr| {
        placed
            .vips
            .iter()
            .filter(|other| other.is_ipv4() == address.is_ipv4())
            .count()
    };
    let direct = |address: IpAddr| service.addresses.iter().any(|at| at.address == address);
    let virtual_ones = placed
        .vips
        .iter()
        .map(|address| (*address, siblings(address), !direct(*address)));
    let others = service
        .addresses
        .iter()
        .filter(|at| at.network == own.network && !placed.vips.contains(&at.address));
    let others = others.map(|at| (at.address, 1, false));
    virtual_ones
        .chain(others)
        .map(|(address, siblings, overridden)| {
            (
                address,
                ByRight {
                    siblings,
                    overridden,
                    service: service.clone(),
                },
            )
        })
        .collect()
}

fn is_own(workload: &Workload, own: &Own) -> bool {
    workload.name == own.workload_name
        && workload.namespace == own.namespace
        && workload.service_account == own.service_account
}

fn take_out(map: &mut Map<NamespacedName, ByUidMap>, key: &NamespacedName, uid: &str) {
    if let Some(of) = map.get_mut(key) {
        of.remove(uid);
        if of.is_empty() {
            map.remove(key);
        }
    }
}

/// An address that may be given to a service.
pub(crate) fn is_virtual(plan: &AddressPlan, address: IpAddr) -> bool {
    plan.contains(address) && !plan.is_reserved(address)
}

/// A name outside the mesh domain must have a domain of its own: a single label or a whole top-level domain is never
/// taken from the host.
fn may_be_answered(host: &Hostname, mesh_domain: &str) -> bool {
    let plain = host.as_str().strip_prefix("*.").unwrap_or(host.as_str());
    host.is_within(mesh_domain) || plain.contains('.')
}

/// The namespace that alone may publish a host name: the label before `svc.<mesh domain>`.
fn namespace_of<'h>(host: &'h str, mesh_domain: &str) -> Option<&'h str> {
    let below = host.strip_suffix(mesh_domain)?.strip_suffix(".svc.")?;
    Some(below.rsplit('.').next().unwrap_or(below))
}
