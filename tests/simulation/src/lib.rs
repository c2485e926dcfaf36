//! Federation in virtual time: several discoveries, a network that stalls, cuts and heals, restarts with nothing but
//! the store, backups, clocks that differ, and members that lie; a reference model beside it.
//!
//! Everything follows from one seed. [`run`] checks after each step what must never be, and after the network has
//! healed what must be: every member holds of every other exactly what that one exports.

#![allow(clippy::print_stdout, reason = "the trace of a replayed seed")]

mod attack;
mod checks;
mod keys;
mod model;
mod names;
mod run;
mod simulation;

pub use run::{Outcome, run};
