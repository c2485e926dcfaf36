use crate::{
    admin, bridge,
    config::{AccessLogs, Settings},
    endpoints,
    front::Front,
    guard,
    handover::{self, Kind},
    linger, names, notify, previous, reload, reverse, status,
    successor::{self, Inherited},
};
use anyhow::Context as _;
use std::{
    io,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tombolo_capture::{
    Capture, CaptureConfig,
    netd::{Families, HostNames, INTERFACE, NetdClient, NetdError},
};
use tombolo_control_client::{
    Control, Health, Inputs, MetricsPush, Problem, Restored, State, backoff::Backoff, follow, probe, restore,
};
use tombolo_dataplane::{Dataplane, StartError};
use tombolo_identity::LiveIdentity;
use tombolo_runtime::{Publisher, Reader, TaskGroup, published, stop_signal};
use tombolo_snapshot::Snapshot;
use tombolo_telemetry::{AccessLog, Metrics};
use tombolo_tunnel::PoolLimits;
use tombolo_types::Code;

/// How often a host that is not enrolled looks whether it is now.
const ENROLLED_POLL: Duration = Duration::from_millis(250);
/// How long `tombolo up` may hold the state while it enrols, before the lock is somebody else's.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How often a state that cannot be used is tried again.
const STATE_POLL: Duration = Duration::from_secs(2);
/// So long systemd waits for a data path; then the agent says that it runs, and what is missing.
const READY_ANYWAY: Duration = Duration::from_secs(5);
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
    /// This program, as it was called.
    pub(crate) program: PathBuf,
    /// Take over from the agent that has started this one.
    pub(crate) hand_over: bool,
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
    /// What netd found and did to the host's resolver.
    pub(crate) host_names: watch::Sender<HostNames>,
    /// Which declared ports are closed to plaintext.
    pub(crate) guard: watch::Sender<guard::Report>,
    /// Sessions with gateways, of a host that only dials out.
    pub(crate) reverse: watch::Sender<reverse::Report>,
    /// Set by the admin API.
    pub(crate) drain: watch::Sender<bool>,
    /// Reloads that the admin API was asked for.
    pub(crate) reload: mpsc::Sender<reload::Request>,
    /// What only the main process does, and what it holds for the next one.
    pub(crate) front: Front,
    /// Processes that have handed over and still serve what was open then.
    pub(crate) previous: previous::All,
    /// False until the process before has let go, and after this one has.
    pub(crate) is_main: AtomicBool,
    /// True once this process may write the state directory and speak to discovery.
    pub(crate) go: watch::Sender<bool>,
    /// Families that are offered.
    pub(crate) families: watch::Sender<(bool, bool)>,
}

/// What an enrolled host has.
#[derive(Debug)]
pub(crate) struct Enrolled {
    pub(crate) control: Control,
    pub(crate) world: Reader<Snapshot>,
    pub(crate) publisher: Arc<Publisher<Snapshot>>,
    pub(crate) identity: Arc<LiveIdentity>,
    pub(crate) health: watch::Sender<Health>,
    /// Unix milliseconds of the snapshot that was on disk; 0: none.
    pub(crate) snapshot_unix_ms: i64,
    /// What was set aside at the start.
    pub(crate) problems: Vec<Problem>,
}

