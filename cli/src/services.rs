//! Starting and stopping agent and netd: by systemd where it runs, as plain processes otherwise.

use crate::failure::Failure;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User, geteuid},
};
use std::{
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::{
        fs::{DirBuilderExt as _, OpenOptionsExt as _},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tombolo_types::Code;

/// The agent drains: its open streams may take this long, and a little for itself.
const AGENT_STOP_TIMEOUT: Duration = Duration::from_secs(45);
/// netd has nothing to wait for.
const NETD_STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a killed process may still be seen.
const ENDING: Duration = Duration::from_millis(100);
/// Bytes of a log that are shown when a start failed.
const LOG_TAIL: usize = 2000;

/// Where things are on this host, and how services are run. The defaults are those of the packages.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Layout {
    /// The agent's state directory.
    #[arg(
        long,
        env = "TOMBOLO_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/lib/tombolo/agent",
        hide_env_values = true
    )]
    pub(crate) state_dir: PathBuf,
    /// Directory of sockets and pid files.
    #[arg(
        long,
        env = "TOMBOLO_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/tombolo",
        hide_env_values = true
    )]
    pub(crate) run_dir: PathBuf,
    /// Directory of log files, where there is no systemd.
    #[arg(
        long,
        env = "TOMBOLO_LOG_DIR",
        value_name = "DIR",
        default_value = "/var/log/tombolo",
        hide_env_values = true
    )]
    pub(crate) log_dir: PathBuf,
    /// The agent's configuration file.
    #[arg(long, value_name = "FILE", default_value = "/etc/tombolo/agent.yaml")]
    pub(crate) config: PathBuf,
    /// The user that the agent runs as.
    #[arg(long, value_name = "USER", default_value = "tombolo-agent")]
    pub(crate) agent_user: String,
    /// Do not use systemd where it runs.
    #[arg(long)]
    pub(crate) no_systemd: bool,
}

impl Layout {
    pub(crate) fn netd_socket(&self) -> PathBuf {
        self.run_dir.join("netd/netd.sock")
    }

    pub(crate) fn systemd(&self) -> bool {
        !self.no_systemd && Path::new("/run/systemd/system").is_dir()
    }

    fn pid_file(&self, service: Service) -> PathBuf {
        self.run_dir.join(format!("{}.pid", service.short()))
    }

    pub(crate) fn log_file(&self, service: Service) -> PathBuf {
        self.log_dir.join(format!("{}.log", service.short()))
    }

    /// Where netd finds the owner's word, and keeps what it must not forget.
    fn tell_netd(&self, command: &mut Command) {
        command.arg("--config").arg(&self.config);
        command
            .arg("--state-dir")
            .arg(self.state_dir.with_file_name("netd"));
    }

    /// The user that the agent runs as.
    pub(crate) fn user(&self) -> Result<User, Failure> {
        let name = &self.agent_user;
        match User::from_name(name) {
            Ok(Some(user)) => Ok(user),
            Ok(None) => Err(Failure::coded(
                Code::UserMissing,
                format!("there is no user {name}"),
            )),
            Err(error) => Err(Failure::coded(Code::UserMissing, format!("{name}: {error}"))),
        }
    }
}

/// This command changes the host.
pub(crate) fn need_root() -> Result<(), Failure> {
    if geteuid().is_root() {
        Ok(())
    } else {
        Err(Failure::coded(Code::NeedsRoot, ""))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    Netd,
    Agent,
}

impl Service {
    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::Netd => "tombolo-netd",
            Self::Agent => "tombolo-agent",
        }
    }

    const fn short(self) -> &'static str {
        match self {
            Self::Netd => "netd",
            Self::Agent => "agent",
        }
    }
}

/// A program of ours: beside this one, or where packages put them.
pub(crate) fn find(program: &str) -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(program)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = beside
        .into_iter()
        .chain(["/usr/bin", "/usr/sbin", "/usr/libexec/tombolo"].map(|dir| Path::new(dir).join(program)))
        .chain(std::env::split_paths(&path).map(|dir| dir.join(program)))
        .find(|candidate| candidate.is_file());
    found.ok_or_else(|| {
        Failure::plain(format!(
            "{program} is not installed: install the package of that name"
        ))
    })
}

/// What was started.
#[derive(Debug, Default)]
pub(crate) struct Started {
    /// With the length of the log before it: older lines are about something else.
    children: Vec<(Service, Child, usize)>,
}

impl Started {
    fn spawn(&mut self, layout: &Layout, service: Service, command: Command) -> Result<(), Failure> {
        let before = fs::metadata(layout.log_file(service)).map_or(0, |log| log.len());
        let child = spawn(layout, service, command)?;
        self.children
            .push((service, child, usize::try_from(before).unwrap_or(0)));
        Ok(())
    }

