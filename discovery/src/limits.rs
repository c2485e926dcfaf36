//! How much one source may ask of discovery before it has shown who it is. Pure bookkeeping with `now` given.
//!
//! Sources from which a member has shown its certificate lately are served apart from strangers: whatever these do, they
//! do not take a member's places, turns or uses of the private key. Among strangers nobody takes all
//! ([`tombolo_runtime::fair`]).

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
pub(crate) use tombolo_runtime::fair::source_of;
use tombolo_runtime::fair::{Place, Places, Rate};

/// Half-open handshakes of one source: a thousand agents behind one NAT come through in turns.
pub const HALF_OPEN_PER_SOURCE_MAX: usize = 64;
/// Half-open handshakes of all strangers, and as many of all known sources. Each holds a socket and a ClientHello of at
/// most 16 KiB.
pub const HALF_OPEN_MAX: usize = 2048;
/// Connections of one gateway that have not said yet where they come from: they do at once.
pub const GATEWAY_PENDING_MAX: usize = 256;
/// And of all gateways.
const GATEWAYS_PENDING_MAX: usize = 8192;
/// Connections of one source that are through their handshake without a client certificate.
pub const NAMELESS_PER_SOURCE_MAX: usize = 240;
/// And of all sources: hosts that enrol or come back after an absence, and clients with a bearer token.
pub const NAMELESS_MAX: usize = 4096;
/// Uses of the private key that one source gets a second; twice as many after a pause.
pub const KEY_USES_PER_SOURCE: u32 = 100;
/// And all strangers together: about a sixth of a core.
pub const KEY_USES_OF_STRANGERS: u32 = 500;
/// And all known sources together: a mesh that comes back is let in as fast as a core computes.
pub const KEY_USES_OF_MEMBERS: u32 = 3000;
/// Sources of members that are remembered; those that were not heard of for longest are forgotten first.
const KNOWN_MAX: usize = 65_536;
/// A member renews within this.
const KNOWN_FOR: Duration = Duration::from_secs(48 * 3600);

const _: () = assert!(
    2 * HALF_OPEN_MAX * 16 * 1024 <= 64 << 20,
    "ClientHellos of half-open handshakes stay under 64 MiB"
);

/// The limits of one listener. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limits(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    gateways: Arc<Places>,
    strangers: Class,
    members: Class,
    nameless: Arc<Places>,
    known: Mutex<BTreeMap<IpAddr, Instant>>,
    said: Mutex<Option<Instant>>,
}

/// What strangers, and what known sources have.
#[derive(Debug)]
struct Class {
    half_open: Arc<Places>,
    key_uses: Rate,
}

impl Class {
    fn new(key_uses: u32) -> Self {
        Self {
            half_open: Places::new(HALF_OPEN_MAX, HALF_OPEN_PER_SOURCE_MAX),
            key_uses: Rate::new(key_uses, KEY_USES_PER_SOURCE),
        }
    }
}

/// A place among the half-open handshakes, given back on drop.
#[derive(Debug)]
pub struct HalfOpen {
    limits: Limits,
    source: IpAddr,
    known: bool,
    _place: Place,
}

impl Default for Limits {
    fn default() -> Self {
        Self(Arc::new(Shared {
            gateways: Places::new(GATEWAYS_PENDING_MAX, GATEWAY_PENDING_MAX),
            strangers: Class::new(KEY_USES_OF_STRANGERS),
            members: Class::new(KEY_USES_OF_MEMBERS),
            nameless: Places::new(NAMELESS_MAX, NAMELESS_PER_SOURCE_MAX),
            known: Mutex::default(),
            said: Mutex::default(),
        }))
    }
}

impl Limits {
    fn known(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Instant>> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn class(&self, known: bool) -> &Class {
        if known { &self.0.members } else { &self.0.strangers }
    }

    /// A place for a connection of a gateway that has still to say where it comes from, or `None`: close it.
    pub fn gateway(&self, address: IpAddr) -> Option<Place> {
        self.0.gateways.enter(address)
    }

    /// A place for a new connection, or `None`: close it. `listed`: a member's address, whether it was seen here or not.
    pub fn admit(&self, address: IpAddr, listed: bool, now: Instant) -> Option<HalfOpen> {
        let known = listed || self.is_known(address, now);
        Some(HalfOpen {
            limits: self.clone(),
            source: address,
            known,
            _place: self.class(known).half_open.enter(address)?,
        })
    }

    /// True at most once in `interval`: what a stranger can bring about at will is not said every time.
    pub fn may_say(&self, interval: Duration, now: Instant) -> bool {
        let mut said = self.0.said.lock().unwrap_or_else(PoisonError::into_inner);
        let may = said.is_none_or(|at| now.saturating_duration_since(at) >= interval);
        if may {
            *said = Some(now);
        }
        may
    }

    fn is_known(&self, address: IpAddr, now: Instant) -> bool {
        let heard = self.known().get(&source_of(address)).copied();
        heard.is_some_and(|at| now.saturating_duration_since(at) < KNOWN_FOR)
    }

    /// A member has shown its certificate from this address.
    pub fn has_shown(&self, address: IpAddr, now: Instant) {
        let source = source_of(address);
        let mut known = self.known();
        if known.len() >= KNOWN_MAX && !known.contains_key(&source) {
            known.retain(|_, at| now.saturating_duration_since(*at) < KNOWN_FOR);
            if known.len() >= KNOWN_MAX
                && let Some(oldest) = known.iter().min_by_key(|(_, at)| **at).map(|(source, _)| *source)
            {
                known.remove(&oldest);
            }
        }
        known.insert(source, now);
    }
}

impl HalfOpen {
    /// One use of the private key; false: the source has had its share, close the connection.
    pub fn use_key(&self, now: Instant) -> bool {
        self.limits.class(self.known).key_uses.take(self.source, now)
    }

