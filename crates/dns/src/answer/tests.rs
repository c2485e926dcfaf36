use super::*;
use crate::{Addresses, OnlyFamilies};
use proptest::prelude::*;
use std::{collections::BTreeMap, net::IpAddr};

/// A mesh with domain `mesh.internal`, seen from namespace `shop`.
struct Mesh {
    names: BTreeMap<&'static str, Addresses>,
}

impl Mesh {
    fn new() -> Self {
        let one = |v4: &[[u8; 4]], v6: &[&str], headless| Addresses {
            v4: v4.iter().map(|&a| a.into()).collect(),
            v6: v6.iter().map(|a| a.parse().unwrap()).collect(),
            headless,
        };
        let many: Vec<[u8; 4]> = (0..100).map(|n| [240, 240, 2, n]).collect();
        let names = BTreeMap::from([
            (
                "catalog.shop.svc.mesh.internal",
                one(&[[240, 240, 0, 1]], &["2001:2::1"], false),
            ),
            (
                "teller.bank.svc.mesh.internal",
                one(&[[240, 240, 0, 2]], &[], false),
            ),
            (
                "db.shop.svc.mesh.internal",
                one(&[[240, 240, 0, 3], [240, 240, 0, 4]], &[], true),
            ),
            ("empty.shop.svc.mesh.internal", one(&[], &[], false)),
            ("many.shop.svc.mesh.internal", one(&many, &[], false)),
            ("deb.example.org", one(&[[240, 240, 0, 5]], &[], false)),
            ("*.wild.example.org", one(&[[240, 240, 0, 6]], &[], false)),
            ("*.deep.wild.example.org", one(&[[240, 240, 0, 7]], &[], false)),
        ]);
        Self { names }
    }
}

impl Names for Mesh {
    fn find(&self, host: &str, _: &str) -> Option<Addresses> {
        self.names.get(host).cloned()
    }
    fn is_mesh_name(&self, host: &str) -> bool {
        host == "mesh.internal" || host.ends_with(".mesh.internal")
    }
    fn mesh_domain(&self) -> &str {
        "mesh.internal"
    }
    fn is_mesh_address(&self, address: IpAddr) -> bool {
        matches!(address, IpAddr::V4(v4) if v4.octets()[..2] == [240, 240])
            || matches!(address, IpAddr::V6(v6) if v6.segments()[..3] == [0x2001, 2, 0])
    }
    fn host_of(&self, address: IpAddr) -> Option<String> {
        let holds = |found: &Addresses| match address {
            IpAddr::V4(v4) => found.v4.contains(&v4),
            IpAddr::V6(v6) => found.v6.contains(&v6),
        };
        self.names
            .iter()
            .find(|(_, found)| holds(found))
            .map(|(&name, _)| name.to_owned())
    }
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn client(udp: bool) -> Client<'static> {
    // Never freed: tests only.
    let search: &'static [String] = Box::leak(Box::new([
        "shop.svc.mesh.internal".to_owned(),
        "corp.example".to_owned(),
    ]));
    Client {
        namespace: "shop",
        search,
        udp,
    }
}

/// Asks and gives the outcome as text: response code, `aa`, then answers and `soa`.
fn ask(message: &Message, udp: bool) -> String {
    let bytes = match answer(&message.to_vec().unwrap(), &Mesh::new(), &client(udp), 7) {
        Answer::Forward => return "forward".to_owned(),
        Answer::Drop => return "drop".to_owned(),
        Answer::Reply(bytes) => bytes,
    };
    let reply = Message::from_vec(&bytes).unwrap();
    assert_eq!(reply.metadata.id, message.metadata.id);
    assert_eq!(reply.metadata.message_type, MessageType::Response);
    assert_eq!(
        reply.metadata.recursion_desired,
        message.metadata.recursion_desired
    );
    let mut text = format!("{:?}", reply.metadata.response_code);
    if reply.metadata.authoritative {
        text += " aa";
    }
    if reply.metadata.truncation {
        text += " tc";
    }
    for record in &reply.answers {
        text += &format!(
            "; {} {} {} {}",
            record.name,
            record.ttl,
            record.record_type(),
            record.data
        );
    }
    for record in &reply.authorities {
        text += &format!("; soa of {} {}", record.name, record.ttl);
    }
    text
}

fn check(name: &str, kind: RecordType, expected: &str) {
    assert_eq!(ask(&query(name, kind), true), expected, "{name} {kind}");
}

