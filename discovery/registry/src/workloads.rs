//! WorkloadEntry and inline endpoints to istio.workload.Workload, and what a VM may deliver.
//!
//! Source: Istio pilot/pkg/serviceregistry/kube/controller/ambient/workloads.go (workloadEntryWorkloadBuilder,
//! serviceEntryWorkloadBuilder, constructServicesFromWorkloadEntry).

use crate::{
    Health, Registry,
    content::{self, ObjectKey, Output, ip_bytes, key},
    peer_authentication::{self, Effect},
    selectors::{Labels, selects},
    services::{app_protocol, is_carried},
    state::{EntryState, ServiceState, instance_host},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};
use tombolo_config::{
    GroupOptions, Kind, MtlsMode, ServiceEntrySpec, WorkloadEntrySpec, annotation, networking::ServicePort,
};
use tombolo_proto::{
    istio::workload::{Locality, Port, PortList, TunnelProtocol, Workload, WorkloadStatus, WorkloadType},
    tombolo::v1::{DeclaredPort, Exposure},
    type_url,
};
use tombolo_types::{networks, ports::NEVER_DELIVERED};

/// Overrides the start of HBONE by a node agent beside the workload.
const AMBIENT_REDIRECTION: &str = "ambient.istio.io/redirection";

impl Registry {
    /// All resources of an entry.
    pub(crate) fn entry_outputs(&self, object: &ObjectKey) -> Vec<Output> {
        let Some(entry) = self.entries.get(object) else {
            return Vec::new();
        };
        let selecting = self.selecting_services(entry);
        let mut outputs = vec![
            content::workload(self.entry_workload(entry, &selecting)),
            content::resource(
                type_url::EXPOSURE,
                key(&object.namespace, &object.name),
                &self.exposure(entry, &selecting),
            ),
        ];
        for service in selecting.iter().filter(|service| service.has_instances()) {
            for host in service.hosts.iter().filter(|host| self.owns(&service.key, host)) {
                let name = instance_host(&object.name, host).filter(|name| self.owns(object, name));
                outputs.extend(name.map(|name| self.instance_service(service, object, entry.created, &name)));
            }
        }
        outputs
    }

    pub(crate) fn selecting_services(&self, entry: &EntryState) -> Vec<&ServiceState> {
        let names = self
            .service_selectors
            .matching(&entry.key.namespace, &entry.labels);
        let keys = names.into_iter().map(|name| ObjectKey {
            kind: Kind::ServiceEntry,
            namespace: entry.key.namespace.clone(),
            name,
        });
        keys.filter_map(|key| self.services.get(&key)).collect()
    }

    /// Whether clients should choose it.
    pub(crate) fn is_healthy(&self, entry: &EntryState) -> bool {
        match self.health.get(&entry.key) {
            Some(Health::Healthy) => true,
            Some(Health::Unhealthy { .. }) => false,
            None => entry.healthy_by_status().unwrap_or(!entry.checked()),
        }
    }

