use crate::{
    buffers,
    control::{GROW, Lease},
    stream::TunnelStream,
};
use bytes::{Buf as _, Bytes};
use futures_util::task::AtomicWaker;
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use std::{
    collections::VecDeque,
    future::Future,
    io::{self, IoSlice},
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{io::AsyncWrite as _, net::TcpStream};
use tokio_util::io::poll_read_buf;

/// Bytes asked of the application's socket at first.
const READ_MIN: usize = 16 * 1024;
/// And of a socket that always has more.
const READ_MAX: usize = 128 * 1024;
/// Bytes gathered from the stream for one write.
const GATHER: usize = 256 * 1024;
/// Slices of one writev.
const SLICES: usize = 16;
/// Bytes after which a stream counts as bulk and larger windows are asked for.
const BULK: u64 = 1024 * 1024;

/// Counts the bytes of a connection and cuts it. Shared between the task that copies and those who watch it.
#[derive(Debug, Default)]
pub struct Monitor {
    to_stream: AtomicU64,
    from_stream: AtomicU64,
    cut: AtomicBool,
    waker: AtomicWaker,
}

impl Monitor {
    /// Bytes taken from the application into the stream.
    pub fn to_stream(&self) -> u64 {
        self.to_stream.load(Ordering::Relaxed)
    }

    /// Bytes delivered from the stream to the application.
    pub fn from_stream(&self) -> u64 {
        self.from_stream.load(Ordering::Relaxed)
    }

    /// Ends the connection at once, with a reset on both sides. Also one whose copying has not begun.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Counts bytes that another than [`bidirectional`] has copied.
    pub fn add(&self, to_stream: u64, from_stream: u64) {
        self.to_stream.fetch_add(to_stream, Ordering::Relaxed);
        self.from_stream.fetch_add(from_stream, Ordering::Relaxed);
    }

    /// Waits until it is cut; for one task. Cancel-safe.
    pub async fn cut_wanted(&self) {
        std::future::poll_fn(|cx| {
            self.waker.register(cx.waker());
            if self.is_cut() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// True once it was cut.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }
}

/// How a connection ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum Ended {
    /// Both directions were closed.
    Complete,
    /// The application reset it; the stream was reset too.
    ApplicationReset(io::ErrorKind),
    /// The peer reset the stream; the application's socket was reset too.
    PeerReset(Reason),
    /// The connection to the peer is gone; the application's socket was reset.
    PeerLost,
    /// Cut through the [`Monitor`].
    Cut,
}

/// Copies both ways until both directions are closed. Half-closes are kept, and so are resets.
///
/// While nothing moves it owns no buffer. Dropping the future resets both sides.
///
/// Source: RFC 9113, 8.5: a TCP error is a stream error of type CONNECT_ERROR, and the other way round. A peer that
/// resets with NO_ERROR or CANCEL has only ended, as ztunnel does.
pub fn bidirectional(
    tcp: TcpStream,
    stream: TunnelStream,
    monitor: &Monitor,
) -> impl Future<Output = Ended> + Send {
    // Not an async function: it would hold its arguments beside the copying, as long as the connection.
    let TunnelStream {
        send, recv, lease, ..
    } = stream;
    Copy {
        tcp,
        send,
        recv,
        lease,
        monitor,
        want: READ_MIN,
        up_done: false,
        up_stopped: None,
        down_done: false,
        down_ended: false,
        ended: false,
        queue: VecDeque::new(),
        queued: 0,
    }
}

struct Copy<'a> {
    tcp: TcpStream,
    send: SendStream<Bytes>,
    recv: RecvStream,
    lease: Lease,
    monitor: &'a Monitor,
    want: usize,
    /// The application has closed its direction, and END_STREAM is sent.
    up_done: bool,
    /// END_STREAM came, and the application's socket is shut for writing.
    down_done: bool,
    /// END_STREAM came.
    down_ended: bool,
    /// The peer takes no more; what came from it before is still delivered.
    up_stopped: Option<Stop>,
    /// The future has ended by itself: nothing to reset.
    ended: bool,
    queue: VecDeque<Bytes>,
    queued: usize,
}

/// Why copying cannot go on.
enum Stop {
    Application(io::ErrorKind),
    Peer(Option<Reason>),
}

impl From<h2::Error> for Stop {
    fn from(error: h2::Error) -> Self {
        Self::Peer(if error.is_io() { None } else { error.reason() })
    }
}

fn application(error: &io::Error) -> Stop {
    Stop::Application(error.kind())
}

impl Copy<'_> {
    /// Application to stream.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        loop {
            // One byte is always asked for: it is granted when all that was sent before has its place.
            while self.send.capacity() == 0 {
                self.send.reserve_capacity(1);
                if self.send.capacity() > 0 {
                    break;
                }
                match ready!(self.send.poll_capacity(cx)) {
                    Some(granted) => drop(granted?),
                    // The sending side is closed: by a reset, which the receiving side will tell of.
                    None => return self.poll_reset(cx),
                }
            }
            if self.tcp.poll_read_ready(cx).is_pending() {
                // A reset reaches the sending side alone when the receiving side has ended.
                return if self.down_ended {
                    self.poll_reset(cx)
                } else {
                    Poll::Pending
                };
            }
            let want = self.want;
            let (read, bytes) = buffers::read_shared(want, |arena| {
                poll_read_buf(
                    Pin::new(&mut self.tcp),
                    cx,
                    &mut bytes::BufMut::limit(arena, want),
                )
            });
            let count = ready!(read).map_err(|error| application(&error))?;
            if count == 0 {
                self.send.send_data(Bytes::new(), true)?;
                self.up_done = true;
                return Poll::Ready(Ok(()));
            }
            self.want = if count == want {
                (want * 2).min(READ_MAX)
            } else {
                (count * 2).clamp(READ_MIN, want)
            };
            self.send.send_data(bytes, false)?;
            self.monitor
                .to_stream
                .fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        let reason = ready!(self.send.poll_reset(cx))?;
        Poll::Ready(Err(Stop::Peer(Some(reason))))
    }

    /// Stream to application.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        loop {
            let mut failed = None;
            while !self.down_ended && self.queued < GATHER && self.queue.len() < SLICES {
                match self.recv.poll_data(cx) {
                    Poll::Ready(Some(Ok(bytes))) => {
                        self.queued += bytes.len();
                        if !bytes.is_empty() {
                            self.queue.push_back(bytes);
                        }
                    }
                    Poll::Ready(Some(Err(error))) => {
                        failed = Some(Stop::from(error));
                        break;
                    }
                    Poll::Ready(None) => self.down_ended = true,
                    Poll::Pending => break,
                }
            }
            if self.queue.is_empty() {
                if let Some(stop) = failed {
                    return Poll::Ready(Err(stop));
                }
                if !self.down_ended {
                    return Poll::Pending;
                }
                // Where the application has closed its direction too, closing the socket says the same.
                if !self.up_done || self.up_stopped.is_some() {
                    ready!(Pin::new(&mut self.tcp).poll_shutdown(cx)).map_err(|error| application(&error))?;
                }
                self.down_done = true;
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_deliver(cx))?;
        }
    }

    fn poll_deliver(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        let written = if let [bytes] = self.queue.make_contiguous() {
            ready!(Pin::new(&mut self.tcp).poll_write(cx, bytes))
        } else {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            for (slice, bytes) in slices.iter_mut().zip(&self.queue) {
                *slice = IoSlice::new(bytes);
                count += 1;
            }
            ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, &slices[..count]))
        }
        .map_err(|error| application(&error))?;
        let mut left = written;
        while left > 0 {
            let Some(first) = self.queue.front_mut() else {
                break;
            };
            let part = left.min(first.len());
            first.advance(part);
            left -= part;
            if first.is_empty() {
                self.queue.pop_front();
            }
        }
        self.queued -= written;
        // The window opens only for what the application took.
        self.recv.flow_control().release_capacity(written)?;
        let count = u64::try_from(written).unwrap_or(u64::MAX);
        let before = self.monitor.from_stream.fetch_add(count, Ordering::Relaxed);
        if before < BULK && before + count >= BULK {
            self.lease.control().set(GROW);
        }
        Poll::Ready(Ok(()))
    }

    /// The application's next call on the socket fails with ECONNRESET.
    fn reset_application(&self) {
        // Fails only if the socket is gone already.
        let _ = SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO));
    }

    fn stop(&mut self, stop: &Stop) -> Ended {
        match *stop {
            Stop::Application(kind) => {
                self.send.send_reset(Reason::CONNECT_ERROR);
                Ended::ApplicationReset(kind)
            }
            Stop::Peer(Some(Reason::NO_ERROR | Reason::CANCEL)) => Ended::Complete,
            Stop::Peer(Some(reason)) => {
                self.reset_application();
                Ended::PeerReset(reason)
            }
            Stop::Peer(None) => {
                self.reset_application();
                Ended::PeerLost
            }
        }
    }
}

