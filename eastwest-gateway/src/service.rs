//! The calls of members: from an outer CONNECT to bytes between caller and endpoint, which the gateway cannot read.

use crate::{
    metrics::Metrics,
    route::{Call, Endpoint, Known, Reach, Refused, route},
    sessions::Sessions,
};
use http::{Method, StatusCode};
use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::copy_bidirectional,
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tombolo_identity::Peer;
use tombolo_runtime::Reader;
use tombolo_snapshot::Snapshot;
use tombolo_tunnel::{Authority, ConnectRequest, Incoming, Monitor, Service, TunnelIo, bidirectional};
use tombolo_types::{DeviceId, NamespacedName, Reject, RejectClass};

/// For one endpoint: in its own network it answers at once or not at all.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// For all of them together; the caller gives up after 10 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(8);
/// Endpoints that are tried for one call.
const TRIES: usize = 3;
/// An endpoint that could not be reached is chosen last for so long.
const REST: Duration = Duration::from_secs(10);

/// Serves the outer CONNECT streams.
#[derive(Debug)]
pub(crate) struct Calls {
    pub(crate) world: Reader<Snapshot>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) log_all: bool,
    load: Mutex<HashMap<Arc<str>, Load>>,
    turn: AtomicU64,
}

/// What an endpoint carries, and since when it is to rest.
#[derive(Debug, Default)]
struct Load {
    open: usize,
    failed: Option<Instant>,
}

impl Known for Calls {
    fn has_session(&self, device: DeviceId) -> bool {
        self.sessions.has(device)
    }

    fn is_exported(&self, service: &NamespacedName) -> bool {
        self.world.peek().is_exported(service)
    }
}

impl Service for Calls {
    fn admit(&self, peer: &Peer) -> bool {
        peer.device
            .is_none_or(|device| !self.world.peek().is_revoked(device))
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        self.metrics.open.inc();
        let started = Instant::now();
        let peer = Arc::clone(incoming.peer());
        let remote = incoming.remote();
        let outcome = self.serve(incoming).await;
        self.metrics.open.dec();
        self.report(&peer, remote, started, &outcome);
    }
}

/// The other end of an accepted call.
enum Inward {
    Tcp(TcpStream),
    Session(TunnelIo),
}

/// What became of a call.
struct Done {
    service: String,
    endpoint: Option<Arc<str>>,
    bytes: (u64, u64),
    refused: Option<Refused>,
}

impl Calls {
    pub(crate) fn new(
        world: Reader<Snapshot>,
        sessions: Arc<Sessions>,
        metrics: Arc<Metrics>,
        log_all: bool,
    ) -> Self {
        Self {
            world,
            sessions,
            metrics,
            log_all,
            load: Mutex::default(),
            turn: AtomicU64::new(0),
        }
    }

    async fn serve(&self, incoming: Incoming) -> Done {
        let mut done = Done {
            service: String::new(),
            endpoint: None,
            bytes: (0, 0),
            refused: None,
        };
        match self.reach(&incoming, &mut done).await {
            Ok((inward, _open)) => {
                let Ok(outward) = incoming.accept_call(None) else {
                    done.refused = Some(Reject::new(RejectClass::UpstreamUnhealthy, "caller_gone").into());
                    return done;
                };
                done.bytes = pass(inward, outward).await;
            }
            Err(refused) => {
                incoming.refuse(status(&refused.reject));
                done.refused = Some(refused);
            }
        }
        done
    }

