//! The reverse sessions that hosts hold here.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;
use tombolo_tunnel::ReverseSession;
use tombolo_types::DeviceId;

/// Sessions of one device: the newest serves. Older ones are dead and not noticed yet, or run out: after a reload of the
/// agent, a move between transports or a new certificate, which may come together.
const PER_DEVICE_MAX: usize = 4;

/// Who is connected. A bounded number of devices.
#[derive(Debug)]
pub(crate) struct Sessions {
    max: usize,
    table: Mutex<Table>,
    /// Changes with every session that comes.
    came: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    devices: HashMap<DeviceId, Vec<ReverseSession>>,
    draining: bool,
}

impl Table {
    fn reap(&mut self) {
        self.devices.retain(|_, sessions| {
            sessions.retain(|session| !session.is_closed());
            !sessions.is_empty()
        });
    }
}

impl Sessions {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            table: Mutex::default(),
            came: watch::Sender::new(0),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a session. False, and the session is cut, if there are too many devices or the gateway drains.
    pub(crate) fn insert(&self, device: DeviceId, session: ReverseSession) -> bool {
        let mut table = self.table();
        if table.devices.len() >= self.max && !table.devices.contains_key(&device) {
            table.reap();
        }
        let full = table.devices.len() >= self.max && !table.devices.contains_key(&device);
        if full || table.draining {
            session.cut();
            return false;
        }
        let sessions = table.devices.entry(device).or_default();
        sessions.retain(|session| !session.is_closed());
        sessions.push(session);
        while sessions.len() > PER_DEVICE_MAX {
            sessions.remove(0).cut();
        }
        drop(table);
        self.came.send_modify(|count| *count += 1);
        true
    }

    /// The newest live session of a device that is none of `tried`.
    pub(crate) fn get(&self, device: DeviceId, tried: &[ReverseSession]) -> Option<ReverseSession> {
        let table = self.table();
        table
            .devices
            .get(&device)?
            .iter()
            .rev()
            .find(|session| !session.is_closed() && !tried.iter().any(|one| one.is(session)))
            .cloned()
    }

    /// As [`Self::get`], when there is one. Cancel-safe.
    pub(crate) async fn next(&self, device: DeviceId, tried: &[ReverseSession]) -> ReverseSession {
        self.when(|| self.get(device, tried)).await
    }

    /// A session that has come after this one, when there is one. Cancel-safe.
    pub(crate) async fn newer(&self, device: DeviceId, than: &ReverseSession) -> ReverseSession {
        self.when(|| {
            let table = self.table();
            let sessions = table.devices.get(&device)?;
            let after = sessions.iter().position(|session| session.is(than))? + 1;
            let newer = sessions.get(after..).unwrap_or_default();
            newer.iter().rev().find(|session| !session.is_closed()).cloned()
        })
        .await
    }

    async fn when(&self, find: impl Fn() -> Option<ReverseSession>) -> ReverseSession {
        let mut came = self.came.subscribe();
        loop {
            came.borrow_and_update();
            if let Some(session) = find() {
                return session;
            }
            // The sender is ours: it does not end.
            let _ = came.changed().await;
        }
    }

    /// True if the device can be reached.
    pub(crate) fn has(&self, device: DeviceId) -> bool {
        self.get(device, &[]).is_some()
    }

    /// Takes no more sessions, and lets each end with the last call in it.
    pub(crate) fn drain(&self) {
        let mut table = self.table();
        table.draining = true;
        let all = std::mem::take(&mut table.devices);
        drop(table);
        all.into_values().flatten().for_each(|session| session.drain());
    }

    /// Forgets the dead. Devices that are connected, by what the newest session of each runs over.
    pub(crate) fn reap(&self) -> [(&'static str, usize); 2] {
        let mut table = self.table();
        table.reap();
        let newest = table.devices.values().filter_map(|sessions| sessions.last());
        let over_quic = newest.filter(|session| session.transport() == "quic").count();
        [("quic", over_quic), ("tcp", table.devices.len() - over_quic)]
    }
}
