mod mix;
mod transfer;
mod world;

use crate::*;
use std::{collections::BTreeSet, net::SocketAddr, time::Duration};
use tombolo_packet::{Packet, Transport, build, tcp_flags};
use world::{HOLD, Seen, World, addr, ends, segment};

#[test]
fn a_connection_from_syn_to_the_end() {
    for (source, vip) in [
        ("10.0.0.1:4000", "240.240.0.7:80"),
        ("[fd00::1]:4000", "[2001:2::7]:80"),
    ] {
        let (source, vip) = (addr(source), addr(vip));
        let mut world = World::new();
        let mapped = world.open(source, vip);
        assert_eq!(mapped, SocketAddr::new(vip.ip(), 4000), "the port is kept");
        world.close(source, vip, mapped);
        // It lingers from its last segment, then it is gone.
        world.pass(Duration::from_secs(59));
        assert!(matches!(
            world.tcp(source, vip, tcp_flags::ACK),
            Seen::Forwarded { .. }
        ));
        world.pass(Duration::from_secs(59));
        assert_eq!(world.table.len(), 1);
        world.pass(Duration::from_secs(10));
        assert!(world.table.is_empty() && world.table.poll_timeout().is_none());
    }
}

#[test]
fn the_latest_syn_is_delivered_and_one_event_is_made() {
    let mut world = World::new();
    let (source, vip) = (addr("10.0.0.1:4000"), addr("240.240.0.7:80"));
    let Seen::Held(id) = world.tcp(source, vip, tcp_flags::SYN) else {
        panic!("not held")
    };
    let mut later = segment(source, vip, tcp_flags::SYN);
    let at = later.len() - 20 + 4;
    later[at + 3] = 99; // another sequence number
    assert_eq!(world.frame(&later), Ok(Outcome::Nothing));
    assert_eq!(
        world.tcp(source, vip, tcp_flags::ACK),
        Seen::Refused(FlowReject::WhileHeld)
    );
    let frame = world.table.accept(id).unwrap();
    let Transport::Tcp(tcp) = Packet::parse(&frame).unwrap().transport else {
        panic!("not TCP")
    };
    assert_eq!(tcp.sequence, 99);
    assert_eq!(world.table.accept(id), None, "once");
    // The application repeats its SYN because the answer was lost.
    assert!(matches!(
        world.tcp(source, vip, tcp_flags::SYN),
        Seen::Forwarded { signal: None, .. }
    ));
}

#[test]
fn refusals() {
    let (source, vip) = (addr("10.0.0.1:4000"), addr("240.240.0.7:80"));
    for refusal in [Refusal::Reset, Refusal::HostUnreachable, Refusal::Silent] {
        let mut world = World::new();
        let Seen::Held(id) = world.tcp(source, vip, tcp_flags::SYN) else {
            panic!("not held")
        };
        let frame = world.table.refuse(id, refusal);
        let packet = frame.as_ref().map(|frame| Packet::parse(frame).unwrap());
        match (refusal, packet.map(|packet| packet.transport)) {
            (Refusal::Reset, Some(Transport::Tcp(tcp))) => assert!(tcp.has(tcp_flags::RST | tcp_flags::ACK)),
            (Refusal::HostUnreachable, Some(Transport::Icmp(icmp))) => {
                assert_eq!((icmp.kind, icmp.code), (3, 1))
            }
            (Refusal::Silent, None) => {}
            other => panic!("{other:?}"),
        }
        assert!(world.table.is_empty());
        assert_eq!(world.table.refuse(id, refusal), None);
        // A repetition is a new event, and the old name does not reach it.
        let Seen::Held(new) = world.tcp(source, vip, tcp_flags::SYN) else {
            panic!("not held")
        };
        assert_ne!(id, new);
        assert_eq!(world.table.accept(id), None);
    }
}

