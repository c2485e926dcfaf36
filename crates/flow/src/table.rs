use crate::{
    FlowConfig, FlowId, FlowReject, Listener, Outcome, Overdue, Refusal, Signal, Sources,
    flow::{Flow, Octets, State, hash, octets, seen},
    pending::Pending,
    slots::Slots,
};
use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    ops::Range,
    time::{Duration, Instant},
};
use tombolo_packet::{Icmp, Packet, Tcp, Transport, Udp, build, tcp_flags};

/// Most connections at once; a SYN beyond is answered by RST. A VIP cannot have more than its 65,535 ports.
pub const FLOWS_MAX: usize = 262_144;
const _: () = assert!(
    FLOWS_MAX * (size_of::<Flow>() + 2 * 10) <= 20 << 20,
    "flow tables stay below 20 MiB"
);

/// Closed connections that linger at most; older ones go when there are more.
const CLOSED_MAX: usize = 16_384;
/// So long a closed connection keeps its names after its last segment: the kernel's TIME_WAIT. Late segments still
/// find their way, and (VIP, port) is not given to somebody else while the kernel remembers it.
const LINGER: Duration = Duration::from_secs(60);
/// An open connection without any segment for so long is forgotten. Connections live as long as they like, even idle
/// (keepalives are every two hours by default); this catches those whose application vanished together with its
/// network namespace.
const IDLE_MAX: Duration = Duration::from_secs(24 * 3600);
/// How often idle connections are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(600);
/// Tries to find a free port of a VIP. At 64,000 connections to one VIP all fail once in 10^4.
const PORT_TRIES: u64 = 512;
/// Ports that are given beside the application's own: not the system ports.
const PORTS: Range<u16> = 1024..u16::MAX;

/// The table; see the crate's documentation.
#[derive(Debug)]
pub struct FlowTable {
    pub(crate) config: FlowConfig,
    sources: Sources,
    start: Instant,
    pub(crate) slots: Slots,
    pub(crate) pending: Pending,
    /// About in the order in which they may go.
    pub(crate) closed: VecDeque<(FlowId, u32)>,
    /// Connections whose handshake is done but whose socket was not handed over.
    pub(crate) awaiting: usize,
    next_sweep: Instant,
    port_counter: u64,
    rejects: [u64; FlowReject::ALL.len()],
}

impl FlowTable {
    /// An empty table. It takes no packet before [`Self::set_sources`].
    pub fn new(config: FlowConfig, now: Instant) -> Self {
        Self {
            slots: Slots::new(config.seed),
            config,
            sources: Sources::default(),
            start: now,
            pending: Pending::default(),
            closed: VecDeque::new(),
            awaiting: 0,
            next_sweep: now + SWEEP_EVERY,
            port_counter: 0,
            rejects: [0; FlowReject::ALL.len()],
        }
    }

    /// Says whose packets are taken.
    pub fn set_sources(&mut self, sources: Sources) {
        self.sources = sources;
    }

    /// Whose packets are taken.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Says which families are offered. Connections of the other stay until they end.
    pub fn set_families(&mut self, ipv4: bool, ipv6: bool) {
        (self.config.ipv4, self.config.ipv6) = (ipv4, ipv6);
    }

