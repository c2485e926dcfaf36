//! From the control plane's messages to typed records. Whatever is refused here is refused alone.

use crate::mix;
use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};
use tombolo_authz::{
    Action, Clause, Match, Policy, Rule, Scope as PolicyScope, ServiceAccountMatch, StringMatch,
};
use tombolo_destination::{
    AppProtocol, Gateway, GatewayAddress, GatewayHost, GatewayTarget, IpFamilies, LoadBalancing, Locality,
    Mode, PortMap, Scope, Service, Tunnel, Visibility, Workload,
};
use tombolo_proto::{
    istio::{security, workload as wds},
    tombolo::v1,
};
use tombolo_types::{Hostname, NamespacedName, NetworkAddress, SpiffeId, TrustDomain, ports};

type Refused<T> = Result<T, String>;

/// Shares equal texts among the records of one response: thousands of workloads have the same namespace, network,
/// zone and services.
#[derive(Default)]
pub(crate) struct Interner {
    empty: Arc<str>,
    texts: HashSet<Arc<str>, mix::State>,
    names: HashMap<Box<str>, NamespacedName, mix::State>,
    trust_domains: HashMap<Box<str>, TrustDomain, mix::State>,
}

impl Interner {
    fn text(&mut self, text: &str) -> Arc<str> {
        if text.is_empty() {
            return self.empty.clone();
        }
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.texts.insert(new.clone());
        new
    }

    fn name(&mut self, what: &str, text: &str) -> Refused<NamespacedName> {
        if let Some(known) = self.names.get(text) {
            return Ok(known.clone());
        }
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| format!("{what} {text:?} has no \"/\""))?;
        let new = NamespacedName::new(self.text(namespace), self.text(name));
        self.names.insert(text.into(), new.clone());
        Ok(new)
    }

    fn trust_domain(&mut self, text: &str) -> Refused<TrustDomain> {
        // Istio leaves out its default.
        let text = if text.is_empty() { "cluster.local" } else { text };
        if let Some(known) = self.trust_domains.get(text) {
            return Ok(known.clone());
        }
        let new: TrustDomain = text.parse().map_err(|error| format!("{error}"))?;
        self.trust_domains.insert(text.into(), new.clone());
        Ok(new)
    }
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn address(bytes: &[u8]) -> Refused<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => Ok(Ipv6Addr::from(v6).into()),
        Err(_) => Err(format!("has an address of {} bytes", bytes.len())),
    }
}

fn unknown(what: &str, value: impl fmt::Display) -> String {
    format!("has an unknown {what} {value}")
}

fn port_number(what: &str, port: u32) -> Refused<u16> {
    u16::try_from(port).map_err(|_| format!("has the {what} {port}"))
}

fn port_map(port: &wds::Port) -> Refused<PortMap> {
    use wds::AppProtocol as Wire;
    let app_protocol = match Wire::try_from(port.app_protocol) {
        Ok(Wire::Unknown) => AppProtocol::Unknown,
        Ok(Wire::Http11) => AppProtocol::Http11,
        Ok(Wire::Http2) => AppProtocol::Http2,
        Ok(Wire::Grpc) => AppProtocol::Grpc,
        Ok(Wire::Tcp) => AppProtocol::Tcp,
        Ok(Wire::Tls) => AppProtocol::Tls,
        Err(_) => return Err(unknown("application protocol", port.app_protocol)),
    };
    Ok(PortMap {
        service_port: port_number("service port", port.service_port)?,
        target_port: port_number("target port", port.target_port)?,
        app_protocol,
    })
}

fn gateway(
    interner: &mut Interner,
    gateway: Option<&wds::GatewayAddress>,
) -> Refused<Option<GatewayAddress>> {
    use wds::gateway_address::Destination;
    let Some(gateway) = gateway else { return Ok(None) };
    let target = match &gateway.destination {
        Some(Destination::Hostname(name)) => GatewayTarget::Hostname(NamespacedName::new(
            interner.text(&name.namespace),
            interner.text(&name.hostname),
        )),
        Some(Destination::Address(at)) => GatewayTarget::Address(NetworkAddress {
            network: interner.text(&at.network),
            address: address(&at.address)?,
        }),
        None => return Err("has a gateway without destination".to_owned()),
    };
    let hbone_port = match port_number("gateway port", gateway.hbone_mtls_port)? {
        0 => ports::HBONE,
        port => port,
    };
    Ok(Some(GatewayAddress { target, hbone_port }))
}

