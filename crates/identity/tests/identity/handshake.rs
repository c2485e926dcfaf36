//! Who is let in by whom.

use crate::{
    pair::{Pair, handshake},
    pki::{CATALOG, DISCOVERY, FOREIGN, Leaf, Root, WEBAPP, id, now},
};
use rcgen::ExtendedKeyUsagePurpose as Eku;
use rustls::{
    AlertDescription, CertificateError, CipherSuite, Error, HandshakeKind, NamedGroup, ProtocolVersion,
};
use std::{io::Write as _, sync::Arc};
use time::Duration;
use tombolo_identity::{
    LiveIdentity, PeerRefusal, WorkloadIdentity, client_exporter, control_client_config, control_server_name,
    discovery_server_config, hbone_client_config, hbone_server_config, hbone_server_name, peer_of, serial,
    server_exporter, still_trusted,
};
use tombolo_types::DeviceId;

/// HBONE from one identity to another, the client expecting `expected`.
fn hbone(client: &Arc<LiveIdentity>, server: &Arc<LiveIdentity>, expected: &[&str]) -> Pair {
    let expected = expected.iter().map(|text| id(text)).collect();
    handshake(
        hbone_client_config(client, expected).unwrap(),
        hbone_server_config(server).unwrap(),
        hbone_server_name(),
    )
}

fn live(root: &Root, identity: WorkloadIdentity) -> Arc<LiveIdentity> {
    LiveIdentity::new(Some(Arc::new(identity)), vec![root.bundle("mesh.example")])
}

fn certificate_error(error: Option<&Error>) -> &CertificateError {
    match error {
        Some(Error::InvalidCertificate(error)) => error,
        other => panic!("not a certificate error: {other:?}"),
    }
}

#[test]
fn the_right_identities_meet() {
    let root = Root::new("r");
    let device = DeviceId(0x8000_0000_0000_0042);
    let mut leaf = Leaf::new(&[WEBAPP]);
    leaf.serial = Some(serial::for_device(device, [7; 11]).to_vec());
    let pair = hbone(
        &live(&root, leaf.by(&root)),
        &root.live(CATALOG),
        &[WEBAPP, CATALOG],
    );
    assert!(pair.is_up(), "{:?} {:?}", pair.client_error, pair.server_error);
    let (client, server) = (&pair.client, &pair.server);
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(
        client.negotiated_key_exchange_group().unwrap().name(),
        NamedGroup::X25519MLKEM768
    );
    assert_eq!(
        client.negotiated_cipher_suite().unwrap().suite(),
        CipherSuite::TLS13_AES_128_GCM_SHA256
    );
    assert_eq!(
        (client.alpn_protocol(), server.alpn_protocol()),
        (Some(&b"h2"[..]), Some(&b"h2"[..]))
    );
    assert_eq!(server.server_name(), None, "HBONE sends no server name");

    let seen = peer_of(server.peer_certificates().unwrap()).unwrap();
    assert_eq!((seen.id, seen.device), (id(WEBAPP), Some(device)));
    assert!(seen.not_after > now() && seen.not_after <= now() + 3600);
    assert_eq!(seen.serial, serial::for_device(device, [7; 11]));
    assert_eq!(
        peer_of(client.peer_certificates().unwrap()).unwrap().id,
        id(CATALOG)
    );

    let bound = client_exporter(client).unwrap();
    assert_eq!(bound, server_exporter(server).unwrap());
    let other = hbone(&root.live(WEBAPP), &root.live(CATALOG), &[CATALOG]);
    assert_ne!(
        bound,
        client_exporter(&other.client).unwrap(),
        "bound to one connection"
    );
}

