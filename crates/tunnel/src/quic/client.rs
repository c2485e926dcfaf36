//! Connections to gateways over QUIC: one for each, shared by all calls.

use super::{ALPN_QUIC, QuicIo, caller_transport, frame, obey, peer, reverse_transport};
use crate::{
    ALPN_REVERSE, OpenError, TlsError,
    control::{CLOSED, CUT, Control, DRAIN},
    headers::ConnectRequest,
    pool::{Admit, Target},
};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, crypto::rustls::QuicClientConfig};
use std::{
    collections::HashMap,
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};
use tokio::{sync::OnceCell, time::timeout};
use tombolo_identity::{LiveIdentity, Peer, hbone_client_config};
use tombolo_runtime::TaskGroup;

/// Longest handshake: where UDP is dropped nothing comes back, and TCP is waiting.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Streams of one connection.
const STREAMS_MAX: usize = 1000;
/// A peer that is there acknowledges within a round trip. One from which nothing at all comes for so long, after it was
/// asked something, is gone, or UDP is dropped on the way now.
const SILENCE: Duration = Duration::from_millis(1500);

/// A connection and who is at its other end.
pub(crate) struct Link {
    pub(crate) connection: Connection,
    pub(crate) control: Arc<Control>,
    pub(crate) peer: Arc<Peer>,
    pub(crate) bundle_generation: u64,
}

impl Link {
    pub(crate) fn is_closed(&self) -> bool {
        self.control.has(CLOSED | CUT)
    }

    /// True if streams may be opened on it.
    fn is_usable(&self) -> bool {
        !self.control.has(CLOSED | CUT | DRAIN)
    }

    /// Opens a stream. Cancel-safe: the stream is reset. [`OpenError::Timeout`]: the peer is silent, not slow.
    pub(crate) async fn open(&self, request: &ConnectRequest) -> Result<QuicIo, OpenError> {
        let lease = self
            .control
            .try_lease(STREAMS_MAX)
            .ok_or(OpenError::Status(503))?;
        let (send, recv) = self.connection.open_bi().await.map_err(|error| lost(&error))?;
        let mut io = QuicIo::new(send, recv, lease);
        let status = {
            let asked = async {
                frame::write_open(&mut io.send, request).await?;
                frame::read_status(&mut io.recv).await
            };
            tokio::pin!(asked);
            let mut heard = self.connection.stats().udp_rx.datagrams;
            loop {
                if let Ok(status) = timeout(SILENCE, &mut asked).await {
                    break status?;
                }
                let now = self.connection.stats().udp_rx.datagrams;
                if now == heard {
                    return Err(OpenError::Timeout(SILENCE));
                }
                heard = now;
            }
        };
        match status {
            200 => Ok(io),
            code => Err(OpenError::Status(code)),
        }
    }
}

/// Why a connection ended, as the caller is told.
pub(crate) fn lost(error: &ConnectionError) -> OpenError {
    match error {
        ConnectionError::TimedOut => OpenError::Timeout(CONNECT_TIMEOUT),
        // A failed handshake: quinn keeps the text alone.
        ConnectionError::TransportError(error) => {
            OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string())))
        }
        ConnectionError::ConnectionClosed(close) => {
            OpenError::Tls(TlsError::Protocol(rustls::Error::General(close.to_string())))
        }
        ConnectionError::VersionMismatch
        | ConnectionError::ApplicationClosed(_)
        | ConnectionError::Reset
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => {
            std::io::Error::new(std::io::ErrorKind::ConnectionReset, error.to_string()).into()
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    target: Target,
    certificate_generation: u64,
    bundle_generation: u64,
}

type Cell = Arc<OnceCell<Arc<Link>>>;

/// Opens connections and keeps them.
pub(crate) struct QuicClient {
    live: Arc<LiveIdentity>,
    admit: Arc<Admit>,
    tasks: TaskGroup,
    v4: OnceLock<Option<Endpoint>>,
    v6: OnceLock<Option<Endpoint>>,
    links: Mutex<HashMap<Key, Cell>>,
}

impl fmt::Debug for QuicClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuicClient").finish_non_exhaustive()
    }
}

impl QuicClient {
    pub(crate) fn new(live: Arc<LiveIdentity>, admit: Arc<Admit>, tasks: TaskGroup) -> Self {
        Self {
            live,
            admit,
            tasks,
            v4: OnceLock::new(),
            v6: OnceLock::new(),
            links: Mutex::default(),
        }
    }

