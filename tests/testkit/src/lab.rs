use crate::{Host, Output};
use anyhow::{Context as _, Result, bail};
use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// What the links of a host are like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Bytes.
    pub mtu: u32,
    /// IPv4 on the link.
    pub ipv4: bool,
    /// IPv6 on the link.
    pub ipv6: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            mtu: 1500,
            ipv4: true,
            ipv6: true,
        }
    }
}

/// A router and the hosts around it.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    dir: PathBuf,
    hosts: u8,
    janitor: Option<Child>,
}

impl Lab {
    /// Makes the router. The name is part of every namespace name, so that leftovers can be told apart.
    ///
    /// # Errors
    /// When namespaces cannot be made: see [`crate::require_root`].
    pub fn new(name: &str) -> Result<Self> {
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("tmb{}-{serial}-{name}", std::process::id());
        let dir = std::env::temp_dir().join(&prefix);
        std::fs::create_dir_all(&dir)?;
        let lab = Self {
            janitor: janitor(&prefix, &dir),
            prefix,
            dir,
            hosts: 0,
        };
        let router = lab.router();
        run("ip", &["netns", "add", &router])?;
        run("ip", &["-n", &router, "link", "set", "lo", "up"])?;
        for setting in [
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv6.conf.default.accept_dad=0",
        ] {
            run("ip", &["netns", "exec", &router, "sysctl", "-qw", setting])?;
        }
        Ok(lab)
    }

    /// Network namespace of the router.
    pub fn router(&self) -> String {
        format!("{}-r", self.prefix)
    }

    /// A folder that lives as long as the lab.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A number for a link that nothing else has.
    pub(crate) fn take_number(&mut self) -> u8 {
        self.hosts += 1;
        self.hosts
    }

    pub(crate) fn namespace_of(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// Adds a host with a network of its own: `10.77.N.2/24` and `fd77:N::2/64`.
    ///
    /// # Errors
    /// When a namespace, a link or a mount cannot be made.
    pub fn host(&mut self, name: &str) -> Result<Host> {
        self.host_shaped(name, Shape::default())
    }

    /// As [`Self::host`] with links of another kind.
    ///
    /// # Errors
    /// As [`Self::host`].
    pub fn host_shaped(&mut self, name: &str, shape: Shape) -> Result<Host> {
        let n = self.take_number();
        let ns = self.namespace_of(name);
        let (router, link) = (self.router(), format!("h{n}"));
        run("ip", &["netns", "add", &ns])?;
        run("ip", &["-n", &ns, "link", "set", "lo", "up"])?;
        // No duplicate address detection: link-local addresses are usable at once.
        run(
            "ip",
            &[
                "netns",
                "exec",
                &ns,
                "sysctl",
                "-qw",
                "net.ipv6.conf.default.accept_dad=0",
            ],
        )?;
        let mtu = shape.mtu.to_string();
        run(
            "ip",
            &[
                "link", "add", &link, "netns", &router, "mtu", &mtu, "type", "veth", "peer", "name", "eth0",
                "netns", &ns, "mtu", &mtu,
            ],
        )?;
        let (ipv4, ipv6) = (
            Ipv4Addr::new(10, 77, n, 2),
            Ipv6Addr::new(0xfd77, u16::from(n), 0, 0, 0, 0, 0, 2),
        );
        let mut steps: Vec<String> = Vec::new();
        if !shape.ipv6 {
            run(
                "ip",
                &[
                    "netns",
                    "exec",
                    &ns,
                    "sysctl",
                    "-qw",
                    "net.ipv6.conf.eth0.disable_ipv6=1",
                ],
            )?;
        }
        if shape.ipv4 {
            steps.push(format!("-n {router} addr add 10.77.{n}.1/24 dev {link}"));
            steps.push(format!("-n {ns} addr add {ipv4}/24 dev eth0"));
        }
        if shape.ipv6 {
            steps.push(format!("-n {router} addr add fd77:{n:x}::1/64 dev {link} nodad"));
            steps.push(format!("-n {ns} addr add {ipv6}/64 dev eth0 nodad"));
        }
        steps.push(format!("-n {router} link set {link} up"));
        steps.push(format!("-n {ns} link set eth0 up"));
        if shape.ipv4 {
            steps.push(format!("-n {ns} route add default via 10.77.{n}.1"));
        }
        if shape.ipv6 {
            steps.push(format!("-n {ns} -6 route add default via fd77:{n:x}::1"));
        }
        for step in steps {
            run("ip", &step.split(' ').collect::<Vec<_>>())?;
        }
        Host::start(name, ns, link, router, &self.dir, shape, ipv4, ipv6)
    }

    /// Runs a command in the router's namespace.
    ///
    /// # Errors
    /// When it cannot be started or exits with another code than 0.
    pub fn on_router(&self, command: &[&str]) -> Result<Output> {
        let mut args = vec!["netns", "exec"];
        let router = self.router();
        args.push(&router);
        args.extend_from_slice(command);
        run("ip", &args)
    }

    /// The command to start something in the router's namespace, for example tcpdump.
    pub fn router_command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.router(), program]);
        command
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = Command::new("sh")
            .args(["-c", SWEEP, "sh", &self.prefix])
            .arg(&self.dir)
            .status();
        if let Some(mut janitor) = self.janitor.take() {
            let _ = janitor.kill();
            let _ = janitor.wait();
        }
    }
}

/// Kills what runs in the namespaces of a lab and removes them and its folder.
const SWEEP: &str = r#"
for ns in $(ip netns list | cut -d' ' -f1 | grep -F -e "$1-"); do
  pids=$(ip netns pids "$ns"); [ -z "$pids" ] || kill -9 $pids 2>/dev/null
  ip netns del "$ns"
done
rm -rf "$2"
"#;

/// Sweeps when this process ends without having dropped its lab, by whatever signal.
fn janitor(prefix: &str, dir: &Path) -> Option<Child> {
    let wait = format!("tail --pid=\"$3\" -f /dev/null; {SWEEP}");
    Command::new("setsid")
        .args(["sh", "-c", &wait, "sh", prefix])
        .arg(dir)
        .arg(std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .ok()
}

/// Runs a command on the machine itself.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<Output> {
    let done = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("starting {program}"))?;
    let output = Output {
        code: done.status.code().unwrap_or(255),
        stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
    };
    if !output.ok() {
        bail!("{program} {}: {}", args.join(" "), output.text().trim());
    }
    Ok(output)
}