#[test]
fn names() {
    use RecordType::{A, AAAA, ANY, HTTPS, MX, PTR, SOA, SRV, SVCB, TXT};
    const NODATA: &str = "NoError aa; soa of mesh.internal. 5";
    const NXDOMAIN: &str = "NXDomain aa; soa of mesh.internal. 5";
    let full = "catalog.shop.svc.mesh.internal.";
    check(
        full,
        A,
        "NoError aa; catalog.shop.svc.mesh.internal. 30 A 240.240.0.1",
    );
    check(
        full,
        AAAA,
        "NoError aa; catalog.shop.svc.mesh.internal. 30 AAAA 2001:2::1",
    );
    // The case that was asked comes back: resolvers check it against spoofing.
    check(
        "CATalog.shop.SVC.mesh.internal.",
        A,
        "NoError aa; CATalog.shop.SVC.mesh.internal. 30 A 240.240.0.1",
    );
    for kind in [ANY, HTTPS, SVCB, MX, TXT, SRV, SOA] {
        check(full, kind, NODATA);
    }
    check("teller.bank.svc.mesh.internal.", AAAA, NODATA);
    check("empty.shop.svc.mesh.internal.", A, NODATA);
    check("nobody.shop.svc.mesh.internal.", A, NXDOMAIN);
    check("x.catalog.shop.svc.mesh.internal.", A, NXDOMAIN);
    // Names lie below these.
    for above in ["mesh.internal.", "svc.mesh.internal.", "shop.svc.mesh.internal."] {
        check(above, A, NODATA);
    }
    check("xmesh.internal.", A, "forward");
    check("internal.", A, "forward");
    check(".", A, "forward");
    check("www.example.net.", A, "forward");

    // External names are ours for their addresses only.
    check(
        "deb.example.org.",
        A,
        "NoError aa; deb.example.org. 30 A 240.240.0.5",
    );
    check("deb.example.org.", AAAA, "NoError aa; soa of deb.example.org. 5");
    check("deb.example.org.", HTTPS, "NoError aa; soa of deb.example.org. 5");
    check("deb.example.org.", MX, "forward");
    check(
        "a.wild.example.org.",
        A,
        "NoError aa; a.wild.example.org. 30 A 240.240.0.6",
    );
    check(
        "a.b.wild.example.org.",
        A,
        "NoError aa; a.b.wild.example.org. 30 A 240.240.0.6",
    );
    check(
        "a.deep.wild.example.org.",
        A,
        "NoError aa; a.deep.wild.example.org. 30 A 240.240.0.7",
    );
    check("wild.example.org.", A, "forward");

    // Short names.
    check("catalog.", A, "NoError aa; catalog. 30 A 240.240.0.1");
    check("teller.", A, "forward");
    check("teller.bank.", A, "NoError aa; teller.bank. 30 A 240.240.0.2");
    check(
        "teller.bank.svc.",
        A,
        "NoError aa; teller.bank.svc. 30 A 240.240.0.2",
    );

    // Names as a search list makes them.
    check(
        "teller.bank.shop.svc.mesh.internal.",
        A,
        "NoError aa; teller.bank.shop.svc.mesh.internal. 30 CNAME teller.bank.svc.mesh.internal.; \
         teller.bank.svc.mesh.internal. 30 A 240.240.0.2",
    );
    check(
        "catalog.shop.svc.mesh.internal.Corp.example.",
        AAAA,
        "NoError aa; catalog.shop.svc.mesh.internal.Corp.example. 30 CNAME catalog.shop.svc.mesh.internal.; \
         catalog.shop.svc.mesh.internal. 30 AAAA 2001:2::1",
    );
    check("nobody.shop.svc.mesh.internal.corp.example.", A, "forward");
    check(
        "a.wild.example.org.corp.example.",
        A,
        "NoError aa; a.wild.example.org.corp.example. 30 A 240.240.0.6",
    );

    // Addresses back to names.
    check(
        "1.0.240.240.in-addr.arpa.",
        PTR,
        "NoError aa; 1.0.240.240.in-addr.arpa. 30 PTR catalog.shop.svc.mesh.internal.",
    );
    check(
        "9.0.240.240.in-addr.arpa.",
        PTR,
        "NXDomain aa; soa of 0.240.240.in-addr.arpa. 5",
    );
    let v6 = format!("1.{}2.0.0.0.1.0.0.2.ip6.arpa.", "0.".repeat(23));
    check(
        &v6,
        PTR,
        &format!("NoError aa; {v6} 30 PTR catalog.shop.svc.mesh.internal."),
    );
    check("1.0.0.10.in-addr.arpa.", PTR, "forward");
    check("0.240.240.in-addr.arpa.", PTR, "forward");
    check(full, PTR, NODATA);
}

