//! HBONE: connections between hosts as HTTP/2 CONNECT streams over mutual TLS.
//!
//! Position: layer 4, the last arrow of the data path (`… -> policy -> tunnel -> peer`). [`Pool`] opens streams to a
//! peer with an exact expected identity and reuses its connections; [`serve`] takes them and hands each CONNECT to a
//! [`Service`]; [`bidirectional`] copies between a TCP socket and a stream, keeping half-closes and resets.
//!
//! rustls makes the handshake and protects the records; this crate frames them itself, so that a record is decrypted
//! where it was read, frames of many streams leave in one write, and an idle connection owns no buffer.
//!
//! **Invariant:** no stream is opened to a peer whose certificate does not prove one of the expected identities.
//! **Invariant:** nothing here decides who may connect: the [`Service`] does.
//! **Invariant:** what a peer sends never panics; limits of time, size and number stand before every allocation.

mod buffers;
mod conn_io;
mod control;
mod copy;
mod driver;
mod driver_plain;
mod error;
mod half_open;
mod headers;
mod io;
mod observe;
mod pool;
mod quic;
mod record;
mod server;
mod stream;
mod stream_io;
mod tls;

#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod support;

/// ALPN of a reverse session: a host dials a gateway, and the gateway opens streams towards the host.
pub const ALPN_REVERSE: &[u8] = b"tombolo-reverse/1";

pub use copy::{Ended, Monitor, bidirectional};
pub use error::{OpenError, TlsError};
pub use half_open::{HalfOpen, HalfOpenPlace};
pub use headers::{Authority, Baggage, ConnectRequest, Forwarded, HeaderError, traceparent};
pub use observe::{NoObserver, Observe, Side};
pub use pool::{Admit, GatewayTarget, Pool, PoolLimits, QuicPath, ReverseSession, Target, ThroughError};
pub use quic::TakeReverse;
pub use server::{
    Call, ConnectionInfo, HeldSession, Incoming, Limits, Server, Service, SessionEnd, SessionPath, serve,
};
pub use stream::TunnelStream;
pub use stream_io::TunnelIo;
