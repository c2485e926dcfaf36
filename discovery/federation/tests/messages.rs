//! The corpus of the fuzz target `federation_message`, damage done to it, and any bytes.
#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "tests"
)]

#[path = "../../../fuzz/fuzz_targets/check/federation_message.rs"]
mod check;

use proptest::prelude::*;
use prost::Message as _;
use std::collections::BTreeSet;
use tombolo_federation::{Grant, MemberKey, Profile, Record};
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};

const FOLDER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../fuzz/corpus/federation_message"
);

fn record(cluster: &str, by: &str) -> Record {
    Record {
        cluster: cluster.into(),
        trust_domain: format!("{cluster}.example").parse().unwrap(),
        aliases: BTreeSet::new(),
        key: MemberKey([2; 32]),
        roots_pem: "root".into(),
        endpoints: vec!["x:443".into()],
        namespaces: Grant::All,
        may_admit: true,
        share_trust_domain: false,
        incarnation: 1,
        version: 2,
        removed: false,
        admitted_by: by.into(),
        rank: 1,
        admitter_incarnation: 1,
    }
}

fn signed(body: Vec<u8>, good: bool) -> pb::Signed {
    pb::Signed {
        body,
        signature: vec![u8::from(good)],
    }
}

fn service(namespace: &str, name: &str, id: &str) -> pb::ExportedService {
    pb::ExportedService {
        namespace: namespace.into(),
        name: name.into(),
        ports: vec![pb::ExportedPort {
            port: 80,
            protocol: "HTTP".into(),
            name: "http".into(),
        }],
        subject_alt_names: vec![id.into()],
        presences: vec![pb::Presence {
            healthy: 2,
            capacity: 2,
            ..pb::Presence::default()
        }],
    }
}

/// Named inputs: one for each thing that a member may say, and each lie.
fn inputs() -> Vec<(&'static str, Vec<Message>)> {
    let good = "spiffe://east.example/ns/shop/sa/web";
    let part = |from, to, services| {
        Message::Exports(pb::ExportsPart {
            from_seq: from,
            to_seq: to,
            last: true,
            services,
            ..pb::ExportsPart::default()
        })
    };
    let records = |records| {
        Message::Records(pb::Records {
            records,
            profiles: Vec::new(),
        })
    };
    let profile = Profile {
        cluster: "east".into(),
        key: MemberKey([2; 32]),
        version: 2,
        roots_pem: "new".into(),
        endpoints: vec!["y:443".into()],
    };
    let mut later = record("east", "west").encode();
    later[15] = 9;
    let far = Record {
        version: u64::MAX,
        ..record("east", "west")
    };
    let gone = Record {
        removed: true,
        ..record("east", "west")
    };
    vec![
        (
            "start",
            vec![
                Message::Start(pb::Start::default()),
                Message::Ack(pb::Ack { seq: 1 }),
            ],
        ),
        (
            "start_twice",
            vec![
                Message::Start(pb::Start::default()),
                Message::Start(pb::Start::default()),
            ],
        ),
        (
            "start_restored",
            vec![Message::Start(pb::Start {
                epoch_seen: 7,
                ..pb::Start::default()
            })],
        ),
        (
            "full",
            vec![
                part(0, 3, vec![service("shop", "web", good)]),
                part(3, 4, vec![service("shop", "db", good)]),
            ],
        ),
        (
            "gap",
            vec![
                part(0, 3, vec![service("shop", "web", good)]),
                part(5, 6, vec![]),
                part(0, 6, vec![]),
            ],
        ),
        ("outside", vec![part(0, 3, vec![service("bank", "web", good)])]),
        (
            "foreign",
            vec![part(
                0,
                3,
                vec![service("shop", "web", "spiffe://west.example/ns/shop/sa/web")],
            )],
        ),
        (
            "host",
            vec![part(0, 3, vec![service("shop", "web.example", good)])],
        ),
        ("backwards", vec![part(4, 3, vec![])]),
        (
            "records",
            vec![records(vec![signed(record("east", "west").encode(), true)])],
        ),
        (
            "self_admitted",
            vec![records(vec![signed(record("east", "east").encode(), true)])],
        ),
        (
            "ghost",
            vec![records(vec![signed(record("ghost", "east").encode(), true)])],
        ),
        (
            "unsigned",
            vec![records(vec![signed(record("east", "west").encode(), false)])],
        ),
        ("later_form", vec![records(vec![signed(later, true)])]),
        ("too_new", vec![records(vec![signed(far.encode(), true)])]),
        ("removed", vec![records(vec![signed(gone.encode(), true)])]),
        (
            "profile",
            vec![Message::Records(pb::Records {
                records: vec![],
                profiles: vec![signed(profile.encode(), true)],
            })],
        ),
        ("hello_again", vec![Message::Hello(pb::Hello::default())]),
        (
            "heartbeats",
            vec![
                Message::Heartbeat(pb::Heartbeat { records_digest: 1 }),
                Message::Resync(pb::Resync {}),
            ],
        ),
        (
            "refused",
            vec![Message::Refused(pb::Refused {
                code: "TMB0710".into(),
                cause: "x".into(),
            })],
        ),
    ]
}

fn frames(messages: &[Message]) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages {
        let bytes = pb::PeerMessage {
            message: Some(message.clone()),
        }
        .encode_to_vec();
        out.extend_from_slice(&u16::try_from(bytes.len()).unwrap().to_be_bytes());
        out.extend_from_slice(&bytes);
    }
    out
}

/// Writes the corpus. Run by hand after a change of messages.
#[test]
#[ignore = "writes files"]
fn write_corpus() {
    for (name, messages) in inputs() {
        std::fs::write(format!("{FOLDER}/{name}"), frames(&messages)).unwrap();
    }
}

#[test]
fn the_corpus_of_federation_message() {
    let mut reached = BTreeSet::new();
    let mut count = 0;
    for entry in std::fs::read_dir(FOLDER).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        reached.extend(check::check(&bytes));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x41;
            check::check(&damaged);
        }
        count += 1;
    }
    assert!(count >= 20, "{count}");
    for code in [
        "published",
        "closed",
        "TMB0710",
        "TMB0711",
        "TMB0713",
        "TMB0716",
        "TMB0717",
        "TMB0718",
        "TMB0722",
        "TMB0723",
    ] {
        assert!(reached.contains(code), "{code} is not reached: {reached:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        check::check(&bytes);
    }

    #[test]
    fn records_have_one_form(
        cluster in "[a-z]{1,8}", by in "[a-z]{1,8}", key: [u8; 32], may_admit: bool, removed: bool,
        incarnation in 1..u64::MAX, version in 1..u64::MAX, roots in ".{1,50}",
        namespaces in proptest::collection::btree_set("[a-z]{1,5}", 0..5), at: usize, bit in 0u8..8,
    ) {
        let record = Record {
            key: MemberKey(key), may_admit, removed, incarnation, version, roots_pem: roots,
            namespaces: Grant::from_list(namespaces.iter().map(String::as_str)).unwrap(),
            ..record(&cluster, &by)
        };
        let bytes = record.encode();
        prop_assert_eq!(Record::decode(&bytes), Ok(record.clone()));
        let mut damaged = bytes.clone();
        let at = at % bytes.len();
        damaged[at] ^= 1 << bit;
        prop_assert_ne!(Record::decode(&damaged), Ok(record));
        prop_assert!(Record::decode(&bytes[..at]).is_err());
    }
}
