//! Replays the fuzzer's corpus of CONNECT headers, and any bytes.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests")]

#[path = "../../../fuzz/fuzz_targets/check/connect_headers.rs"]
mod check;

use proptest::prelude::*;
use tombolo_tunnel::Authority;

#[test]
fn the_corpus_of_connect_headers() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/connect_headers");
    let (mut taken, mut count) = (0, 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        check::check(&bytes);
        count += 1;
        let text = String::from_utf8_lossy(&bytes);
        taken += usize::from(
            text.lines()
                .next()
                .unwrap_or_default()
                .parse::<Authority>()
                .is_ok(),
        );
    }
    assert!(
        count >= 20 && (5..count - 5).contains(&taken),
        "{taken} of {count} are authorities"
    );
}

proptest! {
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        check::check(&bytes);
    }

    #[test]
    fn any_text_of_the_grammar(text in "[a-z0-9.:\\[\\]%_-]{0,40}(\n[bf][a-z0-9.:=,;\"\\[\\] -]{0,80}){0,4}") {
        check::check(text.as_bytes());
    }
}
