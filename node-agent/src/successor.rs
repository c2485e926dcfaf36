//! The new process of a reload: everything that it takes over from the one before.

use crate::{
    agent::{Agent, Options},
    handover::{self, Hello, Kind, Message, receive, send},
    notify,
};
use anyhow::{Context as _, bail};
use nix::unistd::dup2_stdin;
use std::{
    fs::File,
    io::Write as _,
    net::TcpListener,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::time::timeout;
use tombolo_capture::{
    Frozen, FrozenListener,
    handover::{Packets, from_file},
    netd::NetdClient,
};
use tombolo_control_client::{Health, Problem, State};
use tombolo_identity::TrustBundle;
use tombolo_runtime::TaskGroup;
use tombolo_snapshot::Snapshot;
use tombolo_types::Code;

/// The other process answers at once, but for what it does before it hands over.
const PATIENCE: Duration = Duration::from_secs(30);
/// netd answers within milliseconds; without it what the other process had stays as it is.
const NETD_MAX: Duration = Duration::from_secs(2);
/// Longest time without a control stream before the other process gives up its own.
const ONLINE_MAX: Duration = Duration::from_secs(5);

/// What came from the other process.
#[derive(Debug)]
pub(crate) struct Inherited {
    packets: Packets,
    pub(crate) admin: Option<UnixListener>,
    pub(crate) metrics: Option<TcpListener>,
    pub(crate) readiness: Option<TcpListener>,
    pub(crate) lock: Option<OwnedFd>,
    pub(crate) snapshot: Option<Vec<u8>>,
    pub(crate) capture: Option<Frozen>,
    pub(crate) hbone: Vec<TcpListener>,
    pub(crate) families: (bool, bool),
    pub(crate) health: Health,
}

/// The socket that this process was started with.
pub(crate) fn packets() -> anyhow::Result<Packets> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    Packets::from_fd(stdin).context("--hand-over is for the agent itself: use tombolo-agent reload")
}

/// Says why this process cannot take over. The other one goes on; nothing of what it lent must be touched by a
/// destructor.
#[allow(
    clippy::print_stderr,
    reason = "the last word of a program that could not start"
)]
pub(crate) fn give_up(error: &anyhow::Error) -> ! {
    let message = Message::Failed {
        message: format!("{error:#}"),
    };
    if let (Ok(bytes), Ok(stdin)) = (
        serde_json::to_vec(&message),
        std::io::stdin().as_fd().try_clone_to_owned(),
    ) {
        // If the other process is gone, too, there is nobody to tell.
        let _ = File::from(stdin).write(&bytes);
    }
    eprintln!("tombolo-agent: it does not take over: {error:#}");
    std::process::exit(1)
}

/// Reads what can be read beforehand, says so, and takes over what the other process hands over.
pub(crate) async fn inherit(packets: Packets, options: &Options) -> anyhow::Result<Inherited> {
    send(&packets, &Message::Hello(Hello::new(0)), &[]).await?;
    let (Message::Hello(other), _) = receive(&packets, PATIENCE).await? else {
        bail!("the running agent did not say hello");
    };
    if let Err(cause) = other.check() {
        bail!(cause);
    }
    let offered = prepare(options).await?;
    send(&packets, &Message::Prepared, &[]).await?;
    let (message, descriptors) = receive(&packets, PATIENCE).await?;
    let Message::TakeOver {
        kinds,
        families,
        health,
        ..
    } = message
    else {
        bail!("the running agent did not hand over");
    };
    anyhow::ensure!(kinds.len() == descriptors.len(), "descriptors are missing");
    let mut inherited = Inherited {
        packets,
        admin: None,
        metrics: None,
        readiness: None,
        lock: None,
        snapshot: None,
        capture: None,
        hbone: Vec::new(),
        families: offered.unwrap_or(families),
        health: handover::health_heard(health),
    };
    let (mut tun, mut table, mut listeners) = (None, None, Vec::new());
    for (kind, fd) in kinds.into_iter().zip(descriptors) {
        match kind {
            Kind::Tun => tun = Some(fd),
            Kind::Capture => listeners.push(FrozenListener(fd)),
            Kind::Table => table = Some(from_file(fd, handover::FILE_MAX)?),
            Kind::Snapshot => inherited.snapshot = Some(from_file(fd, handover::FILE_MAX)?),
            Kind::Hbone => inherited.hbone.push(fd.into()),
            Kind::Lock => inherited.lock = Some(fd),
            Kind::Admin => inherited.admin = Some(fd.into()),
            Kind::Metrics => inherited.metrics = Some(fd.into()),
            Kind::Readiness => inherited.readiness = Some(fd.into()),
        }
    }
    if let (Some(tun), Some(table)) = (tun, table) {
        inherited.capture = Some(Frozen {
            tun,
            listeners,
            table,
        });
    }
    Ok(inherited)
}

