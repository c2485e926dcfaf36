//! What this host is: its name, its addresses, its clock.

use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    net::if_::InterfaceFlags,
};
use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};
use tombolo_types::AddressPlan;

/// Wall clock, Unix milliseconds.
pub fn now_unix_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Wall clock, Unix seconds.
pub fn now_unix() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The kernel's name of this host.
pub fn hostname() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_default()
}

/// Addresses at which other hosts may reach this one: of links that are up, without loopback, link-local, multicast
/// and the mesh's own virtual ones. Sorted, IPv4 first.
pub fn addresses(plan: Option<&AddressPlan>) -> Vec<IpAddr> {
    let Ok(interfaces) = getifaddrs() else {
        return Vec::new();
    };
    let addresses: BTreeSet<IpAddr> = interfaces
        .filter(|interface| interface.flags.contains(InterfaceFlags::IFF_UP))
        .filter_map(|interface| ip_of(&interface))
        .filter(|address| is_claimable(*address) && plan.is_none_or(|plan| !plan.contains(*address)))
        .collect();
    addresses.into_iter().collect()
}

/// True if a link that is up has `address`, or that cannot be known. The address of a link that is down is still one of
/// this host's, and packets come from it that no answer finds.
pub(crate) fn is_up(address: IpAddr) -> bool {
    let Ok(mut interfaces) = getifaddrs() else {
        return true;
    };
    interfaces.any(|interface| {
        interface.flags.contains(InterfaceFlags::IFF_UP) && ip_of(&interface) == Some(address)
    })
}

/// The address of one line of the kernel's list.
fn ip_of(interface: &InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address?;
    let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
}

/// True if `address` is one of this host's: a socket can be bound to it.
pub fn is_own(address: IpAddr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

fn is_claimable(address: IpAddr) -> bool {
    !address.is_loopback()
        && !address.is_unspecified()
        && !address.is_multicast()
        && match address {
            IpAddr::V4(v4) => !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claimable() {
        for (address, expected) in [
            ("10.0.0.1", true),
            ("2001:db8::1", true),
            ("fd00::1", true),
            ("127.0.0.1", false),
            ("169.254.1.1", false),
            ("0.0.0.0", false),
            ("224.0.0.1", false),
            ("::1", false),
            ("fe80::1", false),
            ("ff02::1", false),
        ] {
            assert_eq!(is_claimable(address.parse().unwrap()), expected, "{address}");
        }
        assert!(is_up("127.0.0.1".parse().unwrap()) && !is_up("192.0.2.1".parse().unwrap()));
        assert!(is_own("127.0.0.1".parse().unwrap()) && !is_own("192.0.2.1".parse().unwrap()));
        assert!(addresses(None).into_iter().all(is_claimable));
    }
}
