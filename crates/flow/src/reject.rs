use tombolo_packet::PacketError;

macro_rules! rejects {
    ($($(#[doc = $doc:literal])+ $variant:ident = $reason:literal,)*) => {
        /// Why a packet went no further. Each has a counter in the table.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum FlowReject { $($(#[doc = $doc])+ $variant,)* }

        impl FlowReject {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// A stable name for counters.
            pub fn reason(self) -> &'static str {
                match self { $(Self::$variant => $reason,)* }
            }
        }
    };
}

rejects! {
    /// The packet is broken or of a kind that is not taken.
    Packet = "packet",
    /// A fragment.
    Fragment = "fragment",
    /// Not to a virtual address: multicast, neighbour discovery, strays.
    NotMesh = "not_mesh",
    /// A family that mesh0 does not offer.
    Family = "family_not_offered",
    /// Its source is neither an address of this host nor in a prefix that was opted in.
    ForeignSource = "foreign_source",
    /// A TCP segment of no connection; answered by RST.
    UnknownFlow = "unknown_flow",
    /// A segment that does not fit a held connection.
    WhileHeld = "while_held",
    /// Too many connections are held; answered by RST.
    PendingFull = "pending_full",
    /// No entry or no port is free; answered by RST.
    FlowsFull = "flows_full",
    /// A connection was held longer than the budget; answered by RST.
    HoldExpired = "hold_expired",
    /// The connection to a port of the DNS address other than 53; answered by RST.
    DnsPort = "dns_port",
    /// UDP to another port than DNS; answered by port unreachable.
    UdpPort = "udp_port",
    /// ICMP other than an echo request.
    Icmp = "icmp",
    /// Another protocol than TCP, UDP and ICMP.
    Protocol = "protocol",
    /// The checksum of a datagram or ping is wrong.
    Checksum = "checksum",
}

impl From<PacketError> for FlowReject {
    fn from(error: PacketError) -> Self {
        if error == PacketError::Fragment {
            Self::Fragment
        } else {
            Self::Packet
        }
    }
}
