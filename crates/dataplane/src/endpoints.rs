//! What this host has seen of endpoints itself: open connections and failures.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use tombolo_destination::{Candidate, Gateway, Locality};
use tombolo_types::NamespacedName;

/// Rest after the first failure; doubled with each further one.
const EJECTION_MIN: Duration = Duration::from_secs(1);
/// Longest rest.
const EJECTION_MAX: Duration = Duration::from_secs(30);
/// After a rest one connection tries, and the others go elsewhere until it is known what came of it, at most so long:
/// more than one try takes ([`crate::Settings::gateway_timeout`]). Otherwise all of them would wait for what is still dead.
const TRIAL: Duration = Duration::from_secs(3);
/// Endpoints remembered. Over it those without open connections are forgotten: they are tried once more.
const ENDPOINTS_MAX: usize = 10_000;

/// What is remembered about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Spot {
    /// An endpoint of the own network.
    Endpoint(SocketAddr),
    /// What is behind the gateways of another network: all endpoints of a service at one place.
    Behind(Arc<Behind>),
    /// A gateway, by the uid of its record.
    Gateway(Arc<str>),
    /// A gateway as the way to one service: it may have an endpoint of one and none of another.
    Way(Arc<str>, Arc<Behind>),
}

/// See [`Spot::Behind`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Behind {
    service: NamespacedName,
    network: Arc<str>,
    locality: Locality,
}

impl Spot {
    /// Of a candidate for a service.
    pub(crate) fn of(candidate: &Candidate, service: &NamespacedName) -> Self {
        match &candidate.via {
            None => Self::Endpoint(candidate.address),
            Some(via) => Self::Behind(Arc::new(Behind {
                service: service.clone(),
                network: Arc::clone(&via.network),
                locality: candidate.workload.locality.clone(),
            })),
        }
    }

    /// Of a gateway.
    pub(crate) fn gateway(gateway: &Gateway) -> Self {
        Self::Gateway(Arc::clone(&gateway.uid))
    }

    /// Of a gateway as the way to this one.
    pub(crate) fn way(&self, gateway: &Gateway) -> Self {
        match self {
            Self::Behind(behind) => Self::Way(Arc::clone(&gateway.uid), Arc::clone(behind)),
            Self::Endpoint(_) | Self::Gateway(_) | Self::Way(..) => Self::gateway(gateway),
        }
    }
}

impl From<SocketAddr> for Spot {
    fn from(address: SocketAddr) -> Self {
        Self::Endpoint(address)
    }
}

/// Remembers endpoints and gateways. Cheap to clone; clones share the memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Endpoints(Arc<Mutex<HashMap<Spot, Seen>>>);

#[derive(Debug, Default)]
struct Seen {
    open: u32,
    failures: u32,
    ejected_until: Option<Instant>,
    /// The rest is over, and one connection tries.
    trial: bool,
}

impl Endpoints {
    fn seen(&self) -> MutexGuard<'_, HashMap<Spot, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Open and opening connections.
    pub(crate) fn outstanding(&self, endpoint: &Spot) -> u32 {
        self.seen().get(endpoint).map_or(0, |seen| seen.open)
    }

    /// True while it rests after failures.
    pub(crate) fn is_ejected(&self, endpoint: &Spot, now: Instant) -> bool {
        self.seen()
            .get(endpoint)
            .and_then(|seen| seen.ejected_until)
            .is_some_and(|until| now < until)
    }

    /// Counts a connection until the guard is dropped. The first one after a rest is the trial.
    pub(crate) fn connect(&self, endpoint: Spot, now: Instant) -> Outstanding {
        let mut seen = self.seen();
        if seen.len() >= ENDPOINTS_MAX && !seen.contains_key(&endpoint) {
            seen.retain(|_, seen| seen.open > 0);
        }
        let entry = seen.entry(endpoint.clone()).or_default();
        entry.open += 1;
        if entry.failures > 0 && entry.ejected_until.is_some_and(|until| until <= now) {
            entry.ejected_until = Some(now + TRIAL);
            entry.trial = true;
        }
        drop(seen);
        Outstanding {
            endpoints: self.clone(),
            endpoint,
        }
    }

