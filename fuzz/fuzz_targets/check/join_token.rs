//! What holds for any text that claims to be a join token. Run by the fuzzer and by the replay of its corpus.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use tombolo_types::{JoinToken, TOKEN_PREFIX};

/// The bytes as the text itself, and as a body with the right frame around it: the checksum would keep nearly every
/// other input from the reader of the content.
pub fn check(bytes: &[u8]) {
    text(&String::from_utf8_lossy(bytes));
    let sum = crc32(bytes);
    text(&format!(
        "{TOKEN_PREFIX}{}",
        URL_SAFE_NO_PAD.encode([bytes, &sum.to_be_bytes()].concat())
    ));
}

fn text(text: &str) {
    match JoinToken::decode(text) {
        Ok(token) => {
            assert_eq!(*token.encode(), text.trim(), "one token has one text");
            assert!((1..=8).contains(&token.endpoints.len()));
            let seed: String = token.seed.iter().map(|byte| format!("{byte:02x}")).collect();
            let shown = format!("{token:?}");
            let same = token.id_text().contains(&seed[..16])
                || token.endpoints.iter().any(|e| e.contains(&seed[..16]));
            assert!(
                same || token.trust_domain.as_str().contains(&seed[..16]) || !shown.contains(&seed[..16])
            );
        }
        Err(error) => {
            // The fixed texts of an error cannot repeat a part of the token.
            assert!(error.to_string().len() < 120);
        }
    }
}

/// CRC-32 (IEEE 802.3), written a second time so that a mistake in the first one shows.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ 0xedb8_8320
            } else {
                crc >> 1
            };
        }
    }
    !crc
}
