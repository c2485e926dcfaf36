use ipnet::IpNet;
use std::net::IpAddr;

/// The source addresses whose packets are taken.
///
/// On a host that forwards (every container host does) a neighbour's packet to a virtual address reaches the TUN too:
/// it must not speak with the host's identity.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// Sorted.
    addresses: Vec<IpAddr>,
    prefixes: Vec<IpNet>,
}

impl Sources {
    /// The addresses of this host, and the prefixes of bridges that were opted in. Loopback, unspecified and multicast
    /// addresses are left out: the kernel would not deliver an answer to them.
    pub fn new(addresses: impl IntoIterator<Item = IpAddr>, prefixes: Vec<IpNet>) -> Self {
        let mut addresses: Vec<IpAddr> = addresses.into_iter().filter(|address| usable(*address)).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Self { addresses, prefixes }
    }

    /// True if packets from `address` are taken.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.addresses.binary_search(&address).is_ok()
            || (usable(address) && self.prefixes.iter().any(|prefix| prefix.contains(&address)))
    }
}

fn usable(address: IpAddr) -> bool {
    let mapped = matches!(address, IpAddr::V6(a) if a.to_ipv4_mapped().is_some());
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || mapped)
}
