//! The addresses of this host, and their changes.

use crate::shared::Shared;
use futures_util::StreamExt as _;
use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use rtnetlink::MulticastGroup;
use std::{io, net::IpAddr, sync::Arc, time::Duration};
use tombolo_runtime::TaskGroup;

/// Addresses are read again at least so often, should a notification be lost.
const REFRESH_EVERY: Duration = Duration::from_secs(30);

/// All addresses of all links.
pub(crate) fn host_addresses() -> io::Result<Vec<IpAddr>> {
    let addresses = getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
    });
    Ok(addresses.collect())
}

/// The prefixes of some links. Link-local ones are left out: every link has the same.
pub(crate) fn link_prefixes(links: &[String]) -> io::Result<Vec<IpNet>> {
    if links.is_empty() {
        return Ok(Vec::new());
    }
    let of_links = getifaddrs()?.filter(|interface| links.contains(&interface.interface_name));
    let prefixes = of_links.filter_map(|interface| {
        let (address, mask) = (interface.address?, interface.netmask?);
        let v4 = || {
            let (address, mask) = (address.as_sockaddr_in()?.ip(), mask.as_sockaddr_in()?.ip());
            IpNet::with_netmask(address.into(), mask.into()).ok()
        };
        let v6 = || {
            let (address, mask) = (address.as_sockaddr_in6()?.ip(), mask.as_sockaddr_in6()?.ip());
            let prefix = IpNet::with_netmask(address.into(), mask.into()).ok()?;
            (!address.is_unicast_link_local()).then_some(prefix)
        };
        v4().or_else(v6).map(|prefix| prefix.trunc())
    });
    Ok(prefixes.collect())
}

/// Keeps the source filter up to date until the group stops.
pub(crate) fn watch(shared: &Arc<Shared>, tasks: &TaskGroup) {
    let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let changes = match rtnetlink::new_multicast_connection(&groups) {
        Ok((connection, handle, changes)) => {
            tasks.spawn_until_stopped("address notifications", connection);
            Some((handle, changes))
        }
        Err(error) => {
            tracing::warn!(%error, "no notifications of address changes; looking every 30 s");
            None
        }
    };
    let shared = Arc::clone(shared);
    tasks.spawn_until_stopped("host addresses", async move {
        // The handle keeps the connection alive.
        let (_handle, mut changes) = changes.unzip();
        loop {
            let changed = async {
                match &mut changes {
                    Some(changes) => changes.next().await,
                    None => std::future::pending().await,
                }
            };
            if let Ok(None) = tokio::time::timeout(REFRESH_EVERY, changed).await {
                changes = None;
            }
            // One reading for all that is there already.
            while let Some(changes) = &mut changes
                && futures_util::FutureExt::now_or_never(changes.next())
                    .flatten()
                    .is_some()
            {}
            shared.refresh_sources();
        }
    });
}
