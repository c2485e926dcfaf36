//! What a member that lies does to what its core wants to send.

use crate::keys::{Keys, Random};
use tombolo_federation::{Crypto, Grant, Profile, Record};
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};

/// What the liar knows of the others.
#[derive(Debug, Default)]
pub(crate) struct Loot {
    /// Every record that anybody ever sent to it.
    pub(crate) records: Vec<pb::Signed>,
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
        presences: Vec::new(),
    }
}

fn signed(keys: &Keys, body: Vec<u8>) -> pb::Signed {
    let signature = keys.sign(&body);
    pb::Signed { body, signature }
}

/// The message as it is sent, and more of them behind it.
pub(crate) fn tamper(
    message: pb::PeerMessage,
    own: &Record,
    victim: &Record,
    keys: &Keys,
    loot: &Loot,
    random: &mut Random,
    renaming: Option<&mut Random>,
) -> Vec<pb::PeerMessage> {
    let td = own.trust_domain.as_str();
    let mut message = message;
    let mut more = Vec::new();
    match &mut message.message {
        Some(Message::Exports(part)) => {
            let lies = [
                service("secret", "outside", &format!("spiffe://{td}/ns/secret/sa/x")),
                service(
                    "tombolo-system",
                    "discovery",
                    &format!("spiffe://{td}/ns/shop/sa/x"),
                ),
                service(
                    "shop",
                    "foreign",
                    &format!("spiffe://{}/ns/shop/sa/web", victim.trust_domain),
                ),
                service(
                    "shop",
                    "gateway",
                    &format!("spiffe://{td}/ns/tombolo-system/sa/gateway"),
                ),
                service("shop", "a.b", &format!("spiffe://{td}/ns/shop/sa/x")),
                service("shop.svc", "x", &format!("spiffe://{td}/ns/shop/sa/x")),
                service("shop", "none", "not an identity"),
            ];
            part.services.push(lies[random.index(lies.len())].clone());
            if random.chance(5) {
                part.part = 7;
            }
            if random.chance(5) {
                part.to_seq = part.from_seq.saturating_sub(1);
            }
        }
        Some(Message::Records(records)) => {
            let ghost = Record {
                cluster: "ghost".into(),
                trust_domain: "ghost.example"
                    .parse()
                    .unwrap_or_else(|_| own.trust_domain.clone()),
                key: keys.public_key(),
                namespaces: Grant::All,
                admitted_by: own.cluster.clone(),
                admitter_incarnation: own.incarnation,
                version: 1,
                ..own.clone()
            };
            let by_its_founder = Record {
                admitted_by: victim.admitted_by.clone(),
                admitter_incarnation: victim.admitter_incarnation,
                ..ghost.clone()
            };
            let gone = Record {
                removed: true,
                version: victim.version + 1,
                ..victim.clone()
            };
            let gone_by_me = Record {
                admitted_by: own.cluster.clone(),
                admitter_incarnation: own.incarnation,
                ..gone.clone()
            };
            let more_rights = Record {
                may_admit: true,
                namespaces: Grant::All,
                version: own.version + 1,
                ..own.clone()
            };
            let far = Record {
                version: u64::MAX,
                ..own.clone()
            };
            let mut later = own.encode();
            if let Some(form) = later.get_mut(15) {
                *form = 9;
            }
            let profile = Profile {
                cluster: victim.cluster.clone(),
                key: victim.key,
                version: 1000,
                roots_pem: "root of the liar".into(),
                endpoints: vec!["liar.sim:443".into()],
            };
            // Another name of its own trust domain, by its own word.
            let named = |name: &str, by: &Record| Record {
                aliases: name.parse().into_iter().collect(),
                version: own.version + 1,
                admitted_by: by.cluster.clone(),
                admitter_incarnation: by.incarnation,
                ..own.clone()
            };
            if let Some(random) = renaming
                && random.chance(30)
            {
                let name = if random.chance(50) {
                    victim.trust_domain.as_str()
                } else {
                    "liar.example"
                };
                let record = match random.below(3) {
                    0 => named(name, own),
                    1 => Record {
                        admitted_by: own.admitted_by.clone(),
                        admitter_incarnation: own.admitter_incarnation,
                        ..named(name, own)
                    },
                    _ => named(name, victim),
                };
                records.records.push(signed(keys, record.encode()));
            }
            match random.below(9) {
                0 => records.records.push(signed(keys, ghost.encode())),
                1 => records.records.push(signed(keys, by_its_founder.encode())),
                2 => records.records.push(signed(keys, gone.encode())),
                3 => records.records.push(signed(keys, gone_by_me.encode())),
                4 => records.records.push(signed(keys, more_rights.encode())),
                5 => records.records.push(signed(keys, far.encode())),
                6 => records.records.push(signed(keys, later)),
                7 => records.profiles.push(signed(keys, profile.encode())),
                _ => {
                    // Old ones of others, in any order.
                    for _ in 0..4 {
                        if !loot.records.is_empty() {
                            records
                                .records
                                .push(loot.records[random.index(loot.records.len())].clone());
                        }
                    }
                }
            }
        }
        Some(Message::Hello(hello)) => match random.below(6) {
            0 => hello.cluster = victim.cluster.to_string(),
            1 => hello.version = "9.0.0".into(),
            2 => hello.epoch = 0,
            _ => {}
        },
        Some(Message::Start(start)) => match random.below(4) {
            0 => start.epoch_seen = u64::MAX,
            1 => start.epoch_seen = 1 << 31,
            _ => {}
        },
        Some(Message::Heartbeat(heartbeat)) => match random.below(12) {
            0 => heartbeat.records_digest ^= 1,
            1 => more.push(Message::Resync(pb::Resync {})),
            2 => more.push(Message::Ack(pb::Ack { seq: random.next() })),
            3 => more.push(Message::Hello(pb::Hello::default())),
            4 => more.push(Message::Exports(pb::ExportsPart {
                from_seq: random.below(9),
                to_seq: random.below(9),
                part: u32::try_from(random.below(3)).unwrap_or(0),
                last: random.chance(50),
                services: vec![service("shop", "web", &format!("spiffe://{td}/ns/shop/sa/x"))],
                ..pb::ExportsPart::default()
            })),
            5 => more.push(Message::Records(pb::Records {
                records: vec![pb::Signed {
                    body: random.next().to_be_bytes().to_vec(),
                    signature: Vec::new(),
                }],
                profiles: Vec::new(),
            })),
            _ => {}
        },
        Some(Message::Ack(_) | Message::Resync(_) | Message::Refused(_)) | None => {}
    }
    let more = more.into_iter().map(|message| pb::PeerMessage {
        message: Some(message),
    });
    std::iter::once(message).chain(more).collect()
}
