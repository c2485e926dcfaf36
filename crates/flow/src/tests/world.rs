//! A table and a clock, and packets as a kernel would send them.

use crate::*;
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};
use tombolo_packet::{FRAME_MAX, Packet, Transport, VNET_LENGTH, build, checksum, tcp_flags};
use tombolo_types::AddressPlan;

pub(super) const HOLD: Duration = Duration::from_secs(10);

/// A table and a clock, and packets as a kernel would send them.
pub(super) struct World {
    pub(super) table: FlowTable,
    pub(super) now: Instant,
    pub(super) buffer: Vec<u8>,
}

/// What became of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    Forwarded {
        source: SocketAddr,
        destination: SocketAddr,
        signal: Option<Signal>,
    },
    Reset {
        source: SocketAddr,
        destination: SocketAddr,
    },
    Held(FlowId),
    Nothing,
    Refused(FlowReject),
}

pub(super) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A TCP segment with an empty payload and right checksums.
pub(super) fn segment(source: SocketAddr, destination: SocketAddr, flags: u8) -> Vec<u8> {
    // A datagram has the same IP header but for protocol and length.
    let mut frame = vec![0; 200];
    let length = build::datagram(&mut frame, source, destination, &[0; 12]).unwrap();
    frame.truncate(length);
    let ip_length = length - VNET_LENGTH - 20;
    let protocol_at = VNET_LENGTH + if source.is_ipv4() { 9 } else { 6 };
    frame[protocol_at] = 6;
    if source.is_ipv4() {
        frame[VNET_LENGTH + 10..VNET_LENGTH + 12].fill(0);
        let sum = !checksum::fold(checksum::add(0, &frame[VNET_LENGTH..VNET_LENGTH + ip_length]));
        frame[VNET_LENGTH + 10..VNET_LENGTH + 12].copy_from_slice(&sum.to_be_bytes());
    }
    let tcp = &mut frame[VNET_LENGTH + ip_length..];
    tcp[4..20].fill(0);
    tcp[4..8].copy_from_slice(&77u32.to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = flags;
    let pseudo = checksum::pseudo_header(source.ip(), destination.ip(), 6, 20);
    let sum = !checksum::fold(checksum::add(pseudo, tcp));
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    frame
}

pub(super) fn ends(frame: &[u8]) -> (SocketAddr, SocketAddr, u8) {
    let packet = Packet::parse(frame).unwrap();
    assert!(packet.checksum_is_right(frame));
    let Transport::Tcp(tcp) = packet.transport else {
        panic!("not TCP: {packet:?}")
    };
    let source = SocketAddr::new(packet.source, tcp.source_port);
    (
        source,
        SocketAddr::new(packet.destination, tcp.destination_port),
        tcp.flags,
    )
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(super) fn with(change: impl FnOnce(&mut FlowConfig)) -> Self {
        let mut config = FlowConfig {
            plan: AddressPlan::default(),
            ipv4: true,
            ipv6: true,
            pending_max: 4096,
            hold: HOLD,
            seed: 7,
        };
        change(&mut config);
        let now = Instant::now();
        let mut table = FlowTable::new(config, now);
        let host = [
            "10.0.0.1",
            "10.0.0.2",
            "fd00::1",
            "240.240.255.253",
            "2001:2:0:ffff::253",
            "127.0.0.1",
        ];
        let addresses = host.iter().map(|text| text.parse::<IpAddr>().unwrap());
        table.set_sources(Sources::new(addresses, vec!["172.17.0.0/16".parse().unwrap()]));
        Self {
            table,
            now,
            buffer: vec![0; FRAME_MAX],
        }
    }

    pub(super) fn listener(&self, v6: bool, listener: Listener) -> SocketAddr {
        let plan = AddressPlan::default();
        let address = if v6 {
            plan.host_v6().into()
        } else {
            IpAddr::from(plan.host_v4())
        };
        SocketAddr::new(address, listener.port())
    }

    pub(super) fn frame(&mut self, frame: &[u8]) -> Result<Outcome, FlowReject> {
        self.buffer[..frame.len()].copy_from_slice(frame);
        self.table.handle_packet(&mut self.buffer, frame.len(), self.now)
    }

    pub(super) fn tcp(&mut self, source: SocketAddr, destination: SocketAddr, flags: u8) -> Seen {
        let frame = segment(source, destination, flags);
        let (length, signal) = match self.frame(&frame) {
            Ok(Outcome::Write(length)) => (length, None),
            Ok(Outcome::WriteThen(length, signal)) => (length, Some(signal)),
            Ok(Outcome::Connect {
                id,
                source: from,
                destination: to,
            }) => {
                assert_eq!((from, to), (source, destination));
                return Seen::Held(id);
            }
            Ok(Outcome::Nothing) => return Seen::Nothing,
            Err(reject) => return Seen::Refused(reject),
            Ok(other) => panic!("{other:?}"),
        };
        let (from, to, answered) = ends(&self.buffer[..length]);
        if (from, to) == (destination, source) {
            assert!(answered & tcp_flags::RST != 0 && signal.is_none());
            return Seen::Reset {
                source: from,
                destination: to,
            };
        }
        assert_eq!(answered, flags);
        Seen::Forwarded {
            source: from,
            destination: to,
            signal,
        }
    }

    /// A connection that was accepted; returns its key.
    pub(super) fn open(&mut self, source: SocketAddr, destination: SocketAddr) -> SocketAddr {
        let Seen::Held(id) = self.tcp(source, destination, tcp_flags::SYN) else {
            panic!("not held")
        };
        let (mapped, listener, _) = ends(&self.table.accept(id).unwrap());
        assert_eq!(listener, self.listener(source.is_ipv6(), Listener::Services));
        let back = self.tcp(listener, mapped, tcp_flags::SYN | tcp_flags::ACK);
        assert_eq!(
            back,
            Seen::Forwarded {
                source: destination,
                destination: source,
                signal: None
            }
        );
        let seen = self.tcp(source, destination, tcp_flags::ACK);
        let signal = Some(Signal::Established {
            listener: Listener::Services,
            v6: source.is_ipv6(),
        });
        assert_eq!(
            seen,
            Seen::Forwarded {
                source: mapped,
                destination: listener,
                signal
            }
        );
        assert_eq!(self.table.awaiting(), 1);
        assert_eq!(
            self.table
                .hand_over(mapped.ip(), mapped.port(), Listener::Services),
            Some(id)
        );
        assert_eq!((self.table.awaiting(), self.table.pending()), (0, 0));
        mapped
    }

    pub(super) fn close(&mut self, source: SocketAddr, destination: SocketAddr, mapped: SocketAddr) {
        let listener = self.listener(source.is_ipv6(), Listener::Services);
        let fin = tcp_flags::FIN | tcp_flags::ACK;
        assert!(matches!(
            self.tcp(source, destination, fin),
            Seen::Forwarded { .. }
        ));
        assert!(matches!(self.tcp(listener, mapped, fin), Seen::Forwarded { .. }));
        assert!(matches!(
            self.tcp(source, destination, tcp_flags::ACK),
            Seen::Forwarded { .. }
        ));
    }

    /// Lets time pass; returns the frames and ends that it brings.
    pub(super) fn pass(&mut self, time: Duration) -> (Vec<Vec<u8>>, Vec<FlowId>) {
        self.now += time;
        let (mut frames, mut expired) = (Vec::new(), Vec::new());
        self.table.handle_timeout(self.now, &mut |overdue| match overdue {
            Overdue::Write(frame) => frames.push(frame.to_vec()),
            Overdue::Expired(id) => expired.push(id),
        });
        (frames, expired)
    }

    pub(super) fn count(&self, reject: FlowReject) -> u64 {
        self.table.rejects().find(|(each, _)| *each == reject).unwrap().1
    }
}
