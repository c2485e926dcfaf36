//! The calls of members: from an outer CONNECT to bytes between caller and endpoint, which the gateway cannot read.

use crate::{
    balance::{Balance, Open, Pick},
    budget::Budget,
    guests::{Guest, Guests},
    metrics::Metrics,
    pass::{Inward, pass},
    route::{Call, Endpoint, Known, Reach, Refused, Role, route},
    sessions::Sessions,
};
use http::{Method, StatusCode};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tombolo_identity::Peer;
use tombolo_runtime::Reader;
use tombolo_snapshot::Snapshot;
use tombolo_tunnel::{Authority, ConnectRequest, Incoming, Monitor, OpenError, Service, TunnelIo};
use tombolo_types::{DeviceId, NamespacedName, Reject, RejectClass};

/// For one endpoint: in its own network it answers at once or not at all.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// For one that has failed lately: the caller who finds out whether it is back does not pay much for it.
const TRIAL_TIMEOUT: Duration = Duration::from_millis(500);
/// For a host by its session. One that is silent over QUIC is noticed by both ends within 1.8 s, and comes back over TCP;
/// callers try another gateway after 2.5 s.
const SESSION_TIMEOUT: Duration = Duration::from_millis(2300);
/// For all of them together; the caller gives up after 10 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(8);
/// Endpoints that are tried for one call.
const TRIES: usize = 3;
/// Source: Istio's waypoints and gateways.
const ROLE: &str = "x-istio-source";

/// Serves the outer CONNECT streams.
#[derive(Debug)]
pub(crate) struct Calls {
    pub(crate) world: Reader<Snapshot>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) log_all: bool,
    pub(crate) balance: Arc<Balance>,
    pub(crate) guests: Arc<Guests>,
    budget: Arc<Budget>,
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
        self.metrics.transport(incoming.transport());
        let started = Instant::now();
        let peer = Arc::clone(incoming.peer());
        let remote = incoming.remote();
        let outcome = self.serve(incoming).await;
        self.metrics.open.dec();
        self.report(&peer, remote, started, &outcome);
    }
}

/// What became of a call.
struct Done {
    service: String,
    endpoint: Option<Arc<str>>,
    bytes: (u64, u64),
    refused: Option<Refused>,
    /// Of a caller of another trust domain.
    guest: Option<Guest>,
}

impl Calls {
    pub(crate) fn new(
        world: Reader<Snapshot>,
        sessions: Arc<Sessions>,
        metrics: Arc<Metrics>,
        budget: Arc<Budget>,
        log_all: bool,
    ) -> Self {
        Self {
            world,
            sessions,
            metrics,
            log_all,
            balance: Arc::default(),
            guests: Arc::default(),
            budget,
        }
    }

    async fn serve(&self, incoming: Incoming) -> Done {
        let mut done = Done {
            service: String::new(),
            endpoint: None,
            bytes: (0, 0),
            refused: None,
            guest: None,
        };
        let _place = match self.budget.enter(incoming.peer()) {
            Ok(place) => place,
            Err(reject) => {
                self.metrics.over(reject.reason, 1);
                incoming.refuse(status(&reject));
                done.refused = Some(reject.into());
                return done;
            }
        };
        match self.reach(&incoming, &mut done).await {
            Ok((inward, _open)) => {
                let Ok(outward) = incoming.accept_call(None) else {
                    done.refused = Some(Reject::new(RejectClass::UpstreamUnhealthy, "caller_gone").into());
                    return done;
                };
                let withdrawn = async {
                    match &done.guest {
                        Some(guest) => guest.withdrawn().await,
                        None => std::future::pending().await,
                    }
                };
                let monitor = Monitor::default();
                tokio::select! {
                    () = pass(inward, outward, &monitor) => {}
                    () = withdrawn => {
                        done.refused = Some(Reject::new(RejectClass::NoRoute, "export_withdrawn").into());
                    }
                }
                done.bytes = (monitor.from_stream(), monitor.to_stream());
            }
            Err(refused) => {
                incoming.refuse(status(&refused.reject));
                done.refused = Some(refused);
            }
        }
        done
    }

    /// Everything before the answer: route, policy, and an endpoint that takes the connection.
    async fn reach(&self, incoming: &Incoming, done: &mut Done) -> Result<(Inward, Open), Refused> {
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
                role: incoming
                    .headers()
                    .get(ROLE)
                    .map_or_else(Role::default, |role| Role::of(role.as_bytes())),
            };
            route(&world, &call, self)?
        };
        done.service = found.service.hostname.to_string();
        if !self.world.peek().is_own(&incoming.peer().id.trust_domain) {
            let key = &found.service.key;
            done.guest = Some(self.guests.enter(key));
            // It may have been withdrawn in between.
            if !self.is_exported(key) {
                return Err(Reject::new(RejectClass::NoRoute, "unknown_service")
                    .with_detail(&authority)
                    .into());
            }
        }
        let _dial = self
            .budget
            .dial()
            .inspect_err(|reject| self.metrics.over(reject.reason, 1))?;
        let began = Instant::now();
        let deadline = began + CALL_TIMEOUT;
        let mut last = None;
        let mut picks = self.balance.order(found.endpoints, began);
        picks.truncate(TRIES);
        let mut left = picks.len();
        for Pick { endpoint, trial } in picks {
            left -= 1;
            let uid = Arc::clone(&endpoint.workload.uid);
            let open = self.balance.open(&uid);
            let patience = match endpoint.reach {
                Reach::Session(_) => SESSION_TIMEOUT,
                Reach::Dial(_) if trial && left > 0 => TRIAL_TIMEOUT,
                Reach::Dial(_) => DIAL_TIMEOUT,
            };
            let by = deadline.min(Instant::now() + patience);
            match self.dial(&endpoint, &authority, by).await {
                Ok(inward) => {
                    self.balance.succeeded(&uid, Instant::now());
                    done.endpoint = Some(uid);
                    return Ok((inward, open));
                }
                Err(error) => {
                    self.balance.failed(&uid, Instant::now());
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
                let request = ConnectRequest::new(authority.clone());
                let called = timeout_at(by, self.call_in_session(device, &request, by));
                called.await?.map(Inward::Session)
            }
        }
    }

    /// By the newest session, and by the next one as soon as it comes: a host whose session is silent makes another one.
    /// Nothing of the call was said yet but where it is for, so that it can be asked twice.
    async fn call_in_session(
        &self,
        device: DeviceId,
        request: &ConnectRequest,
        by: Instant,
    ) -> io::Result<TunnelIo> {
        let mut session = self
            .sessions
            .get(device, &[])
            .ok_or(io::ErrorKind::NotConnected)?;
        let mut tried = vec![session.clone()];
        loop {
            let opened = tokio::select! {
                opened = session.open(request, by) => opened,
                newer = self.sessions.newer(device, &session) => {
                    tried.push(newer.clone());
                    session = newer;
                    continue;
                }
            };
            match opened {
                Ok(stream) => return Ok(stream),
                Err(error @ OpenError::Status(_)) => return Err(io::Error::other(error)),
                Err(error) => {
                    tracing::debug!(%device, transport = session.transport(), %error, "not by this session");
                    session = self.sessions.next(device, &tried).await;
                    tried.push(session.clone());
                }
            }
        }
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
