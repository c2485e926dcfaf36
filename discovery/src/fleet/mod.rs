//! The fleet: the one owner of registry and liveness, and what others may ask it.
//!
//! Events go in (the store's watch, control streams, probe reports, dials); two immutable snapshots come out: the
//! compiled [`World`] for subscribers, and the [`View`] of devices for everybody else.

mod damping;
mod dial;
pub mod liveness;
mod memory;
mod offers;
mod owner;
mod view;
mod vips;

pub use offers::{Exported, Offered, ShownExport};
pub use owner::{DRAINING, OwnerConfig, start};
pub use view::{Member, MemberState, Report, View};

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{
    mpsc::{self, OwnedPermit},
    oneshot,
};
use tombolo_registry::{Imports, World};
use tombolo_runtime::Reader;
use tombolo_types::{DeviceId, TrustDomain};

/// Longest wait of a writer for its own write to be seen.
const OWN_WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the owner is told.
#[derive(Debug)]
pub(crate) enum Event {
    Connected(DeviceId),
    Report(DeviceId, Report),
    Dialled {
        device: DeviceId,
        endpoint: std::net::SocketAddr,
        found: liveness::Dialled,
    },
    /// What another cluster offers; `None`: it is gone.
    Imports(Arc<str>, Option<Box<Imports>>),
    /// What the set of clusters refuses of the own exports, by namespace and name.
    RefusedExports(BTreeMap<(Arc<str>, Arc<str>), String>),
    /// The roots of a trust domain.
    Bundle(TrustDomain, String),
    /// Answered when everything before it is published.
    Published(oneshot::Sender<()>),
}

/// The handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Fleet {
    events_tx: mpsc::Sender<Event>,
    gone_tx: mpsc::Sender<DeviceId>,
    view: Reader<View>,
    world: Reader<World>,
    revoked: Reader<BTreeSet<DeviceId>>,
    offered: Reader<Offered>,
    exported: Reader<Exported>,
}

impl Fleet {
    /// The present snapshot.
    pub fn view(&self) -> Arc<View> {
        self.view.load()
    }

    /// What subscribers see.
    pub fn world(&self) -> Reader<World> {
        self.world.clone()
    }

    /// Wakes when the set of revoked devices changes.
    pub fn revoked(&self) -> Reader<BTreeSet<DeviceId>> {
        self.revoked.clone()
    }

    /// Wakes when what other clusters may be told changes.
    pub fn offered(&self) -> Reader<Offered> {
        self.offered.clone()
    }

    /// Exports that somebody asked for, and what became of them.
    pub fn exported(&self) -> Arc<Exported> {
        self.exported.load()
    }

    /// Replaces what the set of clusters refuses of the own exports: coded messages by namespace and name.
    pub async fn set_refused_exports(&self, refused: BTreeMap<(Arc<str>, Arc<str>), String>) {
        let _ = self.events_tx.send(Event::RefusedExports(refused)).await; // the owner is gone: discovery stops
    }

    /// Replaces what another cluster offers; `None` removes all of it.
    pub async fn set_imports(&self, cluster: Arc<str>, imports: Option<Imports>) {
        let event = Event::Imports(cluster, imports.map(Box::new));
        let _ = self.events_tx.send(event).await; // the owner is gone: discovery stops
    }

    /// Replaces the roots of a trust domain.
    pub async fn set_bundle(&self, trust_domain: TrustDomain, roots_pem: String) {
        let event = Event::Bundle(trust_domain, roots_pem);
        let _ = self.events_tx.send(event).await; // the owner is gone: discovery stops
    }

    /// Waits until what was told before is published, a few seconds at most. Cancel-safe.
    pub async fn published(&self) {
        let (told, published) = oneshot::channel();
        if self.events_tx.send(Event::Published(told)).await.is_ok() {
            let _ = tokio::time::timeout(OWN_WRITE_TIMEOUT, published).await; // then later
        }
    }

    /// True if nothing of this device is to be trusted.
    pub fn is_revoked(&self, device: DeviceId) -> bool {
        self.revoked.peek().contains(&device)
    }

    /// Waits until a write of the caller is in the snapshot, a few seconds at most: then the caller's next question
    /// is answered with it in mind. Cancel-safe.
    pub async fn wait_for(&self, resource_version: u64) {
        let mut view = self.view.clone();
        let seen = async {
            while view.load().resource_version < resource_version {
                if view.changed().await.is_none() {
                    return;
                }
            }
        };
        if tokio::time::timeout(OWN_WRITE_TIMEOUT, seen).await.is_err() {
            tracing::warn!(resource_version, "the registry is behind the store");
        }
    }

    /// A control stream of a device is up; dropping the guard says that it is gone. `None`: there are too many.
    pub async fn connected(&self, device: DeviceId) -> Option<Stream> {
        // The place for the farewell is taken first, so that it can never be lost.
        let farewell = self.gone_tx.clone().try_reserve_owned().ok()?;
        self.events_tx.send(Event::Connected(device)).await.ok()?;
        Some(Stream {
            device,
            farewell: Some(farewell),
        })
    }

    /// What the agent of a device says about its application.
    pub async fn report(&self, device: DeviceId, report: Report) {
        let _ = self.events_tx.send(Event::Report(device, report)).await; // the owner is gone: discovery stops
    }
}

/// A control stream that is up.
#[derive(Debug)]
pub struct Stream {
    device: DeviceId,
    farewell: Option<OwnedPermit<DeviceId>>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(farewell) = self.farewell.take() {
            farewell.send(self.device);
        }
    }
}
