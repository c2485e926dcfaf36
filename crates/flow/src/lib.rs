//! Skeleton.

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