#[test]
fn nothing_is_resumed() {
    let root = Root::new("r");
    let (client, server) = (root.live(WEBAPP), root.live(CATALOG));
    let (client, server) = (
        hbone_client_config(&client, vec![id(CATALOG)]).unwrap(),
        hbone_server_config(&server).unwrap(),
    );
    for _ in 0..3 {
        let mut pair = handshake(client.clone(), server.clone(), hbone_server_name());
        assert!(pair.is_up());
        assert_eq!(pair.client.handshake_kind(), Some(HandshakeKind::Full));
        // Tickets would come with the server's first data.
        pair.server.writer().write_all(b"hello").unwrap();
        let mut bytes = Vec::new();
        pair.server.write_tls(&mut bytes).unwrap();
        pair.client.read_tls(&mut bytes.as_slice()).unwrap();
        pair.client.process_new_packets().unwrap();
        assert_eq!(pair.client.tls13_tickets_received(), 0);
    }
}

#[test]
fn a_client_lets_in_only_whom_it_expects() {
    let root = Root::new("r");
    let pair = hbone(&root.live(WEBAPP), &root.live(CATALOG), &[WEBAPP]);
    let error = pair.client_error.as_ref().unwrap();
    let refusal = PeerRefusal::WrongIdentity {
        expected: vec![id(WEBAPP)],
        seen: vec![id(CATALOG)],
    };
    assert_eq!(PeerRefusal::find(error), Some(&refusal));
    assert_eq!(refusal.to_string(), format!("it is {CATALOG}, expected {WEBAPP}"));
    assert_eq!(
        pair.server_error,
        Some(Error::AlertReceived(AlertDescription::CertificateUnknown))
    );
    // Nobody expected is nobody let in.
    let pair = hbone(&root.live(WEBAPP), &root.live(CATALOG), &[]);
    assert!(matches!(
        PeerRefusal::find(&pair.client_error.unwrap()),
        Some(PeerRefusal::WrongIdentity { .. })
    ));
    // Same namespace and account elsewhere is somebody else.
    let pair = hbone(&root.live(WEBAPP), &root.live(CATALOG), &[FOREIGN]);
    assert!(matches!(
        PeerRefusal::find(&pair.client_error.unwrap()),
        Some(PeerRefusal::WrongIdentity { .. })
    ));
}

#[test]
fn trust_domains() {
    let (ours, theirs) = (Root::new("ours"), Root::new("theirs"));
    let stranger = LiveIdentity::new(
        Some(Arc::new(theirs.issue(FOREIGN))),
        vec![theirs.bundle("other.example"), ours.bundle("mesh.example")],
    );
    let server = ours.live(CATALOG);
    let refused = |pair: &Pair| PeerRefusal::find(pair.server_error.as_ref().unwrap()).cloned();
    let pair = hbone(&stranger, &server, &[CATALOG]);
    assert_eq!(
        refused(&pair),
        Some(PeerRefusal::UnknownTrustDomain { seen: id(FOREIGN) })
    );
    // With their bundle they are let in.
    server.set_bundles(vec![ours.bundle("mesh.example"), theirs.bundle("other.example")]);
    let pair = hbone(&stranger, &server, &[CATALOG]);
    assert!(pair.is_up());
    assert_eq!(
        peer_of(pair.server.peer_certificates().unwrap()).unwrap().id,
        id(FOREIGN)
    );
    // But their root makes none of ours, nor ours one of theirs.
    for (root, uri) in [(&theirs, WEBAPP), (&ours, FOREIGN)] {
        let pair = hbone(&live(&ours, root.issue(uri)), &server, &[CATALOG]);
        assert_eq!(
            certificate_error(pair.server_error.as_ref()),
            &CertificateError::UnknownIssuer,
            "{uri}"
        );
        let pair = hbone(&server, &live(&ours, root.issue(uri)), &[uri]);
        assert_eq!(
            certificate_error(pair.client_error.as_ref()),
            &CertificateError::UnknownIssuer,
            "{uri}"
        );
    }
}

