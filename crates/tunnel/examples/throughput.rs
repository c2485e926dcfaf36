//! CPU per GB, per request and per new connection of one client and one server in one process, over loopback.
//!
//! `cargo run --release -p tombolo-tunnel --example throughput -- [bulk|request|connect|idle|all]`
//!
//! Both ends run on one worker thread each, as two hosts of one core; the applications are plain threads, and their
//! CPU is not counted. Beside each figure stands the same traffic over plain loopback TCP through no proxy.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

#[path = "../tests/support/mod.rs"]
mod support;

use http::StatusCode;
use nix::time::{ClockId, clock_gettime};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use support::Mesh;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
};
use tombolo_identity::Peer;
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{
    Authority, ConnectRequest, Incoming, Limits, Monitor, NoObserver, Pool, PoolLimits, Service, Target,
    bidirectional, serve,
};

struct Deliver;

impl Service for Deliver {
    fn admit(&self, _: &Peer) -> bool {
        true
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        let Ok(Authority::Address(address)) = incoming.authority() else {
            return incoming.refuse(StatusCode::BAD_REQUEST);
        };
        let Ok(tcp) = TcpStream::connect(address).await else {
            return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
        };
        tcp.set_nodelay(true).unwrap();
        if let Ok(stream) = incoming.accept(None) {
            bidirectional(tcp, stream, &Monitor::default()).await;
        }
    }
}

/// CPU clocks of the two worker threads.
static CLOCKS: Mutex<Vec<ClockId>> = Mutex::new(Vec::new());

fn runtime(name: &str) -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(name)
        .enable_all()
        .on_thread_start(|| CLOCKS.lock().unwrap().push(own_clock()))
        .build()
        .unwrap()
}

fn own_clock() -> ClockId {
    // CPUCLOCK of a thread: the complement of its id, then 3 bits for "thread" and "scheduled time".
    ClockId::from_raw((!nix::unistd::gettid().as_raw() << 3) | 6)
}

fn cpu() -> Duration {
    CLOCKS
        .lock()
        .unwrap()
        .iter()
        .map(|&clock| Duration::from(clock_gettime(clock).unwrap()))
        .sum()
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The application: an address that is served by a thread a connection.
fn backend(serve: fn(StdStream)) -> SocketAddr {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let socket = socket.unwrap();
            socket.set_nodelay(true).unwrap();
            thread::Builder::new()
                .stack_size(64 * 1024)
                .spawn(move || serve(socket))
                .unwrap();
        }
    });
    address
}

fn swallow(mut socket: StdStream) {
    let mut buffer = vec![0; 256 * 1024];
    while socket.read(&mut buffer).is_ok_and(|count| count > 0) {}
}

fn spew(mut socket: StdStream) {
    let buffer = vec![7; 256 * 1024];
    while socket.write_all(&buffer).is_ok() {}
}

/// Answers 100 bytes with 1 KiB.
fn answer(mut socket: StdStream) {
    let (mut question, reply) = ([0; 100], [7; 1024]);
    while socket.read_exact(&mut question).is_ok() && socket.write_all(&reply).is_ok() {}
}

fn hold(mut socket: StdStream) {
    let _ = socket.read(&mut [0]);
}

/// The client's proxy: every connection to the address that is returned goes through the tunnel to `to`.
struct Bench {
    client: Runtime,
    _server: Runtime,
    pool: Pool,
    target: Target,
    tasks: TaskGroup,
}

impl Bench {
    fn new() -> Self {
        let mesh = Mesh::new("mesh.example");
        let (client, server) = (runtime("client"), runtime("server"));
        let tasks = TaskGroup::new("bench");
        let live = mesh.workload("shop", "catalog", 1);
        let hbone = server.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let limits = Limits::default();
            let server = server.spawn_server(listener, &live, limits, &tasks);
            server.local_addr()
        });
        let pool = client.block_on(async {
            let live = mesh.workload("shop", "webapp", 2);
            Pool::new(
                live,
                PoolLimits::default(),
                Arc::new(|_| true),
                Arc::new(NoObserver),
                &tasks,
            )
        });
        let target = Target {
            hbone,
            expected: [mesh.id("shop", "catalog")].into(),
        };
        Self {
            client,
            _server: server,
            pool,
            target,
            tasks,
        }
    }

    fn through(&self, to: SocketAddr) -> SocketAddr {
        let _inside = self.client.enter();
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let (pool, target, tasks) = (self.pool.clone(), self.target.clone(), self.tasks.clone());
        self.tasks.spawn("accept", async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                tcp.set_nodelay(true).unwrap();
                let (pool, target) = (pool.clone(), target.clone());
                tasks.spawn("outbound", async move {
                    let request = ConnectRequest::new(Authority::Address(to));
                    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
                    let stream = Box::pin(pool.open(&target, &request, deadline)).await.unwrap();
                    bidirectional(tcp, stream, &Monitor::default()).await;
                });
            }
        });
        address
    }
}

