use crate::{
    Gateway, LoadBalancing, Locality, Mode, PortMap, Scope, Service, Tunnel, Via, Visibility, Workload,
    gateway::{shared, ways},
};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};
use tombolo_types::{NamespacedName, NetworkAddress, Reject, RejectClass, SpiffeId, networks, ports};

/// Below this share of healthy capacity in the own network, percent, the nearest other network takes connections too,
/// as if it were as near: what is left here would otherwise get all of a load that was meant for many, and gets it back
/// bit by bit as endpoints return. The share is Envoy's default panic threshold.
const NEAR_HEALTHY_MIN_PERCENT: u64 = 50;

/// Finds records. One version of the world: answers do not change while it is borrowed.
pub trait Index {
    /// The service that a virtual address belongs to.
    fn service_by_address(&self, address: IpAddr) -> Option<&Arc<Service>>;
    /// A service by its key.
    fn service(&self, key: &NamespacedName) -> Option<&Arc<Service>>;
    /// The workload that holds an address in a network.
    fn workload_by_address(&self, address: &NetworkAddress) -> Option<&Arc<Workload>>;
    /// Calls `each` for every endpoint of a service, unhealthy ones too.
    fn endpoints(&self, key: &NamespacedName, each: &mut dyn FnMut(&Arc<Workload>));
    /// Ways into a network, in no order that means anything.
    fn gateways(&self, network: &str) -> &[Gateway];
}

/// Who dials: what ranks are measured from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Own network.
    pub network: Arc<str>,
    /// Own namespace.
    pub namespace: Arc<str>,
    /// Own cluster.
    pub cluster_id: Arc<str>,
    /// Own Kubernetes node; empty on a VM.
    pub node: Arc<str>,
    /// Own locality.
    pub locality: Locality,
}

/// An endpoint that a connection may go to.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Its record; with `via` the first by uid of those that it stands for.
    pub workload: Arc<Workload>,
    /// Address and target port: the authority of the CONNECT, or where plain TCP goes. With `via` it means nothing:
    /// `0.0.0.0` and the service port.
    pub address: SocketAddr,
    /// Where its HBONE server listens. With `via` it means nothing.
    pub hbone: SocketAddr,
    /// How it is reached, if it is in another network: then nothing but a gateway is dialled.
    pub via: Option<Via>,
    /// Identities of which the peer must prove one; shared, since most endpoints of a service have the same. With `via`
    /// the peer of the inner connection: the gateway proves its own ([`Gateway::expected`]).
    pub expected: Arc<[SpiffeId]>,
    /// Distance: 0 is nearest.
    pub rank: u32,
    /// Share of connections among equals, at least 1.
    pub weight: u32,
}

/// A service and the endpoints that may take a connection to one of its ports.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The service.
    pub service: Arc<Service>,
    /// Service port that was dialled.
    pub port: u16,
    /// Usable endpoints, best rank first; never empty.
    pub candidates: Vec<Candidate>,
}

/// Finds the service of a virtual address and its usable endpoints.
///
/// # Errors
/// `NoRoute` with `unknown_address` or `unknown_port`; `UpstreamUnhealthy` with `no_healthy_endpoint`, or with
/// `no_valid_destination` if the only healthy endpoints are in networks to which no gateway leads.
pub fn resolve(index: &dyn Index, source: &Source, vip: IpAddr, port: u16) -> Result<Destination, Reject> {
    let unknown = || Reject::new(RejectClass::NoRoute, "unknown_address").with_detail(vip);
    let service = index.service_by_address(vip).ok_or_else(unknown)?;
    if service.visibility == Visibility::Namespace && service.key.namespace != source.namespace {
        return Err(unknown());
    }
    resolve_service(index, source, service, port, vip.is_ipv4())
}

