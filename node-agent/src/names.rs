//! Whether programs of this host find names of the mesh: the resolver is told by netd, and then one is looked up as
//! any program would.

use crate::agent::{Agent, Options, netd_problem};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};
use tombolo_capture::netd::{DnsSettings, Families, HostNames, NetdClient};
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
    group.spawn_until_stopped("names", names.run(agent.names.clone()));
}

struct Names {
    world: Reader<Snapshot>,
    plan: AddressPlan,
    netd: PathBuf,
    settings: DnsSettings,
    /// Names of this host's own services.
    own: Vec<String>,
}

impl Names {
    async fn run(self, verdict: watch::Sender<Verdict>) {
        let deadline = Instant::now() + VERDICT_WITHIN;
        let first = async {
            let told = self.tell().await;
            while self.example().is_none() {
                sleep(NAME_POLL).await;
            }
            self.judge(told).await
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
            sleep(wait).await;
            settled = true;
            now = if self.found().await != Some(false) {
                Verdict::Found
            } else {
                // Whatever looked up names before, it does not any more.
                self.judge(self.tell().await).await
            };
        }
    }

    async fn tell(&self) -> Result<HostNames, Problem> {
        tell(&self.netd, &self.settings).await
    }

    /// That it was told is not that it does it: a lookup says.
    async fn judge(&self, told: Result<HostNames, Problem>) -> Verdict {
        if self.found().await != Some(false) {
            return Verdict::Found;
        }
        Verdict::NotFound(match told {
            Ok(names) => Problem::new(Code::NamesNotAsked, cause(&names, &self.settings.domain)),
            Err(problem) => problem,
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

async fn tell(netd: &Path, settings: &DnsSettings) -> Result<HostNames, Problem> {
    let netd = NetdClient::connect(netd).await.map_err(netd_problem)?;
    netd.set_dns(settings.clone()).await.map_err(netd_problem)
}

/// What is the matter, and the line that mends it.
fn cause(names: &HostNames, domain: &str) -> String {
    let HostNames {
        resolver,
        asks,
        advice,
    } = names;
    if *asks {
        format!("{resolver} was told to ask the mesh for {domain}, and does not: resolvectl query {domain}")
    } else {
        format!("names are looked up by {resolver}, which does not ask the mesh for {domain}; {advice}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_has_the_line() {
        let names = |asks| HostNames {
            resolver: "dnsmasq".into(),
            asks,
            advice: "add: server=/mesh.internal/240.240.255.254".into(),
        };
        let text = cause(&names(false), "mesh.internal");
        assert!(
            text.contains("by dnsmasq") && text.ends_with("server=/mesh.internal/240.240.255.254"),
            "{text}"
        );
        assert!(cause(&names(true), "mesh.internal").contains("resolvectl"));
    }
}