    fn links(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Cell>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections that are there.
    pub(crate) fn all(&self) -> Vec<Arc<Link>> {
        self.links()
            .values()
            .filter_map(|cell| cell.get().cloned())
            .collect()
    }

    /// Forgets connections that ended, or were made under a certificate or bundle that is not in force any more: those
    /// end with their last stream.
    pub(crate) fn sweep(&self) {
        let current = self.live.current();
        self.links().retain(|key, cell| {
            let present = key.certificate_generation == current.certificate_generation
                && key.bundle_generation == current.bundle_generation;
            match cell.get() {
                Some(link) if !present => {
                    link.control.set(DRAIN);
                    false
                }
                Some(link) => !link.is_closed(),
                None => present,
            }
        });
    }

    fn key(&self, target: &Target) -> Key {
        let current = self.live.current();
        Key {
            target: target.clone(),
            certificate_generation: current.certificate_generation,
            bundle_generation: current.bundle_generation,
        }
    }

    /// The connection to a gateway, if it is there.
    pub(crate) fn ready(&self, target: &Target) -> Option<Arc<Link>> {
        let links = self.links();
        let link = links.get(&self.key(target))?.get()?;
        link.is_usable().then(|| Arc::clone(link))
    }

    /// The connection to a gateway; at most one is being made at a time.
    pub(crate) async fn link(&self, target: &Target) -> Result<Arc<Link>, OpenError> {
        let key = self.key(target);
        let bundle_generation = key.bundle_generation;
        let cell = {
            let mut links = self.links();
            let cell = links.entry(key).or_default();
            if cell.get().is_some_and(|link| !link.is_usable()) {
                *cell = Cell::default();
            }
            Arc::clone(cell)
        };
        cell.get_or_try_init(|| self.connect(target, bundle_generation))
            .await
            .cloned()
    }

    async fn connect(&self, target: &Target, bundle_generation: u64) -> Result<Arc<Link>, OpenError> {
        let protocol = |error: &dyn fmt::Display| {
            OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string())))
        };
        if self.live.current().identity.is_none() {
            return Err(OpenError::Tls(TlsError::NoIdentity));
        }
        let connection = self.dial(target, ALPN_QUIC).await?;
        let peer = peer(&connection).map_err(|error| protocol(&error))?;
        crate::pool::refuse_revoked(&self.admit, &peer)?;
        let link = Arc::new(Link {
            connection,
            control: Control::new(),
            peer: Arc::new(peer),
            bundle_generation,
        });
        let watched = Arc::clone(&link);
        self.tasks.spawn_until_stopped("quic connection", async move {
            obey(&watched.connection, &watched.control).await;
            tracing::debug!(peer = %watched.peer.id, reason = ?watched.connection.close_reason(), "QUIC connection ended");
        });
        Ok(link)
    }

    /// Makes a connection with an ALPN of ours.
    pub(crate) async fn dial(&self, target: &Target, alpn: &[u8]) -> Result<Connection, OpenError> {
        let protocol = |error: &dyn fmt::Display| {
            OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string())))
        };
        let mut tls =
            hbone_client_config(&self.live, target.expected.to_vec()).map_err(|error| protocol(&error))?;
        tls.alpn_protocols = vec![alpn.to_vec()];
        let crypto = QuicClientConfig::try_from(tls).map_err(|error| protocol(&error))?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(if alpn == ALPN_REVERSE {
            reverse_transport()
        } else {
            caller_transport()
        });
        let endpoint = self.endpoint(target.hbone)?;
        // No name is sent; the verifier looks at the identity.
        let connecting = endpoint
            .connect_with(config, target.hbone, "gateway.invalid")
            .map_err(|error| protocol(&error))?;
        match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(connected) => connected.map_err(|error| lost(&error)),
            Err(_) => Err(OpenError::Timeout(CONNECT_TIMEOUT)),
        }
    }

    fn endpoint(&self, remote: SocketAddr) -> Result<&Endpoint, OpenError> {
        let (cell, local): (_, SocketAddr) = match remote {
            SocketAddr::V4(_) => (&self.v4, (Ipv4Addr::UNSPECIFIED, 0).into()),
            SocketAddr::V6(_) => (&self.v6, (Ipv6Addr::UNSPECIFIED, 0).into()),
        };
        cell.get_or_init(|| match Endpoint::client(local) {
            Ok(endpoint) => Some(endpoint),
            Err(error) => {
                tracing::warn!(%error, %local, "no QUIC from this host");
                None
            }
        })
        .as_ref()
        .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::Unsupported).into())
    }
}
