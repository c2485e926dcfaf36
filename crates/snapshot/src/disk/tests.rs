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
    snapshot
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
