use crate::{Seed, output};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    io::{BufReader, Write as _},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tombolo_packages::Yard;
use tombolo_testkit::{Output, wait_for};

/// Longest wait for a boot: half a minute on an idle machine.
const BOOT: Duration = Duration::from_secs(300);
/// Longest wait for anything else.
const PATIENCE: Duration = Duration::from_secs(60);

/// A virtual machine of one processor and 512 MB with the kernel of its release.
#[derive(Debug)]
pub struct Vm {
    qemu: Child,
    dir: TempDir,
    hub: String,
    key: PathBuf,
    address: Ipv4Addr,
}

impl Vm {
    /// Starts it from a fresh image; it is not up yet.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(yard: &Yard, seed: &Seed, image: &Path, address: Ipv4Addr) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let hub = yard.hub();
        let ip = |line: &str| output(Command::new("ip").args(["-n", &hub]).args(line.split(' ')));
        ip("tuntap add vm0 mode tap")?;
        ip("link set vm0 master br0 up")?;
        let disk = dir.path().join("disk.qcow2");
        output(
            Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
                .args([image, &disk]),
        )?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let log = std::fs::File::create(at("qemu.log"))?;
        let qemu = Command::new("ip")
            .args(["netns", "exec", &hub, "qemu-system-x86_64"])
            // The processor is emulated; its cache of translated code would otherwise take a gigabyte.
            .args([
                "-machine",
                "q35",
                "-accel",
                "tcg,thread=multi,tb-size=256",
                "-cpu",
                "max",
            ])
            .args(["-smp", "1", "-m", "512", "-display", "none", "-nodefaults"])
            .args(["-drive", &format!("file={},if=virtio", disk.display())])
            .args([
                "-drive",
                &format!("file={},if=virtio,format=raw,readonly=on", seed.disk().display()),
            ])
            .args(["-netdev", "tap,id=n0,ifname=vm0,script=no,downscript=no"])
            .args(["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:74:6f:6d"])
            .args(["-device", "virtio-rng-pci"])
            .args(["-serial", &format!("file:{}", at("console.log"))])
            .args(["-monitor", &format!("unix:{},server,nowait", at("monitor"))])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("qemu-system-x86_64")?;
        Ok(Self {
            qemu,
            hub,
            key: seed.key(),
            address,
            dir,
        })
    }

    /// Its address on the switch.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    fn ssh(&self) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.hub, "ssh", "-q", "-i"]);
        command.arg(&self.key);
        // One connection for all commands: a handshake takes seconds there.
        let control = self.dir.path().join("ssh").display().to_string();
        for option in [
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "ConnectTimeout=20",
            "ServerAliveInterval=10",
            "ServerAliveCountMax=3",
            "ControlMaster=auto",
            "ControlPersist=60",
            &format!("ControlPath={control}"),
        ] {
            command.args(["-o", option]);
        }
        command.arg(format!("debian@{}", self.address));
        command
    }

    /// Forgets the open ssh connection, whose other end is gone.
    fn disconnect(&self) {
        let _ = self.ssh().args(["-O", "exit"]).output();
        let _ = std::fs::remove_file(self.dir.path().join("ssh"));
    }

    /// Runs a shell command line as root.
    ///
    /// # Errors
    /// When ssh cannot be started.
    pub fn sh(&self, line: &str) -> Result<Output> {
        let quoted = line.replace('\'', "'\\''");
        let result = self
            .ssh()
            .arg(format!("sudo sh -c '{quoted}'"))
            .stdin(Stdio::null())
            .output()?;
        Ok(Output {
            code: result.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&result.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&result.stderr).into_owned(),
        })
    }

    /// Runs a shell command line that must succeed; gives its standard output without the last newline.
    ///
    /// # Errors
    /// When it fails.
    pub fn ok(&self, line: &str) -> Result<String> {
        let output = self.sh(line)?.checked().with_context(|| line.to_owned())?;
        Ok(output.stdout.trim_end().to_owned())
    }

    /// Runs a shell command line until it succeeds.
    ///
    /// # Errors
    /// At the deadline; the text has the end of the journal.
    pub fn until(&self, line: &str) -> Result<String> {
        wait_for(line, PATIENCE, || self.ok(line)).with_context(|| self.journal())
    }

    /// Waits until a boot is done, with all that cloud-init does in it.
    ///
    /// # Errors
    /// At the deadline, or when cloud-init says that something failed.
    pub fn booted(&self) -> Result<()> {
        let id = self.boot_id().ok();
        wait_for("ssh", BOOT, || self.ok("true")).with_context(|| self.console())?;
        wait_for("cloud-init", BOOT, || {
            let status = self.sh("cloud-init status")?.stdout;
            ensure!(
                !status.contains("running") && !status.contains("not run"),
                "{status}"
            );
            Ok(status)
        })
        .and_then(|status| {
            ensure!(status.contains("done"), "{status}");
            Ok(())
        })
        .with_context(|| {
            let log =
                self.sh("tail -n 60 /var/log/cloud-init-output.log; grep -a WARNING /var/log/cloud-init.log");
            format!("{id:?}\n{}", log.map(|log| log.stdout).unwrap_or_default())
        })
    }

    fn boot_id(&self) -> Result<String> {
        self.ok("cat /proc/sys/kernel/random/boot_id")
    }

    /// Boots it again: orderly, or as after a loss of power.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn reboot(&self, orderly: bool) -> Result<()> {
        let before = self.boot_id()?;
        if orderly {
            // The connection ends before the answer.
            self.sh("systemctl --no-block reboot")?;
        } else {
            self.monitor("system_reset")?;
        }
        wait_for("another boot", BOOT, || {
            // The old connection hangs until it is given up.
            self.disconnect();
            let now = self.boot_id()?;
            ensure!(now != before, "still the old one");
            Ok(())
        })
        .with_context(|| self.console())?;
        self.booted()
    }

    /// Says a line to the emulator's monitor.
    ///
    /// # Errors
    /// When it does not answer, or answers with an error.
    pub fn monitor(&self, line: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.dir.path().join("monitor"))?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        // It greets, and prompts again when it is done.
        until_prompt(&mut reader)?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        let answer = until_prompt(&mut reader)?;
        ensure!(!answer.contains("Error:"), "{line}: {answer}");
        Ok(answer)
    }

    /// Keeps everything of it, memory included, under a name.
    ///
    /// # Errors
    /// When the emulator cannot.
    pub fn save(&self, name: &str) -> Result<()> {
        self.monitor(&format!("savevm {name}")).map(drop)
    }

    /// Puts it back to what was kept; its clock too.
    ///
    /// # Errors
    /// When the emulator cannot, or it does not answer afterwards.
    pub fn load(&self, name: &str) -> Result<()> {
        self.disconnect();
        self.monitor(&format!("loadvm {name}"))?;
        wait_for("ssh", PATIENCE, || self.ok("true")).map(drop)
    }

    /// Milliseconds from the start of a unit's process until it said that it is ready, in this boot.
    ///
    /// # Errors
    /// When it is not active.
    pub fn ready_ms(&self, unit: &str) -> Result<u64> {
        let show = |name: &str| -> Result<u64> {
            let text = self.ok(&format!("systemctl show --value -p {name} {unit}"))?;
            text.parse()
                .with_context(|| format!("{name} of {unit}: {text:?}"))
        };
        ensure!(show("ActiveEnterTimestampMonotonic")? > 0, "{unit} is not active");
        Ok((show("ActiveEnterTimestampMonotonic")? - show("InactiveExitTimestampMonotonic")?) / 1000)
    }

    /// The end of the journal of our units.
    pub fn journal(&self) -> String {
        let said = self.sh("journalctl --no-pager -q -n 60 -u 'tombolo*' -o short-monotonic; systemctl --no-pager --failed --no-legend");
        format!(
            "--- journal\n{}",
            said.map(|output| output.stdout).unwrap_or_default()
        )
    }

    /// The end of what it wrote to its console.
    pub fn console(&self) -> String {
        let read = |name| std::fs::read(self.dir.path().join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&read("console.log")).into_owned();
        let from = text.lines().count().saturating_sub(60);
        let end: Vec<_> = text.lines().skip(from).collect();
        format!(
            "--- qemu\n{}\n--- console\n{}",
            String::from_utf8_lossy(&read("qemu.log")),
            end.join("\n")
        )
    }
}

/// Reads until the monitor prompts.
fn until_prompt(reader: &mut impl std::io::BufRead) -> Result<String> {
    let mut said = Vec::new();
    loop {
        let chunk = reader.fill_buf().context("the monitor does not answer")?;
        if chunk.is_empty() {
            bail!("the emulator is gone: {}", String::from_utf8_lossy(&said));
        }
        let read = chunk.len();
        said.extend_from_slice(chunk);
        reader.consume(read);
        if said.ends_with(b"(qemu) ") {
            return Ok(String::from_utf8_lossy(&said).into_owned());
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}\n{}", self.journal(), self.console());
        }
        let _ = self.ssh().args(["-O", "exit"]).output();
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