/// Reads the state without touching it, so that what this version cannot read is said before anything stops. Returns
/// the families that netd offers by the configuration of this process.
async fn prepare(options: &Options) -> anyhow::Result<Option<(bool, bool)>> {
    let state = State::peek(&options.state_dir);
    let Some(registration) = state.registration().map_err(Problem::from)? else {
        return Ok(None);
    };
    let unreadable = |what: &str, error: &dyn std::fmt::Display| {
        Problem::new(
            Code::StateCorrupt,
            format!(
                "{what} of the running agent cannot be read by version {}: {error}",
                env!("CARGO_PKG_VERSION")
            ),
        )
    };
    let roots = state.roots().map_err(Problem::from)?.unwrap_or_default();
    TrustBundle::from_pem(registration.trust_domain.clone(), &roots)
        .map_err(|error| unreadable("roots.pem", &error))?;
    if let Some(bytes) = state.snapshot().map_err(Problem::from)? {
        let names = &registration.other_names;
        Snapshot::decode_renamed(&bytes, registration.plan, registration.own(), names)
            .map_err(|error| unreadable("snapshot.bin", &error))?;
    }
    let settings = &options.settings;
    let asked = async {
        let netd = NetdClient::connect(&options.netd_socket).await?;
        netd.set_address(registration.plan, settings.ipv4, settings.ipv6)
            .await
    };
    Ok(match timeout(NETD_MAX, asked).await {
        Ok(Ok(families)) => Some((families.ipv4, families.ipv6)),
        Ok(Err(error)) => {
            tracing::warn!(%error, "netd was not asked anew");
            None
        }
        Err(_) => None,
    })
}

impl Inherited {
    /// This process serves: the other one lets go, and systemd looks at this one.
    pub(crate) async fn complete(
        self,
        agent: &Arc<Agent>,
        options: &Options,
        tasks: &TaskGroup,
    ) -> anyhow::Result<()> {
        send(&self.packets, &Message::Serving, &[]).await?;
        match receive(&self.packets, PATIENCE).await {
            Ok((Message::Yours, _)) => {}
            Ok((other, _)) => bail!("the agent before said {other:?}"),
            // It has died after it let go of everything: whatever it was about to say, this one serves.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error.into()),
        }
        // A socket as stdin would keep the other end from learning of the end of this process.
        if let Ok(null) = File::open("/dev/null") {
            let _ = dup2_stdin(null);
        }
        agent.is_main.store(true, Ordering::Release);
        notify::unmute();
        crate::reload::arrive(options);
        agent.go.send_replace(true);
        let (agent, packets) = (Arc::clone(agent), self.packets);
        tasks.spawn_until_stopped("hand-over", async move {
            if let Some(enrolled) = agent.enrolled.get() {
                let mut status = enrolled.control.watch_status();
                let _ = timeout(ONLINE_MAX, status.wait_for(|status| status.connected)).await;
            }
            // Gone is as good as told.
            let _ = send(&packets, &Message::Online, &[]).await;
        });
        Ok(())
    }
}
