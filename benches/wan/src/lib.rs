//! The transports between networks over a long way that loses packets: two network namespaces, the emulated way between
//! them, a caller in one, a gateway and an endpoint behind it in the other.
//!
//! One process plays both sides: what is measured is how each transport lives with delay and loss, not its CPU.

mod pki;
mod services;

use anyhow::{Context as _, Result, ensure};
use pki::Pki;
use services::{ECHO, Endpoint, Gateway, REQUEST_BYTES, SINK, application};
use std::{
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    time::{Instant, sleep},
};
use tombolo_runtime::TaskGroup;
use tombolo_testkit::{Lab, Wan, WanOptions, enter};
use tombolo_tunnel::{
    Authority, ConnectRequest, GatewayTarget, Limits, Monitor, NoObserver, Pool, PoolLimits, Target,
    bidirectional, serve,
};
use tombolo_types::SpiffeId;

/// What carries the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// To the gateway over QUIC, the caller's TLS inside.
    Quic,
    /// The same over HTTP/2 and TCP, as ztunnel's double HBONE; the name of the congestion control.
    Double(&'static str),
    /// HTTP/2 and TCP from end to end, without a gateway; the name of the congestion control.
    Hbone(&'static str),
}

impl Transport {
    /// As it stands in results.
    pub fn label(self) -> String {
        match self {
            Self::Quic => "QUIC".to_owned(),
            Self::Double(control) => format!("double HBONE, {control}"),
            Self::Hbone(control) => format!("h2, {control}"),
        }
    }
}

/// What a run has shown.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Bytes per second of the bulk streams at the endpoint, after the warm-up.
    pub goodput: f64,
    /// Part of what the caller has sent that it had to send again, from the beginning.
    pub retransmitted: f64,
    /// Round trips of requests, sorted.
    pub latencies: Vec<Duration>,
    /// More about the connection, for people.
    pub detail: String,
}

impl Outcome {
    /// A quantile of the latencies, in per mille.
    pub fn quantile(&self, per_mille: usize) -> Duration {
        let index = (self.latencies.len() * per_mille / 1000).min(self.latencies.len().saturating_sub(1));
        self.latencies.get(index).copied().unwrap_or_default()
    }
}

/// What a run does.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Streams that send as fast as they may.
    pub bulk: usize,
    /// Streams that send one request after the other.
    pub requesters: usize,
    /// Before anything is counted.
    pub warm_up: Duration,
    /// What is counted.
    pub measured: Duration,
}

/// Two networks and the way between them.
#[derive(Debug)]
pub struct World {
    near: Option<Runtime>,
    far: Option<Runtime>,
    pki: Arc<PkiBox>,
    received: Arc<AtomicU64>,
    gateway: GatewayTarget,
    direct: Target,
    namespaces: [String; 2],
    wan: Wan,
    _lab: Lab,
}

struct PkiBox(Pki);

impl std::fmt::Debug for PkiBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pki")
    }
}

/// A runtime whose threads live in a namespace.
fn runtime(namespace: &str) -> Result<Runtime> {
    let namespace = namespace.to_owned();
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .on_thread_start(move || {
            // A thread that stays outside reaches nobody: the first call fails.
            if let Err(error) = enter(&namespace) {
                eprintln!("{error:#}");
            }
        })
        .build()?;
    Ok(runtime)
}

/// Runs on a thread of the runtime, so that sockets are of its namespace.
fn run_on<T: Send + 'static>(
    runtime: &Runtime,
    future: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    runtime.block_on(runtime.spawn(future)).context("a task")?
}

/// By the route: it is asked before the namespace's default, and any name that the kernel has will do.
fn congestion_control(namespace: &str, name: &str) -> Result<()> {
    let status = std::process::Command::new("ip")
        .args([
            "-n",
            namespace,
            "route",
            "replace",
            "10.78.0.0/24",
            "dev",
            "wan0",
            "congctl",
            name,
        ])
        .status()?;
    ensure!(status.success(), "this kernel has no {name}");
    Ok(())
}