#[test]
fn several_identities_in_one_certificate() {
    let (ours, theirs) = (Root::new("ours"), Root::new("theirs"));
    let bundles = || vec![ours.bundle("mesh.example"), theirs.bundle("other.example")];
    let several = Leaf::new(&["https://x.example/", "spiffe://mesh.example/odd", CATALOG, WEBAPP]).by(&ours);
    let server = live(&ours, several);
    for expected in [CATALOG, WEBAPP] {
        let pair = hbone(&ours.live(WEBAPP), &server, &[expected]);
        assert!(pair.is_up());
        let peer = peer_of(pair.client.peer_certificates().unwrap()).unwrap();
        assert_eq!((peer.id, peer.ids), (id(CATALOG), vec![id(CATALOG), id(WEBAPP)]));
    }
    // A second identity of a foreign trust domain does not borrow the first one's root.
    let both = LiveIdentity::new(
        Some(Arc::new(Leaf::new(&[CATALOG, FOREIGN]).by(&ours))),
        bundles(),
    );
    let client = LiveIdentity::new(Some(Arc::new(ours.issue(WEBAPP))), bundles());
    assert!(hbone(&client, &both, &[CATALOG]).is_up());
    let pair = hbone(&client, &both, &[FOREIGN]);
    assert_eq!(
        certificate_error(pair.client_error.as_ref()),
        &CertificateError::UnknownIssuer
    );
    // One that may be either is let in by the one that is vouched for.
    assert!(hbone(&client, &both, &[FOREIGN, CATALOG]).is_up());
}

#[test]
fn no_identity() {
    let root = Root::new("r");
    let (chain, key) = Leaf::new(&["spiffe://mesh.example/operator/ann"]).pems(&root);
    assert!(
        WorkloadIdentity::from_pem(&chain, &key).is_err(),
        "we present no such certificate ourselves"
    );
    let mut config = hbone_client_config(&root.live(WEBAPP), vec![id(CATALOG)]).unwrap();
    let chain = tombolo_identity::certificates_from_pem(&chain).unwrap();
    let key = rustls_pki_types::pem::PemObject::from_pem_slice(key.as_bytes()).unwrap();
    config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(
        rustls::sign::CertifiedKey::from_der(chain, key, &tombolo_identity::provider()).unwrap(),
    ));
    let pair = handshake(
        config,
        hbone_server_config(&root.live(CATALOG)).unwrap(),
        hbone_server_name(),
    );
    assert_eq!(
        PeerRefusal::find(pair.server_error.as_ref().unwrap()),
        Some(&PeerRefusal::NoIdentity)
    );
}

#[test]
fn time() {
    let root = Root::new("r");
    let check =
        |from: Duration, to: Duration, wanted: fn(&CertificateError) -> bool, alert: AlertDescription| {
            let bad = || {
                let mut leaf = Leaf::new(&[CATALOG]);
                (leaf.from, leaf.to) = (from, to);
                live(&root, leaf.by(&root))
            };
            let pair = hbone(&root.live(WEBAPP), &bad(), &[CATALOG]);
            assert!(
                wanted(certificate_error(pair.client_error.as_ref())),
                "{:?}",
                pair.client_error
            );
            assert_eq!(pair.server_error, Some(Error::AlertReceived(alert)));
            let pair = hbone(&bad(), &root.live(WEBAPP), &[WEBAPP]);
            assert!(
                wanted(certificate_error(pair.server_error.as_ref())),
                "{:?}",
                pair.server_error
            );
            assert_eq!(pair.client_error, Some(Error::AlertReceived(alert)));
            // Discovery takes clients without a certificate, but not with such a one.
            let config = control_client_config(&bad(), &id(DISCOVERY), true).unwrap();
            let server = discovery_server_config(&root.live(DISCOVERY)).unwrap();
            let pair = handshake(
                config,
                server,
                control_server_name(&"mesh.example".parse().unwrap()).unwrap(),
            );
            assert!(
                wanted(certificate_error(pair.server_error.as_ref())),
                "{:?}",
                pair.server_error
            );
        };
    let expired = |error: &CertificateError| matches!(error, CertificateError::ExpiredContext { .. });
    let early = |error: &CertificateError| matches!(error, CertificateError::NotValidYetContext { .. });
    check(
        Duration::hours(-2),
        Duration::seconds(-1),
        expired,
        AlertDescription::CertificateExpired,
    );
    check(
        Duration::hours(1),
        Duration::hours(2),
        early,
        AlertDescription::CertificateExpired,
    );
}

