//! One root after another: who believes what at each step.

use crate::{CATALOG, DEFAULT, DISCOVERY, Made, WEBAPP, id, issue, made, now, pair::handshake, td, unix};
use rustls::Error;
use std::{sync::Arc, time::Duration};
use tombolo_ca::{Authority, Publication};
use tombolo_identity::{
    LiveIdentity, TrustBundle, certificates_to_pem, control_server_name, discovery_server_config,
    hbone_client_config, hbone_server_config, hbone_server_name, is_of_first_root, pinned_client_config,
    still_trusted,
};

const DAYS: Duration = Duration::from_secs(90 * 86_400);

/// The old authority, and the one after it as it signs: publishing both roots and the old one's signature.
fn rotated() -> (Made, Authority) {
    let old = made();
    let next = old
        .authority
        .create_next(&old.dir.with_file_name("next"), now())
        .unwrap();
    let crosses_pem = old.authority.cross_sign(&next, DAYS, now()).unwrap();
    let next = next
        .publishing(&Publication {
            roots_pem: old.authority.roots_pem().to_owned(),
            crosses_pem,
            ..Publication::default()
        })
        .unwrap();
    (old, next)
}

fn live(authority: &Authority, uri: &str, believes: TrustBundle) -> Arc<LiveIdentity> {
    let identity = issue(authority, uri, None, DEFAULT, now());
    LiveIdentity::new(Some(Arc::new(identity)), vec![Arc::new(believes)])
}

#[test]
fn who_was_away_follows_by_the_old_roots_signature() {
    let (old, new) = rotated();
    let only_new = || TrustBundle::from_pem(td(), &certificates_to_pem(&new.bundle().roots()[..1])).unwrap();
    assert_eq!(new.bundle().roots().len(), 2);
    assert!(new.root_pin() != old.authority.root_pin());
    let server = live(&new, CATALOG, new.bundle());
    for (what, client, up) in [
        (
            "away since before",
            live(&old.authority, WEBAPP, old.authority.bundle()),
            true,
        ),
        ("at this step", live(&new, WEBAPP, new.bundle()), true),
        ("a step ahead", live(&new, WEBAPP, only_new()), true),
    ] {
        let config = hbone_client_config(&client, vec![id(CATALOG)]).unwrap();
        let pair = handshake(config, hbone_server_config(&server).unwrap(), hbone_server_name());
        assert_eq!(
            pair.is_up(),
            up,
            "{what}: {:?} {:?}",
            pair.client_error,
            pair.server_error
        );
    }
    // Afterwards the old one lets nobody in, and who was away still knows the others.
    let server = live(&new, CATALOG, only_new());
    let client = live(&old.authority, WEBAPP, old.authority.bundle());
    let config = hbone_client_config(&client, vec![id(CATALOG)]).unwrap();
    let pair = handshake(config, hbone_server_config(&server).unwrap(), hbone_server_name());
    assert!(matches!(pair.client_error, Some(Error::AlertReceived(_))) && pair.server_error.is_some());
}

#[test]
fn both_pins_lead_to_discovery_until_the_old_root_is_gone() {
    let (old, new) = rotated();
    let reach = |pin, bundle: TrustBundle| {
        let identity = new
            .issue_server(&id(DISCOVERY), &[], &[], DEFAULT, now())
            .unwrap();
        let served = LiveIdentity::new(Some(Arc::new(identity)), vec![Arc::new(bundle)]);
        let (client, roots) = pinned_client_config(pin, &id(DISCOVERY)).unwrap();
        let server = discovery_server_config(&served).unwrap();
        let pair = handshake(client, server, control_server_name(&td()).unwrap());
        assert_eq!(pair.client_error.is_none(), roots.get().is_some());
        roots.get()
    };
    let (old_pin, new_pin) = (old.authority.root_pin(), new.root_pin());
    assert_eq!(
        reach(old_pin, new.bundle()).as_deref(),
        Some(old.authority.roots_pem())
    );
    assert!(reach(new_pin, new.bundle()).is_some());
    let mut identity = new
        .issue_server(&id(DISCOVERY), &[], &[], DEFAULT, now())
        .unwrap();
    assert!(identity.chain().len() > 2);
    // As after the last step: one root, and the old one's signature still sent along.
    let last = Authority::open(&old.dir.with_file_name("next"), &td()).unwrap();
    let crosses_pem = old.authority.cross_sign(&last, DAYS, now()).unwrap();
    let last = last
        .publishing(&Publication {
            retired_pem: old.authority.roots_pem().to_owned(),
            crosses_pem,
            ..Publication::default()
        })
        .unwrap();
    identity = last
        .issue_server(&id(DISCOVERY), &[], &[], DEFAULT, now())
        .unwrap();
    let served = LiveIdentity::new(Some(Arc::new(identity)), vec![Arc::new(last.bundle())]);
    let (client, roots) = pinned_client_config(old_pin, &id(DISCOVERY)).unwrap();
    let server = discovery_server_config(&served).unwrap();
    handshake(client, server, control_server_name(&td()).unwrap());
    assert!(roots.get().is_none() && roots.refusal().is_some());
}

