//! What this registry offers to other clusters.

use crate::{
    Registry,
    content::{self, ObjectKey, Output},
    imports::imported_host,
    services::is_carried,
    state::{EntryState, ServiceState},
    workloads::is_tunnelled,
};
use std::collections::{BTreeMap, BTreeSet};
use tombolo_config::{Kind, WorkloadEntrySpec};
use tombolo_proto::{tombolo::v1::ExportedService, type_url};
use tombolo_types::{SpiffeId, check_label};

/// A service as clusters tell each other: no single endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Namespace.
    pub namespace: String,
    /// Name: each cluster publishes it as `<name>.<namespace>.svc.<its mesh domain>`.
    pub name: String,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// SPIFFE ids of its endpoints.
    pub sans: Vec<String>,
    /// Endpoints by network and locality.
    pub endpoints: Vec<EndpointSummary>,
}

impl Export {
    /// Its host name in a mesh domain.
    pub fn host(&self, mesh_domain: &str) -> String {
        format!("{}.{}.svc.{mesh_domain}", self.name, self.namespace)
    }
}

/// A port of an exported service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// For example `http`.
    pub name: String,
    /// Number that callers dial.
    pub port: u16,
    /// As in a ServiceEntry: `HTTP`, `GRPC`, `TCP`.
    pub protocol: String,
}

/// Endpoints in one network and locality.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSummary {
    /// Network, as its own cluster calls it.
    pub network: String,
    /// `region/zone/subzone`, as far as known.
    pub locality: String,
    /// How many take connections.
    pub healthy: u32,
    /// Weight of those together.
    pub capacity: u32,
}

/// An endpoint, as far as others are told about it.
struct Counted<'a> {
    spec: &'a WorkloadEntrySpec,
    healthy: bool,
}

impl Registry {
    /// What other clusters may be told: own services only, never imported ones (no transit). Ordered by namespace and
    /// name; costs what has changed since the last call, and a copy.
    pub fn exports(&mut self) -> Vec<Export> {
        for key in std::mem::take(&mut self.exports_dirty) {
            let made = self.exports_of(&key);
            if made.is_empty() {
                self.exported.remove(&key);
            } else {
                self.exported.insert(key, made);
            }
        }
        let mut all: Vec<Export> = self.exported.values().flatten().cloned().collect();
        all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        all
    }

    fn exports_of(&self, key: &ObjectKey) -> Vec<Export> {
        let Some(service) = self.services.get(key) else {
            return Vec::new();
        };
        let names = self.exported_names(key, service);
        if names.is_empty() {
            return Vec::new();
        }
        let (endpoints, sans) = self.counted(service);
        let ports = Self::exported_ports(service);
        let one = |name: &str| Export {
            namespace: key.namespace.to_string(),
            name: name.to_owned(),
            ports: ports.clone(),
            sans: sans.clone(),
            endpoints: endpoints.clone(),
        };
        names.into_iter().map(one).collect()
    }

    /// Ports that are carried.
    pub(crate) fn exported_ports(service: &ServiceState) -> Vec<ServicePort> {
        let ports = service.spec().ports.iter().filter(|port| is_carried(port));
        ports
            .filter_map(|port| {
                Some(ServicePort {
                    name: port.name.clone(),
                    port: u16::try_from(port.number).ok()?,
                    protocol: port.protocol.clone(),
                })
            })
            .collect()
    }

