use crate::{build::Unreachable, *};
use proptest::{collection::vec, prelude::*};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The checksum as RFC 1071 writes it, slowly: the judge of the fast one.
fn naive(chunks: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = chunks.concat();
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) * 256 + u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = [octets(source), octets(destination)].concat();
    bytes.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
    bytes.extend_from_slice(&[0, 0, 0, protocol]);
    bytes
}

/// A TCP segment as a sender would make it, checksums from scratch.
#[derive(Debug, Clone)]
struct Segment {
    source: SocketAddr,
    destination: SocketAddr,
    ip_options: usize,
    tcp_options: usize,
    flags: u8,
    sequence: u32,
    acknowledgment: u32,
    payload: Vec<u8>,
    partial: bool,
    padding: usize,
}

impl Segment {
    fn frame(&self) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend_from_slice(&self.source.port().to_be_bytes());
        tcp.extend_from_slice(&self.destination.port().to_be_bytes());
        tcp.extend_from_slice(&self.sequence.to_be_bytes());
        tcp.extend_from_slice(&self.acknowledgment.to_be_bytes());
        tcp.extend_from_slice(&[
            u8::try_from((20 + self.tcp_options * 4) / 4 * 16).unwrap(),
            self.flags,
        ]);
        tcp.extend_from_slice(&[0xfa, 0xf0, 0, 0, 0, 0]);
        tcp.extend(std::iter::repeat_n(1u8, self.tcp_options * 4));
        tcp.extend_from_slice(&self.payload);
        let header = pseudo(self.source.ip(), self.destination.ip(), 6, tcp.len());
        let sum = if self.partial {
            naive(&[&header])
        } else {
            !naive(&[&header, &tcp])
        };
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        let mut ip = Vec::new();
        if self.source.is_ipv4() {
            let length = 20 + self.ip_options * 4;
            ip.extend_from_slice(&[0x40 + u8::try_from(length / 4).unwrap(), 0]);
            ip.extend_from_slice(&u16::try_from(length + tcp.len()).unwrap().to_be_bytes());
            ip.extend_from_slice(&[0x12, 0x34, 0x40, 0, 64, 6, 0, 0]);
            ip.extend(octets(self.source.ip()));
            ip.extend(octets(self.destination.ip()));
            ip.extend(std::iter::repeat_n(1u8, self.ip_options * 4));
            let sum = !naive(&[&ip]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            let extension = if self.ip_options == 0 {
                vec![]
            } else {
                vec![6, 0, 1, 4, 0, 0, 0, 0]
            };
            ip.extend_from_slice(&[0x60, 0, 0, 0]);
            ip.extend_from_slice(&u16::try_from(extension.len() + tcp.len()).unwrap().to_be_bytes());
            ip.extend_from_slice(&[if extension.is_empty() { 6 } else { 0 }, 64]);
            ip.extend(octets(self.source.ip()));
            ip.extend(octets(self.destination.ip()));
            ip.extend(extension);
        }
        let vnet = if self.partial {
            VnetHeader::partial(u16::try_from(ip.len()).unwrap(), 16)
        } else {
            VnetHeader::default()
        };
        [vnet.to_bytes().to_vec(), ip, tcp, vec![0xee; self.padding]].concat()
    }
}

prop_compose! {
    fn addresses(v6: bool)(a in any::<[u8; 16]>(), b in any::<[u8; 16]>(), p in any::<u16>(), q in any::<u16>())
        -> (SocketAddr, SocketAddr)
    {
        let address = |o: [u8; 16]| -> IpAddr {
            if v6 { Ipv6Addr::from(o).into() } else { Ipv4Addr::new(o[0], o[1], o[2], o[3]).into() }
        };
        ((address(a), p).into(), (address(b), q).into())
    }
}

