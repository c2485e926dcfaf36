//! From an application's connect() to a copied connection.

use crate::{
    context::{Context, baggage},
    endpoints::{Outstanding, Spot},
    flows::{CutReason, Flow, Registered},
    refusal::{CallError, ended, reject_of, shown},
    report::{self, Ends, Outcome},
    through::{self, GatewayTry, Through},
};
use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tombolo_capture::{PendingFlow, Refusal};
use tombolo_destination::{Candidate, Destination, Tunnel, Workload, order, resolve};
use tombolo_identity::Peer;
use tombolo_snapshot::Snapshot;
use tombolo_telemetry::Direction;
use tombolo_tunnel::{
    Authority, ConnectRequest, Ended, Forwarded, Monitor, OpenError, Target, TunnelStream, bidirectional,
    traceparent,
};
use tombolo_types::{Reject, RejectClass};

/// A trial is as patient as the last round of a call: only its own limit ends it.
const PROBE_ROUND: u32 = 9;

/// An application that waits in connect().
pub(crate) trait Held: Send + 'static {
    fn destination(&self) -> SocketAddr;
    fn source(&self) -> SocketAddr;
    fn accept(self) -> impl Future<Output = io::Result<TcpStream>> + Send;
    fn refuse(self, with: Refusal);
}

impl Held for PendingFlow {
    fn destination(&self) -> SocketAddr {
        Self::destination(self)
    }
    fn source(&self) -> SocketAddr {
        Self::source(self)
    }
    fn accept(self) -> impl Future<Output = io::Result<TcpStream>> + Send {
        Self::accept(self)
    }
    fn refuse(self, with: Refusal) {
        Self::refuse(self, with);
    }
}

/// The other end of an accepted connection.
enum Upstream {
    Tunnel(TunnelStream),
    Through(TunnelStream, Box<Through>),
    Plain(TcpStream),
}

impl Upstream {
    fn peer(&self) -> Option<&Arc<Peer>> {
        match self {
            Self::Tunnel(stream) | Self::Through(stream, _) => Some(stream.peer()),
            Self::Plain(_) => None,
        }
    }

    fn through(&self) -> Option<&Through> {
        match self {
            Self::Through(_, through) => Some(through),
            Self::Tunnel(_) | Self::Plain(_) => None,
        }
    }
}

/// What is left to do once both ends are there. Kept small: it is held as long as the connection.
struct Open {
    registered: Registered,
    application: TcpStream,
    upstream: Upstream,
    workload: Arc<Workload>,
    address: SocketAddr,
    _outstanding: Outstanding,
}

/// Serves one connection of an application from its first packet to its end.
pub(crate) async fn serve<H: Held>(context: Arc<Context>, held: H) {
    // What establishing needs is freed before the bytes flow.
    let Some(Open {
        registered,
        application,
        upstream,
        workload,
        address,
        _outstanding,
    }) = Box::pin(establish(&context, held)).await
    else {
        return;
    };
    let flow = &registered.flow;
    let mutual_tls = upstream.peer().is_some();
    let (upstream, through) = match upstream {
        Upstream::Through(stream, through) => (Upstream::Tunnel(stream), Some(through)),
        upstream @ (Upstream::Tunnel(_) | Upstream::Plain(_)) => (upstream, None),
    };
    let how = match upstream {
        Upstream::Tunnel(stream) | Upstream::Through(stream, _) => {
            bidirectional(application, stream, &flow.monitor).await
        }
        // Rare and large: it does not make every task so.
        Upstream::Plain(socket) => Box::pin(plain(application, socket, &flow.monitor)).await,
    };
    let (flags, reason) = ended(&how, true);
    let cut = flow.cut_reason().map(Outcome::cut);
    let outcome = cut.unwrap_or(Outcome {
        flags,
        reason,
        detail: "",
        policy: None,
    });
    if context.access.wants(outcome.flags != "-") {
        let world = context.world.load();
        let source = world.own_workload().map(AsRef::as_ref);
        let ends = Ends {
            source,
            destination: Some(&workload),
            upstream: Some(address),
            through: through.as_deref(),
        };
        report::log(context.access, flow, &ends, &outcome);
    }
    tracing::trace!(mutual_tls, ?how, "outbound connection ended");
}

struct HeldGauge<'a>(&'a Context);

impl Drop for HeldGauge<'_> {
    fn drop(&mut self) {
        self.0.metrics.held.dec();
    }
}

