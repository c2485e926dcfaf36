//! What the store says, taken into registry, liveness and view.

use super::{Entry, EntryKey, ObjectName, Owner, REMEMBER_INTERVAL, RETRY_INTERVAL, TURN_MAX, name_of};
use crate::{
    fleet::{DRAINING, Member},
    objects::{self, ObjectError},
};
use futures_util::{FutureExt as _, StreamExt as _};
use std::{collections::BTreeSet, net::SocketAddr, pin::Pin, sync::Arc, time::Instant};
use tombolo_config::{DeviceSpec, Kind, Object, Resource, WorkloadEntrySpec, annotation};
use tombolo_registry::Health;
use tombolo_store::{Change, Event as StoreEvent, StoreError, Watch};
use tombolo_types::{Code, DeviceId};

impl Owner {
    /// Takes what the watch has, without waiting, up to a turn.
    pub(super) async fn take(
        &mut self,
        first: Option<Result<StoreEvent, StoreError>>,
        watch: &mut Pin<Box<Watch>>,
    ) {
        let now = Instant::now();
        let mut next = Some(first);
        for _ in 0..TURN_MAX {
            match next {
                None => return,
                Some(Some(Ok(event))) => {
                    match &event.change {
                        Change::Put(stored) if !objects::is_resource(&stored.key) => {}
                        Change::Put(stored) => match objects::read(stored) {
                            Ok(resource) => self.upsert(resource, now),
                            Err(error) => tracing::error!(%error, "an object is left out"),
                        },
                        Change::Delete(stored) => {
                            let key = &stored.key;
                            if let Some(kind) = Kind::of(&key.group, &key.kind) {
                                self.remove(kind, &key.namespace, &key.name, now);
                            }
                        }
                    }
                    self.view.resource_version = self.view.resource_version.max(event.resource_version);
                    self.view_changed = true;
                }
                Some(Some(Err(_)) | None) => {
                    // Fell behind: list again.
                    tracing::warn!("the watch of the store was cut; everything is read again");
                    self.loading = true;
                    match self.load(now).await {
                        Ok(new) => *watch = Box::pin(new),
                        Err(error) => {
                            tracing::error!(%error, "the store cannot be read");
                            tokio::time::sleep(RETRY_INTERVAL).await;
                        }
                    }
                    return;
                }
            }
            next = watch.next().now_or_never();
        }
    }

    /// Reads all objects; returns the watch that continues where the listing began.
    pub(super) async fn load(&mut self, now: Instant) -> Result<Watch, ObjectError> {
        let (mut resources, version) = self.objects.list(None, None).await?;
        let found: BTreeSet<ObjectName> = resources.iter().map(name_of).collect();
        let gone: Vec<ObjectName> = self.present.difference(&found).cloned().collect();
        gone.iter()
            .for_each(|(kind, namespace, name)| self.remove(*kind, namespace, name, now));
        // Devices last: they look at their entries.
        resources.sort_by_key(|resource| resource.kind() == Kind::Device);
        resources
            .into_iter()
            .for_each(|resource| self.upsert(resource, now));
        self.loading = false;
        self.view.resource_version = version;
        self.view_changed = true;
        Ok(self.objects.store().watch(version)?)
    }

    pub(super) fn upsert(&mut self, resource: Resource, now: Instant) {
        self.present.insert(name_of(&resource));
        match &resource {
            Resource::WorkloadEntry(entry) => self.upsert_entry(entry, now),
            Resource::Device(device) => self.upsert_device(device, now),
            Resource::JoinToken(token) => {
                self.view
                    .tokens
                    .insert(token.metadata.name.clone(), token.metadata.namespace.clone());
            }
            Resource::WorkloadGroup(_)
            | Resource::ServiceEntry(_)
            | Resource::AuthorizationPolicy(_)
            | Resource::PeerAuthentication(_)
            | Resource::ServiceExport(_)
            | Resource::Namespace(_) => {}
        }
        self.registry.upsert(resource);
        self.mark(now, false);
    }