    /// A process that has ended already, with the end of its log.
    pub(crate) fn ended(&mut self, layout: &Layout) -> Option<String> {
        for (service, child, before) in &mut self.children {
            if let Ok(Some(status)) = child.try_wait() {
                let log = fs::read(layout.log_file(*service)).unwrap_or_default();
                let from = log.len().saturating_sub(LOG_TAIL).max(*before).min(log.len());
                let tail = String::from_utf8_lossy(&log[from..]).trim().to_owned();
                return Some(format!("{} ended ({status}):\n{tail}", service.program()));
            }
        }
        None
    }
}

/// Starts what does not run. netd goes first: without mesh0 the agent waits.
pub(crate) fn start(layout: &Layout) -> Result<Started, Failure> {
    if layout.systemd() {
        let units = ["tombolo-netd.service", "tombolo-agent.service"];
        // Started first: it is in the mesh now, whatever becomes of the links in a read-only /etc.
        systemctl(&[&["start"], &units[..]].concat())?;
        if let Err(failure) = systemctl(&[&["enable"], &units[..]].concat()) {
            eprintln!("warning: it runs, but will not start at the next boot: {failure}");
        }
        return Ok(Started::default());
    }
    let user = layout.user()?;
    directory(&layout.run_dir, 0o755, None)?;
    directory(&layout.log_dir, 0o755, None)?;
    directory(
        &layout.run_dir.join("agent"),
        0o755,
        Some((user.uid.as_raw(), user.gid.as_raw())),
    )?;
    let mut started = Started::default();
    if !stays(layout, Service::Netd) {
        let mut command = program(Service::Netd)?;
        command.arg("run").arg("--socket").arg(layout.netd_socket());
        command.arg("--agent-user").arg(&layout.agent_user);
        layout.tell_netd(&mut command);
        started.spawn(layout, Service::Netd, command)?;
    }
    if !stays(layout, Service::Agent) {
        let mut command = program(Service::Agent)?;
        command.arg("run").arg("--config").arg(&layout.config);
        command.arg("--state-dir").arg(&layout.state_dir);
        command.arg("--run-dir").arg(layout.run_dir.join("agent"));
        command.arg("--netd-socket").arg(layout.netd_socket());
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        started.spawn(layout, Service::Agent, command)?;
    }
    Ok(started)
}

/// Has a running netd read the configuration anew. mesh0 stays, and the agent notices.
pub(crate) async fn renew_netd(layout: &Layout) -> Result<(), Failure> {
    if layout.systemd() {
        return systemctl(&["try-restart", "tombolo-netd.service"]);
    }
    stop_process(layout, Service::Netd, NETD_STOP_TIMEOUT)
        .await
        .map(drop)
}

/// Stops the agent (it drains), has netd take back what it did to the host, and stops netd. True if anything ran.
pub(crate) async fn stop(layout: &Layout) -> Result<bool, Failure> {
    let systemd = layout.systemd();
    // Now: with the unit goes the folder that tells of them.
    let before = previous(layout);
    if systemd {
        halt("tombolo-agent.service")?;
    }
    let agent = stop_process(layout, Service::Agent, AGENT_STOP_TIMEOUT).await?;
    // The agent has had them drained; one that it did not know of is told here.
    for pid in before
        .into_iter()
        .filter(|&pid| is_program(pid, Service::Agent.program()))
    {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let deadline = Instant::now() + AGENT_STOP_TIMEOUT;
        while is_program(pid, Service::Agent.program()) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    // netd knows what it did; where it is gone, its program finds what is left.
    let reverted = match tombolo_capture::netd::NetdClient::connect(&layout.netd_socket()).await {
        Ok(netd) => netd.revert().await.is_ok(),
        Err(_) => false,
    };
    if systemd {
        halt("tombolo-netd.service")?;
    }
    let netd = stop_process(layout, Service::Netd, NETD_STOP_TIMEOUT).await?;
    if !reverted && let Ok(mut command) = program(Service::Netd) {
        command.arg("revert");
        layout.tell_netd(&mut command);
        let output = command.stdin(Stdio::null()).output();
        let output = output.map_err(|error| Failure::plain(format!("tombolo-netd revert: {error}")))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(Failure::coded(
                Code::NetdUnreachable,
                format!("tombolo-netd revert: {}", text.trim()),
            ));
        }
    }
    Ok(agent || netd || systemd)
}

/// Stops a unit and keeps it from starting at boot; the second needs an /etc that can be written.
fn halt(unit: &str) -> Result<(), Failure> {
    systemctl(&["stop", unit])?;
    if let Err(failure) = systemctl(&["disable", unit]) {
        eprintln!("warning: it is stopped, but starts again at the next boot: {failure}");
    }
    Ok(())
}

pub(crate) fn systemctl(args: &[&str]) -> Result<(), Failure> {
    let failed = |text: &str| Failure::plain(format!("systemctl {}: {text}", args.join(" ")));
    let output = Command::new("systemctl").args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(&error.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim()))
    }
}

