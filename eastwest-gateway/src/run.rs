//! The life of a gateway: state, subscription, ports, drain.

use crate::{
    admission::Admission, budget::Budget, config::Settings, front::Front, metrics::Metrics,
    route::Known as _, service::Calls, sessions::Sessions, way_in::WayIn,
};
use anyhow::Context as _;
use http::StatusCode;
use sd_notify::NotifyState;
use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, sleep},
};
use tombolo_control_client::{Control, Health, Inputs, Restored, State, restore};
use tombolo_runtime::{Reader, TaskGroup, fair::Places, http as endpoint, published, stop_signal};
use tombolo_snapshot::Snapshot;
use tombolo_tunnel::{Limits, Pool, PoolLimits, Server, Service as _};
use tombolo_types::Code;

/// How often a gateway that is not enrolled looks whether it is now.
const ENROLLED_POLL: Duration = Duration::from_millis(250);
/// From telling discovery that this gateway goes until it takes no more: changes reach callers within 1 s.
const LAME_DUCK: Duration = Duration::from_secs(1);
/// For tasks that have been told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often expired peers and dead sessions are looked for.
const UPKEEP: Duration = Duration::from_secs(2);
/// A call that was asked for before its caller heard of the drain still needs the host's session: a round trip of a long way.
const SESSIONS_LATER: Duration = Duration::from_millis(300);
/// How often a drain looks whether it is done.
const LOOK: Duration = Duration::from_millis(50);
/// For what ended calls have left to be sent, and connections to be closed.
const CLOSING: Duration = Duration::from_secs(1);
/// Longest list of headers of a call, in bytes. Source: ztunnel, as a client.
const HEADER_LIST_MAX: u32 = 16 * 1024;
/// Half-open connections of everybody together.
const UNKNOWN_MAX: usize = 4096;

/// Runs until SIGTERM or SIGINT; a second signal cuts.
pub(crate) async fn run(settings: Settings, state_dir: &Path) -> anyhow::Result<()> {
    let tasks = TaskGroup::new("gateway");
    watchdog(&tasks);
    let metrics = Metrics::new();
    let (ready_tx, ready) = watch::channel(false);
    serve_endpoints(&settings, &metrics, ready, &tasks).await;
    let (state, restored) = tokio::select! {
        enrolled = enrolment(state_dir) => enrolled?,
        signal = stop_signal() => {
            signal.context("signals cannot be received")?;
            return Ok(());
        }
    };
    let Restored {
        registration,
        identity,
        snapshot,
        problems,
        ..
    } = restored;
    problems.iter().for_each(|problem| tracing::warn!("{problem}"));
    tracing::info!(
        identity = %registration.identity, network = registration.network,
        services = snapshot.service_count(), "starts"
    );
    let (publisher, world) = published(snapshot);
    let health = watch::Sender::new(Health::Healthy);
    let control = Control::run(
        Inputs {
            state: Arc::new(state),
            registration,
            identity: Arc::clone(&identity),
            publisher: Arc::new(publisher),
            world: world.clone(),
            health: health.subscribe(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            metrics: None,
        },
        &tasks,
    );
    let sessions = Arc::new(Sessions::new(settings.sessions_max));
    let calls = Arc::new(Calls::new(
        world.clone(),
        sessions,
        Arc::clone(&metrics),
        Budget::new(
            settings.calls_max,
            settings.calls_per_peer_max,
            settings.dials_max,
        ),
        settings.log_calls,
    ));
    let revoked = Arc::clone(&calls);
    let pool = Pool::new(
        Arc::clone(&identity),
        PoolLimits::default(),
        Arc::new(move |peer| revoked.admit(peer)),
        Arc::clone(&metrics) as _,
        &tasks,
    );
    let limits = Limits {
        connections_max: settings.connections_max,
        half_open_per_source_max: settings.half_open_per_source_max,
        header_list_max: HEADER_LIST_MAX,
        ..Limits::default()
    };
    let local = settings.listen.first().copied().context("listen is empty")?;
    let server = Server::new(local, &identity, limits, Arc::clone(&metrics) as _, &tasks)?;
    let front = Arc::new(Front {
        registration: control.watch_registration(),
        server,
        calls,
        admission: Admission::default(),
        pool,
        metrics,
        unknown: Places::new(UNKNOWN_MAX, settings.half_open_per_source_max),
        way_in: WayIn::new(&settings, control.watch_registration(), control.watch_status()),
        passing: Places::new(settings.connections_max, settings.half_open_per_source_max),
        tasks: tasks.clone(),
        settings,
    });
    let accepting = tasks.child("gateway ports");
    listen(&front, &accepting)?;
    tasks.spawn_until_stopped("gateway upkeep", upkeep(Arc::clone(&front), world));
    ready_tx.send_replace(true);
    tell(&[NotifyState::Ready, NotifyState::Status("Serving")]);
    tracing::info!("serves");
    let signal = stop_signal().await.context("signals cannot be received")?;
    tracing::info!(signal, "drains");
    tell(&[NotifyState::Stopping]);
    ready_tx.send_replace(false);
    tokio::select! {
        () = drain(&front, &control, &health, &accepting) => tracing::info!("drained"),
        signal = stop_signal() => tracing::warn!(signal = signal.unwrap_or("?"), "cut short"),
    }
    tasks.stop();
    tasks.drain(STOP_TIMEOUT).await;
    Ok(())
}

/// Waits until the gateway is enrolled, and takes its state.
async fn enrolment(state_dir: &Path) -> anyhow::Result<(State, Restored)> {
    let mut said = false;
    loop {
        if matches!(State::peek(state_dir).registration(), Ok(None)) {
            if !said {
                let idle = Code::NotEnrolled.message("run tombolo-gateway join");
                tracing::info!("{idle}");
                tell(&[NotifyState::Status(&idle), NotifyState::Ready]);
                said = true;
            }
            sleep(ENROLLED_POLL).await;
            continue;
        }
        let state = State::open(state_dir, None).map_err(|error| error.problem())?;
        if let Some(restored) = restore(&state)? {
            return Ok((state, restored));
        }
    }
}

/// Opens the ports. Beside an agent 15008 is the agent's: one free port for members is enough.
fn listen(front: &Arc<Front>, tasks: &TaskGroup) -> anyhow::Result<()> {
    let mut open = 0;
    for address in &front.settings.listen {
        match bind(*address) {
            Ok(listener) => {
                open += 1;
                tracing::info!(%address, "listens for members");
                tasks.spawn_until_stopped("gateway accept", Arc::clone(front).accept(listener));
            }
            Err(error) => tracing::warn!(
                "{}",
                Code::EndpointTaken.message(format_args!("{address}: {error}"))
            ),
        }
        // Where UDP is not to be had, members come by TCP.
        if front.settings.quic
            && let Err(error) = front.listen_quic(*address)
        {
            tracing::warn!(
                "{}",
                Code::EndpointTaken.message(format_args!("{address} (UDP): {error}"))
            );
        }
    }
    anyhow::ensure!(open > 0, "none of the addresses of `listen` could be opened");
    for address in &front.settings.passthrough_listen {
        let listener = bind(*address).with_context(|| format!("passthrough_listen {address}"))?;
        tasks.spawn_until_stopped("sidecar accept", Arc::clone(front).accept_sidecars(listener));
    }
    Ok(())
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => {
            let socket = tokio::net::TcpSocket::new_v6()?;
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv6V6Only, &true)?;
            socket
        }
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(4096)
}

