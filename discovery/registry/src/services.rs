//! ServiceEntry to istio.workload.Service and tombolo.v1.ServiceVip.
//!
//! Source: Istio pilot/pkg/serviceregistry/kube/controller/ambient/services.go (constructServiceEntries).

use crate::{
    Registry,
    content::{self, ObjectKey, Output, ip_bytes, key},
    state::ServiceState,
    vips::Claim,
    workloads::target_port,
};
use ipnet::IpNet;
use std::{net::IpAddr, sync::Arc};
use tombolo_config::{Kind, Resolution, annotation, networking::ServicePort};
use tombolo_proto::{
    istio::workload::{
        AppProtocol, LoadBalancing, NetworkAddress, Port, Service,
        load_balancing::{Mode, Scope},
        service::Visibility,
    },
    tombolo::v1::ServiceVip,
    type_url,
};

impl Registry {
    /// All resources of a ServiceEntry.
    pub(crate) fn service_outputs(&self, object: &ObjectKey) -> Vec<Output> {
        let Some(service) = self.services.get(object) else {
            return Vec::new();
        };
        let mut outputs = self.inline_workloads(service);
        let instances = self.endpoint_instances(service);
        outputs.extend(
            instances.map(|(_, _, name)| self.instance_service(service, object, service.created, &name)),
        );
        for host in service.hosts.iter().filter(|host| self.owns(object, host)) {
            let held = self.vips_of(object, service.created, host);
            let own = &service.spec().addresses;
            let addresses = if own.is_empty() {
                self.everywhere(&held)
            } else {
                own.iter()
                    .filter_map(|text| parse(text))
                    .map(|net| self.address(net))
                    .collect()
            };
            outputs.push(content::service(self.service(service, object, host, addresses)));
            let vips = if service.has_instances() {
                self.instance_vips(service, host)
            } else {
                held
            };
            if service.has_instances() || !(own.is_empty() || vips.is_empty()) {
                outputs.push(service_vip(&object.namespace, host, &vips));
            }
        }
        outputs
    }

    /// The service of a single endpoint of a headless one; `object` is the endpoint, or where it is written.
    pub(crate) fn instance_service(
        &self,
        service: &ServiceState,
        object: &ObjectKey,
        created: i64,
        name: &Arc<str>,
    ) -> Output {
        let vips = self.vips_of(object, created, name);
        content::service(self.service(service, object, name, self.everywhere(&vips)))
    }

    fn service(
        &self,
        service: &ServiceState,
        owner: &ObjectKey,
        host: &str,
        addresses: Vec<NetworkAddress>,
    ) -> Service {
        let (spec, metadata) = (service.spec(), &service.object.metadata);
        let public = spec.export_to.is_empty() || spec.export_to.iter().any(|namespace| namespace == "*");
        let one = |port: &ServicePort| Port {
            service_port: port.number,
            target_port: target_port(port),
            app_protocol: app_protocol(&port.protocol).into(),
        };
        let preference = metadata
            .annotations
            .get(annotation::TRAFFIC_DISTRIBUTION)
            .map(String::as_str);
        // Others than SPIFFE ids are for TLS that the application speaks.
        let written = spec.subject_alt_names.iter();
        let mut subject_alt_names: Vec<String> =
            written.flat_map(|name| self.written_identities(name)).collect();
        let mut remote = self.remote_identities(service, owner, host);
        remote.retain(|name| !subject_alt_names.contains(name));
        subject_alt_names.extend(remote);
        Service {
            name: service.key.name.to_string(),
            namespace: service.key.namespace.to_string(),
            hostname: host.to_owned(),
            addresses,
            ports: spec
                .ports
                .iter()
                .filter(|port| is_carried(port))
                .map(one)
                .collect(),
            subject_alt_names,
            load_balancing: load_balancing(spec.resolution, preference),
            canonical: self.is_canonical(owner, host),
            // A list of namespaces cannot be said: narrower than written, never wider.
            visibility: if public {
                Visibility::Public
            } else {
                Visibility::Namespace
            }
            .into(),
            ..Service::default()
        }
    }

    /// Virtual addresses given by this registry: the same in each of its networks, where ztunnel looks for them.
    pub(crate) fn everywhere(&self, vips: &[IpAddr]) -> Vec<NetworkAddress> {
        let at = |network: &str, ip: &IpAddr| NetworkAddress {
            network: network.to_owned(),
            address: ip_bytes(*ip),
            length: None,
        };
        self.own_networks()
            .flat_map(|network| vips.iter().map(move |ip| at(network, ip)))
            .collect()
    }

