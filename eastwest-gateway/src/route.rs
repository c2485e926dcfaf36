//! Where a call that has come to the gateway goes: pure, from one version of the world.
//!
//! **Invariant:** only services of this mesh, by name; no addresses, no ports of the mesh's own, no transit into other
//! networks. A caller of another trust domain reaches exported services alone.
//! **Invariant:** policy is decided before anything is dialled, on the identity that the caller has proven.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};
use tombolo_authz::{Connection, Verdict, decide};
use tombolo_destination::{GatewayTarget, Index as _, Service, Tunnel, Visibility, Workload};
use tombolo_identity::Peer;
use tombolo_snapshot::Snapshot;
use tombolo_tunnel::Authority;
use tombolo_types::{DeviceId, NamespacedName, Reject, RejectClass, ports};

/// Suffix of the network of hosts that only dial out.
pub(crate) const OUTBOUND_SUFFIX: &str = "~outbound";

/// Never delivered, whatever a service says.
const SSH: u16 = 22;

/// Who asks for what.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) peer: &'a Peer,
    pub(crate) remote: IpAddr,
    pub(crate) authority: &'a Authority,
    pub(crate) role: Role,
}

/// What the caller says it is. It decides only whether a call passes the waypoint of its service: what an endpoint behind a
/// waypoint takes from whom is its own policy, and decided here as well.
///
/// Source: Istio's header `x-istio-source`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Role {
    /// A ztunnel, a sidecar, one of our agents: nothing of layer 7 was done yet.
    #[default]
    Workload,
    /// A waypoint, which has done all of it.
    Waypoint,
    /// An ingress gateway: as the service says.
    Gateway,
}

impl Role {
    /// By the header's value.
    pub(crate) fn of(value: &[u8]) -> Self {
        match value {
            b"waypoint" => Self::Waypoint,
            b"gateway" => Self::Gateway,
            _ => Self::Workload,
        }
    }

    fn passes_waypoint(self, service: &Service) -> bool {
        match self {
            Self::Workload => true,
            Self::Waypoint => false,
            Self::Gateway => service.ingress_use_waypoint,
        }
    }
}

/// How an endpoint is reached from here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reach {
    /// By its HBONE server.
    Dial(SocketAddr),
    /// By the reverse session that it holds.
    Session(DeviceId),
}

/// An endpoint that may take the call.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    pub(crate) workload: Arc<Workload>,
    pub(crate) reach: Reach,
}

/// A call that may go on.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) service: Arc<Service>,
    /// Healthy and allowed, in no order; never empty.
    pub(crate) endpoints: Vec<Endpoint>,
}

/// Why not, and by which policy.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) reject: Reject,
    pub(crate) policy: Option<NamespacedName>,
}

impl From<Reject> for Refused {
    fn from(reject: Reject) -> Self {
        Self { reject, policy: None }
    }
}

/// What the world does not say.
pub(crate) trait Known {
    /// True for a device that holds a reverse session here.
    fn has_session(&self, device: DeviceId) -> bool;
    /// True for a service that other trust domains may call.
    fn is_exported(&self, service: &NamespacedName) -> bool;
}

/// Decides about a call.
pub(crate) fn route(world: &Snapshot, call: &Call<'_>, known: &impl Known) -> Result<Route, Refused> {
    let no_route = |reason| Reject::new(RejectClass::NoRoute, reason).with_detail(call.authority);
    let Authority::Name { host, port } = call.authority else {
        // Whoever asks so speaks another protocol than that of gateways.
        let reject = Reject::new(RejectClass::PeerIncompatible, "address_not_routed");
        return Err(reject.with_detail(call.authority).into());
    };
    if !world.policies_synced() || !world.addresses_synced() {
        return Err(Reject::new(RejectClass::ControlPlaneStale, "no_policies_received").into());
    }
    if call.peer.device.is_some_and(|device| world.is_revoked(device)) {
        return Err(Reject::new(RejectClass::PolicyDenied, "device_revoked").into());
    }
    let service = world
        .service_by_host(host, "")
        .ok_or_else(|| no_route("unknown_service"))?;
    let foreign = !world.is_own(&call.peer.id.trust_domain);
    let hidden =
        service.visibility == Visibility::Namespace && call.peer.id.namespace != service.key.namespace;
    if hidden || (foreign && !known.is_exported(&service.key)) {
        // To an outsider a service that is not exported is one that is not there.
        return Err(no_route("unknown_service").into());
    }
    let service_port = service.port(*port).ok_or_else(|| no_route("unknown_port"))?;
    let mut choice = Choice {
        world,
        call,
        known,
        endpoints: Vec::new(),
        seen: 0,
        denied: None,
    };
    if let Some(waypoint) = service
        .waypoint
        .as_ref()
        .filter(|_| call.role.passes_waypoint(service))
    {
        // Without its waypoint a service is not reached: what it enforces would be left out.
        match &waypoint.target {
            GatewayTarget::Hostname(key) => world.endpoints(key, &mut |workload| {
                choice.consider_waypoint(workload, waypoint.hbone_port);
            }),
            GatewayTarget::Address(at) => match (
                world.workload_by_address(at),
                world.service_by_address(at.address),
            ) {
                (Some(workload), _) => choice.consider_waypoint(workload, waypoint.hbone_port),
                (None, Some(service)) => world.endpoints(&service.key, &mut |workload| {
                    choice.consider_waypoint(workload, waypoint.hbone_port);
                }),
                (None, None) => {}
            },
        }
        return choice.finish(service, "no_healthy_waypoint");
    }
    world.endpoints(&service.key, &mut |workload| {
        let mapped = workload
            .services
            .get(&service.key)
            .and_then(|ports| ports.iter().find(|map| map.service_port == *port))
            .map_or(service_port.target_port, |map| map.target_port);
        choice.consider(workload, mapped);
    });
    choice.finish(service, "no_healthy_endpoint")
}

