//! TLS of Istio's sidecars that is passed on unopened, to the hosts that the operator has named.

use crate::front::{Front, first_message, next};
use std::{io, sync::Arc, time::Duration};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tombolo_destination::{Index as _, Tunnel};
use tombolo_snapshot::Snapshot;

/// For one address.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// ALPN of a sidecar that means mutual TLS of the mesh.
///
/// Source: Istio pilot/pkg/networking/core, AUTO_PASSTHROUGH filter chain match.
const SIDECAR_ALPN: [&[u8]; 5] = [
    b"istio-peer-exchange",
    b"istio",
    b"istio-http/1.0",
    b"istio-http/1.1",
    b"istio-h2",
];

/// Passes the connection to the first of `endpoints` (`host:port`) that answers.
async fn to_first(mut tcp: TcpStream, endpoints: &[String], what: &str) {
    for endpoint in endpoints {
        match dial(endpoint).await {
            Ok(mut inward) => {
                let _ = tcp.set_nodelay(true);
                // How it ends is the ends' business.
                let _ = copy_bidirectional(&mut tcp, &mut inward).await;
                return;
            }
            Err(error) => tracing::warn!(endpoint, %error, "{what} was not reached"),
        }
    }
}

/// Connects to `host:port`, one address after the other.
pub(crate) async fn dial(endpoint: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let addresses = timeout(DIAL_TIMEOUT, tokio::net::lookup_host(endpoint)).await??;
    for address in addresses {
        match timeout(DIAL_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(tcp)) => {
                tcp.set_nodelay(true)?;
                return Ok(tcp);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

/// `outbound_.<port>_.<subset>_.<host>`: port and host.
///
/// Source: Istio pilot/pkg/model, BuildDNSSrvSubsetKey and ParseSubsetKey.
fn subset_key(server_name: &str) -> Option<(u16, &str)> {
    let mut parts = server_name.split("_.");
    let (direction, port, _subset, host) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    (direction == "outbound" && parts.next().is_none() && !host.is_empty())
        .then(|| port.parse().ok().map(|port| (port, host)))?
}

/// Addresses of endpoints in the home network that terminate TLS themselves.
fn endpoints(world: &Snapshot, host: &str, port: u16) -> Vec<String> {
    let Some(service) = world.service_by_host(host, "") else {
        return Vec::new();
    };
    // Nobody's identity is seen here: like a cluster that shares nothing but exports.
    let exported = world.is_exported(&service.key);
    let Some(target) = service.port(port).filter(|_| exported).map(|map| map.target_port) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    world.endpoints(&service.key, &mut |workload| {
        let mapped = workload
            .services
            .get(&service.key)
            .and_then(|ports| ports.iter().find(|map| map.service_port == port))
            .map_or(target, |map| map.target_port);
        let ours = workload.network == world.own().network && workload.healthy;
        if let (true, Tunnel::None, Some(address)) = (ours, workload.tunnel, workload.addresses.first()) {
            found.push(std::net::SocketAddr::new(*address, mapped).to_string());
        }
    });
    found
}

impl Front {
    /// Accepts sidecars until the group stops.
    pub(crate) async fn accept_sidecars(self: Arc<Self>, listener: TcpListener) {
        loop {
            let Some((tcp, remote)) = next(&listener).await else {
                continue;
            };
            let Some(place) = self.passing.enter(remote.ip()) else {
                self.metrics.limited("sidecars");
                continue;
            };
            let front = Arc::clone(&self);
            self.tasks.spawn_until_stopped("sidecar connection", async move {
                let _place = place;
                let Some(hello) = first_message(&tcp).await else {
                    front.metrics.accepted("refused");
                    return;
                };
                let name = hello.server_name.unwrap_or_default();
                let wanted = subset_key(&name).filter(|(_, host)| {
                    front
                        .settings
                        .passthrough_hosts
                        .iter()
                        .any(|allowed| allowed == host)
                });
                let mutual = hello
                    .alpn
                    .iter()
                    .any(|protocol| SIDECAR_ALPN.contains(&protocol.as_slice()));
                let Some((port, host)) = wanted.filter(|_| mutual) else {
                    front.metrics.accepted("refused");
                    tracing::debug!(%remote, server_name = name, "refused: not in passthrough_hosts");
                    return;
                };
                front.metrics.accepted("passthrough");
                let mut endpoints = endpoints(&front.calls.world.load(), host, port);
                front.calls.balance.rotate(&mut endpoints);
                // Like a call: a drain waits for it.
                front.metrics.open.inc();
                to_first(tcp, &endpoints, host).await;
                front.metrics.open.dec();
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sidecars() {
        let host = "foo.ns.svc.cluster.local";
        assert_eq!(subset_key(&format!("outbound_.80_._.{host}")), Some((80, host)));
        assert_eq!(subset_key(&format!("outbound_.80_.v1_.{host}")), Some((80, host)));
        for bad in [
            "",
            host,
            "inbound_.80_._.a",
            "outbound_.x_._.a",
            "outbound_.80_._.",
            "outbound_.80_._.a_.b",
        ] {
            assert_eq!(subset_key(bad), None, "{bad}");
        }
    }
}
