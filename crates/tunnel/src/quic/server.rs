//! QUIC at a gateway: the calls of members, and the reverse sessions of hosts; and a host's end of such a session.

use super::{ALPN_QUIC, Link, QuicClient, QuicIo, STREAMS_MAX, frame, obey, peer, server_transport};
use crate::{
    ALPN_REVERSE, OpenError,
    control::{Control, HELD},
    driver::End,
    observe::Side,
    pool::{ReverseSession, Target},
    server::{Accepted, HeldSession, Incoming, Server, Service, SessionEnd, SessionPath, run},
    stream_io::TunnelIo,
};
use quinn::{
    Connection, Endpoint, EndpointConfig, ServerConfig, TokioRuntime,
    crypto::rustls::{HandshakeData, QuicServerConfig},
};
use std::{
    future::Future,
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};
use tokio::time::timeout;
use tombolo_identity::{Peer, hbone_server_config};
use tombolo_runtime::TaskGroup;

/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the first message of a stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes under way above which a source has to prove that it receives at its address (Retry).
const RETRY_ABOVE: usize = 64;
/// And above which it is refused.
const HANDSHAKES_MAX: usize = 1024;

/// Datagrams of connections that wait to be looked at: they do for some microseconds.
const WAITING_BYTES_MAX: u64 = 8 << 20;

/// What becomes of a reverse session.
pub type TakeReverse = dyn Fn(ReverseSession) + Send + Sync;

impl Server {
    /// Serves the same calls over QUIC at `address`, and hands reverse sessions to `reverse`. The connections are
    /// counted, rechecked, drained and cut with those over TCP. Returns where it listens.
    ///
    /// # Errors
    /// When the socket cannot be opened or TLS cannot be set up.
    pub fn listen_quic<S: Service>(
        &self,
        address: SocketAddr,
        service: &Arc<S>,
        reverse: Arc<TakeReverse>,
        tasks: &TaskGroup,
    ) -> io::Result<SocketAddr> {
        let mut tls = hbone_server_config(&self.shared.live).map_err(io::Error::other)?;
        tls.alpn_protocols = vec![ALPN_QUIC.to_vec(), ALPN_REVERSE.to_vec()];
        let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(server_transport());
        config.max_incoming(HANDSHAKES_MAX);
        config.incoming_buffer_size_total(WAITING_BYTES_MAX);
        let socket = socket(address)?;
        let endpoint = Endpoint::new(
            EndpointConfig::default(),
            Some(config),
            socket,
            Arc::new(TokioRuntime),
        )?;
        let local = endpoint.local_addr()?;
        let (server, service, group) = (self.clone(), Arc::clone(service), tasks.clone());
        tasks.spawn("quic accept", async move {
            let stop = server.shared.stop_accepting.clone();
            let accepting = accept(endpoint.clone(), server, service, reverse, group.clone());
            stop.run_until_cancelled(accepting).await;
            // Connections that run go on; nothing new is taken.
            endpoint.set_server_config(None);
            group.stopped().await;
        });
        Ok(local)
    }

    /// As [`Server::hold_reverse`], over QUIC.
    ///
    /// # Errors
    /// When the gateway does not answer over UDP, or is somebody else.
    pub async fn hold_reverse_quic<S: Service>(
        &self,
        gateway: &Target,
        service: Arc<S>,
        tasks: &TaskGroup,
    ) -> Result<HeldSession<impl Future<Output = ()> + Send + use<S>>, OpenError> {
        let admitting = Arc::clone(&service);
        let client = QuicClient::new(
            Arc::clone(&self.shared.live),
            Arc::new(move |peer: &Peer| admitting.admit(peer)),
            tasks.clone(),
        );
        let bundle_generation = self.shared.live.current().bundle_generation;
        let connection = client.dial(gateway, ALPN_REVERSE).await?;
        let peer = Arc::new(peer(&connection).map_err(OpenError::from)?);
        let local = SocketAddr::new(
            connection
                .local_ip()
                .unwrap_or(std::net::Ipv4Addr::UNSPECIFIED.into()),
            0,
        );
        let accepted = accepted(&peer, local, &connection);
        let (server, group) = (self.clone(), tasks.clone());
        let shown = Arc::clone(&peer);
        let end = SessionEnd(Arc::clone(&accepted.control));
        let path = SessionPath(Some(connection.clone()));
        let run = async move {
            // The endpoint lives as long as the session.
            let _client = client;
            let _closed = CloseOnDrop(connection.clone());
            let served = serve_reverse(
                connection.clone(),
                Arc::clone(&accepted),
                server.clone(),
                Arc::clone(&service),
                group,
            );
            let driver = drive(connection, Arc::clone(&accepted.control), served);
            run(driver, accepted, bundle_generation, &*service, &server.shared).await;
        };
        Ok(HeldSession {
            peer: shown,
            local,
            end,
            path,
            run,
        })
    }
}

