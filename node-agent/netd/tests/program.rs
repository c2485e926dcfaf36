//! The program itself, in a network namespace of its own. Needs root and /dev/net/tun; without them the test prints
//! SKIPPED, and fails if TOMBOLO_TEST_REQUIRE names `capture`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "all of it is a test")]

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::{Duration, Instant},
};
use tombolo_capture::netd::{Families, GuardRules, GuardedPort, NetdClient};
use tombolo_types::AddressPlan;

const NETD: &str = env!("CARGO_BIN_EXE_tombolo-netd");
const INSIDE: &str = "TOMBOLO_NETD_TEST_INSIDE";
const PATIENCE: Duration = Duration::from_secs(20);

fn shell(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Netd(Child);

impl Netd {
    fn start(socket: &Path) -> Self {
        let child = Command::new(NETD)
            .args(["run", "--agent-user", "65534", "--socket"])
            .arg(socket)
            .spawn()
            .unwrap();
        let netd = Self(child);
        wait_for("netd serves", || {
            runtime().block_on(async { NetdClient::connect(socket).await.is_ok() })
        });
        netd
    }

    /// Ends it by a signal; true if it says that it ended well.
    fn end(mut self, signal: &str) -> bool {
        shell(&format!("kill -{signal} {}", self.0.id()));
        self.0.wait().unwrap().success()
    }

    fn status(&self, key: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    }
}

impl Drop for Netd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn netd(args: &[&str]) -> Output {
    Command::new(NETD).args(args).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The guard: it outlives netd, comes again after somebody has flushed all tables, and takes no strange port.
fn guarded(netd: Netd, socket: &Path) -> Netd {
    let set = |ports: &[u16]| {
        let port = |port: &u16| GuardedPort {
            port: *port,
            allowed: vec!["192.0.2.0/24".parse().unwrap()],
        };
        let rules = GuardRules {
            ports: ports.iter().map(port).collect(),
        };
        runtime().block_on(async { NetdClient::connect(socket).await.unwrap().set_guard(rules).await })
    };
    let shown = || shell("nft -s list ruleset");
    assert_eq!(shown(), "", "nothing before it is asked for");
    set(&[8080, 9090]).unwrap();
    let in_force = shown();
    assert!(in_force.starts_with("table inet tombolo_guard"), "{in_force}");
    set(&[8080, 9090]).unwrap();
    shell("nft flush ruleset");
    set(&[8080, 9090]).unwrap();
    assert_eq!(shown(), in_force, "set again");
    for ports in [
        vec![0],
        vec![22],
        vec![15008],
        vec![80, 80],
        (1000..1300).collect(),
    ] {
        let error = set(&ports).unwrap_err().to_string();
        assert!(error.starts_with("TMB0314"), "{ports:?}: {error}");
    }
    assert!(
        set(&(1000..11_000).collect::<Vec<u16>>()).is_err(),
        "longer than a message"
    );
    assert_eq!(shown(), in_force, "what is refused changes nothing");
    assert!(!netd.end("KILL"));
    let netd = Netd::start(socket);
    assert_eq!(shown(), in_force, "it outlives netd");
    set(&[]).unwrap();
    assert_eq!(shown(), "");
    set(&[8080]).unwrap();
    assert!(shown().contains("8080"), "left for revert");
    netd
}

fn missing() -> Option<&'static str> {
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .is_err()
    {
        return Some("/dev/net/tun cannot be opened (not root?)");
    }
    let made = Command::new("unshare").args(["--net", "true"]).status();
    (!made.is_ok_and(|status| status.success())).then_some("no network namespace can be made")
}

#[test]
fn the_life_of_netd() {
    if std::env::var_os(INSIDE).is_none() {
        if let Some(missing) = missing() {
            let required = std::env::var("TOMBOLO_TEST_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|suite| suite == "capture"),
                "capture is required, but {missing}"
            );
            println!("SKIPPED: {missing}");
            return;
        }
        let exe = std::env::current_exe().unwrap();
        let mut inside = Command::new("unshare");
        inside
            .args(["--net", "--"])
            .arg(exe)
            .args(["--exact", "--nocapture", "the_life_of_netd"])
            .env(INSIDE, "1");
        assert!(inside.status().unwrap().success());
        return;
    }
    shell(
        "ip link set lo up && ip link add up0 type veth peer name up1 && ip link set up0 up && ip link set up1 up",
    );
    shell("ip address add 10.9.0.2/24 dev up0");
    let folder = std::env::temp_dir().join(format!("tombolo-netd-{}", std::process::id()));
    let socket: PathBuf = folder.join("made/by/netd.sock");
    let plan = AddressPlan::default();
    let before = shell("ip route show table all");

    let first = Netd::start(&socket);
    // CAP_NET_ADMIN and nothing else, for ever.
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(first.status(set), "0000000000001000", "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(first.status(set), "0000000000000000", "{set}");
    }
    assert_eq!(first.status("NoNewPrivs"), "1");
    let output = netd(&[
        "run",
        "--agent-user",
        "65534",
        "--socket",
        socket.to_str().unwrap(),
    ]);
    assert!(
        !output.status.success() && text(&output).contains("another tombolo-netd serves"),
        "{output:?}"
    );

    let tun = runtime().block_on(async {
        let client = NetdClient::connect(&socket).await.unwrap();
        let tun = client.open_tun().await.unwrap();
        let families = client.set_address(plan, true, true).await.unwrap();
        assert_eq!(
            families,
            Families {
                ipv4: true,
                ipv6: false
            }
        );
        client.set_route(plan, true, false).await.unwrap();
        tun
    });
    let routed = shell("ip route");
    assert!(
        routed.contains("240.240.0.0/16 dev mesh0") && routed.contains("unreachable 240.240.0.0/16"),
        "{routed}"
    );

    // An upgrade of netd beside a running agent: nothing changes.
    assert!(first.end("TERM"), "a stop is no failure");
    assert!(!socket.exists());
    assert_eq!(shell("ip route"), routed, "mesh0 stays");
    let second = Netd::start(&socket);
    assert_eq!(shell("ip route"), routed, "an agent is attached");

    // netd crashes, then the agent: the next start clears what is left.
    assert!(!second.end("KILL"));
    drop(tun);
    assert!(shell("ip route").contains("unreachable"));
    let mut third = Netd::start(&socket);
    assert_eq!(shell("ip route show table all"), before);
    runtime().block_on(async {
        let client = NetdClient::connect(&socket).await.unwrap();
        let error = client.set_route(plan, true, false).await.unwrap_err().to_string();
        assert!(
            error.contains("set_address comes first") && !shell("ip route").contains("unreachable"),
            "{error}"
        );
        client.set_address(plan, true, true).await.unwrap();
        client.set_route(plan, true, false).await.unwrap();
    });
    third = guarded(third, &socket);
    assert!(third.end("TERM"));

    // Without a running netd: `revert` by the command line, twice.
    for _ in 0..2 {
        let output = netd(&["revert"]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(shell("ip route show table all"), before);
        assert_eq!(shell("nft list ruleset"), "");
    }
    let output = netd(&[
        "run",
        "--agent-user",
        "no-such-user",
        "--socket",
        socket.to_str().unwrap(),
    ]);
    assert!(
        !output.status.success() && text(&output).contains("TMB0311"),
        "{output:?}"
    );
    let output = Command::new("setpriv")
        .args([
            "--reuid",
            "65534",
            "--clear-groups",
            "--bounding-set=-all",
            NETD,
            "revert",
        ])
        .output()
        .unwrap();
    assert!(
        !output.status.success() && text(&output).contains("CAP_NET_ADMIN"),
        "{output:?}"
    );
    std::fs::remove_dir_all(folder).unwrap();
}
