use std::fmt;
use tombolo_identity::{JoinKey, verify_join_signature};

/// Public Ed25519 key of a member's discovery.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberKey(pub [u8; 32]);

impl fmt::Debug for MemberKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("…")
    }
}

impl TryFrom<&[u8]> for MemberKey {
    type Error = std::array::TryFromSliceError;
    fn try_from(bytes: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self(bytes.try_into()?))
    }
}

/// The key of this discovery, and the check of the signatures of others. A trait, so that a simulation of thousands
/// of runs can do with a cheap one.
pub trait Crypto {
    /// The public half.
    fn public_key(&self) -> MemberKey;
    /// Signs.
    fn sign(&self, message: &[u8]) -> Vec<u8>;
    /// True if `signature` is one of `key` over `message`. False for a key that is none.
    fn verify(&self, key: &MemberKey, message: &[u8], signature: &[u8]) -> bool;
}

/// Ed25519 by AWS-LC. `Debug` shows only the public half.
#[derive(Debug)]
pub struct Ed25519(JoinKey);

impl Ed25519 {
    /// The key of a seed: of the file with the member key, or of an invite.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(JoinKey::from_seed(seed))
    }
}

impl Crypto for Ed25519 {
    fn public_key(&self) -> MemberKey {
        MemberKey(self.0.public_key())
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(message)
    }

    fn verify(&self, key: &MemberKey, message: &[u8], signature: &[u8]) -> bool {
        verify_join_signature(&key.0, message, signature).is_ok()
    }
}
