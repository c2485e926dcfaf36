//! `tombolo-gateway`: the east-west gateway at the edge of a network.
//!
//! Position: layer 6. Members of other networks, and hosts that only dial out, reach the endpoints of this network
//! through it. It is a subscriber of discovery like an agent.
//!
//! **Invariant:** what it passes on is encrypted by the two ends; it holds no key of theirs.
//! **Invariant:** it routes to services of its own mesh in its own network, and nowhere else (`route`).
//! **Invariant:** without discovery it serves what it knew last.

mod admission;
mod balance;
mod budget;
mod config;
mod front;
mod guests;
mod hello;
mod join;
mod metrics;
mod pass;
mod passthrough;
mod route;
mod run;
mod service;
mod sessions;
mod way_in;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};
use tombolo_telemetry::{LogConfig, log};

/// The east-west gateway of a network.
#[derive(Debug, Parser)]
#[command(name = "tombolo-gateway", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enrols this gateway with a token of `tombolo token create --gateway`.
    Join(join::Args),
    /// Serves until SIGTERM; then open calls may end before it does.
    Run(Run),
    /// Prints the settings in force.
    Config {
        #[command(flatten)]
        settings: config::Args,
    },
}

#[derive(Debug, clap::Args)]
struct Run {
    #[command(flatten)]
    settings: config::Args,
    /// Keys, certificate, registration and snapshot.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tombolo/gateway")]
    state_dir: PathBuf,
}

fn main() -> ExitCode {
    match start(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            // The log may not be up yet, or go elsewhere.
            #[allow(
                clippy::print_stderr,
                reason = "the last word of a program that could not start"
            )]
            {
                eprintln!("tombolo-gateway: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<()> {
    let runtime = |workers| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .thread_name("tombolo")
            .enable_all()
            .build()
            .context("the runtime cannot be started")
    };
    match cli.command {
        Command::Join(args) => runtime(1)?.block_on(join::join(args)),
        Command::Config { settings } => {
            #[allow(clippy::print_stdout, reason = "printing is what this verb is for")]
            {
                println!("{}", serde_json::to_string_pretty(&settings.load()?)?);
            }
            Ok(())
        }
        Command::Run(args) => {
            let settings = args.settings.load()?;
            let mut log = LogConfig::new("tombolo-gateway");
            log.filter.clone_from(&settings.log_filter);
            log::init(&log)?;
            let runtime = runtime(settings.workers)?;
            let outcome = runtime.block_on(run::run(settings, &args.state_dir));
            runtime.shutdown_background();
            outcome
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
