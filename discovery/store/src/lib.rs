//! The store (skeleton: bodies follow).
#![allow(
    clippy::todo,
    unused_variables,
    missing_docs,
    clippy::missing_errors_doc,
    reason = "skeleton"
)]
use async_trait::async_trait;
use std::{
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub group: String,
    pub kind: String,
    pub namespace: String,
    pub name: String,
}
impl Key {
    pub fn new(group: &str, kind: &str, namespace: &str, name: &str) -> Self {
        Self {
            group: group.into(),
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub key: Key,
    pub uid: String,
    pub resource_version: u64,
    pub generation: u64,
    pub created_unix_ms: i64,
    pub value: Vec<u8>,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    Create {
        key: Key,
        value: Vec<u8>,
    },
    Update {
        key: Key,
        resource_version: u64,
        value: Vec<u8>,
        bump_generation: bool,
    },
    Delete {
        key: Key,
        resource_version: Option<u64>,
    },
}
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Select {
    pub kind: Option<(String, String)>,
    pub namespace: Option<String>,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub limit: usize,
    pub after: Option<Key>,
}
impl Page {
    pub fn all() -> Self {
        Self {
            limit: usize::MAX,
            after: None,
        }
    }
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    pub items: Vec<Stored>,
    pub resource_version: u64,
    pub next: Option<Key>,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Put(Stored),
    Delete(Stored),
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub resource_version: u64,
    pub change: Change,
}
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("{0:?} not found")]
    NotFound(Key),
    #[error("{0:?} exists")]
    AlreadyExists(Key),
    #[error("{key:?} conflict")]
    Conflict { key: Key, expected: u64, found: u64 },
    #[error("too old")]
    TooOld,
    #[error("{path}")]
    Corrupt { path: PathBuf, cause: String },
}
pub struct Watch(());
impl futures_util::Stream for Watch {
    type Item = Result<Event, StoreError>;
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        todo!()
    }
}
#[async_trait]
pub trait Store: Send + Sync {
    async fn get(&self, key: &Key) -> Result<Option<Stored>, StoreError>;
    async fn list(&self, select: &Select, page: Page) -> Result<Listing, StoreError>;
    async fn commit(&self, writes: Vec<Write>) -> Result<Vec<Stored>, StoreError>;
    fn watch(&self, since: u64) -> Result<Watch, StoreError>;
    fn resource_version(&self) -> u64;
}
#[derive(Debug, Clone)]
pub struct StoreOptions {
    pub window_events: usize,
}
impl Default for StoreOptions {
    fn default() -> Self {
        Self { window_events: 8192 }
    }
}
pub struct RedbStore(());
impl RedbStore {
    pub fn open(path: &Path, options: StoreOptions) -> Result<Arc<Self>, StoreError> {
        todo!()
    }
}
#[async_trait]
impl Store for RedbStore {
    async fn get(&self, key: &Key) -> Result<Option<Stored>, StoreError> {
        todo!()
    }
    async fn list(&self, select: &Select, page: Page) -> Result<Listing, StoreError> {
        todo!()
    }
    async fn commit(&self, writes: Vec<Write>) -> Result<Vec<Stored>, StoreError> {
        todo!()
    }
    fn watch(&self, since: u64) -> Result<Watch, StoreError> {
        todo!()
    }
    fn resource_version(&self) -> u64 {
        todo!()
    }
}
