use crate::{Candidate, Destination};

/// The order in which to try candidates now, as indices into [`Destination::candidates`].
///
/// By rank. The first among equals is the one of fewer open connections (`outstanding`) in proportion to weight of two
/// that are drawn from `seed`, where one of twice the weight is drawn twice as often: an endpoint that has just come
/// back has none open and would otherwise get everything that is new, from every caller at once. The others follow by
/// open connections. Ejected ones come last, in the same order among themselves: they are tried when nobody else is
/// left.
///
/// Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001); Envoy's LEAST_REQUEST.
pub fn order(
    destination: &Destination,
    outstanding: &dyn Fn(&Candidate) -> u32,
    ejected: &dyn Fn(&Candidate) -> bool,
    seed: u64,
) -> Vec<usize> {
    let candidates = &destination.candidates;
    let weight_max = candidates
        .iter()
        .map(|candidate| candidate.weight)
        .max()
        .unwrap_or(1);
    let mut keyed: Vec<(Key, usize)> = candidates
        .iter()
        .enumerate()
        .map(|(position, candidate)| {
            // Per unit of the greatest weight, so that equal weights compare by plain counts. Below 2^64.
            let load = u64::from(outstanding(candidate)) * u64::from(weight_max)
                / u64::from(candidate.weight.max(1));
            let key = Key {
                ejected: ejected(candidate),
                rank: candidate.rank,
                load,
                draw: draw(seed, position as u64, candidate.weight),
            };
            (key, position)
        })
        .collect();
    keyed.sort_unstable();
    first_of_two(&mut keyed);
    keyed.into_iter().map(|(_, position)| position).collect()
}

/// Moves the less loaded of the two that are drawn to the front. Among two there is nothing to draw.
fn first_of_two(keyed: &mut [(Key, usize)]) {
    let Some((first, _)) = keyed.first() else { return };
    let (ejected, rank) = (first.ejected, first.rank);
    let equals = keyed
        .iter()
        .take_while(|(key, _)| (key.ejected, key.rank) == (ejected, rank))
        .count();
    let by_draw = |besides: Option<usize>| {
        let others = (0..equals).filter(move |at| Some(*at) != besides);
        others.min_by_key(|at| keyed[*at].0.draw)
    };
    let drawn = by_draw(None);
    // They are sorted by load: the smaller place is the smaller load.
    let Some(chosen) = [drawn, by_draw(drawn)].into_iter().flatten().min() else {
        return;
    };
    keyed[..=chosen].rotate_right(1);
}

/// Compared field by field; the smallest is tried first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    ejected: bool,
    rank: u32,
    load: u64,
    draw: u64,
}

/// An exponential variate of rate `weight`, as bits that sort like the number. The smallest of several such is each one
/// with probability in proportion to its rate, so sorting by them is a weighted draw without replacement.
///
/// Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006).
pub(crate) fn draw(seed: u64, position: u64, weight: u32) -> u64 {
    // splitmix64 over the pair.
    let mut z = seed.wrapping_add(position.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    // 53 bits, shifted by half a step: in (0, 1), never 0, whose logarithm is infinite.
    let uniform = ((z >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let exponential = -uniform.ln() / f64::from(weight.max(1));
    // Positive floats sort like their bits.
    exponential.to_bits()
}

#[cfg(test)]
mod tests;
