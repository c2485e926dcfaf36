//! Gateways: the one way into the reserved namespace of the mesh's own.
//!
//! Their WorkloadGroups and tokens are written by discovery itself, at the word of a mesh-admin; nothing else gets past
//! the rule that nobody makes identities there.

use super::Context;
use crate::{address::may_be_claimed, objects::ObjectError, refusal::Refusal};
use std::net::{IpAddr, SocketAddr};
use tombolo_config::{
    GroupOptions, Kind, Metadata, Object, Resource, WorkloadEntrySpec, WorkloadGroupSpec, annotation,
};
use tombolo_proto::tombolo::v1 as pb;
use tombolo_types::{AddressPlan, Hostname, SpiffeId, TrustDomain, ports};

/// Addresses that one gateway may be reached at.
const ADDRESSES_MAX: usize = 8;
/// Gateways that a host is told beside discovery itself: a token holds eight endpoints.
const ENDPOINTS_MAX: usize = 5;

/// The namespace and service account of gateways.
fn identity(trust_domain: &TrustDomain) -> SpiffeId {
    SpiffeId::gateway(trust_domain.clone())
}

/// The WorkloadGroup of the gateways of a network: `gateway`, or `gateway-<network>`.
pub(crate) fn group_of(trust_domain: &TrustDomain, network: &str) -> Object<WorkloadGroupSpec> {
    let id = identity(trust_domain);
    let name = if network.is_empty() {
        "gateway".to_owned()
    } else {
        format!("gateway-{network}")
    };
    let mut spec = WorkloadGroupSpec::default();
    spec.template.service_account = id.service_account.to_string();
    spec.template.network = network.to_owned();
    Object::<WorkloadGroupSpec>::new(Metadata::named(&*id.namespace, name), spec)
}

/// True for the identity of gateways.
pub(super) fn is_gateway(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> bool {
    let id = identity(trust_domain);
    (&*id.namespace, &*id.service_account) == (namespace, service_account)
}

/// True for a group that [`group_of`] makes.
pub(super) fn is_gateway_group(trust_domain: &TrustDomain, group: &Object<WorkloadGroupSpec>) -> bool {
    let made = group_of(trust_domain, &group.spec.template.network);
    (&group.metadata.namespace, &group.metadata.name) == (&made.metadata.namespace, &made.metadata.name)
        && group.spec.template.service_account == made.spec.template.service_account
}

/// A token of gateways is for gateways, and no other one is.
pub(super) fn check_purpose(
    is_gateway_group: bool,
    claims: Option<&pb::GatewayClaims>,
    group: &str,
) -> Result<(), Refusal> {
    match (is_gateway_group, claims) {
        (true, None) => Err(Refusal::precondition(
            "this token makes gateways. Next: tombolo-gateway join on the host of the gateway",
        )),
        (false, Some(_)) => Err(Refusal::precondition(format_args!(
            "this token is for members of {group}. Next: tombolo token create --gateway"
        ))),
        (true, Some(_)) | (false, None) => Ok(()),
    }
}

/// Writes where a gateway says that it is reached into its entry. True if that has changed it.
pub(super) fn claim(
    entry: &mut Object<WorkloadEntrySpec>,
    claims: &pb::GatewayClaims,
    plan: &AddressPlan,
) -> Result<bool, Refusal> {
    if claims.addresses.len() > ADDRESSES_MAX {
        return Err(Refusal::invalid(format_args!(
            "a gateway has at most {ADDRESSES_MAX} addresses"
        )));
    }
    for address in &claims.addresses {
        if !may_be_advertised(address, plan) {
            let shown: String = address.chars().take(300).collect();
            return Err(Refusal::invalid(format_args!(
                "{shown:?} is no HOST:PORT that others can dial"
            )));
        }
    }
    let quic = u16::try_from(claims.quic_port).map_err(|_| Refusal::invalid("no such port of QUIC"))?;
    let before = entry.metadata.annotations.clone();
    let annotations = &mut entry.metadata.annotations;
    let mut put = |key: &str, value: Option<String>| match value {
        Some(value) => drop(annotations.insert(key.to_owned(), value)),
        None => drop(annotations.remove(key)),
    };
    let addresses = claims.addresses.join(",");
    put(
        annotation::GATEWAY_ADDRESS,
        (!addresses.is_empty()).then_some(addresses),
    );
    put(
        annotation::GATEWAY_QUIC_PORT,
        (quic != 0).then(|| quic.to_string()),
    );
    Ok(before != entry.metadata.annotations)
}

fn may_be_advertised(text: &str, plan: &AddressPlan) -> bool {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return address.port() != 0 && may_be_claimed(address.ip(), plan);
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let name = host.parse::<Hostname>().is_ok_and(|name| !name.is_wildcard());
    // A single label is the host's own affair, and a number is an address that was written wrongly.
    name && host.contains('.')
        && host.parse::<IpAddr>().is_err()
        && port.parse::<u16>().is_ok_and(|port| port != 0)
}

/// Where discovery is reached from a place in the mesh.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// Its network.
    pub(crate) network: &'a str,
    /// It only dials out: gateways come first.
    pub(crate) outbound_only: bool,
    /// It is a gateway itself: it never dials another one of its network, nor one of discovery's network a further one,
    /// so that no connection goes in a circle.
    pub(crate) gateway: bool,
}