    pub(super) fn upsert_entry(&mut self, entry: &Object<WorkloadEntrySpec>, now: Instant) {
        let key = (entry.metadata.namespace.clone(), entry.metadata.name.clone());
        let network = if entry.spec.network.is_empty() {
            &self.settings.network
        } else {
            &entry.spec.network
        };
        let health_checked = entry
            .metadata
            .annotations
            .get(annotation::HEALTH_CHECKS_ENABLED)
            .is_some_and(|value| value == "true");
        let new = Entry {
            network: network.clone(),
            address: entry.spec.address.parse().ok(),
            locality: entry.spec.locality.clone(),
            health_checked,
            status: entry.status.clone(),
        };
        self.forget_address(&key);
        if let Some(address) = new.address {
            self.view
                .by_address
                .insert((new.network.clone(), address), key.clone());
        }
        self.entries.insert(key.clone(), new);
        if let Some(device) = self.view.by_entry.get(&key).copied() {
            self.place(device, now);
        }
    }

    pub(super) fn forget_address(&mut self, key: &EntryKey) {
        if let Some(old) = self.entries.get(key)
            && let Some(address) = old.address
        {
            let slot = (old.network.clone(), address);
            if self.view.by_address.get(&slot) == Some(key) {
                self.view.by_address.remove(&slot);
            }
        }
    }

    pub(super) fn upsert_device(&mut self, device: &Object<DeviceSpec>, now: Instant) {
        let Ok(id) = device.metadata.name.parse::<DeviceId>() else {
            return;
        };
        let old = self.devices.insert(id, device.clone());
        let is_new = old.is_none();
        if device.spec.revoked.is_some() && self.view.revoked.insert(id).is_none() {
            self.publish_revoked(now);
        }
        let entry = (
            device.metadata.namespace.clone(),
            device.spec.workload_entry.clone(),
        );
        if entry.1.is_empty() {
            // A tombstone: deleted, and its certificates are refused until they have expired.
            if let Some(old) = old {
                self.view
                    .by_entry
                    .remove(&(old.metadata.namespace, old.spec.workload_entry));
            }
            self.drop_member(id, now);
            return;
        }
        self.view.by_entry.insert(entry, id);
        if is_new && self.loading {
            let known = self.memory.get(&id.to_string()).cloned().unwrap_or_default();
            let (network, endpoint) = self.endpoint_of(id);
            self.liveness.load(id, network, endpoint, &known.liveness);
            if let Some(report) = known.report.filter(|report| report.message != DRAINING) {
                self.reports.insert(id, report);
            }
        } else if is_new {
            self.fresh.insert(id);
        }
        self.place(id, now);
    }

    /// Network and endpoint of a device, from its WorkloadEntry.
    pub(super) fn endpoint_of(&self, id: DeviceId) -> (Arc<str>, Option<SocketAddr>) {
        let entry = self.devices.get(&id).and_then(|device| {
            self.entries.get(&(
                device.metadata.namespace.clone(),
                device.spec.workload_entry.clone(),
            ))
        });
        match entry {
            Some(entry) => {
                let endpoint = entry
                    .address
                    .map(|address| SocketAddr::new(address, self.witness_port));
                (entry.network.as_str().into(), endpoint)
            }
            None => (self.settings.network.as_str().into(), None),
        }
    }

    /// Tells liveness where a device is.
    pub(super) fn place(&mut self, id: DeviceId, now: Instant) {
        if self.view.revoked.contains(&id) {
            self.liveness.remove(id);
        } else {
            let (network, endpoint) = self.endpoint_of(id);
            self.liveness.upsert(id, network, endpoint, now);
        }
        self.refresh(id, now);
    }

