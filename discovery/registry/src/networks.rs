//! Networks: which objects have endpoints in them, and which gateways lead into them.

use crate::{
    Registry,
    content::{self, ObjectKey, Output, ip_bytes},
    imports::imported_host,
    registry::Producer,
    state::EntryState,
    workloads::locality,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};
use tombolo_config::{GroupOptions, Kind, WorkloadEntrySpec, annotation};
use tombolo_proto::{
    istio::workload::{
        GatewayAddress, NamespacedHostname, NetworkAddress, TunnelProtocol, Workload, WorkloadStatus,
        WorkloadType, gateway_address::Destination,
    },
    tombolo::v1::{self, NetworkGateways},
    type_url,
};
use tombolo_types::{Hostname, SpiffeId, TrustDomain, networks, ports};

/// A way into a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkGateway {
    /// The network that it leads into.
    pub network: String,
    /// IP address or DNS name at which callers outside of the network reach it.
    pub address: String,
    /// HBONE over TCP.
    pub hbone_port: u16,
    /// QUIC, where it is served.
    pub quic_port: Option<u16>,
    /// Trust domain of its identity.
    pub trust_domain: TrustDomain,
    /// Namespace of its identity.
    pub namespace: String,
    /// Service account of its identity.
    pub service_account: String,
    /// Cluster that it belongs to.
    pub cluster: String,
    /// `region/zone/subzone`, as far as known.
    pub locality: String,
    /// False: lost by its own control plane.
    pub healthy: bool,
}

/// Gateways of one network.
#[derive(Debug, Default)]
pub(crate) struct NetworkState {
    gateways: Vec<NetworkGateway>,
    /// The one that a workload names: the first that is healthy, or the first of all.
    first: Option<GatewayAddress>,
}

/// In which networks the endpoints of an object are.
#[derive(Debug, Default)]
pub(crate) struct Places {
    of: BTreeMap<ObjectKey, BTreeSet<Arc<str>>>,
    members: BTreeMap<Arc<str>, BTreeSet<ObjectKey>>,
    /// Home networks of this registry's own objects, and how many objects each has.
    own: BTreeMap<Arc<str>, usize>,
}

impl Places {
    /// Replaces the networks of an object. True if this registry's own networks are others by it.
    fn set(&mut self, key: &ObjectKey, networks: BTreeSet<Arc<str>>) -> bool {
        let old = self.of.remove(key).unwrap_or_default();
        if old == networks {
            if !old.is_empty() {
                self.of.insert(key.clone(), old);
            }
            return false;
        }
        for network in &old {
            if let Some(members) = self.members.get_mut(network) {
                members.remove(key);
                if members.is_empty() {
                    self.members.remove(network);
                }
            }
        }
        for network in &networks {
            self.members
                .entry(network.clone())
                .or_default()
                .insert(key.clone());
        }
        let changed = imported_host(key).is_none() && self.count(&old, &networks);
        if !networks.is_empty() {
            self.of.insert(key.clone(), networks);
        }
        changed
    }

    fn count(&mut self, old: &BTreeSet<Arc<str>>, new: &BTreeSet<Arc<str>>) -> bool {
        let before = self.own.len();
        let mut first = false;
        for network in new {
            let count = self.own.entry(networks::home_of(network).into()).or_default();
            first |= *count == 0;
            *count += 1;
        }
        for network in old {
            let home = networks::home_of(network);
            if let Some(count) = self.own.get_mut(home) {
                *count -= 1;
                if *count == 0 {
                    self.own.remove(home);
                }
            }
        }
        first || self.own.len() != before
    }

    /// True if this registry has members in another network than `local`.
    pub(crate) fn spans(&self, local: &str) -> bool {
        self.own.keys().any(|network| **network != *local)
    }

    pub(crate) fn of(&self, key: &ObjectKey) -> impl Iterator<Item = &Arc<str>> {
        self.of.get(key).into_iter().flatten()
    }

    /// True if an object has endpoints in another network than `local`.
    pub(crate) fn is_remote(&self, key: &ObjectKey, local: &str) -> bool {
        self.of(key).any(|network| **network != *local)
    }

    /// True if anything is in another network than `local`.
    pub(crate) fn any_remote(&self, local: &str) -> bool {
        self.members.keys().any(|network| **network != *local)
    }
}

