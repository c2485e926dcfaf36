//! Whether programs of this host find names of the mesh: the resolver is told by netd, and then one is looked up as
//! any program would.

use crate::{
    agent::{Agent, Options, netd_problem},
    ordinary,
};
use std::{net::IpAddr, path::PathBuf, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};
use tombolo_capture::netd::{ALIVE_EVERY, DnsSettings, Families, HostNames, NetdClient};
use tombolo_control_client::Problem;
use tombolo_runtime::{Reader, TaskGroup};
use tombolo_snapshot::Snapshot;
use tombolo_types::{AddressPlan, Code};

/// So long the agent says that it is starting, while it is not known whether names are found.
const VERDICT_WITHIN: Duration = Duration::from_secs(1);
/// A lookup that takes longer than this finds nothing.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often is looked again where names are found, and where they are not: an administrator adds a line, a resolver
/// is replaced.
const FOUND_POLL: Duration = Duration::from_secs(60);
const NOT_FOUND_POLL: Duration = Duration::from_secs(5);
/// How often is looked for a name to look up, in a mesh without services.
const NAME_POLL: Duration = Duration::from_millis(50);
/// So long lookups are tried after a change of the host's resolver, before it is called one that does not work.
/// netd takes it back by itself after fifteen seconds.
const TRIAL: Duration = Duration::from_secs(10);
const TRIAL_POLL: Duration = Duration::from_millis(100);
/// netd that was started again is there within a second.
const NETD_AGAIN: Duration = Duration::from_millis(500);

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What programs of this host get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Not looked yet.
    Unknown,
    /// The mesh's addresses; or it cannot be told, in a mesh without services.
    Found,
    /// No addresses of the mesh.
    NotFound(Problem),
}

/// Has the resolver told about this mesh0 and keeps the verdict, until the group stops.
pub(crate) fn follow(
    agent: &Agent,
    options: &Options,
    plan: AddressPlan,
    families: Families,
    group: &TaskGroup,
) {
    let Some(enrolled) = agent.enrolled.get() else {
        return;
    };
    let registration = enrolled.control.registration();
    let offered = [
        (families.ipv4, IpAddr::from(plan.dns_v4())),
        (families.ipv6, plan.dns_v6().into()),
    ];
    let names = Names {
        world: enrolled.world.clone(),
        plan,
        netd: options.netd_socket.clone(),
        resolv_conf: RESOLV_CONF.into(),
        needed: names_of(&registration.endpoints),
        settings: DnsSettings {
            domain: registration.mesh_domain.clone(),
            servers: offered
                .into_iter()
                .filter(|(on, _)| *on)
                .map(|(_, ip)| ip)
                .collect(),
        },
        own: registration.hostnames.clone(),
    };
    agent.names.send_replace(Verdict::Unknown);
    group.spawn_until_stopped("names", names.run(agent.names.clone(), agent.host_names.clone()));
    let beat = beat(options.netd_socket.clone(), agent.host_names.subscribe());
    group.spawn_until_stopped("names heartbeat", beat);
}

/// Says that this agent answers, where all names of the host pass through it: netd has them go past a silent one.
async fn beat(netd: PathBuf, mut said: watch::Receiver<HostNames>) {
    loop {
        if said.wait_for(|names| names.alive).await.is_err() {
            return;
        }
        if let Ok(netd) = NetdClient::connect(&netd).await {
            while said.borrow().alive && netd.alive().await.is_ok() {
                sleep(ALIVE_EVERY).await;
            }
        }
        sleep(NETD_AGAIN).await;
    }
}

struct Names {
    world: Reader<Snapshot>,
    plan: AddressPlan,
    netd: PathBuf,
    resolv_conf: PathBuf,
    /// Ordinary names that this host cannot do without: discovery's.
    needed: Vec<String>,
    settings: DnsSettings,
    /// Names of this host's own services.
    own: Vec<String>,
}

impl Names {
    async fn run(self, verdict: watch::Sender<Verdict>, said: watch::Sender<HostNames>) {
        let deadline = Instant::now() + VERDICT_WITHIN;
        let mut told = self.tell(&said).await;
        let first = async {
            while self.example().is_none() {
                sleep(NAME_POLL).await;
            }
            self.judge(&told).await
        };
        let first = timeout_at(deadline, first).await;
        // Without a name to look up, or while a lookup takes long, the verdict comes later.
        let mut settled = first.is_ok();
        let mut now = first.unwrap_or(Verdict::Found);
        loop {
            let found = settled && now == Verdict::Found && self.example().is_some();
            let wait = if found { FOUND_POLL } else { NOT_FOUND_POLL };
            if *verdict.borrow() != now {
                if let Verdict::NotFound(problem) = &now {
                    tracing::warn!("{problem}");
                }
                verdict.send_replace(now);
            }
            if rest(wait, told.as_ref().ok().map(|(netd, _)| netd)).await {
                // It may have been told something else by the host's owner, and knows nothing of us.
                sleep(NETD_AGAIN).await;
                told = self.tell(&said).await;
            }
            settled = true;
            now = if self.found().await != Some(false) {
                Verdict::Found
            } else {
                // Whatever looked up names before, it does not any more.
                told = self.tell(&said).await;
                self.judge(&told).await
            };
        }
    }

