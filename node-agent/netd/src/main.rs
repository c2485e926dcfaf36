//! `tombolo-netd`: the one program on a host of the mesh with CAP_NET_ADMIN.
//!
//! It owns the link mesh0, the routes of the mesh's virtual addresses, what the host's resolver knows of mesh0 and the
//! nft table of the guard, and nothing else, and does for the agent what the agent may not do itself. It has no input from the network: the agent, which has, is held to six verbs.
//!
//! **Invariant:** when it stops, mesh0 and its routes stay, so that calls into the mesh fail at once instead of leaking
//! to the default route; `revert` (which `tombolo down` and `tombolo leave` ask for) removes them.

mod backends;
mod bus;
mod file;
mod guard;
mod lookup;
mod resolv;
mod resolver;
mod seen;

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand};
use guard::Guard;
use resolver::{Places, Resolver};
use std::{fs, path::PathBuf, sync::Arc, time::Duration};
use tombolo_capture::{
    netd::{GuardRules, HostGuard as _, INTERFACE, Mesh0, NetdServer, SOCKET},
    privilege,
};
use tombolo_runtime::TaskGroup;
use tombolo_telemetry::log::{self, LogConfig};
use tombolo_types::Code;

/// Connections get so long to end.
const DRAIN: Duration = Duration::from_secs(2);

/// Owns mesh0 and the routes into the mesh, for the agent that has no capabilities.
#[derive(Debug, Parser)]
#[command(name = "tombolo-netd", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the agent until SIGTERM; mesh0 stays then
    Run(Run),
    /// Removes mesh0 and all routes into the mesh
    Revert(Link),
}

#[derive(Debug, Args)]
struct Run {
    /// Unix socket to serve
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// User that the agent runs as, by name or number; it and root are answered
    #[arg(long, value_name = "USER", default_value = "tombolo-agent")]
    agent_user: String,
    #[command(flatten)]
    link: Link,
    /// Log levels, for example debug or info,tombolo_capture=trace
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
}

#[derive(Debug, Args)]
struct Link {
    /// Name of the link
    #[arg(long, value_name = "NAME", default_value = INTERFACE)]
    interface: String,
    /// The agent's configuration: netd takes the host owner's word on names from it
    #[arg(long, value_name = "FILE", default_value = "/etc/tombolo/agent.yaml")]
    config: PathBuf,
    /// Keeps what a changed resolv.conf was before
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tombolo/netd")]
    state_dir: PathBuf,
}

impl Link {
    fn places(&self) -> Places {
        Places::new(&self.interface, &self.config, &self.state_dir)
    }
}

fn main() -> std::process::ExitCode {
    match act(Cli::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            // For people: the sentence and its causes, never a backtrace.
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "tombolo-netd: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn act(cli: Cli) -> anyhow::Result<()> {
    let runtime = |program: &dyn Fn(&tokio::runtime::Runtime) -> anyhow::Result<()>| {
        let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
        program(&built.context("the runtime cannot be started")?)
    };
    match cli.command {
        Command::Run(run) => {
            let mut config = LogConfig::new("tombolo-netd");
            config.filter.clone_from(&run.log);
            log::init(&config)?;
            let agent = user_id(&run.agent_user)?;
            if let Some(folder) = run.socket.parent() {
                fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
            }
            let guard = Arc::new(Guard::new(&run.link.interface));
            let server = NetdServer::bind(&run.socket, agent)
                .map_err(captured)?
                .with_guard(guard);
            // Before there is a second thread, and before anything is read from the socket.
            privilege::keep_only_net_admin().map_err(captured)?;
            runtime(&|runtime| runtime.block_on(serve(&server, &run, agent)))
        }
        Command::Revert(link) => {
            privilege::keep_only_net_admin().map_err(captured)?;
            runtime(&|runtime| {
                runtime.block_on(async {
                    let tasks = TaskGroup::new("netd");
                    resolver::revert(link.places()).await;
                    let mut mesh0 = Mesh0::new(&link.interface, 0, &tasks).map_err(captured)?;
                    let reverted = mesh0.revert().await;
                    let opened = Guard::new(&link.interface).set(&GuardRules::default()).await;
                    opened.map_err(|cause| anyhow::Error::msg(Code::GuardRefused.message(cause)))?;
                    Ok(reverted?)
                })
            })
        }
    }
}

async fn serve(server: &NetdServer, run: &Run, agent: u32) -> anyhow::Result<()> {
    let tasks = TaskGroup::new("netd");
    let mut mesh0 = Mesh0::new(&run.link.interface, agent, &tasks).map_err(captured)?;
    mesh0.clean_start().await?;
    tracing::info!(socket = %run.socket.display(), agent, link = run.link.interface, "serves");
    let resolver = Resolver::new(run.link.places(), &tasks);
    let serving = server.serve_with(mesh0, Some(Arc::new(resolver)), &tasks);
    // Outside of systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        served = serving => served?,
        signal = tombolo_runtime::stop_signal() => {
            tracing::info!(signal = signal?, "stops; mesh0 stays");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        }
    }
    tasks.stop();
    server.close();
    tasks.drain(DRAIN).await;
    Ok(())
}

/// The message of a failure to start.
fn captured(error: std::io::Error) -> anyhow::Error {
    anyhow::Error::msg(Code::CaptureFailed.message(error))
}

fn user_id(user: &str) -> anyhow::Result<u32> {
    if let Ok(number) = user.parse() {
        return Ok(number);
    }
    match nix::unistd::User::from_name(user).context("the users of this host cannot be read")? {
        Some(found) => Ok(found.uid.as_raw()),
        None => bail!(
            "{}",
            Code::CaptureFailed.message(format!(
                "there is no user {user}; name the agent's user with --agent-user"
            ))
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        let cli = Cli::parse_from(["tombolo-netd", "run", "--agent-user", "7", "--interface", "mesh1"]);
        let Command::Run(run) = cli.command else {
            panic!("not run")
        };
        assert_eq!(
            (run.link.interface.as_str(), run.socket.to_str()),
            ("mesh1", Some(SOCKET))
        );
        assert_eq!(user_id(&run.agent_user).unwrap(), 7);
        assert_eq!(user_id("root").unwrap(), 0);
        let error = user_id("no-such-user-here").unwrap_err().to_string();
        assert!(
            error.starts_with("TMB0311") && error.contains("--agent-user"),
            "{error}"
        );
    }
}
