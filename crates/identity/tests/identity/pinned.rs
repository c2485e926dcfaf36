//! The first contact: a pin and a name against everybody who might stand in the way.

use crate::{
    pair::{Pair, handshake},
    pki::{CATALOG, DISCOVERY, Leaf, Root, id, now},
};
use rcgen::ExtendedKeyUsagePurpose as Eku;
use rustls::{ServerConfig, server::ResolvesServerCert, sign::CertifiedKey};
use std::sync::Arc;
use time::Duration;
use tombolo_identity::{
    ConnectRefusal, LiveIdentity, PinnedRoots, TrustBundle, WorkloadIdentity, control_server_name,
    discovery_server_config, pinned_client_config,
};
use tombolo_types::Code;

fn connect(pin: [u8; 32], server: ServerConfig) -> (Pair, PinnedRoots) {
    let (client, roots) = pinned_client_config(pin, &id(DISCOVERY)).unwrap();
    assert_eq!((roots.get(), roots.refusal()), (None, None));
    (
        handshake(
            client,
            server,
            control_server_name(&"mesh.example".parse().unwrap()).unwrap(),
        ),
        roots,
    )
}

fn server(root: &Root, identity: WorkloadIdentity) -> ServerConfig {
    let live = LiveIdentity::new(Some(Arc::new(identity)), vec![root.bundle("mesh.example")]);
    discovery_server_config(&live).unwrap()
}

/// The refusal, the same by both ways to it, and nothing learned.
fn refused(pin: [u8; 32], server: ServerConfig) -> ConnectRefusal {
    let (pair, roots) = connect(pin, server);
    assert!(pair.client_error.is_some() && !pair.is_up());
    assert_eq!(roots.get(), None);
    let refusal = roots.refusal().unwrap();
    if let Some(inside) = ConnectRefusal::find(&std::io::Error::other(pair.client_error.unwrap())) {
        assert_eq!(*inside, refusal);
    }
    refusal
}

#[test]
fn discovery_is_let_in() {
    let root = Root::new("r");
    let (pair, roots) = connect(root.pin(), server(&root, root.issue(DISCOVERY)));
    assert!(pair.is_up(), "{:?}", pair.client_error);
    assert_eq!(pair.server.server_name(), Some("discovery.mesh.example"));
    assert_eq!((roots.get(), roots.refusal()), (Some(root.pem()), None));
    // What was learned serves the next connection.
    TrustBundle::from_pem("mesh.example".parse().unwrap(), &roots.get().unwrap()).unwrap();
}

#[test]
fn behind_an_intermediate() {
    let root = Root::new("r");
    let middle = root.intermediate("m");
    let mut leaf = Leaf::new(&[DISCOVERY]);
    leaf.others = vec![middle.der()];
    let (pair, roots) = connect(root.pin(), server(&root, leaf.by(&middle)));
    assert!(pair.is_up(), "{:?}", pair.client_error);
    assert_eq!(roots.get(), Some(root.pem()));
}

#[test]
fn a_token_from_before_a_change_of_roots() {
    let (old, new) = (Root::new("old"), Root::new("new"));
    let mut leaf = Leaf::new(&[DISCOVERY]);
    leaf.others = vec![new.cross_signed_by("new", &old)];
    let both = TrustBundle::from_pem("mesh.example".parse().unwrap(), &(new.pem() + &old.pem())).unwrap();
    let make = || {
        let live = LiveIdentity::new(Some(Arc::new(leaf.by(&new))), vec![Arc::new(both.clone())]);
        discovery_server_config(&live).unwrap()
    };
    for pinned in [&old, &new] {
        let (pair, roots) = connect(pinned.pin(), make());
        assert!(pair.is_up(), "{:?}", pair.client_error);
        assert_eq!(
            roots.get(),
            Some(pinned.pem()),
            "the self-signed form of what was pinned"
        );
    }
    // Only the cross-signed form of the pinned key is there: it serves as well.
    let only_cross = LiveIdentity::new(Some(Arc::new(leaf.by(&new))), vec![old.bundle("mesh.example")]);
    let (pair, roots) = connect(new.pin(), discovery_server_config(&only_cross).unwrap());
    assert!(pair.is_up(), "{:?}", pair.client_error);
    assert!(roots.get().is_some());
}

#[test]
fn another_mesh() {
    let (root, other) = (Root::new("r"), Root::new("r"));
    let refusal = refused(other.pin(), server(&root, root.issue(DISCOVERY)));
    assert_eq!(
        (&refusal, refusal.code()),
        (&ConnectRefusal::PinMismatch, Code::PinMismatch)
    );
}

