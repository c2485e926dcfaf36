//! The agent of these tests: a process of its own, as another user and without capabilities.

use crate::namespace::{AGENT, PATIENCE, World, runtime};
use std::{
    io::{BufRead as _, BufReader},
    net::IpAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tombolo_capture::{Capture, CaptureConfig, Captured, PendingFlow, Refusal, netd::NetdClient, privilege};
use tombolo_runtime::TaskGroup;
use tombolo_types::AddressPlan;

/// What happens to connections to a VIP, by its last number.
pub(crate) const ECHO: u8 = 1;
pub(crate) const RESET: u8 = 2;
pub(crate) const UNREACHABLE: u8 = 3;
/// Echo after [`HELD_FOR`].
pub(crate) const SLOW: u8 = 4;
/// Nobody decides.
pub(crate) const FORGOTTEN: u8 = 5;
/// Accepted, then cut by RST.
pub(crate) const CUT: u8 = 6;
/// Reads everything, answers with the number of bytes.
pub(crate) const SINK: u8 = 7;
/// Sends [`FLOOD`] bytes.
pub(crate) const SOURCE: u8 = 8;
/// Dropped without a decision.
pub(crate) const DROPPED: u8 = 9;

pub(crate) const HELD_FOR: Duration = Duration::from_millis(1300);
pub(crate) const HOLD: Duration = Duration::from_secs(3);
pub(crate) const FLOOD: usize = 1 << 30;

/// The running agent.
pub(crate) struct Agent {
    child: Child,
}

impl Agent {
    /// `bridges`: a prefix whose packets are taken, too.
    pub(crate) fn start(world: &World, bridges: &str) -> Self {
        let mut child = Command::new("setpriv")
            .args([
                "--reuid",
                &AGENT.to_string(),
                "--regid",
                &AGENT.to_string(),
                "--clear-groups",
            ])
            .args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "--nocapture", "agent::process"])
            .env("AGENT_SOCKET", &world.socket)
            .env("AGENT_BRIDGES", bridges)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.any(|line| line.is_ok_and(|line| line.contains("agent ready")));
        assert!(ready, "the agent did not start");
        // The pipe stays open, so that the agent can write.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// kill -9.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The agent's process; not a test by itself.
#[test]
#[ignore = "started by the other tests"]
fn process() {
    let Some(socket) = std::env::var_os("AGENT_SOCKET") else {
        return;
    };
    assert_eq!(
        privilege::effective().unwrap(),
        0,
        "the agent must have no capability"
    );
    assert_eq!(nix::unistd::geteuid().as_raw(), AGENT);
    let bridges = std::env::var("AGENT_BRIDGES").unwrap_or_default();
    runtime().block_on(async {
        let plan = AddressPlan::default();
        let netd = NetdClient::connect(Path::new(&socket)).await.unwrap();
        let families = netd.set_address(plan, true, true).await.unwrap();
        let tun = netd.open_tun().await.unwrap();
        let tasks = TaskGroup::new("agent");
        let config = CaptureConfig {
            ipv4: families.ipv4,
            ipv6: families.ipv6,
            hold: HOLD,
            allowed_sources: bridges
                .split(',')
                .filter_map(|prefix| prefix.parse().ok())
                .collect(),
            ..CaptureConfig::new(plan)
        };
        let capture = Capture::start(tun, config, &tasks).await.unwrap();
        netd.set_route(plan, families.ipv4, families.ipv6).await.unwrap();
        println!("agent ready");
        serve(capture, &tasks).await;
    });
}

async fn serve(mut capture: Capture, tasks: &TaskGroup) {
    let mut kept = Vec::new();
    while let Some(captured) = capture.events.recv().await {
        match captured {
            Captured::Connect(flow) => match last_number(flow.destination().ip()) {
                RESET => flow.refuse(Refusal::Reset),
                UNREACHABLE => flow.refuse(Refusal::HostUnreachable),
                DROPPED => drop(flow),
                FORGOTTEN => kept.push(flow),
                kind => drop(tasks.spawn("connection", connection(flow, kind))),
            },
            Captured::Dns(query) => {
                // Asked for a long answer, gives one.
                let mut answer = query.bytes.to_vec();
                answer.reverse();
                if query.bytes.starts_with(b"long") {
                    answer.resize(9000, b'x');
                }
                query.reply(&answer);
            }
            Captured::DnsTcp(mut stream) => drop(tasks.spawn("dns", async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            })),
            Captured::Ping(ping) => {
                if last_number(ping.destination()) == ECHO {
                    ping.reply();
                }
            }
        }
    }
}

async fn connection(flow: PendingFlow, kind: u8) {
    if kind == SLOW {
        tokio::time::sleep(HELD_FOR).await;
    }
    let destination = flow.destination();
    let Ok(mut stream) = flow.accept().await else {
        return;
    };
    assert_eq!(stream.peer_addr().unwrap().ip(), destination.ip());
    assert!(stream.nodelay().unwrap());
    match kind {
        CUT => stream.set_zero_linger().unwrap(),
        SINK => {
            let mut buffer = vec![0; 256 * 1024];
            let mut total = 0u64;
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                total += length as u64;
            }
            let _ = stream.write_all(&total.to_be_bytes()).await;
        }
        SOURCE => {
            let block = vec![7; 256 * 1024];
            for _ in 0..FLOOD / block.len() {
                if stream.write_all(&block).await.is_err() {
                    return;
                }
            }
        }
        _ => {
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy_buf(
                &mut tokio::io::BufReader::with_capacity(64 * 1024, &mut read),
                &mut write,
            )
            .await;
            let _ = write.shutdown().await;
        }
    }
}

fn last_number(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(a) => a.octets()[3],
        IpAddr::V6(a) => a.octets()[15],
    }
}

/// Waits for a condition.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
