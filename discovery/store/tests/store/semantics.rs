use crate::{create, fresh, key};
use futures_util::{FutureExt as _, StreamExt as _, future::join_all};
use std::{collections::BTreeSet, os::unix::fs::PermissionsExt as _};
use tombolo_store::{
    Change, Key, Page, RedbStore, Select, Store as _, StoreError, StoreOptions, Watch, Write,
};

fn update(name: &str, resource_version: u64, value: &str, bump_generation: bool) -> Write {
    Write::Update {
        key: key(name),
        resource_version,
        value: value.into(),
        bump_generation,
    }
}

fn delete(name: &str, resource_version: Option<u64>) -> Write {
    Write::Delete {
        key: key(name),
        resource_version,
    }
}

/// What has come so far, as "+name@revision" and "-name@revision".
fn seen(watch: &mut Watch) -> Vec<String> {
    let mut out = Vec::new();
    while let Some(Some(event)) = watch.next().now_or_never() {
        out.push(match event {
            Ok(event) => match event.change {
                Change::Put(stored) => format!("+{}@{}", stored.key.name, event.resource_version),
                Change::Delete(stored) => format!("-{}@{}", stored.key.name, event.resource_version),
            },
            Err(error) => format!("{error:?}"),
        });
    }
    out
}

#[tokio::test]
async fn objects_live_as_in_kubernetes() {
    let (_folder, store) = fresh();
    let a = store.commit(vec![create("a", "1")]).await.unwrap().remove(0);
    assert_eq!(
        (a.resource_version, a.generation, a.value.as_slice()),
        (1, 1, &b"1"[..])
    );
    assert_eq!(a.uid.as_bytes()[14], b'4', "uid v4: {}", a.uid);
    assert!(a.created_unix_ms > 1_700_000_000_000);
    assert_eq!(
        store.commit(vec![create("a", "2")]).await,
        Err(StoreError::AlreadyExists(key("a")))
    );

    let status = store
        .commit(vec![update("a", 1, "2", false)])
        .await
        .unwrap()
        .remove(0);
    assert_eq!((status.resource_version, status.generation), (2, 1));
    let spec = store
        .commit(vec![update("a", 2, "3", true)])
        .await
        .unwrap()
        .remove(0);
    assert_eq!((spec.resource_version, spec.generation), (3, 2));
    assert_eq!((&spec.uid, spec.created_unix_ms), (&a.uid, a.created_unix_ms));
    let stale = StoreError::Conflict {
        key: key("a"),
        expected: 2,
        found: 3,
    };
    assert_eq!(
        store.commit(vec![update("a", 2, "4", true)]).await,
        Err(stale.clone())
    );
    assert_eq!(store.commit(vec![delete("a", Some(2))]).await, Err(stale));
    assert_eq!(store.get(&key("a")).await.unwrap(), Some(spec.clone()));

    let gone = store.commit(vec![delete("a", Some(3))]).await.unwrap().remove(0);
    assert_eq!((gone.resource_version, gone.value.as_slice()), (4, &b"3"[..]));
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    assert_eq!(
        store.commit(vec![delete("a", None)]).await,
        Err(StoreError::NotFound(key("a")))
    );
    assert_eq!(
        store.commit(vec![update("a", 3, "5", true)]).await,
        Err(StoreError::NotFound(key("a")))
    );
    let again = store.commit(vec![create("a", "6")]).await.unwrap().remove(0);
    assert_ne!(again.uid, a.uid);
    assert_eq!(
        (again.resource_version, again.generation, store.resource_version()),
        (5, 1, 5)
    );
}

#[tokio::test]
async fn a_transaction_is_all_or_nothing() {
    let (_folder, store) = fresh();
    store.commit(vec![create("a", "1")]).await.unwrap();
    let refused = store
        .commit(vec![create("b", "1"), delete("a", None), create("a", "2")])
        .await;
    assert_eq!(refused, Err(StoreError::Repeated(key("a"))));
    let refused = store.commit(vec![
        create("b", "1"),
        update("a", 1, "2", true),
        create("c", "1"),
        delete("x", None),
    ]);
    assert_eq!(refused.await, Err(StoreError::NotFound(key("x"))));
    let list = store.list(&Select::default(), Page::all()).await.unwrap();
    assert_eq!(
        list.items
            .iter()
            .map(|s| (s.key.name.as_str(), s.resource_version))
            .collect::<Vec<_>>(),
        [("a", 1)]
    );
    assert_eq!((list.resource_version, store.resource_version()), (1, 1));
    let done = store
        .commit(vec![create("b", "1"), delete("a", None), create("c", "1")])
        .await
        .unwrap();
    assert_eq!(
        done.iter().map(|s| s.resource_version).collect::<Vec<_>>(),
        [2, 3, 4]
    );
    assert_eq!(store.commit(Vec::new()).await, Ok(Vec::new()));
}

