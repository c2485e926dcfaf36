//! Which declared ports plaintext must not reach, and that netd closes them.
//!
//! What policies say of a caller without an identity holds for a mesh caller anyway: the inbound proxy asks. A caller
//! that dials the application's port directly never meets the proxy; for that one, netd's guard is the policy.

use crate::agent::{Agent, Enrolled, Options, netd_problem};
use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tombolo_authz::{Connection, Policy, Verdict, decide};
use tombolo_capture::netd::{GuardRules, GuardedPort, NetdClient};
use tombolo_control_client::Problem;
use tombolo_runtime::TaskGroup;
use tombolo_snapshot::Snapshot;
use tombolo_types::Code;

/// How often netd is asked again for what it has set: a firewall that is loaded again takes the guard away.
const AGAIN_EVERY: Duration = Duration::from_secs(15);
/// How often it is tried where it is not in force.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// The same while netd has not answered yet: after a boot both come up at once, and the guard is to be there first.
const RETRY_AT_START_EVERY: Duration = Duration::from_millis(50);
/// So long the agent says that it is starting while the guard of the snapshot is not in force yet.
const FIRST_WITHIN: Duration = Duration::from_secs(2);

/// How a declared port stands to callers that dial it directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stance {
    /// Closed to all of them.
    Guarded,
    /// Closed to all but those whose address a policy admits.
    Partly,
    /// Not closed, as policies say.
    Open,
    /// Policies close it, and it is open all the same.
    Unguarded,
}

impl Stance {
    /// As the admin API says it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Guarded => "guarded",
            Self::Partly => "partly",
            Self::Open => "open",
            Self::Unguarded => "unguarded",
        }
    }
}

/// A declared port and its stance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeclaredPort {
    /// 0 stands for all ports that are not named.
    pub(crate) port: u16,
    pub(crate) stance: Stance,
    /// Why, in a few words.
    pub(crate) why: String,
}

/// What `tombolo status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Report {
    /// False until the guard was decided upon and set once, or could not be.
    pub(crate) known: bool,
    pub(crate) ports: Vec<DeclaredPort>,
    /// Why the guard is not in force.
    pub(crate) problem: Option<Problem>,
}

/// What policies say of plaintext.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Decided {
    rules: GuardRules,
    ports: Vec<DeclaredPort>,
}

/// Keeps the guard as the policies of the own workload say, until the group stops; what is set stays then.
pub(crate) fn follow(agent: &Arc<Agent>, options: &Options, tasks: &TaskGroup) {
    let (agent, netd, wanted) = (
        Arc::clone(agent),
        options.netd_socket.clone(),
        options.settings.guard,
    );
    tasks.spawn_until_stopped("guard", async move {
        let Some(enrolled) = agent.enrolled.get() else {
            return;
        };
        run(enrolled, &agent.guard, &netd, wanted).await;
    });
}

/// Waits until the guard that the snapshot asks for is in force or cannot be; not long.
pub(crate) async fn known(agent: &Agent) {
    let mut report = agent.guard.subscribe();
    let _ = timeout(FIRST_WITHIN, report.wait_for(|report| report.known)).await;
}

async fn run(enrolled: &Enrolled, report: &watch::Sender<Report>, netd: &Path, wanted: bool) {
    let mut world = enrolled.world.clone();
    // In force, as far as this process knows: another process may have set others before.
    let mut in_force: Option<GuardRules> = None;
    let mut tried: Option<GuardRules> = None;
    let mut outcome = Ok(());
    let mut due = None;
    // netd has said something of the guard.
    let mut answered = false;
    loop {
        match decided(&world.load(), wanted, in_force.as_ref()) {
            // Nothing was received yet: whatever was set by an earlier agent stays.
            None => {
                report.send_if_modified(|report| !std::mem::replace(&mut report.known, true));
            }
            Some(Decided { rules, ports }) => {
                if tried.as_ref() != Some(&rules) || due.is_some_and(|due| due <= Instant::now()) {
                    outcome = tell(netd, &rules).await;
                    let silent = matches!(&outcome, Err(problem) if problem.code == Code::NetdUnreachable);
                    answered |= !silent;
                    let wait = match &outcome {
                        Err(_) if !answered => Some(RETRY_AT_START_EVERY),
                        Err(_) => Some(RETRY_EVERY),
                        Ok(()) if rules.ports.is_empty() => None,
                        Ok(()) => Some(AGAIN_EVERY),
                    };
                    due = wait.map(|wait| Instant::now() + wait);
                    if outcome.is_ok() {
                        in_force = Some(rules.clone());
                    }
                    tried = Some(rules);
                }
                let shown = shown(ports, &outcome, in_force.as_ref());
                let known = answered;
                say(report, Report { known, ..shown });
            }
        }
        let again = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = world.changed() => if changed.is_none() { return },
            () = again => {}
        }
    }
}

