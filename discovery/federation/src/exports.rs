use crate::{
    Member, Refusal,
    limits::{GATEWAYS_MAX, PORTS_MAX, PRESENCES_MAX, SUBJECT_ALT_NAMES_MAX},
};
use imbl::OrdMap;
use std::{collections::BTreeSet, fmt, net::IpAddr, sync::Arc};
use tombolo_proto::tombolo::federation::v1 as pb;
use tombolo_types::{Code, SpiffeId, check_label, reserved_namespace};

/// Name of a service within a cluster; with the mesh domain of whoever reads it, its host name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// Namespace, a DNS label.
    pub namespace: Arc<str>,
    /// Name, a DNS label.
    pub name: Arc<str>,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.name, self.namespace)
    }
}

/// Where something is; parts may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Subzone.
    pub subzone: Arc<str>,
}

/// A port of an exported service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExportedPort {
    /// Service port.
    pub port: u16,
    /// As ServiceEntry writes it, for example `HTTP`.
    pub protocol: Arc<str>,
    /// Name of the port; may be empty.
    pub name: Arc<str>,
}

/// The endpoints of a service in one network and locality, counted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Presence {
    /// Network, as the exporting cluster names it; may be empty.
    pub network: Arc<str>,
    /// Locality.
    pub locality: Locality,
    /// Healthy endpoints; 0: there are endpoints, and none is healthy.
    pub healthy: u32,
    /// Sum of the weights of the healthy ones.
    pub capacity: u32,
}

/// A service that a cluster offers to the others.
///
/// **Invariant:** lists are sorted and without repetition, within their bounds; [`Self::checked`] makes it so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedService {
    /// Name.
    pub name: ServiceName,
    /// Ports, by number.
    pub ports: Vec<ExportedPort>,
    /// Identities of the endpoints.
    pub subject_alt_names: Vec<SpiffeId>,
    /// Where the endpoints are.
    pub presences: Vec<Presence>,
}

/// A healthy gateway of a network. It must prove the gateway identity of the exporting cluster's trust domain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExportedGateway {
    /// Network it leads into, as the exporting cluster names it; may be empty.
    pub network: Arc<str>,
    /// IP address or DNS name.
    pub address: Arc<str>,
    /// HBONE over TCP.
    pub hbone_port: u16,
    /// QUIC; `None`: not served.
    pub quic_port: Option<u16>,
    /// Locality.
    pub locality: Locality,
}

/// All services of a cluster that others may see.
pub type Services = OrdMap<ServiceName, Arc<ExportedService>>;

/// What a cluster offers to the others. Cheap to clone: the maps are persistent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exports {
    /// Services.
    pub services: Services,
    /// Gateways.
    pub gateways: Arc<[ExportedGateway]>,
    /// Mesh domain of the exporting cluster; empty: not said, the same as the reader's.
    pub mesh_domain: Arc<str>,
}

fn invalid(cause: impl fmt::Display) -> Refusal {
    Refusal::new(Code::ExportInvalid, cause)
}

/// Networks and localities are free names; what would break the names made of them is not.
fn check_word(what: &str, value: &str) -> Result<(), Refusal> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '~' | ':');
    if value.len() > 128 || !value.chars().all(ok) {
        return Err(invalid(format!("{what} {value:?}")));
    }
    Ok(())
}

impl Locality {
    fn check(&self) -> Result<(), Refusal> {
        check_word("region", &self.region)?;
        check_word("zone", &self.zone)?;
        check_word("subzone", &self.subzone)
    }
}

impl ExportedService {
    /// Sorts the lists and checks everything that does not depend on who exports it.
    ///
    /// # Errors
    /// [`Code::ExportInvalid`] or [`Code::ExportTooLarge`], naming the service.
    pub fn checked(mut self) -> Result<Self, Refusal> {
        check_label("namespace", &self.name.namespace).map_err(invalid)?;
        check_label("service", &self.name.name).map_err(invalid)?;
        let name = &self.name;
        for (what, count, max) in [
            ("ports", self.ports.len(), PORTS_MAX),
            ("identities", self.subject_alt_names.len(), SUBJECT_ALT_NAMES_MAX),
            ("localities", self.presences.len(), PRESENCES_MAX),
        ] {
            if count > max {
                return Err(Refusal::new(
                    Code::ExportTooLarge,
                    format!("{name} has {count} {what}, {max} are allowed"),
                ));
            }
        }
        self.ports.sort();
        self.subject_alt_names.sort_by_cached_key(ToString::to_string);
        self.presences.sort();
        for port in &self.ports {
            check_word("protocol", &port.protocol)?;
            check_word("port name", &port.name)?;
            if port.port == 0 {
                return Err(invalid(format!("{name}: port 0")));
            }
        }
        for presence in &self.presences {
            check_word("network", &presence.network)?;
            presence.locality.check()?;
        }
        let twice = self.ports.windows(2).any(|w| w[0].port == w[1].port)
            || self.subject_alt_names.windows(2).any(|w| w[0] == w[1])
            || self
                .presences
                .windows(2)
                .any(|w| (&w[0].network, &w[0].locality) == (&w[1].network, &w[1].locality));
        if twice {
            return Err(invalid(format!("{name}: something is there twice")));
        }
        Ok(self)
    }

