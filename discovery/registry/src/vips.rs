//! Virtual addresses: given one after the other, kept by their object, disputed by age.

use crate::content::ObjectKey;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};
use tombolo_config::{Kind, Resource};
use tombolo_types::AddressPlan;

/// A virtual address pair given to a host of an object, to be written into the object's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// ServiceEntry, or WorkloadEntry for the per-instance name of a headless service.
    pub kind: Kind,
    /// Of the object.
    pub namespace: String,
    /// Of the object.
    pub name: String,
    /// Host that it is for.
    pub host: String,
    /// IPv4; `None` if the prefix is used up.
    pub v4: Option<Ipv4Addr>,
    /// IPv6; `None` if the prefix is used up.
    pub v6: Option<Ipv6Addr>,
}

impl Allocation {
    /// Writes it into `status.addresses` of its object, in place of what was there for the host. The form is Istio's:
    /// a list of `{value, host}`.
    pub fn persist(&self, resource: &mut Resource) {
        let status = resource.status_mut().get_or_insert_with(|| json!({}));
        if !status.is_object() {
            *status = json!({});
        }
        let mut items = match status.get_mut("addresses").map(Value::take) {
            Some(Value::Array(items)) => items,
            _ => Vec::new(),
        };
        items.retain(|item| item.get("host").and_then(Value::as_str) != Some(self.host.as_str()));
        let given = [self.v4.map(IpAddr::V4), self.v6.map(IpAddr::V6)]
            .into_iter()
            .flatten();
        items.extend(given.map(|ip| json!({"value": ip.to_string(), "host": self.host})));
        if let Some(status) = status.as_object_mut() {
            status.insert("addresses".into(), Value::Array(items));
        }
    }
}

/// The highest virtual addresses ever given. Discovery keeps it beside the objects, so that an address is not given
/// again soon after its object was deleted, nor after a restart or a restored backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watermark {
    /// IPv4; the network's own address if none was given.
    pub v4: Ipv4Addr,
    /// IPv6; the network's own address if none was given.
    pub v6: Ipv6Addr,
}

/// A host of an object that has, or wants, addresses. Older ones come first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claim {
    pub(crate) created: i64,
    pub(crate) object: ObjectKey,
    pub(crate) host: Arc<str>,
}

#[derive(Debug)]
pub(crate) struct Vips {
    plan: AddressPlan,
    claims: BTreeMap<IpAddr, BTreeSet<Claim>>,
    /// Given, but not seen in a status yet.
    pending: BTreeMap<Claim, [Option<IpAddr>; 2]>,
    pending_addresses: BTreeMap<IpAddr, Claim>,
    highest: Watermark,
    cursor: Watermark,
    /// The IPv4 prefix was found full, and nothing has been released since.
    full_v4: bool,
}

impl Vips {
    pub(crate) fn new(plan: AddressPlan) -> Self {
        let lowest = Watermark {
            v4: plan.v4.network(),
            v6: plan.v6.network(),
        };
        Self {
            plan,
            claims: BTreeMap::new(),
            pending: BTreeMap::new(),
            pending_addresses: BTreeMap::new(),
            highest: lowest,
            cursor: lowest,
            full_v4: false,
        }
    }

    pub(crate) fn watermark(&self) -> Watermark {
        self.highest
    }

    /// Never gives at or below this before the prefix has been gone through.
    pub(crate) fn raise(&mut self, watermark: Watermark) {
        self.note(IpAddr::V4(watermark.v4));
        self.note(IpAddr::V6(watermark.v6));
    }

    fn note(&mut self, ip: IpAddr) {
        if !self.plan.contains(ip) || self.plan.is_reserved(ip) {
            return;
        }
        match ip {
            IpAddr::V4(ip) if ip > self.highest.v4 => (self.highest.v4, self.cursor.v4) = (ip, ip),
            IpAddr::V6(ip) if ip > self.highest.v6 => (self.highest.v6, self.cursor.v6) = (ip, ip),
            IpAddr::V4(_) | IpAddr::V6(_) => {}
        }
    }