    /// It did not take a connection: it rests.
    pub(crate) fn failed(&self, endpoint: Spot, now: Instant) {
        let mut seen = self.seen();
        let seen = seen.entry(endpoint).or_default();
        // Connections that failed together are one failure.
        if seen.trial || seen.ejected_until.is_none_or(|until| until <= now) {
            seen.trial = false;
            let rest = EJECTION_MIN
                .saturating_mul(1 << seen.failures.min(5))
                .min(EJECTION_MAX);
            seen.ejected_until = Some(now + rest);
            seen.failures += 1;
        }
    }

    /// It took a connection, or answered in another way that shows that it is there.
    pub(crate) fn succeeded(&self, endpoint: &Spot) {
        if let Some(seen) = self.seen().get_mut(endpoint) {
            seen.failures = 0;
            seen.ejected_until = None;
            seen.trial = false;
        }
    }
}

/// See [`Endpoints::connect`].
#[derive(Debug)]
pub(crate) struct Outstanding {
    endpoints: Endpoints,
    endpoint: Spot,
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
        let endpoint = Spot::Endpoint("10.0.0.1:80".parse().unwrap());
        let mut now = Instant::now();
        for rest in [1, 2, 4, 8, 16, 30, 30] {
            endpoints.failed(endpoint.clone(), now);
            endpoints.failed(endpoint.clone(), now); // at the same time: counts once
            assert!(endpoints.is_ejected(
                &endpoint,
                now + Duration::from_secs(rest) - Duration::from_millis(1)
            ));
            now += Duration::from_secs(rest);
            assert!(!endpoints.is_ejected(&endpoint, now), "{rest}");
        }
        endpoints.failed(endpoint.clone(), now);
        endpoints.succeeded(&endpoint);
        assert!(!endpoints.is_ejected(&endpoint, now));
        endpoints.failed(endpoint.clone(), now);
        assert!(
            !endpoints.is_ejected(&endpoint, now + EJECTION_MIN),
            "the count starts again"
        );
    }

    #[test]
    fn after_a_rest_one_connection_tries() {
        let endpoints = Endpoints::default();
        let endpoint = Spot::Endpoint("10.0.0.1:80".parse().unwrap());
        let mut now = Instant::now();
        endpoints.failed(endpoint.clone(), now);
        now += EJECTION_MIN;
        assert!(!endpoints.is_ejected(&endpoint, now));
        let _trial = endpoints.connect(endpoint.clone(), now);
        assert!(endpoints.is_ejected(&endpoint, now), "the others go elsewhere");
        // It fails: the next rest is twice as long, counted from there.
        now += TRIAL / 2;
        endpoints.failed(endpoint.clone(), now);
        let rest = EJECTION_MIN * 2;
        assert!(endpoints.is_ejected(&endpoint, now + rest - Duration::from_millis(1)));
        now += rest;
        assert!(!endpoints.is_ejected(&endpoint, now));
        // Nothing is heard of the next one: then another may try.
        let _lost = endpoints.connect(endpoint.clone(), now);
        now += TRIAL;
        assert!(!endpoints.is_ejected(&endpoint, now));
        let _trial = endpoints.connect(endpoint.clone(), now);
        endpoints.succeeded(&endpoint);
        assert!(!endpoints.is_ejected(&endpoint, now), "everybody is back");
    }

    #[test]
    fn outstanding_is_counted_and_forgotten() {
        let endpoints = Endpoints::default();
        let endpoint = Spot::Endpoint("10.0.0.1:80".parse().unwrap());
        let guards = [
            endpoints.connect(endpoint.clone(), Instant::now()),
            endpoints.connect(endpoint.clone(), Instant::now()),
        ];
        assert_eq!(endpoints.outstanding(&endpoint), 2);
        drop(guards);
        assert_eq!(endpoints.outstanding(&endpoint), 0);
        assert!(endpoints.seen().is_empty(), "nothing is left of it");
    }
}
