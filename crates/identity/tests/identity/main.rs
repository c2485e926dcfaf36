//! Identities as peers meet them: real handshakes in memory between certificates made here.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod files;
mod handshake;
mod live;
mod names;
mod pair;
mod pinned;
mod pki;