/// As [`resolve`] for a service that is known already, for example by its name.
///
/// Among the addresses of an endpoint the first of the wanted family is taken, else the first.
///
/// Without a wish of the service (mode unspecified) endpoints of the own network come first, all equal, then those of
/// other networks, nearest first by region, zone and subzone: a call leaves the network when nobody is left in it, or
/// when so few are that they would be flooded (`NEAR_HEALTHY_MIN_PERCENT`). ztunnel balances over all networks there;
/// a call that crosses a gateway for no reason is slower and costs money. With scopes, ranks are what they say, as in
/// ztunnel. Members of a network that only dial out are as near as those that can be dialled.
///
/// # Errors
/// As [`resolve`], except for `unknown_address`.
pub fn resolve_service(
    index: &dyn Index,
    source: &Source,
    service: &Arc<Service>,
    port: u16,
    want_ipv4: bool,
) -> Result<Destination, Reject> {
    let Some(ports) = service.port(port) else {
        let detail = format_args!("{} has no port {port}", service.hostname);
        return Err(Reject::new(RejectClass::NoRoute, "unknown_port").with_detail(detail));
    };
    let mut choice = Choice {
        index,
        source,
        service,
        ports,
        want_ipv4,
        scale: Scale::new(&service.load_balancing),
        candidates: Vec::new(),
        far: Vec::new(),
        near_capacity: 0,
        near_healthy: 0,
        last_expected: None,
        seen: 0,
        unhealthy: 0,
        elsewhere: 0,
    };
    index.endpoints(&service.key, &mut |workload| choice.consider(workload));
    choice.finish(port)
}

/// The candidate for one workload's own address and port, without any service.
///
/// # Errors
/// `NoRoute` with `unknown_address`; `UpstreamUnhealthy` with `no_healthy_endpoint` or `no_valid_destination`.
pub fn resolve_workload(
    index: &dyn Index,
    source: &Source,
    address: &NetworkAddress,
    port: u16,
) -> Result<Candidate, Reject> {
    let unhealthy =
        |reason, detail: String| Reject::new(RejectClass::UpstreamUnhealthy, reason).with_detail(detail);
    let workload = index
        .workload_by_address(address)
        .ok_or_else(|| Reject::new(RejectClass::NoRoute, "unknown_address").with_detail(address))?;
    if !is_direct(source, workload) {
        return Err(unhealthy(
            "no_valid_destination",
            format!("{} is in another network", workload.uid),
        ));
    }
    if !workload.healthy {
        return Err(unhealthy(
            "no_healthy_endpoint",
            format!("{} is unhealthy", workload.uid),
        ));
    }
    let expected = workload
        .expected()
        .map_err(|error| unhealthy("no_valid_destination", error.to_string()))?;
    Ok(Candidate {
        workload: workload.clone(),
        address: SocketAddr::new(address.address, port),
        hbone: SocketAddr::new(address.address, ports::HBONE),
        via: None,
        expected: expected.clone(),
        rank: 0,
        weight: workload.capacity.max(1),
    })
}

/// What a service's load balancing says about distances.
#[derive(Clone, Copy)]
struct Scale<'a> {
    scopes: &'a [Scope],
    strict: bool,
    /// Added to an endpoint that matches a leading network scope, so that every endpoint of the own network is nearer
    /// than any of another, however many other scopes that one matches.
    network_bonus: u32,
    /// Rank of an endpoint that matches everything.
    best: u32,
}

impl<'a> Scale<'a> {
    fn new(balancing: &'a LoadBalancing) -> Self {
        let (scopes, strict): (&[Scope], _) = match balancing.mode {
            Mode::Strict => (&balancing.scopes, true),
            Mode::Failover => (&balancing.scopes, false),
            Mode::Unspecified | Mode::Passthrough => (&[], false),
        };
        let length = u32::try_from(scopes.len()).unwrap_or(u32::MAX / 2);
        let network_bonus = if scopes.first() == Some(&Scope::Network) {
            length - 1
        } else {
            0
        };
        Self {
            scopes,
            strict,
            network_bonus,
            best: length + network_bonus,
        }
    }

    /// Distance of an endpoint; none: too far to be used at all.
    fn distance(&self, source: &Source, workload: &Workload) -> Option<u32> {
        if self.scopes.is_empty() {
            let far = !is_near(source, workload);
            return Some(if far {
                4 - shared(&source.locality, &workload.locality)
            } else {
                0
            });
        }
        let mut scopes = self.scopes;
        let mut near = 0;
        if scopes.first() == Some(&Scope::Network) && !is_near(source, workload) {
            if self.strict {
                return None;
            }
            // The remaining scopes still rank the endpoints of other networks among themselves.
            scopes = &scopes[1..];
        } else {
            near += self.network_bonus;
        }
        let matched = scopes
            .iter()
            .take_while(|&&scope| same(scope, source, workload))
            .count();
        if self.strict && matched < scopes.len() {
            return None;
        }
        near += u32::try_from(matched).unwrap_or(u32::MAX / 2);
        Some(self.best - near)
    }
}

