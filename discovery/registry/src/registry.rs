use crate::{
    Allocation, Export, Imports, MeshSettings, Watermark, World,
    content::ObjectKey,
    export_rules::ExportRules,
    imports::imported_host,
    networks::{NetworkState, Places},
    selectors::{Labelled, Selectors},
    state::{Claimant, EntryState, HostAddresses, ServiceState},
    vips::{Claim, Vips},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};
use tombolo_config::{
    AuthorizationPolicySpec, Kind, Object, PeerAuthenticationSpec, Resource, WorkloadGroupSpec,
};
use tombolo_types::{DeviceId, TrustDomain};

/// Whether an endpoint is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It is.
    Healthy,
    /// It is not.
    Unhealthy {
        /// Why, for people.
        reason: String,
    },
}

/// What makes resources: an object, or the settings.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Producer {
    /// Resources that do not hang on one object.
    Mesh,
    /// Those of an object, or of an imported service.
    Object(ObjectKey),
    /// The gateways of a network.
    Network(Arc<str>),
}

/// The merged index: resources, health, revocations and roots go in; immutable worlds come out.
///
/// Each change marks what must be compiled again, found through indexes by label and name, so that [`Self::publish`]
/// costs what changed and not what there is.
#[derive(Debug)]
pub struct Registry {
    pub(crate) settings: MeshSettings,
    pub(crate) groups: BTreeMap<ObjectKey, Object<WorkloadGroupSpec>>,
    pub(crate) entries: BTreeMap<ObjectKey, EntryState>,
    pub(crate) services: BTreeMap<ObjectKey, ServiceState>,
    pub(crate) policies: BTreeMap<ObjectKey, Object<AuthorizationPolicySpec>>,
    pub(crate) peer_policies: BTreeMap<ObjectKey, Object<PeerAuthenticationSpec>>,
    pub(crate) health: BTreeMap<ObjectKey, Health>,
    pub(crate) revoked: BTreeSet<DeviceId>,
    pub(crate) bundles: BTreeMap<TrustDomain, String>,

    pub(crate) entry_labels: Labelled,
    pub(crate) service_selectors: Selectors,
    pub(crate) policy_selectors: Selectors,
    pub(crate) peer_selectors: Selectors,
    /// Entries by their group.
    pub(crate) group_members: BTreeMap<ObjectKey, BTreeSet<ObjectKey>>,
    /// PeerAuthentications without a selector by namespace, oldest first.
    pub(crate) wide_peer_policies: BTreeMap<Arc<str>, BTreeSet<(i64, Arc<str>)>>,
    /// Services with endpoints of their own, which policies select, too.
    pub(crate) services_with_endpoints: BTreeSet<ObjectKey>,
    /// Who publishes a host name, best claim first.
    pub(crate) hosts: BTreeMap<Arc<str>, BTreeSet<Claimant>>,

    pub(crate) vips: Vips,
    /// Objects whose addresses may be incomplete.
    pub(crate) vip_dirty: BTreeSet<ObjectKey>,
    /// Claims that lack an address, by object.
    pub(crate) unaddressed: BTreeMap<ObjectKey, BTreeSet<Claim>>,

    /// In which networks endpoints are.
    pub(crate) places: Places,
    /// Networks that gateways lead into.
    pub(crate) networks: BTreeMap<Arc<str>, NetworkState>,
    pub(crate) gateway_entries: BTreeSet<ObjectKey>,
    /// By cluster.
    pub(crate) imports: BTreeMap<Arc<str>, Imports>,
    /// What clusters say about a service, by what stands for it among the objects.
    pub(crate) imported: BTreeMap<ObjectKey, BTreeMap<Arc<str>, Export>>,
    pub(crate) imported_vips: BTreeMap<ObjectKey, HostAddresses>,
    /// What is said about export.
    pub(crate) rules: ExportRules,
    pub(crate) exported: BTreeMap<ObjectKey, Vec<Export>>,
    pub(crate) exports_dirty: BTreeSet<ObjectKey>,

