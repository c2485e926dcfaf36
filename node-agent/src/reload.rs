//! The old process of a reload: starts the new one, hands over, and lives on until what is open has ended.

use crate::{
    agent::{Agent, Options},
    handover::{self, Hello, Kind, Message, receive, send},
    notify,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, DirBuilder},
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    process::Command,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};
use tombolo_capture::{
    Frozen, OpenFlows,
    handover::{PacketListener, Packets, to_file},
};
use tombolo_control_client::{Problem, host};
use tombolo_types::Code;

/// The new process reads a program, a configuration and a snapshot of up to 40 MB; systemd waits a minute.
const PREPARE_MAX: Duration = Duration::from_secs(30);
/// The packet loop stands still meanwhile: milliseconds, unless the machine is badly overloaded.
const SERVE_MAX: Duration = Duration::from_secs(3);
/// For a process that was killed.
const GONE_MAX: Duration = Duration::from_secs(2);
/// Who asks for a reload waits for its outcome.
pub(crate) type Request = oneshot::Sender<Result<(), Problem>>;

/// This process is the main one: says so to those that look for it by its number.
pub(crate) fn arrive(options: &Options) {
    let path = handover::pid_file(&options.run_dir);
    let part = path.with_extension("part");
    let written =
        fs::write(&part, format!("{}\n", std::process::id())).and_then(|()| fs::rename(&part, &path));
    if let Err(error) = written {
        tracing::debug!(%error, path = %path.display(), "the process number was not written");
    }
}

/// What is left to this process.
#[derive(Debug)]
pub(crate) struct HandedOver {
    pub(crate) packets: Packets,
    /// Where the main process finds this one; none if it could not be made: then it is told nothing more.
    pub(crate) listener: Option<PacketListener>,
    pub(crate) path: PathBuf,
    pub(crate) since_unix_ms: i64,
    pub(crate) flows: Option<OpenFlows>,
}

