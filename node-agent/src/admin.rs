//! The admin socket of the agent.

use crate::{agent::Agent, handover::Kind, status, why};
use anyhow::Context as _;
use nix::unistd::{Gid, Group, Uid, User, geteuid, getgrouplist};
use std::{
    ffi::CString,
    fs::{self, Permissions},
    os::{
        fd::AsFd as _,
        unix::{
            fs::PermissionsExt as _,
            net::{UnixListener as StdListener, UnixStream},
        },
    },
    path::Path,
    sync::{Arc, atomic::Ordering},
};
use tokio::{net::UnixListener, sync::oneshot};
use tokio_stream::wrappers::UnixListenerStream;
use tombolo_proto::tombolo::agent::v1::{
    DrainRequest, DrainResponse, ReloadRequest, ReloadResponse, StatusRequest, StatusResponse, WhyRequest,
    WhyResponse,
    agent_server::{Agent as Api, AgentServer},
};
use tombolo_runtime::TaskGroup;
use tombolo_types::Code;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::UdsConnectInfo},
};

/// Members may use the socket, beside root and the agent's own user.
const GROUP: &str = "tombolo-admin";

/// Serves `<run dir>/admin.sock` until the group stops.
pub(crate) fn serve(
    agent: &Arc<Agent>,
    run_dir: &Path,
    inherited: Option<StdListener>,
    tasks: &TaskGroup,
) -> anyhow::Result<()> {
    fs::create_dir_all(run_dir).with_context(|| format!("{}: cannot be made", run_dir.display()))?;
    let path = run_dir.join("admin.sock");
    let failed = || format!("{}: cannot listen", path.display());
    let listener = match inherited {
        Some(listener) => UnixListener::from_std(listener).with_context(failed)?,
        None => bind(&path).with_context(failed)?,
    };
    agent
        .front
        .keep(Kind::Admin, listener.as_fd().try_clone_to_owned());
    let service = AgentServer::new(Service {
        agent: Arc::clone(agent),
    });
    let (stop, weak) = (tasks.token(), Arc::downgrade(agent));
    tasks.spawn("admin socket", async move {
        let server = Server::builder().add_service(service);
        let serving =
            server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned());
        if let Err(error) = serving.await {
            tracing::error!(%error, "the admin socket has failed");
        }
        // After a reload the path is the next process's.
        if weak
            .upgrade()
            .is_some_and(|agent| agent.is_main.load(Ordering::Acquire))
        {
            let _ = fs::remove_file(path);
        }
    });
    Ok(())
}

fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    // A second agent must not take the socket of the first: the lock of the state directory comes later.
    if UnixStream::connect(path).is_ok() {
        anyhow::bail!(Code::StateLocked.message(format!("an agent answers at {}", path.display())));
    }
    // Left by a process that was killed.
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // Who may do what is decided by peer credentials, with an answer that says so.
    fs::set_permissions(path, Permissions::from_mode(0o666))?;
    Ok(listener)
}

struct Service {
    agent: Arc<Agent>,
}

#[tonic::async_trait]
impl Api for Service {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        admit(&request)?;
        Ok(Response::new(status::response(&self.agent)))
    }

    async fn why(&self, request: Request<WhyRequest>) -> Result<Response<WhyResponse>, Status> {
        admit(&request)?;
        let WhyRequest { host, port } = request.into_inner();
        let port = u16::try_from(port).ok().filter(|port| *port != 0);
        let port =
            port.ok_or_else(|| Status::invalid_argument(Code::Usage.message("a port is 1 to 65535")))?;
        Ok(Response::new(why::walk(&self.agent, &host, port).await?))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        let uid = admit(&request)?;
        tracing::info!(uid, "a drain was asked for");
        self.agent.drain.send_replace(true);
        Ok(Response::new(DrainResponse {}))
    }

    async fn reload(&self, request: Request<ReloadRequest>) -> Result<Response<ReloadResponse>, Status> {
        let uid = admit(&request)?;
        // Root, or the unit itself: `systemctl reload` runs as the agent's user.
        if uid != 0 && uid != geteuid().as_raw() {
            return Err(Status::permission_denied(Code::Forbidden.message(
                "only root may have the agent reloaded: use sudo systemctl reload tombolo-agent",
            )));
        }
        tracing::info!(uid, "a reload was asked for");
        let busy = || Status::unavailable(Code::ReloadFailed.message("another reload is under way"));
        let (answer, outcome) = oneshot::channel();
        self.agent.reload.try_send(answer).map_err(|_| busy())?;
        match outcome.await {
            Ok(Ok(())) => Ok(Response::new(ReloadResponse {})),
            Ok(Err(problem)) => Err(Status::failed_precondition(problem.to_string())),
            Err(_) => Err(busy()),
        }
    }
}

/// The caller's uid, if it may use this socket.
fn admit<T>(request: &Request<T>) -> Result<u32, Status> {
    let refused = |cause: String| Status::permission_denied(Code::Forbidden.message(cause));
    let credentials = request
        .extensions()
        .get::<UdsConnectInfo>()
        .and_then(|info| info.peer_cred);
    let credentials = credentials.ok_or_else(|| refused("the kernel does not say who you are".to_owned()))?;
    let (uid, gid) = (Uid::from_raw(credentials.uid()), Gid::from_raw(credentials.gid()));
    if uid.is_root() || uid == geteuid() || is_member(uid, gid) {
        return Ok(uid.as_raw());
    }
    Err(refused(format!(
        "only root and the group {GROUP} may ask the agent; you are uid {uid}: use sudo"
    )))
}

/// By the primary group of the process, or by the list of the user's groups.
fn is_member(uid: Uid, gid: Gid) -> bool {
    let Ok(Some(admins)) = Group::from_name(GROUP) else {
        return false;
    };
    if gid == admins.gid {
        return true;
    }
    let Ok(Some(user)) = User::from_uid(uid) else {
        return false;
    };
    let Ok(name) = CString::new(user.name) else {
        return false;
    };
    getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&admins.gid))
}