#[tokio::test]
async fn refused_before_the_queue() {
    let (_folder, store) = fresh();
    let big = Write::Create {
        key: key("a"),
        value: vec![0; (4 << 20) + 1],
    };
    assert!(matches!(
        store.commit(vec![big]).await,
        Err(StoreError::TooLarge { .. })
    ));
    let bad = Write::Create {
        key: Key::new("", "K", "", "a\0b"),
        value: Vec::new(),
    };
    assert!(matches!(
        store.commit(vec![bad]).await,
        Err(StoreError::InvalidKey { .. })
    ));
    assert_eq!(store.resource_version(), 0);
}

#[tokio::test]
async fn lists_select_and_paginate() {
    let (_folder, store) = fresh();
    let mut writes = Vec::new();
    for kind in ["Device", "DeviceX", "Group"] {
        for namespace in ["", "a", "a-b", "b"] {
            for name in ["x", "y"] {
                writes.push(Write::Create {
                    key: Key::new("g", kind, namespace, name),
                    value: Vec::new(),
                });
            }
        }
    }
    store.commit(writes).await.unwrap();
    let names = |select: Select, limit: usize| {
        let store = &store;
        async move {
            let mut page = Page::first(limit);
            let mut names = Vec::new();
            loop {
                let listing = store.list(&select, page).await.unwrap();
                assert!(listing.items.len() <= limit);
                names.extend(listing.items.into_iter().map(|s| s.key));
                match listing.next {
                    Some(next) => {
                        page = Page {
                            limit,
                            after: Some(next),
                        }
                    }
                    None => return names,
                }
            }
        }
    };
    let all = names(Select::default(), usize::MAX).await;
    assert_eq!(all.len(), 24);
    assert!(all.is_sorted());
    for select in [
        Select::default(),
        Select::kind("g", "Device"),
        Select::kind("g", "Device").in_namespace("a"),
        Select::default().in_namespace("a"),
        Select::default().in_namespace(""),
        Select::kind("g", "None"),
    ] {
        let want: Vec<_> = all
            .iter()
            .filter(|k| select.kind.as_ref().is_none_or(|(_, kind)| *kind == k.kind))
            .filter(|k| {
                select
                    .namespace
                    .as_ref()
                    .is_none_or(|namespace| *namespace == k.namespace)
            })
            .cloned()
            .collect();
        for limit in [1, 2, 3, 7, 100] {
            assert_eq!(names(select.clone(), limit).await, want, "{select:?} by {limit}");
        }
    }
    // The key of a page's end may be gone by the next page.
    let page = store
        .list(&Select::kind("g", "Device"), Page::first(3))
        .await
        .unwrap();
    let next = page.next.unwrap();
    store
        .commit(vec![Write::Delete {
            key: next.clone(),
            resource_version: None,
        }])
        .await
        .unwrap();
    let rest = store
        .list(
            &Select::kind("g", "Device"),
            Page {
                limit: 99,
                after: Some(next),
            },
        )
        .await
        .unwrap();
    assert_eq!(rest.items.len(), 5);
}

#[tokio::test]
async fn watchers_see_every_write_once_and_in_order() {
    let (_folder, store) = fresh();
    let mut from_start = store.watch(0).unwrap();
    store
        .commit(vec![create("a", "1"), create("b", "1")])
        .await
        .unwrap();
    let list = store.list(&Select::default(), Page::all()).await.unwrap();
    let mut from_list = store.watch(list.resource_version).unwrap();
    store
        .commit(vec![update("a", 1, "2", true), delete("b", None)])
        .await
        .unwrap();
    assert_eq!(seen(&mut from_start), ["+a@1", "+b@2", "+a@3", "-b@4"]);
    assert_eq!(seen(&mut from_list), ["+a@3", "-b@4"]);
    assert_eq!(seen(&mut store.watch(3).unwrap()), ["-b@4"]);
    assert!(seen(&mut from_list).is_empty());
    // A watcher that waits is woken.
    let next = from_list.next();
    let (event, _) = tokio::join!(next, store.commit(vec![create("c", "1")]));
    assert_eq!(event.unwrap().unwrap().resource_version, 5);
    assert!(
        matches!(store.watch(6), Err(StoreError::TooOld)),
        "a future that this store has not seen"
    );
    // Watchers end with the store.
    drop(store);
    assert!(from_list.next().await.is_none());
    assert_eq!(seen(&mut from_start), ["+c@5"]);
    assert!(from_start.next().await.is_none());
}

#[tokio::test]
async fn a_slow_watcher_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        window_events: 10,
        ..StoreOptions::default()
    };
    let store = RedbStore::open(&folder.path().join("s"), options.clone()).unwrap();
    let mut slow = store.watch(0).unwrap();
    for n in 0..25 {
        store.commit(vec![create(&format!("n{n}"), "1")]).await.unwrap();
    }
    assert_eq!(seen(&mut slow), ["TooOld"]);
    assert!(slow.next().await.is_none());
    assert!(matches!(store.watch(14), Err(StoreError::TooOld)));
    assert_eq!(seen(&mut store.watch(15).unwrap()).len(), 10);
    drop(store);
    // After a restart there is no past.
    let store = RedbStore::open(&folder.path().join("s"), options).unwrap();
    assert_eq!(store.resource_version(), 25);
    assert!(matches!(store.watch(24), Err(StoreError::TooOld)));
    let mut watch = store.watch(25).unwrap();
    store.commit(vec![create("z", "1")]).await.unwrap();
    assert_eq!(seen(&mut watch), ["+z@26"]);
}

