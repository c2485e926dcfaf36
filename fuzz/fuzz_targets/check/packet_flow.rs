//! Frames of any content, in any order, through a flow table.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};
use tombolo_flow::{FlowConfig, FlowTable, Listener, Outcome, Refusal, Signal, Sources};
use tombolo_packet::{FRAME_MAX, Packet, build};
use tombolo_types::AddressPlan;

/// Each frame of the input is a byte that says what to do beside it, its length in two bytes, and its content. Returns
/// what was reached, so that a corpus can be judged.
pub fn check(bytes: &[u8]) -> BTreeSet<&'static str> {
    let mut reached = BTreeSet::new();
    let plan = AddressPlan::default();
    let mut now = Instant::now();
    let hold = Duration::from_secs(10);
    let config = FlowConfig {
        plan,
        ipv4: true,
        ipv6: true,
        pending_max: 8,
        hold,
        seed: 1,
    };
    let mut table = FlowTable::new(config, now);
    let own = [plan.host_v4().into(), plan.host_v6().into()];
    table.set_sources(Sources::new(
        own,
        vec![
            "10.0.0.0/8".parse().expect("a prefix"),
            "fd00::/8".parse().expect("a prefix"),
        ],
    ));
    let mut buffer = vec![0; FRAME_MAX];
    let mut rest = bytes;
    while let [aside, high, low, content @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(content.len());
        let (frame, after) = content.split_at(length);
        rest = after;
        buffer[..length].copy_from_slice(frame);
        let outcome = table.handle_packet(&mut buffer, length, now);
        reached.insert(match &outcome {
            Ok(Outcome::Write(_)) => "write",
            Ok(Outcome::WriteThen(_, Signal::Established { .. })) => "established",
            Ok(Outcome::WriteThen(_, Signal::Abandoned(_))) => "abandoned",
            Ok(Outcome::Connect { .. }) => "connect",
            Ok(Outcome::Query { .. }) => "query",
            Ok(Outcome::Ping { .. }) => "ping",
            Ok(Outcome::Nothing) => "nothing",
            Err(reject) => reject.reason(),
        });
        match outcome {
            Ok(Outcome::Write(written)) => written_is_sound(&buffer, written),
            Ok(Outcome::WriteThen(written, signal)) => {
                written_is_sound(&buffer, written);
                if let Signal::Established { .. } = signal
                    && let Ok(packet) = Packet::parse(&buffer[..written])
                    && let tombolo_packet::Transport::Tcp(tcp) = packet.transport
                {
                    for listener in [Listener::Services, Listener::Dns] {
                        if table
                            .hand_over(packet.source, tcp.source_port, listener)
                            .is_some()
                        {
                            reached.insert("handed over");
                        }
                    }
                }
            }
            Ok(Outcome::Connect { id, .. }) => {
                let made = match aside % 4 {
                    0 => table.accept(id),
                    1 => table.refuse(id, Refusal::Reset),
                    2 => table.refuse(id, Refusal::HostUnreachable),
                    _ => None,
                };
                if let Some(made) = made {
                    written_is_sound(&made, made.len());
                }
            }
            Ok(Outcome::Query { datagram, .. }) => assert!(datagram.end <= length),
            Ok(Outcome::Ping { length, .. }) => {
                let packet = Packet::parse(&buffer[..length]).expect("it was read before");
                let reply = build::echo_reply(&mut buffer, &packet).expect("a request has a reply");
                written_is_sound(&buffer, reply);
            }
            Ok(Outcome::Nothing) | Err(_) => {}
        }
        now += Duration::from_secs(u64::from(*aside >> 2));
        table.handle_timeout(now, &mut |_| {});
        assert!(
            table.pending() <= 8 && table.awaiting() <= table.pending() && table.pending() <= table.len()
        );
    }
    for _ in 0..3 {
        now += Duration::from_secs(25 * 3600);
        table.handle_timeout(now, &mut |_| {});
    }
    assert!(table.is_empty(), "something stays forever");
    reached.extend(
        table
            .rejects()
            .filter(|(_, count)| *count > 0)
            .map(|(reject, _)| reject.reason()),
    );
    reached
}

/// What is written to the device is a packet of the length that was said, between a VIP and somebody.
fn written_is_sound(buffer: &[u8], length: usize) {
    let packet = Packet::parse(&buffer[..length]).expect("what is written is a packet");
    assert_eq!(packet.frame_length(), length);
    let plan = AddressPlan::default();
    assert!(
        plan.contains(packet.source),
        "answers and rewritten packets come from a VIP: {packet:?}"
    );
}