/// A way into a network.
pub(crate) fn network_gateway(interner: &mut Interner, wire: &v1::NetworkGateway) -> Refused<Gateway> {
    let address = match wire.address.parse::<IpAddr>() {
        Ok(address) => GatewayHost::Address(address),
        Err(_) => GatewayHost::Hostname(wire.address.parse().map_err(|error| format!("{error}"))?),
    };
    let trust_domain = interner.trust_domain(&wire.trust_domain)?;
    let id = SpiffeId::new(trust_domain, &wire.namespace, &wire.service_account);
    Ok(Gateway {
        uid: wire.uid.as_str().into(),
        address,
        hbone_port: match port_number("gateway port", wire.hbone_port)? {
            0 => ports::HBONE,
            port => port,
        },
        quic_port: Some(port_number("gateway port", wire.quic_port)?).filter(|&port| port != 0),
        expected: Arc::new([id.map_err(|error| error.to_string())?]),
        cluster: interner.text(or(&wire.cluster_id, "Kubernetes")),
        locality: Locality {
            region: interner.text(&wire.region),
            zone: interner.text(&wire.zone),
            subzone: interner.text(&wire.subzone),
        },
        healthy: wire.healthy,
        rank: 0,
    })
}

/// A workload; its key is its uid.
pub(crate) fn workload(interner: &mut Interner, wire: &wds::Workload) -> Refused<Workload> {
    use wds::{TunnelProtocol, WorkloadStatus};
    if wire.uid.is_empty() {
        return Err("has no uid".to_owned());
    }
    let mut record = Workload::new(
        wire.uid.as_str(),
        interner.trust_domain(&wire.trust_domain)?,
        interner.text(&wire.namespace),
        interner.text(or(&wire.service_account, "default")),
    );
    record.name = wire.name.as_str().into();
    record.addresses = wire
        .addresses
        .iter()
        .map(|bytes| address(bytes))
        .collect::<Refused<_>>()?;
    record.network = interner.text(&wire.network);
    record.cluster_id = interner.text(or(&wire.cluster_id, "Kubernetes"));
    record.node = interner.text(&wire.node);
    record.hostname = interner.text(&wire.hostname);
    if let Some(locality) = &wire.locality {
        record.locality = Locality {
            region: interner.text(&locality.region),
            zone: interner.text(&locality.zone),
            subzone: interner.text(&locality.subzone),
        };
    }
    record.tunnel = match TunnelProtocol::try_from(wire.tunnel_protocol) {
        Ok(TunnelProtocol::None) => Tunnel::None,
        Ok(TunnelProtocol::Hbone) => Tunnel::Hbone,
        Ok(TunnelProtocol::LegacyIstioMtls) => return Err("wants the tunnel LEGACY_ISTIO_MTLS".to_owned()),
        Err(_) => return Err(unknown("tunnel protocol", wire.tunnel_protocol)),
    };
    record.healthy = match WorkloadStatus::try_from(wire.status) {
        Ok(status) => status == WorkloadStatus::Healthy,
        Err(_) => return Err(unknown("status", wire.status)),
    };
    wds::WorkloadType::try_from(wire.workload_type)
        .map_err(|_| unknown("workload type", wire.workload_type))?;
    wds::NetworkMode::try_from(wire.network_mode).map_err(|_| unknown("network mode", wire.network_mode))?;
    if let Some(tunnel) = &wire.application_tunnel {
        wds::application_tunnel::Protocol::try_from(tunnel.protocol)
            .map_err(|_| unknown("application tunnel", tunnel.protocol))?;
    }
    record.capacity = wire.capacity.unwrap_or(1);
    record.canonical_name = interner.text(&wire.canonical_name);
    record.canonical_revision = interner.text(&wire.canonical_revision);
    record.workload_name = interner.text(&wire.workload_name);
    for (key, list) in &wire.services {
        let ports = list.ports.iter().map(port_map).collect::<Refused<Vec<_>>>()?;
        record.services.insert(interner.name("service", key)?, ports);
    }
    for key in &wire.authorization_policies {
        record.policies.push(interner.name("policy", key)?);
    }
    record.gateway = gateway(interner, wire.network_gateway.as_ref())?;
    record.waypoint = gateway(interner, wire.waypoint.as_ref())?;
    Ok(record)
}

