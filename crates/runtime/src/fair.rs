//! Shares of something scarce among sources that nobody knows yet: places, and uses a second. Pure bookkeeping with `now`
//! given.
//!
//! A source may take more only as long as it holds less than a part of what is left. So a few sources that ask without
//! end settle at a share each and always leave something: one that asks for the first time is served, until there are
//! about as many greedy sources as places.
//!
//! Source: dynamic queue thresholds of shared-memory switches (Choudhury and Hahne, 1998).

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Sources that a [`Rate`] remembers at most, about 64 bytes each. Those at rest are forgotten first.
pub const SOURCES_MAX: usize = 32_768;
/// Part of the free places that one source may hold: who holds one takes a second only while 16 are free.
const PLACES_PART: usize = 16;
/// Part of the uses left that one source may have had: they come back all the time, so a few are enough for new ones.
const USES_PART: f64 = 2.0;
/// A use counts for about so long: what may be used a second may be used twice over after a pause.
const MEMORY_SECONDS: f64 = 2.0;
/// What is left of a use when it is forgotten.
const REST: f64 = 0.05;
/// How often those at rest are looked for while the table is full.
const SWEEP: Duration = Duration::from_secs(1);

/// One source: IPv4-mapped addresses are IPv4, and one IPv6 /64 is one source, for a host has as many addresses of it as
/// it likes.
pub fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

/// Things that are held for a while: connections, or turns.
#[derive(Debug)]
pub struct Places {
    max: usize,
    per_source_max: usize,
    table: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    all: usize,
    sources: BTreeMap<IpAddr, usize>,
}

/// One place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    source: IpAddr,
}

impl Places {
    /// At most `max` places, `per_source_max` of them for one source.
    pub fn new(max: usize, per_source_max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            per_source_max,
            table: Mutex::default(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Held> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for `address`, or `None`.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let source = source_of(address);
        let mut table = self.table();
        let free = self.max.saturating_sub(table.all);
        let of_source = table.sources.get(&source).copied().unwrap_or(0);
        if free == 0 || of_source >= self.per_source_max.min((free / PLACES_PART).max(1)) {
            return None;
        }
        table.all += 1;
        table.sources.insert(source, of_source + 1);
        drop(table);
        Some(Place {
            places: Arc::clone(self),
            source,
        })
    }

    /// How many are held.
    pub fn held(&self) -> usize {
        self.table().all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.places.table();
        table.all -= 1;
        if let Some(count) = table.sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                table.sources.remove(&self.source);
            }
        }
    }
}

/// Uses a second.
#[derive(Debug)]
pub struct Rate {
    per_second: f64,
    per_source: f64,
    table: Mutex<Used>,
}

#[derive(Debug)]
struct Used {
    left: f64,
    at: Option<Instant>,
    swept: Option<Instant>,
    sources: BTreeMap<IpAddr, Recent>,
}

/// What a source has used lately.
#[derive(Debug, Clone, Copy)]
struct Recent {
    uses: f64,
    at: Instant,
}

impl Recent {
    fn uses_at(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.at).as_secs_f64();
        self.uses * (-age / MEMORY_SECONDS).exp()
    }
}

impl Rate {
    /// `per_second` uses by all sources, `per_source` of them by one; twice as many after a pause.
    pub fn new(per_second: u32, per_source: u32) -> Self {
        let per_second = f64::from(per_second);
        Self {
            per_second,
            per_source: f64::from(per_source),
            table: Mutex::new(Used {
                left: per_second * MEMORY_SECONDS,
                at: None,
                swept: None,
                sources: BTreeMap::new(),
            }),
        }
    }

    /// One use by `address`; false: not now.
    pub fn take(&self, address: IpAddr, now: Instant) -> bool {
        let source = source_of(address);
        let mut used = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = used
            .at
            .map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        used.left = (used.left + passed * self.per_second).min(self.per_second * MEMORY_SECONDS);
        used.at = Some(now);
        if used.left < 1.0 {
            return false;
        }
        let share = (used.left / USES_PART)
            .max(1.0)
            .min(self.per_source * MEMORY_SECONDS);
        let uses = used
            .sources
            .get(&source)
            .map_or(0.0, |recent| recent.uses_at(now));
        if uses >= share || !used.has_room(source, now) {
            return false;
        }
        used.left -= 1.0;
        used.sources.insert(
            source,
            Recent {
                uses: uses + 1.0,
                at: now,
            },
        );
        true
    }
}

