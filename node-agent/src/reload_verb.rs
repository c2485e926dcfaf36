//! The verbs `reload` and `spawn`: asking the running agent, and being the process between it and the next one.

use anyhow::{Context as _, bail};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tombolo_proto::tombolo::agent::v1::{ReloadRequest, agent_client::AgentClient};
use tombolo_types::Code;
use tonic::transport::Endpoint;

/// Asks the agent behind `<run dir>/admin.sock` to reload, and waits for the outcome.
pub(crate) fn reload(run_dir: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let path = run_dir.join("admin.sock");
    runtime.block_on(async {
        let unreachable = |error: &dyn std::fmt::Display| {
            anyhow::Error::msg(Code::AgentUnreachable.message(format_args!("{}: {error}", path.display())))
        };
        let endpoint =
            Endpoint::try_from(format!("unix://{}", path.display())).map_err(|error| unreachable(&error))?;
        let channel = endpoint.connect().await.map_err(|error| unreachable(&error))?;
        match AgentClient::new(channel).reload(ReloadRequest {}).await {
            Ok(_) => Ok(()),
            // It has a code, a cause and a next step already.
            Err(status) if status.message().starts_with("TMB") => bail!("{}", status.message()),
            Err(status) if status.code() == tonic::Code::Unimplemented => {
                bail!(
                    Code::ReloadFailed
                        .message("the running agent is of a version that cannot reload: a restart is needed")
                )
            }
            Err(status) => Err(unreachable(&status.message())),
        }
    })
}

/// Starts `tombolo-agent ARGS` with this process's input and outputs and ends: its parent is then process 1.
pub(crate) fn spawn(args: &[OsString]) -> anyhow::Result<()> {
    let program: PathBuf = std::env::current_exe().context("the program's own path is not known")?;
    let child = Command::new(&program)
        .args(args)
        .stdin(Stdio::inherit())
        .spawn()
        .with_context(|| program.display().to_string())?;
    // Not waited for: that is process 1's work from here on.
    drop(child);
    Ok(())
}