    /// An address that was written: it means something in this registry's own network alone.
    fn address(&self, net: IpNet) -> NetworkAddress {
        let host = net.prefix_len() == net.max_prefix_len();
        NetworkAddress {
            network: self.settings.network.clone(),
            address: ip_bytes(if host { net.addr() } else { net.network() }),
            length: (!host).then(|| net.prefix_len().into()),
        }
    }

    pub(crate) fn vips_of(&self, object: &ObjectKey, created: i64, host: &Arc<str>) -> Vec<IpAddr> {
        let claim = Claim {
            created,
            object: object.clone(),
            host: host.clone(),
        };
        self.held(&claim).into_iter().flatten().collect()
    }

    /// Virtual addresses of a headless service's endpoints: of the healthy ones, or of all if none is, so that a call
    /// fails for the reason that is true.
    fn instance_vips(&self, service: &ServiceState, host: &str) -> Vec<IpAddr> {
        let mut found: Vec<(bool, Vec<IpAddr>)> = Vec::new();
        for (_, _, name) in self
            .endpoint_instances(service)
            .filter(|(_, parent, _)| ***parent == *host)
        {
            found.push((true, self.vips_of(&service.key, service.created, &name)));
        }
        if let Some(selector) = service.selector() {
            for name in self.entry_labels.matching(&service.key.namespace, selector) {
                let Some(instance) = crate::state::instance_host(&name, host) else {
                    continue;
                };
                let key = ObjectKey {
                    kind: Kind::WorkloadEntry,
                    namespace: service.key.namespace.clone(),
                    name,
                };
                if let Some(entry) = self.entries.get(&key).filter(|_| self.owns(&key, &instance)) {
                    found.push((
                        self.is_healthy(entry),
                        self.vips_of(&key, entry.created, &instance),
                    ));
                }
            }
        }
        let any_healthy = found.iter().any(|(healthy, vips)| *healthy && !vips.is_empty());
        let chosen = found
            .into_iter()
            .filter(|(healthy, _)| *healthy || !any_healthy)
            .flat_map(|(_, vips)| vips);
        let mut vips: Vec<IpAddr> = chosen.collect();
        vips.sort_unstable();
        vips
    }
}

fn service_vip(namespace: &str, host: &str, vips: &[IpAddr]) -> Output {
    let message = ServiceVip {
        namespace: namespace.to_owned(),
        hostname: host.to_owned(),
        vips: vips.iter().map(ToString::to_string).collect(),
    };
    content::resource(type_url::SERVICE_VIP, key(namespace, host), &message)
}

fn parse(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// UDP is not carried yet, and a TCP call to such a port would reach what nobody declared.
pub(crate) fn is_carried(port: &ServicePort) -> bool {
    !port.protocol.eq_ignore_ascii_case("udp")
}

pub(crate) fn app_protocol(protocol: &str) -> AppProtocol {
    match protocol.to_ascii_uppercase().as_str() {
        "HTTP" | "HTTP_PROXY" | "GRPC-WEB" => AppProtocol::Http11,
        "HTTP2" => AppProtocol::Http2,
        "GRPC" => AppProtocol::Grpc,
        "TLS" | "HTTPS" => AppProtocol::Tls,
        "TCP" | "MONGO" | "REDIS" | "MYSQL" => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

/// `None`: all endpoints are equal.
fn load_balancing(resolution: Resolution, preference: Option<&str>) -> Option<LoadBalancing> {
    let near = |scopes: &[Scope]| {
        Some(LoadBalancing {
            routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
            mode: Mode::Failover.into(),
            ..LoadBalancing::default()
        })
    };
    if resolution == Resolution::None {
        return Some(LoadBalancing {
            mode: Mode::Passthrough.into(),
            ..LoadBalancing::default()
        });
    }
    match preference {
        Some("PreferClose" | "PreferSameZone") => near(&[Scope::Network, Scope::Region, Scope::Zone]),
        Some("PreferSameNode") => near(&[
            Scope::Network,
            Scope::Region,
            Scope::Zone,
            Scope::Subzone,
            Scope::Node,
        ]),
        _ => None,
    }
}
