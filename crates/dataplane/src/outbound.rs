//! From an application's connect() to a copied connection.

use crate::{
    context::{Context, baggage},
    flows::{CutReason, Flow, Registered},
    refusal::{ended, reject_of, shown},
    report::{self, Ends, Outcome},
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
    Plain(TcpStream),
}

impl Upstream {
    fn peer(&self) -> Option<&Arc<Peer>> {
        match self {
            Self::Tunnel(stream) => Some(stream.peer()),
            Self::Plain(_) => None,
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
    _outstanding: crate::endpoints::Outstanding,
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
    let how = match upstream {
        Upstream::Tunnel(stream) => bidirectional(application, stream, &flow.monitor).await,
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
            upstream: destination.map(|candidate| candidate.address),
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
    // Applications dial from mesh0's address, which is the same on every host: the peer is told this host's own.
    let address = own
        .filter(|_| context.plan.contains(source.ip()))
        .and_then(|own| own.addresses.first());
    let told = address.map_or(source, |&address| SocketAddr::new(address, source.port()));
    request.forwarded = Forwarded {
        source: Some(told),
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
        address: candidate.address,
        _outstanding: outstanding,
    })
}

/// The last failure.
struct Failed {
    candidate: usize,
    error: OpenError,
}

/// Tries endpoints in order until one accepts. Those that were only slow are tried again with more patience while the
/// application waits; a denial is final.
async fn choose(
    context: &Context,
    destination: &Destination,
    request: &mut ConnectRequest,
    started: Instant,
) -> Result<(usize, Upstream, crate::endpoints::Outstanding), Failed> {
    let end = started + context.settings.connect_timeout;
    let endpoints = &context.endpoints;
    let mut order = order(
        destination,
        &|candidate| endpoints.outstanding(candidate.address),
        &|candidate| endpoints.is_ejected(candidate.address, started),
        rand::random(),
    );
    let mut patience = context.settings.attempt_timeout;
    let mut failed = Failed {
        candidate: 0,
        error: OpenError::Timeout(context.settings.connect_timeout),
    };
    while !order.is_empty() && Instant::now() < end {
        let mut slow = Vec::new();
        for index in order {
            let candidate = &destination.candidates[index];
            let now = Instant::now();
            if now >= end {
                break;
            }
            let outstanding = endpoints.connect(candidate.address);
            match attempt(context, candidate, request, (now + patience).min(end)).await {
                Ok(upstream) => {
                    endpoints.succeeded(candidate.address);
                    return Ok((index, upstream, outstanding));
                }
                Err(error) => {
                    tracing::debug!(endpoint = %candidate.address, %error, "endpoint did not accept");
                    let denied = matches!(error, OpenError::Status(401));
                    if matches!(error, OpenError::Timeout(_)) {
                        slow.push(index);
                    }
                    if !denied {
                        endpoints.failed(candidate.address, Instant::now());
                    }
                    // A refusal says more than a silence.
                    let silent = matches!(error, OpenError::Timeout(_));
                    if !silent || matches!(failed.error, OpenError::Timeout(_)) {
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
        patience = patience.saturating_mul(3);
    }
    Err(failed)
}

async fn attempt(
    context: &Context,
    candidate: &Candidate,
    request: &mut ConnectRequest,
    deadline: Instant,
) -> Result<Upstream, OpenError> {
    if let Some(via) = &candidate.via {
        // no_valid_destination: nothing dials through a gateway yet, and without one there is no address to dial.
        let cause = format!("{} is in the network {:?}", via.authority, via.network);
        return Err(io::Error::new(io::ErrorKind::HostUnreachable, cause).into());
    }
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
            let socket = connected.map_err(|_| OpenError::Timeout(started.elapsed()))??;
            socket.set_nodelay(true)?;
            Ok(Upstream::Plain(socket))
        }
    }
}

/// How far a trial connection comes.
pub(crate) async fn probe(
    context: &Context,
    destination: &Destination,
    candidate: &Candidate,
    patience: Duration,
) -> (Result<(), OpenError>, Option<Arc<Peer>>) {
    let world: Arc<Snapshot> = context.world.load();
    let mut request = ConnectRequest::new(Authority::Address(candidate.address));
    request.baggage = baggage(world.own_workload().map(AsRef::as_ref));
    request.forwarded = Forwarded {
        source: None,
        host: destination.service.key.name.to_string(),
    }
    .to_header();
    match attempt(context, candidate, &mut request, Instant::now() + patience).await {
        Ok(upstream) => (Ok(()), upstream.peer().cloned()),
        Err(error) => (Err(error), None),
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
