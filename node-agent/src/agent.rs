use crate::{
    admin,
    config::{AccessLogs, Settings},
    endpoints, names, notify, status,
};
use anyhow::Context as _;
use std::{
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tombolo_capture::{
    Capture, CaptureConfig,
    netd::{INTERFACE, NetdClient, NetdError},
};
use tombolo_control_client::{
    Control, Health, Inputs, Problem, Restored, State, StateError, backoff::Backoff, probe, restore,
};
use tombolo_dataplane::{Dataplane, StartError};
use tombolo_identity::LiveIdentity;
use tombolo_runtime::{Reader, TaskGroup, published, stop_signal};
use tombolo_snapshot::Snapshot;
use tombolo_telemetry::{AccessLog, Metrics};
use tombolo_types::Code;

/// How often a host that is not enrolled looks whether it is now.
const ENROLLED_POLL: Duration = Duration::from_millis(250);
/// How long `tombolo up` may hold the state while it enrols, before the lock is somebody else's.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// netd that does not answer is asked again: it starts beside the agent.
const NETD_BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
/// How often is looked whether mesh0 is still the device that the agent is attached to.
const DEVICE_POLL: Duration = Duration::from_secs(1);
/// From telling discovery that this host goes until it takes no more connections: changes reach callers within 1 s.
const LAME_DUCK: Duration = Duration::from_secs(1);
/// For tasks that have been told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// What `run` was told.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) settings: Settings,
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) netd_socket: PathBuf,
}

/// Where the agent is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waits for `tombolo up`.
    NotEnrolled,
    /// Enrolled; runs or is about to.
    Enrolled,
    /// Takes nothing new.
    Draining,
}

/// What the admin API, metrics and readiness read.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) settings: Settings,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) phase: watch::Sender<Phase>,
    /// Set once: when the host is enrolled.
    pub(crate) enrolled: OnceLock<Enrolled>,
    /// The data path, while it runs.
    pub(crate) dataplane: watch::Sender<Option<Arc<Dataplane>>>,
    /// Why there is no data path.
    pub(crate) obstacle: watch::Sender<Option<Problem>>,
    /// Prefixes captured now.
    pub(crate) captured: watch::Sender<Vec<String>>,
    /// Whether programs of the host find names of the mesh.
    pub(crate) names: watch::Sender<names::Verdict>,
    /// Set by the admin API.
    pub(crate) drain: watch::Sender<bool>,
}

/// What an enrolled host has.
#[derive(Debug)]
pub(crate) struct Enrolled {
    pub(crate) control: Control,
    pub(crate) world: Reader<Snapshot>,
    pub(crate) identity: Arc<LiveIdentity>,
    pub(crate) health: watch::Sender<Health>,
    /// Unix milliseconds of the snapshot that was on disk; 0: none.
    pub(crate) snapshot_unix_ms: i64,
    /// What was set aside at the start.
    pub(crate) problems: Vec<Problem>,
}

/// Runs until SIGTERM, SIGINT or a drain by the admin API; a second signal cuts.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let tasks = TaskGroup::new("agent");
    let agent = Arc::new(Agent {
        settings: options.settings.clone(),
        metrics: Arc::new(Metrics::new()),
        phase: watch::Sender::new(Phase::NotEnrolled),
        enrolled: OnceLock::new(),
        dataplane: watch::Sender::new(None),
        obstacle: watch::Sender::new(None),
        captured: watch::Sender::new(Vec::new()),
        names: watch::Sender::new(names::Verdict::Unknown),
        drain: watch::Sender::new(false),
    });
    admin::serve(&agent, &options.run_dir, &tasks)?;
    endpoints::serve(&agent, &tasks).await;
    notify::watchdog(&tasks);
    let mut drain = agent.drain.subscribe();
    let probes = tasks.child("probes");
    let outcome = tokio::select! {
        outcome = live(&agent, &options, &tasks, &probes) => outcome,
        signal = stop_signal() => {
            tracing::info!(signal = signal.context("signals cannot be received")?, "drains");
            Ok(())
        }
        _ = drain.wait_for(|drain| *drain) => {
            tracing::info!("drains, as the admin API says");
            Ok(())
        }
    };
    if outcome.is_ok() {
        tokio::select! {
            () = go(&agent, &probes) => tracing::info!("drained"),
            signal = stop_signal() => tracing::warn!(signal = signal.unwrap_or("?"), "cut short"),
        }
    }
    tasks.stop();
    tasks.drain(STOP_TIMEOUT).await;
    outcome
}