fn say(report: &watch::Sender<Report>, next: Report) {
    report.send_if_modified(|report| {
        if *report == next {
            return false;
        }
        if let Some(problem) = next.problem.as_ref().filter(|_| report.problem != next.problem) {
            tracing::error!("{problem}");
        }
        for port in next.ports.iter().filter(|port| !report.ports.contains(port)) {
            let DeclaredPort { port, stance, why } = port;
            tracing::info!(port, plaintext = stance.as_str(), why, "a declared port");
        }
        *report = next;
        true
    });
}

async fn tell(netd: &Path, rules: &GuardRules) -> Result<(), Problem> {
    let client = NetdClient::connect(netd).await.map_err(netd_problem)?;
    client.set_guard(rules.clone()).await.map_err(netd_problem)
}

/// Puts what became of the wish beside it.
fn shown(
    mut ports: Vec<DeclaredPort>,
    outcome: &Result<(), Problem>,
    in_force: Option<&GuardRules>,
) -> Report {
    let mut problem = None;
    if let Err(refused) = outcome {
        let cause = match refused.cause.as_str() {
            "" => refused.code.entry().title,
            cause => cause,
        };
        let still =
            |port: u16| in_force.is_some_and(|rules| rules.ports.iter().any(|guarded| guarded.port == port));
        let mut named = Vec::new();
        for port in &mut ports {
            // What was in force before the refusal is so still.
            if matches!(port.stance, Stance::Guarded | Stance::Partly) && !still(port.port) {
                port.stance = Stance::Unguarded;
                port.why = format!("NOT GUARDED although {}", port.why);
                named.push(port.port.to_string());
            }
        }
        problem = if !named.is_empty() {
            let ports = named.join(", ");
            Some(format!("plaintext may reach port {ports}: {cause}"))
        } else if in_force.is_some_and(|rules| !rules.ports.is_empty()) {
            Some(format!(
                "ports may be closed that no policy closes any more: {cause}"
            ))
        } else {
            // No policy wants a guard, and none is known of.
            None
        };
    }
    Report {
        known: true,
        ports,
        problem: problem.map(|cause| Problem::new(Code::GuardRefused, cause)),
    }
}

/// What policies say of plaintext to each declared port; `None` while that is not known.
///
/// `in_force` stays closed as far as a policy is missing that the own workload names.
fn decided(world: &Snapshot, wanted: bool, in_force: Option<&GuardRules>) -> Option<Decided> {
    let (own, exposure) = (world.own_workload()?, world.exposure()?);
    if !world.policies_synced() {
        return None;
    }
    let policies: Vec<&Policy> = world
        .policies_for(own)
        .into_iter()
        .map(|policy| &**policy)
        .filter(|policy| !policy.dry_run)
        .collect();
    let incomplete = world.missing_policies(own).next().is_some();
    let held = |port: u16| {
        let rules = in_force.filter(|_| incomplete)?;
        rules.ports.iter().find(|guarded| guarded.port == port)
    };
    let mut decided = Decided::default();
    let declared: BTreeSet<u16> = exposure.ports.iter().map(|exposed| exposed.port).collect();
    for port in declared {
        let verdict = plaintext(&policies, &own.addresses, port);
        let (mut guarded, mut why) = (verdict.guarded(port), verdict.why);
        if guarded.is_none()
            && let Some(before) = held(port)
        {
            guarded = Some(before.clone());
            why = "a policy that this host names has not been received".to_owned();
        }
        let stance = match &guarded {
            Some(_) if !wanted => Stance::Unguarded,
            Some(guarded) if guarded.allowed.is_empty() => Stance::Guarded,
            Some(_) => Stance::Partly,
            None => Stance::Open,
        };
        if stance == Stance::Unguarded {
            why = format!("guard: false in agent.yaml, although {why}");
        }
        decided.ports.push(DeclaredPort { port, stance, why });
        decided.rules.ports.extend(guarded.filter(|_| wanted));
    }
    if exposure.all_ports {
        decided.ports.push(DeclaredPort {
            port: 0,
            stance: Stance::Open,
            why: "'*' delivers every port and guards none; declare the ports".to_owned(),
        });
    }
    if !decided.rules.fits() {
        // Shorter and stricter: callers without an identity that a policy admits by their address are shut out, too.
        for guarded in &mut decided.rules.ports {
            guarded.allowed.clear();
        }
    }
    Some(decided)
}

/// What becomes of a caller without an identity.
struct Plaintext {
    allowed: Vec<IpNet>,
    denied: bool,
    why: String,
}

