//! Calls into another network: which of its gateways, and what its failure means for the next one.

use crate::{
    context::Context,
    endpoints::{Outstanding, Spot},
};
use http::HeaderValue;
use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::{Instant, timeout};
use tombolo_destination::{Candidate, Gateway, GatewayHost, Via, order_gateways};
use tombolo_telemetry::GatewayLabels;
use tombolo_tunnel::{ConnectRequest, GatewayTarget, OpenError, Target, ThroughError, TunnelStream};
use tombolo_types::networks;

/// Tries of one call, whether of several gateways or of several endpoints behind one.
const TRIES: usize = 3;
/// Addresses of one gateway that are tried, one of each family as a rule.
const ADDRESSES_MAX: usize = 2;
/// So long the answer of the host's resolver counts.
const NAME_TTL: Duration = Duration::from_secs(30);
/// Longest wait for the resolver. An answer that is too old is better than none.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);
/// Names remembered.
const NAMES_MAX: usize = 256;

/// A gateway that was tried for a call.
#[derive(Debug, Clone)]
pub struct GatewayTry {
    /// Of its record.
    pub uid: Arc<str>,
    /// `host:port` as it is listed.
    pub gateway: Arc<str>,
    /// What became of it: what the gateway says and what the endpoint behind it says have different remedies.
    pub outcome: Result<(), ThroughError>,
}

/// The gateway that an open call runs through. Counted there as long as it is kept.
#[derive(Debug)]
pub(crate) struct Through {
    /// `host:port` as it is listed.
    pub(crate) gateway: Arc<str>,
    /// Where it was dialled.
    pub(crate) address: SocketAddr,
    /// Name of the workload that took the call, as it says itself.
    pub(crate) workload: Box<str>,
    _outstanding: Outstanding,
}

/// Names of gateways as the host's own resolver answers them. Cheap to clone; clones share the memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct GatewayNames(Arc<Mutex<HashMap<String, Known>>>);

#[derive(Debug, Clone)]
struct Known {
    addresses: Arc<[IpAddr]>,
    until: Instant,
}

impl GatewayNames {
    fn names(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a gateway is dialled now, one address of each family; empty if its name cannot be resolved.
    pub(crate) async fn addresses(&self, host: &GatewayHost) -> Arc<[IpAddr]> {
        match host {
            GatewayHost::Address(address) => Arc::new([*address]),
            GatewayHost::Hostname(name) => {
                self.resolve(name.as_str(), Instant::now(), async {
                    let found = tokio::net::lookup_host((name.as_str(), 0)).await.ok()?;
                    Some(found.map(|address| address.ip()).collect())
                })
                .await
            }
        }
    }

    async fn resolve(
        &self,
        name: &str,
        now: Instant,
        look_up: impl Future<Output = Option<Vec<IpAddr>>>,
    ) -> Arc<[IpAddr]> {
        let known = self.names().get(name).cloned();
        if let Some(known) = known.as_ref().filter(|known| now < known.until) {
            return Arc::clone(&known.addresses);
        }
        let found = timeout(LOOKUP_TIMEOUT, look_up).await.ok().flatten();
        let found = found.filter(|found| !found.is_empty());
        let addresses: Arc<[IpAddr]> = match (found, known) {
            (Some(found), _) => one_of_each(&found),
            // A resolver that fails is asked again soon, but not by every call.
            (None, Some(known)) => known.addresses,
            (None, None) => return Arc::new([]),
        };
        let mut names = self.names();
        if names.len() >= NAMES_MAX {
            names.retain(|_, known| now < known.until);
        }
        let until = now + NAME_TTL;
        names.insert(
            name.to_owned(),
            Known {
                addresses: Arc::clone(&addresses),
                until,
            },
        );
        addresses
    }
}

/// In the resolver's order, which knows what this host can reach.
fn one_of_each(found: &[IpAddr]) -> Arc<[IpAddr]> {
    let mut kept: Vec<IpAddr> = Vec::with_capacity(ADDRESSES_MAX);
    for address in found {
        if !kept.iter().any(|one| one.is_ipv4() == address.is_ipv4()) {
            kept.push(*address);
        }
    }
    kept.into()
}

/// `host:port` of a gateway, as logs and metrics name it.
pub(crate) fn name_of(gateway: &Gateway) -> Arc<str> {
    let port = gateway.hbone_port;
    match &gateway.address {
        GatewayHost::Address(address) => SocketAddr::new(*address, port).to_string().into(),
        GatewayHost::Hostname(host) => format!("{host}:{port}").into(),
    }
}

/// The ways to a gateway at one of its addresses.
pub(crate) fn target_of(gateway: &Gateway, address: IpAddr) -> GatewayTarget {
    GatewayTarget {
        tcp: Target {
            hbone: SocketAddr::new(address, gateway.hbone_port),
            expected: Arc::clone(&gateway.expected),
        },
        quic: gateway.quic_port.map(|port| SocketAddr::new(address, port)),
    }
}

/// The network that a caller is in, as the inner request says it: its home network, for hosts that only dial out too.
pub(crate) fn network_header(network: &str) -> Option<HeaderValue> {
    HeaderValue::try_from(networks::home_of(network)).ok()
}

/// What a failed try means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Nobody else would answer otherwise.
    Stop,
    /// Another gateway may do; this one rests for this service alone.
    OtherGatewayForThis,
    /// Another gateway may do; this one rests.
    OtherGateway,
    /// Another endpoint may do, behind whichever gateway.
    OtherEndpoint,
}