impl World {
    /// Makes the namespaces, the way, and what serves on the far side.
    ///
    /// # Errors
    /// When a namespace or a link cannot be made: it needs root.
    pub fn new(options: WanOptions) -> Result<Self> {
        let mut lab = Lab::new("wan")?;
        let namespaces = [
            lab.host("near")?.namespace().to_owned(),
            lab.host("far")?.namespace().to_owned(),
        ];
        let wan = Wan::between(&namespaces[0], &namespaces[1], options)?;
        let (near, far) = (runtime(&namespaces[0])?, runtime(&namespaces[1])?);
        let pki = Pki::new()?;
        let (endpoint_identity, gateway_identity) =
            (pki.workload("endpoint", 2)?, pki.workload("gateway", 3)?);
        let (endpoint_id, gateway_id) = (pki.id("endpoint")?, pki.id("gateway")?);
        let received = Arc::<AtomicU64>::default();
        let counter = Arc::clone(&received);
        let (gateway, direct) = run_on(&far, async move {
            let tasks = TaskGroup::new("far");
            let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
            let (sink, echo) = (
                TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?,
                TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?,
            );
            let endpoint = Endpoint {
                sink: sink.local_addr()?,
                echo: echo.local_addr()?,
            };
            tasks.spawn("sink", application(sink, Some(counter), tasks.clone()));
            tasks.spawn("echo", application(echo, None, tasks.clone()));
            let inner = serve(
                TcpListener::bind(any).await?,
                &endpoint_identity,
                Arc::new(endpoint),
                Limits::default(),
                Arc::new(NoObserver),
                &tasks,
            )?;
            let port = inner.local_addr().port();
            let relay = Arc::new(Gateway {
                endpoint: (Ipv4Addr::LOCALHOST, port).into(),
            });
            let outer = serve(
                TcpListener::bind(any).await?,
                &gateway_identity,
                Arc::clone(&relay),
                Limits::default(),
                Arc::new(NoObserver),
                &tasks,
            )?;
            let quic = outer.listen_quic((Wan::B, 0).into(), &relay, Arc::new(|_| {}), &tasks)?;
            let target = |port, id: SpiffeId| Target {
                hbone: (Wan::B, port).into(),
                expected: [id].into(),
            };
            let gateway = GatewayTarget {
                tcp: target(outer.local_addr().port(), gateway_id),
                quic: Some(quic),
            };
            // Both serve as long as the runtime is there.
            std::mem::forget((inner, outer, tasks));
            Ok((gateway, target(port, endpoint_id)))
        })?;
        Ok(Self {
            near: Some(near),
            far: Some(far),
            pki: Arc::new(PkiBox(pki)),
            received,
            gateway,
            direct,
            namespaces,
            wan,
            _lab: lab,
        })
    }

    /// The way.
    pub fn wan(&self) -> &Wan {
        &self.wan
    }