    pub(crate) dirty: BTreeSet<Producer>,
    /// Names of what each producer made last.
    pub(crate) produced: BTreeMap<Producer, Vec<(&'static str, Arc<str>)>>,
    pub(crate) world: Arc<World>,
}

impl Registry {
    /// Empty.
    pub fn new(settings: MeshSettings) -> Self {
        Self {
            vips: Vips::new(settings.plan),
            settings,
            groups: BTreeMap::new(),
            entries: BTreeMap::new(),
            services: BTreeMap::new(),
            policies: BTreeMap::new(),
            peer_policies: BTreeMap::new(),
            health: BTreeMap::new(),
            revoked: BTreeSet::new(),
            bundles: BTreeMap::new(),
            entry_labels: Labelled::default(),
            service_selectors: Selectors::default(),
            policy_selectors: Selectors::default(),
            peer_selectors: Selectors::default(),
            group_members: BTreeMap::new(),
            wide_peer_policies: BTreeMap::new(),
            services_with_endpoints: BTreeSet::new(),
            hosts: BTreeMap::new(),
            vip_dirty: BTreeSet::new(),
            unaddressed: BTreeMap::new(),
            places: Places::default(),
            networks: BTreeMap::new(),
            gateway_entries: BTreeSet::new(),
            imports: BTreeMap::new(),
            imported: BTreeMap::new(),
            imported_vips: BTreeMap::new(),
            rules: ExportRules::default(),
            exported: BTreeMap::new(),
            exports_dirty: BTreeSet::new(),
            dirty: BTreeSet::from([Producer::Mesh]),
            produced: BTreeMap::new(),
            world: Arc::new(World::empty()),
        }
    }

    /// What it was made with.
    pub fn settings(&self) -> &MeshSettings {
        &self.settings
    }

    /// Adds or replaces a resource. Kinds that are never sent (JoinToken, Device) are passed over.
    pub fn upsert(&mut self, resource: Resource) {
        match resource {
            Resource::WorkloadGroup(object) => self.put_group(object),
            Resource::WorkloadEntry(object) => self.put_entry(EntryState::new(object)),
            Resource::ServiceEntry(object) => self.put_service(ServiceState::new(object)),
            Resource::AuthorizationPolicy(object) => self.put_policy(object),
            Resource::PeerAuthentication(object) => self.put_peer_policy(object),
            Resource::ServiceExport(object) => self.put_service_export(&object),
            Resource::Namespace(object) => self.put_namespace(&object),
            Resource::JoinToken(_) | Resource::Device(_) => {}
        }
    }

    /// Removes a resource; nothing if it is not there.
    pub fn remove(&mut self, kind: Kind, namespace: &str, name: &str) {
        let key = ObjectKey {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        };
        match kind {
            Kind::WorkloadGroup => self.drop_group(&key),
            Kind::WorkloadEntry => self.drop_entry(&key),
            Kind::ServiceEntry => self.drop_service(&key),
            Kind::AuthorizationPolicy => self.drop_policy(&key),
            Kind::PeerAuthentication => self.drop_peer_policy(&key),
            Kind::ServiceExport => self.drop_service_export(&key),
            Kind::Namespace => self.drop_namespace(&key),
            Kind::JoinToken | Kind::Device => {}
        }
    }

    /// Says whether the endpoint of a WorkloadEntry is chosen. It overrides what the entry's status says, is kept until
    /// the entry is removed, and may come before the entry.
    pub fn set_health(&mut self, namespace: &str, entry: &str, health: Health) {
        let key = ObjectKey {
            kind: Kind::WorkloadEntry,
            namespace: namespace.into(),
            name: entry.into(),
        };
        if self.health.get(&key) != Some(&health) {
            self.health.insert(key.clone(), health);
            self.touch_entry(&key);
        }
    }