/// Whoever else has a handle of the connection: it ends with what serves it.
struct CloseOnDrop(Connection);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close(super::CUT_OFF, b"");
    }
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // What the kernel's limits allow; a burst of a round trip should fit.
    let _ = socket.set_recv_buffer_size(4 << 20);
    let _ = socket.set_send_buffer_size(4 << 20);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn accepted(peer: &Arc<Peer>, local: SocketAddr, connection: &Connection) -> Arc<Accepted> {
    Arc::new(Accepted {
        peer: Arc::clone(peer),
        local,
        remote: connection.remote_address(),
        is_tcp: false,
        control: Control::new(),
    })
}

/// Runs what serves the streams beside what obeys the control.
async fn drive(connection: Connection, control: Arc<Control>, served: impl Future<Output = ()>) -> End {
    tokio::select! {
        () = served => control.set(crate::control::DRAIN),
        () = obey(&connection, &control) => {}
    }
    obey(&connection, &control).await;
    End::Http2(Ok(()))
}

async fn accept<S: Service>(
    endpoint: Endpoint,
    server: Server,
    service: Arc<S>,
    reverse: Arc<TakeReverse>,
    tasks: TaskGroup,
) {
    let shaking = Arc::new(());
    while let Some(incoming) = endpoint.accept().await {
        let under_way = Arc::strong_count(&shaking) - 1;
        if under_way > RETRY_ABOVE && !incoming.remote_address_validated() && incoming.may_retry() {
            server.shared.observer.handshake(Side::Server, "retry");
            // Fails only where may_retry() is false.
            let _ = incoming.retry();
            continue;
        }
        let remote = incoming.remote_address();
        let unproven = server.shared.half_open.enter(remote.ip());
        let (Some(unproven), true) = (unproven, under_way < HANDSHAKES_MAX) else {
            server.shared.observer.handshake(Side::Server, "limited");
            incoming.refuse();
            continue;
        };
        let (server, service, reverse) = (server.clone(), Arc::clone(&service), Arc::clone(&reverse));
        let (shaking, group) = (Arc::clone(&shaking), tasks.clone());
        tasks.spawn_until_stopped("quic connection", async move {
            let bundle_generation = server.shared.live.current().bundle_generation;
            let shaken = async {
                let connection = timeout(HANDSHAKE_TIMEOUT, incoming.accept()?).await??;
                let peer = Arc::new(peer(&connection)?);
                Ok::<_, io::Error>((connection, peer))
            };
            let shaken = shaken.await;
            drop(shaking);
            let (connection, peer) = match shaken {
                Ok(shaken) => shaken,
                Err(error) => {
                    server.shared.observer.handshake(Side::Server, "tls");
                    tracing::debug!(%remote, %error, "QUIC handshake failed");
                    return;
                }
            };
            if !service.admit(&peer) {
                server.shared.observer.handshake(Side::Server, "not_admitted");
                connection.close(super::CUT_OFF, b"");
                return;
            }
            unproven.proven();
            let reversed = protocol(&connection).as_deref() == Some(ALPN_REVERSE);
            // Whoever takes reverse sessions bounds them itself.
            let place = if reversed {
                None
            } else {
                let Ok(place) = Arc::clone(&server.shared.places).try_acquire_owned() else {
                    server.shared.observer.handshake(Side::Server, "limited");
                    connection.close(super::BYE, b"");
                    return;
                };
                Some(place)
            };
            server.shared.observer.handshake(Side::Server, "ok");
            let local = SocketAddr::new(
                connection.local_ip().unwrap_or(server.local.ip()),
                server.local.port(),
            );
            let accepted = accepted(&peer, local, &connection);
            let control = Arc::clone(&accepted.control);
            if reversed {
                control.set(HELD);
                let link = Arc::new(Link {
                    connection: connection.clone(),
                    control: Arc::clone(&control),
                    peer,
                    bundle_generation,
                });
                reverse(ReverseSession::over_quic(link));
                // The gateway opens the streams; a host that opens one is ignored.
                let driver = drive(connection, control, std::future::pending());
                run(driver, accepted, bundle_generation, &*service, &server.shared).await;
            } else {
                connection.set_max_concurrent_bi_streams(STREAMS_MAX.into());
                let served = serve(
                    connection.clone(),
                    Arc::clone(&accepted),
                    Arc::clone(&service),
                    group,
                );
                let driver = drive(connection, control, served);
                run(driver, accepted, bundle_generation, &*service, &server.shared).await;
            }
            drop(place);
        });
    }
}

