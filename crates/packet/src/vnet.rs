/// Length of the virtio-net header before each packet: TUN's default, without `num_buffers`.
pub const VNET_LENGTH: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the transport checksum holds only the pseudo-header's sum.
const NEEDS_CHECKSUM: u8 = 1;

/// The virtio-net header, in the byte order of the host.
///
/// Source: `struct virtio_net_hdr` of linux/virtio_net.h; VIRTIO 1.2 section 5.1.6.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`; zero is an ordinary packet.
    pub gso_type: u8,
    /// Bytes of the headers of a super-segment: what the kernel keeps contiguous.
    pub header_length: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where checksumming starts, in bytes from the start of the IP packet.
    pub checksum_start: u16,
    /// Where the checksum is stored, in bytes from `checksum_start`.
    pub checksum_offset: u16,
}

impl VnetHeader {
    /// Reads the header of a frame.
    pub fn read(frame: &[u8]) -> Option<(Self, &[u8])> {
        let (head, packet) = frame.split_first_chunk::<VNET_LENGTH>()?;
        let [flags, gso_type, a, b, c, d, e, f, g, h] = *head;
        let header = Self {
            flags,
            gso_type,
            header_length: u16::from_ne_bytes([a, b]),
            gso_size: u16::from_ne_bytes([c, d]),
            checksum_start: u16::from_ne_bytes([e, f]),
            checksum_offset: u16::from_ne_bytes([g, h]),
        };
        Some((header, packet))
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; VNET_LENGTH] {
        let [a, b] = self.header_length.to_ne_bytes();
        let [c, d] = self.gso_size.to_ne_bytes();
        let [e, f] = self.checksum_start.to_ne_bytes();
        let [g, h] = self.checksum_offset.to_ne_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }

    /// A header for a packet whose transport checksum is partial.
    pub fn partial(checksum_start: u16, checksum_offset: u16) -> Self {
        Self {
            flags: NEEDS_CHECKSUM,
            checksum_start,
            checksum_offset,
            ..Self::default()
        }
    }

    /// True if the transport checksum holds only the pseudo-header's sum.
    pub fn needs_checksum(self) -> bool {
        self.flags & NEEDS_CHECKSUM != 0
    }
}
