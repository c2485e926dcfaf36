//! Reverse sessions: the way in to a host that can only dial out. It dials gateways of its network, and these open calls
//! towards it, each with the caller's own TLS inside.

use crate::{Dataplane, inbound::Inbound};
use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, time::sleep};
use tombolo_destination::{Gateway, GatewayHost};
use tombolo_identity::LiveIdentity;
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{HeldSession, Limits, Observe, OpenError, Server, SessionEnd, SessionPath, Target};

/// After a hand-over the sessions of this process take calls until those of the next one are there.
const OVERLAP: Duration = Duration::from_secs(3);
/// Calls that one session may carry: all that a gateway has for this host.
const CALLS_MAX: u32 = 1024;

/// How a session runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// QUIC: survives a change of this host's address.
    Quic,
    /// HTTP/2 over TLS over TCP.
    Tcp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        })
    }
}

/// A session that is up. It runs until it is ended, whether this is kept or not.
#[derive(Debug, Clone)]
pub struct ReverseEnd {
    /// How it runs.
    pub transport: Transport,
    /// This host's end, as it was when the session began.
    pub local: IpAddr,
    end: SessionEnd,
    path: SessionPath,
    ended: watch::Receiver<()>,
}

impl ReverseEnd {
    /// Takes no new calls; it ends with the last that runs.
    pub fn drain(&self) {
        self.end.drain();
    }

    /// Ends it at once, and every call in it.
    pub fn cut(&self) {
        self.end.cut();
    }

    /// Datagrams that have come from the gateway so far, and the round trip; none over TCP, where silence ends the session.
    pub fn heard(&self) -> Option<(u64, Duration)> {
        self.path.heard()
    }

    /// True once it has ended.
    pub fn is_ended(&self) -> bool {
        self.ended.has_changed().is_err()
    }

    /// Waits until it has ended, whoever ended it. Cancel-safe.
    pub async fn ended(&mut self) {
        while self.ended.changed().await.is_ok() {}
    }
}

/// What serves the sessions of a data path.
#[derive(Debug)]
pub(crate) struct Reverse {
    server: Server,
    inbound: Arc<Inbound>,
    tasks: TaskGroup,
}

impl fmt::Debug for Inbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbound").finish_non_exhaustive()
    }
}

impl Reverse {
    pub(crate) fn new(
        identity: &Arc<LiveIdentity>,
        inbound: &Arc<Inbound>,
        limits: Limits,
        observer: &Arc<dyn Observe>,
        tasks: &TaskGroup,
    ) -> io::Result<Self> {
        let limits = Limits {
            streams_max: CALLS_MAX,
            ..limits
        };
        let nowhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        Ok(Self {
            server: Server::new(nowhere, identity, limits, Arc::clone(observer), tasks)?,
            inbound: Arc::clone(inbound),
            tasks: tasks.clone(),
        })
    }

    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// See [`OVERLAP`].
    pub(crate) fn drain_later(&self) {
        let server = self.server.clone();
        self.tasks
            .spawn_until_stopped("drain of reverse sessions", async move {
                sleep(OVERLAP).await;
                server.drain();
            });
    }

    async fn hold(&self, target: &Target, transport: Transport) -> Result<ReverseEnd, OpenError> {
        let inbound = Arc::clone(&self.inbound);
        match transport {
            Transport::Quic => {
                let held = self.server.hold_reverse_quic(target, inbound, &self.tasks);
                Ok(self.start(held.await?, transport))
            }
            Transport::Tcp => {
                let expected = target.expected.to_vec();
                let held = self
                    .server
                    .hold_reverse(target.hbone, expected, inbound, &self.tasks);
                Ok(self.start(held.await?, transport))
            }
        }
    }

    fn start<F: Future<Output = ()> + Send + 'static>(
        &self,
        held: HeldSession<F>,
        transport: Transport,
    ) -> ReverseEnd {
        let HeldSession {
            peer,
            local,
            end,
            path,
            run,
        } = held;
        let (running, ended) = watch::channel(());
        self.tasks.spawn_until_stopped("reverse session", async move {
            run.await;
            tracing::debug!(gateway = %peer.id, "reverse session ended");
            drop(running);
        });
        ReverseEnd {
            transport,
            local: local.ip(),
            end,
            path,
            ended,
        }
    }
}

impl Dataplane {
    /// Dials a gateway and offers it the way in to this host. Cancel-safe: a session that is being made is dropped.
    ///
    /// # Errors
    /// When the gateway cannot be reached this way, is somebody else, or does not take reverse sessions.
    pub async fn hold_reverse(
        &self,
        gateway: &Gateway,
        transport: Transport,
    ) -> Result<ReverseEnd, OpenError> {
        let unreachable = |cause: String| OpenError::from(io::Error::new(io::ErrorKind::NotFound, cause));
        let port = match (transport, gateway.quic_port) {
            (Transport::Quic, Some(port)) => port,
            (Transport::Quic, None) => return Err(unreachable("the gateway serves no QUIC".to_owned())),
            (Transport::Tcp, _) => gateway.hbone_port,
        };
        let addresses = self.context.gateway_names.addresses(&gateway.address).await;
        let mut failed = match &gateway.address {
            GatewayHost::Address(address) => unreachable(address.to_string()),
            GatewayHost::Hostname(host) => {
                unreachable(format!("this host's resolver knows no address of {host}"))
            }
        };
        for &address in &*addresses {
            let target = Target {
                hbone: SocketAddr::new(address, port),
                expected: Arc::clone(&gateway.expected),
            };
            match self.reverse.hold(&target, transport).await {
                Ok(session) => return Ok(session),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }
}
