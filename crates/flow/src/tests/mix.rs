//! Connections in every order of events, against a list of them.

use super::{HOLD, Seen, World, addr, ends};
use crate::{FlowId, FlowReject, FlowTable, Listener, Refusal, flow::octets};
use proptest::{collection::vec, prelude::*};
use std::{collections::BTreeMap, net::SocketAddr, time::Duration};
use tombolo_packet::tcp_flags;

impl FlowTable {
    /// True if the connection is found by all of its names; false if by none. Panics if they disagree.
    fn is_known(
        &self,
        id: FlowId,
        source: SocketAddr,
        destination: SocketAddr,
        mapped: Option<SocketAddr>,
    ) -> bool {
        let vip = octets(destination.ip());
        let found =
            self.slots
                .find_by_application(octets(source.ip()), source.port(), vip, destination.port())
                == Some(id);
        assert_eq!(self.slots.get(id).is_some(), found);
        if let Some(mapped) = mapped {
            assert_eq!(self.slots.find_by_listener(vip, mapped.port()) == Some(id), found);
        }
        found
    }
}

/// What the property test does.
#[derive(Debug, Clone)]
enum Step {
    Syn(usize),
    Segment(usize, u8),
    Back(usize, u8),
    Accept(usize),
    Refuse(usize),
    HandOver(usize),
    Pass(u64),
    Transfer,
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop::sample::select(vec![
        tcp_flags::ACK,
        tcp_flags::ACK,
        tcp_flags::FIN | tcp_flags::ACK,
        tcp_flags::RST,
        tcp_flags::SYN | tcp_flags::ACK,
    ]);
    let pair = 0..PAIRS;
    prop_oneof![
        4 => pair.clone().prop_map(Step::Syn),
        4 => (pair.clone(), flags.clone()).prop_map(|(pair, flags)| Step::Segment(pair, flags)),
        4 => (pair.clone(), flags).prop_map(|(pair, flags)| Step::Back(pair, flags)),
        4 => pair.clone().prop_map(Step::Accept),
        1 => pair.clone().prop_map(Step::Refuse),
        3 => pair.prop_map(Step::HandOver),
        1 => prop_oneof![1..15u64, 50..200u64].prop_map(Step::Pass),
        1 => Just(Step::Transfer),
    ]
}

/// Two addresses, two ports, two VIPs, two ports of each: every collision there is.
const PAIRS: usize = 16;

fn pair(number: usize) -> (SocketAddr, SocketAddr) {
    let bit = |shift: usize| number >> shift & 1;
    let source = format!("10.0.0.{}:{}", 1 + bit(0), 4000 + bit(1));
    let vip = format!("240.240.0.{}:{}", 7 + bit(2), 80 + bit(3));
    (addr(&source), addr(&vip))
}

