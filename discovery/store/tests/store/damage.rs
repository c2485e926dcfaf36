//! Files that must be refused, with a message that helps, and left as they are.

use crate::create;
use std::path::{Path, PathBuf};
use tombolo_store::{Page, RedbStore, Select, Store as _, StoreError, StoreOptions};

fn open(path: &Path) -> Result<std::sync::Arc<RedbStore>, StoreError> {
    RedbStore::open(path, StoreOptions::default())
}

fn filled(folder: &Path) -> PathBuf {
    let path = folder.join("store.redb");
    let store = open(&path).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        for n in 0..40 {
            store
                .commit(vec![create(&format!("n{n}"), &"value ".repeat(200))])
                .await
                .unwrap();
        }
    });
    path
}

#[test]
fn what_is_not_a_store_is_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let good = std::fs::read(filled(folder.path())).unwrap();
    let damaged: [(&str, Vec<u8>); 5] = [
        ("empty", Vec::new()),
        ("text", b"apiVersion: v1\n".repeat(1000)),
        ("zeros", vec![0; good.len()]),
        ("half", good[..good.len() / 2].to_vec()),
        ("head", good[..100].to_vec()),
    ];
    for (name, bytes) in damaged {
        let path = folder.path().join(name);
        std::fs::write(&path, &bytes).unwrap();
        let error = open(&path).unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{name}: {error:?}");
        let text = error.to_string();
        assert!(
            text.contains(path.to_str().unwrap()) && text.contains("the last backup"),
            "{text}"
        );
        assert!(path.exists(), "{name} is still there");
        assert_eq!(
            std::fs::read(&path).unwrap().len(),
            bytes.len(),
            "{name} was not cut or grown"
        );
    }
}

#[test]
fn a_flipped_byte_is_found_or_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let good = std::fs::read(filled(folder.path())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let all = |store: &RedbStore| {
        runtime
            .block_on(store.list(&Select::default(), Page::all()))
            .unwrap()
    };
    let want = all(&open(&folder.path().join("store.redb")).unwrap());
    let path = folder.path().join("flipped");
    let (mut refused, mut same) = (0, 0);
    // Every byte of the file's head with its commit slots, and some of the rest.
    for at in (0..512).chain((512..good.len()).step_by(good.len() / 150)) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x41;
        std::fs::write(&path, &bytes).unwrap();
        match open(&path) {
            Err(StoreError::Corrupt { .. }) => refused += 1,
            Err(error) => panic!("byte {at}: {error:?}"),
            Ok(store) => {
                assert_eq!(all(&store), want, "byte {at}");
                same += 1;
            }
        }
    }
    println!("{refused} refused, {same} in unused pages");
    assert!(refused > 10, "{refused} refused, {same} same");
}

#[test]
fn a_newer_schema_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path());
    let meta: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("meta");
    let set = |schema: u64| {
        let database = redb::Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction
            .open_table(meta)
            .unwrap()
            .insert("schema", schema)
            .unwrap();
        transaction.commit().unwrap();
    };
    set(2);
    let error = open(&path).unwrap_err();
    assert_eq!(
        error,
        StoreError::Newer {
            path: path.clone(),
            found: 2,
            supported: 1
        }
    );
    assert!(
        error.to_string().contains("install the version that wrote it"),
        "{error}"
    );
    set(1);
    let store = open(&path).unwrap();
    assert_eq!(store.resource_version(), 40, "the refusal changed nothing");
}

#[test]
fn a_redb_file_of_another_program_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other");
    drop(redb::Database::create(&path).unwrap());
    let error = open(&path).unwrap_err();
    assert!(
        matches!(&error, StoreError::Corrupt { cause, .. } if cause.contains("schema")),
        "{error:?}"
    );
}
