//! How much one source may ask of the listener before it has shown who it is: pure bookkeeping with `now` given.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// Half-open handshakes of one source: a thousand agents behind one NAT come through in turns.
pub const HALF_OPEN_PER_SOURCE_MAX: usize = 64;
/// Half-open handshakes in all. Each holds a socket and a ClientHello of at most 16 KiB.
pub const HALF_OPEN_MAX: usize = 2048;
/// Connections of one source that are through their handshake without a client certificate.
pub const NAMELESS_PER_SOURCE_MAX: usize = 256;
/// And of all sources: hosts that enrol or come back after an absence, and clients with a bearer token.
pub const NAMELESS_MAX: usize = 4096;
/// Uses of the private key that one source gets a second.
const KEY_USES_PER_SECOND: f64 = 100.0;
/// And at once after a pause.
const KEY_USES_BURST: f64 = 300.0;
/// Sources remembered at most; those at rest are forgotten first.
const SOURCES_MAX: usize = 16_384;

const _: () = assert!(
    HALF_OPEN_MAX * 16 * 1024 <= 64 << 20,
    "ClientHellos of half-open handshakes stay under 64 MiB"
);

#[derive(Debug)]
struct Source {
    half_open: usize,
    nameless: usize,
    tokens: f64,
    at: Instant,
}

#[derive(Debug, Default)]
struct Table {
    sources: BTreeMap<IpAddr, Source>,
    half_open: usize,
    nameless: usize,
}

/// The limits of one listener. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Limits(Arc<Mutex<Table>>);

/// A place among the half-open handshakes, given back on drop.
#[derive(Debug)]
pub struct HalfOpen {
    limits: Limits,
    source: IpAddr,
}

/// A place among the connections without a client certificate, given back on drop.
#[derive(Debug)]
pub struct Nameless {
    limits: Limits,
    source: IpAddr,
}

/// IPv4-mapped addresses are IPv4, and one IPv6 /64 is one source.
pub(crate) fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => {
            let s = v6.segments();
            IpAddr::V6(Ipv6Addr::new(s[0], s[1], s[2], s[3], 0, 0, 0, 0))
        }
    }
}

impl Limits {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection, or `None`: close it.
    pub fn admit(&self, address: IpAddr, now: Instant) -> Option<HalfOpen> {
        let key = source_of(address);
        let mut table = self.table();
        if table.half_open >= HALF_OPEN_MAX {
            return None;
        }
        if table.sources.len() >= SOURCES_MAX && !table.sources.contains_key(&key) {
            table
                .sources
                .retain(|_, s| s.half_open > 0 || s.nameless > 0 || refill(s, now) < KEY_USES_BURST);
            if table.sources.len() >= SOURCES_MAX {
                return None;
            }
        }
        let source = table.sources.entry(key).or_insert(Source {
            half_open: 0,
            nameless: 0,
            tokens: KEY_USES_BURST,
            at: now,
        });
        if source.half_open >= HALF_OPEN_PER_SOURCE_MAX {
            return None;
        }
        source.half_open += 1;
        table.half_open += 1;
        drop(table);
        Some(HalfOpen {
            limits: self.clone(),
            source: key,
        })
    }
}

fn refill(source: &Source, now: Instant) -> f64 {
    let gained = now.saturating_duration_since(source.at).as_secs_f64() * KEY_USES_PER_SECOND;
    (source.tokens + gained).min(KEY_USES_BURST)
}

impl HalfOpen {
    /// One use of the private key; false: the source has had its share, close the connection.
    pub fn use_key(&self, now: Instant) -> bool {
        let mut table = self.limits.table();
        let Some(source) = table.sources.get_mut(&self.source) else {
            return false;
        };
        let tokens = refill(source, now);
        source.at = now;
        source.tokens = if tokens >= 1.0 { tokens - 1.0 } else { tokens };
        tokens >= 1.0
    }

    /// A place for the connection after its handshake, when it has shown no certificate, or `None`: close it.
    pub fn nameless(&self) -> Option<Nameless> {
        let mut table = self.limits.table();
        if table.nameless >= NAMELESS_MAX {
            return None;
        }
        let source = table.sources.get_mut(&self.source)?;
        if source.nameless >= NAMELESS_PER_SOURCE_MAX {
            return None;
        }
        source.nameless += 1;
        table.nameless += 1;
        Some(Nameless {
            limits: self.limits.clone(),
            source: self.source,
        })
    }
}

impl Drop for Nameless {
    fn drop(&mut self) {
        let mut table = self.limits.table();
        table.nameless -= 1;
        if let Some(source) = table.sources.get_mut(&self.source) {
            source.nameless -= 1;
        }
    }
}

impl Drop for HalfOpen {
    fn drop(&mut self) {
        let mut table = self.limits.table();
        table.half_open -= 1;
        if let Some(source) = table.sources.get_mut(&self.source) {
            source.half_open -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_source_cannot_take_all_places() {
        let (limits, now) = (Limits::default(), Instant::now());
        let held: Vec<_> = (0..HALF_OPEN_PER_SOURCE_MAX)
            .map(|_| limits.admit(ip("192.0.2.1"), now).unwrap())
            .collect();
        assert!(limits.admit(ip("::ffff:192.0.2.1"), now).is_none());
        assert!(limits.admit(ip("192.0.2.2"), now).is_some());
        drop(held);
        assert!(limits.admit(ip("192.0.2.1"), now).is_some());
        // One /64 is one source.
        let held: Vec<_> = (0..HALF_OPEN_PER_SOURCE_MAX as u16)
            .map(|i| {
                limits
                    .admit(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, i)), now)
                    .unwrap()
            })
            .collect();
        assert!(
            limits.admit(ip("2001:db8::ffff"), now).is_none()
                && limits.admit(ip("2001:db8:0:1::1"), now).is_some()
        );
        drop(held);
    }

    #[test]
    fn who_shows_no_certificate_does_not_take_all_connections() {
        let (limits, now) = (Limits::default(), Instant::now());
        let held: Vec<_> = (0..NAMELESS_PER_SOURCE_MAX)
            .map(|_| limits.admit(ip("192.0.2.1"), now).unwrap().nameless().unwrap())
            .collect();
        let place = limits.admit(ip("192.0.2.1"), now).unwrap();
        assert!(place.nameless().is_none());
        assert!(limits.admit(ip("192.0.2.2"), now).unwrap().nameless().is_some());
        drop(held);
        assert!(place.nameless().is_some());
        assert_eq!(limits.table().nameless, 0);
    }

    #[test]
    fn the_private_key_is_used_at_a_bounded_rate() {
        let (limits, now) = (Limits::default(), Instant::now());
        let place = limits.admit(ip("192.0.2.1"), now).unwrap();
        let uses = (0..1000).filter(|_| place.use_key(now)).count();
        assert_eq!(uses, KEY_USES_BURST as usize);
        let later = now + Duration::from_millis(500);
        assert_eq!(
            (0..1000).filter(|_| place.use_key(later)).count(),
            (KEY_USES_PER_SECOND / 2.0) as usize
        );
    }

    #[test]
    fn a_flood_of_sources_is_forgotten_when_at_rest() {
        let (limits, now) = (Limits::default(), Instant::now());
        for i in 0..SOURCES_MAX as u32 + 10 {
            assert!(
                limits.admit(IpAddr::V4((0x0a00_0000 + i).into()), now).is_some(),
                "{i}"
            );
        }
        assert!(limits.table().sources.len() <= SOURCES_MAX && limits.table().half_open == 0);
    }
}
