//! The Internet checksum: whole, of a pseudo-header, and its change when words change.
//!
//! Source: RFC 1071, RFC 1624 (equation 3), RFC 8200 section 8.1.

use std::net::IpAddr;

/// Adds bytes as big-endian 16-bit words to a running sum; an odd last byte is padded with zero.
pub fn add(sum: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    // 32-bit words: carries collect in the upper half and are folded in at the end (2^16 = 1 modulo 2^16 - 1).
    let sum = words
        .iter()
        .fold(sum, |sum, word| sum + u64::from(u32::from_be_bytes(*word)));
    match *rest {
        [] => sum,
        [a] => sum + u64::from(u16::from_be_bytes([a, 0])),
        [a, b] => sum + u64::from(u16::from_be_bytes([a, b])),
        [a, b, c, ..] => sum + u64::from(u16::from_be_bytes([a, b])) + u64::from(u16::from_be_bytes([c, 0])),
    }
}

/// Adds an address.
pub fn add_address(sum: u64, address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(a) => add(sum, &a.octets()),
        IpAddr::V6(a) => add(sum, &a.octets()),
    }
}

/// Folds a running sum to 16 bits.
pub fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    u16::try_from(sum).unwrap_or(u16::MAX) // three folds of 33 bits leave 16: never taken
}

/// The sum of the pseudo-header: addresses, protocol, length of the transport header and payload in bytes.
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: u32) -> u64 {
    add_address(add_address(0, source), destination) + u64::from(protocol) + u64::from(length)
}

/// How a checksum changes when some of the words under it change.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change(u64);

impl Change {
    /// A word of the packet becomes another.
    pub fn word(self, old: u16, new: u16) -> Self {
        Self(self.0 + u64::from(!old) + u64::from(new))
    }

    /// An address becomes another of the same family.
    pub fn address(self, old: IpAddr, new: IpAddr) -> Self {
        // Modulo 2^16 - 1 the complement of a sum is the sum of the complements: one subtraction for all words.
        let old = u64::from(!fold(add_address(0, old)));
        Self(add_address(self.0, new) + old)
    }

    /// Both changes.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// The new value of a checksum as packets carry it (complemented).
    pub fn apply(self, checksum: u16) -> u16 {
        !fold(self.0 + u64::from(!checksum))
    }

    /// The new value of a pseudo-header sum as packets with a partial checksum carry it (not complemented).
    pub fn apply_partial(self, sum: u16) -> u16 {
        fold(self.0 + u64::from(sum))
    }
}
