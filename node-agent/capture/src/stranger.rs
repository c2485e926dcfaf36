//! The answer to a packet that is not taken, because its source is neither this host nor a bridge that was opted in.

use tombolo_packet::{Packet, Transport, build};
use tombolo_types::AddressPlan;

/// Turns such a packet into its answer, so that a container that was not opted in is refused at once and does not wait:
/// a RST to the start of a connection, "port unreachable" to a datagram. Its length; `None` where nobody is to be told.
pub(crate) fn answer(buffer: &mut [u8], length: usize, plan: &AddressPlan) -> Option<usize> {
    let packet = Packet::parse(buffer.get(..length)?).ok()?;
    let source = packet.source;
    // An answer to one of the mesh's own addresses would come back here.
    if plan.contains(source) || source.is_loopback() || source.is_multicast() || source.is_unspecified() {
        return None;
    }
    match packet.transport {
        Transport::Tcp(tcp) if tcp.is_syn() => build::reset(buffer, &packet),
        Transport::Udp(_) => build::unreachable(buffer, &packet, build::Unreachable::Port),
        Transport::Tcp(_) | Transport::Icmp(_) | Transport::Other(_) => None,
    }
}
