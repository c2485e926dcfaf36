use clap::CommandFactory as _;
use std::process::ExitCode;

/// Print the completion script of a shell: tombolo completion bash > /etc/bash_completion.d/tombolo
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell.
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: &Args) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "tombolo", &mut script);
    crate::output::print(&String::from_utf8_lossy(&script));
    ExitCode::SUCCESS
}
