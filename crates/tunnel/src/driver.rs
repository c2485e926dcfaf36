use crate::{
    control::{CLOSED, CUT, Control, DRAIN, GROW, SILENT},
    io::SharedIo,
};
use h2::{Ping, PingPong};
use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};

/// Window of a stream at the start: more than a round trip inside a network needs at 1 Gbit/s.
pub(crate) const STREAM_WINDOW: u32 = 256 * 1024;
/// Window of the streams of a connection that moves much data. 300 Mbit/s at 50 ms are 1.9 MB; on a way that loses
/// packets, what follows a lost one waits for another round trip.
const STREAM_WINDOW_GROWN: u32 = 4 * 1024 * 1024;
/// Window of a connection: so many stalled streams (64 of the first size) do not stop the others.
pub(crate) const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// Greatest frame that we take.
pub(crate) const FRAME_MAX: u32 = 1024 * 1024;
/// Bytes of a stream that HTTP/2 queues for sending.
pub(crate) const SEND_QUEUE: usize = 256 * 1024;
/// Process-wide budget of memory that grown windows may fill, in bytes. A connection takes the grown windows of the
/// streams that it has when it grows, and never more than its own window, which bounds it with or without growth.
const GROWTH_BUDGET: usize = 64 * 1024 * 1024;
const _: () = assert!(
    GROWTH_BUDGET / STREAM_WINDOW_GROWN as usize >= 16 && GROWTH_BUDGET / CONNECTION_WINDOW as usize >= 4,
    "few connections at a time carry bulk data"
);

static GROWTH_TAKEN: AtomicUsize = AtomicUsize::new(0);

/// Silence after which a PING is sent, and further silence after which the peer is taken for dead.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    quiet: Duration,
    give_up: Duration,
}

/// With nothing at stake. Source: ztunnel, PING every 10 s, timeout 20 s.
const IDLE: Patience = Patience {
    quiet: Duration::from_secs(10),
    give_up: Duration::from_secs(20),
};
/// Of a reverse session, at the host's end: nobody can call the host while it believes in a session that is dead. The gateway
/// hears these PINGs.
pub(crate) const REVERSE_HOST: Patience = Patience {
    quiet: Duration::from_secs(1),
    give_up: Duration::from_secs(2),
};
/// Of a reverse session, at the gateway's end: a host that is well was heard a second ago.
pub(crate) const REVERSE_GATEWAY: Patience = Patience {
    quiet: Duration::from_secs(2),
    give_up: Duration::from_secs(2),
};
/// While an application waits in connect(): another endpoint can still be tried.
const ASKED: Patience = Patience {
    quiet: Duration::from_secs(1),
    give_up: Duration::from_secs(1),
};

/// Either side's HTTP/2 connection.
pub(crate) trait Http2: Unpin {
    /// Reads and encodes what there is. Ready when the connection has ended.
    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>>;
    /// For keepalive; once.
    fn ping_pong(&mut self) -> Option<PingPong>;
    /// Sets the window of all streams.
    fn grow(&mut self, window: u32);
    /// Starts a graceful end.
    fn drain(&mut self);
}