#[test]
fn holding_is_bounded_in_time_and_number() {
    let mut world = World::with(|config| config.pending_max = 3);
    let vip = addr("240.240.0.7:80");
    let sources: Vec<_> = (1..=4).map(|port| addr(&format!("10.0.0.1:{port}"))).collect();
    let mut ids = Vec::new();
    for source in &sources[..3] {
        let Seen::Held(id) = world.tcp(*source, vip, tcp_flags::SYN) else {
            panic!("not held")
        };
        ids.push(id);
    }
    assert_eq!(
        world.tcp(sources[3], vip, tcp_flags::SYN),
        Seen::Reset {
            source: vip,
            destination: sources[3]
        }
    );
    assert_eq!(world.count(FlowReject::PendingFull), 1);
    // Accepted, but the handshake never ends: the same budget.
    world.table.accept(ids[0]).unwrap();
    assert_eq!(world.pass(HOLD - Duration::from_millis(1)), (vec![], vec![]));
    let (frames, expired) = world.pass(Duration::from_millis(1));
    assert_eq!((frames.len(), expired), (3, ids));
    for frame in &frames {
        assert!(ends(frame).2 & tcp_flags::RST != 0);
    }
    assert!(world.table.is_empty() && world.table.pending() == 0);
    assert!(matches!(
        world.tcp(sources[3], vip, tcp_flags::SYN),
        Seen::Held(_)
    ));
}

#[test]
fn an_application_that_gives_up_is_noticed() {
    let (source, vip) = (addr("10.0.0.1:4000"), addr("240.240.0.7:80"));
    for from_listener in [false, true] {
        let mut world = World::new();
        let Seen::Held(id) = world.tcp(source, vip, tcp_flags::SYN) else {
            panic!("not held")
        };
        let (mapped, listener, _) = ends(&world.table.accept(id).unwrap());
        let seen = if from_listener {
            world.tcp(listener, mapped, tcp_flags::RST)
        } else {
            world.tcp(source, vip, tcp_flags::RST)
        };
        assert!(matches!(seen, Seen::Forwarded { signal: Some(Signal::Abandoned(gone)), .. } if gone == id));
        assert_eq!(world.table.pending(), 0);
        assert_eq!(
            world
                .table
                .hand_over(mapped.ip(), mapped.port(), Listener::Services),
            None
        );
        assert!(
            matches!(world.tcp(source, vip, tcp_flags::SYN), Seen::Held(_)),
            "it may try again at once"
        );
    }
}

#[test]
fn ports_are_shared_without_mixing() {
    let mut world = World::new();
    // One source port to two ports of a VIP, from two addresses: four connections, one VIP.
    let mut keys = BTreeSet::new();
    for source in ["10.0.0.1:4000", "10.0.0.2:4000"] {
        for vip in ["240.240.0.7:80", "240.240.0.7:443"] {
            assert!(keys.insert(world.open(addr(source), addr(vip))), "{source} {vip}");
        }
    }
    assert!(keys.contains(&addr("240.240.0.7:4000")));
    // Another VIP has ports of its own.
    assert_eq!(
        world.open(addr("10.0.0.1:4000"), addr("240.240.0.8:80")).port(),
        4000
    );
}

#[test]
fn a_port_is_used_again_while_its_connection_closes() {
    let mut world = World::new();
    let (source, vip) = (addr("10.0.0.1:4000"), addr("240.240.0.7:80"));
    let mapped = world.open(source, vip);
    world.close(source, vip, mapped);
    assert_eq!(world.open(source, vip), mapped, "the same names at once");
    assert!(matches!(
        world.tcp(source, vip, tcp_flags::RST),
        Seen::Forwarded { .. }
    ));
    assert_eq!(world.open(source, vip), mapped);
    assert_eq!(world.table.len(), 1);
    // Another connection does not get a port that the kernel may still remember.
    world.close(source, vip, mapped);
    assert_ne!(world.open(source, addr("240.240.0.7:443")), mapped);
    // The first life's end does not take the second with it.
    world.pass(Duration::from_secs(120));
    assert_eq!(world.table.len(), 1);
}

