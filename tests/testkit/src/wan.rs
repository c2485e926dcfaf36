//! A long way between two network namespaces: delay, jitter, loss, rate and queue, all from a seed, so that a run can be
//! repeated. Packets pass through this process; nothing of the kernel's traffic control is asked for.

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use std::{
    collections::VecDeque,
    fs::File,
    io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Bytes of the largest packet.
const MTU: usize = 1500;
/// Packets that the kernel keeps for us while we are not scheduled: 40 ms at 300 Mbit/s.
const BACKLOG: &str = "1000";
/// Busy, it looks so often: 6 packets at 300 Mbit/s.
const GRAIN: Duration = Duration::from_micros(250);
/// An idle direction looks so often whether it should end.
const IDLE: Duration = Duration::from_millis(100);

/// What the way is like, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct WanOptions {
    /// One way.
    pub delay: Duration,
    /// Added to the delay of each packet, evenly between nothing and this; order is kept.
    pub jitter: Duration,
    /// Packets lost by chance, of a million.
    pub loss_ppm: u32,
    /// Bits per second.
    pub rate_bits: u64,
    /// Bytes that wait in front of the bottleneck; what comes then is dropped.
    pub queue_bytes: u64,
    /// Of everything that happens by chance.
    pub seed: u64,
}

/// Packets of one direction.
#[derive(Debug, Default)]
struct Counters {
    passed: AtomicU64,
    passed_bytes: AtomicU64,
    lost: AtomicU64,
    dropped: AtomicU64,
}

/// What has passed in one direction so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WanCount {
    /// Packets at the other end.
    pub passed: u64,
    /// Their bytes.
    pub passed_bytes: u64,
    /// Packets lost by chance.
    pub lost: u64,
    /// Packets dropped by the full queue.
    pub dropped: u64,
}

impl Counters {
    fn read(&self) -> WanCount {
        WanCount {
            passed: self.passed.load(Ordering::Relaxed),
            passed_bytes: self.passed_bytes.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }
}

/// A way between two namespaces, until it is dropped.
#[derive(Debug)]
pub struct Wan {
    stop: Arc<AtomicBool>,
    there: Arc<Counters>,
    back: Arc<Counters>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Wan {
    /// Address of the first end.
    pub const A: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
    /// Address of the second end.
    pub const B: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);

    /// Joins two named network namespaces by a link `wan0` in each.
    ///
    /// # Errors
    /// When a namespace cannot be entered or a link cannot be made.
    pub fn between(a: &str, b: &str, options: WanOptions) -> Result<Self> {
        let ends = [
            Arc::new(end(a, Self::A).context("the first end")?),
            Arc::new(end(b, Self::B).context("the second end")?),
        ];
        let stop = Arc::new(AtomicBool::new(false));
        let counters = [Arc::<Counters>::default(), Arc::default()];
        let mut threads = Vec::new();
        for direction in 0..2 {
            let (from, to) = (Arc::clone(&ends[direction]), Arc::clone(&ends[1 - direction]));
            let (stop, counters) = (Arc::clone(&stop), Arc::clone(&counters[direction]));
            let way = Way::new(options, direction as u64);
            let thread = std::thread::Builder::new().name("wan".to_owned());
            threads.push(thread.spawn(move || way.run(&from, &to, &stop, &counters))?);
        }
        let [there, back] = counters;
        Ok(Self {
            stop,
            there,
            back,
            threads,
        })
    }

    /// What has passed: from the first end to the second, and back.
    pub fn counts(&self) -> (WanCount, WanCount) {
        (self.there.read(), self.back.read())
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of it was printed.
            let _ = thread.join();
        }
    }
}

/// Runs something in a network namespace, on a thread of its own.
///
/// # Errors
/// When there is no such namespace, or with what the closure says.
pub fn in_namespace<T: Send>(namespace: &str, run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(namespace)?;
            run()
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })
}

/// Moves the calling thread into a network namespace, for good.
///
/// # Errors
/// When there is none of that name or this process may not.
pub fn enter(namespace: &str) -> Result<()> {
    let file = File::open(format!("/run/netns/{namespace}")).context("open the namespace")?;
    setns(OwnedFd::from(file), CloneFlags::CLONE_NEWNET).context("enter the namespace")?;
    Ok(())
}

