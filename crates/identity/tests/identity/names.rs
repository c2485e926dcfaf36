//! A trust domain that is being renamed: two names, one set of roots.

use crate::{
    pair::handshake,
    pki::{CATALOG, DISCOVERY, Root, WEBAPP, id, now, td},
};
use std::sync::Arc;
use tombolo_identity::{
    LiveIdentity, PeerRefusal, TrustBundle, control_client_config, control_server_name,
    federated_server_config, hbone_client_config, hbone_server_config, hbone_server_name, is_of_signing_name,
    peer_of, still_trusted,
};

const NEW_CATALOG: &str = "spiffe://new.example/ns/shop/sa/catalog";
const NEW_DISCOVERY: &str = "spiffe://new.example/ns/tombolo-system/sa/discovery";

/// Bundles of both names, `signing` saying that the other one is the same.
fn both(root: &Root, signing: &str, other: &str) -> Vec<Arc<TrustBundle>> {
    let first = TrustBundle::clone(&root.bundle(signing)).with_names(vec![td(other)], Vec::new());
    vec![Arc::new(first), root.bundle(other)]
}

/// The last step: the other name is a former one.
fn after(root: &Root, signing: &str, former: &str) -> Vec<Arc<TrustBundle>> {
    let bundle = TrustBundle::clone(&root.bundle(signing)).with_names(Vec::new(), vec![td(former)]);
    vec![Arc::new(bundle)]
}

fn up(client: &Arc<LiveIdentity>, server: &Arc<LiveIdentity>, expected: &str) -> bool {
    let pair = handshake(
        hbone_client_config(client, vec![id(expected)]).unwrap(),
        hbone_server_config(server).unwrap(),
        hbone_server_name(),
    );
    pair.is_up()
}

#[test]
fn one_name_is_as_good_as_the_other_while_both_are_there() {
    let root = Root::new("r");
    let live = |uri: &str, bundles| LiveIdentity::new(Some(Arc::new(root.issue(uri))), bundles);
    let moving = || both(&root, "mesh.example", "new.example");
    for uri in [CATALOG, NEW_CATALOG] {
        let server = live(uri, moving());
        for expected in [CATALOG, NEW_CATALOG] {
            assert!(
                up(&live(WEBAPP, moving()), &server, expected),
                "{uri} for {expected}"
            );
        }
        assert!(
            !up(&live(WEBAPP, moving()), &server, WEBAPP),
            "somebody else stays somebody else"
        );
    }
    // Two trust domains that nobody has called one are two, whatever their roots.
    let apart = || vec![root.bundle("mesh.example"), root.bundle("new.example")];
    assert!(up(
        &live(WEBAPP, apart()),
        &live(NEW_CATALOG, apart()),
        NEW_CATALOG
    ));
    assert!(!up(&live(WEBAPP, apart()), &live(NEW_CATALOG, apart()), CATALOG));
    // To be called the same gives nobody a root.
    let other = Root::new("o");
    let only_said = vec![both(&root, "mesh.example", "new.example").remove(0)];
    let stranger = LiveIdentity::new(Some(Arc::new(other.issue(NEW_CATALOG))), moving());
    assert!(!up(&live(WEBAPP, moving()), &stranger, CATALOG));
    assert!(!up(
        &live(WEBAPP, only_said),
        &live(NEW_CATALOG, moving()),
        CATALOG
    ));
}

#[test]
fn a_former_name_lets_nobody_in_and_cuts_nobody_off() {
    let root = Root::new("r");
    let live = |uri: &str, bundles| LiveIdentity::new(Some(Arc::new(root.issue(uri))), bundles);
    let late = live(CATALOG, after(&root, "new.example", "mesh.example"));
    let client = live(
        "spiffe://new.example/ns/shop/sa/webapp",
        after(&root, "new.example", "mesh.example"),
    );
    assert!(!up(&client, &late, CATALOG) && !up(&client, &late, NEW_CATALOG));
    let chain = root.issue(CATALOG).chain().to_vec();
    assert!(
        still_trusted(&client.current(), &chain, now()),
        "it was let in before"
    );
    let gone = LiveIdentity::new(None, vec![root.bundle("new.example")]);
    assert!(!still_trusted(&gone.current(), &chain, now()));
    let other = Root::new("o").issue(CATALOG).chain().to_vec();
    assert!(!still_trusted(&client.current(), &other, now()));
}

#[test]
fn a_certificate_of_the_leaving_name_is_renewed() {
    let root = Root::new("r");
    let due = |uri: &str, bundles| {
        let live = LiveIdentity::new(Some(Arc::new(root.issue(uri))), bundles);
        !is_of_signing_name(&live.current())
    };
    assert!(
        !due(CATALOG, both(&root, "mesh.example", "new.example")),
        "started"
    );
    assert!(
        due(CATALOG, both(&root, "new.example", "mesh.example")),
        "switched"
    );
    assert!(!due(NEW_CATALOG, both(&root, "new.example", "mesh.example")));
    assert!(
        due(CATALOG, after(&root, "new.example", "mesh.example")),
        "finished"
    );
    assert!(!due(CATALOG, vec![root.bundle("mesh.example")]));
}

#[test]
fn discovery_shows_the_certificate_that_is_asked_for() {
    let root = Root::new("r");
    let served = LiveIdentity::new(None, after(&root, "new.example", "mesh.example"));
    let issue = |uri| Arc::new(root.issue(uri));
    served.set_identities(issue(NEW_DISCOVERY), vec![issue(DISCOVERY)]);
    let server = || federated_server_config(&served, &served).unwrap();
    for (name, shown) in [
        ("mesh.example", DISCOVERY),
        ("new.example", NEW_DISCOVERY),
        ("unknown.example", NEW_DISCOVERY),
    ] {
        // Who knows only this one name, and no other name of it.
        let client = LiveIdentity::new(None, vec![root.bundle(name)]);
        let discovery = id(&format!("spiffe://{name}/ns/tombolo-system/sa/discovery"));
        let pair = handshake(
            control_client_config(&client, &discovery, false).unwrap(),
            server(),
            control_server_name(&td(name)).unwrap(),
        );
        if name == "unknown.example" {
            let error = pair.client_error.unwrap();
            assert!(
                matches!(
                    PeerRefusal::find(&error),
                    Some(PeerRefusal::UnknownTrustDomain { .. })
                ),
                "{error}"
            );
            continue;
        }
        assert!(pair.is_up(), "{name}: {:?}", pair.client_error);
        let chain = pair.client.peer_certificates().unwrap();
        assert_eq!(peer_of(chain).unwrap().id, id(shown));
        assert!(
            chain.contains(&root.der()),
            "with the root, for those who know its pin"
        );
    }
}