    /// What was said about an endpoint last.
    pub fn health(&self, namespace: &str, entry: &str) -> Option<&Health> {
        self.health.get(&ObjectKey {
            kind: Kind::WorkloadEntry,
            namespace: namespace.into(),
            name: entry.into(),
        })
    }

    /// Replaces the set of revoked devices.
    pub fn set_revoked(&mut self, devices: BTreeSet<DeviceId>) {
        if self.revoked != devices {
            self.revoked = devices;
            self.dirty.insert(Producer::Mesh);
        }
    }

    /// Sets the roots of a trust domain; empty text removes them.
    pub fn set_bundle(&mut self, trust_domain: &TrustDomain, roots_pem: &str) {
        if roots_pem.is_empty() {
            self.bundles.remove(trust_domain);
        } else {
            self.bundles.insert(trust_domain.clone(), roots_pem.to_owned());
        }
        self.dirty.insert(Producer::Mesh);
    }

    /// VIPs that are still to be given, oldest object first. The caller persists them (see [`Allocation::persist`]) and
    /// upserts the object again before it publishes; until then each call gives the same answer. Those of imported
    /// services come from [`Self::allocate_imported`].
    pub fn allocate(&mut self) -> Vec<Allocation> {
        let given = self.give_addresses().into_iter();
        given
            .filter(|(claim, ..)| imported_host(&claim.object).is_none())
            .map(|(claim, v4, v6)| Allocation {
                kind: claim.object.kind,
                namespace: claim.object.namespace.to_string(),
                name: claim.object.name.to_string(),
                host: claim.host.to_string(),
                v4,
                v6,
            })
            .collect()
    }

    /// Completes what claims hold, oldest first. The same answer until it is seen as held.
    pub(crate) fn give_addresses(&mut self) -> Vec<(Claim, Option<Ipv4Addr>, Option<Ipv6Addr>)> {
        for key in std::mem::take(&mut self.vip_dirty) {
            let lacking: BTreeSet<Claim> = self.wanted_addresses(&key);
            let before = self.unaddressed.remove(&key).unwrap_or_default();
            before
                .difference(&lacking)
                .for_each(|claim| self.vips.settle(claim));
            if !lacking.is_empty() {
                self.unaddressed.insert(key, lacking);
            }
        }
        let claims: BTreeSet<Claim> = self.unaddressed.values().flatten().cloned().collect();
        let mut given = Vec::new();
        for claim in claims {
            let held = self.held(&claim);
            let [v4, v6] = self.vips.give(&claim, held);
            if [v4, v6] == held {
                continue;
            }
            let v4 = v4.and_then(|ip| match ip {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            });
            let v6 = v6.and_then(|ip| match ip {
                IpAddr::V6(ip) => Some(ip),
                IpAddr::V4(_) => None,
            });
            given.push((claim, v4, v6));
        }
        given
    }

    /// The highest VIPs given or seen; to be persisted beside the objects.
    pub fn vip_watermark(&self) -> Watermark {
        self.vips.watermark()
    }

    /// Restores a watermark before the first allocation: addresses up to it are not given again before all others.
    pub fn raise_vip_watermark(&mut self, watermark: Watermark) {
        self.vips.raise(watermark);
    }

    /// Hosts of a ServiceEntry that an older one of its namespace publishes already, with the name of that one.
    pub fn shadowed_hosts(&self, namespace: &str, name: &str) -> Vec<(String, String)> {
        let key = ObjectKey {
            kind: Kind::ServiceEntry,
            namespace: namespace.into(),
            name: name.into(),
        };
        let hosts = self
            .services
            .get(&key)
            .map(|service| &service.hosts)
            .into_iter()
            .flatten();
        let owned = hosts.filter_map(|host| Some((host, self.owner(namespace, host)?)));
        let others = owned.filter(|(_, owner)| owner.object != key);
        others
            .map(|(host, owner)| (host.to_string(), owner.object.name.to_string()))
            .collect()
    }
}
