use crate::{
    VNET_LENGTH, VnetHeader,
    checksum::{self, Change},
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Most IPv6 extension headers before the transport: a host sends one or two.
const EXTENSION_HEADERS_MAX: usize = 4;

/// Protocol numbers (IANA).
pub(crate) mod protocol {
    pub(crate) const HOP_BY_HOP: u8 = 0;
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ROUTING: u8 = 43;
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const AUTHENTICATION: u8 = 51;
    pub(crate) const ICMP6: u8 = 58;
    pub(crate) const DESTINATION_OPTIONS: u8 = 60;
}

/// TCP's flag bits.
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// First segment.
    pub const SYN: u8 = 0x02;
    /// The connection is gone.
    pub const RST: u8 = 0x04;
    /// The acknowledgment number counts.
    pub const ACK: u8 = 0x10;
}

/// Why a frame was refused. [`Self::reason`] is its counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// A header does not fit into the frame.
    #[error("the packet is shorter than its headers say")]
    Truncated,
    /// Neither version 4 nor 6.
    #[error("not an IP packet")]
    Version,
    /// A fragment: ports are not in every one of them.
    #[error("a fragment")]
    Fragment,
    /// Routing or authentication headers (they change what the checksums cover), or too many headers.
    #[error("an IPv6 extension header that is not taken")]
    ExtensionHeader,
    /// The virtio-net header asks for a checksum elsewhere than in the transport header.
    #[error("the offload header does not fit the packet")]
    Offload,
    /// A packet cannot change its address family.
    #[error("the new addresses are of another family")]
    Family,
}

impl PacketError {
    /// A stable name for counters.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Truncated => "packet_truncated",
            Self::Version => "packet_version",
            Self::Fragment => "packet_fragment",
            Self::ExtensionHeader => "packet_extension_header",
            Self::Offload => "packet_offload",
            Self::Family => "packet_family",
        }
    }
}

/// What is inside the IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A TCP segment, or a super-segment.
    Tcp(Tcp),
    /// A UDP datagram.
    Udp(Udp),
    /// ICMP in IPv4, ICMPv6 in IPv6.
    Icmp(Icmp),
    /// Another protocol, by number.
    Other(u8),
}

/// The TCP header's fields that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcp {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// [`tcp_flags`].
    pub flags: u8,
    /// Bytes after the header.
    pub payload_length: u32,
}

impl Tcp {
    /// True if all bits of `flags` are set.
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// True for the first segment of a connection.
    pub fn is_syn(&self) -> bool {
        self.flags & (tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN) == tcp_flags::SYN
    }
}

/// The UDP header's fields that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Udp {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
}

/// The ICMP header's fields that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Belongs to IPv6.
    pub v6: bool,
}

impl Icmp {
    /// True for an echo request.
    pub fn is_echo_request(&self) -> bool {
        self.code == 0 && self.kind == if self.v6 { 128 } else { 8 }
    }
}

/// What was read from a frame: addresses, transport, and where things are. It borrows nothing, so that the frame can
/// be changed with its help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// What is inside.
    pub transport: Transport,
    /// Where the transport header starts in the frame.
    transport_at: usize,
    /// Where the packet ends in the frame; behind it may be padding.
    end: usize,
    /// The transport checksum is partial.
    partial: bool,
}

/// The IP header's part of what is read.
struct Ip {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// From the start of the IP packet.
    transport_at: usize,
    /// From the start of the IP packet.
    end: usize,
}

impl Packet {
    /// Reads a frame: the virtio-net header and an IP packet.
    ///
    /// # Errors
    /// When the frame is broken or of a kind that is not taken.
    pub fn parse(frame: &[u8]) -> Result<Self, PacketError> {
        let (vnet, bytes) = VnetHeader::read(frame).ok_or(PacketError::Truncated)?;
        let ip = match bytes.first().map(|byte| byte >> 4) {
            Some(4) => read_v4(bytes)?,
            Some(6) => read_v6(bytes)?,
            Some(_) => return Err(PacketError::Version),
            None => return Err(PacketError::Truncated),
        };
        let body = bytes.get(ip.transport_at..ip.end).ok_or(PacketError::Truncated)?;
        let (transport, checksum_offset) = read_transport(ip.protocol, ip.source.is_ipv6(), body)?;
        let partial = vnet.needs_checksum();
        if partial
            && (usize::from(vnet.checksum_start) != ip.transport_at
                || Some(vnet.checksum_offset) != checksum_offset)
        {
            return Err(PacketError::Offload);
        }
        Ok(Self {
            source: ip.source,
            destination: ip.destination,
            transport,
            transport_at: VNET_LENGTH + ip.transport_at,
            end: VNET_LENGTH + ip.end,
            partial,
        })
    }

