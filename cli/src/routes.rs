//! What the kernel routes already: a host that uses the mesh's prefixes for something else must not join.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{Ipv4Addr, Ipv6Addr};
use tombolo_types::AddressPlan;

/// The mesh's own link.
const MESH_LINK: &str = "mesh0";

/// A route that is not ours and overlaps with a prefix of the mesh: `10.240.0.0/16 dev eth1`.
pub(crate) fn conflict(plan: &AddressPlan) -> Option<(IpNet, String)> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    find(plan, &read("/proc/net/route"), &read("/proc/net/ipv6_route"))
}

fn find(plan: &AddressPlan, v4: &str, v6: &str) -> Option<(IpNet, String)> {
    let overlaps = |a: IpNet, b: IpNet| a.contains(&b) || b.contains(&a);
    for (net, link) in v4.lines().filter_map(route4).chain(v6.lines().filter_map(route6)) {
        // A default route, or one of the halves of the Internet that stand for it, is no use of the prefix.
        let default = net.prefix_len() <= if matches!(net, IpNet::V4(_)) { 1 } else { 3 };
        if default || link == MESH_LINK {
            continue;
        }
        for prefix in [IpNet::V4(plan.v4), IpNet::V6(plan.v6)] {
            if overlaps(prefix, net) {
                return Some((prefix, format!("{net} dev {link}")));
            }
        }
    }
    None
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask …`, addresses as hex in the machine's byte order.
fn route4(line: &str) -> Option<(IpNet, &str)> {
    let mut fields = line.split_whitespace();
    let (link, destination) = (fields.next()?, fields.next()?);
    let flags = u32::from_str_radix(fields.nth(1)?, 16).ok()?;
    let mask = fields.nth(3)?;
    let address = |hex| {
        u32::from_str_radix(hex, 16)
            .ok()
            .map(|raw| Ipv4Addr::from(raw.to_ne_bytes()))
    };
    let net = Ipv4Net::with_netmask(address(destination)?, address(mask)?).ok()?;
    // RTF_REJECT: an unreachable route, such as the one that the mesh keeps behind its own.
    (flags & 0x0200 == 0).then_some((IpNet::V4(net), link))
}

/// `destination length source length next-hop metric refcnt use flags device`, addresses as 32 hex digits.
fn route6(line: &str) -> Option<(IpNet, &str)> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let [destination, length, _, _, _, _, _, _, flags, link] = fields.as_slice() else {
        return None;
    };
    let address = u128::from_str_radix(destination, 16).ok().map(Ipv6Addr::from)?;
    let net = Ipv6Net::new(address, u8::from_str_radix(length, 16).ok()?).ok()?;
    let flags = u32::from_str_radix(flags, 16).ok()?;
    (flags & 0x0200 == 0).then_some((IpNet::V6(net), *link))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";

    fn v4(net: &str, link: &str, flags: u32) -> String {
        let net: Ipv4Net = net.parse().unwrap();
        let hex = |address: Ipv4Addr| format!("{:08X}", u32::from_ne_bytes(address.octets()));
        format!(
            "{link}\t{}\t00000000\t{flags:04X}\t0\t0\t0\t{}\t0\t0\t0\n",
            hex(net.network()),
            hex(net.netmask())
        )
    }

    fn v6(net: &str, link: &str) -> String {
        let net: Ipv6Net = net.parse().unwrap();
        let zero = "0".repeat(32);
        let address = u128::from(net.network());
        format!(
            "{address:032x} {:02x} {zero} 00 {zero} 00000100 00000001 00000000 00000001 {link:>8}\n",
            net.prefix_len()
        )
    }

    #[test]
    fn only_other_uses_of_the_prefixes_conflict() {
        let plan = AddressPlan::default();
        let check = |routes4: &str, routes6: &str| {
            find(&plan, &format!("{HEAD}{routes4}"), routes6).map(|found| found.1)
        };
        assert_eq!(check("", ""), None);
        let harmless =
            v4("0.0.0.0/0", "eth0", 3) + &v4("128.0.0.0/1", "tun0", 1) + &v4("10.0.0.0/8", "eth0", 1);
        let ours = v4("240.240.0.0/16", "mesh0", 1) + &v4("240.240.0.0/16", "*", 0x0201);
        let harmless6 = v6("::/0", "eth0") + &v6("fe80::/64", "eth0") + &v6("2001:2::/48", "mesh0");
        assert_eq!(check(&(harmless + &ours), &harmless6), None);
        for net in ["240.0.0.0/4", "240.240.0.0/16", "240.240.7.0/24"] {
            assert_eq!(check(&v4(net, "eth1", 1), "").unwrap(), format!("{net} dev eth1"));
        }
        assert_eq!(
            check("", &v6("2001:2:0:5::/64", "wg0")).unwrap(),
            "2001:2:0:5::/64 dev wg0"
        );
    }
}