/// What the test knows of a connection by itself.
#[derive(Debug, Clone, Copy)]
struct Known {
    id: FlowId,
    /// Known when it was accepted.
    mapped: Option<SocketAddr>,
    handed_over: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn connections_never_mix(steps in vec(step(), 1..200)) {
        let mut world = World::new();
        let listener = world.listener(false, Listener::Services);
        // Connections that the application and the listener may have at this moment.
        let mut known: BTreeMap<usize, Known> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Syn(number) => {
                    let (source, vip) = pair(number);
                    match world.tcp(source, vip, tcp_flags::SYN) {
                        Seen::Held(id) => {
                            known.insert(number, Known { id, mapped: None, handed_over: false });
                        }
                        Seen::Nothing => prop_assert!(known[&number].mapped.is_none()),
                        Seen::Forwarded { source, destination, .. } => {
                            prop_assert_eq!(Some(source), known[&number].mapped);
                            prop_assert_eq!(destination, listener);
                        }
                        other @ (Seen::Reset { .. } | Seen::Refused(_)) => prop_assert!(false, "{other:?}"),
                    }
                }
                Step::Segment(number, flags) => {
                    let (source, vip) = pair(number);
                    match world.tcp(source, vip, flags) {
                        Seen::Forwarded { source, destination, .. } => {
                            prop_assert_eq!(Some(source), known[&number].mapped);
                            prop_assert_eq!(destination, listener);
                        }
                        Seen::Refused(reject) => {
                            prop_assert_eq!(reject, FlowReject::WhileHeld);
                            prop_assert!(known[&number].mapped.is_none());
                        }
                        Seen::Reset { .. } | Seen::Nothing => prop_assert!(!known.contains_key(&number)),
                        Seen::Held(_) => prop_assert!(false, "not a SYN"),
                    }
                }
                Step::Back(number, flags) => {
                    let Some(mapped) = known.get(&number).and_then(|known| known.mapped) else { continue };
                    let (source, vip) = pair(number);
                    let seen = world.tcp(listener, mapped, flags);
                    let right =
                        matches!(seen, Seen::Forwarded { source: from, destination: to, .. } if (from, to) == (vip, source));
                    prop_assert!(right, "{number} {seen:?}");
                }
                Step::Accept(number) => {
                    let Some(connection) = known.get_mut(&number) else { continue };
                    let frame = world.table.accept(connection.id);
                    prop_assert_eq!(frame.is_some(), connection.mapped.is_none());
                    if let Some(frame) = frame {
                        let (mapped, to, _) = ends(&frame);
                        prop_assert_eq!(to, listener);
                        prop_assert_eq!(mapped.ip(), pair(number).1.ip());
                        connection.mapped = Some(mapped);
                        let same = known.values().filter(|other| other.mapped == Some(mapped)).count();
                        prop_assert_eq!(same, 1, "a key belongs to one connection");
                    }
                }
                Step::Refuse(number) => {
                    let Some(connection) = known.get(&number).copied() else { continue };
                    if world.table.refuse(connection.id, Refusal::Reset).is_some() {
                        prop_assert!(!connection.handed_over);
                        known.remove(&number);
                    }
                }
                Step::HandOver(number) => {
                    let Some(connection) = known.get_mut(&number) else { continue };
                    let Some(mapped) = connection.mapped else { continue };
                    if let Some(id) = world.table.hand_over(mapped.ip(), mapped.port(), Listener::Services) {
                        prop_assert!(id == connection.id && !connection.handed_over);
                        connection.handed_over = true;
                    }
                }
                Step::Transfer => {
                    world.transfer();
                    // The same connections by the same names; how the table numbers them is its own business.
                    for (number, connection) in &mut known {
                        let (source, vip) = pair(*number);
                        let (application, octets_of_vip) = (octets(source.ip()), octets(vip.ip()));
                        let found = world.table.slots.find_by_application(application, source.port(), octets_of_vip, vip.port());
                        connection.id = found.expect("it came along");
                    }
                }
                Step::Pass(seconds) => {
                    let (_, expired) = world.pass(Duration::from_secs(seconds));
                    known.retain(|_, connection| !expired.contains(&connection.id));
                    // Closed ones may be gone by now: the table says which, and must say so for both names.
                    known.retain(|number, connection| {
                        let (source, vip) = pair(*number);
                        world.table.is_known(connection.id, source, vip, connection.mapped)
                    });
                }
            }
            prop_assert_eq!(world.table.len(), known.len(), "nothing leaks");
            let waiting = known.values().filter(|connection| !connection.handed_over).count();
            prop_assert!(world.table.pending() <= waiting && world.table.awaiting() <= world.table.pending());
        }
        // In the end all of it goes by itself.
        world.pass(HOLD);
        world.pass(Duration::from_secs(25 * 3600));
        world.pass(Duration::from_secs(3600));
        prop_assert!(world.table.is_empty() && world.table.pending() == 0 && world.table.awaiting() == 0);
        prop_assert_eq!(world.table.poll_timeout(), None);
    }
}
