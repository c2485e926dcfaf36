//! A stream as bytes, for what runs a protocol of its own inside it: the inner TLS of a call through a gateway.

use crate::{control::Lease, driver::SEND_QUEUE, quic::QuicIo, stream::TunnelStream};
use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes that one write puts into the stream's queue.
const WRITE_MAX: usize = 64 * 1024;
const _: () = assert!(WRITE_MAX <= SEND_QUEUE, "one write fits the queue");

/// An accepted call as [`AsyncRead`] and [`AsyncWrite`], over HTTP/2 or QUIC. Shutting it down ends our direction;
/// dropped before both have ended, it is reset.
#[derive(Debug)]
pub struct TunnelIo(Kind);

#[derive(Debug)]
enum Kind {
    Http2(Http2Io),
    Quic(QuicIo),
}

impl TunnelIo {
    pub(crate) fn over_quic(io: QuicIo) -> Self {
        Self(Kind::Quic(io))
    }
}

impl From<TunnelStream> for TunnelIo {
    fn from(stream: TunnelStream) -> Self {
        Self(Kind::Http2(stream.into()))
    }
}

impl AsyncRead for TunnelIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Http2(io) => Pin::new(io).poll_read(cx, buffer),
            Kind::Quic(io) => Pin::new(io).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Kind::Http2(io) => Pin::new(io).poll_write(cx, bytes),
            Kind::Quic(io) => Pin::new(io).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Http2(io) => Pin::new(io).poll_flush(cx),
            Kind::Quic(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Kind::Http2(io) => Pin::new(io).poll_shutdown(cx),
            Kind::Quic(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

#[derive(Debug)]
struct Http2Io {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Received and not read yet.
    chunk: Bytes,
    ended: bool,
    finished: bool,
    /// Keeps the place of the stream in its connection.
    _lease: Lease,
}

impl From<TunnelStream> for Http2Io {
    fn from(stream: TunnelStream) -> Self {
        Self {
            send: stream.send,
            recv: stream.recv,
            chunk: Bytes::new(),
            ended: false,
            finished: false,
            _lease: stream.lease,
        }
    }
}

/// A stream that the peer has reset with NO_ERROR or CANCEL has only ended. Source: ztunnel.
fn ended_by(reason: Reason) -> Option<io::Error> {
    match reason {
        Reason::NO_ERROR | Reason::CANCEL => None,
        Reason::STREAM_CLOSED => Some(io::ErrorKind::BrokenPipe.into()),
        reason => Some(io::Error::new(io::ErrorKind::ConnectionReset, reason.to_string())),
    }
}

fn failed(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error
            .into_io()
            .unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error.to_string())
}

impl AsyncRead for Http2Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.chunk.is_empty() {
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.recv.poll_data(cx)) {
                Some(Ok(chunk)) => self.chunk = chunk,
                Some(Err(error)) => {
                    self.ended = true;
                    return Poll::Ready(match error.reason() {
                        Some(reason) if error.is_reset() => ended_by(reason).map_or(Ok(()), Err),
                        _ => Err(failed(error)),
                    });
                }
                None => self.ended = true,
            }
        }
        let length = self.chunk.len().min(buffer.remaining());
        buffer.put_slice(self.chunk.get(..length).unwrap_or_default());
        self.chunk.advance(length);
        // What was read may be sent again. It fails only for more than was received.
        let _ = self.recv.flow_control().release_capacity(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Http2Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if self.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.send.capacity() == 0 {
            self.send.reserve_capacity(bytes.len().min(WRITE_MAX));
        }
        while self.send.capacity() == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(failed(error))),
                None => {
                    // Reset meanwhile, or the connection is gone.
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
            }
        }
        let length = bytes.len().min(self.send.capacity()).min(WRITE_MAX);
        let chunk = Bytes::copy_from_slice(bytes.get(..length).unwrap_or_default());
        self.send.send_data(chunk, false).map_err(failed)?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's task sends what is queued.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.finished {
            self.finished = true;
            self.send.send_data(Bytes::new(), true).map_err(failed)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Http2Io {
    fn drop(&mut self) {
        if !(self.finished && self.ended) {
            self.send.send_reset(Reason::CANCEL);
        }
    }
}
