use crate::failure::Failure;
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::UnixStream;
use tombolo_proto::tombolo::{admin::v1::admin_client::AdminClient, agent::v1::agent_client::AgentClient};
use tombolo_types::Code;
use tonic::transport::{Channel, Endpoint};

/// A frozen server must not freeze the terminal.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer: a page of objects.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Where the other sides listen.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Sockets {
    /// Discovery's admin socket.
    #[arg(
        long = "socket",
        env = "TOMBOLO_ADMIN_SOCKET",
        value_name = "PATH",
        default_value = "/run/tombolo/discovery/admin.sock",
        global = true,
        hide_env_values = true,
        display_order = 900
    )]
    pub(crate) discovery: PathBuf,
    /// The agent's admin socket.
    #[arg(
        long = "agent-socket",
        env = "TOMBOLO_AGENT_SOCKET",
        value_name = "PATH",
        default_value = "/run/tombolo/agent/admin.sock",
        global = true,
        hide_env_values = true,
        display_order = 901
    )]
    pub(crate) agent: PathBuf,
}

impl Sockets {
    pub(crate) async fn admin(&self) -> Result<AdminClient<Channel>, Failure> {
        let channel = dial(&self.discovery, Code::AdminUnreachable).await?;
        Ok(AdminClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
    }

    pub(crate) async fn agent(&self) -> Result<AgentClient<Channel>, Failure> {
        Ok(AgentClient::new(dial(&self.agent, Code::AgentUnreachable).await?))
    }
}

async fn dial(path: &Path, code: Code) -> Result<Channel, Failure> {
    let failure =
        |error: &dyn std::fmt::Display| Failure::coded(code, format!("{}: {error}", path.display()));
    // Connected here and not by the channel: the operating system's reason is the message.
    let socket = UnixStream::connect(path).await.map_err(|error| {
        if error.kind() == io::ErrorKind::PermissionDenied {
            let cause = format!(
                "{}: only root and the group tombolo-admin may use this socket",
                path.display()
            );
            return Failure::coded(Code::Forbidden, cause);
        }
        failure(&error)
    })?;
    let mut socket = Some(hyper_util::rt::TokioIo::new(socket));
    let connector = tower::service_fn(move |_| {
        let socket = socket.take();
        async move { socket.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    });
    let endpoint = Endpoint::from_static("http://localhost").timeout(CALL_TIMEOUT);
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|error| failure(&error))
}

/// The reason of a call to the agent that failed: its own word, or that it does not answer.
pub(crate) fn agent_failure(status: tonic::Status) -> Failure {
    let mut failure = Failure::from(status);
    if let Failure::Problem(problem) = &mut failure
        && problem.code == Code::AdminUnreachable
    {
        problem.code = Code::AgentUnreachable;
    }
    failure
}
