//! A gateway with thousands of reverse sessions: memory of each, CPU while nobody calls, and how soon all are back after a
//! restart. Discovery, gateway, devices, certificates and entries are real; the hosts are tasks of a few load processes,
//! each process at an address of its own.
//!
//! Prints a table; needs root, for network namespaces.
#![allow(clippy::print_stdout, reason = "the table is what it is for")]

mod load;
mod measure;

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use load::Transport;
use measure::{Memory, cpu, memory, settled};
use std::{
    net::SocketAddr,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};
use tombolo_testkit::{Gateway, Host, Mesh, MeshOptions, Process};

/// Longest wait for all sessions.
const PATIENCE: Duration = Duration::from_secs(180);
/// CPU is measured over so long.
const WINDOW: Duration = Duration::from_secs(10);
/// State of the devices, in a load host. `/run` of one is in memory.
const STATE: &str = "/run/devices";

/// A gateway with thousands of reverse sessions.
#[derive(Debug, clap::Parser)]
struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Sessions, one measurement for each number.
    #[arg(long, value_delimiter = ',', default_value = "1000,5000")]
    sessions: Vec<usize>,
    /// What carries them.
    #[arg(long, value_delimiter = ',', default_value = "quic,tcp")]
    transports: Vec<Transport>,
    /// Load processes, each with an address of its own.
    #[arg(long, default_value_t = 10)]
    hosts: usize,
}

/// What a load process does.
#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Enrols devices.
    Enrol { token: PathBuf, count: usize },
    /// Holds a session for each of the first devices.
    Hold {
        gateway: SocketAddr,
        transport: Transport,
        count: usize,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    match args.verb {
        Some(Verb::Enrol { token, count }) => runtime.block_on(load::enrol(&token, STATE.as_ref(), count)),
        Some(Verb::Hold {
            gateway,
            transport,
            count,
        }) => runtime.block_on(load::hold(STATE.as_ref(), count, gateway, transport)),
        None => measure(&args),
    }
}

/// A mesh with one gateway and the hosts of the load.
struct World {
    hosts: Vec<Host>,
    gateway: Gateway,
    mesh: Mesh,
}

impl World {
    fn new(hosts: usize) -> Result<Self> {
        let mut mesh = Mesh::start("sessions", MeshOptions::default())?;
        let mut inside = mesh.lab.lan("inside")?;
        let gateway = mesh.gateway("gateway", "", &mut inside, 201)?;
        let hosts = (0..hosts)
            .map(|n| mesh.lab.host(&format!("load{n}")))
            .collect::<Result<_>>()?;
        Ok(Self { hosts, gateway, mesh })
    }

    fn on_each(&self, line: impl Fn(usize) -> Vec<String>) -> Result<Vec<Process>> {
        let program = std::env::current_exe()?;
        let program = program.to_str().context("the program's path is no text")?;
        let start = |(n, host): (usize, &Host)| {
            let args = line(n);
            host.spawn(program, &args.iter().map(String::as_str).collect::<Vec<_>>())
        };
        self.hosts.iter().enumerate().map(start).collect()
    }

    /// The part of one load process.
    fn part(&self, n: usize, count: usize) -> usize {
        let hosts = self.hosts.len();
        count / hosts + usize::from(n < count % hosts)
    }

    fn enrol(&self, count: usize) -> Result<()> {
        self.mesh.tombolo(
            "workload-group create kiosk -n shop --service-account kiosk --port http=80:8080 --outbound",
        )?;
        for (n, host) in self.hosts.iter().enumerate() {
            let uses = self.part(n, count);
            let token = format!("token create -n shop --workload-group kiosk --uses {uses} --ttl 1h");
            host.write("/run/token", &self.mesh.tombolo(&token)?)?;
        }
        let part = |n| {
            vec![
                "enrol".to_owned(),
                "/run/token".to_owned(),
                self.part(n, count).to_string(),
            ]
        };
        for mut process in self.on_each(part)? {
            ensure!(
                process.wait(Duration::from_secs(900)) == Some(0),
                "enrolment: {}",
                process.log()
            );
        }
        Ok(())
    }

