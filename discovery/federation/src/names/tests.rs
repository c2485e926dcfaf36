use super::*;
use crate::{
    ConnId, Ed25519, Event, ExportedService, Exports, Grant, Invite, Own, Record, Saved, ServiceName,
    codec::Reader, record::sign,
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::{InviteToken, SpiffeId};

type Core = Federation<Ed25519>;

const NOW: Now = Now {
    monotonic: Duration::from_secs(1),
    unix_ms: 0,
};

fn td(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

fn own(cluster: &str) -> Own {
    Own {
        cluster: cluster.into(),
        trust_domain: td(&format!("{cluster}.example")),
        also: Vec::new(),
        roots_pem: format!("roots of {cluster}"),
        endpoints: vec![format!("{cluster}.example:443")],
        version: "0.1.0".into(),
        share_trust_domain: false,
    }
}

fn key(cluster: &str) -> Ed25519 {
    let mut seed = [0; 32];
    seed[..cluster.len()].copy_from_slice(cluster.as_bytes());
    Ed25519::from_seed(&seed)
}

fn core_of(own: Own) -> Core {
    let key = key(&own.cluster);
    Federation::start(own, key, &Saved::new(), 1, NOW).0
}

fn core(cluster: &str) -> Core {
    core_of(own(cluster))
}

/// `joiner` becomes a member by an invite of `inviter`, and its first contact.
fn join(inviter: &mut Core, joiner: &mut Core, may_admit: bool) {
    let seed = [7; 32];
    let invite_key = Ed25519::from_seed(&seed);
    let cluster = joiner.own.cluster.clone();
    let invite = Invite {
        id: [1; 16],
        public_key: invite_key.public_key(),
        cluster: cluster.clone(),
        trust_domain: joiner.own.trust_domain.clone(),
        namespaces: Grant::All,
        may_admit,
        share_trust_domain: joiner.own.share_trust_domain,
        expires_unix_ms: 1000,
        used_by: None,
    };
    let token = InviteToken {
        id: [1; 16],
        root_pin: [0; 32],
        seed: seed.into(),
        trust_domain: inviter.own.trust_domain.clone(),
        cluster: cluster.to_string(),
        endpoints: vec!["x:1".into()],
    };
    let share = joiner.own.share_trust_domain;
    let request = joiner.join_request(&token, &invite_key, &[0; 32], share).unwrap();
    let (response, _) = inviter.redeem(&invite, &request, &[0; 32], NOW).unwrap();
    joiner.accept(&response, NOW).unwrap();
    inviter.confirm_admission(&cluster, NOW).unwrap();
}

/// What `from` tells `to`: the codes of what it refused.
fn tell(from: &Core, to: &mut Core) -> Vec<Code> {
    let records = from.membership.signed_records().into_iter();
    let records: Vec<pb::Signed> = records.map(|(_, signed)| signed).collect();
    said(to, &records)
}

fn said(to: &mut Core, records: &[pb::Signed]) -> Vec<Code> {
    to.audited.clear();
    to.take(records, &[], Some(&"peer".into()), NOW);
    codes(&to.finish(NOW))
}

fn codes(actions: &[Action]) -> Vec<Code> {
    let refused = actions.iter().filter_map(|action| match action {
        Action::Audit(refusal) => Some(refusal.code),
        Action::Persist(_)
        | Action::SaveImports { .. }
        | Action::Send { .. }
        | Action::Dial { .. }
        | Action::Close { .. }
        | Action::Publish { .. } => None,
    });
    refused.collect()
}

fn names(core: &Core, cluster: &str) -> Vec<String> {
    let member = core.membership.live(cluster).expect("a member");
    member.names().map(ToString::to_string).collect()
}

fn record(core: &Core, cluster: &str) -> Record {
    (*core.membership.view()[cluster].record).clone()
}

fn add(core: &mut Core, cluster: &str, name: &str) -> Result<(), Code> {
    let change = NameChange::Add(td(name));
    let done = core.change_names(cluster, &change, NOW);
    done.map(drop).map_err(|refusal| refusal.code)
}

fn drop_name(core: &mut Core, cluster: &str, name: &str, force: bool) -> Result<(), Code> {
    let change = NameChange::Drop {
        name: td(name),
        force,
    };
    let done = core.change_names(cluster, &change, NOW);
    done.map(drop).map_err(|refusal| refusal.code)
}

/// A founder, a member that may admit, and one that may not, admitted by the founder.
fn three() -> (Core, Core, Core) {
    let (mut west, mut east, mut south) = (core("west"), core("east"), core("south"));
    join(&mut west, &mut east, true);
    join(&mut west, &mut south, false);
    tell(&west, &mut east);
    tell(&west, &mut south);
    (west, east, south)
}

#[test]
fn a_record_without_aliases_is_what_it_was() {
    let plain = record(&three().0, "east");
    let bytes = plain.encode();
    assert!(bytes.starts_with(b"tombolo member\0\x01"));
    let named = Record {
        aliases: BTreeSet::from([td("b.example"), td("a.example")]),
        ..plain.clone()
    };
    let named_bytes = named.encode();
    assert!(named_bytes.starts_with(b"tombolo member\0\x02"));
    assert_eq!(
        &named_bytes[16..bytes.len()],
        &bytes[16..],
        "the rest is the same"
    );
    assert_eq!(Record::decode(&named_bytes), Ok(named.clone()));
    assert_eq!(Record::decode(&bytes), Ok(plain.clone()));
    // What a release before this form says of it.
    let refused = Reader::new(&named_bytes, b"tombolo member\0\x01", 1)
        .err()
        .unwrap();
    assert_eq!(refused.code, Code::MembershipTooNew);
    let refused = |bytes: &[u8]| Record::decode(bytes).unwrap_err().code;
    let mut third = named_bytes.clone();
    third[15] = 3;
    assert_eq!(refused(&third), Code::MembershipTooNew);
    third[15] = 0;
    assert_eq!(refused(&third), Code::MembershipTooNew);
    // The second form with no name, with one twice, in another order, or too many.
    let mut empty = bytes.clone();
    empty[15] = 2;
    assert_eq!(refused(&empty), Code::MembershipForged, "no list at all");
    empty.extend([0; 8]);
    assert_eq!(refused(&empty), Code::MembershipForged, "an empty one");
    let list = |names: &[&str]| {
        let mut bytes = bytes.clone();
        bytes[15] = 2;
        bytes.extend((names.len() as u64).to_be_bytes());
        for name in names {
            bytes.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes
    };
    assert_eq!(list(&["a.example", "b.example"]), named_bytes);
    for names in [
        &["b.example", "a.example"][..],
        &["a.example", "a.example"],
        &["east.example"],
        &["A.example"],
        &["not a name"],
        &["a", "b", "c", "d", "e"],
    ] {
        assert_eq!(refused(&list(names)), Code::MembershipForged, "{names:?}");
    }
}

#[test]
fn who_admitted_a_member_names_its_trust_domain() {
    let (mut west, mut east, mut south) = three();
    add(&mut west, "east", "new.example").unwrap();
    add(&mut west, "east", "new.example").expect("done already");
    for other in [&mut east, &mut south] {
        assert_eq!(tell(&west, other), []);
        assert_eq!(names(other, "east"), ["east.example", "new.example"]);
    }
    assert!(east.is_listed(&td("new.example")) && !east.is_listed(&td("west.example")));
    assert_eq!(east.shown_after(0), td("east.example"), "as all know it");
    // The founder says it of itself; nobody else does, of itself or of others.
    add(&mut west, "west", "next.example").unwrap();
    for (core, clusters) in [(&mut east, ["east", "south"]), (&mut south, ["south", "west"])] {
        for cluster in clusters {
            let refused = add(core, cluster, "x.example");
            assert_eq!(refused, Err(Code::MayNotAdmit), "{cluster}");
        }
    }
    assert_eq!(add(&mut west, "north", "x.example"), Err(Code::MemberUnknown));
    // The old name goes, and the new one takes its place.
    drop_name(&mut west, "east", "east.example", false).unwrap();
    assert_eq!(tell(&west, &mut south), []);
    assert_eq!(names(&south, "east"), ["new.example"]);
    assert_eq!(
        record(&south, "east").encode()[15],
        1,
        "as every release reads it"
    );
    assert_eq!(names(&south, "west"), ["west.example", "next.example"]);
    for (name, code) in [
        ("new.example", Code::InvalidRequest),  // all that it has
        ("east.example", Code::InvalidRequest), // gone
    ] {
        assert_eq!(drop_name(&mut west, "east", name, true), Err(code), "{name}");
    }
    for name in ["a", "b", "c", "d"] {
        add(&mut west, "east", name).unwrap();
    }
    assert_eq!(add(&mut west, "east", "e"), Err(Code::MemberLimitReached));
    assert_eq!(
        drop_name(&mut west, "east", "new.example", true),
        Err(Code::InvalidRequest),
        "which is to take its place?"
    );
}

#[test]
fn a_name_of_another_member_is_taken() {
    let (mut west, _, _) = three();
    add(&mut west, "south", "alias.example").unwrap();
    for (cluster, name) in [
        ("east", "west.example"),
        ("east", "south.example"),
        ("east", "alias.example"),
        ("west", "east.example"),
        ("west", "alias.example"),
    ] {
        assert_eq!(
            add(&mut west, cluster, name),
            Err(Code::TrustDomainTaken),
            "{cluster} {name}"
        );
    }
    // Nor is a cluster invited under one.
    let invite = west.check_invite("north", &td("alias.example"), false);
    assert_eq!(invite.unwrap_err().code, Code::TrustDomainTaken);
    add(&mut west, "east", "free.example").unwrap();
    let invite = west.check_invite("north", &td("free.example"), false);
    assert_eq!(invite.unwrap_err().code, Code::TrustDomainTaken);
    // A member that is removed has no names.
    west.remove("south", NOW).unwrap();
    add(&mut west, "east", "alias.example").unwrap();
    add(&mut west, "east", "south.example").unwrap();
}

#[test]
fn clusters_that_share_may_have_one_name() {
    let share = |cluster: &str| Own {
        share_trust_domain: true,
        ..own(cluster)
    };
    let (mut west, mut east) = (core_of(share("west")), core_of(share("east")));
    let mut south = core("south");
    join(&mut west, &mut east, false);
    join(&mut west, &mut south, false);
    add(&mut west, "east", "west.example").expect("both say that they share");
    assert_eq!(names(&west, "east"), ["east.example", "west.example"]);
    assert_eq!(
        add(&mut west, "south", "west.example"),
        Err(Code::TrustDomainTaken),
        "this one does not"
    );
}

#[test]
fn nobody_names_itself() {
    let (west, mut east, mut south) = three();
    let aliased = Record {
        aliases: BTreeSet::from([td("west.example")]),
        version: 2,
        ..record(&west, "east")
    };
    let by_itself = Record {
        admitted_by: "east".into(),
        ..aliased.clone()
    };
    for lie in [&aliased, &by_itself] {
        let lie = sign(&key("east"), lie.encode());
        assert_eq!(
            said(&mut south, std::slice::from_ref(&lie)),
            [Code::MembershipForged]
        );
    }
    // With the right signature under other words.
    let mut patched = sign(&key("west"), aliased.encode());
    let at = patched
        .body
        .windows(12)
        .position(|w| w == b"west.example")
        .unwrap();
    patched.body[at] = b'v';
    assert_eq!(said(&mut south, &[patched]), [Code::MembershipForged]);
    // One without the right to admit, of its neighbour.
    let neighbour = Record {
        admitted_by: "south".into(),
        rank: 2,
        ..aliased
    };
    let lie = sign(&key("south"), neighbour.encode());
    assert_eq!(said(&mut east, &[lie]), [Code::MembershipForged]);
    assert_eq!(names(&south, "east"), ["east.example"]);
    assert_eq!(names(&east, "east"), ["east.example"]);
}

/// East may admit, and lies about whom it admitted.
#[test]
fn an_alias_takes_no_name_from_anybody() {
    let (mut west, mut east, mut south) = three();
    let mut child = core("child");
    join(&mut east, &mut child, false);
    assert_eq!(tell(&east, &mut west), []);
    add(&mut west, "west", "next.example").unwrap();
    tell(&west, &mut south);
    tell(&east, &mut south);
    let lie = Record {
        aliases: ["south.example", "west.example", "next.example", "free.example"]
            .map(td)
            .into(),
        version: 2,
        ..record(&east, "child")
    };
    let lie = sign(&key("east"), lie.encode());
    for core in [&mut west, &mut south] {
        assert_eq!(said(core, std::slice::from_ref(&lie)), [Code::MemberContested]);
        assert_eq!(names(core, "child"), ["child.example", "free.example"]);
        assert_eq!(names(core, "south"), ["south.example"]);
        assert_eq!(names(core, "west"), ["west.example", "next.example"]);
    }
    // Whoever stands nearer takes the name from one further away, by an alias too, and the member stays one.
    add(&mut west, "south", "other.example").unwrap();
    let far = Record {
        trust_domain: td("other.example"),
        aliases: BTreeSet::new(),
        version: 3,
        ..record(&west, "child")
    };
    let far = sign(&key("east"), far.encode());
    said(&mut west, &[far]);
    assert_eq!(west.membership.view()["child"].standing, Standing::Contested);
    assert_eq!(names(&west, "south"), ["south.example", "other.example"]);
}

fn exports(trust_domain: &str) -> Exports {
    let name = ServiceName {
        namespace: "shop".into(),
        name: "web".into(),
    };
    let service = ExportedService {
        name: name.clone(),
        ports: Vec::new(),
        subject_alt_names: vec![SpiffeId::new(td(trust_domain), "shop", "web").unwrap()],
        presences: Vec::new(),
    };
    Exports {
        services: std::iter::once((name, Arc::new(service))).collect(),
        ..Exports::default()
    }
}

/// A session of two cores, the second one as the trust domain that it shows; what the first one sends first.
fn session(at: &mut Core, of: &mut Core, shown: &str, conn: u64) -> Vec<Code> {
    let conn = ConnId(conn);
    let opened = |dialled: Option<Arc<str>>, trust_domain| Event::Connected {
        conn,
        dialled,
        trust_domain,
        exporter: [9; 32],
    };
    let hello = |actions: &[Action]| {
        let messages = actions.iter().filter_map(|action| match action {
            Action::Send { message, .. } => message.message.clone(),
            Action::Persist(_)
            | Action::SaveImports { .. }
            | Action::Dial { .. }
            | Action::Close { .. }
            | Action::Publish { .. }
            | Action::Audit(_) => None,
        });
        messages.collect::<Vec<Message>>()
    };
    let dialled = of.handle(
        opened(Some(at.own.cluster.clone()), at.own.trust_domain.clone()),
        NOW,
    );
    at.audited.clear();
    let mut refused = codes(&at.handle(opened(None, td(shown)), NOW));
    for message in hello(&dialled) {
        let message = pb::PeerMessage {
            message: Some(message),
        };
        refused.extend(codes(&at.handle(Event::Received { conn, message }, NOW)));
    }
    refused
}

#[test]
fn a_session_shows_a_name_of_the_record() {
    let (mut west, mut east, _) = three();
    assert_eq!(session(&mut west, &mut east, "new.example", 1), [Code::PeerProof]);
    add(&mut west, "east", "new.example").unwrap();
    tell(&west, &mut east);
    assert_eq!(session(&mut west, &mut east, "new.example", 2), []);
    assert_eq!(session(&mut west, &mut east, "east.example", 3), []);
    assert_eq!(
        session(&mut west, &mut east, "south.example", 4),
        [Code::PeerProof]
    );
    let roots: Vec<String> = (west.peer_roots().into_iter())
        .filter(|(_, pem)| pem == "roots of east")
        .map(|(name, _)| name.to_string())
        .collect();
    assert_eq!(roots, ["east.example", "new.example"]);
}

#[test]
fn a_renaming_from_its_start_to_its_end() {
    let (mut west, mut east, mut south) = three();
    session(&mut west, &mut east, "east.example", 1);
    add(&mut west, "east", "new.example").unwrap();
    tell(&west, &mut east);
    tell(&west, &mut south);
    let world = west.world();
    let imports = &world.clusters["east"];
    assert_eq!(imports.trust_domain, td("east.example"));
    assert_eq!(imports.also, BTreeSet::from([td("new.example")]));
    // It switches: its process opens anew.
    let mut own = east.own.clone();
    (own.trust_domain, own.also) = (td("new.example"), vec![td("east.example")]);
    let mut saved = Saved::new();
    for (slot, signed) in east.membership.signed_records() {
        saved.insert(
            crate::saved::record_key(&slot),
            prost::Message::encode_to_vec(&signed),
        );
    }
    let crate::Write::Put { key: at, value } = east.self_write() else {
        panic!("a value")
    };
    saved.insert(at, value);
    let (mut east, _) = Federation::start(own, key("east"), &saved, 2, NOW);
    assert_eq!(east.shown_after(0), td("east.example"), "all know that one");
    east.handle(Event::Exports(exports("new.example")), NOW);
    assert!(east.refused_exports().is_empty());
    assert_eq!(session(&mut west, &mut east, "east.example", 2), []);
    let world = west.world();
    let imports = &world.clusters["east"];
    assert_eq!(
        imports.trust_domain,
        td("new.example"),
        "by its own word, of its two names"
    );
    assert_eq!(imports.also, BTreeSet::from([td("east.example")]));
    assert_eq!(
        drop_name(&mut west, "east", "east.example", false),
        Err(Code::TrustDomainInUse)
    );
    assert_eq!(
        drop_name(&mut west, "east", "new.example", false),
        Err(Code::TrustDomainInUse)
    );
    // It has finished.
    east.own.also.clear();
    session(&mut west, &mut east, "east.example", 3);
    let change = NameChange::Drop {
        name: td("east.example"),
        force: false,
    };
    let actions = west.change_names("east", &change, NOW).unwrap();
    assert!(
        actions.contains(&Action::Close { conn: ConnId(3) }),
        "the session under the old name ends"
    );
    assert!(
        actions
            .iter()
            .any(|action| matches!(action, Action::SaveImports { .. }))
    );
    let world = west.world();
    let imports = &world.clusters["east"];
    assert_eq!(imports.trust_domain, td("new.example"));
    assert_eq!(imports.also, BTreeSet::new());
    assert_eq!(imports.former, BTreeSet::from([td("east.example")]));
    // Its next dial is under the new one, which it shows itself as soon as it knows.
    tell(&west, &mut east);
    assert_eq!(east.shown_after(0), td("new.example"));
    // One that has missed the change is shown the others in turn.
    east.own.also.push(td("east.example"));
    assert_eq!(east.shown_after(1), td("east.example"));
    assert_eq!(east.shown_after(2), td("new.example"));
    east.own.also.clear();
    assert_eq!(
        session(&mut west, &mut east, "east.example", 4),
        [Code::PeerProof]
    );
    assert_eq!(session(&mut west, &mut east, "new.example", 5), []);
    // The old name is free for another.
    assert_eq!(add(&mut west, "south", "east.example"), Ok(()));
    west.changed.insert("east".into());
    west.finish(NOW);
    assert_eq!(west.world().clusters["east"].former, BTreeSet::new());
}

#[test]
fn identities_under_each_name_are_its_own() {
    let (mut west, _, _) = three();
    let member = |core: &Core| core.membership.live("east").unwrap().clone();
    let check = |core: &Core, trust_domain: &str| {
        let exports = exports(trust_domain);
        let mut services = exports.services.values();
        services.all(|service| service.check_exporter(&member(core)).is_ok())
    };
    assert!(check(&west, "east.example") && !check(&west, "new.example"));
    add(&mut west, "east", "new.example").unwrap();
    assert!(check(&west, "east.example") && check(&west, "new.example") && !check(&west, "west.example"));
    drop_name(&mut west, "east", "east.example", true).unwrap();
    assert!(!check(&west, "east.example") && check(&west, "new.example"));
}

#[test]
fn a_founder_alone_is_what_it_is() {
    let west = core("west");
    let mut saved = Saved::new();
    for (slot, signed) in west.membership.signed_records() {
        saved.insert(
            crate::saved::record_key(&slot),
            prost::Message::encode_to_vec(&signed),
        );
    }
    let crate::Write::Put { key: at, value } = west.self_write() else {
        panic!("a value")
    };
    saved.insert(at, value);
    let renamed = |name: &str, also: &[&str]| Own {
        trust_domain: td(name),
        also: also.iter().map(|name| td(name)).collect(),
        ..own("west")
    };
    let start = |own: Own, saved: &Saved| Federation::start(own, key("west"), saved, 2, NOW).0;
    let west = start(renamed("new.example", &["west.example"]), &saved);
    assert_eq!(names(&west, "west"), ["new.example", "west.example"]);
    let west = start(renamed("new.example", &[]), &saved);
    assert_eq!(names(&west, "west"), ["new.example"]);
    // With others it is for them to hear first.
    let (full, _, _) = three();
    for (slot, signed) in full.membership.signed_records() {
        saved.insert(
            crate::saved::record_key(&slot),
            prost::Message::encode_to_vec(&signed),
        );
    }
    let west = start(renamed("new.example", &[]), &saved);
    assert_eq!(names(&west, "west"), ["west.example"]);
    assert!(!west.is_listed(&td("new.example")));
}