    /// Everything before the answer: route, policy, and an endpoint that takes the connection.
    async fn reach<'a>(
        &'a self,
        incoming: &Incoming,
        done: &mut Done,
    ) -> Result<(Inward, Open<'a>), Refused> {
        if incoming.method() != Method::CONNECT {
            return Err(Reject::new(RejectClass::PeerIncompatible, "not_connect").into());
        }
        let authority = incoming.authority().map_err(|error| {
            Reject::new(RejectClass::PeerIncompatible, "malformed_authority").with_detail(error)
        })?;
        let found = {
            let world = self.world.load();
            let call = Call {
                peer: incoming.peer(),
                remote: incoming.remote().ip(),
                authority: &authority,
            };
            route(&world, &call, self)?
        };
        done.service = found.service.hostname.to_string();
        let deadline = Instant::now() + CALL_TIMEOUT;
        let mut last = None;
        for endpoint in self.in_order(found.endpoints).into_iter().take(TRIES) {
            let uid = Arc::clone(&endpoint.workload.uid);
            let open = self.open(&uid);
            let by = deadline.min(Instant::now() + DIAL_TIMEOUT);
            match self.dial(&endpoint, &authority, by).await {
                Ok(inward) => {
                    self.rest(&uid, false);
                    done.endpoint = Some(uid);
                    return Ok((inward, open));
                }
                Err(error) => {
                    self.rest(&uid, true);
                    tracing::debug!(endpoint = %uid, %error, "an endpoint was not reached");
                    last = Some((uid, error));
                }
            }
        }
        let detail = last.map_or_else(String::new, |(uid, error)| format!("{uid}: {error}"));
        Err(
            Reject::new(RejectClass::UpstreamUnhealthy, "endpoint_not_reached")
                .with_detail(detail)
                .into(),
        )
    }

    async fn dial(&self, endpoint: &Endpoint, authority: &Authority, by: Instant) -> io::Result<Inward> {
        match endpoint.reach {
            Reach::Dial(address) => {
                let tcp = timeout_at(by, TcpStream::connect(address)).await??;
                tcp.set_nodelay(true)?;
                Ok(Inward::Tcp(tcp))
            }
            Reach::Session(device) => {
                let session = self.sessions.get(device).ok_or(io::ErrorKind::NotConnected)?;
                let request = ConnectRequest::new(authority.clone());
                let stream = session.open(&request, by).await.map_err(io::Error::other)?;
                Ok(Inward::Session(stream))
            }
        }
    }

    /// Rested ones last, then by what they carry for their capacity; among equals another one each time.
    fn in_order(&self, mut endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let shift = usize::try_from(turn).unwrap_or_default() % endpoints.len().max(1);
        endpoints.rotate_left(shift);
        let load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        endpoints.sort_by_key(|endpoint| {
            let load = load.get(&endpoint.workload.uid);
            let resting = load
                .and_then(|load| load.failed)
                .is_some_and(|failed| now.duration_since(failed) < REST);
            let open = load.map_or(0, |load| load.open);
            let share = open * 1024 / usize::try_from(endpoint.workload.capacity.max(1)).unwrap_or(1);
            (resting, share)
        });
        endpoints
    }

    fn open(&self, uid: &Arc<str>) -> Open<'_> {
        let mut load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        load.entry(Arc::clone(uid)).or_default().open += 1;
        Open {
            calls: self,
            uid: Arc::clone(uid),
        }
    }

    fn rest(&self, uid: &Arc<str>, failed: bool) {
        let mut load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        load.entry(Arc::clone(uid)).or_default().failed = failed.then(Instant::now);
    }

    fn report(&self, peer: &Peer, remote: SocketAddr, started: Instant, done: &Done) {
        let result = done
            .refused
            .as_ref()
            .map_or("ok", |refused| refused.reject.reason);
        self.metrics.call(&done.service, result);
        self.metrics.bytes(&done.service, done.bytes.0, done.bytes.1);
        let milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let endpoint = done.endpoint.as_deref().unwrap_or("-");
        match &done.refused {
            Some(refused) => {
                let policy = refused
                    .policy
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string);
                tracing::warn!(
                    peer = %peer.id, %remote, service = done.service, endpoint, reason = result,
                    detail = %refused.reject, policy, milliseconds, "call refused"
                );
            }
            None if self.log_all => tracing::info!(
                peer = %peer.id, %remote, service = done.service, endpoint,
                bytes_to = done.bytes.0, bytes_from = done.bytes.1, milliseconds, "call"
            ),
            None => {}
        }
    }
}

/// Counts a call at its endpoint while it runs.
struct Open<'a> {
    calls: &'a Calls,
    uid: Arc<str>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let mut load = self.calls.load.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = load.get_mut(&self.uid) {
            held.open = held.open.saturating_sub(1);
            if held.open == 0 && held.failed.is_none_or(|failed| failed.elapsed() > REST) {
                load.remove(&self.uid);
            }
        }
    }
}

/// Bytes to and from the endpoint.
async fn pass(inward: Inward, outward: tombolo_tunnel::Call) -> (u64, u64) {
    // An error ends both; what was counted until then is lost to the metric alone.
    match (inward, outward) {
        (Inward::Tcp(tcp), tombolo_tunnel::Call::Stream(outward)) => {
            let monitor = Monitor::default();
            bidirectional(tcp, outward, &monitor).await;
            (monitor.from_stream(), monitor.to_stream())
        }
        (Inward::Tcp(mut tcp), tombolo_tunnel::Call::Io(mut outward)) => {
            copy_bidirectional(&mut outward, &mut tcp)
                .await
                .unwrap_or_default()
        }
        (Inward::Session(mut inward), outward) => {
            let mut outward = TunnelIo::from(outward);
            copy_bidirectional(&mut outward, &mut inward)
                .await
                .unwrap_or_default()
        }
    }
}

/// Source: ztunnel's server: 400 for what is malformed, 401 for policy, 503 for everything else.
fn status(reject: &Reject) -> StatusCode {
    match reject.class {
        RejectClass::PeerIncompatible => StatusCode::BAD_REQUEST,
        RejectClass::PolicyDenied => StatusCode::UNAUTHORIZED,
        RejectClass::Local
        | RejectClass::PeerMisbehaved
        | RejectClass::NoRoute
        | RejectClass::UpstreamUnhealthy
        | RejectClass::ControlPlaneStale
        | RejectClass::Overload => StatusCode::SERVICE_UNAVAILABLE,
    }
}