/// After each change of the world the connections are looked at again: the revoked are cut.
async fn upkeep(front: Arc<Front>, mut world: Reader<Snapshot>) {
    let mut due = Instant::now() + UPKEEP;
    loop {
        let changed = tokio::time::timeout_at(due, world.changed()).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if changed.is_ok() {
            front
                .server
                .recheck(now.as_secs(), |peer| front.calls.admit(peer));
            front.pool.recheck(now.as_secs());
            front
                .calls
                .guests
                .recheck(|service| front.calls.is_exported(service));
        }
        if Instant::now() >= due {
            due = Instant::now() + UPKEEP;
            front.server.retire(now.as_secs());
            front.pool.retire(now.as_secs());
            let idle = front.settings.connection_idle_seconds;
            if idle > 0 {
                let closed = front.server.close_idle(Duration::from_secs(idle));
                front
                    .metrics
                    .over("connection_idle", u64::try_from(closed).unwrap_or_default());
            }
            front.calls.balance.forget(Instant::now());
        }
        front.count();
    }
}

/// Goes without a failed call: tells discovery, gives callers time to hear of it, then lets what is open end.
async fn drain(front: &Front, control: &Control, health: &watch::Sender<Health>, accepting: &TaskGroup) {
    health.send_replace(Health::Unhealthy("the gateway is being stopped".to_owned()));
    if control.status().connected {
        sleep(LAME_DUCK).await;
    }
    let deadline = Instant::now() + front.settings.drain();
    accepting.stop();
    front.server.drain();
    sleep(SESSIONS_LATER).await;
    front.calls.sessions.drain();
    front.pool.drain();
    while front.metrics.open.get() > 0 && Instant::now() < deadline {
        sleep(LOOK).await;
    }
    let open = front.metrics.open.get();
    if open > 0 {
        tracing::warn!(open, "drain_seconds are over: open calls are cut");
        front
            .metrics
            .over("drain", u64::try_from(open).unwrap_or_default());
        // Peers over QUIC learn of it only if they are told.
        front.server.cut();
        front.pool.cut();
    }
    let deadline = Instant::now() + CLOSING;
    while !front.server.connections().is_empty() && Instant::now() < deadline {
        sleep(LOOK).await;
    }
}

async fn serve_endpoints(
    settings: &Settings,
    metrics: &Arc<Metrics>,
    ready: watch::Receiver<bool>,
    tasks: &TaskGroup,
) {
    let scraped = Arc::clone(metrics);
    let route = move |path: &str| match path {
        "/metrics" | "/stats/prometheus" => Some(endpoint::Answer {
            content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
            ..endpoint::Answer::text(scraped.common.encode())
        }),
        _ => None,
    };
    open_endpoint(settings.metrics_listen, Arc::new(route), tasks).await;
    let route = move |path: &str| {
        (path == "/healthz/ready").then(|| {
            if *ready.borrow() {
                endpoint::Answer::text("ready\n")
            } else {
                endpoint::Answer::status(StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
            }
        })
    };
    open_endpoint(settings.readiness_listen, Arc::new(route), tasks).await;
}

/// Beside an agent its ports are taken: then ten higher.
async fn open_endpoint(address: SocketAddr, route: Arc<endpoint::Route>, tasks: &TaskGroup) {
    let beside = SocketAddr::new(address.ip(), address.port().saturating_add(10));
    for address in [address, beside] {
        match endpoint::serve(address, Arc::clone(&route), tasks).await {
            Ok(_) => return,
            Err(error) => tracing::warn!(
                "{}",
                Code::EndpointTaken.message(format_args!("{address}: {error}"))
            ),
        }
    }
}

fn watchdog(tasks: &TaskGroup) {
    let Some(interval) = sd_notify::watchdog_enabled() else {
        return;
    };
    tasks.spawn_until_stopped("watchdog", async move {
        let mut ticks = tokio::time::interval(interval / 2);
        loop {
            ticks.tick().await;
            tell(&[NotifyState::Watchdog]);
        }
    });
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}