/// Everything from enrolment to the data path. Ends only with an error.
async fn live(
    agent: &Arc<Agent>,
    options: &Options,
    tasks: &TaskGroup,
    probes: &TaskGroup,
) -> anyhow::Result<()> {
    let (state, restored) = enrolment(options).await?;
    let Restored {
        registration,
        identity,
        snapshot,
        snapshot_unix_ms,
        problems,
    } = restored;
    problems.iter().for_each(|problem| tracing::warn!("{problem}"));
    tracing::info!(
        identity = %registration.identity,
        workload = registration.workload_name,
        services = snapshot.service_count(),
        from_disk = snapshot_unix_ms != 0,
        "starts"
    );
    let own = registration.own();
    let plan = registration.plan;
    let (publisher, world) = published(snapshot);
    let health = watch::Sender::new(Health::Unknown);
    let control = Control::run(
        Inputs {
            state: Arc::new(state),
            registration,
            identity: Arc::clone(&identity),
            publisher,
            world: world.clone(),
            health: health.subscribe(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        tasks,
    );
    let probing = probe::run(
        control.watch_registration(),
        options.settings.probes,
        health.clone(),
    );
    probes.spawn_until_stopped("health probe", probing);
    let enrolled = Enrolled {
        control,
        world: world.clone(),
        identity: Arc::clone(&identity),
        health,
        snapshot_unix_ms,
        problems,
    };
    anyhow::ensure!(
        agent.enrolled.set(enrolled).is_ok(),
        "the agent was started twice"
    );
    agent.phase.send_replace(Phase::Enrolled);
    status::follow(agent, tasks);

    let mut backoff = NETD_BACKOFF;
    loop {
        let group = tasks.child("data path");
        let inputs = |capture, families: (bool, bool)| tombolo_dataplane::Inputs {
            world: world.clone(),
            identity: Arc::clone(&identity),
            own: own.clone(),
            plan,
            capture,
            metrics: Arc::clone(&agent.metrics),
            access_log: AccessLog::new(options.settings.access_log == AccessLogs::All),
            settings: dataplane_settings(&options.settings, families),
        };
        match data_path(agent, options, plan, inputs, &group).await {
            Ok(()) => {
                tracing::warn!("mesh0 is not the device any more that this agent reads; it starts again");
                backoff = NETD_BACKOFF;
            }
            Err(problem) => {
                if agent.obstacle.borrow().as_ref() != Some(&problem) {
                    tracing::warn!("{problem}");
                }
                agent.obstacle.send_replace(Some(problem));
            }
        }
        agent.dataplane.send_replace(None);
        agent.captured.send_replace(Vec::new());
        group.stop();
        group.drain(STOP_TIMEOUT).await;
        sleep(backoff.next(0.5)).await;
    }
}

/// Waits until the host is enrolled, with nothing locked, and then takes the state.
async fn enrolment(options: &Options) -> anyhow::Result<(State, Restored)> {
    let mut said = false;
    let mut locked = Duration::ZERO;
    loop {
        let enrolled = State::peek(&options.state_dir).registration();
        if matches!(enrolled, Ok(None)) {
            if !said {
                tracing::info!("{}", Code::NotEnrolled.message(""));
                // Idle is a state of its own, not a start that takes for ever.
                notify::status(&Code::NotEnrolled.message(""));
                notify::ready();
                said = true;
            }
            sleep(ENROLLED_POLL).await;
            continue;
        }
        let state = match State::open(&options.state_dir, None) {
            Ok(state) => state,
            Err(StateError::Locked { .. }) if locked < LOCK_PATIENCE => {
                locked += ENROLLED_POLL;
                sleep(ENROLLED_POLL).await;
                continue;
            }
            Err(error) => return Err(error.problem().into()),
        };
        // The lock is ours only now: what was read before may have been half of an enrolment.
        if let Some(restored) = restore(&state)? {
            return Ok((state, restored));
        }
    }
}

fn dataplane_settings(settings: &Settings, (ipv4, ipv6): (bool, bool)) -> tombolo_dataplane::Settings {
    tombolo_dataplane::Settings {
        hbone_listen: settings.hbone_listen.clone(),
        drain: settings.drain(),
        ipv4,
        ipv6,
        ..tombolo_dataplane::Settings::default()
    }
}

/// Gets the device, starts capture and data path, and returns when the device is another one.
async fn data_path(
    agent: &Agent,
    options: &Options,
    plan: tombolo_types::AddressPlan,
    inputs: impl FnOnce(Capture, (bool, bool)) -> tombolo_dataplane::Inputs,
    group: &TaskGroup,
) -> Result<(), Problem> {
    let settings = &options.settings;
    let netd = NetdClient::connect(&options.netd_socket)
        .await
        .map_err(netd_problem)?;
    let families = netd
        .set_address(plan, settings.ipv4, settings.ipv6)
        .await
        .map_err(netd_problem)?;
    let tun = netd.open_tun().await.map_err(netd_problem)?;
    let config = CaptureConfig {
        ipv4: families.ipv4,
        ipv6: families.ipv6,
        allowed_sources: settings.bridges.clone(),
        ..CaptureConfig::new(plan)
    };
    let failed = |error: &dyn std::fmt::Display| Problem::new(Code::CaptureFailed, error);
    let capture = Capture::start(tun, config, group)
        .await
        .map_err(|error| failed(&error))?;
    let dataplane = Dataplane::start(inputs(capture, (families.ipv4, families.ipv6)), group).await;
    let dataplane = dataplane.map_err(|error| {
        let taken =
            matches!(&error, StartError::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse);
        let code = if taken {
            Code::InboundTaken
        } else {
            Code::CaptureFailed
        };
        Problem::new(code, error)
    })?;
    // Last: from here on applications are captured.
    netd.set_route(plan, families.ipv4, families.ipv6)
        .await
        .map_err(netd_problem)?;
    let offered = [
        (families.ipv4, plan.v4.to_string()),
        (families.ipv6, plan.v6.to_string()),
    ];
    agent.captured.send_replace(
        offered
            .into_iter()
            .filter(|(on, _)| *on)
            .map(|(_, prefix)| prefix)
            .collect(),
    );
    names::follow(agent, options, plan, families, group);
    agent.dataplane.send_replace(Some(Arc::new(dataplane)));
    agent.obstacle.send_replace(None);
    notify::ready();
    tracing::info!(ipv4 = families.ipv4, ipv6 = families.ipv6, "serves");
    let device = || nix::net::if_::if_nametoindex(INTERFACE).ok();
    let attached = device();
    while device() == attached {
        sleep(DEVICE_POLL).await;
    }
    Ok(())
}

/// netd's own word where it has one.
pub(crate) fn netd_problem(error: NetdError) -> Problem {
    if let NetdError::Io(error) = &error {
        let mut cause = error.to_string();
        if error.kind() == io::ErrorKind::PermissionDenied {
            cause.push_str(": does the agent run as netd's --agent-user?");
        }
        return Problem::new(Code::NetdUnreachable, cause);
    }
    let text = error.to_string();
    Problem::from_message(&text).unwrap_or_else(|| Problem::new(Code::NetdUnreachable, text))
}

/// Goes without a failed request: tells discovery, gives callers time to hear of it, then lets what is open end.
async fn go(agent: &Agent, probes: &TaskGroup) {
    notify::stopping();
    agent.phase.send_replace(Phase::Draining);
    probes.stop();
    probes.drain(STOP_TIMEOUT).await;
    let dataplane = agent.dataplane.borrow().clone();
    if let Some(enrolled) = agent.enrolled.get() {
        enrolled
            .health
            .send_replace(Health::Unhealthy("the agent is being stopped".to_owned()));
        if dataplane.is_some() && enrolled.control.status().connected {
            sleep(LAME_DUCK).await;
        }
    }
    if let Some(dataplane) = dataplane {
        // The data path keeps its own limit; this one is for a fault in it.
        let _ = timeout(agent.settings.drain() + STOP_TIMEOUT, dataplane.drain()).await;
    }
}
