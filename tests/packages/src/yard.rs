use crate::{Machine, built::output, workspace};
use anyhow::{Context as _, Result};
use std::{
    net::Ipv4Addr,
    path::PathBuf,
    process::{self, Command},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};
use tempfile::TempDir;
use tombolo_testkit::{binaries, skip};

/// A switch with machines on it. Drop it after its machines.
#[derive(Debug)]
pub struct Yard {
    dir: TempDir,
    /// Beginning of the names of all namespaces; short, because links carry it too.
    prefix: String,
    machines: AtomicU32,
}

/// Why machines cannot be booted here; `None` where they can. Makes the root that they boot from.
fn obstacle() -> Option<String> {
    if !nix::unistd::Uid::effective().is_root() {
        return Some("booting machines needs root".into());
    }
    for tool in [
        "systemd-nspawn",
        "mmdebstrap",
        "ip",
        "dpkg-deb",
        "rpmbuild",
        "reprepro",
        "createrepo_c",
        "lintian",
        "rpmlint",
    ] {
        let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|dir| dir.join(tool).is_file());
        if !found {
            return Some(format!("{tool} is missing (packaging/setup.sh installs it)"));
        }
    }
    if !binaries().join("tombolo-agent").exists() {
        return Some(format!(
            "no programs in {} (cargo build --release)",
            binaries().display()
        ));
    }
    output(Command::new(script()).arg("base"))
        .err()
        .map(|error| format!("no root to boot from: {error:#}"))
}

fn script() -> PathBuf {
    workspace().join("tests/packages/box")
}

/// True if the suite can run; otherwise says SKIPPED, or fails if it is required.
///
/// # Panics
/// When the suite is required and cannot run.
pub fn required() -> bool {
    static OBSTACLE: OnceLock<Option<String>> = OnceLock::new();
    match OBSTACLE.get_or_init(obstacle) {
        None => true,
        Some(reason) => {
            skip("packages", reason);
            false
        }
    }
}

impl Yard {
    /// An empty one.
    ///
    /// # Errors
    /// When there cannot be another network namespace.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::Builder::new().prefix("yard").tempdir_in("/var/tmp")?;
        let prefix = format!("tb{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let hub = format!("{prefix}-hub");
        let yard = Self {
            dir,
            prefix,
            machines: AtomicU32::new(0),
        };
        ip(&format!("netns add {hub}"))?;
        for line in [
            "link set lo up",
            "link add br0 type bridge",
            "addr add 10.77.0.1/24 dev br0",
            "link set br0 up",
        ] {
            ip(&format!("-n {hub} {line}"))?;
        }
        Ok(yard)
    }

    /// Network namespace of the switch.
    pub fn hub(&self) -> String {
        format!("{}-hub", self.prefix)
    }

    /// Boots a machine on the switch.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn machine(&self, name: &str) -> Result<Machine> {
        self.machine_with(name, &[])
    }

    /// As [`Self::machine`], with more arguments for systemd-nspawn.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn machine_with(&self, name: &str, options: &[&str]) -> Result<Machine> {
        let number = self.machines.fetch_add(1, Ordering::Relaxed) + 1;
        let (hub, ns) = (format!("{}-hub", self.prefix), format!("{}-{name}", self.prefix));
        let address = Ipv4Addr::new(10, 77, 0, u8::try_from(number).context("too many machines")? + 1);
        ip(&format!("netns add {ns}"))?;
        ip(&format!("-n {ns} link set lo up"))?;
        // Outside of the machine: its links are as they are, however often it boots.
        ip(&format!(
            "-n {hub} link add v{number} type veth peer name eth0 netns {ns}"
        ))?;
        ip(&format!("-n {hub} link set v{number} master br0 up"))?;
        ip(&format!("-n {ns} addr add {address}/24 dev eth0"))?;
        ip(&format!("-n {ns} link set eth0 up"))?;
        ip(&format!("-n {ns} route add default via 10.77.0.1"))?;
        let machine = Machine {
            name: name.to_owned(),
            address,
            script: script(),
            env: vec![
                ("BOX_DIR", self.dir.path().display().to_string()),
                ("BOX_PREFIX", self.prefix.clone()),
            ],
            root: self.dir.path().join(name).join("root"),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        machine.boot()?;
        Ok(machine)
    }
}

impl Drop for Yard {
    fn drop(&mut self) {
        let _ = ip(&format!("netns del {}-hub", self.prefix));
    }
}

fn ip(line: &str) -> Result<String> {
    output(Command::new("ip").args(line.split(' ')))
}
