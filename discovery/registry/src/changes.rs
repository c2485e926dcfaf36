//! What a change of one object marks to be compiled again.

use crate::{
    Registry, authorization,
    content::ObjectKey,
    peer_authentication,
    registry::Producer,
    selectors::Labels,
    state::{Claimant, EntryState, HostAddresses, ServiceState, created, instance_host, object_key},
    vips::Claim,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};
use tombolo_config::{AuthorizationPolicySpec, Kind, Object, PeerAuthenticationSpec, WorkloadGroupSpec};

impl Registry {
    pub(crate) fn mark(&mut self, key: ObjectKey) {
        self.mark_export(&key);
        self.dirty.insert(Producer::Object(key));
    }

    // --- groups

    pub(crate) fn put_group(&mut self, object: Object<WorkloadGroupSpec>) {
        let key = object_key(Kind::WorkloadGroup, &object.metadata);
        self.groups.insert(key.clone(), object);
        self.mark_members(&key);
    }

    pub(crate) fn drop_group(&mut self, key: &ObjectKey) {
        if self.groups.remove(key).is_some() {
            self.mark_members(key);
        }
    }

    fn mark_members(&mut self, group: &ObjectKey) {
        let members = self.group_members.get(group).cloned().unwrap_or_default();
        for key in members {
            self.place_entry(&key);
            self.mark(key);
        }
    }

    // --- entries

    pub(crate) fn put_entry(&mut self, mut new: EntryState) {
        let key = new.key.clone();
        let old = self.entries.remove(&key);
        let none = Labels::new();
        self.entry_labels.set(
            &key.namespace,
            &key.name,
            old.as_ref().map_or(&none, |old| &old.labels),
            &new.labels,
        );
        let named = self.is_named(&key);
        if let Some(old) = &old {
            self.mark_selecting(&key.namespace, &old.labels, named);
            self.leave_group(old);
        }
        self.mark_selecting(&key.namespace, &new.labels, false);
        if let Some(group) = &new.group {
            let group = ObjectKey {
                kind: Kind::WorkloadGroup,
                namespace: key.namespace.clone(),
                name: group.clone(),
            };
            self.group_members.entry(group).or_default().insert(key.clone());
        }
        self.set_addresses(
            &key,
            old.as_ref().map(|old| (old.created, &old.addresses)),
            Some((new.created, &new.addresses)),
        );
        // Claims are filed under the age of the object: refreshed below under the new one.
        if let Some(old) = &old {
            let hosts = if old.created == new.created {
                old.instances.clone()
            } else {
                BTreeSet::new()
            };
            self.set_hosts(&old.claimant(), &old.instances, &hosts);
            new.instances = hosts;
        }
        self.entries.insert(key.clone(), new);
        self.place_entry(&key);
        self.refresh_instances(&key);
        self.vip_dirty.insert(key.clone());
        self.mark(key);
    }

    pub(crate) fn drop_entry(&mut self, key: &ObjectKey) {
        self.health.remove(key);
        let Some(old) = self.entries.remove(key) else {
            return;
        };
        self.entry_labels
            .set(&key.namespace, &key.name, &old.labels, &Labels::new());
        let named = self.is_named(key);
        self.mark_selecting(&key.namespace, &old.labels, named);
        self.place_entry(key);
        self.leave_group(&old);
        self.set_addresses(key, Some((old.created, &old.addresses)), None);
        self.set_hosts(&old.claimant(), &old.instances, &BTreeSet::new());
        self.vip_dirty.insert(key.clone());
        self.mark(key.clone());
    }

    fn leave_group(&mut self, entry: &EntryState) {
        let Some(group) = &entry.group else { return };
        let group = ObjectKey {
            kind: Kind::WorkloadGroup,
            namespace: entry.key.namespace.clone(),
            name: group.clone(),
        };
        if let Some(members) = self.group_members.get_mut(&group) {
            members.remove(&entry.key);
            if members.is_empty() {
                self.group_members.remove(&group);
            }
        }
    }