fn load_balancing(wire: Option<&wds::LoadBalancing>) -> Refused<LoadBalancing> {
    use wds::load_balancing::{HealthPolicy, Mode as WireMode, Scope as WireScope};
    let Some(wire) = wire else {
        return Ok(LoadBalancing::default());
    };
    let scope = |&value: &i32| match WireScope::try_from(value) {
        Ok(WireScope::Region) => Ok(Scope::Region),
        Ok(WireScope::Zone) => Ok(Scope::Zone),
        Ok(WireScope::Subzone) => Ok(Scope::Subzone),
        Ok(WireScope::Node) => Ok(Scope::Node),
        Ok(WireScope::Cluster) => Ok(Scope::Cluster),
        Ok(WireScope::Network) => Ok(Scope::Network),
        Ok(WireScope::UnspecifiedScope) | Err(_) => Err(unknown("routing scope", value)),
    };
    let mode = match WireMode::try_from(wire.mode) {
        Ok(WireMode::UnspecifiedMode) => Mode::Unspecified,
        Ok(WireMode::Strict) => Mode::Strict,
        Ok(WireMode::Failover) => Mode::Failover,
        Ok(WireMode::Passthrough) => Mode::Passthrough,
        Err(_) => return Err(unknown("load balancing mode", wire.mode)),
    };
    let allow_unhealthy = match HealthPolicy::try_from(wire.health_policy) {
        Ok(policy) => policy == HealthPolicy::AllowAll,
        Err(_) => return Err(unknown("health policy", wire.health_policy)),
    };
    Ok(LoadBalancing {
        scopes: wire
            .routing_preference
            .iter()
            .map(scope)
            .collect::<Refused<_>>()?,
        mode,
        allow_unhealthy,
    })
}

/// A service; its key is "namespace/hostname".
pub(crate) fn service(interner: &mut Interner, wire: &wds::Service) -> Refused<Service> {
    let hostname: Hostname = wire.hostname.parse().map_err(|error| format!("{error}"))?;
    let mut record = Service::new(interner.text(&wire.namespace), hostname);
    record.name = interner.text(&wire.name);
    for at in &wire.addresses {
        let (network, ip) = (interner.text(&at.network), address(&at.address)?);
        let full = if ip.is_ipv4() { 32 } else { 128 };
        match at.length.unwrap_or(full) {
            length if length == full => record.addresses.push(NetworkAddress { network, address: ip }),
            length => {
                let net = u8::try_from(length)
                    .ok()
                    .and_then(|length| ipnet::IpNet::new(ip, length).ok());
                record.prefixes.push((
                    network,
                    net.ok_or_else(|| format!("has an address of length {length}"))?,
                ));
            }
        }
    }
    record.ports = wire.ports.iter().map(port_map).collect::<Refused<_>>()?;
    // An identity that is none cannot be proved: leaving it out only makes the list stricter.
    record.subject_alt_names = wire
        .subject_alt_names
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect();
    record.load_balancing = load_balancing(wire.load_balancing.as_ref())?;
    record.canonical = wire.canonical;
    record.visibility = match wds::service::Visibility::try_from(wire.visibility) {
        Ok(wds::service::Visibility::Namespace) => Visibility::Namespace,
        Ok(wds::service::Visibility::Public) | Err(_) => Visibility::Public,
    };
    record.ip_families = match wds::IpFamilies::try_from(wire.ip_families) {
        Ok(wds::IpFamilies::Automatic) => IpFamilies::Automatic,
        Ok(wds::IpFamilies::Ipv4Only) => IpFamilies::V4Only,
        Ok(wds::IpFamilies::Ipv6Only) => IpFamilies::V6Only,
        Ok(wds::IpFamilies::Dual) => IpFamilies::Dual,
        Err(_) => return Err(unknown("set of IP families", wire.ip_families)),
    };
    record.waypoint = gateway(interner, wire.waypoint.as_ref())?;
    record.ingress_use_waypoint = wire.ingress_use_waypoint;
    for waypoint in &wire.weighted_waypoints {
        gateway(interner, waypoint.destination.as_ref())?;
    }
    Ok(record)
}

