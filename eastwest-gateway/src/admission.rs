//! Which devices may hold a reverse session here.

use crate::route::{OUTBOUND_SUFFIX, device_of};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};
use tombolo_identity::Peer;
use tombolo_snapshot::Snapshot;
use tombolo_types::{DeviceId, SpiffeId};

/// Devices of the home network that only dial out, as the registry names them. Made once for a version of the world: after a
/// restart thousands of hosts come at once.
#[derive(Debug, Default)]
pub(crate) struct Admission(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    version: Option<u64>,
    devices: HashMap<DeviceId, SpiffeId>,
}

impl Admission {
    /// The device, if an entry of the home network names it with this identity.
    pub(crate) fn device(&self, world: &Arc<Snapshot>, peer: &Peer) -> Option<DeviceId> {
        let device = peer.device?;
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.version != Some(world.version()) {
            known.version = Some(world.version());
            known.devices = outbound(world);
        }
        world
            .is_same(known.devices.get(&device)?, &peer.id)
            .then_some(device)
    }
}

fn outbound(world: &Snapshot) -> HashMap<DeviceId, SpiffeId> {
    let home = &world.own().network;
    let outbound = world.workloads().filter(|workload| {
        let network = workload.network.strip_suffix(OUTBOUND_SUFFIX);
        network.is_some_and(|network| network == &**home)
    });
    outbound
        .filter_map(|workload| Some((device_of(&workload.name)?, workload.identity().ok()?)))
        .collect()
}
