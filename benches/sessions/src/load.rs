//! Many hosts in one process: each has a device key, a certificate and an entry of its own from a real discovery, and holds
//! a reverse session as an agent does.

use anyhow::{Context as _, Result, bail};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::Semaphore, time::sleep};
use tombolo_control_client::{Claims, Enroller, State, backoff::Backoff, restore};
use tombolo_identity::{LiveIdentity, Peer};
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{Incoming, Limits, NoObserver, OpenError, Server, Service, Target};
use tombolo_types::{JoinToken, SpiffeId};

/// Hosts that enrol at the same time.
const ENROLLING: usize = 8;
/// Discovery has limits for strangers: one that is refused comes again.
const TRIES: u32 = 40;
/// As an agent dials a gateway again.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(15));

/// What carries a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Transport {
    Tcp,
    Quic,
}

fn state_of(dir: &Path, number: usize) -> PathBuf {
    dir.join(number.to_string())
}

/// Enrols `count` devices, each with a state directory of its own in `dir`.
pub(crate) async fn enrol(token: &Path, dir: &Path, count: usize) -> Result<()> {
    let text = std::fs::read_to_string(token)?;
    let token = Arc::new(JoinToken::decode(text.trim())?);
    let (tasks, turns) = (TaskGroup::new("enrol"), Arc::new(Semaphore::new(ENROLLING)));
    let mut done = tokio::task::JoinSet::new();
    std::fs::create_dir_all(dir)?;
    for number in 0..count {
        let (token, turns, dir) = (Arc::clone(&token), Arc::clone(&turns), state_of(dir, number));
        #[allow(
            clippy::disallowed_methods,
            reason = "a set of tasks that ends with this function"
        )]
        done.spawn(async move {
            let _turn = turns.acquire_owned().await?;
            enrol_one(&token, &dir, number).await
        });
    }
    while let Some(one) = done.join_next().await {
        one??;
    }
    tasks.stop();
    Ok(())
}

async fn enrol_one(token: &JoinToken, dir: &Path, number: usize) -> Result<()> {
    let state = State::open(dir, None)?;
    let claims = Claims {
        hostname: format!("kiosk-{number}"),
        ..Claims::default()
    };
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    for _ in 0..TRIES {
        let enrolled = async {
            Enroller::connect(token)
                .await?
                .enroll(&state, claims.clone())
                .await
        };
        let Err(problem) = enrolled.await else {
            return Ok(());
        };
        if backoff.attempts() + 1 == TRIES {
            bail!("device {number}: {problem}");
        }
        sleep(backoff.next(rand::random())).await;
    }
    Ok(())
}

/// Takes no calls.
struct Nobody;

impl Service for Nobody {
    fn admit(&self, _: &Peer) -> bool {
        true
    }

    async fn connect(self: Arc<Self>, _: Incoming) {}
}

/// Holds a session for each of the first `count` devices until the process is ended.
pub(crate) async fn hold(dir: &Path, count: usize, gateway: SocketAddr, transport: Transport) -> Result<()> {
    let tasks = TaskGroup::new("hosts");
    for number in 0..count {
        let state = State::open(&state_of(dir, number), None)?;
        let restored = restore(&state)?.with_context(|| format!("device {number} is not enrolled"))?;
        let (live, group) = (restored.identity, tasks.clone());
        tasks.spawn_until_stopped("host", async move {
            let _state = state;
            host(&live, gateway, transport, &group).await;
        });
    }
    tasks.stopped().await;
    Ok(())
}

/// One host: dials, holds, and dials again when the session has ended.
async fn host(live: &Arc<LiveIdentity>, gateway: SocketAddr, transport: Transport, tasks: &TaskGroup) {
    let mut backoff = BACKOFF;
    loop {
        match session(live, gateway, transport, tasks).await {
            Ok(()) => backoff.reset(),
            Err(error) => eprintln!("not held: {error}"),
        }
        sleep(backoff.next(rand::random())).await;
    }
}

/// Holds one session until it ends.
async fn session(
    live: &Arc<LiveIdentity>,
    gateway: SocketAddr,
    transport: Transport,
    tasks: &TaskGroup,
) -> Result<(), OpenError> {
    let nowhere: SocketAddr = ([0, 0, 0, 0], 0).into();
    let server = Server::new(nowhere, live, Limits::default(), Arc::new(NoObserver), tasks)?;
    let current = live.current();
    let own = current.identity.as_ref().map(|identity| identity.id());
    let expected = own.map_or_else(Vec::new, |id| vec![SpiffeId::gateway(id.trust_domain.clone())]);
    match transport {
        Transport::Tcp => {
            let held = server
                .hold_reverse(gateway, expected, Arc::new(Nobody), tasks)
                .await?;
            held.run.await;
        }
        Transport::Quic => {
            let target = Target {
                hbone: gateway,
                expected: expected.into(),
            };
            let held = server.hold_reverse_quic(&target, Arc::new(Nobody), tasks).await?;
            held.run.await;
        }
    }
    Ok(())
}
