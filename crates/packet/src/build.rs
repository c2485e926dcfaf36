//! Answers that the agent gives itself. Each is built in a buffer that the caller lends, virtio-net header first, with
//! full checksums, and its length is returned; `None` means that the buffer is too short or that there is no such
//! answer.

use crate::{Icmp, Packet, Tcp, Transport, VNET_LENGTH, checksum, packet::protocol, tcp_flags};
use std::net::{IpAddr, SocketAddr};

/// Hop limit of what is built.
const TTL: u8 = 64;
/// Most bytes of the offending packet that an ICMP error repeats: the error stays within 576 bytes (RFC 1812 section
/// 4.3.2.3), which is within RFC 4443's 1,280 too.
const QUOTE_MAX: usize = 576 - 40 - 8;

/// What an ICMP error says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// Nobody has the address: connect() reads EHOSTUNREACH. In ICMPv6 that is code 3, address unreachable: code 1
    /// reads EACCES.
    Host,
    /// Nobody listens at the port: a UDP socket reads ECONNREFUSED.
    Port,
}

/// The RST that answers a TCP segment, from the segment's destination to its source.
///
/// `None` for a segment that is a RST itself. Source: RFC 9293 section 3.10.7.1.
pub fn reset(buffer: &mut [u8], packet: &Packet) -> Option<usize> {
    let Transport::Tcp(tcp) = packet.transport else {
        return None;
    };
    if tcp.has(tcp_flags::RST) {
        return None;
    }
    let (sequence, acknowledgment, flags) = if tcp.has(tcp_flags::ACK) {
        (tcp.acknowledgment, 0, tcp_flags::RST)
    } else {
        (
            0,
            tcp.sequence.wrapping_add(occupied(&tcp)),
            tcp_flags::RST | tcp_flags::ACK,
        )
    };
    let mut header = [0u8; 20];
    header[0..2].copy_from_slice(&tcp.destination_port.to_be_bytes());
    header[2..4].copy_from_slice(&tcp.source_port.to_be_bytes());
    header[4..8].copy_from_slice(&sequence.to_be_bytes());
    header[8..12].copy_from_slice(&acknowledgment.to_be_bytes());
    header[12] = 5 << 4;
    header[13] = flags;
    let at = ip_header(
        buffer,
        packet.destination,
        packet.source,
        protocol::TCP,
        header.len(),
    )?;
    buffer.get_mut(at..at + header.len())?.copy_from_slice(&header);
    let sum = checksum::pseudo_header(packet.destination, packet.source, protocol::TCP, 20);
    finish(buffer, at, header.len(), 16, sum)
}

/// Sequence numbers that a segment takes.
fn occupied(tcp: &Tcp) -> u32 {
    tcp.payload_length
        .wrapping_add(u32::from(tcp.has(tcp_flags::SYN)))
        .wrapping_add(u32::from(tcp.has(tcp_flags::FIN)))
}

/// The ICMP error that answers a packet, which must lie at the start of `buffer`; it comes from the packet's
/// destination.
pub fn unreachable(buffer: &mut [u8], packet: &Packet, what: Unreachable) -> Option<usize> {
    let quoted = packet.ip(buffer).len().min(QUOTE_MAX);
    let (ip_length, kind, code, protocol) = match (packet.source, what) {
        (IpAddr::V4(_), Unreachable::Host) => (20, 3, 1, protocol::ICMP),
        (IpAddr::V4(_), Unreachable::Port) => (20, 3, 3, protocol::ICMP),
        (IpAddr::V6(_), Unreachable::Host) => (40, 1, 3, protocol::ICMP6),
        (IpAddr::V6(_), Unreachable::Port) => (40, 1, 4, protocol::ICMP6),
    };
    let quote_at = VNET_LENGTH + ip_length + 8;
    if buffer.len() < quote_at + quoted {
        return None;
    }
    buffer.copy_within(VNET_LENGTH..VNET_LENGTH + quoted, quote_at);
    let length = 8 + quoted;
    let at = ip_header(buffer, packet.destination, packet.source, protocol, length)?;
    buffer
        .get_mut(at..at + 8)?
        .copy_from_slice(&[kind, code, 0, 0, 0, 0, 0, 0]);
    let sum = icmp_pseudo_header(packet.destination, packet.source, length)?;
    finish(buffer, at, length, 2, sum)
}

