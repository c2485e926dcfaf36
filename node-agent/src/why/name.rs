//! The first hops: what the name is, whether this host's resolver asks the mesh for it, and what service has the address.

use super::{Walk, list};
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::time::timeout;
use tombolo_config::nearest;
use tombolo_control_client::Problem;
use tombolo_destination::{Index as _, Service, resolve};
use tombolo_dns::Names as _;
use tombolo_snapshot::Snapshot;
use tombolo_types::Code;

/// The host's resolver may be the very thing that is broken.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// What an application here would be told: the C library's answer, not ours.
pub(super) async fn look_up(host: &str, port: u16) -> Result<Vec<IpAddr>, String> {
    match timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((host, port))).await {
        Ok(Ok(addresses)) => Ok(addresses.map(|address| address.ip().to_canonical()).collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs())),
    }
}

/// Does the mesh know the name, and does this host's resolver ask the mesh for it?
pub(super) fn name(
    walk: &mut Walk,
    world: &Snapshot,
    host: &str,
    resolved: &Result<Vec<IpAddr>, String>,
    obstacle: Option<&Problem>,
) -> Option<IpAddr> {
    if let Ok(address) = host.parse() {
        walk.skip("an address was given");
        return Some(address);
    }
    let told = match resolved {
        Ok(addresses) if addresses.is_empty() => "this host's resolver knows no address of it".to_owned(),
        Ok(addresses) => format!("this host's resolver says {}", list(addresses)),
        Err(error) => format!("this host's resolver says: {error}"),
    };
    let addresses = resolved.as_deref().unwrap_or_default();
    let Some(known) = world.find(host, &world.own().namespace) else {
        // A short name that the host's own search list has completed.
        if let Some(vip) = addresses
            .iter()
            .find(|address| world.service_by_address(**address).is_some())
        {
            walk.ok(format!("{host} is {vip}"));
            return Some(*vip);
        }
        let (meant, next) = match nearest_host(world, host) {
            Some(meant) => (format!("; did you mean {meant}?"), None),
            None => (String::new(), elsewhere(world, host)),
        };
        walk.broken(Code::NameUnknown, format!("{host}: {told}{meant}"), next);
        return None;
    };
    let vips: Vec<IpAddr> = known
        .v4
        .iter()
        .copied()
        .map(IpAddr::V4)
        .chain(known.v6.iter().copied().map(IpAddr::V6))
        .collect();
    if vips.is_empty() {
        walk.broken(
            Code::NoEndpoint,
            format!("{host} is in the mesh but has no address yet: no endpoint has one"),
            None,
        );
        return None;
    }
    match addresses.iter().find(|address| vips.contains(address)) {
        Some(vip) => {
            walk.ok(format!("{host} is {vip}, and this host's resolver says so"));
            Some(*vip)
        }
        None if let Some(obstacle) = obstacle => {
            let cause = format!("{}; without it nobody answers for {host} here", obstacle.cause);
            walk.broken(obstacle.code, cause, None);
            None
        }
        None => {
            walk.broken(
                Code::NameNotResolved,
                format!("the mesh says {}, {told}", list(&vips)),
                None,
            );
            None
        }
    }
}

/// What to do about a service's name that is not known here, where there are other clusters: it may be of one of them.
fn elsewhere(world: &Snapshot, host: &str) -> Option<String> {
    let service = host.strip_suffix(&*world.own().mesh_domain)?.ends_with(".svc.");
    let others = world
        .trust_bundles()
        .any(|(trust_domain, _)| !world.is_own(trust_domain));
    (service && others).then(|| {
        "If it is a service of another cluster, it has to be exported there (docs/OPERATIONS.md, joining clusters): tombolo cluster \
         status on a discovery host lists what comes from each. Services of this cluster: tombolo get se -A"
            .to_owned()
    })
}

/// The name that was probably meant: another service beside it, or the same service elsewhere. Only the first label is
/// compared, else the domain that all names share would make them all alike.
pub(super) fn nearest_host(world: &Snapshot, host: &str) -> Option<String> {
    let own = &world.own().namespace;
    let (label, parent) = host.split_once('.').unwrap_or((host, ""));
    let visible: Vec<(&str, &str)> = world
        .services()
        .map(|service| service.hostname.as_str())
        .filter(|known| world.find(known, own).is_some())
        .filter_map(|known| known.split_once('.'))
        .collect();
    let beside = visible.iter().filter(|(_, of)| {
        if parent.is_empty() {
            of.split('.').next() == Some(own)
        } else {
            *of == parent
        }
    });
    if let Some(meant) = nearest(label, beside.clone().map(|(known, _)| *known)) {
        let (known, of) = beside.into_iter().find(|(known, _)| *known == meant)?;
        return Some(format!("{known}.{of}"));
    }
    let same = visible.iter().filter(|(known, _)| *known == label);
    same.map(|(known, of)| format!("{known}.{of}")).min()
}

pub(super) fn virtual_address(
    walk: &mut Walk,
    world: &Snapshot,
    vip: IpAddr,
    port: u16,
) -> Option<Arc<Service>> {
    let Some(service) = world.service_by_address(vip) else {
        let outside = if world.plan().contains(vip) {
            ""
        } else {
            "; it is no address of the mesh at all"
        };
        walk.broken(
            Code::NameUnknown,
            format!("no service has the address {vip}{outside}"),
            None,
        );
        return None;
    };
    let hidden = resolve(world, &world.source(), vip, port)
        .err()
        .is_some_and(|reject| reject.reason == "unknown_address");
    if hidden {
        walk.broken(
            Code::NameUnknown,
            format!("{} is visible in its own namespace only", service.hostname),
            None,
        );
        return None;
    }
    if service.port(port).is_none() {
        let ports = list(service.ports.iter().map(|port| port.service_port));
        let ports = if ports.is_empty() {
            "none".to_owned()
        } else {
            ports
        };
        let next = format!(
            "tombolo describe se -n {} {}",
            service.key.namespace, service.name
        );
        walk.broken(
            Code::PortUnknown,
            format!("{} has the ports: {ports}; not {port}", service.hostname),
            Some(next),
        );
        return None;
    }
    walk.ok(format!(
        "{vip}:{port} is {} of namespace {}",
        service.hostname, service.key.namespace
    ));
    Some(Arc::clone(service))
}
