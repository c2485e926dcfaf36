//! Which packet belongs to which connection: the table that lets the kernel's own TCP terminate connections to virtual
//! addresses.
//!
//! Position: layer 1, between the TUN device and the agent's listener. An application sends `A:p -> VIP:q` into the
//! TUN; the table turns that into `VIP:p' -> mesh0:15001`, so that the kernel delivers it to the listener, and turns
//! the listener's `mesh0:15001 -> VIP:p'` back into `VIP:q -> A:p`. `p'` is `p` unless another connection to the VIP
//! has it. The pair (VIP, p') is what the listener sees as its peer, and the key of a connection.
//!
//! The first SYN of a connection is held until somebody decides: [`FlowTable::accept`] gives it back for delivery,
//! [`FlowTable::refuse`] builds the RST or ICMP error for the application. DNS by TCP is not held, DNS by UDP and
//! pings are handed up, everything else is refused by name.
//!
//! **Invariant:** no clock, sockets or randomness: `now` and a seed are arguments.
//! **Invariant:** (VIP, p') belongs to one connection at a time; a packet of one never reaches another.
//! **Invariant:** every memory is bounded: held connections, open ones, and closed ones that linger.

mod flow;
mod outcome;
mod pending;
mod reject;
mod slots;
mod sources;
mod table;
mod transfer;

pub use flow::{FlowId, Listener};
pub use outcome::{FlowConfig, Outcome, Overdue, Signal};
pub use reject::FlowReject;
pub use sources::Sources;
pub use table::{FLOWS_MAX, FlowTable};
pub use transfer::{HeldFlow, ImportError};

/// How a held connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// RST: the application reads ECONNREFUSED.
    Reset,
    /// ICMP host unreachable: the application reads EHOSTUNREACH.
    HostUnreachable,
    /// Nothing is sent; the application's next retransmission is a new event.
    Silent,
}

#[cfg(test)]
mod tests;