fn segment() -> impl Strategy<Value = (Segment, (SocketAddr, SocketAddr))> {
    any::<bool>().prop_flat_map(|v6| {
        let numbers = (any::<u32>(), any::<u32>(), any::<u8>());
        let shape = (
            0..=10usize,
            0..=10usize,
            vec(any::<u8>(), 0..200),
            any::<bool>(),
            0..4usize,
        );
        (addresses(v6), addresses(v6), numbers, shape).prop_map(
            |((source, destination), new, (sequence, acknowledgment, flags), shape)| {
                let (ip_options, tcp_options, payload, partial, padding) = shape;
                let segment = Segment {
                    source,
                    destination,
                    ip_options,
                    tcp_options,
                    flags,
                    sequence,
                    acknowledgment,
                    payload,
                    partial,
                    padding,
                };
                (segment, new)
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn rewriting_gives_the_packet_that_the_new_sender_would_have_made((segment, new) in segment()) {
        let mut frame = segment.frame();
        let packet = Packet::parse(&frame).unwrap();
        prop_assert_eq!(packet.frame_length(), frame.len() - segment.padding);
        prop_assert!(packet.checksum_is_right(&frame));
        packet.rewrite_tcp(&mut frame, new.0, new.1).unwrap();
        let expected = Segment { source: new.0, destination: new.1, ..segment }.frame();
        prop_assert_eq!(&frame, &expected);
        let again = Packet::parse(&frame).unwrap();
        prop_assert_eq!((again.source, again.destination), (new.0.ip(), new.1.ip()));
    }

    #[test]
    fn a_wrong_checksum_stays_wrong((segment, new) in segment(), damage in 1..=u16::MAX - 1) {
        let segment = Segment { partial: false, padding: 0, ..segment };
        let mut frame = segment.frame();
        let packet = Packet::parse(&frame).unwrap();
        let at = frame.len() - packet.body(&frame).len() + 16;
        let sum = u16::from_be_bytes([frame[at], frame[at + 1]]).wrapping_add(damage);
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        prop_assume!(!packet.checksum_is_right(&frame));
        packet.rewrite_tcp(&mut frame, new.0, new.1).unwrap();
        prop_assert!(!Packet::parse(&frame).unwrap().checksum_is_right(&frame));
    }

    #[test]
    fn answers_to_a_segment_are_right_packets((segment, _) in segment()) {
        let frame = segment.frame();
        let packet = Packet::parse(&frame).unwrap();
        let Transport::Tcp(tcp) = packet.transport else { panic!("not TCP") };
        let mut buffer = frame.clone();
        buffer.resize(FRAME_MAX, 0xaa);
        match build::reset(&mut buffer, &packet) {
            None => prop_assert!(tcp.has(tcp_flags::RST)),
            Some(length) => {
                let answer = check(&buffer[..length]);
                prop_assert_eq!((answer.source, answer.destination), (packet.destination, packet.source));
                let Transport::Tcp(reset) = answer.transport else { panic!("not TCP") };
                prop_assert!(reset.has(tcp_flags::RST));
                prop_assert_eq!((reset.source_port, reset.destination_port), (tcp.destination_port, tcp.source_port));
                if tcp.has(tcp_flags::ACK) {
                    prop_assert_eq!(reset.sequence, tcp.acknowledgment);
                } else {
                    let syn_fin = (tcp.flags & 1) + (tcp.flags >> 1 & 1);
                    let expected = segment.sequence.wrapping_add(u32::try_from(segment.payload.len()).unwrap());
                    prop_assert_eq!(reset.acknowledgment, expected.wrapping_add(u32::from(syn_fin)));
                    prop_assert!(reset.has(tcp_flags::ACK));
                }
            }
        }
        for what in [Unreachable::Host, Unreachable::Port] {
            let mut buffer = frame.clone();
            buffer.resize(FRAME_MAX, 0xaa);
            let length = build::unreachable(&mut buffer, &packet, what).unwrap();
            prop_assert!(length <= VNET_LENGTH + 576);
            let answer = check(&buffer[..length]);
            let Transport::Icmp(icmp) = answer.transport else { panic!("not ICMP") };
            let expected = match (icmp.v6, what) {
                (false, Unreachable::Host) => (3, 1),
                (false, Unreachable::Port) => (3, 3),
                (true, Unreachable::Host) => (1, 3),
                (true, Unreachable::Port) => (1, 4),
            };
            prop_assert_eq!((icmp.kind, icmp.code), expected);
            let quote = &answer.body(&buffer)[8..];
            prop_assert!(quote.len() >= 28 && packet.ip(&frame).starts_with(quote));
        }
    }

    #[test]
    fn datagrams_are_right_packets(
        (v6, (source, destination)) in any::<bool>().prop_flat_map(|v6| (Just(v6), addresses(v6))),
        payload in vec(any::<u8>(), 0..600),
    ) {
        let mut buffer = vec![0xaa; FRAME_MAX];
        let length = build::datagram(&mut buffer, source, destination, &payload).unwrap();
        let packet = check(&buffer[..length]);
        prop_assert_eq!(packet.source.is_ipv6(), v6);
        prop_assert_eq!(packet.datagram(&buffer), Some(payload.as_slice()));
        prop_assert_ne!(&packet.body(&buffer)[6..8], &[0, 0]);
    }

    #[test]
    fn garbage_never_panics(bytes in vec(any::<u8>(), 0..200), first in prop_oneof![Just(0x45u8), Just(0x60), any::<u8>()]) {
        let mut frame = bytes;
        if let Some(byte) = frame.get_mut(VNET_LENGTH) { *byte = first }
        exercise(&frame);
    }

    #[test]
    fn damaged_packets_never_panic((segment, _) in segment(), cut in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(), byte in any::<u8>())
    {
        let mut frame = segment.frame();
        let position = at.index(frame.len());
        frame[position] = byte;
        frame.truncate(cut.index(frame.len()) + 1);
        exercise(&frame);
    }

    #[test]
    fn sums(bytes in vec(any::<u8>(), 0..70)) {
        prop_assert_eq!(checksum::fold(checksum::add(0, &bytes)), naive(&[&bytes]));
    }
}

/// Every operation on whatever parses; also what the fuzz target runs.
fn exercise(frame: &[u8]) {
    let Ok(packet) = Packet::parse(frame) else { return };
    assert!(packet.frame_length() <= frame.len());
    let _ = (
        packet.checksum_is_right(frame),
        packet.datagram(frame),
        packet.body(frame),
    );
    for space in [0, 8, FRAME_MAX] {
        let lend = || {
            let mut buffer = frame.to_vec();
            buffer.resize(frame.len() + space, 0);
            buffer
        };
        let _ = build::reset(&mut lend(), &packet);
        let _ = build::unreachable(&mut lend(), &packet, Unreachable::Port);
        let _ = build::echo_reply(&mut lend(), &packet);
    }
    let v4: SocketAddr = "192.0.2.1:1".parse().unwrap();
    let v6: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
    let _ = packet.rewrite_tcp(&mut frame.to_vec(), v4, v4);
    let _ = packet.rewrite_tcp(&mut frame.to_vec(), v6, v6);
    let _ = packet.rewrite_tcp(&mut frame[..frame.len() / 2].to_vec(), v6, v6);
}

/// Parses a frame that must be right in every sum.
fn check(frame: &[u8]) -> Packet {
    let packet = Packet::parse(frame).unwrap();
    assert_eq!(packet.frame_length(), frame.len());
    assert_eq!(&frame[..VNET_LENGTH], &[0; VNET_LENGTH]);
    if packet.source.is_ipv4() {
        assert_eq!(naive(&[&frame[VNET_LENGTH..VNET_LENGTH + 20]]), 0xffff);
    }
    let body = packet.body(frame);
    let protocol = match packet.transport {
        Transport::Tcp(_) => 6,
        Transport::Udp(_) => 17,
        Transport::Icmp(icmp) => [1, 58][usize::from(icmp.v6)],
        Transport::Other(other) => other,
    };
    let header = if protocol == 1 {
        vec![]
    } else {
        pseudo(packet.source, packet.destination, protocol, body.len())
    };
    assert_eq!(naive(&[&header, body]), 0xffff, "{packet:?}");
    packet
}

/// An echo request with payload, checksum from scratch.
fn echo_request(source: &str, destination: &str) -> Vec<u8> {
    let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
    let v6 = source.is_ipv6();
    let mut icmp = vec![if v6 { 128 } else { 8 }, 0, 0, 0, 0x11, 0x22, 0, 1];
    icmp.extend_from_slice(b"abcdefghijk");
    let header = if v6 {
        pseudo(source, destination, 58, icmp.len())
    } else {
        vec![]
    };
    let sum = !naive(&[&header, &icmp]);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut ip = if v6 {
        let mut ip = vec![0x60, 0, 0, 0, 0, u8::try_from(icmp.len()).unwrap(), 58, 64];
        ip.extend([octets(source), octets(destination)].concat());
        ip
    } else {
        // With four bytes of options: the reply has none.
        let mut ip = vec![
            0x46,
            0,
            0,
            u8::try_from(24 + icmp.len()).unwrap(),
            0,
            0,
            0,
            0,
            64,
            1,
            0,
            0,
        ];
        ip.extend([octets(source), octets(destination), vec![1; 4]].concat());
        let sum = !naive(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip
    };
    ip.extend(icmp);
    [vec![0; VNET_LENGTH], ip].concat()
}

#[test]
fn pings_are_answered() {
    for (source, destination) in [("10.0.0.1", "240.240.0.1"), ("2001:db8::1", "2001:2::1")] {
        let mut frame = echo_request(source, destination);
        let packet = Packet::parse(&frame).unwrap();
        assert!(packet.checksum_is_right(&frame));
        let length = build::echo_reply(&mut frame, &packet).unwrap();
        let reply = check(&frame[..length]);
        assert_eq!(
            (reply.source.to_string(), reply.destination.to_string()),
            (destination.into(), source.into())
        );
        let Transport::Icmp(icmp) = reply.transport else {
            panic!("not ICMP")
        };
        assert_eq!(icmp.kind, if icmp.v6 { 129 } else { 0 });
        assert_eq!(&reply.body(&frame)[4..], b"\x11\x22\x00\x01abcdefghijk");
        assert_eq!(
            build::echo_reply(&mut frame.clone(), &reply),
            None,
            "a reply is not answered"
        );
    }
}

#[test]
fn refused() {
    let segment = Segment {
        source: "10.0.0.1:4000".parse().unwrap(),
        destination: "240.240.0.1:80".parse().unwrap(),
        ip_options: 0,
        tcp_options: 0,
        flags: tcp_flags::SYN,
        sequence: 1,
        acknowledgment: 0,
        payload: vec![],
        partial: true,
        padding: 0,
    };
    let six = Segment {
        source: "[2001:db8::1]:4000".parse().unwrap(),
        destination: "[2001:2::1]:80".parse().unwrap(),
        ip_options: 1,
        ..segment.clone()
    };
    let change = |segment: &Segment, at: usize, value: u8| {
        let mut frame = segment.frame();
        frame[at] = value;
        Packet::parse(&frame).err()
    };
    let ip = VNET_LENGTH;
    let table = [
        (change(&segment, ip, 0x55), Some(PacketError::Version)),
        (change(&segment, ip, 0x44), Some(PacketError::Truncated)),
        (change(&segment, ip + 3, 41), Some(PacketError::Truncated)),
        (change(&segment, ip + 6, 0x20), Some(PacketError::Fragment)),
        (change(&segment, ip + 7, 1), Some(PacketError::Fragment)),
        (change(&segment, ip + 32, 0x40), Some(PacketError::Truncated)),
        (change(&segment, ip + 32, 0x60), Some(PacketError::Truncated)),
        (change(&segment, 8, 6), Some(PacketError::Offload)),
        (change(&segment, 6, 24), Some(PacketError::Offload)),
        (change(&segment, ip + 9, 47), Some(PacketError::Offload)),
        (change(&six, ip + 6, 44), Some(PacketError::Fragment)),
        (change(&six, ip + 40, 44), Some(PacketError::Fragment)),
        (change(&six, ip + 40, 43), Some(PacketError::ExtensionHeader)),
        (change(&six, ip + 40, 51), Some(PacketError::ExtensionHeader)),
        (change(&six, ip + 41, 9), Some(PacketError::Truncated)),
        (change(&six, ip + 5, 0), Some(PacketError::Truncated)),
        (change(&six, ip + 1, 0), None),
    ];
    for (line, (found, expected)) in table.into_iter().enumerate() {
        assert_eq!(found, expected, "line {line}");
    }
    assert_eq!(Packet::parse(&[]), Err(PacketError::Truncated));
    let mut frame = segment.frame();
    let packet = Packet::parse(&frame).unwrap();
    assert_eq!(
        packet.rewrite_tcp(&mut frame, six.source, six.destination),
        Err(PacketError::Family)
    );
    assert_eq!(
        packet.rewrite_tcp(&mut frame, segment.source, six.destination),
        Err(PacketError::Family)
    );
    assert_eq!(frame, segment.frame(), "unchanged");
}
