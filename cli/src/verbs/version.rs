use crate::{
    failure::Failure,
    output::{self, Format, Output},
    sockets::Sockets,
};
use serde_json::json;
use std::process::ExitCode;
use tombolo_proto::tombolo::{admin::v1::MeshRequest, agent::v1::StatusRequest};
use tombolo_types::{Code, far_apart};

/// Versions of this program, the agent of this host and discovery, as far as they answer.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn run(args: Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let own = env!("CARGO_PKG_VERSION");
    let agent = match sockets.agent().await {
        Ok(mut agent) => agent
            .status(StatusRequest {})
            .await
            .ok()
            .map(|answer| answer.into_inner().version),
        Err(_) => None,
    };
    let discovery = match sockets.admin().await {
        Ok(mut admin) => admin
            .mesh(MeshRequest {})
            .await
            .ok()
            .map(|answer| answer.into_inner().version),
        Err(_) => None,
    };
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            output::value(
                format,
                &json!({"tombolo": own, "agent": agent, "discovery": discovery}),
            )?;
        }
        Format::Table | Format::Wide | Format::Name => {
            output::line(format!("tombolo    {own}"));
            for (name, version) in [("agent", &agent), ("discovery", &discovery)] {
                output::line(format!(
                    "{name:<10} {}",
                    version.as_deref().unwrap_or("(does not run here)")
                ));
            }
        }
    }
    for (name, version) in [("the agent", &agent), ("discovery", &discovery)] {
        warn_of_skew(name, version.as_deref().unwrap_or_default());
    }
    Ok(ExitCode::SUCCESS)
}

/// Says so when another program is further from this one than the two are tested together.
pub(super) fn warn_of_skew(name: &str, version: &str) {
    let own = env!("CARGO_PKG_VERSION");
    if far_apart(own, version) {
        let cause = format!("this program is {own}, {name} {version}");
        eprintln!("warning: {}", Code::VersionSkew.message(cause));
    }
}
