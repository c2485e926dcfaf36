//! A member with a session says anything: frames of a length in two bytes and a PeerMessage.

use prost::Message as _;
use std::{collections::BTreeSet, time::Duration};
use tombolo_federation::{
    Action, ConnId, Crypto, Event, Federation, Grant, Invite, MemberKey, Now, Own, Profile, Record, Saved,
};
use tombolo_proto::tombolo::federation::v1::PeerMessage;
use tombolo_types::InviteToken;

/// A hash in the place of a signature: what a fuzzer cannot forge would keep it from everything behind it.
pub struct Hash(MemberKey);

impl Crypto for Hash {
    fn public_key(&self) -> MemberKey {
        self.0
    }
    fn sign(&self, _: &[u8]) -> Vec<u8> {
        vec![1]
    }
    fn verify(&self, _: &MemberKey, _: &[u8], signature: &[u8]) -> bool {
        signature == [1]
    }
}

fn now(ms: u64) -> Now {
    Now {
        monotonic: Duration::from_millis(ms),
        unix_ms: 0,
    }
}

pub fn core(cluster: &str, key: u8) -> Federation<Hash> {
    let own = Own {
        cluster: cluster.into(),
        trust_domain: format!("{cluster}.example").parse().expect("a name"),
        also: Vec::new(),
        roots_pem: "root".into(),
        endpoints: vec!["x:443".into()],
        version: "0.1.0".into(),
        share_trust_domain: false,
    };
    Federation::start(
        own,
        Hash(MemberKey([key; 32])),
        &Saved::new(),
        u64::from(key),
        now(0),
    )
    .0
}

/// Two members, the second with a session at the first: its Hello has been taken.
pub fn pair() -> (Federation<Hash>, Federation<Hash>) {
    let (mut west, mut east) = (core("west", 1), core("east", 2));
    let invite = Invite {
        id: [1; 16],
        public_key: MemberKey([3; 32]),
        cluster: "east".into(),
        trust_domain: "east.example".parse().expect("a name"),
        namespaces: Grant::from_list(["shop"]).expect("a namespace"),
        may_admit: false,
        share_trust_domain: false,
        expires_unix_ms: 1000,
        used_by: None,
    };
    let token = InviteToken {
        id: [1; 16],
        root_pin: [0; 32],
        seed: [0; 32].into(),
        trust_domain: "west.example".parse().expect("a name"),
        cluster: "east".into(),
        endpoints: vec!["x:1".into()],
    };
    let request = east
        .join_request(&token, &Hash(MemberKey([3; 32])), &[0; 32], false)
        .expect("a request");
    let (response, _) = west
        .redeem(&invite, &request, &[0; 32], now(0))
        .expect("it is good");
    east.accept(&response, now(0)).expect("it is good");
    let connected = |dialled, trust_domain: &str| Event::Connected {
        conn: ConnId(1),
        dialled,
        trust_domain: trust_domain.parse().expect("a name"),
        exporter: [5; 32],
    };
    for action in east.handle(connected(Some("west".into()), "west.example"), now(1)) {
        if let Action::Send { message, .. } = action {
            let _ = west.handle(connected(None, "east.example"), now(1));
            let _ = west.handle(
                Event::Received {
                    conn: ConnId(1),
                    message,
                },
                now(1),
            );
        }
    }
    (west, east)
}

/// Returns the codes of what was refused, so that a corpus can be judged.
pub fn check(bytes: &[u8]) -> BTreeSet<&'static str> {
    let mut reached = BTreeSet::new();
    for whole in [bytes, bytes.get(1..).unwrap_or_default()] {
        if let Ok(record) = Record::decode(whole) {
            assert_eq!(record.encode(), whole, "one record has one form");
        }
        if let Ok(profile) = Profile::decode(whole) {
            assert_eq!(profile.encode(), whole, "one profile has one form");
        }
    }
    let (mut west, _) = pair();
    assert!(west.world().clusters.contains_key("east"));
    let mut rest = bytes;
    let mut at = 2;
    while let [high, low, content @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(content.len());
        let (frame, after) = content.split_at(length);
        rest = after;
        at += 700;
        let Ok(message) = PeerMessage::decode(frame) else {
            continue;
        };
        for action in west.handle(
            Event::Received {
                conn: ConnId(1),
                message,
            },
            now(at),
        ) {
            match action {
                Action::Audit(refusal) => drop(reached.insert(refusal.code.entry().id)),
                Action::Publish { .. } => drop(reached.insert("published")),
                Action::Close { .. } => drop(reached.insert("closed")),
                Action::Persist(_)
                | Action::SaveImports { .. }
                | Action::Send { .. }
                | Action::Dial { .. } => {}
            }
        }
        let world = west.world();
        for (name, service) in world
            .clusters
            .get("east")
            .iter()
            .flat_map(|imports| imports.services.iter())
        {
            assert!(&*name.namespace == "shop", "outside the grant: {name}");
            assert!(
                service
                    .subject_alt_names
                    .iter()
                    .all(|id| id.trust_domain.as_str() == "east.example")
            );
        }
        let _ = west.next_timeout();
    }
    reached
}
