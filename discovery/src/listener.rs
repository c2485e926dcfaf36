//! The TLS listener: accepts, hands connections to the gRPC server, and keeps floods away from the private key.

use crate::{
    door::{Door, Waiting},
    forwarders::Forwarder,
    members::Place,
    nameless::{Calls, counted},
};
use rustls::ServerConfig;
use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use tombolo_identity::{LiveIdentity, Peer};
use tombolo_runtime::{TaskGroup, fair};
use tombolo_types::{SpiffeId, TrustDomain};
use tonic::transport::server::Connected;

/// Whole handshake: connect to the end of TLS.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that are through their handshake and wait for the gRPC server.
pub(crate) const ACCEPTED_MAX: usize = 64;

/// A user of this host, from the credentials of a unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalUser {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Process, if the kernel says.
    pub pid: Option<i32>,
}

/// What is known of a connection before any request; in the extensions of every request.
#[derive(Clone, Default)]
pub struct Link {
    /// Where it comes from; none on a unix socket. Behind a gateway, what that says.
    pub remote: Option<SocketAddr>,
    /// The gateway that has passed it on and said so.
    pub via: Option<Arc<Forwarder>>,
    /// The name of the trust domain that the client asked for with its server name.
    pub asked: Option<TrustDomain>,
    /// RFC 9266 exporter of the TLS session: what proofs of possession are bound to.
    pub exporter: Option<[u8; 32]>,
    /// The verified client certificate, if one of this mesh was presented.
    pub peer: Option<Arc<Peer>>,
    /// The verified certificate of another cluster's discovery: good for federation and nothing else.
    pub member: Option<Arc<Peer>>,
    /// On the admin socket.
    pub local: Option<LocalUser>,
    /// One connection too many of this member: why every call on it is refused.
    pub over: Option<Arc<str>>,
    /// What it has had, if it has shown no certificate.
    pub calls: Option<Arc<Calls>>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = self.peer.as_ref().map(|peer| peer.id.to_string());
        f.debug_struct("Link")
            .field("remote", &self.remote)
            .field("via", &self.via)
            .field("peer", &peer)
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// For the audit log: the address, or the process on this host.
    pub fn from_where(&self) -> String {
        match (&self.remote, &self.local) {
            (Some(remote), _) => {
                let shown = SocketAddr::new(remote.ip().to_canonical(), remote.port());
                match &self.via {
                    Some(gateway) => format!("{shown} through the gateway {}", gateway.address),
                    None => shown.to_string(),
                }
            }
            (None, Some(user)) => format!("local pid {}", user.pid.unwrap_or_default()),
            (None, None) => "local".into(),
        }
    }

    /// The source of the connection, where it says something about the address of a node in `network` that claims
    /// `claimed`. Behind a gateway that is only so in the gateway's own network, and for an address that the node has
    /// itself: a NAT on the way to a gateway is not where the node is called.
    pub fn source_of_node(&self, network: &str, claimed: &[IpAddr]) -> Option<IpAddr> {
        let source = self.remote?.ip().to_canonical();
        let says = match &self.via {
            None => true,
            Some(gateway) => *gateway.network == *network && claimed.contains(&source),
        };
        says.then_some(source)
    }
}

/// A connection with what is known of it.
#[derive(Debug)]
pub struct Connection<I> {
    io: I,
    link: Link,
    /// Held as long as the connection.
    _place: Option<Held>,
}

/// A place that a connection takes: among those of its member, or of those who have shown no certificate.
#[derive(Debug)]
enum Held {
    Member { _place: Place },
    Nameless { _place: fair::Place },
}

impl<I> Connection<I> {
    /// Joins the two.
    pub fn new(io: I, link: Link) -> Self {
        Self {
            io,
            link,
            _place: None,
        }
    }
}

impl<I> Connected for Connection<I> {
    type ConnectInfo = Link;
    fn connect_info(&self) -> Link {
        self.link.clone()
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Connection<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.link.calls.as_ref().is_some_and(|calls| calls.is_over()) {
            return Poll::Ready(Ok(())); // as if it had ended
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Connection<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Counters of the listener.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Connections through their handshake.
    pub accepted: AtomicU64,
    /// Closed before the handshake by a limit.
    pub limited: AtomicU64,
    /// Handshakes that failed or took too long.
    pub failed: AtomicU64,
    /// Connections whose source a gateway has named.
    pub forwarded: AtomicU64,
    /// Connections closed because somebody who is no gateway named another source.
    pub impostors: AtomicU64,
}

/// Binds. `[::]` means both families; on a host without IPv6 it means IPv4.
///
/// # Errors
/// When the address is taken or not of this host.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error)
            if address.is_ipv6()
                && address.ip().is_unspecified()
                && error.kind() != io::ErrorKind::AddrInUse =>
        {
            TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], address.port()))).await
        }
        bound => bound,
    }
}

/// What the listener presents and whom it believes.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Takes clients of this mesh and discoveries of other clusters.
    pub config: Arc<ServerConfig>,
    /// The roots of this mesh: tells the two apart.
    pub own: Arc<LiveIdentity>,
}

