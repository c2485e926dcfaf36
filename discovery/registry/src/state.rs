//! Objects as the registry keeps them: the parsed form and what is derived from it once.

use crate::{content::ObjectKey, selectors::Labels, vips};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};
use tombolo_config::{Kind, Metadata, Object, Resolution, ServiceEntrySpec, WorkloadEntrySpec, annotation};
use tombolo_types::Hostname;

/// Addresses that an object's status names, by host.
pub(crate) type HostAddresses = BTreeMap<Arc<str>, Vec<IpAddr>>;

/// When an object was created; one that does not say so is the youngest.
pub(crate) fn created(metadata: &Metadata) -> i64 {
    metadata.created_unix_ms().unwrap_or(i64::MAX)
}

pub(crate) fn object_key(kind: Kind, metadata: &Metadata) -> ObjectKey {
    ObjectKey {
        kind,
        namespace: metadata.namespace.as_str().into(),
        name: metadata.name.as_str().into(),
    }
}

/// Who publishes a host name. Services come before instances of headless ones, older objects before younger ones.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claimant {
    pub(crate) instance: bool,
    pub(crate) created: i64,
    pub(crate) object: ObjectKey,
}

#[derive(Debug)]
pub(crate) struct EntryState {
    pub(crate) object: Object<WorkloadEntrySpec>,
    pub(crate) key: ObjectKey,
    pub(crate) created: i64,
    /// Of spec and metadata; those of the metadata win.
    pub(crate) labels: Labels,
    pub(crate) group: Option<Arc<str>>,
    pub(crate) addresses: HostAddresses,
    /// Per-instance names that it claims.
    pub(crate) instances: BTreeSet<Arc<str>>,
}

impl EntryState {
    pub(crate) fn new(object: Object<WorkloadEntrySpec>) -> Self {
        let mut labels = object.spec.labels.clone();
        labels.extend(object.metadata.labels.clone());
        let owner = object
            .metadata
            .owner_references
            .iter()
            .find(|owner| owner.kind == Kind::WorkloadGroup.name());
        let group = object
            .metadata
            .annotations
            .get(annotation::AUTO_REGISTRATION_GROUP);
        let group = group
            .map(String::as_str)
            .or(owner.map(|owner| owner.name.as_str()))
            .map(Arc::from);
        Self {
            key: object_key(Kind::WorkloadEntry, &object.metadata),
            created: created(&object.metadata),
            labels,
            group,
            addresses: vips::of_status(object.status.as_ref(), None),
            instances: BTreeSet::new(),
            object,
        }
    }

    pub(crate) fn claimant(&self) -> Claimant {
        Claimant {
            instance: true,
            created: self.created,
            object: self.key.clone(),
        }
    }

    /// What `status` says about its health; `None` if nothing that counts.
    pub(crate) fn healthy_by_status(&self) -> Option<bool> {
        let conditions = self.object.status.as_ref()?.get("conditions")?.as_array()?;
        let condition = conditions
            .iter()
            .find(|condition| condition.get("type").is_some_and(|t| t == "Healthy"))?;
        Some(condition.get("status").is_some_and(|status| status == "True"))
    }

    /// An entry whose health is checked is not healthy before its first good answer.
    pub(crate) fn checked(&self) -> bool {
        self.object
            .metadata
            .annotations
            .get(annotation::HEALTH_CHECKS_ENABLED)
            .is_some_and(|value| value == "true")
    }
}

#[derive(Debug)]
pub(crate) struct ServiceState {
    pub(crate) object: Object<ServiceEntrySpec>,
    pub(crate) key: ObjectKey,
    pub(crate) created: i64,
    /// Host names that it publishes; none if it is exported to nobody.
    pub(crate) hosts: BTreeSet<Arc<str>>,
    pub(crate) addresses: HostAddresses,
}

impl ServiceState {
    pub(crate) fn new(object: Object<ServiceEntrySpec>) -> Self {
        let exported = !object.spec.export_to.iter().any(|namespace| namespace == "~");
        let hosts = object
            .spec
            .hosts
            .iter()
            .filter_map(|host| host.parse::<Hostname>().ok());
        let hosts: BTreeSet<Arc<str>> = hosts
            .filter(|_| exported)
            .map(|host| host.as_str().into())
            .collect();
        let only = if hosts.len() == 1 {
            hosts.first().map(|host| &**host)
        } else {
            None
        };
        Self {
            key: object_key(Kind::ServiceEntry, &object.metadata),
            created: created(&object.metadata),
            addresses: vips::of_status(object.status.as_ref(), only),
            hosts,
            object,
        }
    }

    pub(crate) fn spec(&self) -> &ServiceEntrySpec {
        &self.object.spec
    }

    pub(crate) fn claimant(&self, instance: bool) -> Claimant {
        Claimant {
            instance,
            created: self.created,
            object: self.key.clone(),
        }
    }

    /// Labels of the entries that it selects.
    pub(crate) fn selector(&self) -> Option<&Labels> {
        self.spec()
            .workload_selector
            .as_ref()
            .map(|selector| &selector.labels)
    }

    /// Without an address of its own, by the wish of its author: each endpoint gets one.
    pub(crate) fn is_headless(&self) -> bool {
        let label = self
            .object
            .metadata
            .labels
            .get(annotation::ENABLE_AUTOALLOCATE_IP);
        label.is_some_and(|value| value == "false") && self.spec().addresses.is_empty()
    }

    /// Its endpoints get names and addresses of their own.
    pub(crate) fn has_instances(&self) -> bool {
        self.is_headless() && self.spec().resolution == Resolution::Static
    }

    /// A host of it gets a virtual address. With resolution NONE the client's address is the endpoint's, and a wildcard
    /// stands for more than one name.
    pub(crate) fn wants_address(&self, host: &str) -> bool {
        self.spec().resolution != Resolution::None && !self.is_headless() && !host.starts_with('*')
    }

    /// Endpoints that are written in it, or that its hosts are themselves.
    pub(crate) fn has_inline_workloads(&self) -> bool {
        !self.spec().endpoints.is_empty() || self.hosts_are_endpoints()
    }

    /// Each host is looked up to find its endpoint.
    pub(crate) fn hosts_are_endpoints(&self) -> bool {
        let spec = self.spec();
        matches!(spec.resolution, Resolution::Dns | Resolution::DnsRoundRobin)
            && spec.endpoints.is_empty()
            && spec.workload_selector.is_none()
    }

    /// Names that the endpoints written in a headless service get by their place: place, host, name.
    pub(crate) fn endpoint_instances(&self) -> impl Iterator<Item = (usize, &Arc<str>, Arc<str>)> {
        let hosts = self.hosts.iter().filter(|_| self.has_instances());
        hosts.flat_map(|host| {
            (0..self.spec().endpoints.len()).filter_map(move |index| {
                Some((index, host, instance_host(&format!("endpoint-{index}"), host)?))
            })
        })
    }

    /// All hosts that it claims, with the kind of claim.
    pub(crate) fn claims(&self) -> BTreeSet<(bool, Arc<str>)> {
        let own = self.hosts.iter().map(|host| (false, host.clone()));
        own.chain(self.endpoint_instances().map(|(_, _, name)| (true, name)))
            .collect()
    }
}

/// `<instance>.<host>`, if that is a host name.
pub(crate) fn instance_host(instance: &str, host: &str) -> Option<Arc<str>> {
    if host.starts_with('*') {
        return None;
    }
    format!("{instance}.{host}")
        .parse::<Hostname>()
        .ok()
        .map(|host| host.as_str().into())
}