#[test]
fn a_vip_has_no_more_connections_than_ports() {
    let mut world = World::with(|config| config.pending_max = 100_000);
    let mut held = 0;
    let mut refused = 0;
    for source in ["10.0.0.1", "10.0.0.2"] {
        for port in 1024..u16::MAX {
            let source = SocketAddr::new(source.parse().unwrap(), port);
            match world.tcp(source, addr("240.240.0.7:80"), tcp_flags::SYN) {
                Seen::Held(_) => held += 1,
                Seen::Reset { .. } => refused += 1,
                other @ (Seen::Forwarded { .. } | Seen::Nothing | Seen::Refused(_)) => panic!("{other:?}"),
            }
        }
    }
    assert!(held > 64_000 && held <= 64_512, "{held}");
    assert_eq!(world.count(FlowReject::FlowsFull), refused);
    assert!(matches!(
        world.tcp(addr("10.0.0.1:9"), addr("240.240.0.8:80"), tcp_flags::SYN),
        Seen::Held(_)
    ));
}

#[test]
fn closed_connections_linger_in_bounds() {
    let mut world = World::new();
    for round in 0..20_000u32 {
        let source = SocketAddr::new("10.0.0.1".parse().unwrap(), u16::try_from(1024 + round).unwrap());
        let vip = addr("240.240.0.7:80");
        let mapped = world.open(source, vip);
        world.close(source, vip, mapped);
    }
    assert_eq!(world.table.len(), 16_384);
}

#[test]
fn idle_connections_live_for_a_day() {
    let mut world = World::new();
    let (source, vip) = (addr("10.0.0.1:4000"), addr("240.240.0.7:80"));
    world.open(source, vip);
    world.pass(Duration::from_secs(23 * 3600));
    assert!(matches!(
        world.tcp(source, vip, tcp_flags::ACK),
        Seen::Forwarded { .. }
    ));
    world.pass(Duration::from_secs(23 * 3600));
    assert_eq!(world.table.len(), 1);
    world.pass(Duration::from_secs(2 * 3600));
    assert!(world.table.is_empty());
}

#[test]
fn strangers_and_strays() {
    let mut world = World::new();
    let vip = addr("240.240.0.7:80");
    let (syn, ack) = (tcp_flags::SYN, tcp_flags::ACK);
    let table = [
        // A neighbour, loopback, another VIP: not this host.
        (
            "192.0.2.9:1",
            "240.240.0.7:80",
            syn,
            Seen::Refused(FlowReject::ForeignSource),
        ),
        (
            "127.0.0.1:1",
            "240.240.0.7:80",
            syn,
            Seen::Refused(FlowReject::ForeignSource),
        ),
        (
            "240.240.0.9:1",
            "240.240.0.7:80",
            syn,
            Seen::Refused(FlowReject::ForeignSource),
        ),
        // Not a VIP; mesh0's own address never comes this way.
        (
            "10.0.0.1:1",
            "10.0.0.9:80",
            syn,
            Seen::Refused(FlowReject::NotMesh),
        ),
        (
            "10.0.0.1:1",
            "240.240.255.253:80",
            syn,
            Seen::Refused(FlowReject::NotMesh),
        ),
        // Connections of an agent that is no more.
        (
            "10.0.0.1:1",
            "240.240.0.7:80",
            ack,
            Seen::Reset {
                source: vip,
                destination: addr("10.0.0.1:1"),
            },
        ),
        ("10.0.0.1:1", "240.240.0.7:80", tcp_flags::RST, Seen::Nothing),
        (
            "240.240.255.253:15001",
            "240.240.0.7:80",
            ack,
            Seen::Reset {
                source: vip,
                destination: addr("240.240.255.253:15001"),
            },
        ),
        // Another port of the DNS address.
        (
            "10.0.0.1:1",
            "240.240.255.254:80",
            syn,
            Seen::Reset {
                source: addr("240.240.255.254:80"),
                destination: addr("10.0.0.1:1"),
            },
        ),
    ];
    for (source, destination, flags, expected) in table {
        assert_eq!(
            world.tcp(addr(source), addr(destination), flags),
            expected,
            "{source} {destination}"
        );
    }
    assert!(world.table.is_empty());
    // mesh0's own address and a bridge that was opted in are taken.
    for source in ["240.240.255.253:5", "172.17.0.9:5"] {
        assert!(
            matches!(world.tcp(addr(source), vip, syn), Seen::Held(_)),
            "{source}"
        );
    }
    // A SYN to a listener's reply that was never accepted: held connections get nothing from a listener.
    let seen = world.tcp(addr("240.240.255.253:15001"), addr("240.240.0.7:5"), ack);
    assert!(matches!(seen, Seen::Reset { .. }));
    world.table.set_families(false, true);
    assert_eq!(
        world.tcp(addr("10.0.0.1:1"), vip, syn),
        Seen::Refused(FlowReject::Family)
    );
    assert!(world.count(FlowReject::ForeignSource) == 3 && world.count(FlowReject::UnknownFlow) == 4);
}