trait SpawnServer {
    fn spawn_server(
        &self,
        listener: TcpListener,
        live: &Arc<tombolo_identity::LiveIdentity>,
        limits: Limits,
        tasks: &TaskGroup,
    ) -> tombolo_tunnel::Server;
}

impl SpawnServer for Runtime {
    fn spawn_server(
        &self,
        listener: TcpListener,
        live: &Arc<tombolo_identity::LiveIdentity>,
        limits: Limits,
        tasks: &TaskGroup,
    ) -> tombolo_tunnel::Server {
        serve(
            listener,
            live,
            Arc::new(Deliver),
            limits,
            Arc::new(NoObserver),
            tasks,
        )
        .unwrap()
    }
}

/// Runs `threads` copies of `work` for `time`; each call of it returns what it has done.
fn measure(
    name: &str,
    unit: &str,
    threads: usize,
    time: Duration,
    work: &(dyn Fn(&mut Option<StdStream>) -> u64 + Sync),
) {
    let done = AtomicU64::new(0);
    // Connections and code paths are warm before the clock runs.
    let end = Instant::now() + Duration::from_millis(300);
    let round = |end: Instant, count: bool| {
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut socket = None;
                    while Instant::now() < end {
                        let amount = work(&mut socket);
                        if count {
                            done.fetch_add(amount, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
    };
    round(end, false);
    let (before, started) = (cpu(), Instant::now());
    round(started + time, true);
    let (spent, wall) = (cpu() - before, started.elapsed());
    let amount = done.load(Ordering::Relaxed);
    if unit == "GB" {
        let gigabytes = amount as f64 / 1e9;
        println!(
            "{name:28} {:8.2} CPU s/GB  {:8.2} GB/s",
            spent.as_secs_f64() / gigabytes,
            gigabytes / wall.as_secs_f64()
        );
    } else {
        let each = spent.as_secs_f64() * 1e6 / amount as f64;
        println!(
            "{name:28} {each:8.1} CPU us/{unit}  {:8.0} {unit}s/s",
            amount as f64 / wall.as_secs_f64()
        );
    }
}

fn connect(address: SocketAddr) -> StdStream {
    let socket = StdStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    socket
}

fn ask(socket: &mut StdStream) {
    socket.write_all(&[1; 100]).unwrap();
    socket.read_exact(&mut [0; 1024]).unwrap();
}

fn main() {
    let which = std::env::args().nth(1).unwrap_or_else(|| "all".to_owned());
    let wants = |name: &str| which == name || which == "all";
    let bench = Bench::new();
    let time = Duration::from_secs(3);
    if wants("bulk") {
        let up = bench.through(backend(swallow));
        measure("bulk up, 1 stream", "GB", 1, time, &|socket| {
            let socket = socket.get_or_insert_with(|| connect(up));
            socket.write_all(&[7; 128 * 1024]).unwrap();
            128 * 1024
        });
        let down = bench.through(backend(spew));
        let read = |socket: &mut Option<StdStream>| {
            let socket = socket.get_or_insert_with(|| connect(down));
            let mut buffer = [0; 128 * 1024];
            u64::try_from(socket.read(&mut buffer).unwrap()).unwrap()
        };
        measure("bulk down, 1 stream", "GB", 1, time, &read);
        measure("bulk down, 8 streams", "GB", 8, time, &read);
    }
    if wants("request") {
        let address = bench.through(backend(answer));
        let request = |socket: &mut Option<StdStream>| {
            ask(socket.get_or_insert_with(|| connect(address)));
            1
        };
        measure("request, 1 connection", "request", 1, time, &request);
        measure("request, 32 connections", "request", 32, time, &request);
    }
    if wants("connect") {
        let address = bench.through(backend(answer));
        let request = |_: &mut Option<StdStream>| {
            ask(&mut connect(address));
            1
        };
        measure("connection, 1 at a time", "connection", 1, time, &request);
        measure("connection, 32 at a time", "connection", 32, time, &request);
    }
    if wants("idle") {
        let address = bench.through(backend(hold));
        let one = connect(address);
        thread::sleep(Duration::from_millis(300));
        let before = resident_kib();
        let sockets: Vec<_> = (0..2_000).map(|_| connect(address)).collect();
        thread::sleep(Duration::from_millis(1000));
        let grown = resident_kib() - before;
        println!(
            "idle connections             {:8.2} KiB each for both ends and the application's thread ({} pooled)",
            grown as f64 / sockets.len() as f64,
            bench.pool.connections()
        );
        drop((one, sockets));
    }
}
