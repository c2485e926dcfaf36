//! 500 seeds; `SEEDS=10000` for more, `SEED=n` for one.
#![allow(missing_docs, reason = "tests")]

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicUsize, Ordering},
};
use tombolo_simulation::{Outcome, run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Of 10,000: a cluster that was removed and admitted again was taken for the removed one, where its first contact was not
/// with whoever admitted it, or that one had been restored.
const FAILED_ONCE: [u64; 3] = [1698, 1788, 6517];

/// Those are the stories that failed: without renamings, which came later.
fn renames(seed: u64) -> bool {
    !FAILED_ONCE.contains(&seed)
}

#[test]
fn all_seeds_heal() {
    let seeds: Vec<u64> = match number("SEED") {
        Some(seed) => vec![seed],
        None => {
            let count = number("SEEDS").unwrap_or(500);
            (0..count)
                .chain(FAILED_ONCE.into_iter().filter(|seed| *seed >= count))
                .collect()
        }
    };
    let mut total = Outcome::default();
    let mut audits: BTreeMap<&str, u64> = BTreeMap::new();
    let mut failed = Vec::new();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((
                *seed,
                catch_unwind(AssertUnwindSafe(|| run(*seed, renames(*seed)))),
            ));
        }
        done
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let join = |worker: std::thread::ScopedJoinHandle<'_, _>| {
            worker.join().expect("a worker catches what panics")
        };
        workers.into_iter().flat_map(join).collect::<Vec<_>>()
    });
    for (seed, result) in results {
        match result {
            Ok(outcome) => {
                total.clusters += outcome.clusters;
                total.steps += outcome.steps;
                total.joins += outcome.joins;
                total.removals += outcome.removals;
                total.renamings += outcome.renamings;
                total.restarts += outcome.restarts;
                for (code, count) in outcome.audits {
                    *audits.entry(code).or_default() += count;
                }
            }
            Err(_) => {
                println!("FAILED: SEED={seed} cargo test -p tombolo-simulation");
                failed.push(seed);
            }
        }
    }
    println!(
        "{} seeds: {} clusters, {} steps, {} joins, {} removals, {} renamings, {} restarts, refusals {audits:?}",
        seeds.len(),
        total.clusters,
        total.steps,
        total.joins,
        total.removals,
        total.renamings,
        total.restarts
    );
    assert!(failed.is_empty(), "seeds {failed:?} failed; SEED=n replays one");
    if seeds.len() >= 100 {
        // A simulation in which nothing happens proves nothing.
        assert!(total.joins > 200 && total.removals > 20 && total.restarts > 100);
        assert!(total.renamings > 100);
        for code in [
            "TMB0711", "TMB0713", "TMB0716", "TMB0717", "TMB0718", "TMB0721", "TMB0722", "TMB0723",
        ] {
            assert!(audits.contains_key(code), "{code} was never refused");
        }
    }
}
