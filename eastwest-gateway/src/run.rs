//! The life of a gateway: state, subscription, ports, drain.

use crate::{config::Settings, front::Front, metrics::Metrics, service::Calls, sessions::Sessions};
use anyhow::Context as _;
use http::StatusCode;
use sd_notify::NotifyState;
use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{net::TcpListener, sync::watch, time::sleep};
use tombolo_control_client::{Control, Health, Inputs, Restored, State, restore};
use tombolo_runtime::{Reader, TaskGroup, http as endpoint, published, stop_signal};
use tombolo_snapshot::Snapshot;
use tombolo_tunnel::{HalfOpen, Limits, Pool, PoolLimits, Server, Service as _};
use tombolo_types::Code;

/// How often a gateway that is not enrolled looks whether it is now.
const ENROLLED_POLL: Duration = Duration::from_millis(250);
/// From telling discovery that this gateway goes until it takes no more: changes reach callers within 1 s.
const LAME_DUCK: Duration = Duration::from_secs(1);
/// For tasks that have been told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often expired peers and dead sessions are looked for.
const UPKEEP: Duration = Duration::from_secs(2);
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
    let trust_domain = registration.trust_domain.clone();
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
        ..Limits::default()
    };
    let local = settings.listen.first().copied().context("listen is empty")?;
    let server = Server::new(local, &identity, limits, Arc::clone(&metrics) as _, &tasks)?;
    let front = Arc::new(Front {
        trust_domain,
        server,
        calls,
        pool,
        metrics,
        registration: control.watch_registration(),
        unknown: HalfOpen::new(settings.half_open_per_source_max, UNKNOWN_MAX),
        to_discovery: HalfOpen::new(
            settings.discovery_per_source_max,
            settings.discovery_connections_max,
        ),
        passing: HalfOpen::new(settings.half_open_per_source_max, settings.connections_max),
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
    loop {
        let changed = tokio::time::timeout(UPKEEP, world.changed()).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if changed.is_ok() {
            front
                .server
                .recheck(now.as_secs(), |peer| front.calls.admit(peer));
            front.pool.recheck(now.as_secs());
        } else {
            front.server.retire(now.as_secs());
            front.pool.retire(now.as_secs());
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
    accepting.stop();
    front.server.drain();
    front.pool.drain();
    let deadline = tokio::time::Instant::now() + front.settings.drain();
    while front.metrics.open.get() > 0 && tokio::time::Instant::now() < deadline {
        sleep(Duration::from_millis(50)).await;
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