fn same(scope: Scope, source: &Source, workload: &Workload) -> bool {
    let (ours, theirs) = (&source.locality, &workload.locality);
    match scope {
        Scope::Region => ours.region == theirs.region,
        Scope::Zone => ours.zone == theirs.zone,
        Scope::Subzone => ours.subzone == theirs.subzone,
        Scope::Node => source.node == workload.node,
        Scope::Cluster => source.cluster_id == workload.cluster_id,
        Scope::Network => is_near(source, workload),
    }
}

/// In the same network, be it as a member that only dials out.
fn is_near(source: &Source, workload: &Workload) -> bool {
    networks::home_of(&source.network) == networks::home_of(&workload.network)
}

/// Can be dialled at its own address. Nobody in a network of outbound-only members can, not even by each other.
fn is_direct(source: &Source, workload: &Workload) -> bool {
    source.network == workload.network && !networks::is_outbound(&workload.network)
}

/// Endpoints of one network and locality, behind the gateways of that network.
struct Far {
    /// The first by uid.
    workload: Arc<Workload>,
    identities: Vec<SpiffeId>,
    rank: u32,
    weight: u32,
    count: usize,
}

/// Collects candidates among the endpoints of a service.
struct Choice<'a> {
    index: &'a dyn Index,
    source: &'a Source,
    service: &'a Arc<Service>,
    ports: &'a PortMap,
    want_ipv4: bool,
    scale: Scale<'a>,
    candidates: Vec<Candidate>,
    far: Vec<Far>,
    /// Capacity of endpoints in the own network, and the healthy part of it.
    near_capacity: u64,
    near_healthy: u64,
    /// Identity of the last endpoint and the list made for it: most endpoints of a service have the same.
    last_expected: Option<(SpiffeId, Arc<[SpiffeId]>)>,
    seen: usize,
    unhealthy: usize,
    elsewhere: usize,
}