    /// Waits until so many are held; how long it took since `began`.
    fn until_held(&self, count: usize, began: Instant) -> Result<Duration> {
        let wanted = u64::try_from(count)?;
        loop {
            // A gateway that just starts does not answer yet.
            let held = self
                .gateway
                .metric("tombolo_gateway_reverse_sessions")
                .unwrap_or(0);
            if held == wanted {
                return Ok(began.elapsed());
            }
            ensure!(
                began.elapsed() < PATIENCE,
                "{held} of {count} sessions after {PATIENCE:?}"
            );
            sleep(Duration::from_millis(50));
        }
    }

    fn run(&mut self, transport: Transport, count: usize) -> Result<Row> {
        self.gateway.kill();
        self.gateway.start()?;
        let pid = self.gateway.process().pid();
        let before = settled(pid, PATIENCE)?;
        let at = self.gateway.host.at(443);
        let name = match transport {
            Transport::Tcp => "tcp",
            Transport::Quic => "quic",
        };
        let hold = |n| {
            let part = self.part(n, count).to_string();
            ["hold", &at, name, &part].map(str::to_owned).to_vec()
        };
        let began = Instant::now();
        let load = self.on_each(hold)?;
        let came = self.until_held(count, began)?;
        let with = settled(pid, PATIENCE)?;
        let idle = cpu(pid, WINDOW)?;

        self.gateway.kill();
        let began = Instant::now();
        self.gateway.start()?;
        let back = self.until_held(count, began)?;
        let pid = self.gateway.process().pid();
        let again = settled(pid, PATIENCE)?;
        drop(load);
        self.until_held(0, Instant::now())?;
        let after = settled(pid, PATIENCE)?;
        Ok(Row {
            transport: name,
            count,
            before,
            with,
            again,
            after,
            idle,
            came,
            back,
        })
    }
}

/// One measurement.
struct Row {
    transport: &'static str,
    count: usize,
    before: Memory,
    with: Memory,
    /// After the restart.
    again: Memory,
    /// When all have gone.
    after: Memory,
    idle: f64,
    came: Duration,
    back: Duration,
}

impl Row {
    fn print(&self) {
        let each = |with: Memory| {
            let grown = with.anonymous.saturating_sub(self.before.anonymous);
            grown as f64 / self.count as f64
        };
        let mib = |memory: Memory| memory.resident as f64 / 1024.0;
        println!(
            "| {} | {} | {:.1} | {:.1} | **{:.1}** | {:.1} | {:.1} | {:.1} % | {:.1} s | {:.1} s |",
            self.transport,
            self.count,
            mib(self.before),
            mib(self.with),
            each(self.with),
            each(self.again),
            mib(self.after),
            self.idle,
            self.came.as_secs_f64(),
            self.back.as_secs_f64(),
        );
    }
}

fn measure(args: &Args) -> Result<()> {
    let most = args.sessions.iter().copied().max().context("--sessions")?;
    let mut world = World::new(args.hosts)?;
    let began = Instant::now();
    world.enrol(most)?;
    eprintln!(
        "{most} devices are enrolled after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    // The gateway holds all their entries, and knows them at its next start.
    let pid = world.gateway.process().pid();
    settled(pid, PATIENCE)?;
    println!(
        "| transport | sessions | RSS before, MiB | with them, MiB | each, KiB | each after the restart, KiB | RSS when all have gone, MiB | CPU of one core | all there after | all back after |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for &transport in &args.transports {
        for &count in &args.sessions {
            world.run(transport, count)?.print();
        }
    }
    eprintln!(
        "the gateway at the end: {:?}",
        memory(world.gateway.process().pid())?
    );
    Ok(())
}