    /// Connections in the table, lingering ones included.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.slots.len() == 0
    }

    /// Connections held or waiting for their socket.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Connections whose handshake is done but whose socket was not handed over: the listener is to be asked again.
    pub fn awaiting(&self) -> usize {
        self.awaiting
    }

    /// What was refused, by reason.
    pub fn rejects(&self) -> impl Iterator<Item = (FlowReject, u64)> + '_ {
        FlowReject::ALL.iter().copied().zip(self.rejects)
    }

    /// Handles a frame of `length` bytes at the start of `buffer`, which should be longer: answers are built in it.
    ///
    /// # Errors
    /// When the packet goes no further; it is counted. Where the sender is to be told, [`Outcome::Write`] is returned
    /// instead, and counted too.
    pub fn handle_packet(
        &mut self,
        buffer: &mut [u8],
        length: usize,
        now: Instant,
    ) -> Result<Outcome, FlowReject> {
        let outcome = self.dispatch(buffer, length, now);
        if let Err(reject) = outcome {
            self.count(reject);
        }
        outcome
    }

    fn dispatch(&mut self, buffer: &mut [u8], length: usize, now: Instant) -> Result<Outcome, FlowReject> {
        let frame = buffer.get(..length).ok_or(FlowReject::Packet)?;
        let packet = Packet::parse(frame)?;
        let (offered, host) = match packet.destination {
            IpAddr::V4(_) => (self.config.ipv4, IpAddr::from(self.config.plan.host_v4())),
            IpAddr::V6(_) => (self.config.ipv6, IpAddr::from(self.config.plan.host_v6())),
        };
        if !self.config.plan.contains(packet.destination) || packet.destination == host {
            return Err(FlowReject::NotMesh);
        }
        if packet.source == host
            && let Transport::Tcp(tcp) = packet.transport
            && let Some(listener) = Listener::of_port(tcp.source_port)
        {
            return self.listener_segment(buffer, &packet, tcp, listener, now);
        }
        if !self.sources.contains(packet.source) {
            return Err(FlowReject::ForeignSource);
        }
        if !offered {
            return Err(FlowReject::Family);
        }
        match packet.transport {
            Transport::Tcp(tcp) => self.application_segment(buffer, length, &packet, tcp, now),
            Transport::Udp(udp) => self.udp(buffer, length, &packet, udp),
            Transport::Icmp(icmp) => ping(frame, &packet, icmp),
            Transport::Other(_) => Err(FlowReject::Protocol),
        }
    }

    fn udp(
        &mut self,
        buffer: &mut [u8],
        length: usize,
        packet: &Packet,
        udp: Udp,
    ) -> Result<Outcome, FlowReject> {
        let frame = buffer.get(..length).ok_or(FlowReject::Packet)?;
        if !packet.checksum_is_right(frame) {
            return Err(FlowReject::Checksum);
        }
        if udp.destination_port != 53 || !self.is_dns(packet.destination) {
            self.count(FlowReject::UdpPort);
            let answer = build::unreachable(buffer, packet, build::Unreachable::Port);
            return Ok(answer.map_or(Outcome::Nothing, Outcome::Write));
        }
        let datagram = packet.datagram(frame).ok_or(FlowReject::Packet)?;
        let end = packet.frame_length();
        Ok(Outcome::Query {
            source: SocketAddr::new(packet.source, udp.source_port),
            destination: SocketAddr::new(packet.destination, udp.destination_port),
            datagram: end - datagram.len()..end,
        })
    }

    fn application_segment(
        &mut self,
        buffer: &mut [u8],
        length: usize,
        packet: &Packet,
        tcp: Tcp,
        now: Instant,
    ) -> Result<Outcome, FlowReject> {
        let (application, vip) = (octets(packet.source), octets(packet.destination));
        let found = self
            .slots
            .find_by_application(application, tcp.source_port, vip, tcp.destination_port);
        let Some(id) = found else {
            return if tcp.is_syn() {
                self.connect(buffer, length, packet, tcp, None, now)
            } else {
                Ok(self.reset(buffer, packet, FlowReject::UnknownFlow))
            };
        };
        let active = self.seconds(now);
        let host = self.host(packet.destination);
        let flow = self.slots.get_mut(id).ok_or(FlowReject::Packet)?;
        let (listener, mapped) = (flow.listener(), flow.mapped());
        flow.active = active;
        let mut signal = None;
        match flow.state {
            State::Held if tcp.is_syn() => {
                // The latest one is kept: its timestamp is the one that the handshake's RTT is measured by.
                let frame = buffer.get(..packet.frame_length()).ok_or(FlowReject::Packet)?;
                self.pending.replace(flow.link, frame);
                return Ok(Outcome::Nothing);
            }
            State::Held => return Err(FlowReject::WhileHeld),
            State::Closed if tcp.is_syn() => {
                // The application uses its port again: a new connection, by the same names.
                let mapped_port = flow.mapped_port;
                self.remove(id);
                return self.connect(buffer, length, packet, tcp, Some(mapped_port), now);
            }
            State::Accepting if tcp.has(tcp_flags::RST) => {
                signal = Some(Signal::Abandoned(id));
            }
            State::Accepting if tcp.flags & (tcp_flags::ACK | tcp_flags::SYN) == tcp_flags::ACK => {
                if flow.seen & seen::ESTABLISHED == 0 {
                    flow.seen |= seen::ESTABLISHED;
                    self.awaiting += 1;
                }
                signal = Some(Signal::Established {
                    listener,
                    v6: packet.source.is_ipv6(),
                });
            }
            State::Accepting | State::Open | State::Closed | State::Free => {}
        }
        let to = SocketAddr::new(host, listener.port());
        packet.rewrite_tcp(buffer, mapped, to)?;
        self.track(id, tcp, seen::APPLICATION_FIN, now);
        let length = packet.frame_length();
        Ok(signal.map_or(Outcome::Write(length), |signal| {
            Outcome::WriteThen(length, signal)
        }))
    }

    fn listener_segment(
        &mut self,
        buffer: &mut [u8],
        packet: &Packet,
        tcp: Tcp,
        listener: Listener,
        now: Instant,
    ) -> Result<Outcome, FlowReject> {
        let active = self.seconds(now);
        let id = self
            .slots
            .find_by_listener(octets(packet.destination), tcp.destination_port);
        let found = id
            .and_then(|id| self.slots.get_mut(id))
            .filter(|flow| flow.listener() == listener && flow.state != State::Held);
        let (Some(flow), Some(id)) = (found, id) else {
            return Ok(self.reset(buffer, packet, FlowReject::UnknownFlow));
        };
        flow.active = active;
        let (from, to) = (flow.destination(), flow.application());
        let refused = flow.state == State::Accepting && tcp.has(tcp_flags::RST);
        packet.rewrite_tcp(buffer, from, to)?;
        self.track(id, tcp, seen::LISTENER_FIN, now);
        let length = packet.frame_length();
        Ok(if refused {
            Outcome::WriteThen(length, Signal::Abandoned(id))
        } else {
            Outcome::Write(length)
        })
    }

    /// A SYN of a new connection.
    fn connect(
        &mut self,
        buffer: &mut [u8],
        length: usize,
        packet: &Packet,
        tcp: Tcp,
        mapped_port: Option<u16>,
        now: Instant,
    ) -> Result<Outcome, FlowReject> {
        let dns = self.is_dns(packet.destination);
        if dns && tcp.destination_port != 53 {
            return Ok(self.reset(buffer, packet, FlowReject::DnsPort));
        }
        if self.pending() >= self.config.pending_max {
            return Ok(self.reset(buffer, packet, FlowReject::PendingFull));
        }
        let vip = octets(packet.destination);
        let port = mapped_port.or_else(|| self.free_port(vip, tcp.source_port));
        let (Some(mapped_port), true) = (port, self.has_room()) else {
            return Ok(self.reset(buffer, packet, FlowReject::FlowsFull));
        };
        let frame = buffer
            .get(..length.min(packet.frame_length()))
            .ok_or(FlowReject::Packet)?;
        let link = self.pending.keep(frame);
        let flow = Flow {
            application: octets(packet.source),
            vip,
            application_port: tcp.source_port,
            vip_port: tcp.destination_port,
            mapped_port,
            state: if dns { State::Accepting } else { State::Held },
            seen: if dns { seen::DNS } else { 0 },
            generation: 0,
            active: self.seconds(now),
            link,
        };
        let id = self.slots.insert(flow).ok_or(FlowReject::FlowsFull)?;
        self.pending.expire_at(id, now + self.config.hold);
        if dns {
            let to = SocketAddr::new(self.host(packet.destination), flow.listener().port());
            packet.rewrite_tcp(buffer, flow.mapped(), to)?;
            return Ok(Outcome::Write(packet.frame_length()));
        }
        Ok(Outcome::Connect {
            id,
            source: flow.application(),
            destination: flow.destination(),
        })
    }

    /// Delivers a held connection: returns the latest SYN, rewritten for the listener. `None` when the connection is
    /// not held any more.
    pub fn accept(&mut self, id: FlowId) -> Option<Vec<u8>> {
        let flow = *self.slots.get(id).filter(|flow| flow.state == State::Held)?;
        let mut frame = self.pending.syn(flow.link).to_vec();
        let packet = Packet::parse(&frame).ok()?;
        let to = SocketAddr::new(self.host(packet.destination), flow.listener().port());
        packet.rewrite_tcp(&mut frame, flow.mapped(), to).ok()?;
        self.slots.get_mut(id)?.state = State::Accepting;
        Some(frame)
    }

    /// Refuses a connection that is held, or that was accepted and waits for its socket, and forgets it. Returns what
    /// is to be written.
    pub fn refuse(&mut self, id: FlowId, with: Refusal) -> Option<Vec<u8>> {
        let flow = *self.slots.get(id).filter(|flow| flow.is_pending())?;
        let mut frame = self.pending.syn(flow.link).to_vec();
        self.remove(id);
        let packet = Packet::parse(&frame).ok()?;
        // Room for the longest answer: an error message that repeats the SYN.
        frame.resize(frame.len() + 64, 0);
        let length = match with {
            Refusal::Reset => build::reset(&mut frame, &packet),
            Refusal::HostUnreachable => build::unreachable(&mut frame, &packet, build::Unreachable::Host),
            Refusal::Silent => None,
        }?;
        frame.truncate(length);
        Some(frame)
    }

    /// The listener has accepted a socket whose peer is `(vip, port)`: the connection it belongs to, if it was waiting
    /// for one. A socket that belongs to none is to be closed.
    pub fn hand_over(&mut self, vip: IpAddr, port: u16, listener: Listener) -> Option<FlowId> {
        let id = self.slots.find_by_listener(octets(vip), port)?;
        let flow = *self.slots.get(id)?;
        if flow.state != State::Accepting || flow.listener() != listener {
            return None;
        }
        self.slots.get_mut(id)?.state = State::Open;
        self.free_pending(&flow);
        Some(id)
    }

    /// When [`Self::handle_timeout`] is to be called, and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let held = self
            .pending
            .first()
            .map(|(_, at)| (at, "a held connection expires"));
        let closed = self.closed.front().map(|(_, at)| {
            let at = self.start + Duration::from_secs(u64::from(*at) + 1);
            (at, "a closed connection is forgotten")
        });
        let sweep = (!self.is_empty()).then_some((self.next_sweep, "idle connections are looked for"));
        [held, closed, sweep].into_iter().flatten().min()
    }

    /// Does what is due, and says so to `tell`.
    pub fn handle_timeout(&mut self, now: Instant, tell: &mut dyn FnMut(Overdue<'_>)) {
        while let Some((id, at)) = self.pending.first()
            && at <= now
        {
            self.pending.pop();
            if self.slots.get(id).is_some_and(Flow::is_pending) {
                self.count(FlowReject::HoldExpired);
                if let Some(frame) = self.refuse(id, Refusal::Reset) {
                    tell(Overdue::Write(&frame));
                }
                tell(Overdue::Expired(id));
            }
        }
        let seconds = self.seconds(now);
        while let Some((id, at)) = self.closed.front().copied()
            && at < seconds
        {
            self.closed.pop_front();
            let Some(flow) = self.slots.get(id) else { continue };
            let due = flow.active.saturating_add(linger_seconds());
            if due < seconds {
                self.remove(id);
            } else {
                // Segments still pass: it lingers from the last one.
                self.closed.push_back((id, due));
            }
        }
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP_EVERY;
            let limit = u32::try_from(IDLE_MAX.as_secs()).unwrap_or(u32::MAX);
            let idle: Vec<u32> = self
                .slots
                .iter()
                .filter(|(_, flow)| flow.state == State::Open && seconds.saturating_sub(flow.active) > limit)
                .map(|(index, _)| index)
                .collect();
            for index in idle {
                if let Some(id) = self.slots.id(index) {
                    self.remove(id);
                }
            }
        }
    }

    /// Forgets a connection at once: its owner knows that both ends are gone.
    pub fn forget(&mut self, id: FlowId) {
        self.remove(id);
    }

    /// Notes FIN and RST.
    fn track(&mut self, id: FlowId, tcp: Tcp, fin: u8, now: Instant) {
        if tcp.flags & (tcp_flags::FIN | tcp_flags::RST) == 0 {
            return;
        }
        let Some(flow) = self.slots.get_mut(id) else {
            return;
        };
        if tcp.has(tcp_flags::FIN) {
            flow.seen |= fin;
        }
        let both = seen::APPLICATION_FIN | seen::LISTENER_FIN;
        let closes = match flow.state {
            State::Open => tcp.has(tcp_flags::RST) || flow.seen & both == both,
            State::Accepting => tcp.has(tcp_flags::RST),
            State::Free | State::Held | State::Closed => false,
        };
        if closes {
            let before = *flow;
            flow.state = State::Closed;
            if before.state == State::Accepting {
                self.free_pending(&before);
            }
            let due = self.seconds(now).saturating_add(linger_seconds());
            self.closed.push_back((id, due));
            if self.closed.len() > CLOSED_MAX {
                self.forget_oldest_closed();
            }
        }
    }

    /// A RST towards the sender of the packet.
    fn reset(&mut self, buffer: &mut [u8], packet: &Packet, why: FlowReject) -> Outcome {
        self.count(why);
        build::reset(buffer, packet).map_or(Outcome::Nothing, Outcome::Write)
    }

    fn count(&mut self, reject: FlowReject) {
        if let Some(counter) = self.rejects.get_mut(reject as usize) {
            *counter += 1;
        }
    }

    /// True if another connection may be added; makes room at the cost of closed ones.
    fn has_room(&mut self) -> bool {
        while self.slots.len() >= FLOWS_MAX {
            if !self.forget_oldest_closed() {
                return false;
            }
        }
        true
    }

    /// A port of the VIP that no connection has; the wished one if it is free.
    fn free_port(&mut self, vip: Octets, wished: u16) -> Option<u16> {
        let is_free = |slots: &Slots, port| slots.find_by_listener(vip, port).is_none();
        if is_free(&self.slots, wished) {
            return Some(wished);
        }
        let span = u64::from(PORTS.end - PORTS.start) + 1;
        loop {
            for _ in 0..PORT_TRIES {
                self.port_counter += 1;
                let offset = hash(self.config.seed, &[self.port_counter]) % span;
                let port = u16::try_from(u64::from(PORTS.start) + offset).ok()?;
                if is_free(&self.slots, port) {
                    return Some(port);
                }
            }
            if !self.forget_oldest_closed() {
                return None;
            }
            while self.closed.len() > CLOSED_MAX / 2 {
                self.forget_oldest_closed();
            }
        }
    }

    fn forget_oldest_closed(&mut self) -> bool {
        while let Some((id, _)) = self.closed.pop_front() {
            if self.remove(id) {
                return true;
            }
        }
        false
    }

    fn remove(&mut self, id: FlowId) -> bool {
        let Some(flow) = self.slots.remove(id) else {
            return false;
        };
        if flow.is_pending() {
            self.free_pending(&flow);
        }
        true
    }

    /// A connection is not pending any more.
    fn free_pending(&mut self, flow: &Flow) {
        if flow.seen & seen::ESTABLISHED != 0 {
            self.awaiting = self.awaiting.saturating_sub(1);
        }
        self.pending.free(flow.link);
        // Deadlines of connections that are not pending any more are in the way of the first real one.
        while let Some((id, _)) = self.pending.first()
            && !self.slots.get(id).is_some_and(Flow::is_pending)
        {
            self.pending.pop();
        }
    }

    fn is_dns(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => a == self.config.plan.dns_v4(),
            IpAddr::V6(a) => a == self.config.plan.dns_v6(),
        }
    }

    fn host(&self, of_family: IpAddr) -> IpAddr {
        match of_family {
            IpAddr::V4(_) => self.config.plan.host_v4().into(),
            IpAddr::V6(_) => self.config.plan.host_v6().into(),
        }
    }

    pub(crate) fn seconds(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.start).as_secs()).unwrap_or(u32::MAX)
    }
}

pub(crate) fn linger_seconds() -> u32 {
    u32::try_from(LINGER.as_secs()).unwrap_or(u32::MAX)
}

fn ping(frame: &[u8], packet: &Packet, icmp: Icmp) -> Result<Outcome, FlowReject> {
    if !icmp.is_echo_request() {
        return Err(FlowReject::Icmp);
    }
    if !packet.checksum_is_right(frame) {
        return Err(FlowReject::Checksum);
    }
    Ok(Outcome::Ping {
        destination: packet.destination,
        length: packet.frame_length(),
    })
}
