//! Reading what a CA or a disk gives, and what is never shown.

use crate::pki::{CATALOG, Leaf, Root, WEBAPP, id, now, td};
use proptest::prelude::*;
use std::sync::LazyLock;
use time::Duration;
use tombolo_identity::{
    IdentityError, TrustBundle, WorkloadIdentity, generate_csr, hbone_client_config, peer_of, root_pin,
    serial,
};
use tombolo_types::DeviceId;

#[test]
fn an_identity_is_read_back() {
    let root = Root::new("r");
    let mut leaf = Leaf::new(&[CATALOG]);
    leaf.serial = Some(serial::for_device(DeviceId(0x00ab), [9; 11]).to_vec());
    leaf.others = vec![root.der()];
    let identity = leaf.by(&root);
    let again = WorkloadIdentity::from_pem(&identity.chain_pem(), &identity.key_pem()).unwrap();
    assert_eq!((again.id(), again.serial()), (&id(CATALOG), identity.serial()));
    assert_eq!(again.device(), Some(DeviceId(0x00ab)));
    assert_eq!(again.chain(), identity.chain());
    assert_eq!(again.chain().len(), 2, "roots that were in the chain stay in it");
    assert!(again.key_pem().starts_with("-----BEGIN PRIVATE KEY-----"));
    assert_eq!(again.not_after() - again.not_before(), 3720);
    assert!(again.not_before().abs_diff(now() - 120) <= 2);
}

#[test]
fn damaged_or_mixed_up() {
    let root = Root::new("r");
    let (chain, key) = Leaf::new(&[CATALOG]).pems(&root);
    let (_, other_key) = Leaf::new(&[CATALOG]).pems(&root);
    let error = |chain: &str, key: &str| WorkloadIdentity::from_pem(chain, key).unwrap_err();
    assert_eq!(error(&chain, &other_key), IdentityError::KeyMismatch);
    assert!(matches!(error("", &key), IdentityError::Pem { .. }));
    assert!(matches!(error(&chain, ""), IdentityError::Key(_)));
    assert!(matches!(error(&chain, &chain), IdentityError::Key(_)));
    let (nobody, key) = Leaf::new(&["https://mesh.example/"]).pems(&root);
    assert_eq!(error(&nobody, &key), IdentityError::NoIdentity);
}

#[test]
fn an_answer_of_a_ca() {
    let (root, other) = (Root::new("root"), Root::new("other"));
    let middle = root.intermediate("middle");
    let (leaf, key) = Leaf::new(&[CATALOG]).pems(&middle);
    let answer = |parts: &[&str]| {
        let parts: Vec<String> = parts.iter().map(|part| (*part).to_owned()).collect();
        WorkloadIdentity::from_issued(&parts, &key)
    };
    let both = root.pem() + &other.pem();
    let (identity, roots) = answer(&[&leaf, &middle.pem(), &both]).unwrap();
    assert_eq!((identity.id(), identity.chain().len()), (&id(CATALOG), 2));
    assert_eq!(roots, both, "all roots of the last element");
    let error = |parts: &[&str]| answer(parts).unwrap_err();
    assert_eq!(error(&[]), IdentityError::ShortChain(0));
    assert_eq!(error(&[&leaf]), IdentityError::ShortChain(1));
    assert!(
        matches!(error(&[&leaf, &both]), IdentityError::NotVerified { .. }),
        "without the intermediate"
    );
    assert!(matches!(
        error(&[&leaf, &middle.pem(), &other.pem()]),
        IdentityError::NotVerified { .. }
    ));
    assert!(matches!(
        error(&[&leaf, &middle.pem(), ""]),
        IdentityError::Pem { .. }
    ));
}

#[test]
fn bundles() {
    let (a, b) = (Root::new("a"), Root::new("b"));
    let bundle = TrustBundle::from_pem(td("mesh.example"), &(a.pem() + &b.pem() + &a.pem())).unwrap();
    assert_eq!(bundle.roots(), [a.der(), b.der()]);
    assert_eq!(bundle.to_pem(), a.pem() + &b.pem());
    assert!(TrustBundle::from_pem(td("mesh.example"), "# nothing\n").is_err());
    let cross = b.cross_signed_by("b", &a);
    assert_eq!(
        root_pin(&cross).unwrap(),
        b.pin(),
        "a pin is of the key, not of one certificate"
    );
    assert_ne!(a.pin(), b.pin());
    assert!(root_pin(&vec![0x30, 0x03, 1, 2, 3].into()).is_err());
}