    /// Length of the frame without padding.
    pub fn frame_length(&self) -> usize {
        self.end
    }

    /// The IP packet inside the frame it was read from.
    pub fn ip<'f>(&self, frame: &'f [u8]) -> &'f [u8] {
        frame.get(VNET_LENGTH..self.end).unwrap_or_default()
    }

    /// The transport header and what follows, inside the frame it was read from.
    pub fn body<'f>(&self, frame: &'f [u8]) -> &'f [u8] {
        frame.get(self.transport_at..self.end).unwrap_or_default()
    }

    /// The payload of a UDP datagram.
    pub fn datagram<'f>(&self, frame: &'f [u8]) -> Option<&'f [u8]> {
        match self.transport {
            Transport::Udp(_) => self.body(frame).get(8..),
            Transport::Tcp(_) | Transport::Icmp(_) | Transport::Other(_) => None,
        }
    }

    /// Checks the transport checksum. A partial one is taken as right: the packet never left this kernel.
    pub fn checksum_is_right(&self, frame: &[u8]) -> bool {
        let body = self.body(frame);
        let Ok(length) = u32::try_from(body.len()) else {
            return false;
        };
        let pseudo = |protocol| checksum::pseudo_header(self.source, self.destination, protocol, length);
        let sum = match self.transport {
            _ if self.partial => return true,
            Transport::Udp(_) if body.get(6..8) == Some(&[0, 0]) => return self.source.is_ipv4(),
            Transport::Tcp(_) => pseudo(protocol::TCP),
            Transport::Udp(_) => pseudo(protocol::UDP),
            Transport::Icmp(Icmp { v6: true, .. }) => pseudo(protocol::ICMP6),
            Transport::Icmp(Icmp { v6: false, .. }) => 0,
            Transport::Other(_) => return true,
        };
        checksum::fold(checksum::add(sum, body)) == 0xffff
    }

    /// Gives a TCP segment new addresses and ports, in place, in the frame it was read from.
    ///
    /// The IPv4 header's checksum and a full TCP checksum are brought up to date incrementally: what was wrong stays
    /// wrong. In a partial one only the pseudo-header's sum changes; the kernel adds the rest.
    ///
    /// # Errors
    /// When the addresses are of another family or the frame is not the one that was read. The frame is unchanged.
    pub fn rewrite_tcp(
        &self,
        frame: &mut [u8],
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Result<(), PacketError> {
        let Transport::Tcp(tcp) = self.transport else {
            return Err(PacketError::Family);
        };
        let change = Change::default()
            .address(self.source, source.ip())
            .and(Change::default().address(self.destination, destination.ip()));
        if frame.len() < self.transport_at + 20 {
            return Err(PacketError::Truncated);
        }
        let (ip, body) = frame.split_at_mut(self.transport_at);
        match (source.ip(), destination.ip(), self.source) {
            (IpAddr::V4(source), IpAddr::V4(destination), IpAddr::V4(_)) => {
                let Some(header) = ip
                    .get_mut(VNET_LENGTH..)
                    .and_then(|ip| ip.first_chunk_mut::<20>())
                else {
                    return Err(PacketError::Truncated);
                };
                let sum = change.apply(u16::from_be_bytes([header[10], header[11]]));
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                header[12..16].copy_from_slice(&source.octets());
                header[16..20].copy_from_slice(&destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination), IpAddr::V6(_)) => {
                let Some(header) = ip
                    .get_mut(VNET_LENGTH..)
                    .and_then(|ip| ip.first_chunk_mut::<40>())
                else {
                    return Err(PacketError::Truncated);
                };
                header[8..24].copy_from_slice(&source.octets());
                header[24..40].copy_from_slice(&destination.octets());
            }
            _ => return Err(PacketError::Family),
        }
        let old = u16::from_be_bytes([body[16], body[17]]);
        let new = if self.partial {
            change.apply_partial(old)
        } else {
            change
                .word(tcp.source_port, source.port())
                .word(tcp.destination_port, destination.port())
                .apply(old)
        };
        body[0..2].copy_from_slice(&source.port().to_be_bytes());
        body[2..4].copy_from_slice(&destination.port().to_be_bytes());
        body[16..18].copy_from_slice(&new.to_be_bytes());
        Ok(())
    }
}

