use super::*;
use crate::{
    fixture::{World, service, source, vip, workload},
    resolve,
};
use proptest::prelude::*;

/// A destination whose candidates have these (rank, weight).
fn destination(of: &[(u32, u32)]) -> Destination {
    let world = World::new(service(), (0..of.len()).map(|n| workload(n as u8)));
    let mut found = resolve(&world, &source(), vip(), 80).unwrap();
    for (candidate, &(rank, weight)) in found.candidates.iter_mut().zip(of) {
        (candidate.rank, candidate.weight) = (rank, weight);
    }
    found
}

fn number(candidate: &Candidate) -> usize {
    candidate
        .workload
        .uid
        .strip_prefix("uid-")
        .unwrap()
        .parse()
        .unwrap()
}

/// Checks the order for (rank, weight, open connections, ejected), where the seed does not matter.
fn check(of: &[(u32, u32, u32, bool)], expected: &[usize]) {
    let destination = destination(
        &of.iter()
            .map(|&(rank, weight, ..)| (rank, weight))
            .collect::<Vec<_>>(),
    );
    for seed in 0..20 {
        let found = order(
            &destination,
            &|one| of[number(one)].2,
            &|one| of[number(one)].3,
            seed,
        );
        assert_eq!(found, expected, "{of:?} seed {seed}");
    }
}

#[test]
fn rank_then_load_then_ejected() {
    let (no, out) = (false, true);
    check(&[(0, 1, 0, no)], &[0]);
    check(&[(1, 1, 0, no), (0, 1, 9, no)], &[1, 0]);
    check(&[(0, 1, 2, no), (0, 1, 1, no)], &[1, 0]);
    check(&[(0, 1, 1, no), (0, 10, 9, no)], &[1, 0]);
    check(&[(0, 10, 11, no), (0, 1, 1, no)], &[1, 0]);
    check(&[(0, 100, 2, no), (0, 100, 1, no)], &[1, 0]);
    check(&[(0, 1, 0, out), (5, 1, 9, no)], &[1, 0]);
    check(&[(1, 1, 0, out), (0, 1, 9, out)], &[1, 0]);
    check(&[(0, u32::MAX, u32::MAX, no), (0, 1, u32::MAX, no)], &[0, 1]);
}

/// How often each candidate comes first over many seeds, in percent.
fn shares(weights: &[u32]) -> Vec<usize> {
    const ROUNDS: usize = 20_000;
    let destination = destination(&weights.iter().map(|&weight| (0, weight)).collect::<Vec<_>>());
    let mut firsts = vec![0; weights.len()];
    for seed in 0..ROUNDS {
        firsts[order(&destination, &|_| 0, &|_| false, seed as u64)[0]] += 1;
    }
    firsts
        .iter()
        .map(|count| (count * 100 + ROUNDS / 2) / ROUNDS)
        .collect()
}

#[test]
fn ties_are_drawn_by_weight() {
    // (weights, percent that each comes first; 20,000 draws are within 1.5 of it)
    for (weights, expected) in [
        (&[1, 1][..], &[50, 50][..]),
        (&[1, 1, 1, 1], &[25, 25, 25, 25]),
        (&[3, 1], &[75, 25]),
        (&[70, 20, 10], &[70, 20, 10]),
    ] {
        for (share, expected) in shares(weights).iter().zip(expected) {
            assert!(
                share.abs_diff(*expected) <= 2,
                "{weights:?}: {:?}",
                shares(weights)
            );
        }
    }
}

/// Ten endpoints with connections that stay open; one has just come back with none.
#[test]
fn one_that_comes_back_is_not_flooded() {
    let mut open = [100u32; 10];
    open[3] = 0;
    let destination = destination(&[(0, 1); 10]);
    let mut firsts = [0u32; 10];
    for seed in 0..500 {
        let first = order(&destination, &|one| open[number(one)], &|_| false, seed)[0];
        firsts[first] += 1;
        open[first] += 1;
    }
    // A fair share is 50, two draws are two chances: 100. By fewest connections alone it would be 145.
    assert!((70..130).contains(&firsts[3]), "{firsts:?}");
    let others = firsts.iter().enumerate().filter(|(n, _)| *n != 3);
    let spread = others.map(|(_, count)| *count);
    assert!(
        spread.clone().all(|count| (25..65).contains(&count)),
        "{firsts:?}"
    );
    // In the end all are even.
    for seed in 500..5000 {
        let first = order(&destination, &|one| open[number(one)], &|_| false, seed)[0];
        open[first] += 1;
    }
    let (least, most) = (open.iter().min().unwrap(), open.iter().max().unwrap());
    assert!(most - least < 15, "{open:?}");
}

proptest! {
    #[test]
    fn a_permutation_that_obeys_the_keys(
        of in prop::collection::vec((0..3u32, 1..5u32, 0..4u32, any::<bool>()), 1..40),
        seed: u64,
    ) {
        let destination = destination(&of.iter().map(|&(rank, weight, ..)| (rank, weight)).collect::<Vec<_>>());
        let run = || order(&destination, &|one| of[number(one)].2, &|one| of[number(one)].3, seed);
        let found = run();
        prop_assert_eq!(&found, &run());
        let mut sorted = found.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..of.len()).collect::<Vec<_>>());
        // Behind the first, which is the better one of two that are drawn.
        let equals = of.iter().filter(|one| (one.3, one.0) == (of[found[0]].3, of[found[0]].0)).count();
        let alike = found[..equals].iter().all(|one| of[*one].1 == of[found[0]].1);
        let opens = found[..equals].iter().map(|one| of[*one].2);
        if equals > 1 && alike && opens.clone().min() < opens.clone().max() {
            let most = opens.clone().filter(|open| Some(*open) == opens.clone().max()).count();
            prop_assert!(most > 1 || Some(of[found[0]].2) < opens.max(), "the busiest comes first");
        }
        for pair in found[1..].windows(2) {
            let ((rank_a, weight_a, open_a, out_a), (rank_b, weight_b, open_b, out_b)) = (of[pair[0]], of[pair[1]]);
            prop_assert!((out_a, rank_a) <= (out_b, rank_b));
            if (out_a, rank_a) == (out_b, rank_b) && weight_a == weight_b {
                prop_assert!(open_a <= open_b);
            }
        }
    }
}
