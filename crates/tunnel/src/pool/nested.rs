//! Calls into another network: a pooled connection to a gateway, and inside one of its streams the caller's own TLS to
//! the endpoint, which the gateway cannot read.

use super::{
    Admit, Failure, HEADER_LIST_MAX, Http2Client, Pool, Pooled, Running, Shared, Target, lock, log_end,
};
use crate::{
    OpenError, TlsError, TunnelStream,
    conn_io::ConnIo,
    control::{CUT, Control, DRAIN},
    driver::{CONNECTION_WINDOW, FRAME_MAX, SEND_QUEUE, STREAM_WINDOW},
    driver_plain::PlainDriver,
    headers::ConnectRequest,
    observe::Side,
    quic::Link,
    stream_io::TunnelIo,
};
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tombolo_identity::{hbone_client_config, hbone_server_name, peer_of};
use tombolo_types::SpiffeId;

/// Why a call through a gateway was not opened: the gateway's part and the endpoint's part have different remedies.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ThroughError {
    /// No connection to the gateway, or it refused the call. Another gateway may do.
    #[error("gateway: {0}")]
    Gateway(OpenError),
    /// The endpoint behind it refused, or is not whom the service names.
    #[error("{0}")]
    Endpoint(OpenError),
}

impl ThroughError {
    /// The error, whoever it came from.
    pub fn into_inner(self) -> OpenError {
        match self {
            Self::Gateway(error) | Self::Endpoint(error) => error,
        }
    }
}

/// A gateway and the ways to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayTarget {
    /// HBONE over TCP, and who it must be.
    pub tcp: Target,
    /// Where it takes QUIC, if it does.
    pub quic: Option<SocketAddr>,
}

/// Gateways remembered so; over it those whose time is over are forgotten.
const NO_UDP_MAX: usize = 1024;
/// So long the first call to a gateway waits for QUIC before it takes TCP: three round trips of 300 ms. The connection is
/// made all the same, for later calls.
const HEAD_START: Duration = Duration::from_secs(1);

impl Pool {
    /// Opens a stream to a service in another network: CONNECT of `outer` at the gateway (over QUIC where it and
    /// the path have it), TLS to one of `expected` inside it, CONNECT of `inner` there. The connection to the gateway is pooled, the inner one serves this stream
    /// alone. Revocations and changes of roots cut both.
    ///
    /// Cancel-safe: what was begun is dropped.
    ///
    /// Source: ztunnel (double HBONE).
    ///
    /// # Errors
    /// [`ThroughError`], when any of the steps fails or the deadline passes.
    pub async fn open_through(
        &self,
        gateway: &GatewayTarget,
        outer: &ConnectRequest,
        expected: &[SpiffeId],
        inner: &ConnectRequest,
        deadline: Instant,
    ) -> Result<TunnelStream, ThroughError> {
        let started = Instant::now();
        let stream = self
            .reach(gateway, outer, deadline)
            .await
            .map_err(ThroughError::Gateway)?;
        let nested = self.shared.nest(stream, expected, inner);
        timeout_at(deadline, nested)
            .await
            .unwrap_or_else(|_| Err(OpenError::Timeout(started.elapsed())))
            .map_err(ThroughError::Endpoint)
    }
}

impl Pool {
    async fn reach(
        &self,
        gateway: &GatewayTarget,
        request: &ConnectRequest,
        deadline: Instant,
    ) -> Result<TunnelIo, OpenError> {
        let mut silent = None;
        if let Some(quic) = gateway.quic {
            let target = Target {
                hbone: quic,
                expected: Arc::clone(&gateway.tcp.expected),
            };
            if let Some(link) = self.shared.over_udp(&target, deadline).await {
                let started = Instant::now();
                match timeout_at(deadline, link.open(request)).await {
                    Ok(Ok(io)) => return Ok(io.into()),
                    // The gateway has answered: TCP would bring the same answer.
                    Ok(Err(error @ OpenError::Status(_))) => return Err(error),
                    Ok(Err(error)) => {
                        tracing::debug!(gateway = %quic, %error, "not over QUIC");
                        // What runs goes on: the silence may end, for example with a change of address.
                        link.control.set(DRAIN);
                        if matches!(error, OpenError::Timeout(_)) {
                            self.shared.no_udp(quic);
                            silent = Some((link.connection.stats().udp_rx.datagrams, link));
                        }
                    }
                    // It is there, and slow.
                    Err(_) => return Err(OpenError::Timeout(started.elapsed())),
                }
            }
        }
        let opened = self.open(&gateway.tcp, request, deadline).await;
        if let (Err(OpenError::Timeout(_) | OpenError::Io(_)), Some((heard, link))) = (&opened, silent)
            && link.connection.stats().udp_rx.datagrams == heard
        {
            // Silent on both ways: it is gone, and applications learn of it now.
            tracing::info!(gateway = %gateway.tcp.hbone, "connection cut: the gateway is silent");
            link.control.set(CUT);
        }
        opened.map(TunnelIo::from)
    }
}