fn read_v4(bytes: &[u8]) -> Result<Ip, PacketError> {
    let header = bytes.first_chunk::<20>().ok_or(PacketError::Truncated)?;
    let transport_at = usize::from(header[0] & 0x0f) * 4;
    let end = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if transport_at < 20 || end < transport_at || end > bytes.len() {
        return Err(PacketError::Truncated);
    }
    // "More fragments", or an offset.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(PacketError::Fragment);
    }
    Ok(Ip {
        source: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
        destination: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
        protocol: header[9],
        transport_at,
        end,
    })
}

fn read_v6(bytes: &[u8]) -> Result<Ip, PacketError> {
    let header = bytes.first_chunk::<40>().ok_or(PacketError::Truncated)?;
    let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let end = 40 + payload;
    // A payload length of zero is a jumbogram or nothing.
    if payload == 0 || end > bytes.len() {
        return Err(PacketError::Truncated);
    }
    let address = |at: usize| -> Result<IpAddr, PacketError> {
        let octets = header
            .get(at..)
            .and_then(|rest| rest.first_chunk::<16>())
            .ok_or(PacketError::Truncated)?;
        Ok(Ipv6Addr::from(*octets).into())
    };
    let (source, destination) = (address(8)?, address(24)?);
    let (mut next, mut at) = (header[6], 40);
    for _ in 0..EXTENSION_HEADERS_MAX {
        match next {
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS => {
                let extension = bytes
                    .get(at..end)
                    .and_then(|rest| rest.first_chunk::<2>())
                    .ok_or(PacketError::Truncated)?;
                next = extension[0];
                at += (usize::from(extension[1]) + 1) * 8;
                if at > end {
                    return Err(PacketError::Truncated);
                }
            }
            protocol::FRAGMENT => return Err(PacketError::Fragment),
            protocol::ROUTING | protocol::AUTHENTICATION => return Err(PacketError::ExtensionHeader),
            protocol => {
                return Ok(Ip {
                    source,
                    destination,
                    protocol,
                    transport_at: at,
                    end,
                });
            }
        }
    }
    Err(PacketError::ExtensionHeader)
}

/// Reads the transport header; with it comes where its checksum is.
fn read_transport(protocol: u8, v6: bool, body: &[u8]) -> Result<(Transport, Option<u16>), PacketError> {
    match (protocol, v6) {
        (protocol::TCP, _) => {
            let header = body.first_chunk::<20>().ok_or(PacketError::Truncated)?;
            let length = usize::from(header[12] >> 4) * 4;
            let payload = body
                .len()
                .checked_sub(length)
                .filter(|_| length >= 20)
                .ok_or(PacketError::Truncated)?;
            let tcp = Tcp {
                source_port: u16::from_be_bytes([header[0], header[1]]),
                destination_port: u16::from_be_bytes([header[2], header[3]]),
                sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
                acknowledgment: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
                flags: header[13],
                payload_length: u32::try_from(payload).unwrap_or(u32::MAX),
            };
            Ok((Transport::Tcp(tcp), Some(16)))
        }
        (protocol::UDP, _) => {
            let header = body.first_chunk::<8>().ok_or(PacketError::Truncated)?;
            if usize::from(u16::from_be_bytes([header[4], header[5]])) != body.len() {
                return Err(PacketError::Truncated);
            }
            let udp = Udp {
                source_port: u16::from_be_bytes([header[0], header[1]]),
                destination_port: u16::from_be_bytes([header[2], header[3]]),
            };
            Ok((Transport::Udp(udp), Some(6)))
        }
        (protocol::ICMP, false) | (protocol::ICMP6, true) => {
            let header = body.first_chunk::<8>().ok_or(PacketError::Truncated)?;
            Ok((
                Transport::Icmp(Icmp {
                    kind: header[0],
                    code: header[1],
                    v6,
                }),
                Some(2),
            ))
        }
        (other, _) => Ok((Transport::Other(other), None)),
    }
}