#[test]
fn requests() {
    let request = generate_csr(Some(&id(CATALOG))).unwrap();
    let parsed = rcgen::CertificateSigningRequestParams::from_pem(&request.csr_pem).unwrap();
    assert_eq!(
        parsed.params.subject_alt_names,
        [rcgen::SanType::URI(CATALOG.try_into().unwrap())]
    );
    assert_eq!(parsed.params.distinguished_name, rcgen::DistinguishedName::new());
    assert!(request.key_pem.starts_with("-----BEGIN PRIVATE KEY-----\n"));
    let bare = generate_csr(None).unwrap();
    assert!(
        rcgen::CertificateSigningRequestParams::from_pem(&bare.csr_pem)
            .unwrap()
            .params
            .subject_alt_names
            .is_empty()
    );
}

#[test]
fn nothing_shows_a_key() {
    let root = Root::new("r");
    let identity = root.issue(CATALOG);
    let request = generate_csr(Some(&id(WEBAPP))).unwrap();
    let live = root.live(CATALOG);
    let current = live.current();
    let keys = [
        identity.key_pem(),
        request.key_pem.clone(),
        current.identity.as_ref().unwrap().key_pem(),
    ];
    let shown = [
        format!("{identity:?}"),
        format!("{request:?}"),
        format!("{live:?} {current:?}"),
        format!("{:?}", hbone_client_config(&live, vec![id(CATALOG)]).unwrap()),
        format!(
            "{:?}",
            WorkloadIdentity::from_pem(&identity.chain_pem(), &request.key_pem).unwrap_err()
        ),
    ];
    for key in &keys {
        let lines: Vec<&str> = key.lines().filter(|line| !line.starts_with('-')).collect();
        let der = rcgen::KeyPair::from_pem(key).unwrap().serialize_der();
        // The scalar stands 36 bytes into the PKCS#8 of a P-256 key.
        let scalar = &der[36..68];
        let hex: String = scalar.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!("{:?}", &scalar[..6]);
        for text in &shown {
            assert!(lines.iter().all(|line| !text.contains(line)), "{text}");
            assert!(
                !text.contains(&hex[..16]) && !text.contains(list.trim_matches(['[', ']'])),
                "{text}"
            );
        }
    }
}

static LEAF: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
    let root = Root::new("r");
    (root.issue(CATALOG).chain()[0].to_vec(), root.der().to_vec())
});

proptest! {
    #[test]
    fn renewal_is_at_half_life(hours in 1i64..200, jitter in -1.0f64..2.0) {
        static ROOT: LazyLock<Root> = LazyLock::new(|| Root::new("r"));
        let mut leaf = Leaf::new(&[CATALOG]);
        (leaf.from, leaf.to) = (Duration::ZERO, Duration::hours(hours));
        let identity = leaf.by(&ROOT);
        let life = (identity.not_after() - identity.not_before()) as f64;
        let at = (identity.renew_at(jitter) - identity.not_before()) as f64 / life;
        prop_assert!((0.489..=0.511).contains(&at), "{at}");
        prop_assert!(identity.renew_at(0.0) < identity.renew_at(1.0));
        prop_assert_eq!(identity.renew_at(f64::NAN), identity.renew_at(0.5));
    }

    #[test]
    fn damaged_certificates_never_panic(at in 0usize..600, with: u8, cut in 0usize..600) {
        for bytes in [&LEAF.0, &LEAF.1] {
            let mut damaged = bytes.clone();
            if let Some(byte) = damaged.get_mut(at) {
                *byte ^= with;
            }
            damaged.truncate(damaged.len().min(cut.max(1) * 2));
            let damaged: rustls_pki_types::CertificateDer<'_> = damaged.into();
            let _ = peer_of(std::slice::from_ref(&damaged));
            let _ = root_pin(&damaged);
            let current = Root::new("x").live(WEBAPP).current();
            let _ = tombolo_identity::still_trusted(&current, &[damaged], now());
        }
    }
}