    /// An entry's own resources, and what says whether it is healthy: lists of headless services, exports, gateways.
    pub(crate) fn touch_entry(&mut self, key: &ObjectKey) {
        if let Some(entry) = self.entries.get(key) {
            let labels = entry.labels.clone();
            self.mark_selecting(&key.namespace, &labels, false);
            self.mark(key.clone());
        }
        if self.gateway_entries.contains(key) {
            let networks = self.places.of(key).cloned().collect();
            self.refresh_networks(networks);
        }
    }

    /// Services that select an endpoint: those that list their endpoints, or `all`; and what is told to other clusters.
    pub(crate) fn mark_selecting(&mut self, namespace: &Arc<str>, labels: &Labels, all: bool) {
        for name in self.service_selectors.matching(namespace, labels) {
            let key = ObjectKey {
                kind: Kind::ServiceEntry,
                namespace: namespace.clone(),
                name,
            };
            if all || self.services.get(&key).is_some_and(ServiceState::has_instances) {
                self.mark(key);
            } else {
                self.mark_export(&key);
            }
        }
    }

    /// Claims the per-instance names that an entry has by the headless services that select it.
    fn refresh_instances(&mut self, key: &ObjectKey) {
        let Some(entry) = self.entries.get(key) else {
            return;
        };
        let (claimant, old) = (entry.claimant(), entry.instances.clone());
        let mut new = BTreeSet::new();
        for name in self.service_selectors.matching(&key.namespace, &entry.labels) {
            let service = ObjectKey {
                kind: Kind::ServiceEntry,
                namespace: key.namespace.clone(),
                name,
            };
            if let Some(service) = self
                .services
                .get(&service)
                .filter(|service| service.has_instances())
            {
                let owned = service.hosts.iter().filter(|host| self.owns(&service.key, host));
                new.extend(owned.filter_map(|host| instance_host(&key.name, host)));
            }
        }
        if old != new {
            self.set_hosts(&claimant, &old, &new);
            if let Some(entry) = self.entries.get_mut(key) {
                entry.instances = new;
            }
            self.vip_dirty.insert(key.clone());
            self.mark(key.clone());
        }
    }

    // --- services

    pub(crate) fn put_service(&mut self, new: ServiceState) {
        let key = new.key.clone();
        let old = self.services.remove(&key);
        // A status changes addresses alone: no endpoint need be compiled again for it.
        let same = old.as_ref().is_some_and(|old| {
            old.object.spec == new.object.spec
                && old.object.metadata.labels == new.object.metadata.labels
                && old.object.metadata.annotations == new.object.metadata.annotations
                && old.created == new.created
        });
        self.set_addresses(
            &key,
            old.as_ref().map(|old| (old.created, &old.addresses)),
            Some((new.created, &new.addresses)),
        );
        if !same {
            self.service_selectors
                .set(&key.namespace, &key.name, new.selector());
            if new.has_inline_workloads() {
                self.services_with_endpoints.insert(key.clone());
            } else {
                self.services_with_endpoints.remove(&key);
            }
            self.set_service_hosts(old.as_ref(), Some(&new));
        }
        let selectors: Vec<Labels> = [old.as_ref(), Some(&new)]
            .into_iter()
            .flatten()
            .filter_map(|s| s.selector().cloned())
            .collect();
        let networks = self.inline_networks(&new);
        self.set_places(&key, networks);
        self.services.insert(key.clone(), new);
        if !same {
            selectors
                .iter()
                .for_each(|selector| self.mark_selected(&key.namespace, selector));
        }
        self.vip_dirty.insert(key.clone());
        self.mark(key);
    }

    pub(crate) fn drop_service(&mut self, key: &ObjectKey) {
        let Some(old) = self.services.remove(key) else {
            return;
        };
        self.service_selectors.set(&key.namespace, &key.name, None);
        self.services_with_endpoints.remove(key);
        self.set_places(key, BTreeSet::new());
        self.set_addresses(key, Some((old.created, &old.addresses)), None);
        self.set_service_hosts(Some(&old), None);
        if let Some(selector) = old.selector() {
            self.mark_selected(&key.namespace, selector);
        }
        self.vip_dirty.insert(key.clone());
        self.mark(key.clone());
    }