/// Runs until SIGTERM, SIGINT or a drain by the admin API; a second signal cuts.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let mut inherited = None;
    if options.hand_over {
        inherited = Some(successor::inherit(successor::packets()?, &options).await?);
    }
    let tasks = TaskGroup::new("agent");
    let (reload, reloads) = mpsc::channel(1);
    let agent = Arc::new(Agent {
        settings: options.settings.clone(),
        metrics: Arc::new(Metrics::new()),
        phase: watch::Sender::new(Phase::NotEnrolled),
        enrolled: OnceLock::new(),
        dataplane: watch::Sender::new(None),
        obstacle: watch::Sender::new(None),
        captured: watch::Sender::new(Vec::new()),
        names: watch::Sender::new(names::Verdict::Unknown),
        host_names: watch::Sender::new(HostNames::default()),
        guard: watch::Sender::new(guard::Report::default()),
        reverse: watch::Sender::new(reverse::Report::default()),
        drain: watch::Sender::new(false),
        reload,
        front: Front::new(&tasks),
        previous: previous::All::default(),
        is_main: AtomicBool::new(inherited.is_none()),
        go: watch::Sender::new(inherited.is_none()),
        families: watch::Sender::new((false, false)),
    });
    let front = &agent.front.tasks;
    let admin = inherited.as_mut().and_then(|inherited| inherited.admin.take());
    admin::serve(&agent, &options.run_dir, admin, front)?;
    let http = inherited
        .as_mut()
        .map(|inherited| (inherited.metrics.take(), inherited.readiness.take()));
    endpoints::serve(&agent, http.unwrap_or_default(), front);
    notify::watchdog(front);
    if inherited.is_none() {
        reload::arrive(&options);
    }
    let mut drain = agent.drain.subscribe();
    let probes = front.child("probes");
    let outcome = tokio::select! {
        outcome = live(&agent, &options, inherited, &tasks, &probes) => outcome,
        handed = reload::run(&agent, &options, reloads) => {
            linger::run(&agent, handed, &tasks).await;
            tasks.stop();
            tasks.drain(STOP_TIMEOUT).await;
            return Ok(());
        }
        signal = stop_signal() => {
            tracing::info!(signal = signal.context("signals cannot be received")?, "drains");
            Ok(())
        }
        _ = drain.wait_for(|drain| *drain) => {
            tracing::info!("drains, as the admin API says");
            Ok(())
        }
    };
    if !agent.is_main.load(Ordering::Acquire) {
        let unfinished = || anyhow::anyhow!("it was stopped before it had taken over");
        // Nothing of what the running agent lent must be touched by a destructor.
        successor::give_up(&outcome.err().unwrap_or_else(unfinished));
    }
    if outcome.is_ok() {
        tokio::select! {
            () = go(&agent, &probes) => tracing::info!("drained"),
            signal = stop_signal() => tracing::warn!(signal = signal.unwrap_or("?"), "cut short"),
        }
    }
    tasks.stop();
    tasks.drain(STOP_TIMEOUT).await;
    let _ = std::fs::remove_file(handover::pid_file(&options.run_dir));
    outcome
}

