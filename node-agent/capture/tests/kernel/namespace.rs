//! A test in its own network namespace.

use crate::agent::Agent;
use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    process::Command,
    sync::mpsc,
    time::Duration,
};
use tombolo_capture::netd::{Mesh0, NetdServer};
use tombolo_runtime::TaskGroup;
use tombolo_types::AddressPlan;

/// The user of the agent: nobody.
pub(crate) const AGENT: u32 = 65_534;

/// Long enough for a loaded machine; no test waits for it to pass.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

const INSIDE: &str = "TOMBOLO_KERNEL_TEST_INSIDE";

/// Runs `test`, which is the test named `name` of this binary, in a new network namespace with a link `up0` that has
/// global addresses of both families.
pub(crate) fn alone(name: &str, test: impl FnOnce(&World)) {
    if std::env::var_os(INSIDE).is_some() {
        shell("ip link set lo up");
        // No waiting for duplicate address detection.
        shell("sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.default.addr_gen_mode=1");
        shell("ip link add up0 type veth peer name up1");
        shell("ip link set up0 up && ip link set up1 up");
        shell("ip address add 10.9.0.2/24 dev up0 && ip address add fd09::2/64 dev up0 nodad");
        return test(&World::new());
    }
    if let Some(missing) = missing() {
        let required = std::env::var("TOMBOLO_TEST_REQUIRE").unwrap_or_default();
        assert!(
            !required.split(',').any(|suite| suite == "capture"),
            "capture is required, but {missing}"
        );
        println!("SKIPPED: {missing}");
        return;
    }
    let status = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", name])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{name} failed in its namespace");
}

fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("this needs root");
    }
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .is_err()
    {
        return Some("/dev/net/tun cannot be opened");
    }
    let made = Command::new("unshare").args(["--net", "true"]).status();
    (!made.is_ok_and(|status| status.success())).then_some("no network namespace can be made")
}

/// Runs a command line; it must succeed.
pub(crate) fn shell(line: &str) -> String {
    let (ok, output) = try_shell(line);
    assert!(ok, "{line}: {output}");
    output
}

/// Runs a command line; true if it succeeds.
pub(crate) fn try_shell(line: &str) -> (bool, String) {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A namespace with netd in it.
pub(crate) struct World {
    pub(crate) plan: AddressPlan,
    pub(crate) socket: PathBuf,
    folder: PathBuf,
}

impl World {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("tombolo-kernel-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        shell(&format!("chmod 755 {}", folder.display()));
        let world = Self {
            plan: AddressPlan::default(),
            socket: folder.join("netd.sock"),
            folder,
        };
        let (ready_tx, ready_rx) = mpsc::channel();
        let socket = world.socket.clone();
        std::thread::spawn(move || {
            runtime().block_on(async {
                let tasks = TaskGroup::new("netd");
                let server = NetdServer::bind(&socket, AGENT).unwrap();
                let mut mesh0 = Mesh0::new("mesh0", AGENT, &tasks).unwrap();
                mesh0.clean_start().await.unwrap();
                ready_tx.send(()).unwrap();
                server.serve(mesh0, &tasks).await.unwrap();
            });
        });
        ready_rx.recv_timeout(PATIENCE).unwrap();
        world
    }

    /// An agent without capabilities, ready to take connections.
    pub(crate) fn agent(&self) -> Agent {
        Agent::start(self, "")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// VIPs of one kind in both families; see `agent` for what it does with them.
pub(crate) fn vips(kind: u8, port: u16) -> [SocketAddr; 2] {
    let v6: IpAddr = format!("2001:2::{kind:x}").parse().unwrap();
    [
        (IpAddr::from([240, 240, 1, kind]), port).into(),
        (v6, port).into(),
    ]
}

pub(crate) fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}