    /// Entries that a service selects or selected: their memberships, exposed ports and per-instance names.
    fn mark_selected(&mut self, namespace: &Arc<str>, selector: &Labels) {
        for name in self.entry_labels.matching(namespace, selector) {
            let key = ObjectKey {
                kind: Kind::WorkloadEntry,
                namespace: namespace.clone(),
                name,
            };
            self.refresh_instances(&key);
            self.mark(key);
        }
    }

    fn set_service_hosts(&mut self, old: Option<&ServiceState>, new: Option<&ServiceState>) {
        let split = |service: Option<&ServiceState>, instance: bool| -> BTreeSet<Arc<str>> {
            let claims = service.map(ServiceState::claims).unwrap_or_default();
            claims
                .into_iter()
                .filter(|(kind, _)| *kind == instance)
                .map(|(_, host)| host)
                .collect()
        };
        for instance in [false, true] {
            let (before, after) = (split(old, instance), split(new, instance));
            match (
                old.map(|s| s.claimant(instance)),
                new.map(|s| s.claimant(instance)),
            ) {
                (Some(a), Some(b)) if a == b => self.set_hosts(&a, &before, &after),
                (a, b) => {
                    a.iter()
                        .for_each(|a| self.set_hosts(a, &before, &BTreeSet::new()));
                    b.iter().for_each(|b| self.set_hosts(b, &BTreeSet::new(), &after));
                }
            }
        }
    }

    // --- host names

    /// The best claim of a namespace to a host.
    pub(crate) fn owner(&self, namespace: &str, host: &str) -> Option<&Claimant> {
        self.hosts
            .get(host)?
            .iter()
            .find(|claimant| &*claimant.object.namespace == namespace)
    }

    pub(crate) fn owns(&self, key: &ObjectKey, host: &str) -> bool {
        self.owner(&key.namespace, host)
            .is_some_and(|owner| owner.object == *key)
    }

