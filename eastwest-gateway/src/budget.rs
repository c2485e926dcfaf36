//! How many calls there may be at once: of all members, of one, and how many that are still looking for their endpoint.
//!
//! A call over a limit is refused with 503, which makes its caller try another gateway.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};
use tombolo_identity::Peer;
use tombolo_types::{DeviceId, Reject, RejectClass, SpiffeId};

/// The limits, and what is used of them.
#[derive(Debug)]
pub(crate) struct Budget {
    calls_max: usize,
    calls_per_peer_max: usize,
    dials_max: usize,
    dials: AtomicUsize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    peers: HashMap<Who, usize>,
}

/// Who has opened a call: its device, or for members without one (ztunnel, Envoy) their identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Who {
    Device(DeviceId),
    Identity(SpiffeId),
}

/// The place of one call, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    budget: Arc<Budget>,
    who: Who,
}

/// The place of one call whose endpoint is being dialled.
#[derive(Debug)]
pub(crate) struct Dial<'a>(&'a Budget);

fn over(limit: &'static str) -> Reject {
    Reject::new(RejectClass::Overload, limit)
}

impl Budget {
    pub(crate) fn new(calls_max: usize, calls_per_peer_max: usize, dials_max: usize) -> Arc<Self> {
        Arc::new(Self {
            calls_max,
            calls_per_peer_max,
            dials_max,
            dials: AtomicUsize::new(0),
            open: Mutex::default(),
        })
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a call of a peer. The reason of the refusal names the setting.
    pub(crate) fn enter(self: &Arc<Self>, peer: &Peer) -> Result<Place, Reject> {
        let who = match peer.device {
            Some(device) => Who::Device(device),
            None => Who::Identity(peer.id.clone()),
        };
        let mut open = self.open();
        if open.all >= self.calls_max {
            return Err(over("calls_max"));
        }
        let of_peer = open.peers.entry(who.clone()).or_default();
        if *of_peer >= self.calls_per_peer_max {
            return Err(over("calls_per_peer_max"));
        }
        *of_peer += 1;
        open.all += 1;
        drop(open);
        Ok(Place {
            budget: Arc::clone(self),
            who,
        })
    }

    /// A place for dialling.
    pub(crate) fn dial(&self) -> Result<Dial<'_>, Reject> {
        let taken = self
            .dials
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |dials| {
                (dials < self.dials_max).then_some(dials + 1)
            });
        taken.map(|_| Dial(self)).map_err(|_| over("dials_max"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.budget.open();
        open.all -= 1;
        if let Some(count) = open.peers.get_mut(&self.who) {
            *count -= 1;
            if *count == 0 {
                open.peers.remove(&self.who);
            }
        }
    }
}

impl Drop for Dial<'_> {
    fn drop(&mut self) {
        self.0.dials.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(device: Option<u64>, name: &str) -> Peer {
        let id: SpiffeId = format!("spiffe://mesh.example/ns/shop/sa/{name}")
            .parse()
            .unwrap();
        Peer {
            ids: vec![id.clone()],
            id,
            device: device.map(DeviceId),
            serial: Vec::new(),
            not_after: 0,
            chain: Vec::new(),
        }
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let budget = Budget::new(4, 2, 1);
        let reason = |device, name| budget.enter(&peer(device, name)).map_err(|reject| reject.reason);
        let first = reason(Some(1), "web").unwrap();
        let second = reason(Some(1), "web").unwrap();
        assert_eq!(reason(Some(1), "web").unwrap_err(), "calls_per_peer_max");
        let third = reason(Some(2), "web").unwrap();
        let fourth = reason(None, "web").unwrap();
        assert_eq!(reason(Some(3), "web").unwrap_err(), "calls_max");
        drop(first);
        let fifth = reason(None, "web").unwrap();
        drop(fourth);
        assert!(reason(Some(3), "web").is_ok());
        drop((second, third, fifth));
        assert!(budget.open().all == 0 && budget.open().peers.is_empty());
        let dial = budget.dial().unwrap();
        assert_eq!(budget.dial().unwrap_err().reason, "dials_max");
        drop(dial);
        assert!(budget.dial().is_ok());
    }
}