#[test]
fn certificates_are_for_what_they_say() {
    let root = Root::new("r");
    let with = |ekus: &[Eku]| {
        let mut leaf = Leaf::new(&[CATALOG]);
        leaf.ekus = ekus.to_vec();
        live(&root, leaf.by(&root))
    };
    let purpose = |error: Option<&Error>| {
        matches!(
            certificate_error(error),
            CertificateError::InvalidPurposeContext { .. }
        )
    };
    for (ekus, as_server, as_client) in [
        (&[Eku::ServerAuth, Eku::ClientAuth][..], true, true),
        (&[Eku::ServerAuth], true, false),
        (&[Eku::ClientAuth], false, true),
        (&[Eku::CodeSigning], false, false),
        (&[], false, false),
    ] {
        let pair = hbone(&root.live(WEBAPP), &with(ekus), &[CATALOG]);
        assert_eq!(pair.is_up(), as_server, "{ekus:?}");
        assert!(as_server || purpose(pair.client_error.as_ref()), "{ekus:?}");
        let pair = hbone(&with(ekus), &root.live(WEBAPP), &[WEBAPP]);
        assert_eq!(pair.is_up(), as_client, "{ekus:?}");
        assert!(as_client || purpose(pair.server_error.as_ref()), "{ekus:?}");
    }
}

#[test]
fn a_ca_certificate_is_nobody() {
    let root = Root::new("r");
    let (_, key) = Leaf::new(&[CATALOG]).pems(&root);
    assert!(WorkloadIdentity::from_pem(&root.pem(), &key).is_err());
}

#[test]
fn a_client_without_certificate() {
    let root = Root::new("r");
    let nobody = LiveIdentity::new(None, vec![root.bundle("mesh.example")]);
    let pair = hbone(&nobody, &root.live(CATALOG), &[CATALOG]);
    assert_eq!(pair.server_error, Some(Error::NoCertificatesPresented));
    assert_eq!(
        pair.client_error,
        Some(Error::AlertReceived(AlertDescription::CertificateRequired))
    );
    // Discovery hears it, and has no peer.
    let name = || control_server_name(&"mesh.example".parse().unwrap()).unwrap();
    let server = || discovery_server_config(&root.live(DISCOVERY)).unwrap();
    for (client, present) in [(&nobody, true), (&root.live(WEBAPP), false)] {
        let config = control_client_config(client, &id(DISCOVERY), present).unwrap();
        let pair = handshake(config, server(), name());
        assert!(pair.is_up(), "{:?} {:?}", pair.client_error, pair.server_error);
        assert!(pair.server.peer_certificates().is_none());
        assert_eq!(pair.server.server_name(), Some("discovery.mesh.example"));
    }
    let config = control_client_config(&root.live(WEBAPP), &id(DISCOVERY), true).unwrap();
    let pair = handshake(config, server(), name());
    assert_eq!(
        peer_of(pair.server.peer_certificates().unwrap()).unwrap().id,
        id(WEBAPP)
    );
    // A server without a certificate of its own answers nobody.
    let pair = hbone(&root.live(WEBAPP), &nobody, &[CATALOG]);
    assert!(pair.server_error.is_some() && pair.client_error.is_some());
}

