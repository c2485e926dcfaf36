//! The table as bytes: what one process hands to the next one that reads the same device.

use crate::{
    FLOWS_MAX, FlowConfig, FlowId, FlowTable, Listener,
    flow::{Flow, Octets, State, address, octets, seen},
    table::linger_seconds,
};
use std::{
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};
use tombolo_packet::{FRAME_MAX, Packet, Transport};

/// Says what the bytes are.
const MAGIC: [u8; 4] = *b"TMBF";
/// Version of the encoding. Another one is refused: the caller then starts with an empty table, or not at all.
const VERSION: u16 = 1;
/// Magic, version, number of connections.
const HEAD: usize = 4 + 2 + 4;
/// A connection without its SYN: two addresses, three ports, state, what was seen.
const ENTRY: usize = 16 + 16 + 3 * 2 + 1 + 1;

const HELD: u8 = 1;
const ACCEPTING: u8 = 2;
const OPEN: u8 = 3;
const CLOSED: u8 = 4;

/// Why a table was not taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImportError {
    /// The bytes are no table.
    NoTable,
    /// They are of a version that this program does not know.
    Version(u16),
    /// They end too early or go on too long, or a field says what cannot be.
    Damaged,
    /// More connections than a table holds.
    TooMany,
}

impl std::fmt::Display for ImportError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoTable => f.write_str("it is not a table of connections"),
            Self::Version(version) => write!(f, "a table of connections of version {version}"),
            Self::Damaged => f.write_str("the table of connections is damaged"),
            Self::TooMany => f.write_str("the table of connections is too large"),
        }
    }
}

impl std::error::Error for ImportError {}

/// A connection that is held: whoever takes the table over decides about it as if its SYN had just been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldFlow {
    /// To accept or refuse it.
    pub id: FlowId,
    /// The application.
    pub source: SocketAddr,
    /// VIP and port.
    pub destination: SocketAddr,
}

impl FlowTable {
    /// Connections that are held: their SYN is kept and nothing was delivered.
    pub fn held(&self) -> Vec<HeldFlow> {
        let held = self.slots.iter().filter(|(_, flow)| flow.state == State::Held);
        held.filter_map(|(index, flow)| {
            Some(HeldFlow {
                id: self.slots.id(index)?,
                source: flow.application(),
                destination: flow.destination(),
            })
        })
        .collect()
    }

    /// Connections to services whose SYN was delivered and whose socket is not there yet.
    pub fn accepting(&self) -> usize {
        let accepting = |flow: &Flow| flow.state == State::Accepting && flow.listener() == Listener::Services;
        self.slots.iter().filter(|(_, flow)| accepting(flow)).count()
    }

    /// The whole table: open, closed and held connections, these with their latest SYN.
    pub fn export(&self, now: Instant) -> Vec<u8> {
        self.encode(now, |_| true)
    }

    /// The open connections that `keep` (application, destination) wants.
    pub fn export_open(&self, now: Instant, keep: impl Fn(SocketAddr, SocketAddr) -> bool) -> Vec<u8> {
        self.encode(now, |flow| {
            flow.state == State::Open && keep(flow.application(), flow.destination())
        })
    }

    fn encode(&self, now: Instant, wanted: impl Fn(&Flow) -> bool) -> Vec<u8> {
        let deadlines: BTreeMap<FlowId, Instant> = self.pending.deadlines().collect();
        let mut bytes = Vec::with_capacity(HEAD + self.len() * ENTRY);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend([0; 4]);
        let mut count = 0_u32;
        for (index, flow) in self.slots.iter().filter(|(_, flow)| wanted(flow)) {
            let state = match flow.state {
                State::Free => continue,
                State::Held => HELD,
                State::Accepting => ACCEPTING,
                State::Open => OPEN,
                State::Closed => CLOSED,
            };
            count += 1;
            bytes.extend(flow.application);
            bytes.extend(flow.vip);
            for port in [flow.application_port, flow.vip_port, flow.mapped_port] {
                bytes.extend(port.to_be_bytes());
            }
            bytes.extend([state, flow.seen]);
            if flow.is_pending() {
                let at = self.slots.id(index).and_then(|id| deadlines.get(&id));
                let left = at.map_or(0, |at| at.saturating_duration_since(now).as_millis());
                bytes.extend(u32::try_from(left).unwrap_or(u32::MAX).to_be_bytes());
                let syn = self.pending.syn(flow.link);
                bytes.extend(u32::try_from(syn.len()).unwrap_or(u32::MAX).to_be_bytes());
                bytes.extend(syn);
            }
        }
        if let Some(place) = bytes.get_mut(HEAD - 4..HEAD) {
            place.copy_from_slice(&count.to_be_bytes());
        }
        bytes
    }

    /// The table that another process has exported. Its held connections are in [`Self::held`]: the caller decides
    /// about them. Like a new table it takes no packet before [`Self::set_sources`].
    ///
    /// # Errors
    /// When the bytes are not a whole table of this version. They come from another process of this host, but are
    /// checked as if they came from anybody.
    pub fn import(config: FlowConfig, bytes: &[u8], now: Instant) -> Result<Self, ImportError> {
        let mut table = Self::new(config, now);
        table.add(bytes, now)?;
        Ok(table)
    }