    /// Names under which a service is exported.
    fn exported_names<'a>(&self, key: &ObjectKey, service: &'a ServiceState) -> Vec<&'a str> {
        let mut names = self.own_names(key, service);
        names.retain(|name| self.exported_by(service, name).is_some());
        names
    }

    /// Names under which a service can be exported. Only its own: what else it is called means something else elsewhere.
    pub(crate) fn own_names<'a>(&self, key: &ObjectKey, service: &'a ServiceState) -> Vec<&'a str> {
        let suffix = format!(".{}.svc.{}", key.namespace, self.settings.mesh_domain);
        let names = service.hosts.iter().filter(|host| self.owns(key, host));
        let names = names.filter_map(|host| host.strip_suffix(&suffix));
        names
            .filter(|name| check_label("service", name).is_ok())
            .collect()
    }

    /// What gateways are told: these names may be called from other trust domains.
    pub(crate) fn export_outputs(&self, key: &ObjectKey) -> Vec<Output> {
        let Some(service) = self.services.get(key) else {
            return Vec::new();
        };
        let one = |name: &str| {
            let hostname = format!("{name}.{}.svc.{}", key.namespace, self.settings.mesh_domain);
            let message = ExportedService {
                namespace: key.namespace.to_string(),
                hostname,
            };
            let resource = content::key(&message.namespace, &message.hostname);
            content::resource(type_url::EXPORTED_SERVICE, resource, &message)
        };
        let mut names = self.exported_names(key, service);
        names.retain(|name| !self.is_refused(&key.namespace, name));
        names.into_iter().map(one).collect()
    }

    /// Endpoints that a gateway can reach, which are those that terminate HBONE, and who they are.
    fn counted(&self, service: &ServiceState) -> (Vec<EndpointSummary>, Vec<String>) {
        let namespace = &service.key.namespace;
        let none = BTreeMap::new();
        let written = service.spec().endpoints.iter();
        let written = written
            .filter(|endpoint| is_tunnelled(&endpoint.labels, &none))
            .map(|spec| Counted { spec, healthy: true });
        let selected = self.selected_entries(service).into_iter();
        let selected = selected
            .filter(|entry| is_tunnelled(&entry.labels, &entry.object.metadata.annotations))
            .map(|entry| Counted {
                spec: &entry.object.spec,
                healthy: self.is_healthy(entry),
            });
        let mut places: BTreeMap<(&str, &str), (u32, u32)> = BTreeMap::new();
        // Others are told the name that certificates are made for; what else it is called they know by our record.
        let own = |id: SpiffeId| {
            let trust_domain = self.settings.trust_domain.clone();
            self.settings
                .is_own(&id.trust_domain)
                .then_some(SpiffeId { trust_domain, ..id })
        };
        let named = service.spec().subject_alt_names.iter();
        let named = named.filter_map(|name| name.parse().ok().and_then(own));
        let mut sans: BTreeSet<String> = named.map(|id| id.to_string()).collect();
        for Counted { spec, healthy } in written.chain(selected) {
            let place = (self.home_network(spec), spec.locality.as_str());
            let (count, capacity) = places.entry(place).or_default();
            if healthy {
                *count = count.saturating_add(1);
                *capacity = capacity.saturating_add(spec.weight.max(1));
            }
            sans.extend(self.identity(namespace, spec));
        }
        let summary =
            |((network, locality), (healthy, capacity)): ((&str, &str), (u32, u32))| EndpointSummary {
                network: network.to_owned(),
                locality: locality.to_owned(),
                healthy,
                capacity,
            };
        (
            places.into_iter().map(summary).collect(),
            sans.into_iter().collect(),
        )
    }

    pub(crate) fn selected_entries(&self, service: &ServiceState) -> Vec<&EntryState> {
        let Some(selector) = service.selector() else {
            return Vec::new();
        };
        let names = self.entry_labels.matching(&service.key.namespace, selector);
        let keys = names.into_iter().map(|name| ObjectKey {
            kind: Kind::WorkloadEntry,
            namespace: service.key.namespace.clone(),
            name,
        });
        keys.filter_map(|key| self.entries.get(&key)).collect()
    }

    /// Who an endpoint is; nobody, if its service account is no name.
    pub(crate) fn identity(&self, namespace: &str, spec: &WorkloadEntrySpec) -> Option<String> {
        let account = if spec.service_account.is_empty() {
            "default"
        } else {
            &spec.service_account
        };
        let id = SpiffeId::new(self.settings.trust_domain.clone(), namespace, account);
        id.ok().map(|id| id.to_string())
    }

    /// A service may have to be told anew to other clusters.
    pub(crate) fn mark_export(&mut self, key: &ObjectKey) {
        if key.kind == Kind::ServiceEntry && imported_host(key).is_none() {
            self.exports_dirty.insert(key.clone());
        }
    }
}
