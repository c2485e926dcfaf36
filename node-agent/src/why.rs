//! `tombolo why`: a connection that an application here would make, hop by hop, each judged by what this host knows.

mod choice;
mod name;
mod peers;
mod plain;

use crate::{agent::Agent, status};
use choice::{Endpoints, policy, usable};
use name::{look_up, name, virtual_address};
use peers::{PROBE_TIMEOUT, peers};
use std::net::IpAddr;
use tokio::time::timeout;
use tombolo_control_client::Problem;
use tombolo_destination::Index as _;
use tombolo_proto::tombolo::agent::v1::{Finding, Hop, WhyResponse};
use tombolo_types::{Code, networks};
use tonic::Status;

/// The hops, in their order.
const HOPS: [&str; 7] = [
    "name",
    "vip",
    "policy",
    "endpoint",
    "gateway",
    "tls",
    "application",
];
/// Endpoints named in one line.
const NAMED_MAX: usize = 5;

/// Hops so far. After a broken one the rest is skipped.
#[derive(Debug, Default)]
struct Walk {
    hops: Vec<Hop>,
    broken: bool,
}

impl Walk {
    fn push(&mut self, result: &str, detail: impl Into<String>, finding: Option<Finding>) {
        let Some(name) = HOPS.get(self.hops.len()) else {
            return;
        };
        self.hops.push(Hop {
            name: (*name).to_owned(),
            result: result.to_owned(),
            detail: detail.into(),
            finding,
        });
    }

    fn ok(&mut self, detail: impl Into<String>) {
        self.push("ok", detail, None);
    }

    fn skip(&mut self, detail: impl Into<String>) {
        self.push("skipped", detail, None);
    }

    fn broken(&mut self, code: Code, cause: impl Into<String>, next: Option<String>) {
        let cause = cause.into();
        let mut finding = status::finding(&Problem::new(code, &cause));
        if let Some(next) = next {
            finding.next = next;
        }
        self.push("broken", code.entry().title, Some(finding));
        self.broken = true;
    }

    fn finish(mut self) -> WhyResponse {
        while self.hops.len() < HOPS.len() {
            self.skip("");
        }
        WhyResponse {
            reachable: !self.broken,
            hops: self.hops,
        }
    }
}

/// Walks from this host to `host:port`.
pub(crate) async fn walk(agent: &Agent, host: &str, port: u16) -> Result<WhyResponse, Status> {
    let enrolled = agent.enrolled.get();
    let enrolled = enrolled.ok_or_else(|| Status::failed_precondition(Code::NotEnrolled.message("")))?;
    let world = enrolled.world.load();
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let mut walk = Walk::default();

    let resolved = match host.parse::<IpAddr>() {
        Ok(_) => Ok(Vec::new()),
        Err(_) => look_up(&host, port).await,
    };
    let dataplane = agent.dataplane.borrow().clone();
    let obstacle = dataplane.is_none().then(|| {
        let known = agent.obstacle.borrow().clone();
        known.unwrap_or_else(|| Problem::new(Code::NetdUnreachable, "the data path has not started yet"))
    });
    let Some(vip) = name(&mut walk, &world, &host, &resolved, obstacle.as_ref()) else {
        return Ok(walk.finish());
    };
    if world.service_by_address(vip).is_none()
        && let Some(plain) = plain::Plain::find(&world, vip, port)
    {
        let outcome = plain.connect().await;
        plain.judge(&mut walk, &world, &outcome);
        return Ok(walk.finish());
    }
    let Some(service) = virtual_address(&mut walk, &world, vip, port) else {
        return Ok(walk.finish());
    };
    let identity = enrolled.identity.current().identity.clone();
    let endpoints = Endpoints::of(&world, &service, vip, port);
    policy(
        &mut walk,
        &world,
        identity.as_ref().map(|identity| identity.id()),
        &endpoints,
    );
    if walk.broken {
        return Ok(walk.finish());
    }
    let Some(destination) = usable(&mut walk, &endpoints) else {
        return Ok(walk.finish());
    };
    if let Some(problem) = obstacle {
        walk.broken(problem.code, problem.cause, None);
        return Ok(walk.finish());
    }
    let Some(dataplane) = dataplane else {
        return Ok(walk.finish());
    };
    let results = timeout(PROBE_TIMEOUT, dataplane.probe(destination))
        .await
        .unwrap_or_default();
    peers(&mut walk, &world, &results);
    Ok(walk.finish())
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let mut items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    let more = items.len().saturating_sub(NAMED_MAX);
    items.truncate(NAMED_MAX);
    let text = items.join(", ");
    if more == 0 {
        text
    } else {
        format!("{text} and {more} more")
    }
}

/// A network as people call it.
fn network(name: &str) -> String {
    let home = networks::home_of(name);
    match (home, networks::is_outbound(name)) {
        ("", false) => "the default network".to_owned(),
        ("", true) => "the default network, dialling out only".to_owned(),
        (home, false) => format!("network {home}"),
        (home, true) => format!("network {home}, dialling out only"),
    }
}

#[cfg(test)]
#[path = "why_tests.rs"]
mod tests;
