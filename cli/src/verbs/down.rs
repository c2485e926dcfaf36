use crate::{
    failure::Failure,
    output,
    services::{self, Layout},
};
use std::process::ExitCode;

/// Stop agent and netd and take back everything they did to this host; it stays enrolled.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: Layout,
}

pub(crate) async fn run(args: &Args) -> Result<ExitCode, Failure> {
    services::need_root()?;
    let stopped = services::stop(&args.layout).await?;
    output::line(if stopped {
        "Stopped. tombolo up starts again."
    } else {
        "Nothing was running."
    });
    Ok(ExitCode::SUCCESS)
}
