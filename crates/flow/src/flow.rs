use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use tombolo_types::ports;

/// Names a connection of the table for as long as it is in it. A later connection in the same place has another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// Which listener on mesh0's own address takes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Listener {
    /// Connections to services.
    Services,
    /// DNS by TCP.
    Dns,
}

impl Listener {
    /// Its port.
    pub fn port(self) -> u16 {
        match self {
            Self::Services => ports::CAPTURE,
            Self::Dns => ports::CAPTURE_DNS,
        }
    }

    /// The listener of a port.
    pub fn of_port(port: u16) -> Option<Self> {
        [Self::Services, Self::Dns]
            .into_iter()
            .find(|listener| listener.port() == port)
    }
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The place is free.
    Free,
    /// Its SYN is kept, nothing was delivered.
    Held,
    /// Its SYN was delivered; the listener has not handed over the socket yet.
    Accepting,
    /// The socket was handed over.
    Open,
    /// Both sides sent FIN, or one sent RST. Late segments still pass.
    Closed,
}

/// What was seen of a connection.
pub(crate) mod seen {
    /// FIN from the application.
    pub(crate) const APPLICATION_FIN: u8 = 1;
    /// FIN from the listener's side.
    pub(crate) const LISTENER_FIN: u8 = 2;
    /// The application's first ACK: the listener's socket is there or will be in a moment.
    pub(crate) const ESTABLISHED: u8 = 4;
    /// It is one to the DNS address.
    pub(crate) const DNS: u8 = 8;
}

/// An address in 16 bytes; IPv4 is mapped. Mapped addresses never come from packets (see `Sources`), so that the two
/// families stay apart.
pub(crate) type Octets = [u8; 16];

pub(crate) fn octets(address: IpAddr) -> Octets {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

pub(crate) fn address(octets: Octets) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

/// One connection. There may be hundreds of thousands: every byte counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flow {
    pub(crate) application: Octets,
    pub(crate) vip: Octets,
    pub(crate) application_port: u16,
    pub(crate) vip_port: u16,
    /// The port that the listener sees: p'.
    pub(crate) mapped_port: u16,
    pub(crate) state: State,
    pub(crate) seen: u8,
    pub(crate) generation: u32,
    /// Seconds since the table was made.
    pub(crate) active: u32,
    /// Held or accepting: where its SYN is. Free: the next free place.
    pub(crate) link: u32,
}

const _: () = assert!(
    size_of::<Flow>() <= 52,
    "5,000 connections are to cost a quarter of a megabyte"
);

impl Flow {
    pub(crate) fn application(&self) -> SocketAddr {
        SocketAddr::new(address(self.application), self.application_port)
    }

    pub(crate) fn destination(&self) -> SocketAddr {
        SocketAddr::new(address(self.vip), self.vip_port)
    }

    pub(crate) fn mapped(&self) -> SocketAddr {
        SocketAddr::new(address(self.vip), self.mapped_port)
    }

    pub(crate) fn listener(&self) -> Listener {
        if self.seen & seen::DNS == 0 {
            Listener::Services
        } else {
            Listener::Dns
        }
    }

    pub(crate) fn is_pending(&self) -> bool {
        matches!(self.state, State::Held | State::Accepting)
    }

    pub(crate) fn is_from(
        &self,
        application: Octets,
        application_port: u16,
        vip: Octets,
        vip_port: u16,
    ) -> bool {
        self.application_port == application_port
            && self.vip_port == vip_port
            && self.application == application
            && self.vip == vip
    }
}

/// Hashes words with a key. Applications of this host choose what is hashed: the key keeps them from choosing
/// collisions.
pub(crate) fn hash(seed: u64, words: &[u64]) -> u64 {
    const MULTIPLIER: u128 = 0x9e37_79b9_7f4a_7c15;
    let mix = |value: u64| {
        let product = u128::from(value) * MULTIPLIER;
        // The two halves are what is wanted.
        (product as u64) ^ ((product >> 64) as u64)
    };
    words
        .iter()
        .fold(mix(seed), |state, word| mix(state.rotate_left(23) ^ word))
}

pub(crate) fn words(octets: Octets) -> [u64; 2] {
    let (halves, _) = octets.as_chunks::<8>();
    [halves.first(), halves.get(1)].map(|half| half.map_or(0, |half| u64::from_ne_bytes(*half)))
}
