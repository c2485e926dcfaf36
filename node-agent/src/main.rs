//! `tombolo-agent`: the node agent of a VM.
//!
//! Position: layer 6: arguments, configuration, and the wiring of capture, data path and control client. It serves
//! from the snapshot on disk first and asks discovery meanwhile.
//!
//! **Invariant:** it needs no capability: the TUN device, addresses and routes are netd's work.
//! **Invariant:** without discovery, and after any absence, it serves what it knew last.

mod admin;
mod agent;
mod bridge;
mod config;
mod endpoints;
mod front;
mod guard;
mod handover;
mod host;
mod linger;
mod names;
mod notify;
mod ordinary;
mod previous;
mod reload;
mod reload_verb;
mod reverse;
mod status;
mod successor;
mod why;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use config::{Origin, Settings};
use std::{ffi::OsString, path::PathBuf, process::ExitCode};
use tombolo_telemetry::{LogConfig, log};

/// The node agent of the mesh.
#[derive(Debug, Parser)]
#[command(name = "tombolo-agent", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs until SIGTERM; then open connections may end before it does.
    Run(Box<Run>),
    /// Has the running agent replaced by the program and the configuration that are there now; no connection is lost.
    Reload {
        /// Directory of the admin socket.
        #[arg(long, value_name = "DIR", default_value = "/run/tombolo/agent")]
        run_dir: PathBuf,
    },
    /// Starts this program with these arguments and ends.
    #[command(hide = true)]
    Spawn {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Prints the settings in force and where each comes from.
    Config {
        #[command(flatten)]
        settings: config::Args,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Run {
    #[command(flatten)]
    settings: config::Args,
    /// Keys, certificate, registration and snapshot.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tombolo/agent")]
    state_dir: PathBuf,
    /// Directory of the admin socket.
    #[arg(long, value_name = "DIR", default_value = "/run/tombolo/agent")]
    run_dir: PathBuf,
    /// netd's socket.
    #[arg(long, value_name = "PATH", default_value = tombolo_capture::netd::SOCKET)]
    netd_socket: PathBuf,
    /// Take over from the agent at the other end of standard input.
    #[arg(long, hide = true)]
    hand_over: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let takes_over = matches!(&cli.command, Command::Run(run) if run.hand_over);
    if takes_over {
        notify::mute();
    }
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if takes_over => successor::give_up(&error),
        Err(error) => {
            tracing::error!("{error:#}");
            // `systemctl status` shows it for as long as the unit is down.
            notify::status(&format!("{error:#}"));
            // The log may not be up yet, or go elsewhere.
            #[allow(
                clippy::print_stderr,
                reason = "the last word of a program that could not start"
            )]
            {
                eprintln!("tombolo-agent: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Config { settings, json } => show(&settings.load()?, json),
        Command::Reload { run_dir } => reload_verb::reload(&run_dir),
        Command::Spawn { args } => reload_verb::spawn(&args),
        Command::Run(run) => {
            let Settings {
                log_filter,
                log_format,
                workers,
                ..
            } = &*run.settings.load()?;
            let mut log = LogConfig::new("tombolo-agent");
            log.filter.clone_from(log_filter);
            log.format = (*log_format).into();
            log::init(&log)?;
            host::raise_descriptor_limit();
            host::keep_freed_memory();
            host::warn_of_privilege();
            // One worker is this thread itself: no hand-over between threads, and one stack and one heap less.
            let mut builder = if *workers == 1 {
                tokio::runtime::Builder::new_current_thread()
            } else {
                tokio::runtime::Builder::new_multi_thread()
            };
            let runtime = builder
                .worker_threads(*workers)
                .thread_name("tombolo")
                .enable_all()
                .build()
                .context("the runtime cannot be started")?;
            let settings = run.settings.load()?.value;
            // Now: after an upgrade the link says that this program is deleted.
            let program = std::env::current_exe().context("the program's own path is not known")?;
            let outcome = runtime.block_on(agent::run(agent::Options {
                program,
                hand_over: run.hand_over,
                settings,
                state_dir: run.state_dir,
                run_dir: run.run_dir,
                netd_socket: run.netd_socket,
            }));
            // Tasks were drained; a lookup that hangs in the C library must not hold the process.
            runtime.shutdown_background();
            outcome
        }
    }
}

#[allow(clippy::print_stdout, reason = "printing is what this verb is for")]
fn show(loaded: &config::Loaded, json: bool) -> anyhow::Result<()> {
    let rows = loaded.rows();
    if json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(key, value, origin)| serde_json::json!({"key": key, "value": value, "origin": origin.to_string()}))
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let width = rows.iter().map(|(key, ..)| key.len()).max().unwrap_or(0);
    let values = rows
        .iter()
        .map(|(_, value, _)| value.to_string().len())
        .max()
        .unwrap_or(0);
    for (key, value, origin) in rows {
        println!(
            "{key:<width$}  {:<values$}  {}",
            value.to_string(),
            Origin::to_string(&origin)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        let line = "tombolo-agent run --config /c --state-dir /s --run-dir /r --netd-socket /n --workers 3";
        let Command::Run(run) = Cli::parse_from(line.split(' ')).command else {
            panic!("not run")
        };
        assert_eq!(
            (run.state_dir, run.run_dir, run.netd_socket),
            ("/s".into(), "/r".into(), "/n".into())
        );
        assert!(Cli::try_parse_from(["tombolo-agent", "run", "--workers", "0"]).is_err());
    }
}
