//! A table that goes from one process to the next.

use super::{HOLD, Seen, World, addr};
use crate::{FlowConfig, FlowTable, ImportError, Listener, Refusal, Sources};
use proptest::{collection::vec, prelude::*};
use std::time::{Duration, Instant};
use tombolo_packet::tcp_flags;
use tombolo_types::AddressPlan;

fn config() -> FlowConfig {
    FlowConfig {
        plan: AddressPlan::default(),
        ipv4: true,
        ipv6: true,
        pending_max: 4096,
        hold: HOLD,
        seed: 99,
    }
}

impl World {
    /// The table as another process would have it.
    pub(super) fn transfer(&mut self) {
        let bytes = self.table.export(self.now);
        let sources: Sources = self.table.sources().clone();
        let mut table = FlowTable::import(config(), &bytes, self.now).unwrap();
        table.set_sources(sources);
        assert_eq!(
            (table.len(), table.pending(), table.awaiting(), table.accepting()),
            (
                self.table.len(),
                self.table.pending(),
                self.table.awaiting(),
                self.table.accepting()
            )
        );
        self.table = table;
    }
}

#[test]
fn open_connections_go_on_and_held_ones_are_decided_anew() {
    let mut world = World::new();
    let (source, vip) = (addr("10.0.0.1:4000"), addr("240.240.0.7:80"));
    let (waiting, other) = (addr("10.0.0.1:4001"), addr("240.240.0.8:80"));
    let mapped = world.open(source, vip);
    assert!(matches!(world.tcp(waiting, other, tcp_flags::SYN), Seen::Held(_)));
    world.now += Duration::from_secs(4);
    world.transfer();
    let listener = world.listener(false, Listener::Services);
    let back = world.tcp(listener, mapped, tcp_flags::ACK);
    assert!(
        matches!(back, Seen::Forwarded { source: from, destination: to, .. } if (from, to) == (vip, source))
    );
    let held = world.table.held();
    assert_eq!(held.len(), 1);
    assert_eq!((held[0].source, held[0].destination), (waiting, other));
    // A repeated SYN is no second event, and the budget is the one of the first process.
    assert_eq!(world.tcp(waiting, other, tcp_flags::SYN), Seen::Nothing);
    let (_, expired) = world.pass(Duration::from_secs(5));
    assert!(expired.is_empty());
    let (_, expired) = world.pass(Duration::from_secs(2));
    assert_eq!(expired, [held[0].id]);
    assert!(world.table.refuse(held[0].id, Refusal::Reset).is_none());
}

#[test]
fn only_what_is_still_open_is_taken_back() {
    let mut world = World::new();
    let (kept, gone) = (addr("10.0.0.1:4000"), addr("10.0.0.1:4001"));
    let vip = addr("240.240.0.7:80");
    world.open(kept, vip);
    world.open(gone, vip);
    world.tcp(addr("10.0.0.1:4002"), vip, tcp_flags::SYN);
    let bytes = world.table.export_open(world.now, |source, _| source == kept);
    let mut next = World::new();
    next.open(addr("10.0.0.1:5000"), vip);
    assert_eq!(next.table.add(&bytes, next.now), Ok(1));
    assert_eq!((next.table.len(), next.table.pending()), (2, 0));
    assert_eq!(next.table.add(&bytes, next.now), Ok(0), "it is there already");
}

#[test]
fn another_version_is_named() {
    let mut bytes = World::new().table.export(Instant::now());
    bytes[5] = 9;
    let error = FlowTable::import(config(), &bytes, Instant::now()).unwrap_err();
    assert_eq!(error, ImportError::Version(9));
    assert_eq!(
        FlowTable::import(config(), b"xyzw12", Instant::now()).unwrap_err(),
        ImportError::NoTable
    );
}

proptest! {
    #[test]
    fn garbage_is_refused_without_panic(bytes in vec(any::<u8>(), 0..600)) {
        let _ = FlowTable::import(config(), &bytes, Instant::now());
        let mut headed = b"TMBF\0\x01\0\0\0\x03".to_vec();
        headed.extend(bytes);
        let _ = FlowTable::import(config(), &headed, Instant::now());
    }

    #[test]
    fn a_damaged_table_never_panics(at in any::<prop::sample::Index>(), with in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut world = World::new();
        world.open(addr("10.0.0.1:4000"), addr("240.240.0.7:80"));
        world.tcp(addr("10.0.0.1:4001"), addr("240.240.0.7:81"), tcp_flags::SYN);
        let mut bytes = world.table.export(world.now);
        let whole = bytes.clone();
        let at = at.index(bytes.len());
        bytes[at] = with;
        if let Ok(mut table) = FlowTable::import(config(), &bytes, world.now) {
            table.handle_timeout(world.now + HOLD * 2, &mut |_| {});
            prop_assert_eq!((table.pending(), table.awaiting()), (0, 0));
        }
        let cut = cut.index(whole.len());
        prop_assert!(FlowTable::import(config(), &whole[..cut], world.now).is_err());
    }
}
