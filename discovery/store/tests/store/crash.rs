//! kill -9 at any moment: what was acknowledged is there, and of what was not, all of a transaction or nothing.

use futures_util::future::join_all;
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};
use tombolo_store::{Key, Page, RedbStore, Select, Store as _, StoreOptions, Write};

const FOLDER: &str = "TOMBOLO_STORE_CRASH_FOLDER";
const WRITERS: usize = 4;
/// Objects in each transaction: one changed, the rest new.
const PARTS: usize = 5;

fn counter(writer: usize) -> Key {
    Key::new("g", "Counter", "", &format!("w{writer}"))
}

fn part(writer: usize, n: u64, part: usize) -> Key {
    Key::new("g", "Part", &format!("w{writer}"), &format!("{n:08}-{part}"))
}

/// The child: four writers, each adds one to its counter and makes four objects of that number, for ever. It says
/// what was acknowledged, after it was.
#[test]
#[ignore = "is run by the test below, which kills it"]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .unwrap();
    runtime.block_on(async {
        let store = RedbStore::open(&Path::new(&folder).join("store"), StoreOptions::default()).unwrap();
        say("OPEN");
        let write = |writer: usize| {
            let store = &store;
            async move {
                loop {
                    let found = store.get(&counter(writer)).await.unwrap();
                    let n = found.as_ref().map_or(1, |s| {
                        u64::from_be_bytes(s.value.as_slice().try_into().unwrap()) + 1
                    });
                    let value = n.to_be_bytes().to_vec();
                    let mut writes = vec![match found {
                        None => Write::Create {
                            key: counter(writer),
                            value,
                        },
                        Some(s) => Write::Update {
                            key: s.key,
                            resource_version: s.resource_version,
                            value,
                            bump_generation: true,
                        },
                    }];
                    // Some values are longer than a page, so that a torn write would tear them.
                    let long = vec![b'x'; if n.is_multiple_of(7) { 20_000 } else { 50 }];
                    writes.extend((1..PARTS).map(|i| Write::Create {
                        key: part(writer, n, i),
                        value: long.clone(),
                    }));
                    let done = store.commit(writes).await.unwrap();
                    say(&format!("ACK {writer} {n} {}", done[0].resource_version));
                }
            }
        };
        join_all((0..WRITERS).map(write)).await;
    });
}

/// One write to the pipe, so that a killed child leaves no half line between whole ones.
fn say(line: &str) {
    std::io::stdout()
        .write_all(format!("{line}\n").as_bytes())
        .unwrap();
    std::io::stdout().flush().unwrap();
}

#[test]
fn kill_9_loses_no_acknowledged_write_and_halves_none() {
    let folder = tempfile::tempdir().unwrap();
    // Per writer the last number and revision that it was told of, or that was found after a kill.
    let mut acknowledged: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
    let mut total = 0;
    let mut rounds_with_writes = 0;
    // A fixed sequence of odd-looking moments, 0 to 120 ms after the store is open.
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "crash::child",
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let open = lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| line.ends_with("OPEN"));
        assert!(
            open,
            "round {round}: the child did not open the store: {:?}",
            child.wait()
        );
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(seed % 120_000));
            child.kill().unwrap();
            child.wait().unwrap()
        });
        let mut acks = 0;
        for line in lines.map_while(Result::ok) {
            let words: Vec<&str> = line.split(' ').collect();
            let ["ACK", writer, n, revision] = words.as_slice() else {
                continue;
            };
            let (writer, n, revision): (usize, u64, u64) = (
                writer.parse().unwrap(),
                n.parse().unwrap(),
                revision.parse().unwrap(),
            );
            acknowledged.insert(writer, (n, revision));
            acks += 1;
        }
        let status = killer.join().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "it was killed, not done"
        );
        rounds_with_writes += usize::from(acks > 0);
        total += acks;
        check(folder.path(), &mut acknowledged);
    }
    println!("{total} transactions acknowledged over 20 kills, writes in {rounds_with_writes} rounds");
    assert!(
        rounds_with_writes >= 10,
        "the kills came too early to prove anything: {rounds_with_writes}"
    );
}

/// What was there once stays there: it is known to the next round as if it had been acknowledged.
fn check(folder: &Path, acknowledged: &mut BTreeMap<usize, (u64, u64)>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = RedbStore::open(&folder.join("store"), StoreOptions::default()).unwrap();
        let parts = store.list(&Select::kind("g", "Part"), Page::all()).await.unwrap();
        let names: BTreeSet<Key> = parts.items.into_iter().map(|s| s.key).collect();
        let mut wanted = BTreeSet::new();
        for writer in 0..WRITERS {
            let found = store.get(&counter(writer)).await.unwrap();
            let n = found
                .as_ref()
                .map_or(0, |s| u64::from_be_bytes(s.value.as_slice().try_into().unwrap()));
            let (acked, revision) = acknowledged.get(&writer).copied().unwrap_or_default();
            assert!(
                n >= acked,
                "writer {writer}: {acked} was acknowledged, {n} is there"
            );
            assert!(
                n <= acked + 1,
                "writer {writer} waits for each answer, yet {n} follows {acked}"
            );
            assert!(store.resource_version() >= revision);
            assert_eq!(found.as_ref().map_or(0, |s| s.generation), n);
            acknowledged.insert(writer, (n, found.map_or(0, |s| s.resource_version)));
            wanted.extend((1..=n).flat_map(|n| (1..PARTS).map(move |i| part(writer, n, i))));
        }
        // Exactly the parts of the numbers that the counters stand at: none missing, none too many.
        assert_eq!(names, wanted);
        assert_eq!(
            store.resource_version() as usize,
            wanted.len() / (PARTS - 1) * PARTS
        );
    });
}
