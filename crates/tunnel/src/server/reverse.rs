//! The host's end of a reverse session: it dials the gateway, and then serves the streams that the gateway opens.

use super::{Accepted, Incoming, Server, ServerSide, Service, http2, run, socket_options};
use crate::{
    ALPN_REVERSE, OpenError, TlsError,
    conn_io::ConnIo,
    control::{CUT, Control, DRAIN},
    driver::{Driver, REVERSE_HOST},
    io::{SharedIo, TlsIo},
    tls::{self, HandshakeError},
};
use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{net::TcpStream, time::timeout};
use tombolo_identity::{Peer, hbone_client_config, hbone_server_name, peer_of};
use tombolo_runtime::TaskGroup;
use tombolo_types::SpiffeId;

/// Longest TCP and TLS handshake together: another gateway, or another try, is as good.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A reverse session that is up.
#[derive(Debug)]
pub struct HeldSession<F> {
    /// The gateway, as its certificate proves.
    pub peer: Arc<Peer>,
    /// Our end of the connection.
    pub local: SocketAddr,
    /// Ends it before its time.
    pub end: SessionEnd,
    /// What comes from the gateway.
    pub path: SessionPath,
    /// Serves until the session ends; dropped, the session is cut.
    pub run: F,
}

/// Ends a reverse session. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SessionEnd(pub(crate) Arc<Control>);

impl SessionEnd {
    /// Takes no new calls; it ends with the last that runs.
    pub fn drain(&self) {
        self.0.set(DRAIN);
    }

    /// Ends it at once, and every call in it.
    pub fn cut(&self) {
        self.0.set(CUT);
    }

    /// Calls that run in it.
    pub fn streams(&self) -> usize {
        self.0.streams()
    }
}

/// What comes from the gateway of a reverse session. Cheap to clone; it keeps no session alive.
#[derive(Debug, Clone)]
pub struct SessionPath(pub(crate) Option<quinn::Connection>);

impl SessionPath {
    /// Datagrams so far, and the round trip. A gateway that is there, and a way that passes UDP, bring one every second and a
    /// round trip. None over TCP: there silence ends the session by itself.
    pub fn heard(&self) -> Option<(u64, Duration)> {
        let stats = self.0.as_ref()?.stats();
        Some((stats.udp_rx.datagrams, stats.path.rtt))
    }
}

impl Server {
    /// Dials a gateway and offers it the way in to this host: what it opens is served like a connection to the HBONE
    /// listener, with the caller's own TLS inside. The gateway must prove one of `expected`.
    ///
    /// # Errors
    /// When the gateway cannot be reached, is somebody else, or does not take reverse sessions.
    pub async fn hold_reverse<S: Service>(
        &self,
        gateway: SocketAddr,
        expected: Vec<SpiffeId>,
        service: Arc<S>,
        tasks: &TaskGroup,
    ) -> Result<HeldSession<impl Future<Output = ()> + Send + use<S>>, OpenError> {
        let shaken = timeout(CONNECT_TIMEOUT, self.shake_reverse(gateway, expected));
        let (io, accepted) = shaken.await.unwrap_or(Err(OpenError::Timeout(CONNECT_TIMEOUT)))?;
        let server = self.clone();
        let routed = Arc::new(Routed {
            server: server.clone(),
            service,
            tasks: tasks.clone(),
        });
        let bundle_generation = self.shared.live.current().bundle_generation;
        let connection = http2(&self.shared.limits)
            .handshake(ConnIo::Tcp(io.clone()))
            .await
            .map_err(OpenError::from_h2)?;
        let (control, peer, local) = (
            Arc::clone(&accepted.control),
            Arc::clone(&accepted.peer),
            accepted.local,
        );
        let side = ServerSide::new(
            connection,
            &accepted,
            Arc::clone(&routed),
            tasks.clone(),
            &self.shared,
        );
        let end = SessionEnd(Arc::clone(&control));
        let driver = Driver::with_patience(side, io, control, REVERSE_HOST);
        let run = async move {
            run(driver, accepted, bundle_generation, &*routed, &server.shared).await;
        };
        Ok(HeldSession {
            peer,
            local,
            end,
            path: SessionPath(None),
            run,
        })
    }

    async fn shake_reverse(
        &self,
        gateway: SocketAddr,
        expected: Vec<SpiffeId>,
    ) -> Result<(SharedIo, Arc<Accepted>), OpenError> {
        let protocol = |error: &dyn std::fmt::Display| {
            OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string())))
        };
        if self.shared.live.current().identity.is_none() {
            return Err(OpenError::Tls(TlsError::NoIdentity));
        }
        let mut config =
            hbone_client_config(&self.shared.live, expected).map_err(|error| protocol(&error))?;
        config.alpn_protocols = vec![ALPN_REVERSE.to_vec()];
        let mut tcp = TcpStream::connect(gateway).await?;
        socket_options(&tcp);
        let established = tls::connect(&mut tcp, config, hbone_server_name())
            .await
            .map_err(|error| match error {
                HandshakeError::Io(error) => error.into(),
                HandshakeError::Tls(error) => OpenError::Tls(error),
            })?;
        let peer = peer_of(&established.chain).map_err(|error| protocol(&error))?;
        let local = tcp.local_addr()?;
        let control = Control::new();
        let accepted = Arc::new(Accepted {
            peer: Arc::new(peer),
            local,
            remote: gateway,
            is_tcp: false,
            control: Arc::clone(&control),
        });
        Ok((SharedIo::new(TlsIo::new(tcp, established, control)), accepted))
    }
}

/// Serves each stream of the session as a connection of its own.
struct Routed<S> {
    server: Server,
    service: Arc<S>,
    tasks: TaskGroup,
}

impl<S: Service> Service for Routed<S> {
    /// A revoked gateway is cut like any peer.
    fn admit(&self, peer: &Peer) -> bool {
        self.service.admit(peer)
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        // Who calls and what for is said and decided inside, where the caller proves itself.
        let ends = (incoming.local(), incoming.remote());
        let Ok(stream) = incoming.accept(None) else {
            return; // reset meanwhile
        };
        self.server
            .serve_nested(stream.into(), ends, Arc::clone(&self.service), &self.tasks)
            .await;
    }
}
