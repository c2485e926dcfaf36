use super::*;
use crate::snapshot::tests::{self, own, view};
use proptest::prelude::*;

fn full() -> Snapshot {
    let mut snapshot = tests::empty();
    let resources = vec![
        tests::workload("a/b", |_| {}),
        tests::service(tests::CATALOG, |_| {}),
    ];
    assert_eq!(snapshot.apply(type_url::ADDRESS, resources, &[]), []);
    let exposure = tombolo_proto::tombolo::v1::Exposure {
        ports: vec![],
        all_ports: true,
    };
    assert_eq!(
        snapshot.apply(
            type_url::EXPOSURE,
            vec![tests::resource("shop/web-1", &exposure)],
            &[]
        ),
        []
    );
    let gateways = tests::networks::network("far", vec![tests::networks::gateway(1)]);
    assert_eq!(
        snapshot.apply(type_url::NETWORK_GATEWAYS, vec![gateways], &[]),
        []
    );
    let exported = tests::networks::exported("shop", "catalog.shop.svc.mesh.internal");
    assert_eq!(
        snapshot.apply(type_url::EXPORTED_SERVICE, vec![exported], &[]),
        []
    );
    snapshot
}

/// As programs wrote it that knew nothing of a type.
fn without(type_url: &str, snapshot: &Snapshot) -> Vec<u8> {
    let mut bare = tests::empty();
    for other in TYPES.into_iter().filter(|other| *other != type_url) {
        snapshot.each_held(other, &mut |name, version, payload| {
            let any = prost_types::Any {
                type_url: other.to_owned(),
                value: payload.to_vec(),
            };
            let resource = xds::Resource {
                name: name.to_owned(),
                version: version.to_owned(),
                resource: Some(any),
                ..xds::Resource::default()
            };
            assert_eq!(bare.apply(other, vec![resource], &[]), []);
        });
    }
    bare.encode()
}

