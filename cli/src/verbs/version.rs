use crate::{
    failure::Failure,
    output::{self, Format, Output},
    sockets::Sockets,
};
use serde_json::json;
use std::process::ExitCode;
use tombolo_proto::tombolo::{admin::v1::MeshRequest, agent::v1::StatusRequest};

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
                if version.as_deref().is_some_and(|version| version != own) {
                    eprintln!("warning: {name} is of another version than this program");
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