    /// Checks it against what its exporter may say.
    pub(crate) fn check_exporter(&self, exporter: &Member) -> Result<(), Refusal> {
        if !exporter.record.namespaces.allows(&self.name.namespace) {
            return Err(Refusal::new(Code::ExportOutsideGrant, &self.name));
        }
        let foreign =
            |id: &&SpiffeId| !exporter.has_name(&id.trust_domain) || reserved_namespace(&id.namespace);
        if let Some(id) = self.subject_alt_names.iter().find(foreign) {
            return Err(Refusal::new(
                Code::ExportForeignIdentity,
                format!("{} with {id}", self.name),
            ));
        }
        Ok(())
    }

    pub(crate) fn to_proto(&self) -> pb::ExportedService {
        pb::ExportedService {
            namespace: self.name.namespace.to_string(),
            name: self.name.name.to_string(),
            ports: self
                .ports
                .iter()
                .map(|port| pb::ExportedPort {
                    port: port.port.into(),
                    protocol: port.protocol.to_string(),
                    name: port.name.to_string(),
                })
                .collect(),
            subject_alt_names: self.subject_alt_names.iter().map(ToString::to_string).collect(),
            presences: self
                .presences
                .iter()
                .map(|presence| pb::Presence {
                    network: presence.network.to_string(),
                    region: presence.locality.region.to_string(),
                    zone: presence.locality.zone.to_string(),
                    subzone: presence.locality.subzone.to_string(),
                    healthy: presence.healthy,
                    capacity: presence.capacity,
                })
                .collect(),
        }
    }

    /// Reads and checks what a peer sent.
    pub(crate) fn from_proto(message: pb::ExportedService) -> Result<Self, Refusal> {
        let port = |port: pb::ExportedPort| {
            Ok(ExportedPort {
                port: u16::try_from(port.port).map_err(invalid)?,
                protocol: port.protocol.into(),
                name: port.name.into(),
            })
        };
        let id = |id: &String| id.parse::<SpiffeId>().map_err(invalid);
        // The bounds once more, before anything is built from the lists.
        if message.ports.len() > PORTS_MAX
            || message.subject_alt_names.len() > SUBJECT_ALT_NAMES_MAX
            || message.presences.len() > PRESENCES_MAX
        {
            return Err(Refusal::new(Code::ExportTooLarge, &message.name));
        }
        Self {
            name: ServiceName {
                namespace: message.namespace.into(),
                name: message.name.into(),
            },
            ports: message
                .ports
                .into_iter()
                .map(port)
                .collect::<Result<_, Refusal>>()?,
            subject_alt_names: message
                .subject_alt_names
                .iter()
                .map(id)
                .collect::<Result<_, _>>()?,
            presences: message
                .presences
                .into_iter()
                .map(|presence| Presence {
                    network: presence.network.into(),
                    locality: Locality {
                        region: presence.region.into(),
                        zone: presence.zone.into(),
                        subzone: presence.subzone.into(),
                    },
                    healthy: presence.healthy,
                    capacity: presence.capacity,
                })
                .collect(),
        }
        .checked()
    }
}

impl ExportedGateway {
    fn check(&self) -> Result<(), Refusal> {
        check_word("network", &self.network)?;
        self.locality.check()?;
        let host = match self.address.parse::<IpAddr>() {
            Ok(ip) => is_elsewhere(ip),
            Err(_) => is_name(&self.address) && self.address.rsplit('.').next() != Some("localhost"),
        };
        if !host || self.hbone_port == 0 {
            return Err(invalid(format!("gateway {:?}:{}", self.address, self.hbone_port)));
        }
        Ok(())
    }