    /// Adds the connections of another table; one whose names are taken is left out. Returns how many were added.
    ///
    /// # Errors
    /// As [`Self::import`]; what came before the fault stays added.
    pub fn add(&mut self, bytes: &[u8], now: Instant) -> Result<usize, ImportError> {
        let mut rest = Rest(bytes);
        if rest.array::<4>()? != MAGIC {
            return Err(ImportError::NoTable);
        }
        let version = u16::from_be_bytes(rest.array()?);
        if version != VERSION {
            return Err(ImportError::Version(version));
        }
        let count = u32::from_be_bytes(rest.array()?);
        if usize::try_from(count).map_or(true, |count| count > FLOWS_MAX) {
            return Err(ImportError::TooMany);
        }
        let (mut deadlines, mut added) = (Vec::new(), 0);
        for _ in 0..count {
            let (flow, syn) = self.entry(&mut rest)?;
            if self.len() >= FLOWS_MAX {
                return Err(ImportError::TooMany);
            }
            let taken = self
                .slots
                .find_by_application(flow.application, flow.application_port, flow.vip, flow.vip_port)
                .or_else(|| self.slots.find_by_listener(flow.vip, flow.mapped_port));
            if taken.is_some() {
                continue;
            }
            let (state, established) = (flow.state, flow.seen & seen::ESTABLISHED != 0);
            let mut flow = flow;
            flow.active = self.seconds(now);
            if let Some((_, syn)) = syn {
                flow.link = self.pending.keep(syn);
            }
            let id = self.slots.insert(flow).ok_or(ImportError::TooMany)?;
            added += 1;
            if let Some((left, _)) = syn {
                deadlines.push((now + left.min(self.config.hold), id));
                self.awaiting += usize::from(state == State::Accepting && established);
            }
            if state == State::Closed {
                let due = self.seconds(now).saturating_add(linger_seconds());
                self.closed.push_back((id, due));
            }
        }
        deadlines.sort_unstable();
        for (at, id) in deadlines {
            self.pending.expire_at(id, at);
        }
        if rest.0.is_empty() {
            Ok(added)
        } else {
            Err(ImportError::Damaged)
        }
    }

    fn entry<'a>(&self, rest: &mut Rest<'a>) -> Result<(Flow, Option<Syn<'a>>), ImportError> {
        let (application, vip): (Octets, Octets) = (rest.array()?, rest.array()?);
        let application_port = u16::from_be_bytes(rest.array()?);
        let vip_port = u16::from_be_bytes(rest.array()?);
        let mapped_port = u16::from_be_bytes(rest.array()?);
        let [state, flags] = rest.array()?;
        let state = match state {
            HELD => State::Held,
            ACCEPTING => State::Accepting,
            OPEN => State::Open,
            CLOSED => State::Closed,
            _ => return Err(ImportError::Damaged),
        };
        let known = seen::APPLICATION_FIN | seen::LISTENER_FIN | seen::ESTABLISHED | seen::DNS;
        let v4 = |octets: Octets| Ipv6Addr::from(octets).to_ipv4_mapped().is_some();
        if flags & !known != 0 || v4(application) != v4(vip) || !self.config.plan.contains(address(vip)) {
            return Err(ImportError::Damaged);
        }
        let mut flow = Flow {
            application,
            vip,
            application_port,
            vip_port,
            mapped_port,
            state,
            seen: flags,
            generation: 0,
            active: 0,
            link: 0,
        };
        if !flow.is_pending() {
            return Ok((flow, None));
        }
        let left = Duration::from_millis(u64::from(u32::from_be_bytes(rest.array()?)));
        let length = usize::try_from(u32::from_be_bytes(rest.array()?)).map_err(|_| ImportError::Damaged)?;
        if length > FRAME_MAX {
            return Err(ImportError::Damaged);
        }
        let syn = rest.take(length)?;
        let packet = Packet::parse(syn).map_err(|_| ImportError::Damaged)?;
        let Transport::Tcp(tcp) = packet.transport else {
            return Err(ImportError::Damaged);
        };
        let names = (
            octets(packet.source),
            tcp.source_port,
            octets(packet.destination),
            tcp.destination_port,
        );
        let same = names == (application, application_port, vip, vip_port);
        if !same
            || !tcp.is_syn()
            || packet.frame_length() != length
            || self.pending() >= self.config.pending_max
        {
            return Err(ImportError::Damaged);
        }
        if state == State::Held {
            flow.seen = 0;
        }
        Ok((flow, Some((left, syn))))
    }
}

/// What is left of the budget of a held connection, and its latest SYN.
type Syn<'a> = (Duration, &'a [u8]);

/// What is left to read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], ImportError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(ImportError::Damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ImportError> {
        self.take(N)?.try_into().map_err(|_| ImportError::Damaged)
    }
}