    /// Host names under which the endpoint of a WorkloadEntry is reached, its own per-instance names too.
    pub fn hostnames(&self, namespace: &str, entry: &str) -> Vec<String> {
        let key = ObjectKey {
            kind: Kind::WorkloadEntry,
            namespace: namespace.into(),
            name: entry.into(),
        };
        let Some(entry) = self.entries.get(&key) else {
            return Vec::new();
        };
        let services = self.selecting_services(entry);
        let hosts = services.iter().flat_map(|service| {
            service
                .hosts
                .iter()
                .filter(|host| self.owns(&service.key, host))
                .map(ToString::to_string)
        });
        let own = entry
            .instances
            .iter()
            .filter(|host| self.owns(&key, host))
            .map(ToString::to_string);
        hosts.chain(own).collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn entry_workload(&self, entry: &EntryState, selecting: &[&ServiceState]) -> Workload {
        let (object, spec) = (&entry.object, &entry.object.spec);
        let mut services = BTreeMap::new();
        for service in selecting {
            let ports = PortList {
                ports: endpoint_ports(service.spec(), &spec.ports),
            };
            for host in service.hosts.iter().filter(|host| self.owns(&service.key, host)) {
                services.insert(key(&entry.key.namespace, host), ports.clone());
                let instance = instance_host(&entry.key.name, host);
                let instance = instance.filter(|host| service.has_instances() && self.owns(&entry.key, host));
                if let Some(instance) = instance {
                    services.insert(key(&entry.key.namespace, &instance), ports.clone());
                }
            }
        }
        // What telemetry calls the workload: the group, as on Kubernetes the deployment and not the pod.
        let workload_name = entry.group.as_deref().unwrap_or(&entry.key.name);
        let status = if self.is_healthy(entry) {
            WorkloadStatus::Healthy
        } else {
            WorkloadStatus::Unhealthy
        };
        Workload {
            uid: format!(
                "{}/networking.istio.io/WorkloadEntry/{}/{}",
                self.settings.cluster_id, entry.key.namespace, entry.key.name
            ),
            name: entry.key.name.to_string(),
            services,
            status: status.into(),
            ..self.reachable(
                self.workload(
                    &entry.key.namespace,
                    spec,
                    &entry.labels,
                    &object.metadata.annotations,
                    workload_name,
                ),
                self.is_outbound_only(entry),
            )
        }
    }

    /// How others reach it: from outside its network by a gateway, and by nothing else if it only dials out. What such
    /// a member says about its addresses means nothing to others: two of them may well have the same.
    fn reachable(&self, mut workload: Workload, outbound_only: bool) -> Workload {
        workload.network_gateway = self.network_gateway(&workload.network);
        if outbound_only {
            workload.network = networks::outbound_of(&workload.network);
            (workload.addresses, workload.hostname) = (Vec::new(), String::new());
        }
        workload
    }

    /// Networks of the endpoints that are written in a service.
    pub(crate) fn inline_networks(&self, service: &ServiceState) -> BTreeSet<Arc<str>> {
        let written = service.spec().endpoints.iter();
        let written = written.map(|endpoint| self.home_network(endpoint).into());
        let implied = service
            .hosts_are_endpoints()
            .then(|| self.settings.network.as_str().into());
        written.chain(implied).collect()
    }

    /// Identities of a service's endpoints that callers in another network meet: a gateway chooses the endpoint, and
    /// the caller cannot know whom it will be. Those in other networks than discovery's own, or all where members of
    /// this registry are in several. `owner` is the service, or the endpoint whose own name this is.
    ///
    /// Source: Istio, which fills subject_alt_names so where a service spans networks.
    pub(crate) fn remote_identities(
        &self,
        service: &ServiceState,
        owner: &ObjectKey,
        host: &str,
    ) -> BTreeSet<String> {
        let local = self.settings.network.as_str();
        let mut found = self.imported_identities(&service.key.namespace, host);
        let renamed = self.is_renamed();
        if !renamed && !self.places.any_remote(local) {
            return found;
        }
        let spans = renamed || self.places.spans(local);
        let entries = match self.entries.get(owner) {
            Some(entry) => vec![entry],
            None => self.selected_entries(service),
        };
        // Endpoints that are in no mesh prove nothing.
        let none = BTreeMap::new();
        let entries = entries.into_iter().filter(|entry| {
            let annotations = &entry.object.metadata.annotations;
            self.is_named(&entry.key) && is_tunnelled(&entry.labels, annotations)
        });
        let written = service.spec().endpoints.iter();
        let named = |endpoint: &WorkloadEntrySpec| spans || self.home_network(endpoint) != local;
        let written = written.filter(|endpoint| named(endpoint) && is_tunnelled(&endpoint.labels, &none));
        let specs = entries.map(|entry| &entry.object.spec).chain(written);
        found.extend(specs.flat_map(|spec| self.identities(&service.key.namespace, spec)));
        found
    }

    /// The part of a workload that entries and inline endpoints share.
    fn workload(
        &self,
        namespace: &str,
        spec: &WorkloadEntrySpec,
        labels: &Labels,
        annotations: &BTreeMap<String, String>,
        workload_name: &str,
    ) -> Workload {
        let (addresses, hostname) = match spec.address.parse::<IpAddr>() {
            Ok(ip) => (vec![ip_bytes(ip)], String::new()),
            Err(_) if spec.address.starts_with("unix:") => (Vec::new(), String::new()),
            Err(_) => (Vec::new(), spec.address.clone()),
        };
        let native = is_native(labels, annotations);
        let tunnel = if is_tunnelled(labels, annotations) {
            TunnelProtocol::Hbone
        } else {
            TunnelProtocol::None
        };
        let first = |keys: [&str; 3]| {
            keys.iter()
                .find_map(|key| labels.get(*key).filter(|value| !value.is_empty()))
        };
        let canonical_name = first([annotation::CANONICAL_NAME, "app.kubernetes.io/name", "app"]);
        let canonical_revision = first([
            annotation::CANONICAL_REVISION,
            "app.kubernetes.io/version",
            "version",
        ]);
        Workload {
            namespace: namespace.to_owned(),
            addresses,
            hostname,
            network: self.home_network(spec).to_owned(),
            cluster_id: self.settings.cluster_id.clone(),
            trust_domain: self.settings.trust_domain.to_string(),
            service_account: if spec.service_account.is_empty() {
                "default".to_owned()
            } else {
                spec.service_account.clone()
            },
            tunnel_protocol: tunnel.into(),
            native_tunnel: native,
            canonical_name: canonical_name.map_or(workload_name, String::as_str).to_owned(),
            canonical_revision: canonical_revision.map_or("latest", String::as_str).to_owned(),
            workload_name: workload_name.to_owned(),
            workload_type: WorkloadType::Pod.into(),
            authorization_policies: self.policies_of(namespace, labels),
            locality: locality(&spec.locality),
            capacity: (spec.weight > 0).then_some(spec.weight),
            ..Workload::default()
        }
    }

    /// Keys of the policies that select a workload by its labels, in the order in which istiod writes them.
    fn policies_of(&self, namespace: &str, labels: &Labels) -> Vec<String> {
        let root = self.settings.root_namespace.as_str();
        let namespaces: BTreeSet<&str> = [namespace, root].into();
        let by_label = namespaces.into_iter().flat_map(|namespace| {
            let names = self.policy_selectors.matching(namespace, labels);
            names.into_iter().map(move |name| key(namespace, &name))
        });
        let mut policies: Vec<String> = by_label.collect();
        policies.sort();
        let wider_is_strict = self.is_strict(namespace);
        let strict = || key(root, peer_authentication::STATIC_STRICT);
        match self.peer_policy_of(namespace, labels) {
            None if wider_is_strict => policies.push(strict()),
            None => {}
            Some((name, spec)) => match peer_authentication::effect(spec, wider_is_strict) {
                Effect::Permissive => {}
                Effect::Strict => policies.push(strict()),
                Effect::Ports { .. } => {
                    policies.push(key(namespace, &peer_authentication::converted_name(name)))
                }
            },
        }
        policies
    }

    /// The oldest PeerAuthentication that selects a workload. Those of the root namespace select nobody, as in ambient
    /// Istio.
    fn peer_policy_of(
        &self,
        namespace: &str,
        labels: &Labels,
    ) -> Option<(&str, &tombolo_config::PeerAuthenticationSpec)> {
        if namespace == self.settings.root_namespace {
            return None;
        }
        let names = self.peer_selectors.matching(namespace, labels);
        let found = names.into_iter().filter_map(|name| {
            let key = ObjectKey {
                kind: Kind::PeerAuthentication,
                namespace: namespace.into(),
                name,
            };
            let object = self.peer_policies.get(&key)?;
            Some((crate::state::created(&object.metadata), object))
        });
        let (_, object) = found.min_by(|(a, x), (b, y)| (a, &x.metadata.name).cmp(&(b, &y.metadata.name)))?;
        Some((&object.metadata.name, &object.spec))
    }

    /// True if plaintext is denied by the policy of the namespace or, where that leaves it open, of the mesh.
    pub(crate) fn is_strict(&self, namespace: &str) -> bool {
        let oldest = |namespace: &str| {
            let (_, name) = self.wide_peer_policies.get(namespace)?.first()?;
            let key = ObjectKey {
                kind: Kind::PeerAuthentication,
                namespace: namespace.into(),
                name: name.clone(),
            };
            peer_authentication::mode(&self.peer_policies.get(&key)?.spec)
        };
        oldest(namespace).or_else(|| oldest(&self.settings.root_namespace)) == Some(MtlsMode::Strict)
    }

    /// Workloads of endpoints that are written in a ServiceEntry, and of the hosts that are their own endpoint.
    pub(crate) fn inline_workloads(&self, service: &ServiceState) -> Vec<Output> {
        let spec = service.spec();
        let owned: Vec<&Arc<str>> = service
            .hosts
            .iter()
            .filter(|host| self.owns(&service.key, host))
            .collect();
        if owned.is_empty() {
            return Vec::new();
        }
        let implied: Vec<(WorkloadEntrySpec, Vec<&Arc<str>>)> = if service.hosts_are_endpoints() {
            let own = |host: &Arc<str>| WorkloadEntrySpec {
                address: host.to_string(),
                ..WorkloadEntrySpec::default()
            };
            owned.iter().map(|host| (own(host), vec![*host])).collect()
        } else {
            Vec::new()
        };
        let written = spec
            .endpoints
            .iter()
            .map(|endpoint| (endpoint.clone(), owned.clone()));
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let mut outputs = Vec::new();
        for (index, (endpoint, hosts)) in written.chain(implied).enumerate() {
            let (namespace, name) = (&service.key.namespace, &service.key.name);
            let mut uid = format!(
                "{}/networking.istio.io/ServiceEntry/{namespace}/{name}/{}",
                self.settings.cluster_id, endpoint.address
            );
            // The same address twice, with other ports or labels, is two workloads.
            let repeats = seen.entry(endpoint.address.clone()).or_default();
            if *repeats > 0 {
                uid.push_str(&format!("#{repeats}"));
            }
            *repeats += 1;
            let ports = PortList {
                ports: endpoint_ports(spec, &endpoint.ports),
            };
            let mut services: BTreeMap<String, PortList> = hosts
                .iter()
                .map(|host| (key(namespace, host), ports.clone()))
                .collect();
            for (_, _, name) in self
                .endpoint_instances(service)
                .filter(|(place, _, _)| *place == index)
            {
                services.insert(key(namespace, &name), ports.clone());
            }
            let none = BTreeMap::new();
            outputs.push(content::workload(Workload {
                uid,
                name: name.to_string(),
                services,
                status: WorkloadStatus::Healthy.into(),
                ..self.reachable(
                    self.workload(namespace, &endpoint, &endpoint.labels, &none, name),
                    false,
                )
            }));
        }
        outputs
    }

    /// What a VM may deliver: ports that its group declares, and target ports of services of its namespace that select
    /// it.
    fn exposure(&self, entry: &EntryState, selecting: &[&ServiceState]) -> Exposure {
        let group = entry.group.as_ref().and_then(|name| {
            let kind = Kind::WorkloadGroup;
            self.groups.get(&ObjectKey {
                kind,
                namespace: entry.key.namespace.clone(),
                name: name.clone(),
            })
        });
        let options = group
            .map(|group| GroupOptions::of(&group.metadata))
            .unwrap_or_default();
        let declared = group.map_or(&entry.object.spec.ports, |group| &group.spec.template.ports);
        let mut ports: BTreeSet<u32> = declared.values().copied().collect();
        for service in selecting {
            debug_assert!(
                service
                    .selector()
                    .is_some_and(|selector| selects(selector, &entry.labels))
            );
            ports.extend(
                endpoint_ports(service.spec(), &entry.object.spec.ports)
                    .iter()
                    .map(|port| port.target_port),
            );
        }
        if options.deliver_all_ports {
            ports.extend(options.loopback_ports.iter().map(|port| u32::from(*port)));
        }
        let deliverable = ports.into_iter().filter_map(|port| u16::try_from(port).ok());
        let deliverable =
            deliverable.filter(|port| !matches!(port, 0 | 22) && !NEVER_DELIVERED.contains(port));
        let ports = deliverable
            .map(|port| DeclaredPort {
                port: port.into(),
                loopback: options.loopback_ports.contains(&port),
            })
            .collect();
        Exposure {
            ports,
            all_ports: options.deliver_all_ports,
        }
    }
}

fn is_native(labels: &Labels, annotations: &BTreeMap<String, String>) -> bool {
    [labels, annotations].iter().any(|from| {
        from.get(annotation::TUNNEL)
            .is_some_and(|value| value.split(',').any(|word| word.trim() == "http"))
    })
}

/// It takes HBONE, itself or by a node agent.
pub(crate) fn is_tunnelled(labels: &Labels, annotations: &BTreeMap<String, String>) -> bool {
    let redirected = annotations
        .get(AMBIENT_REDIRECTION)
        .is_some_and(|value| value == "enabled");
    redirected || is_native(labels, annotations)
}

/// Ports of a service at an endpoint: the endpoint's port of the same name, else the target port, else the same number.
pub(crate) fn endpoint_ports(spec: &ServiceEntrySpec, own: &BTreeMap<String, u32>) -> Vec<Port> {
    let one = |port: &ServicePort| Port {
        service_port: port.number,
        target_port: own.get(&port.name).copied().unwrap_or_else(|| target_port(port)),
        app_protocol: app_protocol(&port.protocol).into(),
    };
    spec.ports
        .iter()
        .filter(|port| is_carried(port))
        .map(one)
        .collect()
}

pub(crate) fn target_port(port: &ServicePort) -> u32 {
    if port.target_port == 0 {
        port.number
    } else {
        port.target_port
    }
}

/// `region/zone/subzone`.
pub(crate) fn locality(text: &str) -> Option<Locality> {
    if text.is_empty() {
        return None;
    }
    let mut parts = text.splitn(3, '/').map(str::to_owned);
    let mut part = || parts.next().unwrap_or_default();
    Some(Locality {
        region: part(),
        zone: part(),
        subzone: part(),
    })
}