impl Registry {
    /// Gateways of this registry, those that are lost too.
    pub fn gateways(&self) -> Vec<NetworkGateway> {
        let all = self.networks.values().flat_map(|state| &state.gateways);
        all.filter(|gateway| gateway.cluster == self.settings.cluster_id)
            .cloned()
            .collect()
    }

    /// True for an entry of a gateway: it has the identity of one, which only discovery gives out.
    pub(crate) fn is_gateway(&self, entry: &EntryState) -> bool {
        let SpiffeId {
            namespace,
            service_account,
            ..
        } = SpiffeId::gateway(self.settings.trust_domain.clone());
        entry.key.namespace == namespace && entry.object.spec.service_account == *service_account
    }

    /// True if the group of an entry says that its members only dial out. A gateway is there to be dialled.
    pub(crate) fn is_outbound_only(&self, entry: &EntryState) -> bool {
        let group = entry.group.as_ref().and_then(|name| {
            self.groups.get(&ObjectKey {
                kind: Kind::WorkloadGroup,
                namespace: entry.key.namespace.clone(),
                name: name.clone(),
            })
        });
        group.is_some_and(|group| GroupOptions::of(&group.metadata).outbound_only) && !self.is_gateway(entry)
    }

    /// Networks of this registry's own, where its services have their virtual addresses: discovery's first.
    pub(crate) fn own_networks(&self) -> impl Iterator<Item = &str> {
        let local = self.settings.network.as_str();
        let others = self.places.own.keys().map(|network| &**network);
        std::iter::once(local).chain(others.filter(move |network| *network != local))
    }

    /// Files an object under the networks of its endpoints. Each service has its addresses in every network of this
    /// registry's own, so the first member of one concerns them all, as does the last.
    pub(crate) fn set_places(&mut self, key: &ObjectKey, networks: BTreeSet<Arc<str>>) {
        if !self.places.set(key, networks) {
            return;
        }
        let services = self.services.keys().chain(self.imported.keys());
        let instances = self.entries.values().filter(|entry| !entry.instances.is_empty());
        let concerned = services.chain(instances.map(|entry| &entry.key));
        self.dirty.extend(concerned.cloned().map(Producer::Object));
    }

    /// True if services name the identity of an entry: a caller in another network than the entry's cannot know whom
    /// of a service's endpoints it will meet, and while the trust domain is renamed nobody knows under which name.
    pub(crate) fn is_named(&self, key: &ObjectKey) -> bool {
        let local = &self.settings.network;
        self.is_renamed() || self.places.is_remote(key, local) || self.places.spans(local)
    }

    /// The network that an endpoint is written for.
    pub(crate) fn home_network<'a>(&'a self, spec: &'a WorkloadEntrySpec) -> &'a str {
        if spec.network.is_empty() {
            &self.settings.network
        } else {
            &spec.network
        }
    }

    /// The gateway that workloads of a network name.
    pub(crate) fn network_gateway(&self, network: &str) -> Option<GatewayAddress> {
        self.networks.get(networks::home_of(network))?.first.clone()
    }

    /// Files an entry under its network, and the network's gateways anew if it is one.
    pub(crate) fn place_entry(&mut self, key: &ObjectKey) {
        let was_named = self.is_named(key);
        let mut touched: BTreeSet<Arc<str>> = self.places.of(key).cloned().collect();
        let was_gateway = self.gateway_entries.remove(key);
        let mut placed = BTreeSet::new();
        let mut labels = None;
        if let Some(entry) = self.entries.get(key) {
            let home = self.home_network(&entry.object.spec);
            let network: Arc<str> = if self.is_outbound_only(entry) {
                networks::outbound_of(home).into()
            } else {
                home.into()
            };
            placed.insert(network);
            labels = Some(entry.labels.clone());
            if self.is_gateway(entry) {
                self.gateway_entries.insert(key.clone());
            }
        }
        self.set_places(key, placed);
        if (was_named || self.is_named(key))
            && let Some(labels) = labels
        {
            self.mark_selecting(&key.namespace, &labels, true);
        }
        if was_gateway || self.gateway_entries.contains(key) {
            touched.extend(self.places.of(key).cloned());
            self.refresh_networks(touched);
        }
    }

