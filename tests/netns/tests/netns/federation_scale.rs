//! Many clusters: joined by a command each, parted, healed, one of them killed; and credentials that are renewed.
//!
//! Discoveries alone, each on a host of its own: what others see of them is read from the world that they serve.
//! `FEDERATION_CLUSTERS` says how many, `FEDERATION_CHANGES` how many changes are timed.

use crate::{PATIENCE, needs_root};
use anyhow::{Context as _, Result, ensure};
use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};
use tombolo_testkit::{Clock, Host, Lab, Process, wait_for};

/// Between two looks at a world.
const LOOK: Duration = Duration::from_millis(10);
/// A partition is noticed after 10 s; a dial that failed is repeated after 15 s at most, and watched for 2 s.
const PARTITION_PATIENCE: Duration = Duration::from_secs(40);
/// Calls a service what it is in the world of another cluster.
const IMPORTED: &str = "/SplitHorizonWorkload/";

fn number(name: &str, default: usize) -> usize {
    let said = std::env::var(name).ok();
    said.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs something on a thread in the network of a host, where its loopback is.
fn inside<T: Send>(host: &Host, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = format!("/run/netns/{}", host.namespace());
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let namespace = std::fs::File::open(&path).with_context(|| path.clone())?;
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
    })
}

/// The world that the discovery of this network serves: name and version of each resource.
fn world() -> Result<String> {
    let mut socket = TcpStream::connect("127.0.0.1:15014")?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.write_all(b"GET /debug/world HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The version of the endpoints of a cluster's service in a world.
fn version_of(world: &str, cluster: &str) -> Option<String> {
    let from = world.find(&format!("{IMPORTED}{cluster}/shop/{cluster}."))?;
    let rest = &world[from..];
    let mut words = rest.split('"').skip(2);
    words.next().map(str::to_owned)
}

/// A cluster that is a discovery and nothing else.
struct Site {
    discovery: Process,
    host: Host,
    name: String,
}

impl Site {
    fn start(host: Host, name: &str, clock: Option<&Arc<Clock>>) -> Result<Self> {
        if let Some(clock) = clock {
            host.follow(clock);
        }
        let (td, at) = (format!("{name}.example"), host.at(15012));
        let init = ["init", "--trust-domain", &td, "--advertise", &at];
        host.run("tombolo-discovery", &init)?.checked()?;
        let discovery = host.spawn("tombolo-discovery", &["run"])?;
        let site = Self {
            discovery,
            host,
            name: name.to_owned(),
        };
        site.ready()?;
        site.host.write(
            "/run/service.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
                 metadata: {{name: {name}, namespace: shop, labels: {{istio.io/global: 'true'}}}}\nspec:\n  \
                 hosts: [{name}.shop.svc.mesh.internal]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
                 ports: [{{number: 80, name: http, protocol: HTTP}}]\n  workloadSelector: {{labels: {{app: {name}}}}}\n"
            ),
        )?;
        site.tombolo("apply -f /run/service.yaml")?;
        site.change(1)?;
        Ok(site)
    }

    fn ready(&self) -> Result<()> {
        wait_for("discovery to be ready", PATIENCE, || {
            self.host
                .sh("curl -sf -m 2 http://127.0.0.1:15021/healthz/ready")?
                .checked()
        })
        .with_context(|| self.discovery.log())
        .map(drop)
    }

    fn tombolo(&self, line: &str) -> Result<String> {
        let args: Vec<&str> = line.split_whitespace().collect();
        let output = self.host.run("tombolo", &args)?.checked();
        Ok(output
            .with_context(|| format!("{}: tombolo {line}", self.name))?
            .stdout)
    }

    /// Its one endpoint has another weight.
    fn change(&self, weight: usize) -> Result<()> {
        let name = &self.name;
        self.host.write(
            "/run/entry.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}-1, namespace: shop}}\n\
                 spec: {{address: 10.9.9.9, weight: {weight}, serviceAccount: {name}, \
                 labels: {{app: {name}, networking.istio.io/tunnel: http}}}}\n"
            ),
        )?;
        self.tombolo("apply -f /run/entry.yaml").map(drop)
    }

    /// Name and state of every cluster that it knows.
    fn states(&self) -> Result<Vec<(String, String)>> {
        let listed: serde_json::Value =
            serde_json::from_str(&self.tombolo("cluster list --removed -o json")?)?;
        let all = listed["clusters"].as_array().context("no list")?;
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        Ok(all
            .iter()
            .map(|cluster| (text(&cluster["name"]), text(&cluster["state"])))
            .collect())
    }

    /// It sees each of `wanted` in the given state, itself excepted, and nobody twice.
    fn sees(&self, wanted: &[(&str, &str)]) -> Result<()> {
        let states = self.states()?;
        ensure!(states.len() == wanted.len(), "{}: {states:?}", self.name);
        for (name, state) in wanted {
            let state = if *name == self.name { "Own" } else { *state };
            ensure!(
                states.iter().any(|(n, s)| n == name && s == state),
                "{}: {name} is not {state}: {states:?}",
                self.name
            );
        }
        Ok(())
    }

    fn version_here(&self, cluster: &str) -> Result<String> {
        inside(&self.host, || {
            version_of(&world()?, cluster).context("not imported")
        })
    }

    fn audit(&self) -> Result<String> {
        Ok(self
            .host
            .sh("cat /var/lib/tombolo/discovery/audit.log")?
            .checked()?
            .stdout)
    }
}