fn directory(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::plain(format!("{}: {error}", path.display()));
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(failed)?;
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(failed)?;
    }
    Ok(())
}

/// The program in a session of its own, so that the end of a terminal is not its end.
fn program(service: Service) -> Result<Command, Failure> {
    let program = find(service.program())?;
    let setsid = Path::new("/usr/bin/setsid");
    if setsid.is_file() {
        let mut command = Command::new(setsid);
        command.arg(program);
        return Ok(command);
    }
    let mut command = Command::new(program);
    command.process_group(0);
    Ok(command)
}

fn spawn(layout: &Layout, service: Service, mut command: Command) -> Result<Child, Failure> {
    let failed = |path: &Path, error: io::Error| Failure::plain(format!("{}: {error}", path.display()));
    let path = layout.log_file(service);
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(&path);
    let log = log.map_err(|error| failed(&path, error))?;
    let second = log.try_clone().map_err(|error| failed(&path, error))?;
    command
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(second)
        .current_dir("/");
    let child = command
        .spawn()
        .map_err(|error| Failure::plain(format!("{}: {error}", service.program())))?;
    let pid = layout.pid_file(service);
    fs::write(&pid, format!("{}\n", child.id())).map_err(|error| failed(&pid, error))?;
    Ok(child)
}

/// The process of the pid file, if it is still this program: numbers are used again.
pub(crate) fn running(layout: &Layout, service: Service) -> Option<Pid> {
    // An agent that was reloaded is another process than the one that was started: it says so in its own folder.
    let own = (service == Service::Agent).then(|| layout.run_dir.join("agent/agent.pid"));
    let files = own.into_iter().chain([layout.pid_file(service)]);
    files
        .filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
        // One that has handed over only serves what was open then.
        .find(|&pid| is_program(pid, service.program()) && !previous(layout).contains(&pid))
        .map(Pid::from_raw)
}

/// Processes of the agent that have handed over at a reload and are not done yet.
fn previous(layout: &Layout) -> Vec<i32> {
    let sockets = fs::read_dir(layout.run_dir.join("agent/previous"))
        .into_iter()
        .flatten()
        .flatten();
    sockets
        .filter_map(|socket| socket.path().file_stem()?.to_str()?.parse().ok())
        .filter(|&pid| is_program(pid, Service::Agent.program()))
        .collect()
}

/// True if it runs and is not just ending: one that was killed keeps its name for a moment.
fn stays(layout: &Layout, service: Service) -> bool {
    running(layout, service).is_some() && {
        std::thread::sleep(ENDING);
        running(layout, service).is_some()
    }
}

fn is_program(pid: i32, program: &str) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie has a name too, but runs no more.
    let dead = state
        .rsplit(')')
        .next()
        .is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']));
    // `setsid` is what runs for the first moments.
    !dead && matches!(name.trim_end(), found if found == program || found == "setsid")
}

async fn stop_process(layout: &Layout, service: Service, patience: Duration) -> Result<bool, Failure> {
    let Some(pid) = running(layout, service) else {
        let _ = fs::remove_file(layout.pid_file(service)); // of a process that is gone
        return Ok(false);
    };
    let failed = |error: nix::Error| Failure::plain(format!("{}: {error}", service.program()));
    kill(pid, Signal::SIGTERM).map_err(failed)?;
    let deadline = Instant::now() + patience;
    while is_program(pid.as_raw(), service.program()) {
        if Instant::now() >= deadline {
            eprintln!(
                "warning: {} did not end within {} s; it is killed",
                service.program(),
                patience.as_secs()
            );
            kill(pid, Signal::SIGKILL).map_err(failed)?;
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let _ = fs::remove_file(layout.pid_file(service));
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        layout: Layout,
    }

    #[tokio::test]
    async fn a_pid_file_of_somebody_else_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let layout =
            Line::parse_from(["x", "--run-dir", dir.path().to_str().unwrap(), "--no-systemd"]).layout;
        assert_eq!(running(&layout, Service::Agent), None);
        let own = std::process::id();
        for text in [own.to_string(), "x".into(), "0".into(), i32::MAX.to_string()] {
            fs::write(layout.pid_file(Service::Agent), text).unwrap();
            assert_eq!(running(&layout, Service::Agent), None);
        }
        assert!(
            !stop_process(&layout, Service::Agent, Duration::from_secs(1))
                .await
                .unwrap()
        );
        assert!(!layout.pid_file(Service::Agent).exists());
        let name = fs::read_to_string(format!("/proc/{own}/comm")).unwrap();
        assert!(
            is_program(own.cast_signed(), name.trim_end()),
            "its own name is believed"
        );
    }

    #[test]
    fn a_missing_user_says_how_to_make_it() {
        let layout = Line::parse_from(["x", "--agent-user", "no-such-user-here"]).layout;
        assert_eq!(layout.user().unwrap_err().code(), Some(Code::UserMissing));
    }
}