    /// One run, over connections of its own.
    ///
    /// # Errors
    /// When a call cannot be made or is cut.
    pub fn run(&self, transport: Transport, load: Load) -> Result<Outcome> {
        if let Transport::Double(control) | Transport::Hbone(control) = transport {
            for namespace in &self.namespaces {
                congestion_control(namespace, control)?;
            }
        }
        let near = self.near.as_ref().context("the runtime is gone")?;
        let caller = self.pki.0.workload("caller", 1)?;
        let expected = self.pki.0.id("endpoint")?;
        let (mut gateway, direct) = (self.gateway.clone(), self.direct.clone());
        if matches!(transport, Transport::Double(_)) {
            gateway.quic = None;
        }
        let received = Arc::clone(&self.received);
        let namespace = self.namespaces[0].clone();
        let passed = self.wan.counts().0;
        let mut outcome = run_on(near, async move {
            let tasks = TaskGroup::new("near");
            let pool = Pool::new(
                caller,
                PoolLimits::default(),
                Arc::new(|_| true),
                Arc::new(NoObserver),
                &tasks,
            );
            let caller = Caller {
                pool,
                transport,
                gateway,
                direct,
                expected,
            };
            caller.run(load, &received, &namespace, &tasks).await
        })?;
        let now = self.wan.counts().0;
        outcome.detail += &format!(
            ", way: {} packets passed, {} lost by chance, {} dropped by the queue",
            now.passed - passed.passed,
            now.lost - passed.lost,
            now.dropped - passed.dropped
        );
        Ok(outcome)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for runtime in [self.near.take(), self.far.take()].into_iter().flatten() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

/// The near side in one run.
struct Caller {
    pool: Pool,
    transport: Transport,
    gateway: GatewayTarget,
    direct: Target,
    expected: SpiffeId,
}

impl Caller {
    /// A connection of an application to its agent, which carries it over.
    async fn open(&self, port: u16, tasks: &TaskGroup) -> Result<TcpStream> {
        let authority = Authority::Name {
            host: "bench.example.svc.mesh.internal".to_owned(),
            port,
        };
        let request = ConnectRequest::new(authority);
        let deadline = Instant::now() + Duration::from_secs(20);
        let stream = if let Transport::Hbone(_) = self.transport {
            self.pool.open(&self.direct, &request, deadline).await?
        } else {
            let expected = std::slice::from_ref(&self.expected);
            self.pool
                .open_through(&self.gateway, &request, expected, &request, deadline)
                .await?
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (application, accepted) =
            tokio::try_join!(TcpStream::connect(listener.local_addr()?), listener.accept())?;
        application.set_nodelay(true)?;
        accepted.0.set_nodelay(true)?;
        tasks.spawn("agent", async move {
            bidirectional(accepted.0, stream, &Monitor::default()).await;
        });
        Ok(application)
    }

    async fn run(
        self,
        load: Load,
        received: &AtomicU64,
        namespace: &str,
        tasks: &TaskGroup,
    ) -> Result<Outcome> {
        let stop = Arc::new(AtomicBool::new(false));
        let counting = Arc::new(AtomicBool::new(false));
        let (mut running, mut sinks, mut echoes) = (Vec::new(), Vec::new(), Vec::new());
        // All before the first byte: behind bulk data a slow transport answers no CONNECT in time.
        for _ in 0..load.bulk {
            sinks.push(self.open(SINK, tasks).await?);
        }
        for _ in 0..load.requesters {
            echoes.push(self.open(ECHO, tasks).await?);
        }
        for mut io in sinks {
            let stop = Arc::clone(&stop);
            running.push(tasks.spawn("bulk", async move {
                let chunk = vec![0x5a; 64 * 1024];
                while !stop.load(Ordering::Relaxed) {
                    io.write_all(&chunk).await?;
                }
                Ok::<_, std::io::Error>(Vec::new())
            }));
        }
        for mut io in echoes {
            let (stop, counting) = (Arc::clone(&stop), Arc::clone(&counting));
            running.push(tasks.spawn("requests", async move {
                let (request, mut answer) = ([1; REQUEST_BYTES], [0; REQUEST_BYTES]);
                let mut taken = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let (began, counted) = (Instant::now(), counting.load(Ordering::Relaxed));
                    if io.write_all(&request).await.is_err() || io.read_exact(&mut answer).await.is_err() {
                        break;
                    }
                    if counted {
                        taken.push(began.elapsed());
                    }
                }
                Ok(taken)
            }));
        }
        sleep(load.warm_up).await;
        counting.store(true, Ordering::Relaxed);
        let (before, began) = (received.load(Ordering::Relaxed), Instant::now());
        sleep(load.measured).await;
        let received = received.load(Ordering::Relaxed) - before;
        let mut outcome = Outcome {
            goodput: received as f64 / began.elapsed().as_secs_f64(),
            ..Outcome::default()
        };
        self.retransmitted(&mut outcome, namespace)?;
        stop.store(true, Ordering::Relaxed);
        // What still waits to be sent is not waited for.
        self.pool.cut();
        for task in running {
            if let Ok(Ok(latencies)) = task.await {
                outcome.latencies.extend(latencies);
            }
        }
        outcome.latencies.sort_unstable();
        Ok(outcome)
    }

    fn retransmitted(&self, outcome: &mut Outcome, namespace: &str) -> Result<()> {
        if self.transport == Transport::Quic {
            let path = self.pool.quic_paths().pop().context("it went over TCP")?;
            outcome.retransmitted = path.lost as f64 / path.sent.max(1) as f64;
            outcome.detail = format!(
                "rtt {:.1} ms, window {} KiB, MTU {}, {} of {} packets lost",
                path.rtt.as_secs_f64() * 1e3,
                path.window / 1024,
                path.mtu,
                path.lost,
                path.sent
            );
            return Ok(());
        }
        let far = Wan::B.to_string();
        let output = std::process::Command::new("ip")
            .args(["netns", "exec", namespace, "ss", "-tinH", "dst", &far])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let sum = |field: &str| -> f64 {
            let words = text.split_whitespace();
            words
                .filter_map(|word| word.strip_prefix(field)?.parse::<f64>().ok())
                .sum()
        };
        let (sent, again) = (sum("bytes_sent:"), sum("bytes_retrans:"));
        outcome.retransmitted = again / sent.max(1.0);
        outcome.detail = format!("{:.0} of {:.0} bytes sent again", again, sent);
        Ok(())
    }
}