    /// Finds the gateways of networks anew, and marks what names them.
    pub(crate) fn refresh_networks(&mut self, touched: BTreeSet<Arc<str>>) {
        for network in touched {
            let gateways = self.gateways_of(&network);
            let before = self.networks.remove(&network).unwrap_or_default();
            if before.gateways == gateways {
                if !gateways.is_empty() {
                    self.networks.insert(network, before);
                }
                continue;
            }
            self.dirty.insert(Producer::Network(network.clone()));
            let best = gateways.iter().find(|gateway| gateway.healthy);
            let first = best.or(gateways.first()).map(gateway_address);
            if before.first != first {
                for named in [network.clone(), networks::outbound_of(&network).into()] {
                    let members = self.places.members.get(&named).into_iter().flatten();
                    self.dirty.extend(members.cloned().map(Producer::Object));
                }
            }
            if !gateways.is_empty() {
                self.networks.insert(network, NetworkState { gateways, first });
            }
        }
    }

    /// Own ones, oldest first, then those of other clusters as they were said.
    fn gateways_of(&self, network: &str) -> Vec<NetworkGateway> {
        let own = self
            .gateway_entries
            .iter()
            .filter_map(|key| self.entries.get(key));
        let mut own: Vec<&EntryState> = own
            .filter(|entry| self.home_network(&entry.object.spec) == network)
            .collect();
        own.sort_by_key(|entry| (entry.created, &entry.key));
        let all = own.into_iter().flat_map(|entry| self.ways_of(entry));
        let mut gateways: Vec<NetworkGateway> = Vec::new();
        for gateway in all.chain(self.imported_gateways(network)) {
            let same = |known: &&mut NetworkGateway| {
                known.address == gateway.address && known.hbone_port == gateway.hbone_port
            };
            // Several behind one address are up while one is.
            match gateways.iter_mut().find(same) {
                Some(known) => known.healthy |= gateway.healthy,
                None => gateways.push(gateway),
            }
        }
        gateways
    }

    /// The addresses of a gateway that callers outside dial.
    fn ways_of(&self, entry: &EntryState) -> Vec<NetworkGateway> {
        let spec = &entry.object.spec;
        let written = |key: &str| {
            let annotation = entry.object.metadata.annotations.get(key);
            annotation.or_else(|| entry.labels.get(key)).map(String::as_str)
        };
        let written_addresses = written(annotation::GATEWAY_ADDRESS).filter(|text| !text.trim().is_empty());
        let addresses = written_addresses.unwrap_or(&spec.address).split(',');
        let quic = written(annotation::GATEWAY_QUIC_PORT).and_then(|text| text.trim().parse::<u16>().ok());
        let way = |(address, hbone_port)| NetworkGateway {
            network: self.home_network(spec).to_owned(),
            address,
            hbone_port,
            quic_port: quic.filter(|port| *port != 0),
            trust_domain: self.settings.trust_domain.clone(),
            namespace: entry.key.namespace.to_string(),
            service_account: spec.service_account.clone(),
            cluster: self.settings.cluster_id.clone(),
            locality: spec.locality.clone(),
            healthy: self.is_healthy(entry),
        };
        addresses.filter_map(host_and_port).map(way).collect()
    }

    /// Records of the gateways of a network, and the list of them.
    pub(crate) fn network_outputs(&self, network: &str) -> Vec<Output> {
        let Some(state) = self.networks.get(network) else {
            return Vec::new();
        };
        let mut outputs: Vec<Output> = state
            .gateways
            .iter()
            .map(|gateway| content::workload(record(gateway)))
            .collect();
        let list = |network: &str| {
            let gateways = state.gateways.iter().map(listed).collect();
            let message = NetworkGateways {
                network: network.to_owned(),
                gateways,
            };
            let name = networks::resource_name(network).to_owned();
            content::resource(type_url::NETWORK_GATEWAYS, name, &message)
        };
        outputs.push(list(network));
        // Only members of this registry are told apart by whether they can be dialled.
        let own = |gateway: &NetworkGateway| gateway.cluster == self.settings.cluster_id;
        if state.gateways.iter().any(own) {
            outputs.push(list(&networks::outbound_of(network)));
        }
        outputs
    }
}

