//! Endpoints of one cluster come, go and die; another cluster's world is compared with what is true.
//!
//! Devices are real ones to discovery: they enrol, hold a control stream, report health, answer on their HBONE port and
//! leave, each at an address of its own in a network namespace. `CHURN_CYCLES=1000` for the long run, `SEED=n` for one
//! that is to be repeated.

use crate::{clusters::*, lab::*};
use futures_util::future::join_all;
use std::{
    collections::{BTreeMap, VecDeque},
    net::{IpAddr, Ipv4Addr},
    process::Command,
    time::{Duration, Instant},
};
use tokio::net::TcpListener;
use tombolo_discovery::config::Life;
use tombolo_identity::proof;
use tombolo_proto::{
    istio::workload::WorkloadStatus,
    tombolo::v1::{self as pb, enrollment_client::EnrollmentClient},
    type_url,
    xds::DeltaDiscoveryRequest,
};
use tombolo_runtime::TaskGroup;

const SERVICES: usize = 6;
/// Devices that the run tries to keep.
const POPULATION: usize = 48;
/// What happens at once.
const BATCH: usize = 10;
/// A change is in every cluster within a second; a death needs a witness first.
const SEEN_MAX: Duration = Duration::from_secs(4);
/// Deaths within eleven seconds, in percent of all: from 20 % on discovery holds that it is the one that is cut off.
const DEATHS_PERCENT_MAX: usize = 15;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Numbers in an order that a seed repeats (SplitMix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % limit.max(1) as u64).unwrap()
    }
}

