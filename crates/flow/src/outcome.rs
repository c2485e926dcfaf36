use crate::{FlowId, Listener};
use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
    time::Duration,
};
use tombolo_types::AddressPlan;

/// How a table is made.
#[derive(Debug, Clone)]
pub struct FlowConfig {
    /// VIP prefixes and mesh0's own addresses.
    pub plan: AddressPlan,
    /// IPv4 is offered.
    pub ipv4: bool,
    /// IPv6 is offered.
    pub ipv6: bool,
    /// Most connections held or waiting for their socket at once.
    pub pending_max: usize,
    /// Longest time from the first SYN to the handing over of the socket.
    pub hold: Duration,
    /// Keys the hashes and the choice of ports; drawn at random by the caller.
    pub seed: u64,
}

/// What to do with the frame that was handled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Write so many bytes of the frame back to the device; it was rewritten, or replaced by an answer.
    Write(usize),
    /// As [`Self::Write`], and something happened to a connection that is waiting for its socket.
    WriteThen(usize, Signal),
    /// A connection was made: its SYN is held.
    Connect {
        /// To accept or refuse it.
        id: FlowId,
        /// The application.
        source: SocketAddr,
        /// VIP and port.
        destination: SocketAddr,
    },
    /// A DNS query.
    Query {
        /// Who asks.
        source: SocketAddr,
        /// The DNS address.
        destination: SocketAddr,
        /// Where in the frame the query is.
        datagram: Range<usize>,
    },
    /// An echo request; `build::echo_reply` makes the answer from the frame.
    Ping {
        /// The pinged address.
        destination: IpAddr,
        /// Length of the frame.
        length: usize,
    },
    /// Nothing.
    Nothing,
}

/// What happened to a connection that is waiting for its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Once the frame is written, the listener has the socket: accept now.
    Established {
        /// Which listener.
        listener: Listener,
        /// Of which family.
        v6: bool,
    },
    /// The application gave up.
    Abandoned(FlowId),
}

/// What a timeout did.
#[derive(Debug)]
pub enum Overdue<'a> {
    /// Write this to the device.
    Write(&'a [u8]),
    /// This connection was held, or waited for its socket, for too long; it is no more.
    Expired(FlowId),
}