impl Context {
    /// `host:port` of discovery for a member, in order of preference: its own addresses, and the gateways of the
    /// member's network and of discovery's.
    pub(crate) async fn endpoints_for(&self, place: Place<'_>) -> Result<Vec<String>, ObjectError> {
        let through = self.gateway_endpoints(place).await?;
        let own = self.endpoints.clone();
        let (first, then) = if place.outbound_only {
            (through, own)
        } else {
            (own, through)
        };
        let mut all: Vec<String> = Vec::new();
        for endpoint in first.into_iter().chain(then) {
            if !all.contains(&endpoint) {
                all.push(endpoint);
            }
        }
        Ok(all)
    }

    /// Gateways through which a member reaches discovery.
    pub(crate) async fn gateway_endpoints(&self, place: Place<'_>) -> Result<Vec<String>, ObjectError> {
        let id = identity(&self.settings.trust_domain);
        let (entries, _) = self
            .objects
            .list(Some(Kind::WorkloadEntry), Some(&id.namespace))
            .await?;
        let here = self.settings.network.as_str();
        let home = |network: &str| {
            if network.is_empty() {
                here.to_owned()
            } else {
                network.to_owned()
            }
        };
        let member = home(place.network);
        let mut found: Vec<(bool, String)> = Vec::new();
        for entry in &entries {
            let Resource::WorkloadEntry(entry) = entry else {
                continue;
            };
            if *entry.spec.service_account != *id.service_account {
                continue;
            }
            let network = home(&entry.spec.network);
            let leads = if place.gateway {
                network == here && member != here
            } else {
                network == here || network == member
            };
            if leads {
                found.extend(
                    addresses(entry)
                        .into_iter()
                        .map(|address| (network != member, address)),
                );
            }
        }
        found.sort_by_key(|(far, _)| *far); // stable: as they were listed
        Ok(found
            .into_iter()
            .map(|(_, address)| address)
            .take(ENDPOINTS_MAX)
            .collect())
    }
}

fn addresses(entry: &Object<WorkloadEntrySpec>) -> Vec<String> {
    match entry.metadata.annotations.get(annotation::GATEWAY_ADDRESS) {
        Some(text) => text.split(',').map(str::to_owned).collect(),
        None => entry
            .spec
            .address
            .parse::<IpAddr>()
            .map(|ip| SocketAddr::new(ip, ports::HBONE).to_string())
            .into_iter()
            .collect(),
    }
}

/// True for a group whose members only dial out.
pub(crate) fn is_outbound_only(group: &Object<WorkloadGroupSpec>) -> bool {
    GroupOptions::of(&group.metadata).outbound_only
}

#[cfg(test)]
mod tests {
    use super::*;

    fn td() -> TrustDomain {
        "mesh.example".parse().unwrap()
    }

    #[test]
    fn only_groups_that_discovery_makes_are_of_gateways() {
        for network in ["", "lan"] {
            assert!(is_gateway_group(&td(), &group_of(&td(), network)), "{network}");
        }
        let spoiled = |edit: fn(&mut Object<WorkloadGroupSpec>)| {
            let mut group = group_of(&td(), "lan");
            edit(&mut group);
            is_gateway_group(&td(), &group)
        };
        assert!(!spoiled(|group| group.metadata.namespace = "shop".into()));
        assert!(!spoiled(|group| group.metadata.namespace = "istio-system".into()));
        assert!(!spoiled(|group| group.metadata.name = "gateway".into()));
        assert!(!spoiled(
            |group| group.spec.template.service_account = "discovery".into()
        ));
        assert!(!spoiled(|group| group.spec.template.network = "other".into()));
    }

    #[test]
    fn a_token_is_for_what_it_was_made_for() {
        let claims = pb::GatewayClaims::default();
        assert!(check_purpose(true, Some(&claims), "g").is_ok());
        assert!(check_purpose(false, None, "g").is_ok());
        assert!(check_purpose(true, None, "g").is_err());
        assert!(check_purpose(false, Some(&claims), "g").is_err());
    }

    #[test]
    fn what_a_gateway_may_say_of_itself() {
        let plan = AddressPlan::default();
        for (address, ok) in [
            ("gw.example.com:443", true),
            ("192.0.2.7:443", true),
            ("[2001:db8::1]:443", true),
            ("gw.example.com", false),
            ("gw.example.com:0", false),
            ("gateway:443", false),
            ("*.example.com:443", false),
            ("127.0.0.1:443", false),
            ("[::1]:443", false),
            ("169.254.1.1:443", false),
            ("240.240.0.1:443", false),
            ("2001:db8::1:443", false),
            ("a,b.example:443", false),
            (":443", false),
        ] {
            assert_eq!(may_be_advertised(address, &plan), ok, "{address}");
        }
        let mut entry = Object::<WorkloadEntrySpec>::new(
            Metadata::named("tombolo-system", "g"),
            WorkloadEntrySpec::default(),
        );
        let claims = pb::GatewayClaims {
            addresses: vec!["gw.example.com:443".into(), "192.0.2.7:443".into()],
            quic_port: 443,
        };
        assert!(claim(&mut entry, &claims, &plan).unwrap());
        assert!(!claim(&mut entry, &claims, &plan).unwrap(), "the same again");
        let said = |key: &str| entry.metadata.annotations.get(key).cloned();
        assert_eq!(
            said(annotation::GATEWAY_ADDRESS).as_deref(),
            Some("gw.example.com:443,192.0.2.7:443")
        );
        assert_eq!(said(annotation::GATEWAY_QUIC_PORT).as_deref(), Some("443"));
        let wrong = pb::GatewayClaims {
            quic_port: 70_000,
            ..claims.clone()
        };
        assert!(claim(&mut entry, &wrong, &plan).is_err());
        assert!(claim(&mut entry, &pb::GatewayClaims::default(), &plan).unwrap());
        assert!(entry.metadata.annotations.is_empty());
    }
}