#[test]
fn headless_addresses_are_short_lived_and_shuffled() {
    let message = query("db.shop.svc.mesh.internal.", RecordType::A);
    let texts: Vec<String> = (0..16)
        .map(
            |seed| match answer(&message.to_vec().unwrap(), &Mesh::new(), &client(true), seed) {
                Answer::Reply(bytes) => Message::from_vec(&bytes).unwrap().answers[0].to_string(),
                other @ (Answer::Forward | Answer::Drop) => panic!("{other:?}"),
            },
        )
        .collect();
    for first in ["5 IN A 240.240.0.3", "5 IN A 240.240.0.4"] {
        assert!(
            texts.iter().any(|text| text.ends_with(first)),
            "{first}: {texts:?}"
        );
    }
}

#[test]
fn hidden_families_are_empty_answers() {
    let message = query("catalog.shop.svc.mesh.internal.", RecordType::AAAA)
        .to_vec()
        .unwrap();
    let only_v4 = OnlyFamilies {
        names: Mesh::new(),
        v4: true,
        v6: false,
    };
    let Answer::Reply(bytes) = answer(&message, &only_v4, &client(true), 0) else {
        panic!()
    };
    let reply = Message::from_vec(&bytes).unwrap();
    assert!(reply.answers.is_empty() && reply.metadata.response_code == ResponseCode::NoError);
}

#[test]
fn sizes() {
    let ask_with = |payload: Option<u16>, udp| {
        let mut message = query("many.shop.svc.mesh.internal.", RecordType::A);
        if let Some(payload) = payload {
            // Edns::set_max_payload would raise it itself, so the bytes are patched below.
            message.set_edns(Edns::new());
            let mut bytes = message.to_vec().unwrap();
            let class = bytes.len() - 8;
            bytes[class..class + 2].copy_from_slice(&payload.to_be_bytes());
            return answer(&bytes, &Mesh::new(), &client(udp), 0);
        }
        answer(&message.to_vec().unwrap(), &Mesh::new(), &client(udp), 0)
    };
    // (client's payload, UDP, bytes at most, addresses, truncated, payload echoed)
    for (payload, udp, limit, addresses, truncated, echoed) in [
        (None, true, 512, 29, true, None),
        (Some(0), true, 512, 28, true, Some(512)),
        (Some(600), true, 600, 34, true, Some(600)),
        (Some(65_535), true, 1232, 73, true, Some(65_535)),
        (None, false, 65_535, 100, false, None),
        (Some(512), false, 65_535, 100, false, Some(512)),
    ] {
        let Answer::Reply(bytes) = ask_with(payload, udp) else {
            panic!("{payload:?}")
        };
        let reply = Message::from_vec(&bytes).unwrap();
        assert!(bytes.len() <= limit, "{payload:?}: {} bytes", bytes.len());
        assert_eq!(reply.answers.len(), addresses, "{payload:?} {udp}");
        assert_eq!(reply.metadata.truncation, truncated, "{payload:?} {udp}");
        assert_eq!(
            reply.edns.as_ref().map(Edns::max_payload),
            echoed,
            "{payload:?} {udp}"
        );
    }
}

#[test]
fn what_is_no_plain_query() {
    let of = |change: &mut dyn FnMut(&mut Message)| {
        let mut message = query("catalog.shop.svc.mesh.internal.", RecordType::A);
        change(&mut message);
        ask(&message, true)
    };
    assert_eq!(
        of(&mut |m| m.metadata.message_type = MessageType::Response),
        "drop"
    );
    for code in [OpCode::Status, OpCode::Notify, OpCode::Update, OpCode::Unknown(6)] {
        assert_eq!(of(&mut |m| m.metadata.op_code = code), "NotImp", "{code}");
    }
    assert_eq!(of(&mut |m| m.queries.clear()), "FormErr");
    assert_eq!(of(&mut |m| m.queries.push(m.queries[0].clone())), "FormErr");
    assert_eq!(
        of(&mut |m| _ = m.queries[0].set_query_class(DNSClass::CH)),
        "Refused"
    );
    let newer = |m: &mut Message| {
        let mut edns = Edns::new();
        edns.set_version(1);
        m.set_edns(edns);
    };
    assert_eq!(of(&mut |m| newer(m)), "BADSIG", "16, which is BADVERS too");
    // Only the mesh's own names are judged; the rest is for the host's servers.
    let mut other = query("version.bind.", RecordType::TXT);
    other.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(ask(&other, true), "forward");
}

