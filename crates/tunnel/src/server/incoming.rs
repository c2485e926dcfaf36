use crate::{
    control::Control,
    headers::{Authority, Baggage, FORWARDED_NETWORK, Forwarded, HeaderError, TRACEPARENT},
    quic::{Opened, QuicIo, answer},
    stream::TunnelStream,
    stream_io::TunnelIo,
};
use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use std::{net::SocketAddr, sync::Arc};
use tombolo_identity::Peer;

/// A request on a stream, not answered yet. Dropped, the stream is reset.
#[derive(Debug)]
pub struct Incoming {
    asked: Asked,
    connection: Arc<Accepted>,
}

/// How it came.
#[derive(Debug)]
enum Asked {
    Http2 {
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
    },
    Quic {
        opened: Opened,
        io: QuicIo,
    },
}

/// An accepted call.
#[derive(Debug)]
pub enum Call {
    /// Over HTTP/2: [`crate::bidirectional`] copies it to and from a socket.
    Stream(TunnelStream),
    /// Over QUIC.
    Io(TunnelIo),
}

/// A connection that was accepted.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) peer: Arc<Peer>,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    /// It is a TCP connection by itself: `local` is an address of this host for as long as it lives.
    pub(crate) is_tcp: bool,
    pub(crate) control: Arc<Control>,
}

impl From<Call> for TunnelIo {
    fn from(call: Call) -> Self {
        match call {
            Call::Stream(stream) => stream.into(),
            Call::Io(io) => io,
        }
    }
}

impl Incoming {
    /// The method; anything but CONNECT is to be refused.
    pub fn method(&self) -> &Method {
        match &self.asked {
            Asked::Http2 { request, .. } => request.method(),
            Asked::Quic { .. } => &Method::CONNECT,
        }
    }

    /// Where it is to go.
    ///
    /// # Errors
    /// When it is neither `address:port` nor `host:port`.
    pub fn authority(&self) -> Result<Authority, HeaderError> {
        match &self.asked {
            Asked::Http2 { request, .. } => request
                .uri()
                .authority()
                .map_or("", http::uri::Authority::as_str)
                .parse(),
            Asked::Quic { opened, .. } => opened.authority.parse(),
        }
    }

    /// All headers.
    pub fn headers(&self) -> &HeaderMap {
        match &self.asked {
            Asked::Http2 { request, .. } => request.headers(),
            Asked::Quic { opened, .. } => &opened.headers,
        }
    }

    /// What the caller says of its workload: telemetry, nothing is decided by it.
    pub fn baggage(&self) -> Baggage {
        Baggage::from_headers(self.headers())
    }

    /// What the caller says of its application: telemetry, nothing is decided by it.
    pub fn forwarded(&self) -> Forwarded {
        Forwarded::from_headers(self.headers())
    }

    /// The network that the caller names, if the call has come through a gateway: telemetry, nothing is decided by it.
    pub fn forwarded_network(&self) -> Option<&str> {
        self.headers().get(FORWARDED_NETWORK)?.to_str().ok()
    }

    /// Trace context.
    pub fn traceparent(&self) -> Option<&HeaderValue> {
        self.headers().get(TRACEPARENT)
    }

    /// Who calls, as its certificate proves.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.connection.peer
    }

    /// True if it came by a TCP connection that was accepted: [`Self::local`] is then an address of this host. That of a
    /// session, over which connections come inside of a stream, may be one of yesterday.
    pub fn is_tcp(&self) -> bool {
        self.connection.is_tcp
    }

    /// `tcp` or `quic`: what it came over.
    pub fn transport(&self) -> &'static str {
        match self.asked {
            Asked::Http2 { .. } => "tcp",
            Asked::Quic { .. } => "quic",
        }
    }

    /// Our end of the connection.
    pub fn local(&self) -> SocketAddr {
        self.connection.local
    }

    /// The caller's end of the connection.
    pub fn remote(&self) -> SocketAddr {
        self.connection.remote
    }

    pub(super) fn over_http2(
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
        connection: Arc<Accepted>,
    ) -> Self {
        Self {
            asked: Asked::Http2 { request, respond },
            connection,
        }
    }

    pub(crate) fn over_quic(opened: Opened, io: QuicIo, connection: Arc<Accepted>) -> Self {
        Self {
            asked: Asked::Quic { opened, io },
            connection,
        }
    }

    /// Refuses: the status and the end of the stream.
    pub fn refuse(self, status: StatusCode) {
        match self.asked {
            Asked::Http2 { mut respond, .. } => {
                let mut response = Response::new(());
                *response.status_mut() = status;
                // Fails only if the peer has reset the stream meanwhile.
                let _ = respond.send_response(response, true);
            }
            Asked::Quic { mut io, .. } => {
                let _ = answer(&mut io, status.as_u16(), None);
                io.end();
            }
        }
    }

    /// Accepts: 200, and what we say of our workload.
    ///
    /// # Errors
    /// With the reason if the peer has reset the stream meanwhile.
    pub fn accept_call(self, baggage: Option<&HeaderValue>) -> Result<Call, Reason> {
        let Self { asked, connection } = self;
        match asked {
            Asked::Quic { mut io, .. } => {
                answer(&mut io, 200, baggage).map_err(|_| Reason::CANCEL)?;
                Ok(Call::Io(io.into()))
            }
            Asked::Http2 { request, mut respond } => {
                let mut response = Response::new(());
                if let Some(baggage) = baggage {
                    response
                        .headers_mut()
                        .insert(crate::headers::BAGGAGE, baggage.clone());
                }
                let gone = |error: h2::Error| error.reason().unwrap_or(Reason::CANCEL);
                let send = respond.send_response(response, false).map_err(gone)?;
                let control = &connection.control;
                // HTTP/2 bounds the number of streams already.
                let lease = control.try_lease(usize::MAX).ok_or(Reason::INTERNAL_ERROR)?;
                let peer = Arc::clone(&connection.peer);
                Ok(Call::Stream(TunnelStream {
                    send,
                    recv: request.into_body(),
                    lease,
                    peer,
                    baggage: None,
                }))
            }
        }
    }

    /// As [`Self::accept_call`], as bytes.
    ///
    /// # Errors
    /// As [`Self::accept_call`].
    pub fn accept_io(self, baggage: Option<&HeaderValue>) -> Result<TunnelIo, Reason> {
        self.accept_call(baggage).map(TunnelIo::from)
    }

    /// As [`Self::accept_call`] on a server that does not listen for QUIC.
    ///
    /// # Errors
    /// As [`Self::accept_call`].
    pub fn accept(self, baggage: Option<&HeaderValue>) -> Result<TunnelStream, Reason> {
        match self.accept_call(baggage)? {
            Call::Stream(stream) => Ok(stream),
            Call::Io(_) => Err(Reason::INTERNAL_ERROR),
        }
    }
}
