//! The corpus of the fuzz target `packet_flow`, replayed; and damage done to each of its inputs.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests")]

#[path = "../../../fuzz/fuzz_targets/check/packet_flow.rs"]
mod check;

use std::{collections::BTreeSet, fs};

fn corpus() -> Vec<Vec<u8>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/packet_flow");
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    files.map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn the_corpus_reaches_every_outcome() {
    let reached: BTreeSet<&str> = corpus().iter().flat_map(|input| check::check(input)).collect();
    let outcomes = [
        "write",
        "established",
        "abandoned",
        "connect",
        "query",
        "ping",
        "nothing",
        "handed over",
    ];
    // A table is not filled, and families are not withdrawn, by a few frames.
    let rejects = tombolo_flow::FlowReject::ALL.iter().map(|reject| reject.reason());
    let rejects = rejects.filter(|reason| !["flows_full", "family_not_offered"].contains(reason));
    let missing: Vec<_> = outcomes
        .into_iter()
        .chain(rejects)
        .filter(|name| !reached.contains(name))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn so_does_every_damaged_byte_of_it() {
    for input in corpus() {
        for at in 0..input.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff, input[at] ^ 1, input[at].wrapping_add(1)] {
                let mut damaged = input.clone();
                damaged[at] = value;
                check::check(&damaged);
            }
            check::check(&input[..at]);
        }
    }
}