fn unix_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// Accepts until the group stops; connections through their handshake go to `accepted_tx`.
pub async fn run(
    listener: TcpListener,
    tls: Tls,
    door: Door,
    accepted_tx: mpsc::Sender<io::Result<Connection<TlsStream<TcpStream>>>>,
    tasks: TaskGroup,
) {
    let stop = tasks.token();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (socket, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, or a connection that was gone already: wait instead of spinning.
                tracing::debug!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some(waiting) = door.enter(remote.ip()) else {
            door.counters.limited.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let (tls, door, accepted_tx) = (tls.clone(), door.clone(), accepted_tx.clone());
        tasks.spawn_until_stopped("TLS handshake", async move {
            let shaken =
                tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(socket, remote, tls, waiting, &door)).await;
            let counters = &door.counters;
            match shaken {
                Ok(Ok(connection)) => {
                    counters.accepted.fetch_add(1, Ordering::Relaxed);
                    let _ = accepted_tx.send(Ok(connection)).await; // the server is gone: so is the connection
                }
                Ok(Err(error)) => {
                    counters.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%remote, %error, "TLS handshake failed");
                }
                Err(_) => {
                    counters.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%remote, "TLS handshake took too long");
                }
            }
        });
    }
}

async fn handshake(
    mut socket: TcpStream,
    remote: SocketAddr,
    tls: Tls,
    waiting: Waiting,
    door: &Door,
) -> io::Result<Connection<TlsStream<TcpStream>>> {
    socket.set_nodelay(true)?;
    let (remote, via, place) = door.whence(&mut socket, remote, waiting).await?;
    // The ClientHello first: whoever sends none costs no arithmetic. Nothing that others need is held while the peer is
    // waited for; how many handshakes are computed at once is the number of threads.
    let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket).await?;
    if !place.use_key(Instant::now()) {
        return Err(io::Error::new(
            io::ErrorKind::QuotaExceeded,
            "too many handshakes from this source",
        ));
    }
    let stream = start.into_stream(tls.config).await?;
    let session = stream.get_ref().1;
    let exporter = tombolo_identity::server_exporter(session).map_err(io::Error::other)?;
    let asked = session
        .server_name()
        .and_then(tombolo_identity::asked_trust_domain);
    let shown = match session.peer_certificates() {
        Some(chain) if !chain.is_empty() => Some((
            Arc::new(tombolo_identity::peer_of(chain).map_err(io::Error::other)?),
            tombolo_identity::still_trusted(&tls.own.current(), chain, unix_now()),
        )),
        _ => None,
    };
    let (peer, member) = match shown {
        None => (None, None),
        Some((peer, true)) => (Some(peer), None),
        // By a root of another cluster: its discovery may come, nobody else.
        Some((peer, false)) if peer.id == SpiffeId::discovery(peer.id.trust_domain.clone()) => {
            (None, Some(peer))
        }
        Some((peer, false)) => {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{} is of another cluster", peer.id),
            ));
        }
    };
    let full = || {
        io::Error::new(
            io::ErrorKind::QuotaExceeded,
            "too many connections without a certificate",
        )
    };
    let too_many = || {
        io::Error::new(
            io::ErrorKind::QuotaExceeded,
            "too many connections of this member",
        )
    };
    let mut over = None;
    let held = match peer.as_ref().or(member.as_ref()) {
        Some(peer) => {
            if member.is_none() {
                door.limits.has_shown(remote.ip(), Instant::now());
            }
            let place = door
                .members
                .connection(&peer.id, peer.device, remote.ip())
                .ok_or_else(too_many)?;
            over = place.over().map(Arc::from);
            Held::Member { _place: place }
        }
        None => Held::Nameless {
            _place: place.nameless().ok_or_else(full)?,
        },
    };
    let calls = matches!(held, Held::Nameless { .. }).then(counted);
    let link = Link {
        remote: Some(remote),
        via: via.map(Arc::new),
        asked,
        exporter: Some(exporter),
        peer,
        member,
        local: None,
        over,
        calls,
    };
    Ok(Connection {
        io: stream,
        link,
        _place: Some(held),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_source_says_of_a_nodes_address() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let link = |remote: &str, network: Option<&str>| Link {
            remote: Some(SocketAddr::new(ip(remote), 40_000)),
            via: network.map(|network| {
                Arc::new(Forwarder {
                    address: ip("192.0.2.9"),
                    network: network.into(),
                    device: tombolo_types::DeviceId(1),
                })
            }),
            ..Link::default()
        };
        let claimed = [ip("10.0.0.5")];
        let seen = |remote, via| link(remote, via).source_of_node("lan", &claimed);
        assert_eq!(seen("10.0.0.5", None), Some(ip("10.0.0.5")));
        assert_eq!(
            seen("::ffff:192.0.2.1", None),
            Some(ip("192.0.2.1")),
            "what it is worth is decided later"
        );
        assert_eq!(seen("10.0.0.5", Some("lan")), Some(ip("10.0.0.5")));
        assert_eq!(
            seen("10.0.0.5", Some("far")),
            None,
            "the same address in the gateway's network"
        );
        assert_eq!(
            seen("192.0.2.1", Some("lan")),
            None,
            "a NAT on the way to the gateway"
        );
        assert_eq!(link("10.0.0.5", Some("lan")).source_of_node("lan", &[]), None);
        let shown = link("192.0.2.1", Some("lan")).from_where();
        assert_eq!(shown, "192.0.2.1:40000 through the gateway 192.0.2.9");
        assert_eq!(link("192.0.2.1", None).from_where(), "192.0.2.1:40000");
    }
}
