use crate::{
    Captured, DnsQuery, PendingFlow, Ping,
    listener::abort,
    shared::{Phase, Shared},
    stranger,
};
use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::{net::TcpStream, sync::mpsc, time::Sleep};
use tombolo_flow::{FlowReject, HeldFlow, Listener, Outcome, Overdue, Refusal, Signal};
use tombolo_packet::FRAME_MAX;

/// Packets that are handled before other tasks of the thread get their turn: about half a millisecond of bulk data.
const PACKETS_PER_TURN: usize = 32;
/// A connection that should be at the listener, but was not, is looked for again so soon.
const ACCEPT_AGAIN: Duration = Duration::from_millis(10);
/// The addresses of this host are read again for a packet from a strange source at most so often.
const REFRESH_AT_MOST_EVERY: Duration = Duration::from_millis(250);
/// Timeouts are served at most so late: nearer ones are not worth arming the timer again.
const TIMER_SLACK: Duration = Duration::from_millis(20);

/// The packet loop: reads a frame, has it rewritten in place, writes it back.
pub(crate) struct Pump {
    shared: Arc<Shared>,
    events: mpsc::Sender<Captured>,
    buffer: Box<[u8]>,
    /// When the timer fires.
    armed: Option<Instant>,
}

impl Pump {
    pub(crate) fn new(shared: Arc<Shared>, events: mpsc::Sender<Captured>) -> Self {
        Self {
            shared,
            events,
            buffer: vec![0; FRAME_MAX].into_boxed_slice(),
            armed: None,
        }
    }

    /// Tells of connections that are held.
    pub(crate) fn tell(&self, held: impl IntoIterator<Item = HeldFlow>) {
        for HeldFlow {
            id,
            source,
            destination,
        } in held
        {
            let flow = PendingFlow::new(&self.shared, id, source, destination);
            self.event(Captured::Connect(flow));
        }
    }