#[test]
fn dns_by_tcp_is_not_held() {
    let mut world = World::new();
    let (source, dns) = (addr("10.0.0.1:4000"), addr("240.240.255.254:53"));
    let listener = world.listener(false, Listener::Dns);
    let mapped = addr("240.240.255.254:4000");
    let seen = world.tcp(source, dns, tcp_flags::SYN);
    assert_eq!(
        seen,
        Seen::Forwarded {
            source: mapped,
            destination: listener,
            signal: None
        }
    );
    // The other listener has no such connection.
    let wrong = world.listener(false, Listener::Services);
    assert!(matches!(
        world.tcp(wrong, mapped, tcp_flags::ACK),
        Seen::Reset { .. }
    ));
    let seen = world.tcp(source, dns, tcp_flags::ACK);
    let signal = Some(Signal::Established {
        listener: Listener::Dns,
        v6: false,
    });
    assert_eq!(
        seen,
        Seen::Forwarded {
            source: mapped,
            destination: listener,
            signal
        }
    );
    assert_eq!(
        world
            .table
            .hand_over(mapped.ip(), mapped.port(), Listener::Services),
        None
    );
    assert!(
        world
            .table
            .hand_over(mapped.ip(), mapped.port(), Listener::Dns)
            .is_some()
    );
}

#[test]
fn datagrams() {
    let mut world = World::new();
    let mut frame = vec![0; 200];
    for (source, dns) in [
        ("10.0.0.1:9", "240.240.255.254:53"),
        ("[fd00::1]:9", "[2001:2:0:ffff::254]:53"),
    ] {
        let (source, dns) = (addr(source), addr(dns));
        let length = build::datagram(&mut frame, source, dns, b"query").unwrap();
        let outcome = world.frame(&frame[..length]).unwrap();
        let Outcome::Query {
            source: from,
            destination: to,
            datagram,
        } = outcome
        else {
            panic!("{outcome:?}")
        };
        assert_eq!((from, to, &world.buffer[datagram]), (source, dns, &b"query"[..]));
        // Damaged on a wire.
        frame[length - 1] ^= 1;
        assert_eq!(world.frame(&frame[..length]), Err(FlowReject::Checksum));
        // Ports where nobody is.
        for port in [54, 0] {
            let length = build::datagram(&mut frame, source, SocketAddr::new(dns.ip(), port), b"x").unwrap();
            let Ok(Outcome::Write(length)) = world.frame(&frame[..length]) else {
                panic!("not answered")
            };
            let answer = Packet::parse(&world.buffer[..length]).unwrap();
            let Transport::Icmp(icmp) = answer.transport else {
                panic!("not ICMP")
            };
            assert_eq!((icmp.kind, icmp.code), if icmp.v6 { (1, 4) } else { (3, 3) });
        }
    }
    assert_eq!(world.count(FlowReject::UdpPort), 4);
}
