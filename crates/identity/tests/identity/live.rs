//! Certificates and roots exchanged while connections are made.

use crate::{
    pair::handshake,
    pki::{CATALOG, Root, WEBAPP, id},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};
use tombolo_identity::{
    LiveIdentity, TrustBundle, hbone_client_config, hbone_server_config, hbone_server_name, peer_of,
};

#[test]
fn generations() {
    let root = Root::new("r");
    let live = LiveIdentity::new(None, Vec::new());
    let generations = || {
        let current = live.current();
        (current.certificate_generation, current.bundle_generation)
    };
    assert_eq!(generations(), (0, 0));
    assert!(live.current().identity.is_none());
    live.set_identity(Arc::new(root.issue(CATALOG)));
    assert_eq!(generations(), (1, 0));
    live.set_bundles(vec![root.bundle("mesh.example")]);
    assert_eq!(generations(), (1, 1));
    live.set_bundles(vec![root.bundle("mesh.example")]);
    assert_eq!(generations(), (1, 1), "the same roots again");
    let held = live.current();
    live.set_identity(Arc::new(root.issue(CATALOG)));
    assert_eq!(
        (generations(), held.certificate_generation),
        ((2, 1), 1),
        "what is held does not change"
    );
    assert!(live.current().bundle(&"mesh.example".parse().unwrap()).is_some());
    assert!(live.current().bundle(&"other.example".parse().unwrap()).is_none());
}

#[test]
fn a_thousand_handshakes_while_everything_is_exchanged() {
    let (old, new) = (Root::new("old"), Root::new("new"));
    let both = old.pem() + &new.pem();
    let bundle = |pem: &str| {
        vec![Arc::new(
            TrustBundle::from_pem("mesh.example".parse().unwrap(), pem).unwrap(),
        )]
    };
    let make = |uri| LiveIdentity::new(Some(Arc::new(old.issue(uri))), bundle(&both));
    let (client, server) = (make(WEBAPP), make(CATALOG));
    let (client_config, server_config) = (
        hbone_client_config(&client, vec![id(CATALOG)]).unwrap(),
        hbone_server_config(&server).unwrap(),
    );
    let (done, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (mut by_old, mut by_new) = (0, 0);
    thread::scope(|scope| {
        let changer = scope.spawn(|| {
            let mut changes = 0_usize;
            // Both sides change their certificates between two roots, and the order of the roots they believe.
            while !stop.load(Ordering::Relaxed) {
                let from = if changes.is_multiple_of(2) { &new } else { &old };
                server.set_identity(Arc::new(from.issue(CATALOG)));
                client.set_identity(Arc::new(from.issue(WEBAPP)));
                let order = if changes.is_multiple_of(2) {
                    new.pem() + &old.pem()
                } else {
                    both.clone()
                };
                client.set_bundles(bundle(&order));
                server.set_bundles(bundle(&order));
                changes += 1;
            }
            changes
        });
        let work = || {
            let mut by_new = 0;
            while done.fetch_add(1, Ordering::Relaxed) < 1000 {
                let pair = handshake(client_config.clone(), server_config.clone(), hbone_server_name());
                assert!(pair.is_up(), "{:?} {:?}", pair.client_error, pair.server_error);
                let peer = peer_of(pair.client.peer_certificates().unwrap()).unwrap();
                assert_eq!(peer.id, id(CATALOG));
                let issuer = tombolo_identity::still_trusted(
                    &LiveIdentity::new(None, vec![new.bundle("mesh.example")]).current(),
                    &peer.chain,
                    crate::pki::now(),
                );
                by_new += usize::from(issuer);
            }
            by_new
        };
        let workers = [scope.spawn(work), scope.spawn(work)];
        let results: usize = workers.map(|worker| worker.join().unwrap()).iter().sum();
        stop.store(true, Ordering::Relaxed);
        let changes = changer.join().unwrap();
        (by_old, by_new) = (1000 - results, results);
        println!("1000 handshakes, {changes} exchanges; {by_old} by the old root, {by_new} by the new one");
        assert!(changes >= 20, "only {changes} exchanges");
    });
    assert!(by_old > 0 && by_new > 0, "{by_old} {by_new}");
}
