//! The store of discovery: every resource of a mesh, with the semantics of the Kubernetes API.
//!
//! Position: layer 4, under discovery's admin API, enrolment and registry. [`Store`] is what they know; [`RedbStore`]
//! is the embedded one. Values are opaque bytes here.
//!
//! ```
//! # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
//! # runtime.block_on(async {
//! use tombolo_store::{Key, Page, RedbStore, Select, Store as _, StoreOptions, Write};
//! let folder = tempfile::tempdir().unwrap();
//! let store = RedbStore::open(&folder.path().join("store.redb"), StoreOptions::default()).unwrap();
//! let key = Key::new("networking.istio.io", "WorkloadGroup", "shop", "catalog");
//! let made = store.commit(vec![Write::Create { key, value: b"{}".to_vec() }]).await.unwrap();
//! let list = store.list(&Select::kind("networking.istio.io", "WorkloadGroup"), Page::all()).await.unwrap();
//! assert_eq!(list.items, made);
//! let _changes = store.watch(list.resource_version).unwrap();
//! # });
//! ```
//!
//! **Invariant:** a commit that was answered is on the disk; of one that was not, all or nothing is.
//! **Invariant:** revisions only grow, each write has its own, and watchers see every one of them in order or are told
//! that they cannot.
//! **Invariant:** heartbeats and other things that change by themselves are never written here.
//! **Invariant:** a file that cannot be read is refused and left in place, never set aside and started anew.

mod error;
mod file;
mod model;
mod record;
mod redb_store;
mod window;
mod writer;

pub use error::StoreError;
pub use model::{Change, Event, Key, Listing, Page, Select, Stored, Write};
pub use redb_store::{RedbStore, StoreOptions};
pub use window::Watch;

use async_trait::async_trait;

/// A store with Kubernetes semantics: objects by key, compare-and-swap, list and watch.
#[async_trait]
pub trait Store: Send + Sync {
    /// Gives one object.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn get(&self, key: &Key) -> Result<Option<Stored>, StoreError>;

    /// Gives a page of objects in the order of their keys, all as they were at one moment.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn list(&self, select: &Select, page: Page) -> Result<Listing, StoreError>;

    /// Does all writes or none, and returns when they are durable: the written objects in the order of `writes`,
    /// for deletions their last content.
    ///
    /// Not cancel-safe: a dropped call may still be carried out, whole.
    ///
    /// # Errors
    /// When one of the writes is refused (then none was done), or the disk fails (then nobody knows, and the store
    /// takes no more writes).
    async fn commit(&self, writes: Vec<Write>) -> Result<Vec<Stored>, StoreError>;

    /// Follows the writes after revision `since`: that of a list, or of the last event seen.
    ///
    /// # Errors
    /// [`StoreError::TooOld`] when they are not all kept any more: list again.
    fn watch(&self, since: u64) -> Result<Watch, StoreError>;

    /// Revision of the last write.
    fn resource_version(&self) -> u64;
}
