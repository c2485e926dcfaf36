use super::from_istio;
use crate::{failure::Failure, services, sockets::Sockets};
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Print the agent's settings in force and where each comes from.
    Show(Show),
    /// Take an Istio VM over: print its WorkloadGroup and service, and what has no counterpart.
    FromIstio(from_istio::Args),
}

/// Print the agent's settings.
#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// The agent's configuration file.
    #[arg(long, value_name = "FILE", default_value = "/etc/tombolo/agent.yaml")]
    config: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(verb: &Verb, sockets: &Sockets) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Show(args) => show(args),
        Verb::FromIstio(args) => from_istio::run(args, sockets).await,
    }
}

/// The agent itself knows its settings: it is asked, whether it runs or not.
fn show(args: &Show) -> Result<ExitCode, Failure> {
    let program = services::find("tombolo-agent")?;
    let mut command = std::process::Command::new(&program);
    command.arg("config").arg("--config").arg(&args.config);
    if args.json {
        command.arg("--json");
    }
    let status = command
        .status()
        .map_err(|error| Failure::plain(format!("{}: {error}", program.display())))?;
    Ok(ExitCode::from(
        status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(crate::failure::ERROR),
    ))
}