impl Choice<'_> {
    fn consider(&mut self, workload: &Arc<Workload>) {
        self.seen += 1;
        let healthy = workload.healthy || self.service.load_balancing.allow_unhealthy;
        if !healthy {
            self.unhealthy += 1;
        }
        // The endpoint's own map comes first; a port that it does not map is served where the service says.
        let own = workload.services.get(&self.service.key).and_then(|maps| {
            maps.iter()
                .find(|map| map.service_port == self.ports.service_port)
                .map(|map| map.target_port)
        });
        let target = own.filter(|&port| port != 0).unwrap_or(self.ports.target_port);
        // Without a port, an address or an identity there is nothing to dial, and capacity 0 takes no connections.
        if target == 0 || workload.capacity == 0 {
            return;
        }
        if is_near(self.source, workload) {
            self.near_capacity += u64::from(workload.capacity);
            self.near_healthy += if healthy { u64::from(workload.capacity) } else { 0 };
        }
        if !healthy {
            return;
        }
        if !is_direct(self.source, workload) {
            self.consider_far(workload);
            return;
        }
        let addresses = &workload.addresses;
        let family = addresses
            .iter()
            .find(|address| address.is_ipv4() == self.want_ipv4);
        let Some(&address) = family.or(addresses.first()) else {
            return;
        };
        let Some(rank) = self.scale.distance(self.source, workload) else {
            return;
        };
        let Some(expected) = self.expected(workload) else {
            return;
        };
        self.candidates.push(Candidate {
            workload: workload.clone(),
            address: SocketAddr::new(address, target),
            hbone: SocketAddr::new(address, ports::HBONE),
            via: None,
            expected,
            rank,
            weight: workload.capacity,
        });
    }

    /// An endpoint behind gateways, where only another mesh member can be the peer of the inner connection.
    fn consider_far(&mut self, workload: &Arc<Workload>) {
        if workload.tunnel != Tunnel::Hbone || self.service.hostname.is_wildcard() {
            self.elsewhere += 1;
            return;
        }
        let Some(rank) = self.scale.distance(self.source, workload) else {
            return;
        };
        let identity = match workload.expected() {
            Ok(own) if !workload.is_split_horizon() => Some(&own[0]),
            Ok(_) | Err(_) => None,
        };
        let same = |far: &&mut Far| {
            far.workload.network == workload.network && far.workload.locality == workload.locality
        };
        let far = match self.far.iter_mut().find(same) {
            Some(far) => far,
            None => {
                self.far.push(Far {
                    workload: workload.clone(),
                    identities: Vec::new(),
                    rank,
                    weight: 0,
                    count: 0,
                });
                let last = self.far.len() - 1;
                &mut self.far[last]
            }
        };
        far.count += 1;
        far.weight = far.weight.saturating_add(workload.capacity);
        far.rank = far.rank.min(rank);
        if workload.uid < far.workload.uid {
            far.workload = workload.clone();
        }
        if let Some(identity) = identity.filter(|identity| !far.identities.contains(identity)) {
            far.identities.push(identity.clone());
        }
    }

    /// The candidate for endpoints behind gateways; none if no gateway leads there or nobody could prove to be one.
    fn behind(&self, far: Far, port: u16) -> Option<Candidate> {
        let Far {
            workload,
            mut identities,
            rank,
            weight,
            ..
        } = far;
        let gateways = ways(self.index, self.source, &workload);
        // A service is spread over trust domains: those of one speak for their own endpoints only.
        let own_domain = |id: &&SpiffeId| id.trust_domain == workload.trust_domain;
        for id in self.service.subject_alt_names.iter().filter(own_domain) {
            if !identities.contains(id) {
                identities.push(id.clone());
            }
        }
        if gateways.is_empty() || identities.is_empty() {
            return None;
        }
        // Clusters with another mesh domain know the service by another name, which their record says.
        let named_there = workload.is_split_horizon() && !workload.hostname.is_empty();
        let host = if named_there {
            &*workload.hostname
        } else {
            self.service.hostname.as_str()
        };
        let via = Via {
            network: workload.network.clone(),
            gateways,
            authority: format!("{host}:{port}").into(),
        };
        let nowhere = |port| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
        Some(Candidate {
            workload,
            address: nowhere(port),
            hbone: nowhere(ports::HBONE),
            via: Some(via),
            expected: identities.into(),
            rank,
            weight,
        })
    }

    /// Lets the nearest other network help where too little of the own one is left.
    fn share_with_far(&mut self) {
        let enough = self.near_healthy * 100 >= self.near_capacity * NEAR_HEALTHY_MIN_PERCENT;
        if enough || self.scale.strict {
            return;
        }
        let (source, candidates) = (self.source, &self.candidates);
        let best = |near: bool| {
            let of = candidates
                .iter()
                .filter(|one| is_near(source, &one.workload) == near);
            of.map(|one| one.rank).min()
        };
        let (Some(near), Some(far)) = (best(true), best(false)) else {
            return;
        };
        for one in &mut self.candidates {
            if one.rank == far && far > near && !is_near(source, &one.workload) {
                one.rank = near;
            }
        }
    }

    fn expected(&mut self, workload: &Workload) -> Option<Arc<[SpiffeId]>> {
        let own = workload.expected().ok()?;
        if self.service.subject_alt_names.is_empty() {
            return Some(own.clone());
        }
        match &self.last_expected {
            Some((id, list)) if *id == own[0] => Some(list.clone()),
            Some(_) | None => {
                let others = self.service.subject_alt_names.iter().filter(|&id| *id != own[0]);
                let list: Arc<[SpiffeId]> = std::iter::once(&own[0]).chain(others).cloned().collect();
                self.last_expected = Some((own[0].clone(), list.clone()));
                Some(list)
            }
        }
    }

    fn finish(mut self, port: u16) -> Result<Destination, Reject> {
        for far in std::mem::take(&mut self.far) {
            let count = far.count;
            match self.behind(far, port) {
                Some(candidate) => self.candidates.push(candidate),
                None => self.elsewhere += count,
            }
        }
        self.share_with_far();
        if self.candidates.is_empty() {
            let Self {
                seen,
                unhealthy,
                elsewhere,
                ..
            } = self;
            let reason = if elsewhere > 0 {
                "no_valid_destination"
            } else {
                "no_healthy_endpoint"
            };
            let detail = format!(
                "of {seen} endpoints of {} {unhealthy} are unhealthy, {elsewhere} in networks to which no gateway leads",
                self.service.hostname
            );
            return Err(Reject::new(RejectClass::UpstreamUnhealthy, reason).with_detail(detail));
        }
        // Stable, so that equal endpoints keep the index's order: the same world gives the same list.
        if self
            .candidates
            .iter()
            .any(|candidate| candidate.rank != self.candidates[0].rank)
        {
            self.candidates.sort_by_key(|candidate| candidate.rank);
        }
        Ok(Destination {
            service: self.service.clone(),
            port,
            candidates: self.candidates,
        })
    }
}

#[cfg(test)]
mod tests;