struct Keepalive {
    idle: Patience,
    pings: Option<PingPong>,
    heard: u64,
    heard_at: Instant,
    pinged_at: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl Keepalive {
    fn new(pings: Option<PingPong>, idle: Patience) -> Self {
        let now = Instant::now();
        Self {
            idle,
            pings,
            heard: 0,
            heard_at: now,
            pinged_at: None,
            timer: Box::pin(sleep_until(now + idle.quiet)),
        }
    }

    /// Ready when the peer is dead.
    fn poll(&mut self, cx: &mut Context<'_>, heard: u64, asked: bool) -> Poll<()> {
        if heard != self.heard {
            self.heard = heard;
            self.heard_at = Instant::now();
            self.pinged_at = None;
        }
        let patience = if asked { ASKED } else { self.idle };
        loop {
            let deadline = match self.pinged_at {
                Some(at) => at + patience.give_up,
                None => self.heard_at + patience.quiet,
            };
            // A timer that fires early only costs a look; it is moved back no more often than that.
            if self.timer.deadline() > deadline {
                self.timer.as_mut().reset(deadline);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                break;
            }
            if Instant::now() < deadline {
                self.timer.as_mut().reset(deadline);
                continue;
            }
            if self.pinged_at.is_some() {
                return Poll::Ready(());
            }
            if let Some(pings) = &mut self.pings {
                // Fails only if one is under way, and that one is as good.
                let _ = pings.send_ping(Ping::opaque());
            }
            self.pinged_at = Some(Instant::now());
        }
        if let Some(pings) = &mut self.pings {
            // Frees the way for the next one.
            let _ = pings.poll_pong(cx);
        }
        Poll::Pending
    }
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) enum End {
    /// By both sides' will, or an error of HTTP/2.
    Http2(Result<(), h2::Error>),
    /// The socket failed.
    Io(io::Error),
    /// The peer was silent.
    Silent,
    /// By us, at once.
    Cut,
}

/// Runs one connection: the only task that touches its socket.
///
/// When several streams are open, what they wrote is sent one turn of the scheduler later: the others write too, and
/// one call to the kernel carries it all.
pub(crate) struct Driver<H> {
    http2: H,
    io: SharedIo,
    control: Arc<Control>,
    keepalive: Keepalive,
    waited: bool,
    drained: bool,
    grown: Growth,
}

impl<H: Http2> Driver<H> {
    pub(crate) fn new(http2: H, io: SharedIo, control: Arc<Control>) -> Self {
        Self::with_patience(http2, io, control, IDLE)
    }

    pub(crate) fn with_patience(mut http2: H, io: SharedIo, control: Arc<Control>, idle: Patience) -> Self {
        let keepalive = Keepalive::new(http2.ping_pong(), idle);
        Self {
            http2,
            io,
            control,
            keepalive,
            waited: false,
            drained: false,
            grown: Growth::default(),
        }
    }

    fn obey(&mut self) {
        if self.control.has(DRAIN) && !self.drained {
            self.drained = true;
            self.http2.drain();
        }
        self.grown.obey(&self.control, &mut self.http2);
    }
}

impl<H: Http2> Future for Driver<H> {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        let this = &mut *self;
        this.control.register(cx);
        if this.control.has(CUT) {
            // A reset, so that the peer's applications learn of it as such.
            let _ = socket2::SockRef::from(this.io.lock().tcp()).set_linger(Some(Duration::ZERO));
            return Poll::Ready(End::Cut);
        }
        this.obey();
        let driven = this.http2.poll_drive(cx);
        let heard = this.io.lock().heard();
        if this
            .keepalive
            .poll(cx, heard, this.control.unanswered() > 0)
            .is_ready()
        {
            this.control.set(SILENT);
            return Poll::Ready(End::Silent);
        }
        let mut io = this.io.lock();
        if io.has_output() {
            if driven.is_pending() && !this.waited && this.control.streams() > 1 {
                this.waited = true;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            this.waited = false;
            if let Poll::Ready(Err(error)) = io.poll_send(cx) {
                return Poll::Ready(End::Io(error));
            }
        }
        driven.map(End::Http2)
    }
}

impl<H> Drop for Driver<H> {
    fn drop(&mut self) {
        self.control.set(CLOSED);
    }
}

/// A share of the budget for grown windows, given back when dropped.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    taken: usize,
}

impl Growth {
    /// Grows the windows once, when they were asked for and the budget allows: until then it is tried again.
    pub(crate) fn obey(&mut self, control: &Control, http2: &mut impl Http2) {
        if self.taken > 0 || !control.has(GROW) {
            return;
        }
        let streams = control.streams().max(1);
        let unit = streams
            .saturating_mul(STREAM_WINDOW_GROWN as usize)
            .min(CONNECTION_WINDOW as usize);
        let granted = GROWTH_TAKEN.fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| {
            (taken + unit <= GROWTH_BUDGET).then_some(taken + unit)
        });
        if granted.is_ok() {
            self.taken = unit;
            http2.grow(STREAM_WINDOW_GROWN);
        }
    }
}

impl Drop for Growth {
    fn drop(&mut self) {
        GROWTH_TAKEN.fetch_sub(self.taken, Ordering::AcqRel);
    }
}