    /// A place for the connection after its handshake, when it has shown no certificate, or `None`: close it.
    pub fn nameless(&self) -> Option<Place> {
        self.limits.0.nameless.enter(self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn stranger(n: u32) -> IpAddr {
        IpAddr::V4((0xc633_0000 + n).into())
    }

    #[test]
    fn one_source_cannot_take_all_places() {
        let (limits, now) = (Limits::default(), Instant::now());
        let admit = |text: &str| limits.admit(ip(text), false, now);
        let held: Vec<_> = (0..HALF_OPEN_PER_SOURCE_MAX)
            .map(|_| admit("192.0.2.1").unwrap())
            .collect();
        assert!(admit("::ffff:192.0.2.1").is_none());
        assert!(admit("192.0.2.2").is_some());
        drop(held);
        assert!(admit("192.0.2.1").is_some());
        let held: Vec<_> = (0..GATEWAY_PENDING_MAX)
            .map(|_| limits.gateway(ip("192.0.2.9")).unwrap())
            .collect();
        assert!(limits.gateway(ip("192.0.2.9")).is_none() && limits.gateway(ip("192.0.2.8")).is_some());
        drop(held);
    }

    #[test]
    fn who_shows_no_certificate_does_not_take_all_connections() {
        let (limits, now) = (Limits::default(), Instant::now());
        let held: Vec<_> = (0..NAMELESS_PER_SOURCE_MAX / 2)
            .map(|_| {
                limits
                    .admit(ip("192.0.2.1"), false, now)
                    .unwrap()
                    .nameless()
                    .unwrap()
            })
            .collect();
        let others: Vec<_> = (0..NAMELESS_MAX as u32)
            .filter_map(|n| limits.admit(stranger(n % 40), false, now)?.nameless())
            .collect();
        assert!(others.len() > NAMELESS_MAX / 2, "{}", others.len());
        let newcomer = limits.admit(ip("192.0.2.2"), false, now).unwrap();
        assert!(newcomer.nameless().is_some());
        drop((held, others));
        assert_eq!(limits.0.nameless.held(), 0);
    }

    #[test]
    fn the_private_key_is_used_at_a_bounded_rate() {
        let (limits, now) = (Limits::default(), Instant::now());
        let place = limits.admit(ip("192.0.2.1"), false, now).unwrap();
        let most = 2 * KEY_USES_PER_SOURCE as usize;
        assert_eq!((0..1000).filter(|_| place.use_key(now)).count(), most);
        assert!(!place.use_key(now));
        assert!(place.use_key(now + Duration::from_millis(500)));
    }

    #[test]
    fn a_flood_of_strangers_delays_no_member() {
        let (limits, now) = (Limits::default(), Instant::now());
        limits.has_shown(ip("203.0.113.7"), now);
        // More sources than places, each with as many handshakes and uses of the key as it gets.
        let held: Vec<_> = (0..4 * HALF_OPEN_MAX as u32)
            .filter_map(|n| limits.admit(stranger(n), false, now))
            .collect();
        assert_eq!(held.len(), HALF_OPEN_MAX);
        let used = held.iter().filter(|place| place.use_key(now)).count();
        assert!(used <= 2 * KEY_USES_OF_STRANGERS as usize, "{used}");
        assert!(
            limits.admit(ip("203.0.113.8"), false, now).is_none(),
            "a stranger has to wait"
        );
        let member = limits.admit(ip("203.0.113.7"), false, now).unwrap();
        assert!(member.use_key(now) && member.nameless().is_some());
        // After a restart of discovery nobody has shown anything: the addresses of members are known all the same.
        let listed = limits.admit(ip("203.0.113.9"), true, now).unwrap();
        assert!(listed.use_key(now));
        // Who has not been heard of for long is a stranger again.
        let later = now + KNOWN_FOR;
        assert!(limits.admit(ip("203.0.113.7"), false, later).is_none());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (limits, now) = (Limits::default(), Instant::now());
        for n in 0..KNOWN_MAX as u32 {
            limits.has_shown(stranger(n), now + Duration::from_millis(n.into()));
        }
        let later = now + Duration::from_secs(3600);
        limits.has_shown(ip("203.0.113.7"), later);
        assert_eq!(limits.known().len(), KNOWN_MAX);
        assert!(limits.is_known(ip("203.0.113.7"), later) && !limits.is_known(stranger(0), later));
    }
}
