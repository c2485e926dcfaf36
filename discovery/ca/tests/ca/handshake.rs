//! Certificates of the authority in real handshakes.

use crate::{
    CATALOG, DEFAULT, DISCOVERY, Made, WEBAPP, id, issue, made, now,
    pair::{Pair, handshake},
    request, td,
};
use rustls::{CertificateError, Error};
use std::{fs, sync::Arc, time::Duration};
use tombolo_ca::Authority;
use tombolo_identity::{
    ConnectRefusal, LiveIdentity, PeerRefusal, control_client_config, control_server_name,
    discovery_server_config, hbone_client_config, hbone_server_config, hbone_server_name, peer_of,
    pinned_client_config,
};
use tombolo_types::DeviceId;

fn live(ca: &Authority, uri: &str, device: Option<DeviceId>) -> Arc<LiveIdentity> {
    LiveIdentity::new(
        Some(Arc::new(issue(ca, uri, device, DEFAULT, now()))),
        vec![Arc::new(ca.bundle())],
    )
}

fn hbone(client: &Arc<LiveIdentity>, server: &Arc<LiveIdentity>, expected: &str) -> Pair {
    let client = hbone_client_config(client, vec![id(expected)]).unwrap();
    handshake(client, hbone_server_config(server).unwrap(), hbone_server_name())
}

fn discovery(made: &Made) -> rustls::ServerConfig {
    let identity = made
        .authority
        .issue_server(&id(DISCOVERY), &[], &[], DEFAULT, now())
        .unwrap();
    let live = LiveIdentity::new(Some(Arc::new(identity)), vec![Arc::new(made.authority.bundle())]);
    discovery_server_config(&live).unwrap()
}

#[test]
fn from_token_to_mutual_tls() {
    let made = made();
    let name = || control_server_name(&td()).unwrap();
    // The pin of the token leads to discovery and to the root.
    let (client, roots) = pinned_client_config(made.authority.root_pin(), &id(DISCOVERY)).unwrap();
    let pair = handshake(client, discovery(&made), name());
    assert!(pair.is_up(), "{:?}", pair.client_error);
    assert_eq!(roots.get().as_deref(), Some(made.authority.roots_pem()));
    // With a certificate the agent comes back as itself, and meets its peers.
    let (a, b) = (
        live(&made.authority, WEBAPP, Some(DeviceId(1))),
        live(&made.authority, CATALOG, Some(DeviceId(u64::MAX))),
    );
    let pair = handshake(
        control_client_config(&a, &id(DISCOVERY), true).unwrap(),
        discovery(&made),
        name(),
    );
    assert_eq!(
        peer_of(pair.server.peer_certificates().unwrap()).unwrap().device,
        Some(DeviceId(1))
    );
    let pair = hbone(&a, &b, CATALOG);
    assert!(pair.is_up(), "{:?}", pair.client_error);
    assert_eq!(
        peer_of(pair.client.peer_certificates().unwrap()).unwrap().device,
        Some(DeviceId(u64::MAX))
    );
}

#[test]
fn refused() {
    let made = made();
    let ca = &made.authority;
    let (a, b) = (live(ca, WEBAPP, None), live(ca, CATALOG, None));
    let error = hbone(&a, &b, WEBAPP).client_error.unwrap();
    assert!(
        matches!(PeerRefusal::find(&error), Some(PeerRefusal::WrongIdentity { .. })),
        "{error}"
    );
    // Three days ago a certificate of one hour was issued.
    let past = now() - Duration::from_secs(3 * 86_400);
    let request = request(WEBAPP);
    let root_began = now() - Duration::from_secs(3500);
    assert!(
        past < root_began,
        "older than the root itself: use one from just after its beginning"
    );
    let issued = ca
        .issue(
            &request.csr_pem,
            &id(WEBAPP),
            None,
            Duration::from_secs(60),
            root_began,
        )
        .unwrap();
    let (old, _) =
        tombolo_identity::WorkloadIdentity::from_issued(&issued.cert_chain, &request.key_pem).unwrap();
    let expired = LiveIdentity::new(Some(Arc::new(old)), vec![Arc::new(ca.bundle())]);
    let is_expired = |error: Option<&Error>| {
        matches!(
            error,
            Some(Error::InvalidCertificate(CertificateError::ExpiredContext { .. }))
        )
    };
    assert!(is_expired(hbone(&expired, &b, CATALOG).server_error.as_ref()));
    assert!(is_expired(hbone(&a, &expired, WEBAPP).client_error.as_ref()));
    // Another authority of the same trust domain.
    let stranger = crate::made();
    let pair = hbone(&live(&stranger.authority, WEBAPP, None), &b, CATALOG);
    assert!(matches!(
        pair.client_error,
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer))
    ));
    let (client, roots) = pinned_client_config(stranger.authority.root_pin(), &id(DISCOVERY)).unwrap();
    assert!(!handshake(client, discovery(&made), control_server_name(&td()).unwrap()).is_up());
    assert_eq!(roots.refusal(), Some(ConnectRefusal::PinMismatch));
}

#[test]
fn a_new_root_in_the_folder_of_the_old_one() {
    use rcgen::{
        BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
        KeyUsagePurpose,
    };
    let old = made();
    let away = live(&old.authority, WEBAPP, None);
    // The new root, self-signed and signed by the old one.
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, "Tombolo root 2");
    params.not_before = time::OffsetDateTime::now_utc() - time::Duration::hours(1);
    params.not_after = time::OffsetDateTime::now_utc() + time::Duration::days(90);
    let key = KeyPair::generate().unwrap();
    let new = params.self_signed(&key).unwrap();
    let read = |name: &str| fs::read_to_string(old.dir.join(name)).unwrap();
    let old_key = KeyPair::from_pem(&read("ca-key.pem")).unwrap();
    let cross = params
        .signed_by(
            &key,
            &Issuer::from_ca_cert_pem(&read("ca-cert.pem"), old_key).unwrap(),
        )
        .unwrap();
    let write = |name: &str, content: String| {
        fs::write(old.dir.join(name), content).unwrap();
    };
    write("extra-roots.pem", read("root-cert.pem"));
    write("ca-key.pem", key.serialize_pem());
    write("ca-cert.pem", new.pem());
    write("root-cert.pem", new.pem());
    write("cert-chain.pem", cross.pem());
    let ca = Authority::open(&old.dir, &td()).unwrap();
    assert_eq!(ca.bundle().roots().len(), 2);
    assert_ne!(ca.root_pin(), old.authority.root_pin());
    let moved = live(&ca, CATALOG, None);
    // One that was away believes only the old root: both ways it works.
    for (client, server, expected) in [(&away, &moved, CATALOG), (&moved, &away, WEBAPP)] {
        let pair = hbone(client, server, expected);
        assert!(pair.is_up(), "{:?} {:?}", pair.client_error, pair.server_error);
    }
    // Tokens of the old pin still find discovery.
    let identity = ca.issue_server(&id(DISCOVERY), &[], &[], DEFAULT, now()).unwrap();
    let server = LiveIdentity::new(Some(Arc::new(identity)), vec![Arc::new(ca.bundle())]);
    for pin in [old.authority.root_pin(), ca.root_pin()] {
        let (client, _) = pinned_client_config(pin, &id(DISCOVERY)).unwrap();
        let pair = handshake(
            client,
            discovery_server_config(&server).unwrap(),
            control_server_name(&td()).unwrap(),
        );
        assert!(pair.is_up(), "{:?}", pair.client_error);
    }
}