    /// Replaces the addresses that a claim says it has. Gives the claims that lost or won an address by it.
    pub(crate) fn set(&mut self, claim: &Claim, old: &[IpAddr], new: &[IpAddr]) -> BTreeSet<Claim> {
        let mut moved = BTreeSet::new();
        for ip in old.iter().filter(|ip| !new.contains(ip)) {
            let Some(claims) = self.claims.get_mut(ip) else {
                continue;
            };
            if claims.first() == Some(claim) {
                moved.insert(claim.clone());
                moved.extend(claims.iter().nth(1).cloned());
            }
            claims.remove(claim);
            if claims.is_empty() {
                self.claims.remove(ip);
                self.full_v4 = false;
            }
        }
        for ip in new.iter().filter(|ip| !old.contains(ip)) {
            self.note(*ip);
            let claims = self.claims.entry(*ip).or_default();
            let before = claims.first().cloned();
            claims.insert(claim.clone());
            if claims.first() == Some(claim) {
                moved.extend(before);
                moved.insert(claim.clone());
            }
        }
        moved
    }

    /// Those of `addresses` that the claim really holds: the first of each family.
    pub(crate) fn held(&self, claim: &Claim, addresses: &[IpAddr]) -> [Option<IpAddr>; 2] {
        let mut held = addresses
            .iter()
            .copied()
            .filter(|ip| self.usable(*ip) && self.claims.get(ip).and_then(BTreeSet::first) == Some(claim));
        [held.clone().find(IpAddr::is_ipv4), held.find(IpAddr::is_ipv6)]
    }

    /// True if it may stand for a service.
    pub(crate) fn usable(&self, ip: IpAddr) -> bool {
        self.plan.contains(ip) && !self.plan.is_reserved(ip)
    }

    /// Completes what a claim holds. The same answer until it is seen in a status, or taken by an older claim.
    pub(crate) fn give(&mut self, claim: &Claim, held: [Option<IpAddr>; 2]) -> [Option<IpAddr>; 2] {
        let before = self.pending.remove(claim).unwrap_or_default();
        before
            .iter()
            .flatten()
            .for_each(|ip| drop(self.pending_addresses.remove(ip)));
        let mut given = held;
        for (slot, (kept, next)) in given
            .iter_mut()
            .zip(before.into_iter().zip([Self::next_v4, Self::next_v6]))
        {
            if slot.is_none() {
                let kept = kept.filter(|ip| !self.claims.contains_key(ip));
                *slot = kept.or_else(|| next(self));
                if let Some(ip) = *slot {
                    self.pending_addresses.insert(ip, claim.clone());
                }
            }
        }
        let mut pending = given;
        for (slot, held) in pending.iter_mut().zip(held) {
            if held.is_some() {
                *slot = None;
            }
        }
        self.pending.insert(claim.clone(), pending);
        given
    }

    /// The claim needs nothing any more.
    pub(crate) fn settle(&mut self, claim: &Claim) {
        for ip in self.pending.remove(claim).iter().flatten().flatten() {
            self.full_v4 = false;
            self.pending_addresses.remove(ip);
        }
    }

    fn taken(&self, ip: IpAddr) -> bool {
        self.claims.contains_key(&ip) || self.pending_addresses.contains_key(&ip)
    }

    fn next_v4(&mut self) -> Option<IpAddr> {
        if self.full_v4 {
            return None;
        }
        let (first, last) = (
            u32::from(self.plan.v4.network()),
            u32::from(self.plan.v4.broadcast()),
        );
        let start = u32::from(self.cursor.v4);
        let candidates = (start..=last).skip(1).chain(first..=start);
        let free = |ip: &Ipv4Addr| !self.plan.is_reserved(IpAddr::V4(*ip)) && !self.taken(IpAddr::V4(*ip));
        let Some(found) = candidates.map(Ipv4Addr::from).find(free) else {
            self.full_v4 = true;
            return None;
        };
        self.cursor.v4 = found;
        self.highest.v4 = self.highest.v4.max(found);
        Some(IpAddr::V4(found))
    }