#[test]
fn a_vm_that_poses_as_discovery() {
    let root = Root::new("r");
    let config = control_client_config(&root.live(WEBAPP), &id(DISCOVERY), true).unwrap();
    let server = discovery_server_config(&root.live(CATALOG)).unwrap();
    let pair = handshake(
        config,
        server,
        control_server_name(&"mesh.example".parse().unwrap()).unwrap(),
    );
    let refusal = PeerRefusal::find(pair.client_error.as_ref().unwrap());
    assert!(
        matches!(refusal, Some(PeerRefusal::WrongIdentity { seen, .. }) if *seen == [id(CATALOG)]),
        "{refusal:?}"
    );
    assert!(
        pair.server.peer_certificates().is_none(),
        "it learned nothing of who called"
    );
}

#[test]
fn intermediates() {
    let root = Root::new("root");
    let middle = root.intermediate("middle");
    let lower = middle.intermediate("lower");
    let mut leaf = Leaf::new(&[CATALOG]);
    // In any order, and with the root among them.
    leaf.others = vec![middle.der(), root.der(), lower.der()];
    let server = live(&root, leaf.by(&lower));
    let pair = hbone(&root.live(WEBAPP), &server, &[CATALOG]);
    assert!(pair.is_up(), "{:?}", pair.client_error);
    assert!(
        !pair.client.peer_certificates().unwrap().contains(&root.der()),
        "the root is not sent in HBONE"
    );
    assert!(hbone(&server, &root.live(WEBAPP), &[WEBAPP]).is_up());
    leaf.others = vec![middle.der()];
    let pair = hbone(&root.live(WEBAPP), &live(&root, leaf.by(&lower)), &[CATALOG]);
    assert_eq!(
        certificate_error(pair.client_error.as_ref()),
        &CertificateError::UnknownIssuer
    );
    // A workload's certificate signs nothing, whatever its holder says.
    let vm = Root(
        rcgen::CertifiedIssuer::signed_by(
            rcgen::CertificateParams::default(),
            rcgen::KeyPair::generate().unwrap(),
            root.issuer(),
        )
        .unwrap(),
    );
    leaf.others = vec![vm.der()];
    let pair = hbone(&root.live(WEBAPP), &live(&root, leaf.by(&vm)), &[CATALOG]);
    assert!(pair.client_error.is_some());
}

#[test]
fn a_new_root_signed_by_the_old_one() {
    let (old, new) = (Root::new("old"), Root::new("new"));
    let mut leaf = Leaf::new(&[CATALOG]);
    leaf.others = vec![new.cross_signed_by("new", &old), new.der()];
    let moved = LiveIdentity::new(
        Some(Arc::new(leaf.by(&new))),
        vec![Arc::new(
            tombolo_identity::TrustBundle::from_pem(
                "mesh.example".parse().unwrap(),
                &(new.pem() + &old.pem()),
            )
            .unwrap(),
        )],
    );
    // Was away and holds only the old root; its certificate is the old root's too.
    let away = old.live(WEBAPP);
    assert!(hbone(&away, &moved, &[CATALOG]).is_up());
    assert!(hbone(&moved, &away, &[WEBAPP]).is_up());
    // Knows only the new one.
    assert!(hbone(&new.live(WEBAPP), &moved, &[CATALOG]).is_up());
    // Without the old root's signature it would not do.
    let pair = hbone(&away, &new.live(CATALOG), &[CATALOG]);
    assert_eq!(
        certificate_error(pair.client_error.as_ref()),
        &CertificateError::UnknownIssuer
    );
}

