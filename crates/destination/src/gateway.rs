//! Ways into other networks.

use crate::{GatewayTarget, Index, Locality, Source, Workload};
use std::{fmt, net::IpAddr, sync::Arc};
use tombolo_types::{Hostname, SpiffeId, networks};

/// Where a gateway is dialled.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GatewayHost {
    /// By address.
    Address(IpAddr),
    /// By a name that the host's own resolver knows.
    Hostname(Hostname),
}

impl fmt::Display for GatewayHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(hostname) => hostname.fmt(f),
        }
    }
}

/// An east-west gateway: a way into a network for callers outside of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// Of its workload record.
    pub uid: Arc<str>,
    /// Where it is dialled.
    pub address: GatewayHost,
    /// HBONE over TCP.
    pub hbone_port: u16,
    /// QUIC, where it is served.
    pub quic_port: Option<u16>,
    /// Identities of which it must prove one.
    pub expected: Arc<[SpiffeId]>,
    /// Cluster that it belongs to.
    pub cluster: Arc<str>,
    /// Where it stands.
    pub locality: Locality,
    /// False: the control plane has lost it. It is tried when no other is left.
    pub healthy: bool,
    /// Distance from the source, 0 is nearest; 0 in an [`Index`], which knows no source.
    pub rank: u32,
}

/// How a candidate of another network is reached: through one of the network's gateways, which passes on a second,
/// inner connection to an endpoint of its choice.
///
/// Source: Istio's double HBONE between networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Via {
    /// The network that the gateways lead into.
    pub network: Arc<str>,
    /// Healthy ones first, nearest first; never empty. [`order_gateways`] says in which order to try them now.
    pub gateways: Arc<[Gateway]>,
    /// `hostname:port` of the service, for the outer and the inner CONNECT.
    pub authority: Arc<str>,
}

/// The order in which to try the gateways of a network now, as indices into [`Via::gateways`].
///
/// Healthy ones first, then by rank; among equals by connections (`outstanding`), ties by a draw from `seed`. Gateways
/// that `failed` a short while ago come last.
pub fn order_gateways(
    via: &Via,
    outstanding: &dyn Fn(&Gateway) -> u32,
    failed: &dyn Fn(&Gateway) -> bool,
    seed: u64,
) -> Vec<usize> {
    let mut keyed: Vec<_> = via
        .gateways
        .iter()
        .enumerate()
        .map(|(position, gateway)| {
            let key = (
                failed(gateway),
                !gateway.healthy,
                gateway.rank,
                outstanding(gateway),
                crate::order::draw(seed, position as u64, 1),
            );
            (key, position)
        })
        .collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, position)| position).collect()
}

/// The gateways that lead from `source` to a workload of another network; none if nothing leads there.
///
/// A control plane that does not list gateways (istiod) names one in the workload, whose record says who it is.
pub(crate) fn ways(index: &dyn Index, source: &Source, workload: &Workload) -> Arc<[Gateway]> {
    let mut listed = index.gateways(&workload.network);
    if listed.is_empty() {
        listed = index.gateways(networks::home_of(&workload.network));
    }
    let mut gateways: Vec<Gateway> = listed.to_vec();
    if gateways.is_empty() {
        gateways.extend(named(index, workload));
    }
    for gateway in &mut gateways {
        gateway.rank = 3 - shared(&source.locality, &gateway.locality);
    }
    gateways.sort_by_key(|gateway| (!gateway.healthy, gateway.rank));
    gateways.into()
}

fn named(index: &dyn Index, workload: &Workload) -> Option<Gateway> {
    let named = workload.gateway.as_ref()?;
    let GatewayTarget::Address(at) = &named.target else {
        return None;
    };
    let record = index.workload_by_address(at)?;
    Some(Gateway {
        uid: record.uid.clone(),
        address: GatewayHost::Address(at.address),
        hbone_port: named.hbone_port,
        quic_port: None,
        expected: record.expected().ok()?.clone(),
        cluster: record.cluster_id.clone(),
        locality: record.locality.clone(),
        healthy: record.healthy,
        rank: 0,
    })
}

/// How many of region, zone and subzone two places share, the wider ones first. An unknown one is shared with nobody:
/// a cluster that says nothing about its place is not nearer than one that does.
pub(crate) fn shared(ours: &Locality, theirs: &Locality) -> u32 {
    let pairs = [
        (&ours.region, &theirs.region),
        (&ours.zone, &theirs.zone),
        (&ours.subzone, &theirs.subzone),
    ];
    let same = |(ours, theirs): &(&Arc<str>, &Arc<str>)| !ours.is_empty() && ours == theirs;
    pairs.into_iter().take_while(same).map(|_| 1).sum()
}