struct Choice<'a, K> {
    world: &'a Snapshot,
    call: &'a Call<'a>,
    known: &'a K,
    endpoints: Vec<Endpoint>,
    seen: usize,
    denied: Option<Refused>,
}

impl<K: Known> Choice<'_, K> {
    fn finish(self, service: &Arc<Service>, reason: &'static str) -> Result<Route, Refused> {
        let Self {
            call,
            endpoints,
            seen,
            denied,
            ..
        } = self;
        if !endpoints.is_empty() {
            return Ok(Route {
                service: Arc::clone(service),
                endpoints,
            });
        }
        Err(denied.unwrap_or_else(|| {
            Reject::new(RejectClass::UpstreamUnhealthy, reason)
                .with_detail(format_args!(
                    "{}: {seen} endpoints in this network",
                    call.authority
                ))
                .into()
        }))
    }

    fn consider(&mut self, workload: &Arc<Workload>, port: u16) {
        let home = &self.world.own().network;
        let outbound = workload
            .network
            .strip_suffix(OUTBOUND_SUFFIX)
            .is_some_and(|network| network == &**home);
        if !outbound && workload.network != *home {
            return; // another gateway's
        }
        self.seen += 1;
        if !workload.healthy || workload.tunnel != Tunnel::Hbone || port == 0 {
            return;
        }
        if port == SSH || ports::NEVER_DELIVERED.contains(&port) {
            return;
        }
        let reach = if outbound {
            match device_of(&workload.name).filter(|&device| self.known.has_session(device)) {
                Some(device) => Reach::Session(device),
                None => return,
            }
        } else {
            match workload.hbone() {
                Some(address) => Reach::Dial(address),
                None => return,
            }
        };
        self.decide(workload, port, reach);
    }

    /// A waypoint terminates the inner connection itself, at a port that no application has.
    fn consider_waypoint(&mut self, workload: &Arc<Workload>, hbone_port: u16) {
        if workload.network != self.world.own().network {
            return; // no transit
        }
        self.seen += 1;
        let Some(address) = workload.addresses.first() else {
            return;
        };
        if workload.healthy && workload.tunnel == Tunnel::Hbone {
            let reach = Reach::Dial(SocketAddr::new(*address, hbone_port));
            self.decide(workload, hbone_port, reach);
        }
    }

    fn decide(&mut self, workload: &Arc<Workload>, port: u16, reach: Reach) {
        let connection = Connection {
            source: Some(&self.call.peer.id),
            source_ip: self.call.remote,
            destination_ip: workload.addresses.first().copied().unwrap_or(self.call.remote),
            destination_port: port,
        };
        let policies = self.world.policies_for(workload);
        match decide(policies.into_iter().map(|policy| &**policy), &connection) {
            Verdict::Allow { .. } => self.endpoints.push(Endpoint {
                workload: Arc::clone(workload),
                reach,
            }),
            Verdict::Deny { policy, reason } => {
                self.denied = Some(Refused {
                    reject: Reject::new(RejectClass::PolicyDenied, reason),
                    policy,
                });
            }
        }
    }
}

/// The device that a WorkloadEntry names: `<group>-<16 hex digits>[-<network>]`.
pub(crate) fn device_of(entry: &str) -> Option<DeviceId> {
    entry
        .rsplit('-')
        .find(|part| part.len() == 16)
        .and_then(|part| part.parse().ok())
}

#[cfg(test)]
mod tests;
