//! Messages of another member, whatever their bytes, never panic the core and never make it believe more than it may.
#![no_main]

#[path = "check/federation_message.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(check::check(bytes)));
