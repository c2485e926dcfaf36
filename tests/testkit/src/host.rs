use crate::{Clock, Output, Process, Shape, binaries, lab::run};
use anyhow::{Context as _, Result, bail};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

/// Prepares the mounts of a host in its private mount namespace, says so, and waits to be killed.
///
/// `/etc`, `/var/lib` and `/var/log` are overlays on the machine's, `/run` is empty (which also hides nss-resolve's and
/// nscd's sockets); what is written lands in a tmpfs that is gone with the host. The users of the packages exist.
const SETUP: &str = include_str!("../host-setup.sh");

/// A host: a network namespace with a link to the router, and a private view of the file system.
#[derive(Debug)]
pub struct Host {
    name: String,
    ns: String,
    link: String,
    router: String,
    dir: PathBuf,
    shape: Shape,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
    holder: Process,
    started: AtomicU32,
    clock: Mutex<Option<Arc<Clock>>>,
}

impl Host {
    #[allow(
        clippy::too_many_arguments,
        reason = "one caller, which has just made all of them"
    )]
    pub(crate) fn start(
        name: &str,
        ns: String,
        link: String,
        router: String,
        lab: &Path,
        shape: Shape,
        ipv4: Ipv4Addr,
        ipv6: Ipv6Addr,
    ) -> Result<Self> {
        let dir = lab.join(name);
        let top = dir.join("fs");
        std::fs::create_dir_all(&top)?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{ns}"))
            .args([
                "--",
                "unshare",
                "--mount",
                "--uts",
                "--ipc",
                "--propagation",
                "private",
                "--",
                "sh",
                "-c",
                SETUP,
            ])
            .env("TOP", &top)
            .env("NAME", name);
        let mut holder = Process::start("holder", command, &dir.join("holder.log"))?;
        let end = Instant::now() + Duration::from_secs(10);
        while !holder.log().contains("ready") {
            if !holder.is_running() || Instant::now() > end {
                bail!("host {name} did not start: {}", holder.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self {
            name: name.to_owned(),
            ns,
            link,
            router,
            dir,
            shape,
            ipv4,
            ipv6,
            holder,
            started: AtomicU32::new(0),
            clock: Mutex::default(),
        })
    }

    /// Name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Network namespace.
    pub fn namespace(&self) -> &str {
        &self.ns
    }

    /// The router's end of the link to this host: tcpdump there sees the wire.
    pub fn link(&self) -> &str {
        &self.link
    }

    /// Address on the link: IPv4 where there is one.
    pub fn address(&self) -> IpAddr {
        if self.shape.ipv4 {
            self.ipv4.into()
        } else {
            self.ipv6.into()
        }
    }

    /// `address:port`, IPv6 in brackets.
    pub fn at(&self, port: u16) -> String {
        SocketAddr::new(self.address(), port).to_string()
    }

    /// IPv4 address on the link.
    pub fn ipv4(&self) -> Ipv4Addr {
        self.ipv4
    }

    /// IPv6 address on the link.
    pub fn ipv6(&self) -> Ipv6Addr {
        self.ipv6
    }

    /// The router's address on the link.
    pub fn router(&self) -> IpAddr {
        let [a, b, c, _] = self.ipv4.octets();
        let [head @ .., _] = self.ipv6.segments();
        if self.shape.ipv4 {
            Ipv4Addr::new(a, b, c, 1).into()
        } else {
            Ipv6Addr::new(head[0], head[1], head[2], head[3], head[4], head[5], head[6], 1).into()
        }
    }

    /// Folder on the machine for logs and scratch files of this host.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How a person enters this host.
    pub fn enter(&self) -> String {
        format!("nsenter -t {} -n -m -u", self.holder.pid())
    }

    /// From now on programs of this repository that are started in the host follow this clock.
    pub fn follow(&self, clock: &Arc<Clock>) {
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(clock));
    }

    /// A command inside the host; programs of this repository come first in PATH.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args([
                "-t",
                &self.holder.pid().to_string(),
                "-n",
                "-m",
                "-u",
                "--",
                program,
            ])
            .env("PATH", format!("{}:{path}:/usr/sbin:/sbin", binaries().display()))
            .env_remove("CREDENTIALS_DIRECTORY");
        let clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(clock) = clock.filter(|_| matches!(program, "tombolo" | "tombolo-discovery")) {
            command.envs(clock.environment());
        }
        command
    }

    /// Runs a shell line inside the host and waits for it.
    ///
    /// # Errors
    /// When the shell cannot be started; a failing line is in the output's code.
    pub fn sh(&self, line: &str) -> Result<Output> {
        self.run("sh", &["-c", line])
    }

    /// Runs a program inside the host and waits for it.
    ///
    /// # Errors
    /// When it cannot be started; its own failure is in the output's code.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<Output> {
        let done = self
            .command(program)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("{}: starting {program}", self.name))?;
        Ok(Output {
            code: done.status.code().unwrap_or(255),
            stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
        })
    }

    /// Starts a program inside the host in the background.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, program: &str, args: &[&str]) -> Result<Process> {
        let mut command = self.command(program);
        command.args(args);
        self.spawn_command(program, command)
    }

    /// Starts a prepared [`Self::command`] in the background.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn_command(&self, name: &str, command: Command) -> Result<Process> {
        let serial = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        let file = Path::new(name)
            .file_name()
            .map_or_else(|| "process".into(), |name| name.to_string_lossy());
        let log = self.dir.join(format!("{file}-{serial}.log"));
        Process::start(name, command, &log)
    }

    /// Writes a file inside the host.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &str, content: &str) -> Result<()> {
        use std::io::Write as _;
        let mut child = self
            .command("sh")
            .args(["-c", "mkdir -p \"$(dirname \"$1\")\" && cat > \"$1\"", "sh", path])
            .stdin(Stdio::piped())
            .spawn()?;
        child
            .stdin
            .take()
            .context("stdin")?
            .write_all(content.as_bytes())?;
        if !child.wait()?.success() {
            bail!("{}: writing {path}", self.name);
        }
        Ok(())
    }

    /// Process ids of everything that runs in the host, its own holder excepted.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn pids(&self) -> Result<Vec<i32>> {
        let list = run("ip", &["netns", "pids", &self.ns])?;
        let holder = self.holder.pid();
        Ok(list
            .stdout
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .filter(|&pid| pid != holder)
            .collect())
    }

    /// Process ids of a program in the host, by the name of its executable.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn pids_of(&self, program: &str) -> Result<Vec<i32>> {
        let named = |pid: &i32| {
            std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| {
                exe.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(program))
            })
        };
        Ok(self.pids()?.into_iter().filter(named).collect())
    }

    /// Sends a signal to every process of a program. Returns how many there were.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn signal_all(&self, program: &str, signal: nix::sys::signal::Signal) -> Result<usize> {
        let pids = self.pids_of(program)?;
        for pid in &pids {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), signal);
        }
        Ok(pids.len())
    }

    /// Power-off without a word: the link goes first, then every process. Nothing can say goodbye.
    ///
    /// # Errors
    /// When the link is gone already.
    pub fn power_off(&self) -> Result<()> {
        self.unplug()?;
        for pid in self.pids()? {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        Ok(())
    }

    /// Takes the network away; processes go on.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn unplug(&self) -> Result<()> {
        run("ip", &["-n", &self.router, "link", "set", &self.link, "down"]).map(drop)
    }

    /// Gives the network back.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn plug(&self) -> Result<()> {
        run("ip", &["-n", &self.router, "link", "set", &self.link, "up"]).map(drop)
    }

    /// What must be the same before and after: firewall rules, routes, links, rules and resolver files.
    ///
    /// # Errors
    /// When a tool cannot be run.
    pub fn fingerprint(&self) -> Result<String> {
        let line = "echo '# nft'; nft list ruleset; echo '# routes'; ip -4 route show table all; ip -6 route show table all | \
            grep -v 'expires\\|fe80\\|^multicast\\|^ff00'; echo '# rules'; ip rule; ip -6 rule; echo '# links'; ip -o link | cut -d: -f2- | \
            sed 's/state [A-Z]*//; s/qlen [0-9]*//'; echo '# files'; \
            for f in /etc/resolv.conf /etc/nsswitch.conf /etc/hosts; do echo \"$f\"; cat $f; done";
        Ok(self.sh(line)?.checked()?.stdout)
    }
}