fn uid(gateway: &NetworkGateway) -> String {
    let NetworkGateway {
        network,
        address,
        hbone_port,
        ..
    } = gateway;
    format!("NetworkGateway/{network}/{address}/{hbone_port}")
}

fn gateway_address(gateway: &NetworkGateway) -> GatewayAddress {
    let destination = match gateway.address.parse::<IpAddr>() {
        Ok(ip) => Destination::Address(NetworkAddress {
            network: gateway.network.clone(),
            address: ip_bytes(ip),
            length: None,
        }),
        Err(_) => Destination::Hostname(NamespacedHostname {
            namespace: gateway.namespace.clone(),
            hostname: gateway.address.clone(),
        }),
    };
    GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: gateway.hbone_port.into(),
    }
}

/// As ztunnel looks a gateway up: by address in its network, or by name.
fn record(gateway: &NetworkGateway) -> Workload {
    let (addresses, hostname) = match gateway.address.parse::<IpAddr>() {
        Ok(ip) => (vec![ip_bytes(ip)], String::new()),
        Err(_) => (Vec::new(), gateway.address.clone()),
    };
    let status = if gateway.healthy {
        WorkloadStatus::Healthy
    } else {
        WorkloadStatus::Unhealthy
    };
    Workload {
        uid: uid(gateway),
        name: gateway.service_account.clone(),
        namespace: gateway.namespace.clone(),
        service_account: gateway.service_account.clone(),
        trust_domain: gateway.trust_domain.to_string(),
        network: gateway.network.clone(),
        cluster_id: gateway.cluster.clone(),
        addresses,
        hostname,
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        native_tunnel: true,
        canonical_name: gateway.service_account.clone(),
        canonical_revision: "latest".to_owned(),
        workload_name: gateway.service_account.clone(),
        workload_type: WorkloadType::Pod.into(),
        locality: locality(&gateway.locality),
        status: status.into(),
        ..Workload::default()
    }
}

fn listed(gateway: &NetworkGateway) -> v1::NetworkGateway {
    let place = locality(&gateway.locality).unwrap_or_default();
    v1::NetworkGateway {
        address: gateway.address.clone(),
        hbone_port: gateway.hbone_port.into(),
        quic_port: gateway.quic_port.unwrap_or_default().into(),
        trust_domain: gateway.trust_domain.to_string(),
        namespace: gateway.namespace.clone(),
        service_account: gateway.service_account.clone(),
        cluster_id: gateway.cluster.clone(),
        region: place.region,
        zone: place.zone,
        subzone: place.subzone,
        healthy: gateway.healthy,
        uid: uid(gateway),
    }
}

/// `host[:port]`, 15008 by default. `None` for what is neither an address nor a name.
fn host_and_port(text: &str) -> Option<(String, u16)> {
    let text = text.trim();
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some((address.ip().to_string(), address.port()));
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some((ip.to_string(), ports::HBONE));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().ok()?),
        None => (text, ports::HBONE),
    };
    let name = host.parse::<Hostname>().ok().filter(|name| !name.is_wildcard());
    name.filter(|_| port != 0).map(|name| (name.to_string(), port))
}

/// True if that could be dialled.
pub(crate) fn is_host(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok() || text.parse::<Hostname>().is_ok_and(|name| !name.is_wildcard())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_a_gateway() {
        let table = [
            ("192.0.2.1", Some(("192.0.2.1", 15008))),
            (" 192.0.2.1:443 ", Some(("192.0.2.1", 443))),
            ("2001:db8::1", Some(("2001:db8::1", 15008))),
            ("[2001:db8::1]:443", Some(("2001:db8::1", 443))),
            ("GW.example.org:443", Some(("gw.example.org", 443))),
            ("gw.example.org", Some(("gw.example.org", 15008))),
            ("gw.example.org:0", None),
            ("gw.example.org:http", None),
            ("*.example.org:443", None),
            ("unix:/run/gw", None),
            ("", None),
        ];
        for (text, expected) in table {
            let found = host_and_port(text);
            let found = found.as_ref().map(|(host, port)| (host.as_str(), *port));
            assert_eq!(found, expected, "{text:?}");
        }
    }
}