fn listen(path: &Path) -> io::Result<PacketListener> {
    if let Some(folder) = path.parent() {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    PacketListener::bind(path)
}

/// Serves requests, and SIGHUP, until one has succeeded.
pub(crate) async fn run(
    agent: &Arc<Agent>,
    options: &Options,
    mut requests: mpsc::Receiver<Request>,
) -> HandedOver {
    let mut hangup = signal(SignalKind::hangup()).ok();
    loop {
        let hung_up = async {
            match &mut hangup {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        let request = tokio::select! {
            Some(request) = requests.recv() => Some(request),
            Some(()) = hung_up => None,
            else => std::future::pending().await,
        };
        tracing::info!("reloads");
        notify::reloading();
        let outcome = attempt(agent, options).await;
        let (handed, answer) = match outcome {
            Ok(handed) => (Some(handed), Ok(())),
            Err(problem) => {
                tracing::error!("{problem}");
                notify::ready();
                (None, Err(problem))
            }
        };
        if let Some(request) = request {
            // Who asked may have gone.
            let _ = request.send(answer);
        }
        if let Some(handed) = handed {
            return handed;
        }
    }
}

fn failed(cause: impl std::fmt::Display) -> Problem {
    Problem::new(Code::ReloadFailed, cause)
}

/// Starts the program that is installed now, by way of a process that ends at once: the new one is then a child of
/// process 1, which so learns of its end.
async fn start(options: &Options) -> Result<Packets, Problem> {
    let program = options.program.display();
    let (packets, there) = Packets::pair().map_err(failed)?;
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    args.retain(|arg| arg != "--hand-over");
    let status = Command::new(&options.program)
        .arg("spawn")
        .args(args)
        .arg("--hand-over")
        // It names the process that systemd expects the sign of life from.
        .env_remove("WATCHDOG_PID")
        .stdin(Stdio::from(there))
        .status();
    let status = timeout(PREPARE_MAX, status)
        .await
        .map_err(|_| failed(format!("{program} does not start")))?;
    let status = status.map_err(|error| failed(format!("{program}: {error}")))?;
    if status.success() {
        Ok(packets)
    } else {
        Err(failed(format!(
            "{program} ended ({status}); does it know `spawn`? An older one needs a restart"
        )))
    }
}

fn new_failed(error: io::Error) -> Problem {
    let kind = error.kind();
    if matches!(kind, io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe) {
        failed("the new agent has ended before it had taken over; its own log says why")
    } else if kind == io::ErrorKind::TimedOut {
        failed("the new agent did not answer in time")
    } else {
        failed(format!("the new agent: {error}"))
    }
}

async fn attempt(agent: &Arc<Agent>, options: &Options) -> Result<HandedOver, Problem> {
    let begun = Instant::now();
    let packets = start(options).await?;
    let listen = async |message: io::Result<(Message, Vec<OwnedFd>)>| match message {
        Ok((Message::Failed { message }, _)) => Err(failed(message)),
        Ok((message, _)) => Ok(message),
        Err(error) => Err(new_failed(error)),
    };
    let Message::Hello(hello) = listen(receive(&packets, PREPARE_MAX).await).await? else {
        return Err(failed("the new agent did not say hello"));
    };
    hello.check().map_err(failed)?;
    send(&packets, &Message::Hello(Hello::new(0)), &[])
        .await
        .map_err(new_failed)?;
    let Message::Prepared = listen(receive(&packets, PREPARE_MAX).await).await? else {
        return Err(failed("the new agent did not say that it is prepared"));
    };

    let dataplane = agent.dataplane.borrow().clone();
    let frozen = match &dataplane {
        Some(dataplane) => dataplane.freeze().await.map_err(failed)?,
        None => None,
    };
    let stood = Instant::now();
    let served = async {
        let (kinds, descriptors) = belongings(agent, frozen)?;
        let enrolled = agent.enrolled.get();
        let families = *agent.families.borrow();
        let take_over = Message::TakeOver {
            kinds,
            families,
            health: enrolled.and_then(|enrolled| handover::health_said(&enrolled.health.borrow())),
            device: enrolled.map_or_else(String::new, |e| e.control.registration().device.to_string()),
        };
        send(&packets, &take_over, &descriptors)
            .await
            .map_err(new_failed)?;
        let said = listen(receive(&packets, SERVE_MAX).await).await?;
        if matches!(said, Message::Serving) {
            Ok(())
        } else {
            Err(failed(format!("the new agent said {said:?}")))
        }
    };
    if let Err(problem) = served.await {
        // It must be gone before this one touches anything again.
        if let Ok(pid) = i32::try_from(hello.pid) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = timeout(GONE_MAX, async {
            while let Ok(Some(_)) = packets.receive().await {}
        })
        .await;
        if let Some(dataplane) = &dataplane {
            dataplane.resume();
        }
        return Err(problem);
    }
    let pause = stood.elapsed();
    Ok(commit(agent, options, packets, &hello, begun, pause).await)
}

/// Everything that the new process needs.
fn belongings(agent: &Agent, frozen: Option<Frozen>) -> Result<(Vec<Kind>, Vec<OwnedFd>), Problem> {
    let mut all = Vec::new();
    if let Some(frozen) = frozen {
        all.push((Kind::Tun, frozen.tun));
        all.extend(
            frozen
                .listeners
                .into_iter()
                .map(|listener| (Kind::Capture, listener.0)),
        );
        all.push((Kind::Table, to_file(&frozen.table).map_err(failed)?));
    }
    if let Some(dataplane) = &*agent.dataplane.borrow() {
        let listeners = dataplane.share_listeners().map_err(failed)?;
        all.extend(listeners.into_iter().map(|listener| (Kind::Hbone, listener)));
    }
    if let Some(enrolled) = agent.enrolled.get() {
        let snapshot = enrolled.world.load().encode();
        all.push((Kind::Snapshot, to_file(&snapshot).map_err(failed)?));
    }
    for (kind, descriptor) in agent.front.share().map_err(failed)? {
        all.push((kind, descriptor));
    }
    Ok(all.into_iter().unzip())
}

/// The new process serves: from here on there is no way back.
async fn commit(
    agent: &Arc<Agent>,
    options: &Options,
    packets: Packets,
    new: &Hello,
    begun: Instant,
    pause: Duration,
) -> HandedOver {
    agent.is_main.store(false, Ordering::Release);
    let since_unix_ms = host::now_unix_ms();
    let flows = agent
        .dataplane
        .borrow()
        .as_ref()
        .and_then(|dataplane| dataplane.hand_over());
    notify::hand_over(new.pid);
    if let Some(enrolled) = agent.enrolled.get() {
        enrolled.control.retire().await;
    }
    agent.front.close();
    let path = handover::folder(&options.run_dir).join(format!("{}.sock", std::process::id()));
    let listener = listen(&path)
        .inspect_err(
            |error| tracing::warn!(%error, path = %path.display(), "the next agent will not find this one"),
        )
        .ok();
    // If it is gone already, its end is seen below.
    let _ = send(&packets, &Message::Yours, &[]).await;
    tracing::info!(
        pid = new.pid,
        version = new.version,
        pause_us = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
        took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        connections = agent
            .dataplane
            .borrow()
            .as_ref()
            .map_or(0, |dataplane| dataplane.connection_count()),
        "handed over"
    );
    HandedOver {
        packets,
        listener,
        path,
        since_unix_ms,
        flows,
    }
}
