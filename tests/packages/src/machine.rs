use crate::Built;
use anyhow::{Context as _, Result, bail};
use std::{
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use tombolo_testkit::{Output, wait_for};

/// Longest wait for something that takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A host booted by its own systemd.
#[derive(Debug)]
pub struct Machine {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) script: PathBuf,
    pub(crate) env: Vec<(&'static str, String)>,
    pub(crate) root: PathBuf,
    /// More arguments of systemd-nspawn.
    pub(crate) options: Vec<String>,
}

impl Machine {
    pub(crate) fn script(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.script);
        command.arg(verb).arg(&self.name);
        command.envs(self.env.iter().map(|(key, value)| (*key, value)));
        command
    }

    fn verb(&self, verb: &str) -> Result<()> {
        let mut command = self.script(verb);
        if verb == "up" {
            command.args(&self.options);
        }
        crate::built::output(&mut command)
            .with_context(|| self.console())
            .map(drop)
    }

    /// Boots it and waits until its systemd has started everything.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot(&self) -> Result<()> {
        self.verb("up")?;
        self.verb("wait")
    }

    /// An orderly reboot; returns when everything is started again.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn reboot(&self) -> Result<()> {
        self.verb("reboot")
    }

    /// Takes its power away.
    ///
    /// # Errors
    /// When the script cannot be run.
    pub fn power_off(&self) -> Result<()> {
        self.verb("kill")
    }

    /// Its address on the switch.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A file of it, seen from outside. Not for /run, /tmp, /proc, which are mounts of its own.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Runs a shell command line as root.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn sh(&self, line: &str) -> Result<Output> {
        self.sh_with(line, "")
    }

    /// As [`Self::sh`], with something on standard input.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn sh_with(&self, line: &str, input: &str) -> Result<Output> {
        let mut command = self.script("run");
        command.args(["sh", "-c", line]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("{}: {line}", self.name))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that does not read its input closes it.
            let _ = stdin.write_all(input.as_bytes());
        }
        let result = child.wait_with_output()?;
        Ok(Output {
            code: result.status.code().unwrap_or(255),
            stdout: String::from_utf8_lossy(&result.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&result.stderr).into_owned(),
        })
    }

    /// Runs a shell command line that must succeed; gives its standard output without the last newline.
    ///
    /// # Errors
    /// With everything it said, unless it exits with 0.
    pub fn ok(&self, line: &str) -> Result<String> {
        let output = self.sh(line)?.checked();
        Ok(output
            .with_context(|| format!("{}: {line}", self.name))?
            .stdout
            .trim_end()
            .to_owned())
    }

    /// Runs a shell command line until it succeeds.
    ///
    /// # Errors
    /// At the deadline.
    pub fn until(&self, line: &str) -> Result<String> {
        wait_for(line, PATIENCE, || self.ok(line)).with_context(|| self.journal())
    }

    /// Writes a file, with the folders above it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &str, mode: &str, content: &str) -> Result<()> {
        let line = format!("mkdir -p \"$(dirname {path})\" && cat > {path} && chmod {mode} {path}");
        self.sh_with(&line, content)?
            .checked()
            .with_context(|| path.to_owned())
            .map(drop)
    }

    /// Makes the signed apt repository of a build known, as an administrator would, in a folder on the machine.
    ///
    /// # Errors
    /// When files cannot be copied, or apt does not accept the signature.
    pub fn add_repository(&self, built: &Built) -> Result<()> {
        self.ok("rm -rf /srv/tombolo /etc/apt/sources.list.d/* /var/lib/apt/lists/*; mkdir -p /srv /etc/apt/keyrings; : > /etc/apt/sources.list")?;
        copy(&built.repo(), &self.path("/srv/tombolo"))?;
        copy(&built.packages(), &self.path("/srv/packages"))?;
        self.ok("cp /srv/tombolo/tombolo.asc /etc/apt/keyrings/ && \
                 sed 's|REPOSITORY|file:/srv/tombolo|' /srv/tombolo/tombolo.sources > /etc/apt/sources.list.d/tombolo.sources && \
                 apt-get update -qq")
            .map(drop)
    }

    /// `apt-get`, without questions.
    ///
    /// # Errors
    /// When it fails.
    pub fn apt(&self, line: &str) -> Result<String> {
        self.ok(&format!(
            "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 --no-install-recommends {line} 2>&1"
        ))
    }

    /// A property of a unit.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        self.ok(&format!("systemctl show --value -p {name} {unit}"))
    }

    /// The process id of a unit, in the machine's numbers; fails if it does not run.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self, unit: &str) -> Result<u32> {
        match self.property(unit, "MainPID")?.parse() {
            Ok(0) | Err(_) => bail!("{unit} does not run on {}\n{}", self.name, self.journal()),
            Ok(pid) => Ok(pid),
        }
    }

    /// The end of its journal.
    pub fn journal(&self) -> String {
        // With the fields of ours, which say more than the message.
        let fields = "SYSLOG_IDENTIFIER|PRIORITY|MESSAGE|REASON|DETAIL|CAUSE|ERROR|DST_ADDRESS|_SOURCE_REALTIME_TIMESTAMP";
        let awk = format!(
            "/^$/{{print line; line=\"\"; next}} /^({fields})=/{{sub(/^[^=]*=/, \"\"); line=line \"  \" $0}}"
        );
        let lines = self.sh(&format!(
            "journalctl --no-pager -q -o export -n 60 -u 'tombolo*' 2>&1 | awk '{awk}'"
        ));
        format!(
            "--- journal of {}\n{}",
            self.name,
            lines.map(|output| output.stdout).unwrap_or_default()
        )
    }

    fn console(&self) -> String {
        let log = self
            .root
            .parent()
            .map(|dir| dir.join("console.log"))
            .unwrap_or_default();
        format!(
            "--- console of {}\n{}",
            self.name,
            std::fs::read_to_string(log).unwrap_or_default()
        )
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.journal());
        }
        let _ = crate::built::output(&mut self.script("down"));
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let _ = std::fs::remove_dir_all(to);
    crate::built::output(Command::new("cp").arg("-r").arg(from).arg(to)).map(drop)
}
