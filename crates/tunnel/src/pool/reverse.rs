//! The gateway's end of a reverse session: a host has dialled, and calls are opened towards it.

use super::{Driver, Failure, Http2Client, Pool, Pooled, Shared, TRIES, nested::refuse_revoked};
use crate::{
    ALPN_REVERSE, OpenError, TlsError,
    conn_io::ConnIo,
    control::{CLOSED, CUT, Control, DRAIN},
    driver::{CONNECTION_WINDOW, FRAME_MAX, REVERSE_GATEWAY, SEND_QUEUE, STREAM_WINDOW},
    headers::ConnectRequest,
    io::{SharedIo, TlsIo},
    quic::Link,
    server::socket_options,
    stream_io::TunnelIo,
    tls::{self, HandshakeError},
};
use std::{net::SocketAddr, sync::Arc};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use tombolo_identity::{Peer, hbone_server_config, peer_of};

/// A host behind NAT that is connected. Cheap to clone; the session ends when the host or its gateway ends it.
#[derive(Clone)]
pub struct ReverseSession {
    over: Over,
    remote: SocketAddr,
}

#[derive(Clone)]
enum Over {
    Http2(Arc<Pooled>),
    Quic(Arc<Link>),
}

impl std::fmt::Debug for ReverseSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReverseSession")
            .field("peer", &self.peer().id)
            .field("remote", &self.remote)
            .finish_non_exhaustive()
    }
}

impl ReverseSession {
    pub(crate) fn over_quic(link: Arc<Link>) -> Self {
        let remote = link.connection.remote_address();
        Self {
            over: Over::Quic(link),
            remote,
        }
    }

    fn control(&self) -> &Arc<Control> {
        match &self.over {
            Over::Http2(pooled) => &pooled.control,
            Over::Quic(link) => &link.control,
        }
    }

    /// The host, as its certificate proves.
    pub fn peer(&self) -> &Arc<Peer> {
        match &self.over {
            Over::Http2(pooled) => &pooled.peer,
            Over::Quic(link) => &link.peer,
        }
    }

    /// Where it dialled from, as seen here: the address of a NAT, mostly.
    pub fn remote(&self) -> SocketAddr {
        self.remote
    }

    /// `tcp` or `quic`.
    pub fn transport(&self) -> &'static str {
        match &self.over {
            Over::Http2(_) => "tcp",
            Over::Quic(_) => "quic",
        }
    }

    /// Calls open through it now.
    pub fn streams(&self) -> usize {
        self.control().streams()
    }

    /// True once it takes no more calls.
    pub fn is_closed(&self) -> bool {
        self.control().has(CLOSED | CUT | DRAIN)
    }

    /// Ends it at once.
    pub fn cut(&self) {
        self.control().set(CUT);
    }

    /// True if both are the same session.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.control(), other.control())
    }

    /// Takes no more calls; it ends with the last that runs in it.
    pub fn drain(&self) {
        self.control().set(DRAIN);
    }

    /// Opens a stream towards the host. Cancel-safe.
    ///
    /// # Errors
    /// When the session is gone or full, the host refuses, or the deadline passes.
    pub async fn open(&self, request: &ConnectRequest, deadline: Instant) -> Result<TunnelIo, OpenError> {
        let started = Instant::now();
        let opened = async {
            let pooled = match &self.over {
                Over::Quic(link) => return link.open(request).await.map(TunnelIo::from),
                Over::Http2(pooled) => pooled,
            };
            let max = pooled.sender.current_max_send_streams().max(1);
            for _ in 0..TRIES {
                let lease = pooled.control.try_lease(max).ok_or(OpenError::Status(503))?;
                match pooled.request(lease, request).await {
                    Err(Failure::Unseen(_)) if !self.is_closed() => {}
                    opened => return opened.map(TunnelIo::from).map_err(Failure::into_error),
                }
            }
            Err(OpenError::Draining)
        };
        timeout_at(deadline, opened)
            .await
            .unwrap_or_else(|_| Err(OpenError::Timeout(started.elapsed())))
    }
}

impl Pool {
    /// Makes the handshake of a reverse session on a connection that a host has dialled. It is rechecked, drained and
    /// cut with the connections of the pool. Whether this host may hold one is the caller's to decide, by
    /// [`ReverseSession::peer`].
    ///
    /// # Errors
    /// When the handshake fails or takes longer than `connect_timeout`.
    pub async fn accept_reverse(&self, tcp: TcpStream) -> Result<ReverseSession, OpenError> {
        let limit = self.shared.limits.connect_timeout;
        timeout(limit, self.shared.shake_reverse(tcp))
            .await
            .unwrap_or(Err(OpenError::Timeout(limit)))
    }
}

impl Shared {
    async fn shake_reverse(self: &Arc<Self>, mut tcp: TcpStream) -> Result<ReverseSession, OpenError> {
        let protocol = |error: &dyn std::fmt::Display| {
            OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string())))
        };
        let remote = tcp.peer_addr()?;
        let bundle_generation = self.live.current().bundle_generation;
        let mut config = hbone_server_config(&self.live).map_err(|error| protocol(&error))?;
        config.alpn_protocols = vec![ALPN_REVERSE.to_vec()];
        socket_options(&tcp);
        let established = tls::accept(&mut tcp, tls::server_config(&config))
            .await
            .map_err(|error| match error {
                HandshakeError::Io(error) => error.into(),
                HandshakeError::Tls(error) => OpenError::Tls(error),
            })?;
        let peer = peer_of(&established.chain).map_err(|error| protocol(&error))?;
        refuse_revoked(&self.admit, &peer)?;
        let control = Control::new();
        let io = SharedIo::new(TlsIo::new(tcp, established, Arc::clone(&control)));
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_MAX)
            .max_send_buffer_size(SEND_QUEUE)
            .enable_push(false)
            .handshake(ConnIo::Tcp(io.clone()))
            .await
            .map_err(OpenError::from_h2)?;
        let pooled = Arc::new(Pooled {
            sender,
            control: Arc::clone(&control),
            peer: Arc::new(peer),
        });
        let driver = Driver::with_patience(Http2Client(connection), io, control, REVERSE_GATEWAY);
        self.run(&pooled, driver, bundle_generation);
        Ok(ReverseSession {
            over: Over::Http2(pooled),
            remote,
        })
    }
}
