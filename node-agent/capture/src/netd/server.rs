use super::{
    GuardRules, HostGuard, HostResolver, Mesh0, NetdError,
    message::{Answer, Refusal, Request, Socket, VERSION},
    said::Said,
};
use crate::packets::{Acceptor, is_served, listen_at};
use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{Mutex, Semaphore};
use tombolo_runtime::TaskGroup;
use tombolo_types::Code;

/// Connections at once: the agent's, one of an agent that is being replaced, and command lines.
const CONNECTIONS_MAX: usize = 16;

/// netd's socket.
#[derive(Debug)]
pub struct NetdServer {
    socket: OwnedFd,
    path: PathBuf,
    agent: u32,
    guard: Option<Arc<dyn HostGuard>>,
}

impl NetdServer {
    /// Listens at `path`. `agent` is the user id of the agent: only it and root are answered.
    ///
    /// # Errors
    /// When the path cannot be used, or another netd listens there.
    pub fn bind(path: &Path, agent: u32) -> io::Result<Self> {
        if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            if is_served(path) {
                let message = format!("another tombolo-netd serves {}", path.display());
                return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
            }
            fs::remove_file(path)?;
        }
        let socket = listen_at(path).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot listen at {}: {error}", path.display()),
            )
        })?;
        // Who may speak is decided by peer credentials: the file's owner and mode would need CAP_CHOWN.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            agent,
            guard: None,
        })
    }

    /// With the host's guard for `set_guard`, which is refused without one.
    #[must_use]
    pub fn with_guard(mut self, guard: Arc<dyn HostGuard>) -> Self {
        self.guard = Some(guard);
        self
    }

    /// Serves until the group stops; `set_dns` is refused.
    ///
    /// # Errors
    /// When the socket breaks.
    pub async fn serve(&self, mesh0: Mesh0, tasks: &TaskGroup) -> Result<(), NetdError> {
        self.serve_with(mesh0, None, tasks).await
    }

    /// Serves until the group stops, with the host's resolver for `set_dns`.
    ///
    /// # Errors
    /// When the socket breaks.
    pub async fn serve_with(
        &self,
        mesh0: Mesh0,
        resolver: Option<Arc<dyn HostResolver>>,
        tasks: &TaskGroup,
    ) -> Result<(), NetdError> {
        let acceptor = Acceptor::new(self.socket.try_clone()?)?;
        let mesh0 = Arc::new(Mutex::new(mesh0));
        let limit = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let said = Arc::new(Said::default());
        let serve = async {
            loop {
                let (socket, other) = match acceptor.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "a connection was not accepted");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                let uid = other.user;
                if uid != 0 && uid != self.agent {
                    tracing::warn!(uid, "a user that is neither the agent nor root was refused");
                    continue;
                }
                let Ok(permit) = Arc::clone(&limit).try_acquire_owned() else {
                    tracing::warn!(uid, "too many connections");
                    continue;
                };
                let mesh0 = Arc::clone(&mesh0);
                let said = Arc::clone(&said);
                let resolver = resolver.clone();
                let guard = self.guard.clone();
                tasks.spawn_until_stopped("netd connection", async move {
                    if let Err(error) = converse(
                        &socket,
                        (&said, other.process),
                        &mesh0,
                        resolver.as_deref(),
                        guard.as_deref(),
                    )
                    .await
                    {
                        tracing::debug!(%error, uid, "a connection ended");
                    }
                    drop(permit);
                });
            }
        };
        tokio::select! {
            () = serve => {}
            () = tasks.stopped() => {}
        }
        Ok(())
    }

    /// Removes the socket's path. If that fails, the next start removes it.
    pub fn close(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

async fn converse(
    socket: &Socket,
    (said, process): (&Said, i32),
    mesh0: &Mutex<Mesh0>,
    resolver: Option<&dyn HostResolver>,
    guard: Option<&dyn HostGuard>,
) -> io::Result<()> {
    let mut greeted = false;
    while let Some((bytes, _)) = socket.receive().await? {
        let (answer, descriptor) = match serde_json::from_slice::<Request>(&bytes) {
            Err(error) => {
                let cause = format!(
                    "tombolo-netd does not know this request ({error}); it may be older than the agent"
                );
                (
                    Refusal {
                        code: Code::NotAvailable,
                        cause,
                    }
                    .into(),
                    None,
                )
            }
            Ok(Request::Hello { version }) => {
                tracing::debug!(version, "hello");
                greeted = true;
                (Answer::Hello { version: VERSION }, None)
            }
            Ok(_) if !greeted => return Err(io::Error::new(io::ErrorKind::InvalidData, "no hello")),
            Ok(request) => {
                // Said again and again; the guard logs what changes.
                let quiet = matches!(request, Request::Alive | Request::SetGuard { .. });
                let asked = format!("{request:?}");
                let done = act(request, &mut *mesh0.lock().await, resolver, guard).await;
                let outcome = match &done {
                    Ok(_) => "done".to_owned(),
                    Err(refusal) => format!("{}: {}", refusal.code, refusal.cause),
                };
                let news = said.is_news(process, &asked, &outcome);
                if let Err(refusal) = done.as_ref()
                    && news
                {
                    tracing::warn!(code = %refusal.code, cause = refusal.cause, asked, "refused");
                } else if news && !quiet {
                    tracing::info!(asked, "done");
                } else {
                    tracing::trace!(asked, outcome, "again");
                }
                done.unwrap_or_else(|refusal| (refusal.into(), None))
            }
        };
        let bytes = serde_json::to_vec(&answer).map_err(io::Error::other)?;
        let descriptor = descriptor.as_ref().map(|fd: &OwnedFd| fd.as_fd());
        socket.send(&bytes, descriptor.as_slice()).await?;
    }
    Ok(())
}

async fn act(
    request: Request,
    mesh0: &mut Mesh0,
    resolver: Option<&dyn HostResolver>,
    guard: Option<&dyn HostGuard>,
) -> Result<(Answer, Option<OwnedFd>), Refusal> {
    let unavailable = |what: &str| Refusal {
        code: Code::NotAvailable,
        cause: format!("{what} comes with the packages"),
    };
    match request {
        Request::Hello { .. } => Ok((Answer::Hello { version: VERSION }, None)),
        Request::OpenTun => Ok((Answer::Tun, Some(mesh0.open_tun().await?))),
        Request::SetAddress { plan, families } => {
            let families = mesh0.set_address(&plan.check()?, families).await?;
            Ok((Answer::Families { families }, None))
        }
        Request::SetRoute { plan, families } => {
            mesh0.set_route(&plan.check()?, families).await?;
            Ok((Answer::Done, None))
        }
        Request::SetGuard { rules } => {
            let guard = guard.ok_or_else(|| unavailable("the guard"))?;
            rules.check()?;
            guard.set(&rules).await.map_err(unguarded)?;
            Ok((Answer::Done, None))
        }
        Request::SetDns { settings } => {
            let resolver = resolver.ok_or_else(|| unavailable("setting the host's DNS"))?;
            settings.check()?;
            let names = resolver.set(&settings).await.map_err(|cause| Refusal {
                code: Code::NamesNotAsked,
                cause,
            })?;
            Ok((Answer::Names { names }, None))
        }
        Request::ConfirmDns { problem } => {
            let resolver = resolver.ok_or_else(|| unavailable("setting the host's DNS"))?;
            let names = resolver.confirm(problem).await.map_err(|cause| Refusal {
                code: Code::NamesNotAsked,
                cause,
            })?;
            Ok((Answer::Names { names }, None))
        }
        Request::Alive => {
            if let Some(resolver) = resolver {
                resolver.alive().await;
            }
            Ok((Answer::Done, None))
        }
        Request::Revert => {
            if let Some(resolver) = resolver {
                resolver.revert().await;
            }
            // Each is taken back, whatever becomes of the other.
            let opened = match guard {
                Some(guard) => guard.set(&GuardRules::default()).await.map_err(unguarded),
                None => Ok(()),
            };
            mesh0.undo().await?;
            opened?;
            Ok((Answer::Done, None))
        }
    }
}

fn unguarded(cause: String) -> Refusal {
    Refusal {
        code: Code::GuardRefused,
        cause,
    }
}