/// A change at one site, and how long until the last of the others served it.
fn timed_change(sites: &[Site], at: usize, weight: usize) -> Result<Duration> {
    let cluster = &sites[at].name;
    std::thread::scope(|scope| {
        let watchers: Vec<_> = sites
            .iter()
            .enumerate()
            .filter(|(index, _)| *index != at)
            .map(|(_, site)| {
                let before = site.version_here(cluster)?;
                let watch = move || {
                    inside(&site.host, || {
                        let end = Instant::now() + PATIENCE;
                        while version_of(&world()?, cluster).as_ref() == Some(&before) {
                            ensure!(Instant::now() < end, "{} never sees {cluster}", site.name);
                            std::thread::sleep(LOOK);
                        }
                        Ok(Instant::now())
                    })
                };
                Ok(scope.spawn(watch))
            })
            .collect::<Result<_>>()?;
        let begun = Instant::now();
        sites[at].change(weight)?;
        let mut last = begun;
        for watcher in watchers {
            let seen = watcher
                .join()
                .map_err(|_| anyhow::anyhow!("a watcher panicked"))??;
            last = last.max(seen);
        }
        Ok(last - begun)
    })
}

fn sites(lab: &mut Lab, count: usize, clock: Option<&Arc<Clock>>) -> Result<Vec<Site>> {
    let hosts: Vec<(String, Host)> = (0..count)
        .map(|n| {
            let name = format!("c{n}");
            Ok((name.clone(), lab.host(&name)?))
        })
        .collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        let starting: Vec<_> = hosts
            .into_iter()
            .map(|(name, host)| scope.spawn(move || Site::start(host, &name, clock)))
            .collect();
        let ready = starting.into_iter().map(|thread| {
            let started = thread.join();
            started.map_err(|_| anyhow::anyhow!("a thread panicked"))?
        });
        ready.collect()
    })
}

/// Each by one command on each side.
fn join_all(sites: &[Site]) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    for site in &sites[1..] {
        let name = &site.name;
        let invite = format!("cluster invite {name} --trust-domain {name}.example --namespaces shop");
        let token = sites[0].tombolo(&invite)?;
        let begun = Instant::now();
        let told = site.tombolo(&format!("cluster join {} --yes", token.trim()))?;
        ensure!(told.contains("Joined"), "{told}");
        longest = longest.max(begun.elapsed());
    }
    Ok(longest)
}

fn all_see(sites: &[Site], wanted: &[(&str, &str)], patience: Duration) -> Result<()> {
    for site in sites {
        wait_for(&format!("{} to see all", site.name), patience, || {
            site.sees(wanted)
        })?;
    }
    Ok(())
}

