//! The hops before anything is dialled: what policies say of this host as the caller, and which endpoints may be chosen.

use super::{Walk, list, network};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};
use tombolo_authz::{Action, Connection, Verdict, decide};
use tombolo_control_client::host;
use tombolo_destination::{Destination, Index as _, Service, Workload, resolve};
use tombolo_snapshot::Snapshot;
use tombolo_types::{Code, SpiffeId};

/// The endpoints of a service for a port: all of them, and those that may be chosen.
pub(super) struct Endpoints {
    all: Vec<(Arc<Workload>, u16)>,
    usable: Result<Destination, tombolo_types::Reject>,
}

impl Endpoints {
    pub(super) fn of(world: &Snapshot, service: &Service, vip: IpAddr, port: u16) -> Self {
        let mut all = Vec::new();
        let common = service.port(port).map_or(port, |map| map.target_port);
        world.endpoints(&service.key, &mut |workload| {
            let own = workload.services.get(&service.key);
            let own = own.and_then(|ports| ports.iter().find(|map| map.service_port == port));
            all.push((Arc::clone(workload), own.map_or(common, |map| map.target_port)));
        });
        Self {
            all,
            usable: resolve(world, &world.source(), vip, port),
        }
    }

    /// Where an endpoint serves, as far as that is known: one behind a gateway may have no address.
    pub(super) fn target(&self, workload: &Workload) -> SocketAddr {
        let port = self.all.iter().find(|(one, _)| one.uid == workload.uid);
        let address = workload.addresses.first().copied();
        (
            address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
            port.map_or(0, |(_, port)| *port),
        )
            .into()
    }
}

/// What the policies that this host holds say of it as the caller.
pub(super) fn policy(walk: &mut Walk, world: &Snapshot, source: Option<&SpiffeId>, endpoints: &Endpoints) {
    if !world.policies_synced() {
        walk.skip("this host has received no policies yet");
        return;
    }
    let targets: Vec<(&Arc<Workload>, SocketAddr)> = match &endpoints.usable {
        Ok(destination) => destination
            .candidates
            .iter()
            // What holds in another cluster is not known here.
            .filter(|c| !c.workload.is_split_horizon())
            .map(|c| match c.via {
                None => (&c.workload, c.address),
                Some(_) => (&c.workload, endpoints.target(&c.workload)),
            })
            .collect(),
        Err(_) => {
            let address = |workload: &Workload| {
                workload
                    .addresses
                    .first()
                    .copied()
                    .unwrap_or(Ipv4Addr::UNSPECIFIED.into())
            };
            endpoints
                .all
                .iter()
                .map(|(workload, port)| (workload, (address(workload), *port).into()))
                .collect()
        }
    };
    if targets.is_empty() {
        walk.skip(match &endpoints.usable {
            Ok(_) => "the endpoints are in other clusters, which decide themselves",
            Err(_) => "there is no endpoint",
        });
        return;
    }
    let own = host::addresses(Some(world.plan()));
    let (mut allowed, mut denied) = (0usize, None);
    for (workload, address) in &targets {
        let policies = world.policies_for(workload);
        let source_ip = own.iter().find(|ip| ip.is_ipv4() == address.is_ipv4()).copied();
        let connection = Connection {
            source,
            source_ip: source_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
            destination_ip: address.ip(),
            destination_port: address.port(),
        };
        match decide(policies.iter().map(|policy| policy.as_ref()), &connection) {
            Verdict::Allow { .. } => allowed += 1,
            Verdict::Deny {
                policy: Some(policy), ..
            } => {
                let next = format!(
                    "tombolo get ap -n {} {} -o yaml; change or delete it",
                    policy.namespace, policy.name
                );
                denied.get_or_insert((format!("{policy} denies"), next));
            }
            Verdict::Deny { policy: None, .. } => {
                let allow = policies
                    .iter()
                    .filter(|p| p.action == Action::Allow && !p.dry_run)
                    .map(|p| &p.key);
                let next = format!(
                    "tombolo get ap -n {} -o yaml; add a rule that allows it",
                    workload.namespace
                );
                denied.get_or_insert((format!("no ALLOW policy matches ({})", list(allow)), next));
            }
        }
    }
    let who = source.map_or_else(|| "a caller without identity".to_owned(), ToString::to_string);
    match denied {
        Some((cause, next)) if allowed == 0 => {
            walk.broken(Code::PolicyDenies, format!("{cause} {who}"), Some(next))
        }
        Some((cause, _)) => walk.ok(format!(
            "{allowed} of {} endpoints admit {who}; elsewhere {cause}",
            targets.len()
        )),
        None => walk.ok(format!("{who} is admitted")),
    }
}

pub(super) fn usable<'a>(walk: &mut Walk, endpoints: &'a Endpoints) -> Option<&'a Destination> {
    match &endpoints.usable {
        Ok(destination) => {
            let names = destination.candidates.iter().map(|c| match &c.via {
                None => format!("{} ({})", c.workload.name, c.address),
                Some(via) => format!("those in {}", network(&via.network)),
            });
            let (usable, all) = (destination.candidates.len(), endpoints.all.len());
            let which = list(names);
            walk.ok(if destination.candidates.iter().any(|c| c.via.is_some()) {
                format!("of {all} known these can take it: {which}")
            } else {
                format!("{usable} of {all} can take it: {which}")
            });
            Some(destination)
        }
        Err(reject) if reject.reason == "no_valid_destination" => {
            let mut networks: Vec<_> = endpoints
                .all
                .iter()
                .filter(|(workload, _)| workload.healthy)
                .map(|(workload, _)| network(&workload.network))
                .collect();
            networks.sort_unstable();
            networks.dedup();
            walk.ok(format!(
                "of {} known none is in this network",
                endpoints.all.len()
            ));
            walk.broken(
                Code::GatewayUnreachable,
                format!("no gateway is known that leads into {}", list(networks)),
                Some("enrol one there: tombolo token create --gateway".to_owned()),
            );
            None
        }
        Err(reject) => {
            let sick = endpoints
                .all
                .iter()
                .filter(|(workload, _)| !workload.healthy)
                .map(|(workload, _)| &workload.name);
            let sick = list(sick);
            let sick = if sick.is_empty() {
                String::new()
            } else {
                format!("; unhealthy: {sick}")
            };
            let names = || {
                let nowhere = endpoints
                    .all
                    .iter()
                    .filter(|(workload, _)| workload.addresses.is_empty() && !workload.hostname.is_empty());
                nowhere.map(|(workload, _)| &workload.hostname)
            };
            if !endpoints.all.is_empty() && names().count() == endpoints.all.len() {
                let cause = format!("nobody looks them up here: {}", list(names()));
                walk.broken(Code::EndpointNames, cause, None);
                return None;
            }
            walk.broken(
                Code::NoEndpoint,
                format!("{} endpoints known, {reject}{sick}", endpoints.all.len()),
                None,
            );
            None
        }
    }
}