/// Turns an echo request, which must lie at the start of `buffer`, into its reply.
pub fn echo_reply(buffer: &mut [u8], packet: &Packet) -> Option<usize> {
    let Transport::Icmp(icmp @ Icmp { v6, .. }) = packet.transport else {
        return None;
    };
    if !icmp.is_echo_request() {
        return None;
    }
    let (body_at, length) = (
        packet.frame_length() - packet.body(buffer).len(),
        packet.body(buffer).len(),
    );
    // The reply has no options or extension headers: the body may move forward, never back.
    let protocol = if v6 { protocol::ICMP6 } else { protocol::ICMP };
    let at = VNET_LENGTH + if v6 { 40 } else { 20 };
    if buffer.len() < body_at + length {
        return None;
    }
    buffer.copy_within(body_at..body_at + length, at);
    ip_header(buffer, packet.destination, packet.source, protocol, length)?;
    let header = buffer.get_mut(at..at + 4)?;
    header.copy_from_slice(&[if v6 { 129 } else { 0 }, 0, 0, 0]);
    let sum = icmp_pseudo_header(packet.destination, packet.source, length)?;
    finish(buffer, at, length, 2, sum)
}

/// A UDP datagram. Both addresses must be of one family.
pub fn datagram(
    buffer: &mut [u8],
    source: SocketAddr,
    destination: SocketAddr,
    payload: &[u8],
) -> Option<usize> {
    let length = u16::try_from(8 + payload.len()).ok()?;
    let at = ip_header(
        buffer,
        source.ip(),
        destination.ip(),
        protocol::UDP,
        usize::from(length),
    )?;
    let body = buffer.get_mut(at..at + usize::from(length))?;
    body[0..2].copy_from_slice(&source.port().to_be_bytes());
    body[2..4].copy_from_slice(&destination.port().to_be_bytes());
    body[4..6].copy_from_slice(&length.to_be_bytes());
    body[6..8].fill(0);
    body[8..].copy_from_slice(payload);
    let sum = checksum::pseudo_header(source.ip(), destination.ip(), protocol::UDP, u32::from(length));
    let end = finish(buffer, at, usize::from(length), 6, sum)?;
    // Zero would say "no checksum" (RFC 768).
    let field = buffer.get_mut(at + 6..at + 8)?;
    if field == [0, 0] {
        field.fill(0xff);
    }
    Some(end)
}

/// Writes the virtio-net and IP headers; returns where the transport header starts.
fn ip_header(
    buffer: &mut [u8],
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    length: usize,
) -> Option<usize> {
    buffer.get_mut(..VNET_LENGTH)?.fill(0);
    let ip = buffer.get_mut(VNET_LENGTH..)?;
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let header = ip.first_chunk_mut::<20>()?;
            *header = [0; 20];
            header[0] = 0x45;
            header[2..4].copy_from_slice(&u16::try_from(20 + length).ok()?.to_be_bytes());
            header[6] = 0x40; // don't fragment
            header[8] = TTL;
            header[9] = protocol;
            header[12..16].copy_from_slice(&source.octets());
            header[16..20].copy_from_slice(&destination.octets());
            let sum = !checksum::fold(checksum::add(0, header));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            Some(VNET_LENGTH + 20)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = ip.first_chunk_mut::<40>()?;
            *header = [0; 40];
            header[0] = 0x60;
            header[4..6].copy_from_slice(&u16::try_from(length).ok()?.to_be_bytes());
            header[6] = protocol;
            header[7] = TTL;
            header[8..24].copy_from_slice(&source.octets());
            header[24..40].copy_from_slice(&destination.octets());
            Some(VNET_LENGTH + 40)
        }
        _ => None,
    }
}

/// ICMPv6 covers a pseudo-header, ICMP does not.
fn icmp_pseudo_header(source: IpAddr, destination: IpAddr, length: usize) -> Option<u64> {
    let length = u32::try_from(length).ok()?;
    Some(if source.is_ipv6() {
        checksum::pseudo_header(source, destination, protocol::ICMP6, length)
    } else {
        0
    })
}

/// Computes the transport checksum over a body whose field holds zero; returns the frame's length.
fn finish(buffer: &mut [u8], at: usize, length: usize, field: usize, pseudo: u64) -> Option<usize> {
    let body = buffer.get_mut(at..at + length)?;
    let sum = !checksum::fold(checksum::add(pseudo, body));
    body.get_mut(field..field + 2)?
        .copy_from_slice(&sum.to_be_bytes());
    Some(at + length)
}