fn end(namespace: &str, address: Ipv4Addr) -> Result<tun::Device> {
    let device = in_namespace(namespace, || {
        let mut configuration = tun::Configuration::default();
        configuration.tun_name("wan0").layer(tun::Layer::L3);
        tun::create(&configuration).context("make wan0")
    })?;
    device.set_nonblock()?;
    let (address, mtu) = (format!("{address}/24"), MTU.to_string());
    for words in [
        ["link", "set", "wan0", "mtu", &mtu, "txqueuelen", BACKLOG, "up"].as_slice(),
        ["addr", "add", &address, "dev", "wan0"].as_slice(),
    ] {
        let status = Command::new("ip").args(["-n", namespace]).args(words).status()?;
        anyhow::ensure!(status.success(), "ip -n {namespace} {}", words.join(" "));
    }
    Ok(device)
}

/// One direction.
struct Way {
    options: WanOptions,
    chance: Chance,
    /// When the last bit of what was let in has left the bottleneck.
    free: Instant,
    due: VecDeque<(Instant, Vec<u8>)>,
    spare: Vec<Vec<u8>>,
}

impl Way {
    fn new(options: WanOptions, direction: u64) -> Self {
        Self {
            options,
            chance: Chance(options.seed ^ direction.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            free: Instant::now(),
            due: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    fn run(
        mut self,
        from: &tun::Device,
        to: &tun::Device,
        stop: &AtomicBool,
        counters: &Counters,
    ) -> io::Result<()> {
        let mut packet = vec![0; MTU + 64];
        while !stop.load(Ordering::Relaxed) {
            loop {
                match from.recv(&mut packet) {
                    Ok(length) => self.take(&packet[..length], Instant::now(), counters),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
                self.deliver(to, counters);
            }
            self.deliver(to, counters);
            let wait = self
                .due
                .front()
                .map_or(IDLE, |(due, _)| due.saturating_duration_since(Instant::now()));
            if wait < GRAIN.saturating_mul(8) {
                std::thread::sleep(wait.min(GRAIN));
                continue;
            }
            match from.recv_timeout(&mut packet, wait.min(IDLE)) {
                Ok(length) => self.take(&packet[..length], Instant::now(), counters),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A packet has come: by chance it is lost, else it waits for the bottleneck, then travels.
    fn take(&mut self, packet: &[u8], now: Instant, counters: &Counters) {
        // Always both numbers, so that the fate of the n-th packet depends on n alone.
        let (lost, late) = (self.chance.below(1_000_000), self.chance.below(1 << 20));
        if lost < u64::from(self.options.loss_ppm) {
            counters.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let time = |bytes: u64| Duration::from_nanos(bytes * 8 * 1_000_000_000 / self.options.rate_bits);
        let waits = self.free.saturating_duration_since(now);
        if waits > time(self.options.queue_bytes) {
            counters.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.free = now + waits + time(packet.len() as u64);
        let jitter = self.options.jitter.mul_f64(late as f64 / f64::from(1 << 20));
        let due = self.free + self.options.delay + jitter;
        let due = self.due.back().map_or(due, |(last, _)| due.max(*last));
        let mut held = self.spare.pop().unwrap_or_default();
        held.clear();
        held.extend_from_slice(packet);
        self.due.push_back((due, held));
    }

    fn deliver(&mut self, to: &tun::Device, counters: &Counters) {
        let now = Instant::now();
        while self.due.front().is_some_and(|(due, _)| *due <= now) {
            let Some((_, packet)) = self.due.pop_front() else {
                return;
            };
            // A link that is down or full drops, as one does.
            if to.send(&packet).is_ok() {
                counters.passed.fetch_add(1, Ordering::Relaxed);
                counters
                    .passed_bytes
                    .fetch_add(packet.len() as u64, Ordering::Relaxed);
            }
            self.spare.push(packet);
        }
    }
}

/// SplitMix64: the same numbers everywhere.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