fn next(error: &ThroughError) -> Next {
    match error {
        ThroughError::Gateway(OpenError::Status(503)) => Next::OtherGatewayForThis,
        // Its policy, or a request that it does not understand.
        ThroughError::Gateway(OpenError::Status(_)) => Next::Stop,
        ThroughError::Gateway(OpenError::Draining) => Next::Stop,
        ThroughError::Gateway(_) => Next::OtherGateway,
        ThroughError::Endpoint(OpenError::Status(503)) => Next::OtherEndpoint,
        ThroughError::Endpoint(OpenError::Status(_) | OpenError::Tls(_) | OpenError::Draining) => Next::Stop,
        ThroughError::Endpoint(_) => Next::OtherEndpoint,
        _ => Next::Stop,
    }
}

/// Opens a call to a candidate behind gateways. At most [`TRIES`] tries, each bounded by `patience`.
///
/// What was tried is added to `tried`.
pub(crate) async fn open(
    context: &Context,
    (candidate, via, spot): (&Candidate, &Via, &Spot),
    outer: &ConnectRequest,
    deadline: Instant,
    patience: Duration,
    tried: &mut Vec<GatewayTry>,
) -> Result<(TunnelStream, Box<Through>), ThroughError> {
    let started = Instant::now();
    let endpoints = &context.endpoints;
    let rests = |gateway: &Gateway| {
        endpoints.is_ejected(&Spot::gateway(gateway), started)
            || endpoints.is_ejected(&spot.way(gateway), started)
    };
    let outstanding = |gateway: &Gateway| endpoints.outstanding(&Spot::gateway(gateway));
    let mut order = order_gateways(via, &outstanding, &rests, rand::random());
    // One that has refused this service costs little to ask again; one that is silent costs all the patience that there is.
    order.sort_by_key(|&index| endpoints.is_ejected(&Spot::gateway(&via.gateways[index]), started));
    let inner = ConnectRequest {
        network: network_header(&context.world.load().source().network),
        ..outer.clone()
    };
    let mut failed = ThroughError::Gateway(OpenError::Timeout(Duration::ZERO));
    let mut turn = 0;
    for _ in 0..TRIES {
        let Some(&index) = order.get(turn % order.len().max(1)) else {
            break;
        };
        let gateway = &via.gateways[index];
        let now = Instant::now();
        if now >= deadline {
            break;
        }
        let name = name_of(gateway);
        let counted = endpoints.connect(Spot::gateway(gateway), now);
        let by = deadline.min(now + patience);
        let outcome = one(context, gateway, outer, &inner, candidate, by).await;
        count(context, via, &name, outcome.as_ref().map(drop));
        tried.push(GatewayTry {
            uid: Arc::clone(&gateway.uid),
            gateway: Arc::clone(&name),
            outcome: outcome.as_ref().map(drop).map_err(Clone::clone),
        });
        match outcome {
            Ok((stream, address)) => {
                endpoints.succeeded(&Spot::gateway(gateway));
                endpoints.succeeded(&spot.way(gateway));
                let workload = stream.baggage().map_or("", |baggage| &baggage.workload).into();
                let through = Through {
                    gateway: name,
                    address,
                    workload,
                    _outstanding: counted,
                };
                return Ok((stream, Box::new(through)));
            }
            Err(error) => {
                tracing::debug!(gateway = %name, network = %via.network, %error, "not through this gateway");
                let what = next(&error);
                let at = Instant::now();
                if matches!(
                    error,
                    ThroughError::Endpoint(_) | ThroughError::Gateway(OpenError::Status(_))
                ) {
                    endpoints.succeeded(&Spot::gateway(gateway));
                }
                failed = error;
                match what {
                    Next::Stop => break,
                    Next::OtherGatewayForThis => endpoints.failed(spot.way(gateway), at),
                    Next::OtherGateway => endpoints.failed(Spot::gateway(gateway), at),
                    // An answer is the endpoint's; an end without one may be the gateway's or the way's.
                    Next::OtherEndpoint
                        if candidate.weight > 1
                            || matches!(
                                failed,
                                ThroughError::Endpoint(OpenError::Io(_) | OpenError::Reset(_))
                            ) =>
                    {
                        turn += 1;
                        continue;
                    }
                    // The one that is there has answered.
                    Next::OtherEndpoint => break,
                }
                order.remove(turn % order.len());
            }
        }
    }
    Err(failed)
}

