//! How much of discovery one member may hold: connections and control streams, counted by who has proved to be whom.
//!
//! A device needs one control stream and, now and then, a second connection to renew; what is over that is an agent in a
//! loop, a copy of the VM, or somebody who has stolen its key. Clients without a device (ztunnel, Envoy) share an
//! identity between many nodes, so they are counted by identity and source, and generously.

use crate::limits::source_of;
use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};
use tombolo_types::{Code, DeviceId, SpiffeId};

/// Connections of one device: a control stream, a renewal, and as many again whose end discovery has not noticed yet.
pub const CONNECTIONS_PER_DEVICE_MAX: usize = 8;
/// Control streams of one device: the one before it may not be noticed as dead yet.
pub const STREAMS_PER_DEVICE_MAX: usize = 4;
/// Both, of one identity without a device from one source: nodes behind one NAT.
pub const PER_IDENTITY_AND_SOURCE_MAX: usize = 512;
/// Connections over the limit that are kept so that their calls are answered with a code; more are closed.
const TOLD_MAX: usize = 4;

/// Whom something is counted for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Device(DeviceId),
    Identity(Arc<str>, IpAddr),
}

#[derive(Debug, Default)]
struct Row {
    connections: usize,
    streams: usize,
    /// It was said that there are too many, since there was none at all.
    said: bool,
}

/// The table. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct MemberLimits(Arc<Mutex<BTreeMap<Key, Row>>>);

/// What is held.
#[derive(Debug, Clone, Copy)]
enum Thing {
    Connection,
    Stream,
}

/// A place that is held until it is dropped.
#[derive(Debug)]
pub struct Place {
    limits: MemberLimits,
    key: Key,
    thing: Thing,
    over: bool,
}

impl Row {
    fn count(&mut self, thing: Thing) -> &mut usize {
        match thing {
            Thing::Connection => &mut self.connections,
            Thing::Stream => &mut self.streams,
        }
    }
}

impl MemberLimits {
    fn rows(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, Row>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(id: &SpiffeId, device: Option<DeviceId>, source: Option<IpAddr>) -> Option<Key> {
        match (device, source) {
            (Some(device), _) => Some(Key::Device(device)),
            (None, Some(source)) => Some(Key::Identity(id.to_string().into(), source_of(source))),
            (None, None) => None,
        }
    }

    fn take(&self, key: Key, thing: Thing, told: usize) -> Option<Place> {
        let most = match (&key, thing) {
            (Key::Device(_), Thing::Connection) => CONNECTIONS_PER_DEVICE_MAX,
            (Key::Device(_), Thing::Stream) => STREAMS_PER_DEVICE_MAX,
            (Key::Identity(..), _) => PER_IDENTITY_AND_SOURCE_MAX,
        };
        let mut rows = self.rows();
        let row = rows.entry(key.clone()).or_default();
        let count = *row.count(thing);
        let over = count >= most;
        let first = over && !row.said;
        row.said |= over;
        let held = count < most + told;
        if held {
            *row.count(thing) += 1;
        }
        drop(rows);
        if first {
            tracing::warn!("{}", Code::MemberLimit.message(cause(&key, thing, most)));
        }
        held.then(|| Place {
            limits: self.clone(),
            key,
            thing,
            over,
        })
    }

    /// A place for a connection of a member; `None`: close it.
    pub fn connection(&self, id: &SpiffeId, device: Option<DeviceId>, source: IpAddr) -> Option<Place> {
        self.take(Self::key(id, device, Some(source))?, Thing::Connection, TOLD_MAX)
    }

    /// A place for a control stream.
    ///
    /// # Errors
    /// With the cause of TMB0604 if the member holds as many as it may.
    pub fn stream(
        &self,
        id: &SpiffeId,
        device: Option<DeviceId>,
        source: Option<IpAddr>,
    ) -> Result<Option<Place>, String> {
        let Some(key) = Self::key(id, device, source) else {
            return Ok(None);
        };
        let most = match key {
            Key::Device(_) => STREAMS_PER_DEVICE_MAX,
            Key::Identity(..) => PER_IDENTITY_AND_SOURCE_MAX,
        };
        let text = cause(&key, Thing::Stream, most);
        self.take(key, Thing::Stream, 0).map(Some).ok_or(text)
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.rows().is_empty()
    }
}

fn cause(key: &Key, thing: Thing, most: usize) -> String {
    let what = match thing {
        Thing::Connection => "connections",
        Thing::Stream => "control streams",
    };
    match key {
        Key::Device(device) => format!("device {device} holds {most} {what}"),
        Key::Identity(id, source) => format!("{id} at {source} holds {most} {what}"),
    }
}

impl Place {
    /// The cause of TMB0604 for a connection that is one too many: it is only there to be told so.
    pub fn over(&self) -> Option<String> {
        self.over
            .then(|| cause(&self.key, self.thing, CONNECTIONS_PER_DEVICE_MAX))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut rows = self.limits.rows();
        if let Some(row) = rows.get_mut(&self.key) {
            *row.count(self.thing) -= 1;
            if row.connections + row.streams == 0 {
                rows.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> SpiffeId {
        "spiffe://mesh.example/ns/shop/sa/catalog".parse().unwrap()
    }

    #[test]
    fn a_device_is_told_and_then_closed_and_no_other_notices() {
        let limits = MemberLimits::default();
        let source = "192.0.2.1".parse().unwrap();
        let open = |n| limits.connection(&id(), Some(DeviceId(n)), source);
        let mut held: Vec<_> = (0..CONNECTIONS_PER_DEVICE_MAX)
            .map(|_| open(1).unwrap())
            .collect();
        assert!(held.iter().all(|place| place.over().is_none()));
        for _ in 0..TOLD_MAX {
            held.push(open(1).unwrap());
            assert!(
                held.last()
                    .unwrap()
                    .over()
                    .unwrap()
                    .contains("holds 8 connections")
            );
        }
        assert!(open(1).is_none());
        assert!(open(2).unwrap().over().is_none());
        held.truncate(CONNECTIONS_PER_DEVICE_MAX - 1);
        assert!(open(1).unwrap().over().is_none());
        drop(held);
        assert!(limits.is_empty());
    }

    #[test]
    fn streams_have_a_limit_of_their_own_and_identities_a_wide_one() {
        let limits = MemberLimits::default();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let source = Some(address);
        let device = Some(DeviceId(1));
        let held: Vec<_> = (0..STREAMS_PER_DEVICE_MAX)
            .map(|_| limits.stream(&id(), device, source).unwrap())
            .collect();
        let refused = limits.stream(&id(), device, source).unwrap_err();
        assert!(refused.contains("holds 4 control streams"), "{refused}");
        assert!(limits.connection(&id(), device, address).is_some());
        drop(held);
        let many: Vec<_> = (0..PER_IDENTITY_AND_SOURCE_MAX)
            .map(|_| limits.stream(&id(), None, source).unwrap())
            .collect();
        limits.stream(&id(), None, source).unwrap_err();
        assert!(limits.stream(&id(), None, "192.0.2.2".parse().ok()).is_ok());
        drop(many);
        assert!(limits.is_empty());
    }
}
