//! The store against a plain map, step by step.

use proptest::prelude::*;
use std::collections::BTreeMap;
use tombolo_store::{
    Change, Key, Page, RedbStore, Select, Store as _, StoreError, StoreOptions, Stored, Write,
};

#[derive(Debug, Clone)]
enum Step {
    Commit(Vec<Op>),
    Reopen,
    List {
        kind: bool,
        namespace: bool,
        limit: usize,
    },
}

#[derive(Debug, Clone)]
struct Op {
    key: Key,
    what: u8,
    /// Added to the right version: 0 is right, else stale or invented.
    off: u64,
    value: u8,
    bump: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = (0..2u8, 0..2u8, 0..3u8).prop_map(|(k, ns, n)| {
        Key::new(
            "g",
            ["A", "B"][usize::from(k)],
            ["x", "y"][usize::from(ns)],
            ["1", "2", "3"][usize::from(n)],
        )
    });
    let off = prop_oneof![4 => Just(0u64), 1 => 1..3u64];
    let op = (key, 0..4u8, off, any::<u8>(), any::<bool>()).prop_map(|(key, what, off, value, bump)| Op {
        key,
        what,
        off,
        value,
        bump,
    });
    let step = prop_oneof![
        12 => proptest::collection::vec(op, 1..4).prop_map(Step::Commit),
        1 => Just(Step::Reopen),
        4 => (any::<bool>(), any::<bool>(), 1..5usize)
            .prop_map(|(kind, namespace, limit)| Step::List { kind, namespace, limit }),
    ];
    proptest::collection::vec(step, 1..40)
}

#[derive(Default)]
struct Model {
    objects: BTreeMap<Key, Stored>,
    revision: u64,
}

impl Model {
    /// The same rules, said plainly. Uid and creation time are the store's to choose.
    fn commit(&mut self, writes: &[Write]) -> Result<Vec<(u64, u64)>, StoreError> {
        let mut next = self.objects.clone();
        let mut revision = self.revision;
        let mut out = Vec::new();
        let mut keys: Vec<&Key> = Vec::new();
        for write in writes {
            if keys.contains(&write.key()) {
                return Err(StoreError::Repeated(write.key().clone()));
            }
            keys.push(write.key());
            revision += 1;
            let found = next.get(write.key()).cloned();
            let conflict = |key: &Key, expected, found| StoreError::Conflict {
                key: key.clone(),
                expected,
                found,
            };
            match (write, found) {
                (Write::Create { key, .. }, Some(_)) => return Err(StoreError::AlreadyExists(key.clone())),
                (Write::Create { key, value }, None) => {
                    let stored = Stored {
                        key: key.clone(),
                        uid: String::new(),
                        resource_version: revision,
                        generation: 1,
                        created_unix_ms: 0,
                        value: value.clone(),
                    };
                    out.push((revision, 1));
                    next.insert(key.clone(), stored);
                }
                (Write::Update { key, .. } | Write::Delete { key, .. }, None) => {
                    return Err(StoreError::NotFound(key.clone()));
                }
                (
                    Write::Update {
                        key,
                        resource_version,
                        value,
                        bump_generation,
                    },
                    Some(found),
                ) => {
                    if *resource_version != found.resource_version {
                        return Err(conflict(key, *resource_version, found.resource_version));
                    }
                    let generation = found.generation + u64::from(*bump_generation);
                    out.push((revision, generation));
                    let stored = Stored {
                        resource_version: revision,
                        generation,
                        value: value.clone(),
                        ..found
                    };
                    next.insert(key.clone(), stored);
                }
                (
                    Write::Delete {
                        key,
                        resource_version,
                    },
                    Some(found),
                ) => {
                    if let Some(expected) = resource_version
                        && *expected != found.resource_version
                    {
                        return Err(conflict(key, *expected, found.resource_version));
                    }
                    out.push((revision, found.generation));
                    next.remove(key);
                }
            }
        }
        (self.objects, self.revision) = (next, revision);
        Ok(out)
    }
}