/// Runs a test in a network namespace in which every address of 10.0.0.0/8 is this host's.
fn in_a_network_of_its_own<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::Uid::effective().is_root() {
        return skip("a network namespace needs root");
    }
    let thread = std::thread::spawn(|| {
        // Of this thread, and of those that it starts.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        for line in ["link set lo up", "route add local 10.0.0.0/8 dev lo"] {
            let done = Command::new("ip").args(line.split(' ')).status().unwrap();
            assert!(done.success(), "ip {line}");
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// An endpoint. What it holds open ends with its tasks.
struct Device {
    host: Host,
    service: usize,
    up: Option<TaskGroup>,
}

impl Device {
    fn name(service: usize) -> String {
        format!("s{service}")
    }

    async fn register(lab: &Lab, service: usize, address: Ipv4Addr) -> Self {
        let token = lab.token(&Self::name(service), |_| ()).await;
        let mut host = Host::new();
        host.addresses = vec![address.to_string()];
        host.enrol(lab, &token).await.unwrap();
        assert!(host.warnings.is_empty(), "{:?}", host.warnings);
        let mut device = Self {
            host,
            service,
            up: None,
        };
        device.start(lab).await;
        device
    }

    /// Its HBONE port and its control stream.
    async fn start(&mut self, lab: &Lab) {
        let tasks = TaskGroup::new("device");
        let address: IpAddr = self.host.addresses[0].parse().unwrap();
        let listener = TcpListener::bind((address, 15008)).await.unwrap();
        tasks.spawn_until_stopped("hbone", async move { while listener.accept().await.is_ok() {} });
        let mut ads = self.host.ads(lab).await;
        // It wants to be told of one name, which is nobody's; and it is healthy.
        for (type_url, names) in [
            (type_url::ADDRESS, vec!["none".to_owned()]),
            (type_url::HEALTH, Vec::new()),
        ] {
            ads.send(DeltaDiscoveryRequest {
                type_url: type_url.into(),
                resource_names_subscribe: names,
                ..Default::default()
            })
            .await;
        }
        tasks.spawn_until_stopped("control stream", async move {
            let _ads = ads;
            std::future::pending::<()>().await;
        });
        self.up = Some(tasks);
    }

    /// Without a word.
    fn die(&mut self) {
        if let Some(tasks) = self.up.take() {
            tasks.stop();
        }
    }

    async fn leave(&mut self, lab: &Lab) {
        let (channel, exporter) = lab.dial(None).await;
        let device = self.host.registration.device_id.parse().unwrap();
        let request = pb::LeaveRequest {
            device_id: self.host.registration.device_id.clone(),
            device_signature: self.host.key.sign(&proof::leave(&exporter, device)),
            ..Default::default()
        };
        EnrollmentClient::new(channel).leave(request).await.unwrap();
        self.die();
    }
}

/// How many endpoints of each service another cluster would send calls to.
fn seen(lab: &Lab) -> BTreeMap<String, u32> {
    let names = (0..SERVICES).map(Device::name);
    let healthy = |name: &String| {
        let workloads = imported(lab, name);
        let healthy = workloads.iter().filter(|w| w.status() == WorkloadStatus::Healthy);
        healthy.map(|w| w.capacity.unwrap_or(1)).sum()
    };
    names.map(|name| (name.clone(), healthy(&name))).collect()
}

fn wanted(devices: &[Device]) -> BTreeMap<String, u32> {
    let mut counts: BTreeMap<String, u32> = (0..SERVICES).map(|n| (Device::name(n), 0)).collect();
    for device in devices.iter().filter(|device| device.up.is_some()) {
        *counts.get_mut(&Device::name(device.service)).unwrap() += 1;
    }
    counts
}

/// What one happening is.
enum Turn {
    Register(usize, Ipv4Addr),
    Leave(usize),
    Die(usize),
    Revive(usize),
}

#[derive(Default, Debug)]
struct Turns {
    registered: usize,
    left: usize,
    died: usize,
    revived: usize,
}

#[test]
fn endpoints_come_and_go_and_no_cluster_is_behind() {
    in_a_network_of_its_own(churn);
}

async fn churn() {
    let cycles = usize::try_from(number("CHURN_CYCLES").unwrap_or(100)).unwrap();
    let seed = number("SEED").unwrap_or_else(rand::random);
    println!("{cycles} cycles, SEED={seed}");
    let mut dice = Dice(seed);
    let west = cluster_with("west", |config| config.start_grace = Life(Duration::ZERO)).await;
    let (east, south) = (cluster("east").await, cluster("south").await);
    for service in 0..SERVICES {
        let name = Device::name(service);
        west.apply(&[group(&name), exported(&name)]).await.unwrap();
    }
    admit(&west, &east, "east").await;
    admit(&west, &south, "south").await;
    let mut next_address = u32::from(Ipv4Addr::new(10, 9, 0, 1));
    let mut devices: Vec<Device> = Vec::new();
    let mut deaths: VecDeque<Instant> = VecDeque::new();
    let (mut done, mut turns, mut waits) = (0, Turns::default(), Vec::new());
    while done < cycles {
        // What happens to whom: each device at most once at a time.
        let mut batch = Vec::new();
        let mut touched = std::collections::BTreeSet::new();
        while deaths
            .front()
            .is_some_and(|at| at.elapsed() > Duration::from_secs(11))
        {
            deaths.pop_front();
        }
        while batch.len() < BATCH.min(cycles - done) {
            let at = dice.below(devices.len().max(1));
            let few = devices.len() < POPULATION / 2;
            if devices.is_empty() || few || (devices.len() < POPULATION && dice.below(100) < 40) {
                let address = Ipv4Addr::from(next_address);
                next_address += 1;
                batch.push(Turn::Register(dice.below(SERVICES), address));
            } else if touched.insert(at) {
                let may_die = (deaths.len() + 1) * 100 <= devices.len() * DEATHS_PERCENT_MAX;
                batch.push(match (devices[at].up.is_some(), dice.below(100)) {
                    (false, 0..70) => Turn::Revive(at),
                    (true, 0..40) if may_die => {
                        deaths.push_back(Instant::now());
                        Turn::Die(at)
                    }
                    _ => Turn::Leave(at),
                });
            } else if touched.len() == devices.len() {
                break;
            }
        }
        done += batch.len();
        let mut by_index: BTreeMap<usize, &Turn> = BTreeMap::new();
        let mut new = Vec::new();
        for turn in &batch {
            match turn {
                Turn::Register(service, address) => new.push(Device::register(&west, *service, *address)),
                Turn::Leave(at) | Turn::Die(at) | Turn::Revive(at) => drop(by_index.insert(*at, turn)),
            }
        }
        let changing = devices.iter_mut().enumerate().filter_map(|(at, device)| {
            let turn = by_index.get(&at)?;
            let west = &west;
            Some(async move {
                match turn {
                    Turn::Die(_) => device.die(),
                    Turn::Revive(_) => device.start(west).await,
                    Turn::Leave(_) | Turn::Register(..) => device.leave(west).await,
                }
            })
        });
        let begun = Instant::now();
        let (new, _) = tokio::join!(join_all(new), join_all(changing));
        turns.registered += new.len();
        for turn in &batch {
            match turn {
                Turn::Register(..) => {}
                Turn::Leave(_) => turns.left += 1,
                Turn::Die(_) => turns.died += 1,
                Turn::Revive(_) => turns.revived += 1,
            }
        }
        let mut at = 0;
        devices.retain(|_| {
            at += 1;
            !matches!(by_index.get(&(at - 1)), Some(Turn::Leave(_)))
        });
        devices.extend(new);
        // Nothing stale, nothing missing, in either of the others.
        let truth = wanted(&devices);
        let acted = begun.elapsed();
        for lab in [&east, &south] {
            while seen(lab) != truth {
                assert!(
                    begun.elapsed() < acted + SEEN_MAX,
                    "SEED={seed}, after {done} cycles ({turns:?}): {:?} is seen, {truth:?} is true; {:#?}",
                    seen(lab),
                    west.vms()
                        .await
                        .iter()
                        .map(|vm| (&vm.addresses, &vm.state, &vm.reason))
                        .collect::<Vec<_>>()
                );
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        waits.push(begun.elapsed().saturating_sub(acted));
        // The witness is to have reached those that came before one of them dies.
        let memory = west.config.state_dir.join("members.json");
        west.wait_for("the witness to have reached all", async || {
            let text = std::fs::read_to_string(&memory).unwrap_or_default();
            text.matches(r#""reached":true"#).count() >= devices.len()
        })
        .await;
    }
    // Nothing comes back later.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let truth = wanted(&devices);
    assert_eq!((seen(&east), seen(&south)), (truth.clone(), truth), "SEED={seed}");
    waits.sort();
    let percent = |p: usize| waits[(waits.len() - 1) * p / 100];
    println!(
        "{done} cycles ({turns:?}) in {} clusters: 0 stale, 0 missing; seen p50 {:?}, p99 {:?}",
        3,
        percent(50),
        percent(99)
    );
    assert!(turns.died > 0 && turns.left > 0 && turns.revived > 0, "{turns:?}");
    for device in &mut devices {
        device.die();
    }
}
