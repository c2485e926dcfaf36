//! Bytes that claim to be a PROXY header never panic, and what is understood means the same when it is told again.
#![no_main]

#[path = "check/proxy_header.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    check::check(bytes);
});
