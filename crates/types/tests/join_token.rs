//! Replays the fuzzer's corpus of join tokens.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests")]

#[path = "../../../fuzz/fuzz_targets/check/join_token.rs"]
mod check;

#[test]
fn the_corpus_of_join_tokens() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/join_token");
    let mut taken = 0;
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        check::check(&bytes);
        count += 1;
        let text = String::from_utf8_lossy(&bytes);
        taken += usize::from(tombolo_types::JoinToken::decode(&text).is_ok());
    }
    assert!(
        count >= 20 && (3..count - 5).contains(&taken),
        "{taken} of {count} are tokens"
    );
}