    /// Names that endpoints written in a service really have: place, host, name.
    pub(crate) fn endpoint_instances<'a>(
        &'a self,
        service: &'a ServiceState,
    ) -> impl Iterator<Item = (usize, &'a Arc<str>, Arc<str>)> {
        let all = service.endpoint_instances();
        all.filter(|(_, host, name)| self.owns(&service.key, host) && self.owns(&service.key, name))
    }

    /// True if of all namespaces this one's claim to the host is the best.
    pub(crate) fn is_canonical(&self, key: &ObjectKey, host: &str) -> bool {
        self.hosts
            .get(host)
            .and_then(BTreeSet::first)
            .is_some_and(|first| first.object == *key)
    }

    /// Replaces the hosts that a claimant claims, and marks who gains or loses one by it.
    pub(crate) fn set_hosts(
        &mut self,
        claimant: &Claimant,
        old: &BTreeSet<Arc<str>>,
        new: &BTreeSet<Arc<str>>,
    ) {
        let namespace = &claimant.object.namespace;
        let mut touched = BTreeSet::new();
        for host in old.symmetric_difference(new) {
            let best = |registry: &Self| {
                let first = registry.hosts.get(host).and_then(BTreeSet::first).cloned();
                [registry.owner(namespace, host).cloned(), first]
            };
            let before = best(self);
            let claims = self.hosts.entry(host.clone()).or_default();
            if new.contains(host) {
                claims.insert(claimant.clone());
            } else {
                claims.remove(claimant);
                if claims.is_empty() {
                    self.hosts.remove(host);
                }
            }
            let after = best(self);
            for (before, after) in before.into_iter().zip(after) {
                if before != after {
                    touched.extend(before.into_iter().chain(after));
                }
            }
        }
        touched.remove(claimant);
        for other in touched {
            let key = other.object;
            self.vip_dirty.insert(key.clone());
            // Who selects by a service that won or lost its name belongs to another one now.
            if let Some(selector) = self.services.get(&key).and_then(ServiceState::selector).cloned() {
                self.mark_selected(&key.namespace, &selector);
            }
            if key.kind == Kind::WorkloadEntry {
                self.touch_entry(&key);
            }
            self.mark(key);
        }
    }

    // --- virtual addresses

    pub(crate) fn set_addresses(
        &mut self,
        key: &ObjectKey,
        old: Option<(i64, &HostAddresses)>,
        new: Option<(i64, &HostAddresses)>,
    ) {
        let mut touched: BTreeSet<Claim> = BTreeSet::new();
        let none: HostAddresses = BTreeMap::new();
        let claim = |created: i64, host: &Arc<str>| Claim {
            created,
            object: key.clone(),
            host: host.clone(),
        };
        let of = |state: Option<(i64, &HostAddresses)>, host: &Arc<str>| {
            state
                .and_then(|(_, addresses)| addresses.get(host).cloned())
                .unwrap_or_default()
        };
        let hosts = [old, new]
            .into_iter()
            .flat_map(|state| state.map_or(&none, |(_, found)| found).keys());
        let hosts: BTreeSet<Arc<str>> = hosts.cloned().collect();
        for host in &hosts {
            let (before, after) = (of(old, host), of(new, host));
            match (old, new) {
                (Some((a, _)), Some((b, _))) if a == b => {
                    touched.extend(self.vips.set(&claim(a, host), &before, &after));
                }
                _ => {
                    if let Some((created, _)) = old {
                        touched.extend(self.vips.set(&claim(created, host), &before, &[]));
                    }
                    if let Some((created, _)) = new {
                        touched.extend(self.vips.set(&claim(created, host), &[], &after));
                    }
                }
            }
        }
        for claim in touched {
            let key = claim.object;
            self.vip_dirty.insert(key.clone());
            if key.kind == Kind::WorkloadEntry {
                self.touch_entry(&key);
            }
            self.mark(key);
        }
    }

    /// Addresses that a claim holds.
    pub(crate) fn held(&self, claim: &Claim) -> [Option<std::net::IpAddr>; 2] {
        let addresses = match claim.object.kind {
            Kind::WorkloadEntry => self.entries.get(&claim.object).map(|entry| &entry.addresses),
            Kind::ServiceEntry => match self.services.get(&claim.object) {
                Some(service) => Some(&service.addresses),
                None => self.imported_addresses(claim),
            },
            Kind::WorkloadGroup
            | Kind::AuthorizationPolicy
            | Kind::PeerAuthentication
            | Kind::ServiceExport
            | Kind::Namespace
            | Kind::JoinToken
            | Kind::Device => None,
        };
        let named = addresses
            .and_then(|addresses| addresses.get(&claim.host))
            .map_or(&[][..], Vec::as_slice);
        self.vips.held(claim, named)
    }

    /// Claims of an object that lack an address.
    pub(crate) fn wanted_addresses(&self, key: &ObjectKey) -> BTreeSet<Claim> {
        let mut hosts: Vec<(i64, Arc<str>)> = Vec::new();
        if let Some(service) = self.services.get(key) {
            let own = service
                .hosts
                .iter()
                .filter(|host| service.wants_address(host))
                .cloned();
            let all = own.chain(self.endpoint_instances(service).map(|(_, _, name)| name));
            hosts.extend(all.map(|host| (service.created, host)));
        } else if let Some(entry) = self.entries.get(key) {
            hosts.extend(entry.instances.iter().map(|host| (entry.created, host.clone())));
        }
        hosts.extend(self.imported_claim(key));
        let claims = hosts.into_iter().filter(|(_, host)| self.owns(key, host));
        let claims = claims.map(|(created, host)| Claim {
            created,
            object: key.clone(),
            host,
        });
        claims.filter(|claim| self.held(claim).contains(&None)).collect()
    }

    // --- policies

    pub(crate) fn put_policy(&mut self, object: Object<AuthorizationPolicySpec>) {
        let key = object_key(Kind::AuthorizationPolicy, &object.metadata);
        let selected = |object: &Object<AuthorizationPolicySpec>, root: &str| {
            let enforced = authorization::convert(object, root).authorization.is_some();
            authorization::selector(&object.spec)
                .filter(|_| enforced)
                .cloned()
        };
        let root = self.settings.root_namespace.clone();
        let before = self.policies.get(&key).and_then(|object| selected(object, &root));
        let after = selected(&object, &root);
        self.policy_selectors
            .set(&key.namespace, &key.name, after.as_ref());
        self.policies.insert(key.clone(), object);
        if before != after {
            [before, after]
                .iter()
                .flatten()
                .for_each(|selector| self.mark_policy_targets(&key.namespace, Some(selector)));
        }
        self.mark(key);
    }

    pub(crate) fn drop_policy(&mut self, key: &ObjectKey) {
        let Some(old) = self.policies.remove(key) else {
            return;
        };
        self.policy_selectors.set(&key.namespace, &key.name, None);
        if let Some(selector) = authorization::selector(&old.spec) {
            self.mark_policy_targets(&key.namespace, Some(selector));
        }
        self.mark(key.clone());
    }

    pub(crate) fn put_peer_policy(&mut self, object: Object<PeerAuthenticationSpec>) {
        let key = object_key(Kind::PeerAuthentication, &object.metadata);
        self.forget_peer_policy(&key);
        match peer_authentication::selector(&object.spec).cloned() {
            Some(selector) => {
                self.peer_selectors
                    .set(&key.namespace, &key.name, Some(&selector));
                self.mark_policy_targets(&key.namespace, Some(&selector));
            }
            None => {
                let wide = self.wide_peer_policies.entry(key.namespace.clone()).or_default();
                wide.insert((created(&object.metadata), key.name.clone()));
                self.mark_policy_targets(&key.namespace, None);
            }
        }
        self.peer_policies.insert(key.clone(), object);
        self.mark(key);
    }

    pub(crate) fn drop_peer_policy(&mut self, key: &ObjectKey) {
        self.forget_peer_policy(key);
        self.mark(key.clone());
    }

    fn forget_peer_policy(&mut self, key: &ObjectKey) {
        let Some(old) = self.peer_policies.remove(key) else {
            return;
        };
        self.peer_selectors.set(&key.namespace, &key.name, None);
        if let Some(wide) = self.wide_peer_policies.get_mut(&key.namespace) {
            wide.remove(&(created(&old.metadata), key.name.clone()));
            if wide.is_empty() {
                self.wide_peer_policies.remove(&key.namespace);
            }
        }
        self.mark_policy_targets(&key.namespace, peer_authentication::selector(&old.spec));
    }

    /// Everything that a policy of a namespace applies to, or `selector` of it. Policies of the root namespace apply to
    /// all namespaces.
    fn mark_policy_targets(&mut self, namespace: &str, selector: Option<&Labels>) {
        let all = namespace == self.settings.root_namespace;
        let mut marked: Vec<ObjectKey> = Vec::new();
        match selector {
            Some(selector) => {
                let namespaces = self
                    .entry_labels
                    .namespaces()
                    .filter(|other| all || &***other == namespace);
                for namespace in namespaces {
                    let names = self.entry_labels.matching(namespace, selector);
                    marked.extend(names.into_iter().map(|name| ObjectKey {
                        kind: Kind::WorkloadEntry,
                        namespace: namespace.clone(),
                        name,
                    }));
                }
            }
            None => {
                marked.extend(within(&self.entries, Kind::WorkloadEntry, namespace, all));
                // Ports of a policy that inherits its mode.
                marked.extend(within(
                    &self.peer_policies,
                    Kind::PeerAuthentication,
                    namespace,
                    all,
                ));
            }
        }
        let services = self.services_with_endpoints.iter();
        marked.extend(
            services
                .filter(|key| all || &*key.namespace == namespace)
                .cloned(),
        );
        self.dirty.extend(marked.into_iter().map(Producer::Object));
    }
}

/// Keys of a namespace, or of all.
pub(crate) fn within<'a, T>(
    objects: &'a BTreeMap<ObjectKey, T>,
    kind: Kind,
    namespace: &'a str,
    all: bool,
) -> impl Iterator<Item = ObjectKey> + 'a {
    let start = ObjectKey {
        kind,
        namespace: if all { "".into() } else { namespace.into() },
        name: "".into(),
    };
    let range = objects.range((Bound::Included(start), Bound::Unbounded));
    range
        .map(|(key, _)| key)
        .take_while(move |key| all || &*key.namespace == namespace)
        .cloned()
}
