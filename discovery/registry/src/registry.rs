use crate::{Allocation, MeshSettings, World};
use std::{collections::BTreeSet, sync::Arc};
use tombolo_config::{Kind, Resource};
use tombolo_types::{DeviceId, TrustDomain};

/// Whether an endpoint is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It is.
    Healthy,
    /// It is not.
    Unhealthy {
        /// Why, for people.
        reason: String,
    },
}

/// The merged index: resources, health, revocations and roots go in; immutable worlds come out.
#[derive(Debug)]
pub struct Registry {
    settings: MeshSettings,
}

impl Registry {
    /// Empty.
    pub fn new(settings: MeshSettings) -> Self {
        Self { settings }
    }

    /// What it was made with.
    pub fn settings(&self) -> &MeshSettings {
        &self.settings
    }

    /// Adds or replaces a resource.
    pub fn upsert(&mut self, resource: Resource) {
        let _ = resource;
        todo!()
    }

    /// Removes a resource; nothing if it is not there.
    pub fn remove(&mut self, kind: Kind, namespace: &str, name: &str) {
        let _ = (kind, namespace, name);
        todo!()
    }

    /// Says whether the endpoint of a WorkloadEntry is chosen. Kept until the entry is removed, also before it is added.
    pub fn set_health(&mut self, namespace: &str, entry: &str, health: Health) {
        let _ = (namespace, entry, health);
        todo!()
    }

    /// Replaces the set of revoked devices.
    pub fn set_revoked(&mut self, devices: BTreeSet<DeviceId>) {
        let _ = devices;
        todo!()
    }

    /// Sets the roots of a trust domain; empty text removes them.
    pub fn set_bundle(&mut self, trust_domain: &TrustDomain, roots_pem: &str) {
        let _ = (trust_domain, roots_pem);
        todo!()
    }

    /// VIPs that are still to be given. The caller persists them (see [`Allocation::persist`]) and upserts the object
    /// again before it publishes; until then each call gives the same answer.
    pub fn allocate(&mut self) -> Vec<Allocation> {
        todo!()
    }

    /// Compiles what has changed. The same `Arc` again if nothing has.
    pub fn publish(&mut self) -> Arc<World> {
        todo!()
    }
}