async fn establish<H: Held>(context: &Context, held: H) -> Option<Open> {
    let started = Instant::now();
    context.metrics.held.inc();
    let gauge = HeldGauge(context);
    let (vip, source) = (held.destination(), held.source());
    let world = context.world.load();
    let own = world.own_workload();
    let refused = |service: &Arc<str>, destination: Option<&Candidate>, reject: &Reject| {
        report::count_refusal(&context.metrics, Direction::Outbound, reject.reason);
        let flow = Flow::new(
            Direction::Outbound,
            source,
            vip,
            Arc::clone(service),
            None,
            started,
        );
        let ends = Ends {
            source: own.map(AsRef::as_ref),
            destination: destination.map(|candidate| &*candidate.workload),
            // Behind gateways no endpoint has an address.
            upstream: destination
                .filter(|candidate| candidate.via.is_none())
                .map(|candidate| candidate.address),
            through: None,
        };
        report::log(context.access, &flow, &ends, &Outcome::refused(reject, None));
        shown(reject).refusal
    };

    let destination = match resolve(&*world, &world.source(), vip.ip(), vip.port()) {
        Ok(destination) => destination,
        Err(reject) => {
            held.refuse(refused(&"".into(), None, &reject));
            return None;
        }
    };
    let service = Arc::clone(&destination.service.key.name);
    let mut request = ConnectRequest::new(Authority::Address(vip));
    request.baggage = baggage(own.map(AsRef::as_ref));
    // Applications dial from mesh0's address, which is the same on every host: the peer is told this host's own, if it
    // has one that means something to others.
    let address = own.and_then(|own| own.addresses.first());
    let told = if context.plan.contains(source.ip()) && own.is_some() {
        address.map(|&address| SocketAddr::new(address, source.port()))
    } else {
        Some(source)
    };
    request.forwarded = Forwarded {
        source: told,
        host: service.to_string(),
    }
    .to_header();
    request.traceparent = Some(traceparent(rand::random(), rand::random()));

    let (index, upstream, outstanding) = match choose(context, &destination, &mut request, started).await {
        Ok(chosen) => chosen,
        Err(_) if context.handed_over.load(Ordering::Acquire) => {
            held.refuse(Refusal::Silent);
            return None;
        }
        Err(failed) => {
            let candidate = destination.candidates.get(failed.candidate);
            held.refuse(refused(&service, candidate, &reject_of(&failed.error)));
            return None;
        }
    };
    let candidate = &destination.candidates[index];
    let application = match held.accept().await {
        Ok(application) => application,
        // Another process has taken over and serves this connection from its start.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => return None,
        Err(error) => {
            let reject = Reject::new(RejectClass::Local, "client_gave_up").with_detail(error);
            refused(&service, Some(candidate), &reject);
            return None;
        }
    };
    drop(gauge);
    let peer = upstream.peer().cloned();
    let address = upstream
        .through()
        .map_or(candidate.address, |through| through.address);
    let flow = Flow::new(Direction::Outbound, source, vip, service, peer.clone(), started);
    let registered = context.flows.register(flow);
    // Registered first, looked at second: a revocation in between is not missed.
    if let Some(device) = peer.as_ref().and_then(|peer| peer.device)
        && context.world.peek().is_revoked(device)
    {
        registered.flow.cut(CutReason {
            reason: "device_revoked",
            flag: "UAEX",
            policy: None,
        });
    }
    let labels = report::labels(
        Direction::Outbound,
        (own.map(AsRef::as_ref), None),
        (Some(&candidate.workload), peer.as_deref()),
        Some(&destination.service),
        peer.is_some(),
        "-",
    );
    registered
        .flow
        .count_in(context.metrics.tcp(&labels), Arc::clone(&context.metrics));
    Some(Open {
        registered,
        application,
        upstream,
        workload: Arc::clone(&candidate.workload),
        address,
        _outstanding: outstanding,
    })
}

/// The last failure.
struct Failed {
    candidate: usize,
    error: CallError,
}