async fn one(
    context: &Context,
    gateway: &Gateway,
    outer: &ConnectRequest,
    inner: &ConnectRequest,
    candidate: &Candidate,
    by: Instant,
) -> Result<(TunnelStream, SocketAddr), ThroughError> {
    let addresses = context.gateway_names.addresses(&gateway.address).await;
    let mut failed = ThroughError::Gateway(unresolved(&gateway.address).into());
    for &address in addresses.iter().take(ADDRESSES_MAX) {
        let target = target_of(gateway, address);
        let opened = context
            .pool
            .open_through(&target, outer, &candidate.expected, inner, by)
            .await;
        match opened {
            Ok(stream) => return Ok((stream, target.tcp.hbone)),
            // A family that this host does not have fails at once.
            Err(error @ ThroughError::Gateway(OpenError::Io(_))) => failed = error,
            Err(error) => return Err(error),
        }
    }
    Err(failed)
}

fn unresolved(host: &impl fmt::Display) -> std::io::Error {
    let cause = format!("this host's resolver knows no address of {host}");
    std::io::Error::new(std::io::ErrorKind::NotFound, cause)
}

fn count(context: &Context, via: &Via, gateway: &str, outcome: Result<(), &ThroughError>) {
    let result = match outcome {
        Ok(()) => "ok",
        Err(ThroughError::Gateway(error)) => gateway_reason(error),
        Err(ThroughError::Endpoint(error)) => error.reason(),
        Err(_) => "failed",
    };
    let labels = GatewayLabels {
        network: via.network.to_string(),
        gateway: gateway.to_owned(),
        result,
    };
    context.metrics.gateway_calls.get_or_create(&labels).inc();
}

/// Stable reason of a gateway's failure: a metric label and log field.
pub(crate) const fn gateway_reason(error: &OpenError) -> &'static str {
    match error {
        OpenError::Status(401) => "denied_by_gateway",
        OpenError::Status(_) => "refused_by_gateway",
        OpenError::Tls(_) => "gateway_tls_failed",
        OpenError::Draining => "draining",
        OpenError::Io(_) | OpenError::Reset(_) | OpenError::Timeout(_) | OpenError::Protocol(_) | _ => {
            "gateway_unreachable"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_kept_and_stale_ones_are_better_than_none() {
        let names = GatewayNames::default();
        let begun = Instant::now();
        let ask = async |times: u32, answer: Option<&[&str]>| {
            let found = answer.map(|texts| texts.iter().map(|text| text.parse().unwrap()).collect());
            let found = names.resolve("gw", begun + NAME_TTL * times, async { found });
            found.await.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(ask(0, None).await.is_empty());
        let first = ["10.0.0.1", "2001:db8::1"];
        assert_eq!(
            ask(0, Some(&["10.0.0.1", "10.0.0.2", "2001:db8::1"])).await,
            first
        );
        assert_eq!(ask(0, Some(&["10.0.0.9"])).await, first, "kept");
        assert_eq!(ask(1, None).await, first, "stale");
        assert_eq!(ask(2, Some(&[])).await, first, "stale");
        assert_eq!(ask(3, Some(&["10.0.0.9"])).await, ["10.0.0.9"]);
    }

    #[test]
    fn a_failure_is_the_gateways_or_the_endpoints() {
        use ThroughError::{Endpoint, Gateway};
        let lost = || OpenError::from(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        for (error, expected) in [
            (Gateway(lost()), Next::OtherGateway),
            (
                Gateway(OpenError::Timeout(Duration::from_secs(1))),
                Next::OtherGateway,
            ),
            (Gateway(OpenError::Status(503)), Next::OtherGatewayForThis),
            (Gateway(OpenError::Status(401)), Next::Stop),
            (Endpoint(OpenError::Status(401)), Next::Stop),
            (Endpoint(OpenError::Status(503)), Next::OtherEndpoint),
            (Endpoint(lost()), Next::OtherEndpoint),
        ] {
            assert_eq!(next(&error), expected, "{error}");
        }
    }
}