#[test]
fn a_root_that_is_taken_away() {
    let (root, other) = (Root::new("r"), Root::new("o"));
    let server = root.live(CATALOG);
    let pair = hbone(&root.live(WEBAPP), &server, &[CATALOG]);
    let chain = peer_of(pair.server.peer_certificates().unwrap()).unwrap().chain;
    assert!(still_trusted(&server.current(), &chain, now()));
    server.set_bundles(vec![other.bundle("mesh.example")]);
    assert!(!still_trusted(&server.current(), &chain, now()));
    let pair = hbone(&root.live(WEBAPP), &server, &[CATALOG]);
    assert_eq!(
        certificate_error(pair.server_error.as_ref()),
        &CertificateError::UnknownIssuer
    );
    assert_eq!(
        pair.client_error,
        Some(Error::AlertReceived(AlertDescription::UnknownCA))
    );
    server.set_bundles(vec![root.bundle("other.example")]);
    assert!(
        !still_trusted(&server.current(), &chain, now()),
        "right root, wrong trust domain"
    );
    server.set_bundles(vec![other.bundle("mesh.example"), root.bundle("other.example")]);
    assert!(!still_trusted(&server.current(), &[], now()));
    // A connection outlives its certificate; that alone is no reason to cut it.
    server.set_bundles(vec![root.bundle("mesh.example")]);
    assert!(still_trusted(&server.current(), &chain, now() + 100 * 86_400));
}

#[test]
fn what_clients_offer() {
    let root = Root::new("r");
    let server = || hbone_server_config(&root.live(CATALOG)).unwrap();
    let client = || hbone_client_config(&root.live(WEBAPP), vec![id(CATALOG)]).unwrap();
    let mut none = client();
    none.alpn_protocols.clear();
    let pair = handshake(none, server(), hbone_server_name());
    assert!(pair.is_up());
    assert_eq!(pair.server.alpn_protocol(), None);
    let mut http1 = client();
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    let pair = handshake(http1, server(), hbone_server_name());
    assert_eq!(pair.server_error, Some(Error::NoApplicationProtocol));
    assert_eq!(
        pair.client_error,
        Some(Error::AlertReceived(AlertDescription::NoApplicationProtocol))
    );
    let mut both = client();
    both.alpn_protocols = vec![b"http/1.1".to_vec(), b"h2".to_vec()];
    assert_eq!(
        handshake(both, server(), hbone_server_name())
            .server
            .alpn_protocol(),
        Some(&b"h2"[..])
    );
}

#[test]
fn protocol_and_suites() {
    use rustls::crypto::aws_lc_rs as lc;
    let root = Root::new("r");
    let with = |suites: Vec<rustls::SupportedCipherSuite>, version| {
        let ours = hbone_client_config(&root.live(WEBAPP), vec![id(CATALOG)]).unwrap();
        let provider = rustls::crypto::CryptoProvider {
            cipher_suites: suites,
            ..lc::default_provider()
        };
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.der()).unwrap();
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.client_auth_cert_resolver = ours.client_auth_cert_resolver;
        handshake(
            config,
            hbone_server_config(&root.live(CATALOG)).unwrap(),
            hbone_server_name(),
        )
    };
    let suites = lc::ALL_CIPHER_SUITES.to_vec();
    let pair = with(suites, &rustls::version::TLS12);
    assert!(
        matches!(pair.server_error, Some(Error::PeerIncompatible(_))),
        "{:?}",
        pair.server_error
    );
    let pair = with(
        vec![lc::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256],
        &rustls::version::TLS13,
    );
    assert!(
        matches!(pair.server_error, Some(Error::PeerIncompatible(_))),
        "{:?}",
        pair.server_error
    );
    // ztunnel's order: 256 first. The server chooses 128.
    let aes = vec![
        lc::cipher_suite::TLS13_AES_256_GCM_SHA384,
        lc::cipher_suite::TLS13_AES_128_GCM_SHA256,
    ];
    let pair = with(aes, &rustls::version::TLS13);
    let chosen = pair.server.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(chosen, CipherSuite::TLS13_AES_128_GCM_SHA256);
    let pair = with(
        vec![lc::cipher_suite::TLS13_AES_256_GCM_SHA384],
        &rustls::version::TLS13,
    );
    let chosen = pair.server.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(chosen, CipherSuite::TLS13_AES_256_GCM_SHA384);
}