/// Tries endpoints in order until one accepts. Those that were only slow are tried again with more patience while the
/// application waits; a denial is final.
async fn choose(
    context: &Context,
    destination: &Destination,
    request: &mut ConnectRequest,
    started: Instant,
) -> Result<(usize, Upstream, Outstanding), Failed> {
    let end = started + context.settings.connect_timeout;
    let endpoints = &context.endpoints;
    let spot = |candidate: &Candidate| Spot::of(candidate, &destination.service.key);
    let mut order = order(
        destination,
        &|candidate| endpoints.outstanding(&spot(candidate)),
        &|candidate| endpoints.is_ejected(&spot(candidate), started),
        rand::random(),
    );
    let mut rounds = 1;
    let mut failed = Failed {
        candidate: 0,
        error: OpenError::Timeout(context.settings.connect_timeout).into(),
    };
    while !order.is_empty() && Instant::now() < end {
        let mut slow = Vec::new();
        for index in order {
            let candidate = &destination.candidates[index];
            if Instant::now() >= end {
                break;
            }
            let spot = spot(candidate);
            let outstanding = endpoints.connect(spot.clone(), Instant::now());
            match attempt(
                context,
                (candidate, &spot),
                request,
                (end, rounds),
                &mut Vec::new(),
            )
            .await
            {
                Ok(upstream) => {
                    endpoints.succeeded(&spot);
                    return Ok((index, upstream, outstanding));
                }
                Err(error) => {
                    tracing::debug!(endpoint = ?spot, %error, "endpoint did not accept");
                    let (denied, silent) = (error.is_denial(), error.is_silence());
                    if silent {
                        slow.push(index);
                    }
                    if denied {
                        endpoints.succeeded(&spot);
                    } else {
                        endpoints.failed(spot, Instant::now());
                    }
                    // A refusal says more than a silence.
                    if !silent || failed.error.is_silence() {
                        failed = Failed {
                            candidate: index,
                            error,
                        };
                    }
                    if denied {
                        return Err(failed);
                    }
                }
            }
        }
        order = slow;
        rounds *= 3;
    }
    Err(failed)
}

/// Tries one candidate until `end`, and with the patience of the round.
async fn attempt(
    context: &Context,
    (candidate, spot): (&Candidate, &Spot),
    request: &mut ConnectRequest,
    (end, round): (Instant, u32),
    tried: &mut Vec<GatewayTry>,
) -> Result<Upstream, CallError> {
    let settings = &context.settings;
    if let Some(via) = &candidate.via {
        request.authority = via
            .authority
            .parse()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
            .map_err(OpenError::from)?;
        let patience = settings.gateway_timeout.saturating_mul(round);
        let opened = through::open(context, (candidate, via, spot), request, end, patience, tried);
        let (stream, through) = opened.await.map_err(CallError::Through)?;
        return Ok(Upstream::Through(stream, through));
    }
    let deadline = end.min(Instant::now() + settings.attempt_timeout.saturating_mul(round));
    match candidate.workload.tunnel {
        Tunnel::Hbone => {
            request.authority = Authority::Address(candidate.address);
            let target = Target {
                hbone: candidate.hbone,
                expected: Arc::clone(&candidate.expected),
            };
            Ok(Upstream::Tunnel(
                context.pool.open(&target, request, deadline).await?,
            ))
        }
        Tunnel::None => {
            let started = Instant::now();
            let connected = timeout_at(deadline, TcpStream::connect(candidate.address)).await;
            let connected = connected.map_err(|_| OpenError::Timeout(started.elapsed()))?;
            let plain = connected.and_then(|socket| {
                socket.set_nodelay(true)?;
                Ok(socket)
            });
            Ok(Upstream::Plain(plain.map_err(OpenError::from)?))
        }
    }
}

/// How far a trial connection comes, and by which gateways.
pub(crate) async fn probe(
    context: &Context,
    destination: &Destination,
    candidate: &Candidate,
    patience: Duration,
) -> (Result<(), CallError>, Option<Arc<Peer>>, Vec<GatewayTry>) {
    let world: Arc<Snapshot> = context.world.load();
    let mut request = ConnectRequest::new(Authority::Address(candidate.address));
    request.baggage = baggage(world.own_workload().map(AsRef::as_ref));
    request.forwarded = Forwarded {
        source: None,
        host: destination.service.key.name.to_string(),
    }
    .to_header();
    let spot = Spot::of(candidate, &destination.service.key);
    let (end, round) = match candidate.via {
        None => (Instant::now() + patience, PROBE_ROUND),
        Some(_) => (Instant::now() + context.settings.connect_timeout, 1),
    };
    let mut tried = Vec::new();
    match attempt(
        context,
        (candidate, &spot),
        &mut request,
        (end, round),
        &mut tried,
    )
    .await
    {
        Ok(upstream) => (Ok(()), upstream.peer().cloned(), tried),
        Err(error) => (Err(error), None, tried),
    }
}

/// Copies between two sockets: an endpoint outside the mesh.
async fn plain(mut application: TcpStream, mut upstream: TcpStream, monitor: &Monitor) -> Ended {
    let copied = tokio::select! {
        copied = tokio::io::copy_bidirectional(&mut application, &mut upstream) => copied,
        () = monitor.cut_wanted() => {
            reset(&application);
            reset(&upstream);
            return Ended::Cut;
        }
    };
    match copied {
        Ok((sent, received)) => {
            monitor.add(sent, received);
            Ended::Complete
        }
        Err(error) => {
            reset(&application);
            reset(&upstream);
            Ended::ApplicationReset(error.kind())
        }
    }
}

fn reset(socket: &TcpStream) {
    // Fails only if the socket is gone already.
    let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
}