    /// Has netd tell the resolver, and tries what it changed.
    async fn tell(&self, said: &watch::Sender<HostNames>) -> Result<(NetdClient, HostNames), Problem> {
        let told = self.told().await;
        let names = told
            .as_ref()
            .map_or_else(|_| HostNames::default(), |(_, names)| names.clone());
        said.send_if_modified(|before| {
            let new = *before != names;
            *before = names;
            new
        });
        told
    }

    async fn told(&self) -> Result<(NetdClient, HostNames), Problem> {
        let before = ordinary::answers(&self.resolv_conf, &self.needed).await;
        let netd = NetdClient::connect(&self.netd).await.map_err(netd_problem)?;
        let names = netd.set_dns(self.settings.clone()).await.map_err(netd_problem)?;
        if !names.confirm {
            return Ok((netd, names));
        }
        let problem = self.trial(&before).await;
        let names = netd.confirm_dns(problem).await.map_err(netd_problem)?;
        Ok((netd, names))
    }

    /// Whether a changed resolver finds a name of the mesh, and says of ordinary names what it said before; what it
    /// does not, otherwise.
    async fn trial(&self, before: &ordinary::Answers) -> Option<String> {
        let deadline = Instant::now() + TRIAL;
        let domain = &self.settings.domain;
        let mut problem = "lookups take too long".to_owned();
        let tried = timeout_at(deadline, async {
            loop {
                let mesh = match self.found().await {
                    Some(found) => found,
                    None => ordinary::is_answered(&self.resolv_conf, domain).await,
                };
                if !mesh {
                    problem = format!("names of {domain} were not found");
                } else if !before.hold(&ordinary::answers(&self.resolv_conf, &self.needed).await) {
                    problem = "ordinary names were not answered as before".to_owned();
                } else {
                    return;
                }
                sleep(TRIAL_POLL).await;
            }
        });
        tried.await.is_err().then_some(problem)
    }

    /// That it was told is not that it does it: a lookup says.
    async fn judge(&self, told: &Result<(NetdClient, HostNames), Problem>) -> Verdict {
        if self.found().await != Some(false) {
            return Verdict::Found;
        }
        Verdict::NotFound(match told {
            Ok((_, names)) => Problem::new(Code::NamesNotAsked, cause(names, &self.settings.domain)),
            Err(problem) => problem.clone(),
        })
    }

    /// Looks up a name of the mesh; `None` if there is none.
    async fn found(&self) -> Option<bool> {
        let name = self.example()?;
        let lookup = timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((name, 0)));
        let found = lookup.await.is_ok_and(|addresses| {
            addresses.is_ok_and(|mut addresses| addresses.any(|found| self.plan.contains(found.ip())))
        });
        Some(found)
    }

    /// A name that must be found: one of this host's own, else any.
    fn example(&self) -> Option<String> {
        let world = self.world.load();
        let usable = |host: &str| {
            let below = host
                .strip_suffix(&self.settings.domain)
                .is_some_and(|rest| rest.ends_with('.'));
            below && !host.starts_with('*') && world.service_by_host(host, "").is_some()
        };
        self.own.iter().find(|host| usable(host)).cloned().or_else(|| {
            let mut hosts = world.services().map(|service| service.hostname.to_string());
            hosts.find(|host| usable(host))
        })
    }
}

/// The hosts of endpoints that are names.
fn names_of(endpoints: &[String]) -> Vec<String> {
    let hosts = endpoints
        .iter()
        .filter_map(|endpoint| endpoint.rsplit_once(':').map(|(host, _)| host));
    hosts
        .filter(|host| host.contains('.') && !host.starts_with('[') && host.parse::<IpAddr>().is_err())
        .map(str::to_owned)
        .collect()
}

/// Waits; true if netd has gone meanwhile.
async fn rest(wait: Duration, netd: Option<&NetdClient>) -> bool {
    match netd {
        Some(netd) => timeout(wait, netd.closed()).await.is_ok(),
        None => {
            sleep(wait).await;
            false
        }
    }
}

/// What is the matter, and the line that mends it.
fn cause(names: &HostNames, domain: &str) -> String {
    let HostNames {
        resolver,
        asks,
        advice,
        ..
    } = names;
    if *asks {
        format!(
            "{resolver} was told to ask the mesh for {domain}, and does not: getent hosts NAME, on this host"
        )
    } else {
        format!("names are looked up by {resolver}, which does not ask the mesh for {domain}; {advice}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_are_asked_for() {
        let endpoints = [
            "10.0.0.1:15012",
            "[2001:db8::1]:15012",
            "discovery.corp.example:15012",
        ]
        .map(str::to_owned);
        assert_eq!(names_of(&endpoints), ["discovery.corp.example"]);
    }

    #[test]
    fn the_cause_has_the_line() {
        let names = |asks| HostNames {
            resolver: "dnsmasq".into(),
            asks,
            advice: "add: server=/mesh.internal/240.240.255.254".into(),
            ..HostNames::default()
        };
        let text = cause(&names(false), "mesh.internal");
        assert!(
            text.contains("by dnsmasq") && text.ends_with("server=/mesh.internal/240.240.255.254"),
            "{text}"
        );
        assert!(cause(&names(true), "mesh.internal").contains("getent"));
    }
}
