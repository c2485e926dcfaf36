//! IP packets behind a virtio-net header, as a TUN device with offloads hands them over: reading, rewriting in place,
//! and building the few answers that the agent gives itself.
//!
//! Position: layer 0. `tombolo-flow` decides with it what becomes of a packet; the capture loop moves the bytes.
//!
//! ```
//! use tombolo_packet::{FRAME_MAX, Packet, Transport, build};
//! let mut frame = vec![0u8; FRAME_MAX];
//! let (client, vip) = ("10.0.0.1:4000".parse().unwrap(), "240.240.0.1:53".parse().unwrap());
//! let length = build::datagram(&mut frame, client, vip, b"hello").unwrap();
//! let packet = Packet::parse(&frame[..length]).unwrap();
//! assert!(matches!(packet.transport, Transport::Udp(udp) if udp.destination_port == 53));
//! ```
//!
//! **Invariant:** no packet, however broken, makes this crate panic or read outside of its frame.
//! **Invariant:** nothing is allocated; answers are built in the buffer that the caller lends.
//! **Invariant:** fragments, routing headers and jumbograms are refused, never guessed at.

pub mod build;
pub mod checksum;
mod packet;
mod vnet;

pub use packet::{Icmp, Packet, PacketError, Tcp, Transport, Udp, tcp_flags};
pub use vnet::{VNET_LENGTH, VnetHeader};

/// Bytes that hold every frame a TUN device hands over: the virtio-net header and the longest IP packet. An IPv6
/// super-segment is longer than 65,535 bytes by its own header.
pub const FRAME_MAX: usize = VNET_LENGTH + 40 + 65_535;

#[cfg(test)]
mod tests;
