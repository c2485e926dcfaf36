//! Tasks with a name and an owner, values published to many readers, shares of what is scarce, and a small HTTP endpoint.
//!
//! Position: layer 3, under everything that is async. A program makes one [`TaskGroup`], spawns everything in it and
//! ends by draining it; state that many tasks read is [`published`] by its one owner.
//!
//! **Invariant:** no protocol and no configuration lives here.

pub mod fair;
pub mod http;
mod published;
mod tasks;

pub use published::{Publisher, Reader, published};
pub use tasks::{Drained, TaskGroup, stop_signal};