fn protocol(connection: &Connection) -> Option<Vec<u8>> {
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    data.protocol
}

/// Serves calls until the peer opens no more.
async fn serve<S: Service>(
    connection: Connection,
    accepted: Arc<Accepted>,
    service: Arc<S>,
    tasks: TaskGroup,
) {
    while let Some((incoming, tasks)) = next(&connection, &accepted, &tasks).await {
        let service = Arc::clone(&service);
        tasks.spawn("quic stream", async move {
            if let Some(incoming) = incoming.await {
                service.connect(incoming).await;
            }
        });
    }
}

/// Serves each stream of a session as a connection of its own.
async fn serve_reverse<S: Service>(
    connection: Connection,
    accepted: Arc<Accepted>,
    server: Server,
    service: Arc<S>,
    tasks: TaskGroup,
) {
    while let Some((incoming, tasks)) = next(&connection, &accepted, &tasks).await {
        let (server, service) = (server.clone(), Arc::clone(&service));
        let group = tasks.clone();
        tasks.spawn("quic stream", async move {
            let Some(incoming) = incoming.await else { return };
            let ends = (incoming.local(), incoming.remote());
            if let Ok(io) = incoming.accept_io(None) {
                server.serve_nested(io, ends, service, &group).await;
            }
        });
    }
}

/// The next stream, whose first message is still to be read; `None` when no more come.
async fn next<'t>(
    connection: &Connection,
    accepted: &Arc<Accepted>,
    tasks: &'t TaskGroup,
) -> Option<(
    impl Future<Output = Option<Incoming>> + Send + use<>,
    &'t TaskGroup,
)> {
    loop {
        let (send, mut recv) = connection.accept_bi().await.ok()?;
        if accepted.control.has(crate::control::DRAIN) {
            continue; // dropped, it is reset: the peer opens it elsewhere
        }
        // QUIC bounds the number of streams already.
        let lease = accepted.control.try_lease(usize::MAX)?;
        let accepted = Arc::clone(accepted);
        let opened = async move {
            let opened = timeout(OPEN_TIMEOUT, frame::read_open(&mut recv))
                .await
                .ok()?
                .ok()?;
            let io = QuicIo::new(send, recv, lease);
            Some(Incoming::over_quic(opened, io, accepted))
        };
        return Some((opened, tasks));
    }
}

/// So that a refused or accepted stream is answered without waiting.
pub(crate) fn answer(io: &mut QuicIo, code: u16, baggage: Option<&http::HeaderValue>) -> io::Result<()> {
    use futures_util::FutureExt as _;
    // A fresh stream takes a short message at once.
    frame::write_status(&mut io.send, code, baggage)
        .now_or_never()
        .unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()))
}

impl From<QuicIo> for TunnelIo {
    fn from(io: QuicIo) -> Self {
        Self::over_quic(io)
    }
}