fn plain(stored: &Stored) -> (Key, u64, u64, Vec<u8>) {
    (
        stored.key.clone(),
        stored.resource_version,
        stored.generation,
        stored.value.clone(),
    )
}

async fn check(steps: Vec<Step>) {
    use futures_util::{FutureExt as _, StreamExt as _};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let open = || RedbStore::open(&path, StoreOptions::default()).unwrap();
    let mut store = open();
    let mut model = Model::default();
    // A second map, kept by the watch alone.
    let mut followed: BTreeMap<Key, Stored> = BTreeMap::new();
    let mut watch = store.watch(0).unwrap();
    let mut uids: BTreeMap<Key, String> = BTreeMap::new();
    for step in steps {
        match step {
            Step::Reopen => {
                drop(store);
                store = open();
                watch = store.watch(model.revision).unwrap();
            }
            Step::Commit(ops) => {
                let version = |op: &Op| model.objects.get(&op.key).map_or(0, |s| s.resource_version) + op.off;
                let writes: Vec<Write> = ops
                    .iter()
                    .map(|op| match op.what {
                        0 => Write::Create {
                            key: op.key.clone(),
                            value: vec![op.value],
                        },
                        1 => Write::Delete {
                            key: op.key.clone(),
                            resource_version: Some(version(op)),
                        },
                        2 => Write::Delete {
                            key: op.key.clone(),
                            resource_version: None,
                        },
                        _ => Write::Update {
                            key: op.key.clone(),
                            resource_version: version(op),
                            value: vec![op.value],
                            bump_generation: op.bump,
                        },
                    })
                    .collect();
                let want = model.commit(&writes);
                let got = store.commit(writes.clone()).await;
                let versions = got.as_ref().map(|all| {
                    all.iter()
                        .map(|s| (s.resource_version, s.generation))
                        .collect::<Vec<_>>()
                });
                assert_eq!(versions.map_err(Clone::clone), want, "{writes:?}");
                for (stored, write) in got.iter().flatten().zip(&writes) {
                    let known = uids.get(&stored.key).cloned();
                    match write {
                        Write::Create { key, .. } => assert_ne!(
                            uids.insert(key.clone(), stored.uid.clone()).as_ref(),
                            Some(&stored.uid),
                            "a new object has a new uid"
                        ),
                        Write::Update { .. } | Write::Delete { .. } => {
                            assert_eq!(known.as_ref(), Some(&stored.uid))
                        }
                    }
                }
            }
            Step::List {
                kind,
                namespace,
                limit,
            } => {
                let select = Select {
                    kind: kind.then(|| ("g".to_owned(), "A".to_owned())),
                    namespace: namespace.then(|| "y".to_owned()),
                };
                let mut got = Vec::new();
                let mut after = None;
                loop {
                    let page = store.list(&select, Page { limit, after }).await.unwrap();
                    assert_eq!(page.resource_version, model.revision);
                    got.extend(page.items.iter().map(plain));
                    let Some(next) = page.next else { break };
                    after = Some(next);
                }
                let want: Vec<_> = model
                    .objects
                    .values()
                    .filter(|s| (!kind || s.key.kind == "A") && (!namespace || s.key.namespace == "y"))
                    .map(plain)
                    .collect();
                assert_eq!(got, want);
            }
        }
        while let Some(Some(event)) = watch.next().now_or_never() {
            match event.unwrap().change {
                Change::Put(stored) => followed.insert(stored.key.clone(), stored),
                Change::Delete(stored) => followed.remove(&stored.key),
            };
        }
        assert_eq!(
            followed.values().map(plain).collect::<Vec<_>>(),
            model.objects.values().map(plain).collect::<Vec<_>>()
        );
        assert_eq!(store.resource_version(), model.revision);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_store_behaves_as_a_map(steps in steps()) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(check(steps));
    }
}