impl Plaintext {
    fn guarded(&self, port: u16) -> Option<GuardedPort> {
        // Whatever discovery declares: these are never closed.
        let never = port == 22 || tombolo_types::ports::NEVER_DELIVERED.contains(&port);
        (self.denied && !never).then(|| GuardedPort {
            port,
            allowed: self.allowed.clone(),
        })
    }
}

/// Asks the policies about every caller without an identity: between two bounds of the prefixes that they name, all
/// addresses get the same answer.
fn plaintext(policies: &[&Policy], own: &[IpAddr], port: u16) -> Plaintext {
    let named: Vec<IpNet> = policies
        .iter()
        .flat_map(|policy| &policy.rules)
        .flat_map(|rule| &rule.clauses)
        .flat_map(|clause| &clause.matches)
        .flat_map(|each| each.source_ips.iter().chain(&each.not_source_ips))
        .copied()
        .collect();
    let (mut v4, mut v6) = (BTreeSet::from([0u32]), BTreeSet::from([0u128]));
    for prefix in named {
        match prefix {
            IpNet::V4(prefix) => {
                v4.insert(prefix.network().into());
                v4.extend(u32::from(prefix.broadcast()).checked_add(1));
            }
            IpNet::V6(prefix) => {
                v6.insert(prefix.network().into());
                v6.extend(u128::from(prefix.broadcast()).checked_add(1));
            }
        }
    }
    let mut found = Plaintext {
        allowed: Vec::new(),
        denied: false,
        why: String::new(),
    };
    let mut reasons: BTreeMap<bool, String> = BTreeMap::new();
    let mut ask = |source: IpAddr| {
        let verdict = verdict(policies, own, source, port);
        reasons
            .entry(verdict.is_allow())
            .or_insert_with(|| reason(&verdict));
        found.denied |= !verdict.is_allow();
        verdict.is_allow()
    };
    let mut prefixes = Vec::new();
    for (&start, end) in v4
        .iter()
        .zip(v4.iter().skip(1).map(|next| next - 1).chain([u32::MAX]))
    {
        if ask(Ipv4Addr::from(start).into()) {
            let subnets = Ipv4Subnets::new(start.into(), end.into(), 0);
            prefixes.extend(subnets.map(IpNet::V4));
        }
    }
    for (&start, end) in v6
        .iter()
        .zip(v6.iter().skip(1).map(|next| next - 1).chain([u128::MAX]))
    {
        if ask(Ipv6Addr::from(start).into()) {
            let subnets = Ipv6Subnets::new(start.into(), end.into(), 0);
            prefixes.extend(subnets.map(IpNet::V6));
        }
    }
    found.allowed = IpNet::aggregate(&prefixes);
    found.why = reasons
        .remove(&!found.denied)
        .unwrap_or_else(|| "no policy speaks of it".to_owned());
    found
}

/// The strictest verdict over the own addresses of the caller's family.
fn verdict(policies: &[&Policy], own: &[IpAddr], source: IpAddr, port: u16) -> Verdict {
    let nobody: IpAddr = match source {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let of_family = own
        .iter()
        .copied()
        .filter(|address| address.is_ipv4() == source.is_ipv4());
    let mut last = None;
    // Where the record has none, the host may have one all the same.
    for destination_ip in of_family.chain([nobody]) {
        let connection = Connection {
            source: None,
            source_ip: source,
            destination_ip,
            destination_port: port,
        };
        // The address that is nobody's counts only if there is no other.
        if destination_ip.is_unspecified() && last.is_some() {
            break;
        }
        let verdict = decide(policies.iter().copied(), &connection);
        if !verdict.is_allow() {
            return verdict;
        }
        last = Some(verdict);
    }
    last.unwrap_or(Verdict::Allow { policy: None })
}

/// The policy behind a verdict on plaintext, as its author knows it.
pub(crate) fn reason(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Allow { policy: None } => "no policy denies plaintext".to_owned(),
        Verdict::Allow { policy: Some(policy) } => format!("AuthorizationPolicy {policy} admits plaintext"),
        Verdict::Deny { policy: None, .. } => "no ALLOW policy admits plaintext".to_owned(),
        Verdict::Deny {
            policy: Some(policy), ..
        } => {
            // As discovery and istiod name what they make of a PeerAuthentication.
            if &*policy.name == "istio_converted_static_strict" {
                "PeerAuthentication says STRICT".to_owned()
            } else if let Some(name) = policy.name.strip_prefix("converted_peer_authentication_") {
                format!("PeerAuthentication {}/{name} says STRICT", policy.namespace)
            } else {
                format!("AuthorizationPolicy {policy} denies plaintext")
            }
        }
    }
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
