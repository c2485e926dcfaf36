//! What a node may claim: pure.

use ipnet::IpNet;
use std::net::IpAddr;
use tombolo_types::AddressPlan;

/// Addresses that wait for a dial-back at most.
const CANDIDATES_MAX: usize = 8;

/// The verdict on a node's claims.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Taken at once.
    pub taken: Option<IpAddr>,
    /// Taken by the first one that answers with the device's certificate.
    pub candidates: Vec<IpAddr>,
    /// Of a class that nobody may claim.
    pub refused: Vec<IpAddr>,
}

/// False for loopback, link-local, multicast, unspecified, broadcast and virtual addresses.
pub fn may_be_claimed(address: IpAddr, plan: &AddressPlan) -> bool {
    let special = match address {
        IpAddr::V4(a) => {
            a.is_loopback() || a.is_link_local() || a.is_multicast() || a.is_unspecified() || a.is_broadcast()
        }
        IpAddr::V6(a) => {
            a.is_loopback()
                || a.is_unicast_link_local()
                || a.is_multicast()
                || a.is_unspecified()
                || a.to_ipv4_mapped().is_some()
        }
    };
    !special && !plan.contains(address)
}

/// Decides. `source` is where the control connection comes from, `claimed` what the node says of itself.
pub fn choose(source: Option<IpAddr>, claimed: &[IpAddr], cidrs: &[IpNet], plan: &AddressPlan) -> Choice {
    let mut choice = Choice::default();
    let mut own = Vec::new();
    for address in claimed.iter().map(IpAddr::to_canonical) {
        if !may_be_claimed(address, plan) {
            choice.refused.push(address);
        } else if !own.contains(&address) {
            own.push(address);
        }
    }
    let source = source.filter(|source| may_be_claimed(*source, plan));
    let in_cidrs = |address: &IpAddr| cidrs.iter().any(|cidr| cidr.contains(address));
    // A source that the node does not call its own is a NAT's: calls to it may go anywhere.
    let direct = source.filter(|source| own.is_empty() || own.contains(source));
    choice.taken = direct
        .or_else(|| own.iter().copied().find(in_cidrs))
        .or_else(|| source.filter(in_cidrs));
    if choice.taken.is_none() {
        own.truncate(CANDIDATES_MAX - 1);
        choice.candidates = own;
        choice.candidates.extend(source);
    }
    choice
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn check(source: &str, claimed: &[&str], cidrs: &[&str]) -> Choice {
        let claimed: Vec<IpAddr> = claimed.iter().map(|a| ip(a)).collect();
        let cidrs: Vec<IpNet> = cidrs.iter().map(|c| c.parse().unwrap()).collect();
        choose(Some(ip(source)), &claimed, &cidrs, &AddressPlan::default())
    }

    #[test]
    fn the_source_of_the_connection() {
        let choice = check("10.0.0.5", &["172.17.0.1", "10.0.0.5"], &[]);
        assert_eq!((choice.taken, choice.candidates.len()), (Some(ip("10.0.0.5")), 0));
        assert_eq!(
            check("10.0.0.5", &[], &[]).taken,
            Some(ip("10.0.0.5")),
            "a node that claims nothing"
        );
        assert_eq!(
            check("2001:db8::5", &["2001:db8::5"], &[]).taken,
            Some(ip("2001:db8::5"))
        );
    }

    #[test]
    fn behind_a_nat_a_dial_back_decides() {
        let choice = check("192.0.2.1", &["10.0.0.5"], &[]);
        assert_eq!(choice.taken, None);
        assert_eq!(choice.candidates, [ip("10.0.0.5"), ip("192.0.2.1")]);
        // Unless the group says which addresses are its own.
        assert_eq!(
            check("192.0.2.1", &["10.0.0.5"], &["10.0.0.0/8"]).taken,
            Some(ip("10.0.0.5"))
        );
        assert_eq!(
            check("192.0.2.1", &["10.0.0.5"], &["192.0.2.0/24"]).taken,
            Some(ip("192.0.2.1"))
        );
    }

    #[test]
    fn classes_that_nobody_may_claim() {
        for bad in [
            "127.0.0.1",
            "169.254.169.254",
            "224.0.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "240.240.0.7",
            "::1",
            "fe80::1",
            "ff02::1",
            "::",
            "2001:2::7",
            "::ffff:127.0.0.1",
        ] {
            let choice = check(bad, &[bad], &["0.0.0.0/0", "::/0"]);
            assert_eq!(
                (choice.taken, choice.candidates.len(), choice.refused.len()),
                (None, 0, 1),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_flood_of_claims_is_cut() {
        let claimed: Vec<String> = (0..200).map(|i| format!("10.0.1.{i}")).collect();
        let claimed: Vec<&str> = claimed.iter().map(String::as_str).collect();
        assert_eq!(check("192.0.2.1", &claimed, &[]).candidates.len(), CANDIDATES_MAX);
    }
}
