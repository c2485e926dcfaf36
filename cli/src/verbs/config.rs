use crate::{failure::Failure, services};
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Print the agent's settings in force and where each comes from.
    Show(Show),
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

/// The agent itself knows its settings: it is asked, whether it runs or not.
pub(crate) fn run(verb: &Verb) -> Result<ExitCode, Failure> {
    let Verb::Show(args) = verb;
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
