//! Answers DNS queries for mesh names.
//!
//! Position: layer 1. The agent hands in the bytes of a query that reached the DNS VIP; the answer is bytes to send
//! back, or the word that the query is not for the mesh and goes to the host's own servers unchanged. hickory-proto
//! is fenced here.
//!
//! **Invariant:** no tokio, clock, randomness, files or sockets: the seed that shuffles addresses is an argument.
//! **Invariant:** garbage is dropped or refused, never a panic; a name outside the mesh is never answered or failed.

mod answer;
mod lookup;
mod names;

pub use answer::{Answer, Client, answer, servfail};
pub use names::{Addresses, Names, OnlyFamilies};
