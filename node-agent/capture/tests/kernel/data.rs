//! Applications and their connections.

use crate::{
    agent::{CUT, DROPPED, ECHO, FORGOTTEN, HELD_FOR, HOLD, RESET, SLOW, UNREACHABLE},
    namespace::{PATIENCE, alone, connect, shell, try_shell, vips},
};
use socket2::{Domain, Socket, Type};
use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

/// A stream of bytes that repeats nowhere within it (xorshift).
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Sends so many bytes, reads them back, compares every one; ends by half-close.
fn echo(stream: TcpStream, bytes: usize, seed: u64) {
    let mut writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        let (mut noise, mut block) = (Noise(seed), vec![0; 64 * 1024]);
        let mut left = bytes;
        while left > 0 {
            let length = left.min(block.len());
            noise.fill(&mut block[..length]);
            writer.write_all(&block[..length]).unwrap();
            left -= length;
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let (mut reader, mut noise) = (stream, Noise(seed));
    let (mut read, mut expected) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut left = bytes;
    while left > 0 {
        let length = left.min(read.len());
        reader.read_exact(&mut read[..length]).unwrap();
        noise.fill(&mut expected[..length]);
        assert!(read[..length] == expected[..length], "other bytes came back");
        left -= length;
    }
    assert_eq!(
        reader.read(&mut read).unwrap(),
        0,
        "the other direction ends, too"
    );
    writing.join().unwrap();
}

#[test]
fn a_hundred_megabytes_come_back_unchanged() {
    alone("data::a_hundred_megabytes_come_back_unchanged", |world| {
        let _agent = world.agent();
        for vip in vips(ECHO, 80) {
            echo(connect(vip).unwrap(), 100_000_000, 0x9e37_79b9_7f4a_7c15);
        }
    });
}

#[test]
fn refusals_are_refused_connects() {
    alone("data::refusals_are_refused_connects", |world| {
        let _agent = world.agent();
        let table = [
            (RESET, ErrorKind::ConnectionRefused),
            (DROPPED, ErrorKind::ConnectionRefused),
            (UNREACHABLE, ErrorKind::HostUnreachable),
        ];
        for (kind, expected) in table {
            for vip in vips(kind, 443) {
                let start = Instant::now();
                assert_eq!(connect(vip).unwrap_err().kind(), expected, "{vip}");
                assert!(
                    start.elapsed() < Duration::from_millis(500),
                    "{vip}: at once, not after a repetition"
                );
            }
        }
        // The DNS address has one port.
        for vip in [
            SocketAddr::new(world.plan.dns_v4().into(), 54),
            (world.plan.dns_v6(), 54).into(),
        ] {
            assert_eq!(connect(vip).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
    });
}

#[test]
fn connect_waits_for_the_decision() {
    alone("data::connect_waits_for_the_decision", |world| {
        let _agent = world.agent();
        for vip in vips(SLOW, 80) {
            let start = Instant::now();
            let stream = connect(vip).unwrap();
            let waited = start.elapsed();
            assert!(
                waited >= HELD_FOR && waited < HELD_FOR + Duration::from_secs(2),
                "{waited:?}"
            );
            echo(stream, 100_000, 7);
        }
    });
}

#[test]
fn a_connection_that_nobody_decides_is_refused_in_time() {
    alone(
        "data::a_connection_that_nobody_decides_is_refused_in_time",
        |world| {
            let _agent = world.agent();
            for vip in vips(FORGOTTEN, 80) {
                let start = Instant::now();
                assert_eq!(connect(vip).unwrap_err().kind(), ErrorKind::ConnectionRefused);
                let waited = start.elapsed();
                assert!(
                    waited >= HOLD && waited < HOLD + Duration::from_secs(1),
                    "{waited:?}"
                );
            }
        },
    );
}

#[test]
fn resets_pass_both_ways() {
    alone("data::resets_pass_both_ways", |world| {
        let _agent = world.agent();
        for vip in vips(CUT, 80) {
            // It may have arrived before connect() has looked.
            let cut = connect(vip).and_then(|mut stream| stream.read(&mut [0; 8]));
            assert_eq!(cut.unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        // The application's own reset ends the agent's side: the same names are good for a new connection at once.
        for vip in vips(ECHO, 80) {
            let source = SocketAddr::new(
                if vip.is_ipv4() { "10.9.0.2" } else { "fd09::2" }
                    .parse()
                    .unwrap(),
                5555,
            );
            for round in 0..20 {
                let socket = Socket::new(Domain::for_address(vip), Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.bind(&source.into()).unwrap();
                let start = Instant::now();
                socket.connect_timeout(&vip.into(), PATIENCE).unwrap();
                assert!(
                    start.elapsed() < Duration::from_millis(500),
                    "round {round}: {:?}",
                    start.elapsed()
                );
                socket.send(b"hello").unwrap();
                let mut stream = TcpStream::from(socket.try_clone().unwrap());
                let mut back = [0; 5];
                stream.read_exact(&mut back).unwrap();
                socket.set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
    });
}

#[test]
fn one_source_port_to_many_places() {
    alone("data::one_source_port_to_many_places", |world| {
        let _agent = world.agent();
        let source: SocketAddr = "10.9.0.2:7777".parse().unwrap();
        let [vip, _] = vips(ECHO, 0);
        let connections: Vec<_> = (1..=40)
            .map(|port| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.bind(&source.into()).unwrap();
                socket
                    .connect_timeout(&SocketAddr::new(vip.ip(), port).into(), PATIENCE)
                    .unwrap();
                TcpStream::from(socket)
            })
            .collect();
        for (seed, stream) in connections.into_iter().enumerate() {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            echo(stream, 10_000, seed as u64 + 1);
        }
    });
}

#[test]
fn sixty_four_connections_at_once() {
    alone("data::sixty_four_connections_at_once", |world| {
        let _agent = world.agent();
        let threads: Vec<_> = (0..64)
            .map(|seed| {
                let vip = vips(ECHO, 80)[seed % 2];
                std::thread::spawn(move || echo(connect(vip).unwrap(), 1_000_000, seed as u64 + 1))
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn names_are_asked_by_udp_and_tcp() {
    alone("data::names_are_asked_by_udp_and_tcp", |world| {
        let _agent = world.agent();
        let servers = [IpAddr::from(world.plan.dns_v4()), world.plan.dns_v6().into()];
        for server in servers {
            let any: IpAddr = if server.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect((server, 53)).unwrap();
            let mut answer = [0; 16_000];
            for (query, length) in [(&b"abc"[..], 3), (b"long", 9000)] {
                socket.send(query).unwrap();
                assert_eq!(socket.recv(&mut answer).unwrap(), length);
                assert_eq!(answer[0], *query.last().unwrap());
            }
            echo(connect((server, 53).into()).unwrap(), 300_000, 3);
            // Another port: nobody is there.
            socket.connect((server, 5353)).unwrap();
            socket.send(b"x").unwrap();
            assert_eq!(
                socket.recv(&mut answer).unwrap_err().kind(),
                ErrorKind::ConnectionRefused
            );
        }
    });
}

#[test]
fn pings_are_answered_where_somebody_is() {
    alone("data::pings_are_answered_where_somebody_is", |world| {
        let _agent = world.agent();
        for [answered, silent] in vips(ECHO, 0).into_iter().zip(vips(RESET, 0)).map(<[_; 2]>::from) {
            shell(&format!("ping -c 2 -i 0.2 -W 5 -s 1000 {}", answered.ip()));
            assert!(!try_shell(&format!("ping -c 1 -W 1 {}", silent.ip())).0);
        }
    });
}
