//! What the owner does on its own: gives VIPs, remembers members over a restart, forgets what has ended.

use super::{ObjectName, Owner, RETRY_INTERVAL, SWEEP_INTERVAL, TOMBSTONE_LIFE};
use crate::{
    fleet::{
        liveness::Remembered,
        memory::{self, MemberMemory, Memory},
        vips,
    },
    objects::{self, ObjectError},
};
use std::{collections::BTreeMap, time::Instant};
use tombolo_config::{Kind, Resource};
use tombolo_registry::Allocation;
use tombolo_types::DeviceId;

impl Owner {
    /// Gives the VIPs that are still to be given, and persists them before anything is published.
    pub(super) async fn settle(&mut self, now: Instant) {
        if self.dirty.is_none() && self.retry_at.is_none_or(|at| at > now) {
            return;
        }
        self.retry_at = None;
        let mut by_object: BTreeMap<ObjectName, Vec<Allocation>> = BTreeMap::new();
        for allocation in self.registry.allocate() {
            let name = (
                allocation.kind,
                allocation.namespace.clone(),
                allocation.name.clone(),
            );
            by_object.entry(name).or_default().push(allocation);
        }
        if !self.settle_imported() {
            self.retry_at = Some(now + RETRY_INTERVAL);
        }
        if by_object.is_empty() {
            return;
        }
        // Before the addresses are in any object: a crash in between wastes them, and gives none twice.
        if !self.remember_vips() {
            self.retry_at = Some(now + RETRY_INTERVAL);
            return;
        }
        // All in one transaction; one that raced with another writer goes alone.
        let given = match self.persist(&by_object).await {
            Ok(resources) => resources,
            Err(_) => {
                let mut given = Vec::new();
                for (name, allocations) in by_object {
                    let title = format!("{} {}/{}", name.0, name.1, name.2);
                    match self.persist(&BTreeMap::from([(name, allocations)])).await {
                        Ok(resources) => given.extend(resources),
                        Err(error) => {
                            tracing::warn!(%error, object = title, "a VIP is not given yet");
                            self.retry_at = Some(now + RETRY_INTERVAL);
                        }
                    }
                }
                given
            }
        };
        if !given.is_empty() {
            given
                .into_iter()
                .for_each(|resource| self.registry.upsert(resource));
            self.mark(now, false);
        }
    }

    /// Writes the highest addresses ever given, so that after a restart those of deleted objects are not given again
    /// soon. False: the disk refuses.
    pub(in crate::fleet) fn remember_vips(&mut self) -> bool {
        let watermark = self.registry.vip_watermark();
        if self.vips_written == Some(watermark) {
            return true;
        }
        let written = vips::write(&self.vips_path, watermark);
        if let Err(error) = &written {
            tracing::error!(%error, path = %self.vips_path.display(), "no virtual address is given: the highest one cannot be remembered");
            return false;
        }
        self.vips_written = Some(watermark);
        true
    }

    pub(super) async fn persist(
        &self,
        wanted: &BTreeMap<ObjectName, Vec<Allocation>>,
    ) -> Result<Vec<Resource>, ObjectError> {
        let mut writes = Vec::new();
        for ((kind, namespace, name), allocations) in wanted {
            // Deleted meanwhile: the watch says so.
            let Some(mut resource) = self.objects.get(*kind, namespace, name).await? else {
                continue;
            };
            allocations
                .iter()
                .for_each(|allocation| allocation.persist(&mut resource));
            writes.push(objects::update(&resource, false));
        }
        let (stored, _) = self.objects.commit(writes).await?;
        stored.iter().map(objects::read).collect()
    }

    pub(super) fn recollect(&self) -> Memory {
        let of = |id: &DeviceId| {
            let remembered = self.liveness.remember(*id).unwrap_or_default();
            let memory = MemberMemory {
                liveness: remembered,
                report: self.reports.get(id).cloned(),
            };
            (memory
                != MemberMemory {
                    liveness: Remembered::default(),
                    report: None,
                })
            .then(|| (id.to_string(), memory))
        };
        self.devices.keys().filter_map(of).collect()
    }

    pub(super) fn remember(&mut self, now: Instant) {
        if self.remember_at.is_none_or(|at| at > now) {
            return;
        }
        self.remember_at = None;
        let memory = self.recollect();
        if memory != self.memory {
            self.memory.clone_from(&memory);
            let path = self.memory_path.clone();
            drop(tokio::task::spawn_blocking(move || memory::write(&path, &memory)));
        }
    }

    /// Removes tombstones whose certificates have expired, and tokens that ended long ago.
    pub(super) async fn sweep(&mut self, now: Instant) {
        if now < self.sweep_at {
            return;
        }
        self.sweep_at = now + SWEEP_INTERVAL;
        let limit = jiff::Timestamp::now().as_millisecond()
            - i64::try_from(TOMBSTONE_LIFE.as_millis()).unwrap_or(i64::MAX);
        let is_past = |time: &str| tombolo_config::unix_ms(time).is_some_and(|at| at < limit);
        let mut writes: Vec<_> = self
            .devices
            .values()
            .filter(|device| {
                device.spec.workload_entry.is_empty()
                    && device
                        .spec
                        .revoked
                        .as_ref()
                        .is_some_and(|revoked| is_past(&revoked.at))
            })
            .map(|device| objects::delete(&Resource::Device(device.clone())))
            .collect();
        let ended = |resource: &Resource| match resource {
            Resource::JoinToken(token) => is_past(&token.spec.expires),
            Resource::WorkloadGroup(_)
            | Resource::WorkloadEntry(_)
            | Resource::ServiceEntry(_)
            | Resource::AuthorizationPolicy(_)
            | Resource::PeerAuthentication(_)
            | Resource::ServiceExport(_)
            | Resource::Namespace(_)
            | Resource::Device(_) => false,
        };
        match self.objects.list(Some(Kind::JoinToken), None).await {
            Ok((tokens, _)) => writes.extend(tokens.iter().filter(|token| ended(token)).map(objects::delete)),
            Err(error) => tracing::warn!(%error, "tokens cannot be listed"),
        }
        if writes.is_empty() {
            return;
        }
        if let Err(error) = self.objects.commit(writes).await {
            tracing::warn!(%error, "what has ended is not forgotten yet");
        }
    }
}
