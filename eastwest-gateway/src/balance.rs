//! Which endpoint of a service takes the next call, from what this gateway has seen of each.
//!
//! One that cannot be reached rests, longer each time, and comes back by one call: only when that one was taken does it
//! get others, few at first. So the loss of one endpoint costs a call or two, and its return is no flood.

use crate::route::Endpoint;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// Rest after the first failure; doubled with each further one.
const REST_MIN: Duration = Duration::from_secs(1);
/// Longest rest: discovery takes an endpoint out long before, if it is really gone.
const REST_MAX: Duration = Duration::from_secs(30);
/// So long an endpoint that has come back gets fewer calls than the others, growing with time.
const RETURN: Duration = Duration::from_secs(5);
/// Share of its capacity with which it begins, percent. Source: Envoy's slow start.
const RETURN_MIN_PERCENT: u64 = 10;
/// Below this share of endpoints that do not rest, percent, rests are not believed: so many do not fail at once, and those
/// that are left would be flooded. Source: Envoy's default panic threshold.
const PANIC_PERCENT: usize = 50;
/// With fewer endpoints no share is a mass event: two of three hosts do fail.
const PANIC_ENDPOINTS_MIN: usize = 4;
/// What is remembered of an endpoint that nobody asks for any more.
const MEMORY: Duration = Duration::from_secs(120);

/// What this gateway has seen of endpoints, by uid.
#[derive(Debug, Default)]
pub(crate) struct Balance {
    seen: Mutex<HashMap<Arc<str>, Seen>>,
    turn: AtomicU64,
}

#[derive(Debug, Default)]
struct Seen {
    open: u64,
    failures: u32,
    rests_until: Option<Instant>,
    /// It took a call again after failures.
    returned: Option<Instant>,
}

/// How an endpoint stands now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// Its rest is over: the next call finds out, and the others go elsewhere meanwhile.
    Trial,
    Serving,
    Resting,
}

impl Seen {
    fn standing(&self, now: Instant) -> Standing {
        match self.rests_until {
            None => Standing::Serving,
            Some(until) if now < until || self.open > 0 => Standing::Resting,
            Some(_) => Standing::Trial,
        }
    }

    /// Share of the capacity that it may use, percent.
    fn percent(&self, now: Instant) -> u64 {
        let Some(returned) = self.returned else { return 100 };
        let elapsed = now.saturating_duration_since(returned).as_millis();
        let percent = elapsed * 100 / RETURN.as_millis();
        u64::try_from(percent)
            .unwrap_or(100)
            .clamp(RETURN_MIN_PERCENT, 100)
    }
}

/// An endpoint to try, in order.
#[derive(Debug, Clone)]
pub(crate) struct Pick {
    pub(crate) endpoint: Endpoint,
    /// It has failed lately: not to be waited for as long as others.
    pub(crate) trial: bool,
}

impl Balance {
    fn seen(&self) -> MutexGuard<'_, HashMap<Arc<str>, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with another one each time.
    pub(crate) fn rotate<T>(&self, endpoints: &mut [T]) {
        let turn = usize::try_from(self.turn.fetch_add(1, Ordering::Relaxed)).unwrap_or_default();
        endpoints.rotate_left(turn % endpoints.len().max(1));
    }

    /// The order in which to try endpoints: by what they carry for their capacity, among equals another one each time, those
    /// that rest last.
    pub(crate) fn order(&self, mut endpoints: Vec<Endpoint>, now: Instant) -> Vec<Pick> {
        self.rotate(&mut endpoints);
        let unknown = Seen::default();
        let seen = self.seen();
        let mut keyed: Vec<(Standing, u128, Endpoint)> = endpoints
            .into_iter()
            .map(|endpoint| {
                let seen = seen.get(&endpoint.workload.uid).unwrap_or(&unknown);
                let capacity = u64::from(endpoint.workload.capacity.max(1)) * seen.percent(now);
                // As a fraction of 2^64, so that capacities of any size still differ.
                let share = (u128::from(seen.open + 1) << 64) / u128::from(capacity.max(1));
                (seen.standing(now), share, endpoint)
            })
            .collect();
        drop(seen);
        let resting = keyed
            .iter()
            .filter(|(standing, ..)| *standing == Standing::Resting)
            .count();
        let panic =
            keyed.len() >= PANIC_ENDPOINTS_MIN && (keyed.len() - resting) * 100 < keyed.len() * PANIC_PERCENT;
        keyed.sort_by_key(|(standing, share, _)| {
            let standing = if panic { Standing::Serving } else { *standing };
            (standing, *share)
        });
        keyed
            .into_iter()
            .map(|(standing, _, endpoint)| Pick {
                endpoint,
                trial: standing != Standing::Serving,
            })
            .collect()
    }

    /// Counts a call at an endpoint until the guard is dropped.
    pub(crate) fn open(self: &Arc<Self>, uid: &Arc<str>) -> Open {
        self.seen().entry(Arc::clone(uid)).or_default().open += 1;
        Open {
            balance: Arc::clone(self),
            uid: Arc::clone(uid),
        }
    }

    /// It could not be reached.
    pub(crate) fn failed(&self, uid: &Arc<str>, now: Instant) {
        let mut seen = self.seen();
        let seen = seen.entry(Arc::clone(uid)).or_default();
        // Calls that failed together are one failure.
        if seen.rests_until.is_none_or(|until| until <= now) {
            let rest = REST_MIN.saturating_mul(1 << seen.failures.min(5)).min(REST_MAX);
            seen.rests_until = Some(now + rest);
            seen.failures += 1;
            seen.returned = None;
        }
    }

    /// It took a call.
    pub(crate) fn succeeded(&self, uid: &Arc<str>, now: Instant) {
        if let Some(seen) = self.seen().get_mut(uid)
            && seen.failures > 0
        {
            seen.failures = 0;
            seen.rests_until = None;
            seen.returned = Some(now);
        }
    }

    /// Endpoints that rest now.
    pub(crate) fn resting(&self, now: Instant) -> usize {
        let seen = self.seen();
        seen.values()
            .filter(|seen| seen.standing(now) == Standing::Resting)
            .count()
    }

    /// Forgets what does not matter any more.
    pub(crate) fn forget(&self, now: Instant) {
        self.seen().retain(|_, seen| {
            let resting = seen.rests_until.is_some_and(|until| now < until + MEMORY);
            let returning = seen.returned.is_some_and(|returned| now < returned + RETURN);
            seen.open > 0 || resting || returning
        });
    }
}

/// See [`Balance::open`].
#[derive(Debug)]
pub(crate) struct Open {
    balance: Arc<Balance>,
    uid: Arc<str>,
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut seen = self.balance.seen();
        if let Some(entry) = seen.get_mut(&self.uid) {
            entry.open = entry.open.saturating_sub(1);
            if entry.open == 0 && entry.rests_until.is_none() && entry.returned.is_none() {
                seen.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests;
