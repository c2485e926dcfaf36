//! From a peer's CONNECT to a copied connection.

use crate::{
    context::{Context, baggage},
    flows::{Flow, Registered},
    refusal::{ended, shown},
    report::{self, Ends, Outcome},
};
use http::{Method, StatusCode};
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout},
};
use tombolo_authz::Verdict;
use tombolo_destination::{Service as MeshService, Workload};
use tombolo_identity::Peer;
use tombolo_snapshot::{Exposure, Snapshot};
use tombolo_telemetry::Direction;
use tombolo_tunnel::{Authority, Incoming, Service, TunnelStream, bidirectional};
use tombolo_types::{NamespacedName, Reject, RejectClass, ports};

/// Never delivered.
const SSH: u16 = 22;

/// Serves the CONNECT streams of peers.
pub(crate) struct Inbound {
    pub(crate) context: Arc<Context>,
}

impl Service for Inbound {
    fn admit(&self, peer: &Peer) -> bool {
        peer.device
            .is_none_or(|device| !self.context.world.peek().is_revoked(device))
    }

    fn connect(self: Arc<Self>, incoming: Incoming) -> impl Future<Output = ()> + Send {
        let context = Arc::clone(&self.context);
        // What establishing needs, the request above all, is freed before the bytes flow.
        let established = Box::pin(async move { establish(&context, incoming).await });
        async move { serve(&self.context, established).await }
    }
}

/// Where a CONNECT is delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delivery {
    /// The workload's address that was meant: policies are asked about it.
    pub(crate) address: IpAddr,
    /// The application's port.
    pub(crate) port: u16,
    /// Deliver to loopback.
    pub(crate) loopback: bool,
    /// The service, if one was named.
    pub(crate) service: Option<Arc<MeshService>>,
}

/// Status for what has no class of its own.
struct Refused {
    reject: Reject,
    status: StatusCode,
    policy: Option<NamespacedName>,
}

impl From<Reject> for Refused {
    fn from(reject: Reject) -> Self {
        let status = shown(&reject).status;
        Self {
            reject,
            status,
            policy: None,
        }
    }
}

fn stale(reason: &'static str) -> Reject {
    Reject::new(RejectClass::ControlPlaneStale, reason)
}

/// Finds where an authority is to be delivered on this host.
///
/// Source: ztunnel's order of checks, with three differences: any address of the own record may be meant (1:1 NAT), only
/// declared ports are delivered, and a name must be one of an own service. `reached`: this host's address in the
/// connection that the call came by; a workload without addresses, that only dials out, is meant by it.
pub(crate) fn delivery(
    world: &Snapshot,
    own: &Workload,
    exposure: &Exposure,
    authority: &Authority,
    reached: IpAddr,
) -> Result<Delivery, Reject> {
    let (address, port, service) = match authority {
        Authority::Address(address) => {
            let ip = address.ip().to_canonical();
            if !own.addresses.contains(&ip) {
                return Err(Reject::new(RejectClass::PeerIncompatible, "address_mismatch")
                    .with_detail(format_args!("{ip} is not an address of this workload")));
            }
            (ip, address.port(), None)
        }
        Authority::Name { host, port } => {
            let unknown = |reason| Reject::new(RejectClass::NoRoute, reason).with_detail(authority);
            let service = world
                .service_by_host(host, &own.namespace)
                .ok_or_else(|| unknown("unknown_service"))?;
            let own_ports = own
                .services
                .get(&service.key)
                .ok_or_else(|| unknown("not_an_own_service"))?;
            let mapped = own_ports
                .iter()
                .find(|map| map.service_port == *port)
                .map(|map| map.target_port);
            let target = mapped
                .or_else(|| service.port(*port).map(|map| map.target_port))
                .filter(|&target| target != 0)
                .ok_or_else(|| unknown("unknown_port"))?;
            let address = own.addresses.first().copied().unwrap_or(reached.to_canonical());
            (address, target, Some(Arc::clone(service)))
        }
    };
    let undeclared = || {
        Reject::new(RejectClass::NoRoute, "port_not_declared").with_detail(format_args!(
            "port {port} is not declared: WorkloadGroup.spec.template.ports"
        ))
    };
    // Whatever discovery declares: the host's own door stays the host's.
    if port == SSH || ports::NEVER_DELIVERED.contains(&port) {
        return Err(undeclared());
    }
    let declared = exposure.ports.iter().find(|exposed| exposed.port == port);
    let loopback = match declared {
        Some(exposed) => exposed.loopback,
        None if exposure.all_ports => false,
        None => return Err(undeclared()),
    };
    Ok(Delivery {
        address,
        port,
        loopback,
        service,
    })
}