impl Shared {
    /// The connection over QUIC, if it is there or comes soon. Where UDP is dropped one call waits for it; once known,
    /// it is tried again beside the calls and none waits.
    async fn over_udp(self: &Arc<Self>, target: &Target, deadline: Instant) -> Option<Arc<Link>> {
        if self.draining.load(Ordering::Acquire) {
            return None;
        }
        if let Some(link) = self.quic.ready(target) {
            return Some(link);
        }
        let now = Instant::now();
        let patience = {
            let mut silent = lock(&self.no_udp);
            if silent.len() >= NO_UDP_MAX {
                silent.retain(|_, until| *until > now);
            }
            match silent.get_mut(&target.hbone) {
                Some(until) if *until > now => return None,
                Some(until) => {
                    *until = now + self.limits.udp_retry;
                    Duration::ZERO
                }
                None => HEAD_START,
            }
        };
        let (shared, wanted) = (Arc::clone(self), target.clone());
        let connecting = self.tasks.spawn_until_stopped("quic connect", async move {
            match shared.quic.link(&wanted).await {
                Ok(link) => {
                    lock(&shared.no_udp).remove(&wanted.hbone);
                    Some(link)
                }
                Err(error) => {
                    tracing::debug!(gateway = %wanted.hbone, %error, "not over QUIC");
                    shared.no_udp(wanted.hbone);
                    None
                }
            }
        });
        match timeout_at(deadline.min(now + patience), connecting).await {
            Ok(connected) => connected.ok()??,
            Err(_) => {
                // The next calls do not wait for it; it says itself when it is there.
                self.no_udp(target.hbone);
                None
            }
        }
    }

    fn no_udp(&self, gateway: SocketAddr) {
        lock(&self.no_udp).insert(gateway, Instant::now() + self.limits.udp_retry);
    }

    async fn nest(
        self: &Arc<Self>,
        stream: TunnelIo,
        expected: &[SpiffeId],
        request: &ConnectRequest,
    ) -> Result<TunnelStream, OpenError> {
        let bundle_generation = self.live.current().bundle_generation;
        let config = hbone_client_config(&self.live, expected.to_vec())
            .map_err(|error| OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string()))))?;
        let connector = TlsConnector::from(Arc::new(config));
        let tls = connector
            .connect(hbone_server_name(), stream)
            .await
            .map_err(tls_error)?;
        let peer = peer_of(tls.get_ref().1.peer_certificates().unwrap_or_default())
            .map_err(|error| OpenError::Tls(TlsError::Protocol(rustls::Error::General(error.to_string()))))?;
        refuse_revoked(&self.admit, &peer)?;
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_MAX)
            .max_header_list_size(HEADER_LIST_MAX)
            .max_send_buffer_size(SEND_QUEUE)
            .enable_push(false)
            .handshake(ConnIo::Nested(Box::new(tls)))
            .await
            .map_err(OpenError::from_h2)?;
        let control = Control::new();
        let pooled = Arc::new(Pooled {
            sender,
            control: Arc::clone(&control),
            peer: Arc::new(peer),
        });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let peer = Arc::clone(&pooled.peer);
        lock(&self.running).insert(
            id,
            Running {
                control: Arc::clone(&control),
                peer: Arc::clone(&peer),
                bundle_generation,
            },
        );
        // Registered first, looked at second, as with any connection.
        if !(self.admit)(&peer) {
            control.set(CUT);
        }
        self.observer.connections(Side::Client, 1);
        let shared = Arc::clone(self);
        let driver = PlainDriver::new(Http2Client(connection), Arc::clone(&control));
        self.tasks.spawn("nested hbone connection", async move {
            let end = driver.await;
            lock(&shared.running).remove(&id);
            shared.observer.connections(Side::Client, -1);
            log_end(Side::Client, &peer, &end);
        });
        let lease = control.try_lease(1).ok_or(OpenError::Draining)?;
        // Dropping the one sender afterwards lets the connection end with its stream.
        pooled.request(lease, request).await.map_err(Failure::into_error)
    }
}

pub(crate) fn refuse_revoked(admit: &Arc<Admit>, peer: &tombolo_identity::Peer) -> Result<(), OpenError> {
    if admit(peer) {
        return Ok(());
    }
    Err(OpenError::Tls(TlsError::Protocol(
        rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked),
    )))
}

/// Of rustls behind an interface that wraps its errors.
fn tls_error(error: io::Error) -> OpenError {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls.cloned() {
        Some(tls) => OpenError::Tls(tls.into()),
        None => error.into(),
    }
}