/// Everything from enrolment to the data path. Ends only with an error.
async fn live(
    agent: &Arc<Agent>,
    options: &Options,
    mut inherited: Option<Inherited>,
    tasks: &TaskGroup,
    probes: &TaskGroup,
) -> anyhow::Result<()> {
    let lock = inherited.as_mut().and_then(|inherited| inherited.lock.take());
    let (state, restored) = match lock {
        Some(lock) => {
            let state = State::adopt(&options.state_dir, lock).map_err(Problem::from)?;
            let restored = restore(&state)?.context("the host is not enrolled any more")?;
            (state, restored)
        }
        None => {
            // The process before had nothing but its sockets.
            if let Some(inherited) = inherited.take() {
                inherited.complete(agent, options, tasks).await?;
            }
            enrolment(agent, options).await
        }
    };
    agent.front.keep(Kind::Lock, state.share_lock());
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
    tombolo_telemetry::log::identify(&registration.identity);
    let own = registration.own();
    let plan = registration.plan;
    let (publisher, world) = published(snapshot);
    let publisher = Arc::new(publisher);
    if let Some(bytes) = inherited.as_mut().and_then(|inherited| inherited.snapshot.take()) {
        // Newer than what is on disk, by up to half a second.
        follow(&bytes, &publisher, &identity, &registration)?;
    }
    let health = inherited
        .as_mut()
        .map_or(Health::Unknown, |inherited| std::mem::take(&mut inherited.health));
    let health = watch::Sender::new(health);
    let control = Control::run_when(
        Inputs {
            state: Arc::new(state),
            registration,
            identity: Arc::clone(&identity),
            publisher: Arc::clone(&publisher),
            world: world.clone(),
            health: health.subscribe(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            metrics: metrics_push(agent, options.settings.metrics_push_seconds),
        },
        agent.go.subscribe(),
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
        publisher,
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
    let front = &agent.front.tasks;
    status::follow(agent, front);
    guard::follow(agent, options, front);
    reverse::follow(agent, front);
    if let Some(inherited) = inherited.take_if(|inherited| inherited.capture.is_none()) {
        inherited.complete(agent, options, tasks).await?;
    }
    if inherited.is_none() {
        previous::follow(agent, &options.run_dir, front);
    }

    // Whoever waits for this start (`systemctl start`, a boot) would wait for something that may never come, and then
    // kill what can still say why.
    front.spawn_until_stopped("ready anyway", async {
        sleep(READY_ANYWAY).await;
        notify::ready();
    });
    let mut backoff = NETD_BACKOFF;
    loop {
        let group = tasks.child("data path");
        let inputs = |capture, families: (bool, bool), listeners| tombolo_dataplane::Inputs {
            listeners,
            world: world.clone(),
            identity: Arc::clone(&identity),
            own: own.clone(),
            plan,
            capture,
            metrics: Arc::clone(&agent.metrics),
            access_log: AccessLog::new(options.settings.access_log == AccessLogs::All),
            settings: dataplane_settings(&options.settings, families),
        };
        match data_path(agent, options, plan, inherited.take(), inputs, &group, tasks).await {
            Ok(()) => {
                tracing::warn!("mesh0 is not the device any more that this agent reads; it starts again");
                backoff = NETD_BACKOFF;
            }
            Err(problem) if !agent.is_main.load(Ordering::Acquire) => return Err(problem.into()),
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

/// What is pushed to discovery; seconds 0: nothing.
fn metrics_push(agent: &Arc<Agent>, seconds: u64) -> Option<MetricsPush> {
    let weak = Arc::downgrade(agent);
    (seconds > 0).then(|| MetricsPush {
        period: Duration::from_secs(seconds),
        encode: Arc::new(move || {
            weak.upgrade()
                .map_or_else(String::new, |agent| endpoints::text(&agent))
        }),
    })
}

/// Waits until the host is enrolled, with nothing locked, and then takes the state.
///
/// A state that cannot be used is waited for too: it is said by `tombolo status` and systemd, once, and mended under a
/// program that runs. Ending would be a loop of restarts in which nobody answers.
async fn enrolment(agent: &Agent, options: &Options) -> (State, Restored) {
    let mut said = None;
    let mut locked = Duration::ZERO;
    loop {
        let (problem, pause) = match take_state(&options.state_dir) {
            Ok(Some(taken)) => {
                agent.obstacle.send_replace(None);
                return taken;
            }
            Ok(None) => (Problem::new(Code::NotEnrolled, ""), ENROLLED_POLL),
            Err(problem) if problem.code == Code::StateLocked && locked < LOCK_PATIENCE => {
                locked += ENROLLED_POLL;
                sleep(ENROLLED_POLL).await;
                continue;
            }
            Err(problem) => (problem, STATE_POLL),
        };
        if said.as_ref() != Some(&problem) {
            // Idle is a state of its own, not a start that takes for ever.
            notify::status(&problem.to_string());
            notify::ready();
            if problem.code == Code::NotEnrolled {
                tracing::info!("{problem}");
                agent.obstacle.send_replace(None);
            } else {
                tracing::error!("{problem}");
                agent.obstacle.send_replace(Some(problem.clone()));
            }
            said = Some(problem);
        }
        sleep(pause).await;
    }
}

/// Locks the state and reads it; `None` while the host is not enrolled.
fn take_state(dir: &Path) -> Result<Option<(State, Restored)>, Problem> {
    if State::peek(dir).registration()?.is_none() {
        return Ok(None);
    }
    let state = State::open(dir, None)?;
    // The lock is ours only now: what was read before may have been half of an enrolment.
    let restored = restore(&state)?;
    Ok(restored.map(|restored| (state, restored)))
}

fn dataplane_settings(settings: &Settings, (ipv4, ipv6): (bool, bool)) -> tombolo_dataplane::Settings {
    tombolo_dataplane::Settings {
        hbone_listen: settings.hbone_listen.clone(),
        drain: settings.drain(),
        pool: PoolLimits {
            udp_retry: settings.quic_retry(),
            ..PoolLimits::default()
        },
        ipv4,
        ipv6,
        ..tombolo_dataplane::Settings::default()
    }
}

/// Gets the device, or what the process before had, starts capture and data path, and returns when the device is
/// another one.
async fn data_path(
    agent: &Arc<Agent>,
    options: &Options,
    plan: tombolo_types::AddressPlan,
    inherited: Option<Inherited>,
    inputs: impl FnOnce(Capture, (bool, bool), Vec<TcpListener>) -> tombolo_dataplane::Inputs,
    group: &TaskGroup,
    tasks: &TaskGroup,
) -> Result<(), Problem> {
    let settings = &options.settings;
    let (bridges, allowed_links) = bridge::split(&settings.bridges);
    let config = |families: Families| CaptureConfig {
        ipv4: families.ipv4,
        ipv6: families.ipv6,
        allowed_sources: bridges,
        allowed_links,
        ..CaptureConfig::new(plan)
    };
    let failed = |error: &dyn std::fmt::Display| Problem::new(Code::CaptureFailed, error);
    let start = async |capture, families: Families, listeners| {
        let inputs = inputs(capture, (families.ipv4, families.ipv6), listeners);
        Dataplane::start(inputs, group)
            .await
            .map_err(|error| start_problem(&error))
    };
    let offered = |families: Families| {
        agent.families.send_replace((families.ipv4, families.ipv6));
        let offered = [
            (families.ipv4, plan.v4.to_string()),
            (families.ipv6, plan.v6.to_string()),
        ];
        let prefixes = offered
            .into_iter()
            .filter(|(on, _)| *on)
            .map(|(_, prefix)| prefix);
        agent.captured.send_replace(prefixes.collect());
    };
    // Only the main process keeps the host's resolver told.
    let names = agent.front.tasks.child("names");
    let _stopped = StopOnDrop(names.clone());
    let families = if let Some(mut inherited) = inherited {
        let families = Families {
            ipv4: inherited.families.0,
            ipv6: inherited.families.1,
        };
        let frozen = inherited
            .capture
            .take()
            .ok_or_else(|| failed(&"there is no device"))?;
        let capture = Capture::adopt(frozen, config(families), group).await;
        let capture = capture.map_err(|error| failed(&error))?;
        let listeners = std::mem::take(&mut inherited.hbone);
        let dataplane = start(capture, families, listeners).await?;
        offered(families);
        agent.dataplane.send_replace(Some(Arc::new(dataplane)));
        // As they were a moment ago; whether they are is looked at next.
        agent.names.send_replace(names::Verdict::Found);
        let completed = inherited.complete(agent, options, tasks).await;
        completed.map_err(|error| Problem::new(Code::ReloadFailed, format!("{error:#}")))?;
        previous::follow(agent, &options.run_dir, &agent.front.tasks);
        let routed = async {
            let netd = NetdClient::connect(&options.netd_socket).await?;
            netd.set_route(plan, families.ipv4, families.ipv6).await
        };
        if let Err(error) = routed.await {
            tracing::warn!("{}", netd_problem(error));
        }
        names::follow(agent, options, plan, families, &names);
        agent.names.send_replace(names::Verdict::Found);
        families
    } else {
        let netd = NetdClient::connect(&options.netd_socket)
            .await
            .map_err(netd_problem)?;
        let families = netd
            .set_address(plan, settings.ipv4, settings.ipv6)
            .await
            .map_err(netd_problem)?;
        let tun = netd.open_tun().await.map_err(netd_problem)?;
        let known = previous::open_flows(&options.run_dir).await;
        let capture = Capture::start_with(tun, &known, config(families), group).await;
        let capture = capture.map_err(|error| failed(&error))?;
        let dataplane = start(capture, families, Vec::new()).await?;
        // Last: from here on applications are captured.
        netd.set_route(plan, families.ipv4, families.ipv6)
            .await
            .map_err(netd_problem)?;
        offered(families);
        names::follow(agent, options, plan, families, &names);
        guard::known(agent).await;
        agent.dataplane.send_replace(Some(Arc::new(dataplane)));
        families
    };
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

/// Stops a group with the function that made it.
struct StopOnDrop(TaskGroup);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn start_problem(error: &StartError) -> Problem {
    let taken =
        matches!(error, StartError::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse);
    let code = if taken {
        Code::InboundTaken
    } else {
        Code::CaptureFailed
    };
    Problem::new(code, error)
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
            .send_replace(Health::Unhealthy(Code::AgentStopping.message("")));
        if dataplane.is_some() && enrolled.control.status().connected {
            sleep(LAME_DUCK).await;
        }
    }
    let drained = async {
        if let Some(dataplane) = dataplane {
            dataplane.drain().await;
        }
    };
    // Each data path keeps its own limit; this one is for a fault in it.
    let all = async { tokio::join!(drained, agent.previous.drain()) };
    let _ = timeout(agent.settings.drain() + STOP_TIMEOUT, all).await;
}
