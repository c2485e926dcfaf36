//! The embedded store as its users meet it: what it promises while it runs, after a crash, and on a damaged file.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod crash;
mod damage;
mod model;
mod semantics;

use std::sync::Arc;
use tempfile::TempDir;
use tombolo_store::{Key, RedbStore, StoreOptions, Write};

/// A store in a folder of its own.
fn fresh() -> (TempDir, Arc<RedbStore>) {
    let folder = tempfile::tempdir().unwrap();
    let store = RedbStore::open(&folder.path().join("store.redb"), StoreOptions::default()).unwrap();
    (folder, store)
}

fn key(name: &str) -> Key {
    Key::new("networking.istio.io", "WorkloadEntry", "shop", name)
}

fn create(name: &str, value: &str) -> Write {
    Write::Create {
        key: key(name),
        value: value.into(),
    }
}
