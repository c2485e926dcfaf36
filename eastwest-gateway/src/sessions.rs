//! The reverse sessions that hosts hold here.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tombolo_tunnel::ReverseSession;
use tombolo_types::DeviceId;

/// Sessions of one device: the newest serves. Older ones are dead and not noticed yet, or run out: after a reload of the
/// agent, a move between transports or a new certificate, which may come together.
const PER_DEVICE_MAX: usize = 4;

/// Who is connected. A bounded number of devices.
#[derive(Debug)]
pub(crate) struct Sessions {
    max: usize,
    table: Mutex<HashMap<DeviceId, Vec<ReverseSession>>>,
}

impl Sessions {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            table: Mutex::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<DeviceId, Vec<ReverseSession>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a session. False, and the session is cut, if there are too many devices.
    pub(crate) fn insert(&self, device: DeviceId, session: ReverseSession) -> bool {
        let mut table = self.table();
        table.retain(|_, sessions| {
            sessions.retain(|session| !session.is_closed());
            !sessions.is_empty()
        });
        if table.len() >= self.max && !table.contains_key(&device) {
            session.cut();
            return false;
        }
        let sessions = table.entry(device).or_default();
        sessions.push(session);
        while sessions.len() > PER_DEVICE_MAX {
            sessions.remove(0).cut();
        }
        true
    }

    /// The newest live session of a device.
    pub(crate) fn get(&self, device: DeviceId) -> Option<ReverseSession> {
        let table = self.table();
        let sessions = table.get(&device)?;
        sessions
            .iter()
            .rev()
            .find(|session| !session.is_closed())
            .cloned()
    }

    /// True if the device can be reached.
    pub(crate) fn has(&self, device: DeviceId) -> bool {
        self.get(device).is_some()
    }

    /// Devices that are connected.
    pub(crate) fn len(&self) -> usize {
        let table = self.table();
        let live = |sessions: &&Vec<ReverseSession>| sessions.iter().any(|session| !session.is_closed());
        table.values().filter(live).count()
    }
}