    fn next_v6(&mut self) -> Option<IpAddr> {
        let (first, last) = (
            u128::from(self.plan.v6.network()),
            u128::from(self.plan.v6.broadcast()),
        );
        let start = u128::from(self.cursor.v6);
        // At most as many are taken as there are claims, and the reserved /64 is left in one step.
        let mut ip = start;
        for _ in 0..=(self.claims.len() + self.pending_addresses.len() + 2) {
            ip = if ip >= last { first } else { ip + 1 };
            if self.plan.is_reserved(IpAddr::V6(ip.into())) {
                let past = ip | u128::from(u64::MAX);
                // The network's own address is reserved alone, the other block to the end of its /64.
                ip = if ip == first || past >= last {
                    first + 1
                } else {
                    past + 1
                };
            }
            let found = Ipv6Addr::from(ip);
            if !self.taken(IpAddr::V6(found)) && !self.plan.is_reserved(IpAddr::V6(found)) {
                self.cursor.v6 = found;
                self.highest.v6 = self.highest.v6.max(found);
                return Some(IpAddr::V6(found));
            }
        }
        None
    }
}

/// Addresses that a status names, by host. An item without a host counts for `only_host`.
pub(crate) fn of_status(status: Option<&Value>, only_host: Option<&str>) -> BTreeMap<Arc<str>, Vec<IpAddr>> {
    let mut found: BTreeMap<Arc<str>, Vec<IpAddr>> = BTreeMap::new();
    let items = status
        .and_then(|status| status.get("addresses"))
        .and_then(Value::as_array);
    for item in items.into_iter().flatten() {
        let ip = item
            .get("value")
            .and_then(Value::as_str)
            .and_then(|value| value.parse::<IpAddr>().ok());
        let host = item.get("host").and_then(Value::as_str).or(only_host);
        if let (Some(ip), Some(host)) = (ip, host) {
            let addresses = found.entry(host.to_ascii_lowercase().into()).or_default();
            if !addresses.contains(&ip) {
                addresses.push(ip);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(created: i64, name: &str) -> Claim {
        let object = ObjectKey {
            kind: Kind::ServiceEntry,
            namespace: "shop".into(),
            name: name.into(),
        };
        Claim {
            created,
            object,
            host: format!("{name}.example.org").into(),
        }
    }

    fn text(given: [Option<IpAddr>; 2]) -> String {
        given
            .map(|ip| ip.map_or("-".to_owned(), |ip| ip.to_string()))
            .join(" ")
    }

    #[test]
    fn addresses_are_given_in_order_and_repeated_until_settled() {
        let mut vips = Vips::new(AddressPlan::default());
        let (a, b) = (claim(1, "a"), claim(2, "b"));
        assert_eq!(text(vips.give(&a, [None, None])), "240.240.0.1 2001:2::1");
        assert_eq!(text(vips.give(&b, [None, None])), "240.240.0.2 2001:2::2");
        assert_eq!(text(vips.give(&a, [None, None])), "240.240.0.1 2001:2::1");
        let v4: IpAddr = "240.240.0.9".parse().unwrap();
        vips.set(&a, &[], &[v4]);
        let held = vips.held(&a, &[v4]);
        assert_eq!(text(vips.give(&a, held)), "240.240.0.9 2001:2::1");
        vips.settle(&b);
        assert_eq!(
            text(vips.give(&claim(3, "c"), [None, None])),
            "240.240.0.10 2001:2::3"
        );
    }

    #[test]
    fn a_released_address_rests_until_the_prefix_has_been_gone_through() {
        let mut vips = Vips::new(AddressPlan::from_prefixes(["10.64.0.0/20"]).unwrap());
        let a = claim(1, "a");
        let [v4, v6] = vips.give(&a, [None, None]);
        let held: Vec<IpAddr> = [v4, v6].into_iter().flatten().collect();
        vips.set(&a, &[], &held);
        vips.settle(&a);
        vips.set(&a, &held, &[]);
        assert_eq!(
            text(vips.give(&claim(2, "b"), [None, None])),
            "10.64.0.2 2001:2::2"
        );
        // 4,096 less the network's own and the reserved 256, less the one given above and a's.
        for i in 0..(4096 - 1 - 256 - 2) {
            assert_ne!(vips.give(&claim(9, &format!("n{i}")), [None, None])[0], v4, "{i}");
        }
        assert_eq!(vips.give(&claim(9, "again"), [None, None])[0], v4);
        assert_eq!(vips.give(&claim(9, "full"), [None, None])[0], None);
    }

    #[test]
    fn the_older_claim_keeps_a_disputed_address() {
        let mut vips = Vips::new(AddressPlan::default());
        let ip: IpAddr = "240.240.0.7".parse().unwrap();
        let (old, young) = (claim(1, "old"), claim(2, "young"));
        assert_eq!(vips.set(&young, &[], &[ip]), BTreeSet::from([young.clone()]));
        assert_eq!(
            vips.set(&old, &[], &[ip]),
            BTreeSet::from([old.clone(), young.clone()])
        );
        assert_eq!(vips.held(&young, &[ip]), [None, None]);
        assert_eq!(vips.held(&old, &[ip]), [Some(ip), None]);
        assert_eq!(text(vips.give(&young, [None, None])), "240.240.0.8 2001:2::1");
        vips.set(&old, &[ip], &[]);
        assert_eq!(vips.held(&young, &[ip]), [Some(ip), None]);
    }

    #[test]
    fn a_watermark_survives_a_restart_and_reserved_addresses_are_skipped() {
        let mut vips = Vips::new(AddressPlan::default());
        vips.raise(Watermark {
            v4: "240.240.254.255".parse().unwrap(),
            v6: "2001:2:0:fffe:ffff:ffff:ffff:ffff".parse().unwrap(),
        });
        // Past the reserved last /24 and ffff /64 the search starts over.
        assert_eq!(
            text(vips.give(&claim(1, "a"), [None, None])),
            "240.240.0.1 2001:2::1"
        );
        assert_eq!(
            vips.watermark().v4,
            "240.240.254.255".parse::<Ipv4Addr>().unwrap()
        );
    }

    #[test]
    fn statuses() {
        let status = json!({"addresses": [{"value": "240.240.0.1", "host": "A.b"}, {"value": "x", "host": "a.b"},
            {"value": "2001:2::1"}, {"host": "a.b"}, 3]});
        let found = of_status(Some(&status), Some("a.b"));
        assert_eq!(found.len(), 1);
        assert_eq!(
            found["a.b"],
            [
                "240.240.0.1".parse::<IpAddr>().unwrap(),
                "2001:2::1".parse().unwrap()
            ]
        );
        assert!(of_status(None, None).is_empty());
        let json = json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "a"},
            "spec": {"hosts": ["a.b"]}, "status": status});
        let mut object = Resource::from_json(&json).unwrap();
        let given = Allocation {
            kind: Kind::ServiceEntry,
            namespace: "default".into(),
            name: "a".into(),
            host: "a.b".into(),
            v4: Some("240.240.0.5".parse().unwrap()),
            v6: None,
        };
        given.persist(&mut object);
        given.persist(&mut object);
        let found = of_status(object.status(), None);
        assert_eq!(
            found["a.b"][..],
            [
                "240.240.0.1".parse::<IpAddr>().unwrap(),
                "240.240.0.5".parse().unwrap()
            ]
        );
    }
}