    pub(super) fn remove(&mut self, kind: Kind, namespace: &str, name: &str, now: Instant) {
        self.present
            .remove(&(kind, namespace.to_owned(), name.to_owned()));
        match kind {
            Kind::WorkloadEntry => {
                let key = (namespace.to_owned(), name.to_owned());
                self.forget_address(&key);
                self.entries.remove(&key);
                if let Some(device) = self.view.by_entry.get(&key).copied() {
                    self.place(device, now);
                }
            }
            Kind::Device => {
                if let Ok(id) = name.parse::<DeviceId>() {
                    self.forget_device(id, now);
                }
            }
            Kind::JoinToken => {
                self.view.tokens.remove(name);
            }
            Kind::WorkloadGroup
            | Kind::ServiceEntry
            | Kind::AuthorizationPolicy
            | Kind::PeerAuthentication
            | Kind::ServiceExport
            | Kind::Namespace => {}
        }
        self.registry.remove(kind, namespace, name);
        self.mark(now, true);
    }

    pub(super) fn forget_device(&mut self, id: DeviceId, now: Instant) {
        if let Some(device) = self.devices.remove(&id) {
            let entry = (device.metadata.namespace, device.spec.workload_entry);
            if self.view.by_entry.get(&entry) == Some(&id) {
                self.view.by_entry.remove(&entry);
            }
        }
        self.drop_member(id, now);
        if self.view.revoked.remove(&id).is_some() {
            self.publish_revoked(now);
        }
    }

    pub(super) fn drop_member(&mut self, id: DeviceId, now: Instant) {
        self.liveness.remove(id);
        self.reports.remove(&id);
        self.damping.forget(id);
        self.fresh.remove(&id);
        self.chosen.remove(&id);
        self.view.members.remove(&id);
        self.view_changed = true;
        self.remember_at.get_or_insert(now + REMEMBER_INTERVAL);
    }

    pub(super) fn publish_revoked(&mut self, now: Instant) {
        let revoked: BTreeSet<DeviceId> = self.view.revoked.iter().copied().collect();
        self.registry.set_revoked(revoked.clone());
        self.revoked_tx.publish(revoked);
        self.mark(now, true);
    }

    /// Writes a device's state into the view, and into the registry if clients may not choose it any more, or again.
    pub(super) fn refresh(&mut self, id: DeviceId, now: Instant) {
        let Some(device) = self
            .devices
            .get(&id)
            .filter(|device| !device.spec.workload_entry.is_empty())
        else {
            return;
        };
        let (namespace, entry_name) = (
            device.metadata.namespace.clone(),
            device.spec.workload_entry.clone(),
        );
        let entry = self.entries.get(&(namespace.clone(), entry_name.clone()));
        let mut report = self.reports.get(&id).cloned();
        if self.damping.holds(id)
            && let Some(report) = &mut report
        {
            let cause = format!("it says that it is well again; last was: {}", report.message);
            report.message = Code::HealthFlaps.message(cause);
        }
        let mut member = Member {
            address: entry.and_then(|entry| entry.address),
            locality: entry.map(|entry| entry.locality.clone()).unwrap_or_default(),
            entry_status: entry.and_then(|entry| entry.status.clone()),
            standing: entry.and_then(|_| self.liveness.standing(id)),
            awaits_report: report.is_none()
                && self.fresh.contains(&id)
                && entry.is_some_and(|entry| entry.health_checked),
            report,
            since_unix_ms: jiff::Timestamp::now().as_millisecond(),
            device: device.clone(),
        };
        if let Some(old) = self.view.members.get(&id)
            && old.state().state == member.state().state
        {
            member.since_unix_ms = old.since_unix_ms;
        }
        let (chosen, reason) = (member.is_chosen(), member.state().reason);
        self.view.members.insert(id, Arc::new(member));
        self.view_changed = true;
        self.remember_at.get_or_insert(now + REMEMBER_INTERVAL);
        if self.chosen.insert(id, chosen).unwrap_or(true) != chosen {
            let health = if chosen {
                Health::Healthy
            } else {
                Health::Unhealthy {
                    reason: reason.clone(),
                }
            };
            tracing::info!(device = %id, entry = %format_args!("{namespace}/{entry_name}"), chosen, reason, "endpoint");
            self.registry.set_health(&namespace, &entry_name, health);
            self.mark(now, !chosen);
        }
    }
}
