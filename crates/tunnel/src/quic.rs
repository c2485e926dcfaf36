//! The same streams over QUIC, between networks: no head-of-line blocking between calls, our congestion control, and a
//! connection that survives a change of address.
//!
//! Identity rules are HBONE's: the same certificates, the same verifiers, other ALPNs.

mod client;
mod controller;
mod frame;
mod server;

pub(crate) use client::{Link, QuicClient};
pub(crate) use frame::Opened;
pub use server::TakeReverse;
pub(crate) use server::answer;

use crate::control::{CLOSED, CUT, Control, DRAIN, Lease};
use quinn::{Connection, RecvStream, SendStream, TransportConfig, VarInt};
use rustls_pki_types::CertificateDer;
use std::{
    fmt,
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::sleep,
};
use tombolo_identity::{Peer, peer_of};

/// ALPN of calls.
pub(crate) const ALPN_QUIC: &[u8] = b"tombolo/1";
/// A silent peer is dead after so long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Keeps the NAT's entry alive.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Window of a stream: 300 Mbit/s at 50 ms are 1.9 MB, and with losses a stream waits up to three more round trips for
/// what it lacks. The connection's window bounds the memory.
const STREAM_WINDOW: u32 = 8 * 1024 * 1024;
/// Window of a connection, and most unacknowledged data.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// Streams that a peer may open.
const STREAMS_MAX: u32 = 1024;
/// Of them those that a peer may open before a server knows what its connection is for: callers then get all, hosts that hold a
/// reverse session open none. quinn has a place for each from the start, 87 KiB for 1,024 of which thousands of sessions would
/// pay for nothing. More than callers begin with in the round trip that it takes to tell them.
const STREAMS_FIRST: u32 = 32;
const _: () = assert!(STREAMS_FIRST <= STREAMS_MAX);
/// Application error codes.
const BYE: VarInt = VarInt::from_u32(0);
const CUT_OFF: VarInt = VarInt::from_u32(1);
/// A stream that one end has given up.
pub(crate) const STREAM_RESET: VarInt = VarInt::from_u32(8);

/// Of a host's reverse session: nobody can call the host while it believes in a session that is dead.
const REVERSE_IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// Of a host's reverse session.
const REVERSE_KEEPALIVE: Duration = Duration::from_secs(1);

/// Of a gateway.
fn server_transport() -> Arc<TransportConfig> {
    Arc::new(transport_with(KEEPALIVE, IDLE_TIMEOUT, STREAMS_FIRST))
}

/// Of a caller: nobody opens streams towards it.
fn caller_transport() -> Arc<TransportConfig> {
    Arc::new(transport_with(KEEPALIVE, IDLE_TIMEOUT, 0))
}

/// Of a host that holds a reverse session.
fn reverse_transport() -> Arc<TransportConfig> {
    Arc::new(transport_with(
        REVERSE_KEEPALIVE,
        REVERSE_IDLE_TIMEOUT,
        STREAMS_MAX,
    ))
}

fn transport_with(keepalive: Duration, idle_timeout: Duration, streams: u32) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .keep_alive_interval(Some(keepalive))
        .max_idle_timeout(idle_timeout.try_into().ok())
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(CONNECTION_WINDOW.into())
        .max_concurrent_bidi_streams(streams.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(controller::CappedBbr));
    transport
}

/// Who is at the other end, as its certificate proves.
fn peer(connection: &Connection) -> io::Result<Peer> {
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or_else(|| io::Error::other("the peer has shown no certificate"))?;
    peer_of(&chain).map_err(io::Error::other)
}

/// Before a connection is closed for good: what the peer was told last may have to be sent again.
fn farewell(connection: &Connection) -> Duration {
    (3 * connection.rtt()).clamp(Duration::from_millis(50), Duration::from_secs(1))
}

/// Waits for a flag of the control, and obeys. Returns when the connection has ended.
async fn obey(connection: &Connection, control: &Control) {
    let told = poll_fn(|cx: &mut Context<'_>| {
        control.register(cx);
        if control.has(CUT) {
            return Poll::Ready(CUT_OFF);
        }
        // What runs goes on.
        if control.has(DRAIN) && control.streams() == 0 {
            return Poll::Ready(BYE);
        }
        Poll::Pending
    });
    tokio::select! {
        code = told => {
            if code == BYE {
                sleep(farewell(connection)).await;
            }
            connection.close(code, b"");
        }
        _ = connection.closed() => {}
    }
    control.set(CLOSED);
}

/// A stream of a QUIC connection as bytes.
#[derive(Debug)]
pub(crate) struct QuicIo {
    send: SendStream,
    recv: RecvStream,
    finished: bool,
    acknowledged: Option<Acknowledged>,
    _lease: Lease,
}

/// The peer has all that was written, or wants no more of it.
struct Acknowledged(Pin<Box<dyn Future<Output = ()> + Send + Sync>>);

impl fmt::Debug for Acknowledged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Acknowledged")
    }
}

impl QuicIo {
    pub(crate) fn new(send: SendStream, recv: RecvStream, lease: Lease) -> Self {
        Self {
            send,
            recv,
            finished: false,
            acknowledged: None,
            _lease: lease,
        }
    }

    /// Ends our direction: what was written still arrives.
    pub(crate) fn end(mut self) {
        self.finished = true;
        // It fails only for a stream that is closed already.
        let _ = self.send.finish();
    }
}

impl AsyncRead for QuicIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.recv), cx, buffer)
    }
}

impl AsyncWrite for QuicIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.send), cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ready when the peer has it all: a connection that drains is closed after its last stream, whatever it has not sent yet.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.finished {
            self.finished = true;
            // It fails only for a stream that is closed already.
            let _ = self.send.finish();
            let stopped = self.send.stopped();
            self.acknowledged = Some(Acknowledged(Box::pin(async move { drop(stopped.await) })));
        }
        if let Some(acknowledged) = &mut self.acknowledged {
            ready!(acknowledged.0.as_mut().poll(cx));
            self.acknowledged = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for QuicIo {
    fn drop(&mut self) {
        // quinn would finish a stream that is dropped: to the peer an end that never came must be a reset.
        if !self.finished {
            let _ = self.send.reset(STREAM_RESET);
        }
        let _ = self.recv.stop(STREAM_RESET);
    }
}
