//! Between clusters: what this one offers to others, and the virtual addresses of what they offer.

use super::owner::Owner;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;
use tombolo_config::Kind;
use tombolo_registry::{Export, ExportState, ImportedVip, NetworkGateway, Registry};
use tombolo_runtime::Publisher;

/// Between two looks at what is offered: a storm of changes is told to other clusters as one.
const INTERVAL: Duration = Duration::from_millis(100);
/// Virtual addresses that are kept for services which nobody exports at the moment.
const UNUSED_MAX: usize = 4096;

/// What other clusters may be told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offered {
    /// Exported services.
    pub services: Vec<Export>,
    /// Own gateways, lost ones too.
    pub gateways: Vec<NetworkGateway>,
}

/// An export that somebody asked for, as it is shown on its object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownExport {
    /// What became of it.
    pub state: ExportState,
    /// Since when, in Unix milliseconds.
    pub since_unix_ms: i64,
}

/// All of them, by kind (ServiceExport or ServiceEntry), namespace and name of the object.
pub type Exported = BTreeMap<(Kind, Arc<str>, Arc<str>), ShownExport>;

#[derive(Debug, Serialize, Deserialize)]
struct Row {
    namespace: String,
    host: String,
    #[serde(default)]
    v4: Option<Ipv4Addr>,
    #[serde(default)]
    v6: Option<Ipv6Addr>,
}

/// The owner's part of it.
#[derive(Debug)]
pub(super) struct Offers {
    offered_tx: Publisher<Offered>,
    exported_tx: Publisher<Exported>,
    at: Option<Instant>,
    last: Option<Instant>,
    waiting: Vec<oneshot::Sender<()>>,
    path: PathBuf,
    /// As they are in the file.
    vips: BTreeMap<(String, String), ImportedVip>,
}

impl Offers {
    /// Reads the virtual addresses of earlier runs into the registry. A damaged file is said and passed over.
    pub(super) fn open(
        offered_tx: Publisher<Offered>,
        exported_tx: Publisher<Exported>,
        path: PathBuf,
        registry: &mut Registry,
    ) -> Self {
        let rows = match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str::<Vec<Row>>(&text).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let rows = rows.unwrap_or_else(|error| {
            tracing::warn!(%error, path = %path.display(), "the virtual addresses of imported services are unreadable: they get new ones");
            Vec::new()
        });
        let vips: BTreeMap<(String, String), ImportedVip> = rows
            .into_iter()
            .map(
                |Row {
                     namespace,
                     host,
                     v4,
                     v6,
                 }| {
                    let key = (namespace.clone(), host.clone());
                    (
                        key,
                        ImportedVip {
                            namespace,
                            host,
                            v4,
                            v6,
                        },
                    )
                },
            )
            .collect();
        registry.set_imported_vips(vips.values().cloned());
        Self {
            offered_tx,
            exported_tx,
            at: None,
            last: None,
            waiting: Vec::new(),
            path,
            vips,
        }
    }

    pub(super) fn await_publication(&mut self, told: oneshot::Sender<()>) {
        self.waiting.push(told);
    }

    /// Something was published: what is offered may differ.
    pub(super) fn published(&mut self, now: Instant) {
        for told in self.waiting.drain(..) {
            let _ = told.send(()); // nobody waits any more
        }
        let due = self.last.map_or(now, |last| (last + INTERVAL).max(now));
        self.at.get_or_insert(due);
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.at
    }

    fn write(&self, vips: &BTreeMap<(String, String), ImportedVip>) -> io::Result<()> {
        let rows: Vec<Row> = vips
            .values()
            .cloned()
            .map(
                |ImportedVip {
                     namespace,
                     host,
                     v4,
                     v6,
                 }| Row {
                    namespace,
                    host,
                    v4,
                    v6,
                },
            )
            .collect();
        let text = serde_json::to_string(&rows).map_err(io::Error::other)?;
        crate::files::write_secret(&self.path, text.as_bytes())
    }
}

impl Owner {
    /// Tells other clusters, if there is something new and the last time is long enough ago.
    pub(super) fn offer(&mut self, now: Instant) {
        if self.offers.at.is_none_or(|at| at > now) {
            return;
        }
        (self.offers.at, self.offers.last) = (None, Some(now));
        let offered = Offered {
            services: self.registry.exports(),
            gateways: self.registry.gateways(),
        };
        if *self.offers.offered_tx.load() != offered {
            self.offers.offered_tx.publish(offered);
        }
        let before = self.offers.exported_tx.load();
        let now_unix_ms = jiff::Timestamp::now().as_millisecond();
        let states = self.registry.export_states().into_iter();
        let exported: Exported = states
            .map(|(key, state)| {
                let same = before.get(&key).filter(|shown| shown.state == state);
                let since_unix_ms = same.map_or(now_unix_ms, |shown| shown.since_unix_ms);
                let shown = ShownExport { state, since_unix_ms };
                (key, shown)
            })
            .collect();
        if *before != exported {
            self.offers.exported_tx.publish(exported);
        }
    }

    /// Gives virtual addresses to imported services, in the file before anybody hears of them. False: try again.
    pub(super) fn settle_imported(&mut self) -> bool {
        let given = self.registry.allocate_imported();
        if given.is_empty() {
            return true;
        }
        if !self.remember_vips() {
            return false;
        }
        let mut vips = self.offers.vips.clone();
        let key = |vip: &ImportedVip| (vip.namespace.clone(), vip.host.clone());
        vips.extend(given.iter().cloned().map(|vip| (key(&vip), vip)));
        let unused = self.registry.unused_imported_vips();
        let surplus = unused.len().saturating_sub(UNUSED_MAX);
        for (namespace, host) in unused.into_iter().take(surplus) {
            self.registry.drop_imported_vip(&namespace, &host);
            vips.remove(&(namespace, host));
        }
        if let Err(error) = self.offers.write(&vips) {
            tracing::error!(%error, path = %self.offers.path.display(), "imported services get no virtual address: it cannot be remembered");
            return false;
        }
        self.offers.vips = vips;
        self.registry.set_imported_vips(given);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_registry::MeshSettings;
    use tombolo_runtime::published;

    #[test]
    fn addresses_outlive_a_restart_and_a_damaged_file_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("imported-vips.json");
        let open = || {
            let mut registry = Registry::new(MeshSettings::new("mesh.example".parse().unwrap()));
            let offered_tx = published(Offered::default()).0;
            let exported_tx = published(Exported::default()).0;
            let offers = Offers::open(offered_tx, exported_tx, path.clone(), &mut registry);
            (offers, registry)
        };
        let (offers, _) = open();
        assert!(offers.vips.is_empty());
        let vip = ImportedVip {
            namespace: "shop".into(),
            host: "catalog.shop.svc.mesh.internal".into(),
            v4: "240.240.0.7".parse().ok(),
            v6: None,
        };
        let key = (vip.namespace.clone(), vip.host.clone());
        offers.write(&BTreeMap::from([(key.clone(), vip)])).unwrap();
        let (_, registry) = open();
        assert_eq!(registry.unused_imported_vips(), [key]);
        std::fs::write(&path, "[{").unwrap();
        assert!(open().0.vips.is_empty());
    }
}
