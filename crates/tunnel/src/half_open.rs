use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use tombolo_runtime::fair::source_of;

/// So long a source is known after a connection from it has shown a certificate.
const KNOWN_FOR: Duration = Duration::from_secs(600);
/// Sources remembered so, about 64 bytes each. Further ones stay strangers.
const KNOWN_MAX: usize = 4096;
/// Part of all places that one known source may hold, and that is left to known ones alone.
const KNOWN_PART: usize = 4;
/// Part of all places that strangers may hold together.
const STRANGERS_PART: usize = 2;

/// Connections that have not shown who they are yet, by source: a bounded number of each and of all, so that nobody
/// without a certificate takes the places of those who have one.
///
/// Behind one source there may be many callers: a gateway dials for all of another network, a NAT hides an office. So a
/// source from which certificates have come lately is not held to the number of a stranger, and one that is
/// [named](Self::name) to none but that of all. Strangers together leave places to both.
#[derive(Debug)]
pub struct HalfOpen {
    per_source_max: usize,
    max: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    all: usize,
    strangers: usize,
    sources: HashMap<IpAddr, usize>,
    known: HashMap<IpAddr, Instant>,
    named: Vec<IpAddr>,
}

/// What a source is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Stranger,
    Known,
    Named,
}

impl Table {
    fn class(&self, source: IpAddr, now: Instant) -> Class {
        if self.named.contains(&source) {
            return Class::Named;
        }
        match self.known.get(&source) {
            Some(until) if *until > now => Class::Known,
            _ => Class::Stranger,
        }
    }
}

/// The place of one connection, given back when dropped.
#[derive(Debug)]
pub struct HalfOpenPlace {
    half_open: Arc<HalfOpen>,
    source: IpAddr,
    stranger: bool,
}

impl HalfOpen {
    /// At most `max` places, `per_source_max` of them for one source that nobody knows.
    pub fn new(per_source_max: usize, max: usize) -> Arc<Self> {
        Arc::new(Self {
            per_source_max,
            max,
            table: Mutex::default(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection; `None`: close it.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Option<HalfOpenPlace> {
        self.enter_at(address, Instant::now())
    }

    fn enter_at(self: &Arc<Self>, address: IpAddr, now: Instant) -> Option<HalfOpenPlace> {
        let source = source_of(address);
        let mut table = self.table();
        let of_source = table.sources.get(&source).copied().unwrap_or(0);
        let class = table.class(source, now);
        let strangers_max = (self.max / STRANGERS_PART).max(1);
        let has_room = table.all < self.max
            && match class {
                // With few places in all a source has no more than half of those of strangers.
                Class::Stranger => {
                    table.strangers < strangers_max
                        && of_source < self.per_source_max.min((strangers_max / 2).max(1))
                }
                Class::Known => of_source < self.per_source_max.max(self.max / KNOWN_PART),
                Class::Named => true,
            };
        if !has_room {
            return None;
        }
        let stranger = class == Class::Stranger;
        table.all += 1;
        table.strangers += usize::from(stranger);
        table.sources.insert(source, of_source + 1);
        drop(table);
        Some(HalfOpenPlace {
            half_open: Arc::clone(self),
            source,
            stranger,
        })
    }

    /// Sources that the control plane vouches for, all of them: gateways of the own network.
    pub fn name(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        let named = addresses.into_iter().map(source_of).collect();
        self.table().named = named;
    }
}

impl HalfOpenPlace {
    /// The connection has shown a certificate that is good: its source is known from now on.
    pub fn proven(self) {
        self.proven_at(Instant::now());
    }

    fn proven_at(self, now: Instant) {
        let mut table = self.half_open.table();
        if table.known.len() >= KNOWN_MAX && !table.known.contains_key(&self.source) {
            table.known.retain(|_, until| *until > now);
        }
        if table.known.len() < KNOWN_MAX || table.known.contains_key(&self.source) {
            table.known.insert(self.source, now + KNOWN_FOR);
        }
    }
}

impl Drop for HalfOpenPlace {
    fn drop(&mut self) {
        let mut table = self.half_open.table();
        table.all -= 1;
        table.strangers -= usize::from(self.stranger);
        if let Some(count) = table.sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                table.sources.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_given_back() {
        let half_open = HalfOpen::new(2, 8);
        let enter = |address: &str| half_open.enter(address.parse().unwrap());
        let first = enter("192.0.2.1");
        let second = enter("::ffff:192.0.2.1");
        assert!(first.is_some() && second.is_some() && enter("192.0.2.1").is_none());
        let (third, fourth) = (enter("2001:db8::1"), enter("192.0.2.3"));
        assert!(
            third.is_some() && fourth.is_some() && enter("192.0.2.4").is_none(),
            "of all strangers"
        );
        drop(first);
        let fifth = enter("2001:db8::2");
        assert!(fifth.is_some());
        drop(second);
        assert!(enter("2001:db8::ffff").is_none(), "one /64 is one source");
        assert!(enter("2001:db8:0:1::1").is_some());
        drop((third, fourth, fifth));
        let table = half_open.table();
        assert!(table.all == 0 && table.strangers == 0 && table.sources.is_empty());
    }

    #[test]
    fn who_has_shown_a_certificate_is_no_stranger_for_a_while() {
        let half_open = HalfOpen::new(2, 16);
        let now = Instant::now();
        let count = |address: &str, now| {
            let address = address.parse().unwrap();
            let held: Vec<_> = std::iter::from_fn(|| half_open.enter_at(address, now)).collect();
            held.len()
        };
        assert_eq!(count("192.0.2.1", now), 2);
        half_open
            .enter_at("192.0.2.1".parse().unwrap(), now)
            .unwrap()
            .proven_at(now);
        assert_eq!(count("192.0.2.1", now), 4, "a part of all");
        assert_eq!(count("192.0.2.2", now), 2, "nobody else");
        assert_eq!(count("192.0.2.1", now + KNOWN_FOR), 2, "it was long ago");
        half_open.name(["192.0.2.9".parse().unwrap()]);
        assert_eq!(count("192.0.2.9", now), 16);
        half_open.name([]);
        assert_eq!(count("192.0.2.9", now), 2, "not a gateway any more");
    }

    #[test]
    fn strangers_leave_places_to_those_who_are_known() {
        let half_open = HalfOpen::new(2, 16);
        let now = Instant::now();
        let enter = |address: String| half_open.enter_at(address.parse().unwrap(), now);
        enter("192.0.2.1".to_owned()).unwrap().proven_at(now);
        let strangers: Vec<_> = (0..100)
            .filter_map(|n| enter(format!("198.51.100.{n}")))
            .collect();
        assert_eq!(strangers.len(), 8);
        let known: Vec<_> = (0..9).filter_map(|_| enter("192.0.2.1".to_owned())).collect();
        assert_eq!(known.len(), 4);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let half_open = HalfOpen::new(2, 16);
        let now = Instant::now();
        for n in 0..u32::try_from(KNOWN_MAX).unwrap() + 10 {
            let address = std::net::Ipv4Addr::from(0x0a00_0000 + n);
            half_open.enter_at(address.into(), now).unwrap().proven_at(now);
        }
        assert_eq!(half_open.table().known.len(), KNOWN_MAX);
        let later = now + KNOWN_FOR;
        let place = half_open.enter_at("192.0.2.1".parse().unwrap(), later).unwrap();
        place.proven_at(later);
        assert_eq!(half_open.table().known.len(), 1);
    }
}
