//! `cargo xtask`: the checks that cargo does not have, and the run of all of them.
//!
//! `ci` is what `make test` runs, here and in CI, `slow` what `make test-slow` runs. `layers`, `licences`, `unused`, `docs` are its parts that are ours.
#![allow(clippy::print_stdout, reason = "a command-line program")]

mod ci;
mod docs;
mod graph;
mod licences;

use anyhow::{Result, bail};

fn main() -> std::process::ExitCode {
    match act() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            // The sentence and its causes: a backtrace would be the last thing that a run prints.
            eprintln!("xtask: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn act() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["ci", stages @ ..] => ci::run(stages),
        ["slow", stages @ ..] => ci::slow(stages),
        ["layers"] => graph::layers(),
        ["unused"] => graph::unused(),
        ["licences"] => licences::check(),
        ["docs"] => docs::generate(false),
        ["docs", "--check"] => docs::generate(true),
        _ => bail!(
            "usage: cargo xtask ci [STAGE…] | slow [STAGE…] | layers | unused | licences | docs [--check]"
        ),
    }
}
