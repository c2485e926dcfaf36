//! A 64-bit mixing function: hashes of maps, the same in every process since this layer has no randomness, and the
//! checksum of the file form. Keys come from discovery, which is trusted not to make them collide.

use std::hash::{BuildHasherDefault, Hasher};

/// A map or set with such hashes.
pub(crate) type State = BuildHasherDefault<Mix>;

/// A bijection of the state for every word, and of the word for every state.
fn step(state: u64, word: u64) -> u64 {
    (state ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

fn steps(state: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let state = words
        .iter()
        .fold(state, |state, word| step(state, u64::from_le_bytes(*word)));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    step(state, u64::from_le_bytes(last))
}

/// A checksum against accidents. Since each step is a bijection, any change within one word is always seen, and others
/// with a chance of 2^-64 not to be.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    steps(bytes.len() as u64, bytes)
}

/// The hasher.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = steps(self.0, bytes);
    }

    fn write_u8(&mut self, byte: u8) {
        self.0 = step(self.0, byte.into());
    }

    fn write_usize(&mut self, number: usize) {
        self.0 = step(self.0, number as u64);
    }

    fn write_isize(&mut self, number: isize) {
        self.0 = step(self.0, number as u64);
    }

    /// Every bit of the result depends on every bit of the state: maps use only some of them (murmur3's finalizer).
    fn finish(&self) -> u64 {
        let mut z = self.0;
        z = (z ^ (z >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        z = (z ^ (z >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        z ^ (z >> 33)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashSet, hash::BuildHasher as _};
    use tombolo_types::{NamespacedName, NetworkAddress};

    /// The keys of a large mesh fill the low and the high half of the hash about as well as chance would.
    #[test]
    fn hashes_of_similar_keys_differ() {
        const KEYS: u32 = 50_000;
        let state = State::default();
        let network: std::sync::Arc<str> = "net".into();
        let addresses = (0..KEYS).map(|n| {
            state.hash_one(NetworkAddress {
                network: network.clone(),
                address: (0x0a00_0000 | n).to_be_bytes().into(),
            })
        });
        let names =
            (0..KEYS).map(|n| state.hash_one(NamespacedName::new("shop", format!("service-{n}.svc"))));
        let texts = (0..KEYS).map(|n| state.hash_one(format!("Kubernetes//Pod/shop/web-{n:08x}").as_str()));
        for (what, hashes) in [
            ("addresses", addresses.collect::<Vec<_>>()),
            ("names", names.collect()),
            ("texts", texts.collect()),
        ] {
            for half in [
                hashes.iter().map(|&hash| hash as u32).collect::<HashSet<_>>(),
                hashes.iter().map(|hash| (hash >> 32) as u32).collect(),
            ] {
                // By chance 0.3 of 50,000 keys collide within 32 bits.
                assert!(half.len() as u32 >= KEYS - 5, "{what}: {}", half.len());
            }
        }
    }

    #[test]
    fn checksums_see_length_and_order() {
        let sums: HashSet<u64> = [
            &b""[..],
            b"\0",
            b"\0\0",
            b"12345678",
            b"12345678\0",
            b"1234567890",
            b"90",
            b"2345678190",
        ]
        .map(checksum)
        .into();
        assert_eq!(sums.len(), 8);
    }
}