    pub(crate) fn to_proto(&self) -> pb::ExportedGateway {
        pb::ExportedGateway {
            network: self.network.to_string(),
            address: self.address.to_string(),
            hbone_port: self.hbone_port.into(),
            quic_port: self.quic_port.unwrap_or(0).into(),
            region: self.locality.region.to_string(),
            zone: self.locality.zone.to_string(),
            subzone: self.locality.subzone.to_string(),
        }
    }

    fn from_proto(message: pb::ExportedGateway) -> Result<Self, Refusal> {
        let quic_port = u16::try_from(message.quic_port).map_err(invalid)?;
        Ok(Self {
            network: message.network.into(),
            address: message.address.into(),
            hbone_port: u16::try_from(message.hbone_port).map_err(invalid)?,
            quic_port: (quic_port != 0).then_some(quic_port),
            locality: Locality {
                region: message.region.into(),
                zone: message.zone.into(),
                subzone: message.subzone.into(),
            },
        })
    }
}

fn is_name(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(|label| check_label("host", label).is_ok())
}

/// A mesh domain that somebody else says: a name of at least two labels.
pub(crate) fn check_mesh_domain(text: &str) -> Result<(), Refusal> {
    if is_name(text) && text.contains('.') {
        Ok(())
    } else {
        Err(invalid(format!("mesh domain {text:?}")))
    }
}

/// Whoever dials what another cluster names must not reach its own host, its link, or the mesh's virtual addresses.
fn is_elsewhere(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(v4) => {
            !(v4.is_loopback() || v4.is_link_local() || v4.is_multicast())
                && v4.octets()[0] != 0
                && v4.octets()[0] < 240
        }
        IpAddr::V6(v6) => {
            !(v6.is_loopback() || v6.is_unspecified() || v6.is_multicast() || v6.is_unicast_link_local())
                && v6.segments()[..3] != [0x2001, 2, 0]
        }
    }
}

/// Sorts and checks a list of gateways; those that are not valid are left out and named.
pub(crate) fn check_gateways(gateways: Vec<ExportedGateway>) -> (Arc<[ExportedGateway]>, Vec<Refusal>) {
    let mut refused = Vec::new();
    let mut kept: BTreeSet<ExportedGateway> = BTreeSet::new();
    for gateway in gateways {
        match gateway.check() {
            Ok(()) if kept.len() < GATEWAYS_MAX => drop(kept.insert(gateway)),
            Ok(()) => refused.push(Refusal::new(
                Code::ExportTooLarge,
                format!("over {GATEWAYS_MAX} gateways"),
            )),
            Err(refusal) => refused.push(refusal),
        }
    }
    (kept.into_iter().collect(), refused)
}

pub(crate) fn gateways_from_proto(list: Vec<pb::ExportedGateway>) -> (Arc<[ExportedGateway]>, Vec<Refusal>) {
    let mut gateways = Vec::new();
    let mut refused = Vec::new();
    let over = list.len() > GATEWAYS_MAX;
    for gateway in list.into_iter().take(GATEWAYS_MAX) {
        match ExportedGateway::from_proto(gateway) {
            Ok(gateway) => gateways.push(gateway),
            Err(refusal) => refused.push(refusal),
        }
    }
    if over {
        refused.push(Refusal::new(
            Code::ExportTooLarge,
            format!("over {GATEWAYS_MAX} gateways"),
        ));
    }
    let (gateways, more) = check_gateways(gateways);
    refused.extend(more);
    (gateways, refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_are_elsewhere() {
        let gateway = |address: &str| ExportedGateway {
            network: "".into(),
            address: address.into(),
            hbone_port: 15008,
            quic_port: None,
            locality: Locality::default(),
        };
        for address in ["198.51.100.1", "10.0.0.1", "2001:db8::1", "gw.east.example", "gw"] {
            assert!(gateway(address).check().is_ok(), "{address}");
        }
        for address in [
            "127.0.0.1",
            "0.0.0.0",
            "169.254.169.254",
            "224.0.0.1",
            "240.240.0.7",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "fe80::1",
            "ff02::1",
            "2001:2::7",
            "localhost",
            "x.localhost",
            "",
            "a b",
            "a..b",
        ] {
            assert!(gateway(address).check().is_err(), "{address}");
        }
    }

    #[test]
    fn mesh_domains_of_others() {
        for (text, good) in [
            ("mesh.internal", true),
            ("cluster.local", true),
            ("internal", false),
            ("", false),
            ("a b.c", false),
            ("x..y", false),
            ("mesh.internal:80", false),
        ] {
            assert_eq!(check_mesh_domain(text).is_ok(), good, "{text}");
        }
    }
}