#[test]
fn a_retired_root_lets_nobody_in_and_cuts_nobody() {
    let (old, new) = rotated();
    let last = Authority::open(&old.dir.with_file_name("next"), &td()).unwrap();
    let last = last
        .publishing(&Publication {
            retired_pem: old.authority.roots_pem().to_owned(),
            ..Publication::default()
        })
        .unwrap();
    assert!(last.bundle_pem().contains("RETIRED") && !last.roots_pem().contains("RETIRED"));
    let told = TrustBundle::from_pem(td(), &last.bundle_pem()).unwrap();
    assert_eq!((told.roots().len(), told.retired().len()), (1, 1));
    assert_eq!(told, last.bundle());
    let by_old = issue(&old.authority, WEBAPP, None, DEFAULT, now());
    let by_new = issue(&new, WEBAPP, None, DEFAULT, now());
    let believes = |bundle: TrustBundle| LiveIdentity::new(None, vec![Arc::new(bundle)]).current();
    let runs_on = |bundle: TrustBundle, chain| still_trusted(&believes(bundle), chain, unix(now()));
    assert!(runs_on(last.bundle(), by_old.chain()) && runs_on(last.bundle(), by_new.chain()));
    let cut = Authority::open(&old.dir.with_file_name("next"), &td()).unwrap();
    assert!(!runs_on(cut.bundle(), by_old.chain()) && runs_on(cut.bundle(), by_new.chain()));
    let server = live(&last, CATALOG, last.bundle());
    let client = live(&old.authority, WEBAPP, new.bundle());
    let config = hbone_client_config(&client, vec![id(CATALOG)]).unwrap();
    let pair = handshake(config, hbone_server_config(&server).unwrap(), hbone_server_name());
    assert!(matches!(pair.client_error, Some(Error::AlertReceived(_))) && pair.server_error.is_some());
}

#[test]
fn whose_certificate_is_renewed_early() {
    let (old, new) = rotated();
    let early = |authority: &Authority, bundle| !is_of_first_root(&live(authority, WEBAPP, bundle).current());
    assert!(!early(&old.authority, old.authority.bundle()));
    assert!(early(&old.authority, new.bundle()));
    assert!(!early(&new, new.bundle()));
    let chain = |authority: &Authority| {
        let request = crate::request(CATALOG);
        authority
            .issue(&request.csr_pem, &id(CATALOG), None, DEFAULT, now())
            .unwrap()
            .cert_chain
    };
    assert!(new.has_signed(&chain(&new)) && !new.has_signed(&chain(&old.authority)));
    assert!(!new.has_signed(&[]) && !new.has_signed(&["x".into()]));
}

#[test]
fn the_old_roots_signature_is_sent_only_while_it_outlives_the_certificate() {
    let old = made();
    let next = old
        .authority
        .create_next(&old.dir.with_file_name("next"), now())
        .unwrap();
    let hour = Duration::from_secs(3600);
    let crosses_pem = old.authority.cross_sign(&next, 2 * hour, now()).unwrap();
    let next = next
        .publishing(&Publication {
            crosses_pem,
            ..Publication::default()
        })
        .unwrap();
    assert_eq!(issue(&next, WEBAPP, None, hour, now()).chain().len(), 2);
    assert_eq!(issue(&next, WEBAPP, None, 3 * hour, now()).chain().len(), 1);
}