    /// Runs until the device is gone, or another process reads it.
    pub(crate) async fn run(mut self) {
        let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
        let shared = Arc::clone(&self.shared);
        let mut phase = shared.phase.subscribe();
        loop {
            let end = tokio::select! {
                biased;
                // Between two turns: no frame is half done.
                _ = phase.wait_for(|phase| matches!(phase, Phase::Frozen | Phase::Gone)) => None,
                end = poll_fn(|cx| self.turn(cx, timer.as_mut())) => Some(end),
                end = shared.tun.gone() => Some(end),
            };
            if let Some(end) = end {
                tracing::error!(error = %end, "capture has ended: the TUN device is gone");
                return;
            }
            shared.stopped.send_replace(true);
            let thawed = phase.wait_for(|phase| *phase != Phase::Frozen).await;
            if thawed.map_or(true, |phase| *phase == Phase::Gone) {
                return;
            }
            shared.stopped.send_replace(false);
            self.armed = None;
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> Poll<io::Error> {
        let now = Instant::now();
        let (mut packets, mut bytes) = (0u64, 0u64);
        let end = loop {
            match self.shared.tun.poll_read(cx, &mut self.buffer) {
                Poll::Ready(Ok(length)) => {
                    packets += 1;
                    bytes += length as u64;
                    self.packet(length, now);
                    if packets >= PACKETS_PER_TURN as u64 {
                        cx.waker().wake_by_ref();
                        break None;
                    }
                }
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Poll::Ready(Err(error)) => break Some(error),
                Poll::Pending => break None,
            }
        };
        self.shared.counters.read_packets.fetch_add(packets, Relaxed);
        self.shared.counters.read_bytes.fetch_add(bytes, Relaxed);
        if let Some(error) = end {
            return Poll::Ready(error);
        }
        if self.armed.is_some() && timer.as_mut().poll(cx).is_ready() {
            self.armed = None;
            self.overdue(Instant::now());
        }
        let due = self.due(now);
        if let Some(due) = due
            && self.armed.is_none_or(|armed| due + TIMER_SLACK < armed)
        {
            timer.as_mut().reset((due + TIMER_SLACK / 2).into());
            self.armed = Some(due + TIMER_SLACK / 2);
            // Registers the waker; it cannot be ready in a way that the next turn would miss.
            if timer.poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }

    /// When the loop has to act without a packet.
    fn due(&self, now: Instant) -> Option<Instant> {
        let state = self.shared.state();
        let again = (state.table.awaiting() > 0).then_some(now + ACCEPT_AGAIN);
        [again, state.table.poll_timeout().map(|(at, _)| at)]
            .into_iter()
            .flatten()
            .min()
    }

    fn packet(&mut self, length: usize, now: Instant) {
        let mut outcome = self
            .shared
            .state()
            .table
            .handle_packet(&mut self.buffer, length, now);
        if outcome == Err(FlowReject::ForeignSource)
            && self.sources_may_be_old(now)
            && self.shared.refresh_sources()
        {
            outcome = self
                .shared
                .state()
                .table
                .handle_packet(&mut self.buffer, length, now);
        }
        if outcome == Err(FlowReject::ForeignSource)
            && let Some(length) = stranger::answer(&mut self.buffer, length, &self.shared.config.plan)
        {
            self.write(length);
        }
        match outcome {
            Ok(Outcome::Write(length)) => self.write(length),
            Ok(Outcome::WriteThen(length, signal)) => {
                self.write(length);
                match signal {
                    Signal::Established { listener, v6 } => self.accept(listener, v6),
                    Signal::Abandoned(id) => {
                        // Dropping it tells the waiter.
                        let waiter = self.shared.state().waiters.remove(&id);
                        drop(waiter);
                    }
                }
            }
            Ok(Outcome::Connect {
                id,
                source,
                destination,
            }) => {
                if self.shared.masquerade.hides(source, destination, now) {
                    self.shared.counters.masqueraded.fetch_add(1, Relaxed);
                    tracing::debug!(%destination, "refused: the connection is not this host's, and no bridge is opted in");
                    self.shared.refuse(id, Refusal::Reset);
                    return;
                }
                let held = HeldFlow {
                    id,
                    source,
                    destination,
                };
                let told = {
                    let mut state = self.shared.state();
                    let tells = state.phase == Phase::Running;
                    if !tells {
                        state.untold.push(held);
                    }
                    tells
                };
                if told {
                    self.tell([held]);
                }
            }
            Ok(Outcome::Query {
                source,
                destination,
                datagram,
            }) => {
                let bytes = self.buffer.get(datagram).unwrap_or_default();
                let query = DnsQuery::new(&self.shared, bytes, source, destination);
                self.event(Captured::Dns(query));
            }
            Ok(Outcome::Ping { destination, length }) => {
                let frame = self.buffer.get(..length).unwrap_or_default();
                let ping = Ping::new(&self.shared, destination, frame);
                self.event(Captured::Ping(ping));
            }
            Ok(Outcome::Nothing) => {}
            Err(reject) => tracing::trace!(reason = reject.reason(), "a packet was refused"),
        }
    }

    fn write(&self, length: usize) {
        self.shared.write(self.buffer.get(..length).unwrap_or_default());
    }

    /// Hands up an event. If nobody takes it, dropping it refuses a connection and leaves a query unanswered.
    fn event(&self, event: Captured) {
        if self.events.try_send(event).is_err() {
            self.shared.counters.events_dropped.fetch_add(1, Relaxed);
        }
    }

    fn sources_may_be_old(&self, now: Instant) -> bool {
        let read = self.shared.state().sources_read;
        now.saturating_duration_since(read) > REFRESH_AT_MOST_EVERY
    }

    /// Takes what is at the listeners of a kind, until nobody waits any more.
    ///
    /// The kernel delivers a written segment before the write returns: no task has to wait for the listener.
    fn accept(&self, kind: Listener, v6: bool) {
        let listeners = self.shared.listeners.iter();
        for listener in listeners.filter(|listener| listener.kind == kind && listener.v6 == v6) {
            while self.shared.state().table.awaiting() > 0 {
                let (stream, peer) = match listener.accept() {
                    Ok(accepted) => accepted,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // The peer was gone before it was accepted.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                    Err(error) => {
                        // Out of descriptors, mostly: the timer tries again.
                        self.shared.counters.accept_errors.fetch_add(1, Relaxed);
                        tracing::debug!(%error, "a captured connection was not accepted");
                        break;
                    }
                };
                let id = self.shared.state().table.hand_over(peer.ip(), peer.port(), kind);
                match (id, kind) {
                    (None, _) => abort(stream),
                    (Some(id), Listener::Services) => self.shared.hand_over(id, stream),
                    (Some(_), Listener::Dns) => match TcpStream::from_std(stream) {
                        Ok(stream) => self.event(Captured::DnsTcp(stream)),
                        Err(error) => tracing::debug!(%error, "a DNS connection was not taken"),
                    },
                }
            }
        }
    }

    fn overdue(&self, now: Instant) {
        if self.shared.state().table.awaiting() > 0 {
            for kind in [Listener::Services, Listener::Dns] {
                self.accept(kind, false);
                self.accept(kind, true);
            }
        }
        let mut frames = Vec::new();
        let mut gone = Vec::new();
        {
            let mut state = self.shared.state();
            let state = &mut *state;
            state.table.handle_timeout(now, &mut |overdue| match overdue {
                Overdue::Write(frame) => frames.push(frame.to_vec()),
                Overdue::Expired(id) => gone.extend(state.waiters.remove(&id)),
            });
        }
        frames.iter().for_each(|frame| self.shared.write(frame));
    }
}