#[test]
fn ten_clusters_join_are_parted_and_heal() -> Result<()> {
    needs_root!();
    let mut lab = Lab::new("clusters")?;
    let count = number("FEDERATION_CLUSTERS", 10).clamp(4, 60);
    let mut sites = sites(&mut lab, count, None)?;
    let begun = Instant::now();
    let longest = join_all(&sites)?;
    let names: Vec<String> = sites.iter().map(|site| site.name.clone()).collect();
    let connected: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "Connected")).collect();
    all_see(&sites, &connected, PATIENCE)?;
    println!(
        "{count} clusters: every session is up {:?} after the first command, the longest join took {longest:?}",
        begun.elapsed()
    );
    for site in &sites {
        for name in names.iter().filter(|name| **name != site.name) {
            wait_for(&format!("{} to import {name}", site.name), PATIENCE, || {
                site.version_here(name)
            })?;
        }
    }

    // From the start of `tombolo apply` until the last of the others serves the change to its agents.
    let mut waits = (0..number("FEDERATION_CHANGES", 30))
        .map(|change| timed_change(&sites, change % count, 2 + change))
        .collect::<Result<Vec<_>>>()?;
    waits.sort();
    let percent = |p: usize| waits[(waits.len() - 1) * p / 100];
    println!(
        "{} changes seen by all: p50 {:?}, p99 {:?}, worst {:?}",
        waits.len(),
        percent(50),
        percent(99),
        percent(100)
    );
    ensure!(percent(99) <= Duration::from_secs(1), "{waits:?}");

    // Parted in the middle. The first half has the founder, the last of the second one is killed and comes back.
    let half = count / 2;
    let list = |sites: &[Site]| {
        let addresses: Vec<String> = sites.iter().map(|site| site.host.ipv4().to_string()).collect();
        addresses.join(", ")
    };
    let (a, b) = (list(&sites[..half]), list(&sites[half..]));
    let rules = format!(
        "table ip parted {{ chain forward {{ type filter hook forward priority 0; \
         ip saddr {{ {a} }} ip daddr {{ {b} }} drop; ip saddr {{ {b} }} ip daddr {{ {a} }} drop; }}; }}"
    );
    lab.on_router(&["nft", &rules])?;
    let parted = Instant::now();
    let last = sites.last_mut().context("sites")?;
    last.discovery.kill();
    last.discovery = last.host.spawn("tombolo-discovery", &["run"])?;
    last.ready()?;
    for (side, other) in [(&sites[..half], &sites[half..]), (&sites[half..], &sites[..half])] {
        let of = |sites: &[Site], state: &'static str| -> Vec<(String, &str)> {
            sites.iter().map(|site| (site.name.clone(), state)).collect()
        };
        let wanted = [of(side, "Connected"), of(other, "Stale")].concat();
        let wanted: Vec<(&str, &str)> = wanted
            .iter()
            .map(|(name, state)| (name.as_str(), *state))
            .collect();
        all_see(side, &wanted, PARTITION_PATIENCE)?;
        // Each side goes on with what it has, and with itself.
        for site in side {
            for other in other {
                site.version_here(&other.name)?;
            }
        }
        let took = timed_change(side, 0, 100)?;
        ensure!(took <= Duration::from_secs(1), "on one side: {took:?}");
    }
    println!("both sides know it {:?} after the partition", parted.elapsed());
    let stale_lines = |site: &Site| -> Result<usize> { Ok(site.audit()?.matches("TMB0724").count()) };
    let before = sites.iter().map(stale_lines).collect::<Result<Vec<_>>>()?;
    lab.on_router(&["nft", "delete", "table", "ip", "parted"])?;
    let healed = Instant::now();
    all_see(&sites, &connected, PARTITION_PATIENCE)?;
    println!(
        "all sessions are up {:?} after the partition ended",
        healed.elapsed()
    );
    // What happened meanwhile on the other side is known, and stays so: no flapping, nobody twice.
    let quiet = Instant::now() + Duration::from_secs(3);
    while Instant::now() < quiet {
        all_see(&sites, &connected, Duration::ZERO)?;
    }
    let worlds = |cluster: &str| -> Result<Vec<String>> {
        let others = sites.iter().filter(|site| site.name != cluster);
        others.map(|site| site.version_here(cluster)).collect()
    };
    for name in [&names[0], &names[half]] {
        let versions = worlds(name)?;
        ensure!(
            versions.windows(2).all(|pair| pair[0] == pair[1]),
            "{name}: {versions:?}"
        );
    }
    let after = sites.iter().map(stale_lines).collect::<Result<Vec<_>>>()?;
    ensure!(before == after, "stale again: {before:?} {after:?}");
    let took = timed_change(&sites, count - 1, 200)?;
    ensure!(took <= Duration::from_secs(1), "after it healed: {took:?}");
    Ok(())
}

#[test]
fn certificates_of_members_are_renewed_under_their_sessions() -> Result<()> {
    needs_root!();
    if !Clock::require("netns") {
        return Ok(());
    }
    let mut lab = Lab::new("renewed")?;
    let clock = Arc::new(Clock::new(lab.dir(), "clusters")?);
    let sites = sites(&mut lab, 3, Some(&clock))?;
    join_all(&sites)?;
    let connected = [("c0", "Connected"), ("c1", "Connected"), ("c2", "Connected")];
    all_see(&sites, &connected, PATIENCE)?;
    let sessions = |site: &Site| -> Result<String> {
        let line =
            "ss -Htn state established '( sport = :15012 or dport = :15012 )' | awk '{print $3, $4}' | sort";
        Ok(site.host.sh(line)?.checked()?.stdout)
    };
    let renewals = |site: &Site| site.discovery.log().matches("own certificate renewed").count();
    let (mut weight, mut worst) = (10, Duration::ZERO);
    // Half a life, and again: the certificates that the sessions began with have expired by then.
    for step in 1..=2 {
        let before = sites.iter().map(sessions).collect::<Result<Vec<_>>>()?;
        clock.advance(Duration::from_secs(13 * 3600))?;
        let end = Instant::now() + PATIENCE;
        loop {
            weight += 1;
            worst = worst.max(timed_change(&sites, weight % 3, weight)?);
            all_see(&sites, &connected, Duration::ZERO)?;
            let now = sites.iter().map(sessions).collect::<Result<Vec<_>>>()?;
            let moved = before.iter().zip(&now).all(|(before, now)| {
                // Each session that there is began after the step.
                !now.is_empty() && !now.lines().any(|line| before.contains(line))
            });
            if moved && sites.iter().all(|site| renewals(site) >= step) {
                break;
            }
            ensure!(Instant::now() < end, "step {step}: {before:?} {now:?}");
        }
    }
    println!(
        "{} changes while the certificates of three members were renewed twice: worst {worst:?}",
        weight - 10
    );
    ensure!(worst <= Duration::from_secs(1), "{worst:?}");
    for site in &sites {
        let audit = site.audit()?;
        ensure!(!audit.contains("TMB072"), "{}: {audit}", site.name);
    }
    Ok(())
}
