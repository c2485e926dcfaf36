use tombolo_federation::{Crypto, Ed25519, MemberKey};

/// SplitMix64: all chance of a run.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub(crate) fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap_or(0)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Real signatures in some runs; in the others a hash that anybody could compute, and that nobody here does for
/// another.
#[derive(Debug)]
pub(crate) enum Keys {
    Real(Ed25519),
    Cheap(MemberKey),
}

impl Keys {
    pub(crate) fn new(seed: &[u8; 32], real: bool) -> Self {
        if real {
            Self::Real(Ed25519::from_seed(seed))
        } else {
            Self::Cheap(MemberKey(seed.map(|byte| !byte)))
        }
    }
}

fn cheap(key: &MemberKey, message: &[u8]) -> Vec<u8> {
    let hash = key
        .0
        .iter()
        .chain(message)
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    hash.to_be_bytes().to_vec()
}

impl Crypto for Keys {
    fn public_key(&self) -> MemberKey {
        match self {
            Self::Real(key) => key.public_key(),
            Self::Cheap(key) => *key,
        }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        match self {
            Self::Real(key) => key.sign(message),
            Self::Cheap(key) => cheap(key, message),
        }
    }

    fn verify(&self, key: &MemberKey, message: &[u8], signature: &[u8]) -> bool {
        match self {
            Self::Real(own) => own.verify(key, message, signature),
            Self::Cheap(_) => cheap(key, message) == signature,
        }
    }
}
