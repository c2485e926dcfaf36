use crate::{
    failure::{self, Failure},
    host_names, output,
    services::{self, Layout},
};
use std::process::ExitCode;
use tombolo_control_client::{State, leave};
use tombolo_types::Code;

/// Leave the mesh: deregister this host, stop, and remove its keys and state.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave even if discovery cannot be told; an operator then deletes the entry (tombolo vm delete).
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    layout: Layout,
}

pub(crate) async fn run(args: &Args) -> Result<ExitCode, Failure> {
    services::need_root()?;
    let layout = &args.layout;
    // Told before it stops: callers choose others while the open connections still drain here.
    let told = match State::peek(&layout.state_dir).registration() {
        Ok(None) => None,
        Ok(Some(registration)) => {
            let told = leave(&State::peek(&layout.state_dir)).await;
            // An operator was faster: there is nothing left to deregister.
            let told = told.or_else(|problem| {
                if problem.code == Code::DeviceUnknown {
                    Ok(())
                } else {
                    Err(problem)
                }
            });
            Some((registration, told))
        }
        Err(error) if args.force => {
            eprintln!("warning: {}", failure::shown(&error.problem()));
            None
        }
        Err(error) => return Err(error.into()),
    };
    if let Some((_, Err(problem))) = &told {
        if !args.force {
            eprintln!("note: --force leaves without telling discovery");
            return Err(problem.clone().into());
        }
        eprintln!("warning: discovery was not told: {}", failure::shown(problem));
    }
    services::stop(layout).await?;
    host_names::forget(layout);
    if layout.state_dir.is_dir() {
        State::open(&layout.state_dir, None)?.wipe()?;
    }
    match told {
        Some((registration, Ok(()))) => {
            output::line(format!("{} has left the mesh.", registration.workload_name))
        }
        Some((registration, Err(_))) => output::line(format!(
            "{} is gone from this host. At discovery: tombolo vm delete {}",
            registration.workload_name, registration.device
        )),
        None => output::line("This host was not enrolled; nothing is left of the mesh on it."),
    }
    Ok(ExitCode::SUCCESS)
}