#[test]
fn the_pinned_root_beside_a_certificate_of_another() {
    // Same name for both roots, so that it is the signature that gives it away; and another name.
    for name in ["r", "x"] {
        let (root, thief) = (Root::new("r"), Root::new(name));
        let mut leaf = Leaf::new(&[DISCOVERY]);
        leaf.others = vec![root.der(), thief.der()];
        assert_eq!(
            refused(root.pin(), server(&thief, leaf.by(&thief))),
            ConnectRefusal::PinMismatch
        );
    }
}

#[test]
fn an_enrolled_vm_that_poses_as_discovery() {
    let root = Root::new("r");
    let refusal = refused(root.pin(), server(&root, root.issue(CATALOG)));
    assert_eq!(
        refusal,
        ConnectRefusal::NotDiscovery {
            seen: vec![CATALOG.to_owned()]
        }
    );
    assert_eq!(refusal.code(), Code::NotDiscovery);
    assert!(refusal.to_string().contains(CATALOG));
    // Discovery's id beside another one is not exactly discovery.
    for ids in [[DISCOVERY, CATALOG], [CATALOG, DISCOVERY]] {
        let refusal = refused(root.pin(), server(&root, Leaf::new(&ids).by(&root)));
        assert!(
            matches!(refusal, ConnectRefusal::NotDiscovery { .. }),
            "{refusal:?}"
        );
    }
    // Nor is discovery of another trust domain.
    let foreign = "spiffe://other.example/ns/tombolo-system/sa/discovery";
    let mut leaf = Leaf::new(&[foreign]);
    leaf.others = vec![root.der()];
    let refusal = refused(root.pin(), server(&root, leaf.by(&root)));
    assert!(
        matches!(refusal, ConnectRefusal::NotDiscovery { .. }),
        "{refusal:?}"
    );
}

#[test]
fn a_certificate_for_clients() {
    let root = Root::new("r");
    let mut leaf = Leaf::new(&[DISCOVERY]);
    leaf.ekus = vec![Eku::ClientAuth];
    let refusal = refused(root.pin(), server(&root, leaf.by(&root)));
    assert!(
        matches!(refusal, ConnectRefusal::NotDiscovery { .. }),
        "{refusal:?}"
    );
}

#[test]
fn clocks_that_differ() {
    let root = Root::new("r");
    let mut leaf = Leaf::new(&[DISCOVERY]);
    (leaf.from, leaf.to) = (Duration::hours(-30), Duration::hours(-6));
    let refusal = refused(root.pin(), server(&root, leaf.by(&root)));
    let ConnectRefusal::Expired {
        server_not_after,
        now: ours,
    } = refusal
    else {
        panic!("{refusal:?}")
    };
    assert!(ours.abs_diff(now()) < 5 && (ours - server_not_after).abs_diff(6 * 3600) < 5);
    assert_eq!(refusal.code(), Code::ClockSkew);
    (leaf.from, leaf.to) = (Duration::hours(6), Duration::hours(30));
    let refusal = refused(root.pin(), server(&root, leaf.by(&root)));
    let ConnectRefusal::NotYetValid {
        server_not_before,
        now: ours,
    } = refusal
    else {
        panic!("{refusal:?}")
    };
    assert!((server_not_before - ours).abs_diff(6 * 3600) < 5);
    assert_eq!(refusal.code(), Code::ClockSkew);
}

#[derive(Debug)]
struct Copied(Arc<CertifiedKey>);

impl ResolvesServerCert for Copied {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

#[test]
fn copies_of_discoverys_certificates() {
    let root = Root::new("r");
    // What anybody sees on port 15012, with a key of the thief's.
    let mut chain = tombolo_identity::certificates_from_pem(&root.issue(DISCOVERY).chain_pem()).unwrap();
    chain.push(root.der());
    let key: rustls_pki_types::PrivateKeyDer<'_> =
        rustls_pki_types::pem::PemObject::from_pem_slice(root.issue(CATALOG).key_pem().as_bytes()).unwrap();
    let key = tombolo_identity::provider()
        .key_provider
        .load_private_key(key)
        .unwrap();
    let mut config = server(&root, root.issue(DISCOVERY));
    config.cert_resolver = Arc::new(Copied(Arc::new(CertifiedKey::new(chain, key))));
    let refusal = refused(root.pin(), config);
    assert_eq!(
        refusal,
        ConnectRefusal::PinMismatch,
        "and no root was learned from it"
    );
}

#[test]
fn one_configuration_many_connections() {
    let root = Root::new("r");
    let (client, roots) = pinned_client_config(root.pin(), &id(DISCOVERY)).unwrap();
    let connect = |uri| {
        let name = control_server_name(&"mesh.example".parse().unwrap()).unwrap();
        handshake(client.clone(), server(&root, root.issue(uri)), name).is_up()
    };
    assert!(connect(DISCOVERY) && roots.get().is_some());
    assert!(!connect(CATALOG) && roots.get().is_none() && roots.refusal().is_some());
    assert!(connect(DISCOVERY) && roots.get().is_some() && roots.refusal().is_none());
}