/// The socket address of the application: loopback if so declared, else the own address that was meant, or, where that
/// is a NAT's and not this host's, the one that the peer has reached.
pub(crate) fn local_target(
    delivery: &Delivery,
    reached: IpAddr,
    is_local: impl Fn(IpAddr) -> bool,
) -> Result<SocketAddr, Reject> {
    let reached = reached.to_canonical();
    let ip = match delivery.address.to_canonical() {
        IpAddr::V4(_) if delivery.loopback => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) if delivery.loopback => Ipv6Addr::LOCALHOST.into(),
        address if address == reached || is_local(address) => address,
        IpAddr::V4(_) | IpAddr::V6(_) => reached,
    };
    // Whoever is reached at loopback has been called by this host itself; that opens nothing more.
    if ip.is_loopback() && !delivery.loopback {
        return Err(Reject::new(RejectClass::NoRoute, "loopback_not_declared"));
    }
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if link_local {
        return Err(Reject::new(RejectClass::NoRoute, "link_local_never_delivered"));
    }
    // To the kernel "any address" is loopback, too.
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    if ip.is_unspecified() || ip.is_multicast() || broadcast {
        return Err(Reject::new(RejectClass::NoRoute, "address_never_delivered"));
    }
    Ok(SocketAddr::new(ip, delivery.port))
}