impl Future for Copy<'_> {
    type Output = Ended;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        let this = &mut *self;
        this.monitor.waker.register(cx.waker());
        if this.monitor.is_cut() {
            return Poll::Ready(Ended::Cut); // the drop resets both sides
        }
        if !this.up_done
            && let Poll::Ready(Err(stop)) = this.poll_up(cx)
        {
            if matches!(stop, Stop::Application(_)) {
                this.ended = true;
                return Poll::Ready(this.stop(&stop));
            }
            this.up_done = true;
            this.up_stopped = Some(stop);
        }
        let down = if this.down_done {
            Poll::Pending
        } else {
            this.poll_down(cx)
        };
        let ended = match down {
            Poll::Ready(Err(stop)) => this.stop(&stop),
            _ if this.up_done && this.down_done => match this.up_stopped.take() {
                Some(stop) => this.stop(&stop),
                None => Ended::Complete,
            },
            Poll::Ready(Ok(())) | Poll::Pending => return Poll::Pending,
        };
        this.ended = true;
        Poll::Ready(ended)
    }
}

impl Drop for Copy<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.reset_application();
            self.send.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_connection_is_small() {
        // 5,000 of them are held in one process; the task adds about 200 bytes.
        let size = size_of::<Copy<'_>>();
        assert!(size <= 256, "{size}");
    }
}
