//! What this host has seen of endpoints itself: open connections and failures.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Rest after the first failure; doubled with each further one.
const EJECTION_MIN: Duration = Duration::from_secs(1);
/// Longest rest.
const EJECTION_MAX: Duration = Duration::from_secs(30);
/// Endpoints remembered. Over it those without open connections are forgotten: they are tried once more.
const ENDPOINTS_MAX: usize = 10_000;

/// Remembers endpoints by address and port. Cheap to clone; clones share the memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Endpoints(Arc<Mutex<HashMap<SocketAddr, Seen>>>);

#[derive(Debug, Default)]
struct Seen {
    open: u32,
    failures: u32,
    ejected_until: Option<Instant>,
}

impl Endpoints {
    fn seen(&self) -> MutexGuard<'_, HashMap<SocketAddr, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Open and opening connections.
    pub(crate) fn outstanding(&self, endpoint: SocketAddr) -> u32 {
        self.seen().get(&endpoint).map_or(0, |seen| seen.open)
    }

    /// True while it rests after failures.
    pub(crate) fn is_ejected(&self, endpoint: SocketAddr, now: Instant) -> bool {
        self.seen()
            .get(&endpoint)
            .and_then(|seen| seen.ejected_until)
            .is_some_and(|until| now < until)
    }

    /// Counts a connection until the guard is dropped.
    pub(crate) fn connect(&self, endpoint: SocketAddr) -> Outstanding {
        let mut seen = self.seen();
        if seen.len() >= ENDPOINTS_MAX && !seen.contains_key(&endpoint) {
            seen.retain(|_, seen| seen.open > 0);
        }
        seen.entry(endpoint).or_default().open += 1;
        Outstanding {
            endpoints: self.clone(),
            endpoint,
        }
    }

    /// It did not take a connection: it rests.
    pub(crate) fn failed(&self, endpoint: SocketAddr, now: Instant) {
        let mut seen = self.seen();
        let seen = seen.entry(endpoint).or_default();
        // Connections that failed together are one failure.
        if seen.ejected_until.is_none_or(|until| until <= now) {
            let rest = EJECTION_MIN
                .saturating_mul(1 << seen.failures.min(5))
                .min(EJECTION_MAX);
            seen.ejected_until = Some(now + rest);
            seen.failures += 1;
        }
    }

    /// It took a connection.
    pub(crate) fn succeeded(&self, endpoint: SocketAddr) {
        if let Some(seen) = self.seen().get_mut(&endpoint) {
            seen.failures = 0;
            seen.ejected_until = None;
        }
    }
}

/// See [`Endpoints::connect`].
#[derive(Debug)]
pub(crate) struct Outstanding {
    endpoints: Endpoints,
    endpoint: SocketAddr,
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        let mut seen = self.endpoints.seen();
        if let Some(entry) = seen.get_mut(&self.endpoint) {
            entry.open = entry.open.saturating_sub(1);
            if entry.open == 0 && entry.failures == 0 {
                seen.remove(&self.endpoint);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_and_end() {
        let endpoints = Endpoints::default();
        let endpoint = "10.0.0.1:80".parse().unwrap();
        let mut now = Instant::now();
        for rest in [1, 2, 4, 8, 16, 30, 30] {
            endpoints.failed(endpoint, now);
            endpoints.failed(endpoint, now); // at the same time: counts once
            assert!(endpoints.is_ejected(
                endpoint,
                now + Duration::from_secs(rest) - Duration::from_millis(1)
            ));
            now += Duration::from_secs(rest);
            assert!(!endpoints.is_ejected(endpoint, now), "{rest}");
        }
        endpoints.failed(endpoint, now);
        endpoints.succeeded(endpoint);
        assert!(!endpoints.is_ejected(endpoint, now));
        endpoints.failed(endpoint, now);
        assert!(
            !endpoints.is_ejected(endpoint, now + EJECTION_MIN),
            "the count starts again"
        );
    }

    #[test]
    fn outstanding_is_counted_and_forgotten() {
        let endpoints = Endpoints::default();
        let endpoint = "10.0.0.1:80".parse().unwrap();
        let guards = [endpoints.connect(endpoint), endpoints.connect(endpoint)];
        assert_eq!(endpoints.outstanding(endpoint), 2);
        drop(guards);
        assert_eq!(endpoints.outstanding(endpoint), 0);
        assert!(endpoints.seen().is_empty(), "nothing is left of it");
    }
}