/// This host's own end of a session. That of a long one over QUIC may have moved since: then it is the address that the
/// kernel would take towards the peer now.
fn still_reached(local: IpAddr, remote: SocketAddr) -> IpAddr {
    if !local.is_unspecified() && is_local(local) {
        return local;
    }
    let towards = || {
        let any = match remote {
            SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        // Nothing is sent.
        socket.connect(remote)?;
        socket.local_addr()
    };
    towards().map_or(local, |address: SocketAddr| address.ip())
}

fn is_local(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

/// A connection whose both ends are there. Kept small: it is held as long as the connection.
struct Open {
    registered: Registered,
    application: TcpStream,
    stream: TunnelStream,
    caller: Option<Arc<Workload>>,
    own: Arc<Workload>,
    target: SocketAddr,
}

async fn serve(context: &Context, established: impl Future<Output = Option<Open>>) {
    let Some(Open {
        registered,
        application,
        stream,
        caller,
        own,
        target,
    }) = established.await
    else {
        return;
    };
    let flow = &registered.flow;
    let how = bidirectional(application, stream, &flow.monitor).await;
    let (flags, reason) = ended(&how, false);
    let cut = flow.cut_reason().map(Outcome::cut);
    let outcome = cut.unwrap_or(Outcome {
        flags,
        reason,
        detail: "",
        policy: None,
    });
    let ends = Ends {
        source: caller.as_deref(),
        destination: Some(&own),
        upstream: Some(target),
        through: None,
    };
    report::log(context.access, flow, &ends, &outcome);
}

async fn establish(context: &Context, incoming: Incoming) -> Option<Open> {
    let started = Instant::now();
    let peer = Arc::clone(incoming.peer());
    let (remote, local) = (incoming.remote(), incoming.local());
    let mut destination = local;
    let mut service: Arc<str> = "".into();
    let mut registered = None;
    let decided = decide(
        context,
        &incoming,
        started,
        &mut destination,
        &mut service,
        &mut registered,
    )
    .await;
    let world = context.world.load();
    let named = (incoming.forwarded().source, incoming.forwarded_network());
    let caller = report::caller_record(&world, &context.own, &peer, remote, named).cloned();
    let refuse = |registered: Option<Registered>, refused: Refused, incoming: Incoming| {
        let Refused {
            reject,
            status,
            policy,
        } = refused;
        let flow = match &registered {
            Some(registered) => Arc::clone(&registered.flow),
            None => Arc::new(Flow::new(
                Direction::Inbound,
                remote,
                destination,
                service.clone(),
                Some(Arc::clone(&peer)),
                started,
            )),
        };
        report::count_refusal(&context.metrics, Direction::Inbound, reject.reason);
        let ends = Ends {
            source: caller.as_deref(),
            destination: world.own_workload().map(AsRef::as_ref),
            upstream: None,
            through: None,
        };
        report::log(
            context.access,
            &flow,
            &ends,
            &Outcome::refused(&reject, policy.as_ref()),
        );
        incoming.refuse(status);
    };
    let (own, delivery, target) = match decided {
        Ok(decided) => decided,
        Err(refused) => {
            refuse(registered, refused, incoming);
            return None;
        }
    };
    let application = match deliver(context, target).await {
        Ok(application) => application,
        Err(reject) => {
            refuse(registered, reject.into(), incoming);
            return None;
        }
    };
    let registered = registered?;
    let flow = &registered.flow;
    if flow.monitor.is_cut() {
        // Denied by a change while the application was being connected to.
        let policy = flow.cut_reason().and_then(|cut| cut.policy.clone());
        let reason = flow.cut_reason().map_or("cut", |cut| cut.reason);
        let reject = Reject::new(RejectClass::PolicyDenied, reason);
        let refused = Refused {
            policy,
            ..Refused::from(reject)
        };
        refuse(Some(registered), refused, incoming);
        return None;
    }
    let said = baggage(Some(&own));
    let Ok(stream) = incoming.accept(said.as_ref()) else {
        tracing::debug!(%remote, "the caller did not wait for the application");
        return None;
    };
    let labels = report::labels(
        Direction::Inbound,
        (caller.as_deref(), Some(&peer)),
        (Some(&own), None),
        delivery.service.as_deref(),
        true,
        "-",
    );
    flow.count_in(context.metrics.tcp(&labels), Arc::clone(&context.metrics));
    Some(Open {
        registered,
        application,
        stream,
        caller,
        own,
        target,
    })
}

/// Everything before the application: finds the delivery, registers, then decides.
async fn decide(
    context: &Context,
    incoming: &Incoming,
    started: Instant,
    destination: &mut SocketAddr,
    service: &mut Arc<str>,
    registered: &mut Option<Registered>,
) -> Result<(Arc<Workload>, Delivery, SocketAddr), Refused> {
    if incoming.method() != Method::CONNECT {
        return Err(Reject::new(RejectClass::PeerIncompatible, "not_connect").into());
    }
    let authority = incoming.authority().map_err(|error| {
        Reject::new(RejectClass::PeerIncompatible, "malformed_authority").with_detail(error)
    })?;
    let (world, own) = own_record(context).await?;
    let none = Exposure::default();
    let exposure = world.exposure().unwrap_or(&none);
    let mut reached = incoming.local().ip();
    if !incoming.is_tcp() {
        reached = still_reached(reached, incoming.remote());
    }
    let delivery = delivery(&world, &own, exposure, &authority, reached)?;
    *destination = SocketAddr::new(delivery.address, delivery.port);
    if let Some(named) = &delivery.service {
        *service = Arc::clone(&named.key.name);
    }
    let target = local_target(&delivery, reached, is_local)?;
    let peer = Some(Arc::clone(incoming.peer()));
    let flow = Flow::new(
        Direction::Inbound,
        incoming.remote(),
        *destination,
        Arc::clone(service),
        peer,
        started,
    );
    let flow = &registered.insert(context.flows.register(flow)).flow;
    // Registered first: a version that comes after this one decides about it again.
    let world = context.world.load();
    if !world.policies_synced() {
        return Err(stale("no_policies_received").into());
    }
    if incoming
        .peer()
        .device
        .is_some_and(|device| world.is_revoked(device))
    {
        return Err(Reject::new(RejectClass::PolicyDenied, "device_revoked").into());
    }
    match flow.decide(world.policies_for(&own).into_iter().map(|policy| &**policy)) {
        Verdict::Allow { .. } => Ok((own, delivery, target)),
        Verdict::Deny { policy, reason } => {
            let reject = Reject::new(RejectClass::PolicyDenied, reason);
            Err(Refused {
                policy,
                ..Refused::from(reject)
            })
        }
    }
}

/// This host's own record and what it may deliver; right after the start they may still be under way.
async fn own_record(context: &Context) -> Result<(Arc<Snapshot>, Arc<Workload>), Reject> {
    let complete = |world: &Snapshot| world.own_workload().is_some() && world.exposure().is_some();
    let mut world = context.world.load();
    if !complete(&world) {
        let mut changes = context.world.clone();
        let waited = timeout(context.settings.own_record_wait, async {
            while let Some(world) = changes.changed().await {
                if complete(&world) {
                    return;
                }
            }
        });
        // Too late, or never: what there is decides.
        let _ = waited.await;
        world = context.world.load();
    }
    let own = world
        .own_workload()
        .cloned()
        .ok_or_else(|| stale("own_record_missing"))?;
    Ok((world, own))
}

/// Connects to the application from mesh0's address: loopback sources pass the allow lists of many programs.
async fn deliver(context: &Context, target: SocketAddr) -> Result<TcpStream, Reject> {
    let connect = async {
        let (socket, source) = match target {
            SocketAddr::V4(_) => (TcpSocket::new_v4()?, IpAddr::from(context.plan.host_v4())),
            SocketAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::from(context.plan.host_v6())),
        };
        // Without it each connection would take a port of its own, whatever its destination.
        setsockopt(&socket, IpBindAddressNoPort, &true).map_err(io::Error::from)?;
        socket.bind(SocketAddr::new(source, 0))?;
        let stream = socket.connect(target).await?;
        stream.set_nodelay(true)?;
        Ok::<_, io::Error>(stream)
    };
    let refused = |detail: String| {
        Reject::new(RejectClass::UpstreamUnhealthy, "refused_by_application")
            .with_detail(format_args!("{target}: {detail}"))
    };
    match timeout(context.settings.application_timeout, connect).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            Err(Reject::new(RejectClass::Local, "no_mesh_address").with_detail(error))
        }
        Ok(Err(error)) => Err(refused(error.to_string())),
        Err(_) => Err(refused("no answer in time".to_owned())),
    }
}
