//! Objects as bytes: a version byte, uid, revision, generation, creation, then the value as it was given.

use crate::{Key, Stored};
use uuid::Uuid;

/// Version of the fixed part. A new one is read beside the old one; the schema number goes up only when a program
/// that knows only the old one would do harm.
const RECORD_VERSION: u8 = 1;
const HEAD_BYTES: usize = 1 + 16 + 8 + 8 + 8;

pub(crate) fn encode(stored: &Stored, uid: Uuid) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + stored.value.len());
    bytes.push(RECORD_VERSION);
    bytes.extend_from_slice(uid.as_bytes());
    bytes.extend_from_slice(&stored.resource_version.to_be_bytes());
    bytes.extend_from_slice(&stored.generation.to_be_bytes());
    bytes.extend_from_slice(&stored.created_unix_ms.to_be_bytes());
    bytes.extend_from_slice(&stored.value);
    bytes
}

/// `None` for bytes that no version wrote.
pub(crate) fn decode(key: Key, bytes: &[u8]) -> Option<(Stored, Uuid)> {
    let (version, rest) = bytes.split_first()?;
    if *version != RECORD_VERSION {
        return None;
    }
    let (uid, rest) = rest.split_first_chunk::<16>()?;
    let (resource_version, rest) = rest.split_first_chunk::<8>()?;
    let (generation, rest) = rest.split_first_chunk::<8>()?;
    let (created, value) = rest.split_first_chunk::<8>()?;
    let uid = Uuid::from_bytes(*uid);
    let stored = Stored {
        key,
        uid: uid.to_string(),
        resource_version: u64::from_be_bytes(*resource_version),
        generation: u64::from_be_bytes(*generation),
        created_unix_ms: i64::from_be_bytes(*created),
        value: value.to_vec(),
    };
    Some((stored, uid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(rv: u64, generation: u64, created: i64, value in proptest::collection::vec(any::<u8>(), 0..99), uid: u128) {
            let uid = Uuid::from_u128(uid);
            let key = Key::new("g", "K", "n", "x");
            let stored = Stored {
                key: key.clone(), uid: uid.to_string(), resource_version: rv, generation, created_unix_ms: created, value,
            };
            prop_assert_eq!(decode(key, &encode(&stored, uid)), Some((stored, uid)));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(Key::new("g", "K", "n", "x"), &bytes);
        }
    }
}