#[tokio::test]
async fn the_window_is_bounded_in_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        window_bytes: 100_000,
        ..StoreOptions::default()
    };
    let store = RedbStore::open(&folder.path().join("s"), options).unwrap();
    for n in 0..4 {
        let value = vec![0; 40_000];
        store
            .commit(vec![Write::Create {
                key: key(&format!("n{n}")),
                value,
            }])
            .await
            .unwrap();
    }
    assert!(matches!(store.watch(1), Err(StoreError::TooOld)));
    assert_eq!(seen(&mut store.watch(2).unwrap()).len(), 2);
    store
        .commit(vec![Write::Create {
            key: key("huge"),
            value: vec![0; 200_000],
        }])
        .await
        .unwrap();
    assert_eq!(seen(&mut store.watch(4).unwrap()), ["+huge@5"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compare_and_swap_loses_no_update() {
    let (_folder, store) = fresh();
    store.commit(vec![create("counter", "0")]).await.unwrap();
    let mut watch = store.watch(1).unwrap();
    let add = || async {
        for _ in 0..25 {
            loop {
                let read = store.get(&key("counter")).await.unwrap().unwrap();
                let value: u64 = std::str::from_utf8(&read.value).unwrap().parse().unwrap();
                match store
                    .commit(vec![update(
                        "counter",
                        read.resource_version,
                        &(value + 1).to_string(),
                        true,
                    )])
                    .await
                {
                    Ok(_) => break,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    join_all((0..8).map(|_| add())).await;
    let end = store.get(&key("counter")).await.unwrap().unwrap();
    assert_eq!(
        (end.value.as_slice(), end.generation, end.resource_version),
        (&b"200"[..], 201, 201)
    );
    let events = seen(&mut watch);
    assert_eq!(events.len(), 200);
    assert_eq!(events.last().map(String::as_str), Some("+counter@201"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_transactions_share_commits() {
    let (_folder, store) = fresh();
    for n in 0..10 {
        store
            .commit(vec![create(&format!("alone{n}"), "1")])
            .await
            .unwrap();
    }
    assert_eq!(store.commits(), 10, "one at a time waits for the disk each time");
    let done = join_all((0..400).map(|n| {
        let store = &store;
        async move {
            store
                .commit(vec![create(&format!("n{n}"), "1"), create(&format!("m{n}"), "1")])
                .await
                .unwrap()
        }
    }))
    .await;
    let revisions: BTreeSet<u64> = done.iter().flatten().map(|s| s.resource_version).collect();
    assert_eq!(revisions, (11..=810).collect(), "each write has its own revision");
    assert!(
        done.iter()
            .all(|pair| pair[1].resource_version == pair[0].resource_version + 1)
    );
    let together = store.commits() - 10;
    assert!(
        (2..=40).contains(&together),
        "400 transactions in {together} commits"
    );
}

#[tokio::test]
async fn a_refused_transaction_does_not_spoil_its_group() {
    let (_folder, store) = fresh();
    store.commit(vec![create("a", "1")]).await.unwrap();
    let results = join_all([
        store.commit(vec![create("b", "1")]),
        store.commit(vec![create("c", "1"), create("a", "2")]),
        store.commit(vec![create("d", "1")]),
        store.commit(vec![create("d", "2")]),
        store.commit(vec![delete("d", None)]),
    ])
    .await;
    let ok: Vec<_> = results.iter().map(Result::is_ok).collect();
    assert_eq!(ok, [true, false, true, false, true]);
    let list = store.list(&Select::default(), Page::all()).await.unwrap();
    assert_eq!(
        list.items.iter().map(|s| s.key.name.as_str()).collect::<Vec<_>>(),
        ["a", "b"]
    );
    assert_eq!(list.resource_version, 4);
}

#[tokio::test]
async fn the_file_is_private_and_exclusive() {
    let (folder, store) = fresh();
    let path = folder.path().join("store.redb");
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(
        RedbStore::open(&path, StoreOptions::default()).unwrap_err(),
        StoreError::InUse(path.clone())
    );
    drop(store);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let store = RedbStore::open(&path, StoreOptions::default()).unwrap();
    assert_eq!(mode(&path), 0o600);
    drop(store);
    let files: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    assert_eq!(files, ["store.redb"], "nothing is left beside it");
    let missing = RedbStore::open(&folder.path().join("no/store"), StoreOptions::default()).unwrap_err();
    assert!(matches!(missing, StoreError::Io { .. }), "{missing}");
}

#[test]
fn made_once_by_many_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let results: Vec<_> = std::thread::scope(|scope| {
        let open = || RedbStore::open(&path, StoreOptions::default());
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1, "{results:?}");
    let in_use = StoreError::InUse(path);
    assert!(
        results
            .iter()
            .all(|r| r.as_ref().err().is_none_or(|error| *error == in_use)),
        "{results:?}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