/// A policy. What cannot be read within it is marked, not refused: a policy that is left out would be weaker.
pub(crate) fn policy(wire: &security::Authorization) -> Refused<Policy> {
    let scope = match security::Scope::try_from(wire.scope) {
        Ok(security::Scope::Global) => PolicyScope::Global,
        Ok(security::Scope::Namespace) => PolicyScope::Namespace,
        Ok(security::Scope::WorkloadSelector) => PolicyScope::WorkloadSelector,
        Err(_) => return Err(unknown("scope", wire.scope)),
    };
    let action = match security::Action::try_from(wire.action) {
        Ok(security::Action::Allow) => Action::Allow,
        Ok(security::Action::Deny) => Action::Deny,
        Err(_) => return Err(unknown("action", wire.action)),
    };
    let clause = |wire: &security::Clause| Clause {
        matches: wire.matches.iter().map(policy_match).collect(),
    };
    let rules = wire
        .rules
        .iter()
        .map(|rule| Rule {
            clauses: rule.clauses.iter().map(clause).collect(),
        })
        .collect();
    let key = NamespacedName::new(wire.namespace.as_str(), wire.name.as_str());
    Ok(Policy {
        key,
        scope,
        action,
        dry_run: wire.dry_run,
        rules,
    })
}

fn policy_match(wire: &security::Match) -> Match {
    let mut unreadable = false;
    let mut strings = |wire: &[security::StringMatch]| readable(wire, &mut unreadable, string_match);
    let (namespaces, not_namespaces) = (strings(&wire.namespaces), strings(&wire.not_namespaces));
    let (principals, not_principals) = (strings(&wire.principals), strings(&wire.not_principals));
    let mut nets = |wire: &[security::Address]| readable(wire, &mut unreadable, network);
    let (source_ips, not_source_ips) = (nets(&wire.source_ips), nets(&wire.not_source_ips));
    let (destination_ips, not_destination_ips) =
        (nets(&wire.destination_ips), nets(&wire.not_destination_ips));
    let mut numbers = |wire: &[u32]| readable(wire, &mut unreadable, |&port| u16::try_from(port).ok());
    let (destination_ports, not_destination_ports) = (
        numbers(&wire.destination_ports),
        numbers(&wire.not_destination_ports),
    );
    let accounts = |wire: &[security::ServiceAccountMatch]| wire.iter().map(service_account).collect();
    Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
        service_accounts: accounts(&wire.service_accounts),
        not_service_accounts: accounts(&wire.not_service_accounts),
        unreadable,
    }
}

fn readable<W, T>(wire: &[W], unreadable: &mut bool, read: impl Fn(&W) -> Option<T>) -> Vec<T> {
    let values: Vec<T> = wire.iter().filter_map(read).collect();
    *unreadable |= values.len() != wire.len();
    values
}

fn string_match(wire: &security::StringMatch) -> Option<StringMatch> {
    use security::string_match::MatchType;
    Some(match wire.match_type.as_ref()? {
        MatchType::Exact(text) => StringMatch::Exact(text.as_str().into()),
        MatchType::Prefix(text) => StringMatch::Prefix(text.as_str().into()),
        MatchType::Suffix(text) => StringMatch::Suffix(text.as_str().into()),
        MatchType::Presence(()) => StringMatch::Presence,
    })
}

fn network(wire: &security::Address) -> Option<ipnet::IpNet> {
    ipnet::IpNet::new(address(&wire.address).ok()?, u8::try_from(wire.length).ok()?).ok()
}

fn service_account(wire: &security::ServiceAccountMatch) -> ServiceAccountMatch {
    ServiceAccountMatch {
        namespace: wire.namespace.as_str().into(),
        service_account: wire.service_account.as_str().into(),
    }
}