#[test]
fn damaged_queries() {
    let bytes = query("catalog.shop.svc.mesh.internal.", RecordType::A)
        .to_vec()
        .unwrap();
    let code = |bytes: &[u8]| match answer(bytes, &Mesh::new(), &client(true), 0) {
        Answer::Reply(reply) => format!("{:?}", Message::from_vec(&reply).unwrap().metadata.response_code),
        other @ (Answer::Forward | Answer::Drop) => format!("{other:?}"),
    };
    for length in 0..bytes.len() {
        let expected = if length < 12 { "Drop" } else { "FormErr" };
        assert_eq!(code(&bytes[..length]), expected, "{length} bytes");
    }
    // A second additional record that is not there.
    let mut more = bytes.clone();
    more[11] = 1;
    assert_eq!(code(&more), "FormErr");
    // A name that points at itself.
    let mut looped = bytes[..12].to_vec();
    looped.extend([0xc0, 12, 0, 1, 0, 1]);
    assert_eq!(code(&looped), "FormErr");
    // A dot within a label does not make a mesh name.
    let mut dotted = bytes[..12].to_vec();
    dotted.extend(b"\x1ecatalog.shop.svc.mesh.internal\0\0\x01\0\x01");
    assert_eq!(code(&dotted), "Forward");
    assert_eq!(code(b""), "Drop");
}

#[test]
fn servfail_repeats_the_question() {
    let message = query("www.example.net.", RecordType::A);
    let reply = Message::from_vec(&servfail(&message.to_vec().unwrap()).unwrap()).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!((reply.metadata.id, &reply.queries), (0x1234, &message.queries));
    assert!(!reply.metadata.authoritative && reply.metadata.recursion_available);
    assert_eq!(servfail(b"\0\x01\x01\0"), None);
    assert_eq!(servfail(&reply.to_vec().unwrap()), None);
    assert!(servfail(&message.to_vec().unwrap()[..14]).is_some());
}

/// A reply to anything: shorter than the limit, readable, with the id and question that were asked.
fn replies_are_sound(bytes: &[u8], udp: bool, seed: u64) {
    let _ = servfail(bytes);
    let Answer::Reply(reply) = answer(bytes, &Mesh::new(), &client(udp), seed) else {
        return;
    };
    let reply_message = Message::from_vec(&reply).expect("our replies can be read");
    assert!(!udp || reply.len() <= usize::from(UDP_BYTES_MAX));
    assert_eq!(reply_message.metadata.message_type, MessageType::Response);
    assert_eq!(reply[..2], bytes[..2]);
    if let Some(question) = reply_message.queries.first() {
        let asked = Message::from_vec(bytes).expect("a question is repeated only if it could be read");
        assert!(question.name().eq_case(asked.queries[0].name()));
    }
    assert_eq!(
        answer(bytes, &Mesh::new(), &client(udp), seed),
        Answer::Reply(reply)
    );
}

#[test]
fn corpus() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/dns_query");
    let mut files = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        replies_are_sound(&bytes, true, 1);
        replies_are_sound(&bytes, false, 1);
        files += 1;
    }
    assert!(files > 10, "{files} files");
}

proptest! {
    #[test]
    fn garbage(bytes in prop::collection::vec(any::<u8>(), 0..600), udp: bool, seed: u64) {
        replies_are_sound(&bytes, udp, seed);
    }

    /// A valid query with bytes changed and cut gets much deeper than garbage.
    #[test]
    fn damaged(
        name in prop::sample::select(vec!["catalog.shop.svc.mesh.internal.", "many.", "1.0.240.240.in-addr.arpa."]),
        kind in prop::sample::select(vec![RecordType::A, RecordType::AAAA, RecordType::PTR, RecordType::ANY]),
        edns: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        keep in any::<prop::sample::Index>(),
        cut: bool,
        udp: bool,
    ) {
        let mut message = query(name, kind);
        if edns {
            message.set_edns(Edns::new());
        }
        let mut bytes = message.to_vec().unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        replies_are_sound(&bytes, udp, 0);
    }

    #[test]
    fn shuffling_keeps_everything(length in 0..50usize, seed: u64) {
        let mut items: Vec<usize> = (0..length).collect();
        shuffle(&mut items, seed);
        items.sort_unstable();
        prop_assert_eq!(items, (0..length).collect::<Vec<_>>());
    }
}