impl Used {
    fn has_room(&mut self, source: IpAddr, now: Instant) -> bool {
        if self.sources.len() < SOURCES_MAX || self.sources.contains_key(&source) {
            return true;
        }
        if self
            .swept
            .is_none_or(|at| now.saturating_duration_since(at) >= SWEEP)
        {
            self.swept = Some(now);
            self.sources.retain(|_, recent| recent.uses_at(now) > REST);
        }
        self.sources.len() < SOURCES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u32) -> IpAddr {
        IpAddr::V4((0x0a00_0000 + n).into())
    }

    #[test]
    fn one_source_does_not_take_all_places_and_gives_them_back() {
        let places = Places::new(1000, 10);
        let held: Vec<_> = (0..10).map(|_| places.enter(ip(1)).unwrap()).collect();
        assert!(places.enter("::ffff:10.0.0.1".parse().unwrap()).is_none());
        assert!(places.enter(ip(2)).is_some());
        drop(held);
        assert!(places.enter(ip(1)).is_some());
        // One /64 is one source.
        let v6 = |text: &str| places.enter(text.parse().unwrap());
        let held: Vec<_> = (0..10).map(|i| v6(&format!("2001:db8::{i}")).unwrap()).collect();
        assert!(v6("2001:db8::ffff").is_none() && v6("2001:db8:0:1::1").is_some());
        drop(held);
        assert!(places.held() == 0 && places.table().sources.is_empty());
    }

    #[test]
    fn greedy_sources_leave_places_for_new_ones() {
        for greedy in [10, 100, 500, 900] {
            let places = Places::new(1000, 64);
            let mut held = Vec::new();
            for _ in 0..64 {
                held.extend((0..greedy).filter_map(|n| places.enter(ip(n))));
            }
            assert!(held.len() <= 1000);
            for newcomer in 0..5 {
                held.push(places.enter(ip(5000 + newcomer)).unwrap_or_else(|| {
                    panic!(
                        "{newcomer} beside {greedy} greedy sources, {} held",
                        places.held()
                    )
                }));
            }
        }
    }

    #[test]
    fn a_source_has_its_rate_and_twice_that_after_a_pause() {
        let (rate, now) = (Rate::new(10_000, 100), Instant::now());
        assert_eq!((0..1000).filter(|_| rate.take(ip(1), now)).count(), 200);
        // Asked all the time it gets its rate.
        let later: usize = (1..=1000)
            .map(|ms| now + Duration::from_millis(ms))
            .map(|at| (0..5).filter(|_| rate.take(ip(1), at)).count())
            .sum();
        assert!((90..=110).contains(&later), "{later} in a second");
        assert!(rate.take(ip(2), now + Duration::from_secs(1)));
    }

    #[test]
    fn greedy_sources_share_the_rate_and_leave_some_of_it() {
        for greedy in [1, 8, 40, 200] {
            let (rate, now) = (Rate::new(500, 100), Instant::now());
            let (mut taken, mut refused, mut newcomers) = (0, 0, 0_u32);
            for ms in 0..5000_u64 {
                let at = now + Duration::from_millis(ms);
                let count = (0..greedy).filter(|&n| rate.take(ip(n), at)).count();
                taken += count;
                if ms % 50 == 0 {
                    newcomers += 1;
                    refused += usize::from(!rate.take(ip(100_000 + newcomers), at));
                }
            }
            assert!(taken <= 1000 + 5 * 500, "{taken} uses by {greedy} sources");
            assert_eq!(
                refused, 0,
                "of {newcomers} newcomers beside {greedy} greedy sources"
            );
        }
    }

    #[test]
    fn a_flood_of_sources_is_forgotten_when_at_rest() {
        let rate = Rate::new(1_000_000, 10);
        let mut now = Instant::now();
        for n in 0..3 * SOURCES_MAX as u32 {
            if (n as usize).is_multiple_of(SOURCES_MAX) {
                now += Duration::from_secs(60);
            }
            assert!(rate.take(ip(n), now), "{n}");
        }
        assert!(rate.table.lock().unwrap().sources.len() <= SOURCES_MAX);
        let now = now + Duration::from_millis(1);
        assert!(
            (0..10).all(|n| !rate.take(ip(10_000_000 + n), now)),
            "the table is full of active ones"
        );
    }
}