/// A file of a program that knew no gateways is read, and they are asked for anew; one of a program that knows more
/// types than this one is read without them.
#[test]
fn types_come_and_go_with_versions() {
    let older = decode(&without(type_url::NETWORK_GATEWAYS, &full())).unwrap();
    assert!(older.held(type_url::NETWORK_GATEWAYS).is_empty());
    assert_eq!(older.held(type_url::ADDRESS), full().held(type_url::ADDRESS));

    let mut newer = full().encode();
    for part in ["type.googleapis.com/tombolo.v1.Later", "name", "1", "x"] {
        put(&mut newer, part.as_bytes());
    }
    let sum = checksum(&newer[HEADER_BYTES..]);
    newer[12..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
    assert_eq!(view(&decode(&newer).unwrap()), view(&full()));
}

fn decode(bytes: &[u8]) -> Result<Snapshot, SnapshotError> {
    Snapshot::decode(bytes, AddressPlan::default(), own())
}

#[test]
fn round_trip() {
    for snapshot in [tests::empty(), full()] {
        let read = decode(&snapshot.encode()).unwrap();
        assert_eq!(view(&read), view(&snapshot));
        assert_eq!(read.addresses_synced(), snapshot.addresses_synced());
        assert_eq!(read.policies_synced(), snapshot.policies_synced());
        assert_eq!(read.encode(), snapshot.encode());
    }
    assert!(full().addresses_synced() && !full().policies_synced());
    let mut policies = tests::empty();
    policies.apply(type_url::AUTHORIZATION, Vec::new(), &[]);
    assert!(
        decode(&policies.encode()).unwrap().policies_synced(),
        "an empty set counts"
    );
}

#[test]
fn what_is_not_taken() {
    let good = full().encode();
    let error = |bytes: &[u8]| decode(bytes).unwrap_err();
    assert_eq!(error(b""), SnapshotError::NotASnapshot);
    assert_eq!(error(b"{\"some\": \"json\"}"), SnapshotError::NotASnapshot);
    for length in 1..good.len() {
        assert_eq!(error(&good[..length]), SnapshotError::Damaged, "{length} bytes");
    }
    let mut longer = good.clone();
    longer.push(0);
    assert_eq!(error(&longer), SnapshotError::Damaged);
    let mut newer = good.clone();
    newer[8] = 2;
    assert_eq!(error(&newer), SnapshotError::Newer { found: 2, known: 1 });
    let mut older = good.clone();
    older[8] = 0;
    assert_eq!(error(&older), SnapshotError::Damaged);
    let other = Own {
        workload_name: "web-2".into(),
        ..own()
    };
    let foreign = Snapshot::decode(&good, AddressPlan::default(), other).unwrap_err();
    assert!(
        matches!(&foreign, SnapshotError::Foreign(whose) if whose.ends_with("web-1 in mesh.internal")),
        "{foreign}"
    );
}

/// After its trust domain was renamed the workload still reads what it wrote before, if anybody it believes says so.
#[test]
fn a_renamed_owner_reads_its_file() {
    let renamed = || Own {
        trust_domain: "new.example".parse().unwrap(),
        ..own()
    };
    let read = |bytes: &[u8], names: &[TrustDomain]| {
        Snapshot::decode_renamed(bytes, AddressPlan::default(), renamed(), names)
    };
    let before = full();
    assert!(matches!(
        read(&before.encode(), &[]),
        Err(SnapshotError::Foreign(_))
    ));
    // By its registration.
    let again = read(&before.encode(), &[own().trust_domain]).unwrap();
    assert_eq!(again.own(), &renamed());
    assert_eq!(again.held(type_url::ADDRESS), before.held(type_url::ADDRESS));
    // By the bundle in the file itself.
    let mut told = full();
    let bundle = tombolo_proto::tombolo::v1::TrustBundle {
        trust_domain: "new.example".into(),
        roots_pem: "PEM".into(),
        also: vec!["mesh.example".into()],
        former: Vec::new(),
    };
    let bundle = tests::resource("new.example", &bundle);
    assert_eq!(told.apply(type_url::TRUST_BUNDLE, vec![bundle], &[]), []);
    assert_eq!(read(&told.encode(), &[]).unwrap().own(), &renamed());
    // And from then on as the new one.
    told.set_own(renamed());
    assert!(read(&told.encode(), &[]).is_ok());
}

/// A resource that cannot be taken any more is left out and asked for again; the rest is there.
#[test]
fn refused_resources_are_left_out() {
    let vip = tombolo_proto::tombolo::v1::ServiceVip {
        namespace: "shop".into(),
        hostname: "catalog.shop.svc.mesh.internal".into(),
        vips: vec!["240.240.0.9".into()],
    };
    let mut snapshot = full();
    assert_eq!(
        snapshot.apply(
            type_url::SERVICE_VIP,
            vec![tests::resource(tests::CATALOG, &vip)],
            &[]
        ),
        []
    );
    let moved = AddressPlan::from_prefixes(["10.240.0.0/16"]).unwrap();
    let read = Snapshot::decode(&snapshot.encode(), moved, own()).unwrap();
    assert!(read.held(type_url::SERVICE_VIP).is_empty());
    assert_eq!(read.held(type_url::ADDRESS), snapshot.held(type_url::ADDRESS));
}

/// Whatever follows a right checksum is read without panic: the writer may have been another program.
fn any_body_is_survived(body: &[u8]) {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend(checksum(body).to_le_bytes());
    bytes.extend(body);
    let _ = decode(&bytes);
}

proptest! {
    #[test]
    fn one_changed_byte_is_seen(at in any::<prop::sample::Index>(), by in 1..=255u8) {
        let mut bytes = full().encode();
        let at = at.index(bytes.len());
        bytes[at] ^= by;
        prop_assert!(decode(&bytes).is_err(), "byte {}", at);
    }

    #[test]
    fn garbage_bodies(body in prop::collection::vec(any::<u8>(), 0..300)) {
        any_body_is_survived(&body);
    }

    #[test]
    fn damaged_bodies(at in any::<prop::sample::Index>(), to: u8) {
        let mut body = full().encode().split_off(HEADER_BYTES);
        let at = at.index(body.len());
        body[at] = to;
        any_body_is_survived(&body);
    }
}
