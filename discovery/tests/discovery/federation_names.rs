//! Members whose trust domain has another name for a time: who says so, who believes it, what it does not give.

use crate::{clusters::*, hostile_member::*, lab::*};
use std::{collections::BTreeMap, sync::Arc};
use tombolo_proto::{
    istio::workload::{Address, address::Type},
    tombolo::{
        federation::v1::{self as pb, peer_message::Message},
        v1::TrustBundle,
    },
    type_url, unpack,
};
use tombolo_types::SpiffeId;

/// Bundles as subscribers are told, by the name of the trust domain.
fn told(lab: &Lab) -> BTreeMap<String, TrustBundle> {
    let world = lab.running().fleet.world().load();
    let bundles = world.resources(type_url::TRUST_BUNDLE).unwrap();
    bundles
        .iter()
        .map(|(name, compiled)| (name.to_string(), unpack(&compiled.any).unwrap()))
        .collect()
}

fn code(refused: &tonic::Status) -> &str {
    &refused.message()[..7]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_name_is_believed_by_all_and_goes_again() {
    let (west, east, south) = (
        cluster("west").await,
        cluster("east").await,
        cluster("south").await,
    );
    east.apply(&[exported("catalog"), entry("catalog", 1)])
        .await
        .unwrap();
    admit(&west, &east, "east").await;
    admit(&west, &south, "south").await;
    wait_imported(&south, "catalog", 1).await;

    for (lab, of, name, wanted) in [
        (&east, "east", "new.example", "TMB0707"),
        (&south, "east", "new.example", "TMB0707"),
        (&west, "east", "south.example", "TMB0714"),
        (&west, "east", "west.example", "TMB0714"),
        (&west, "north", "new.example", "TMB0709"),
    ] {
        let refused = add_name(lab, of, name).await.unwrap_err();
        assert_eq!(code(&refused), wanted, "{of} {name}: {refused}");
    }
    let refused = add_name(&west, "east", "not a name").await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    add_name(&west, "east", "new.example").await.unwrap();
    for lab in [&west, &south] {
        lab.wait_for("the new name is believed", async || {
            told(lab).contains_key("new.example")
        })
        .await;
        let told = told(lab);
        assert_eq!(told["east.example"].also, ["new.example"]);
        assert_eq!(told["new.example"].roots_pem, told["east.example"].roots_pem);
        let shown = status(lab, "east").await.unwrap();
        assert_eq!(
            (shown.trust_domain.as_str(), shown.also_trust_domains.as_slice()),
            ("east.example", ["new.example".to_owned()].as_slice())
        );
        // Its namespaces and sessions are what they were.
        assert_eq!(
            (shown.namespaces.as_slice(), shown.connected),
            (["shop".to_owned()].as_slice(), true)
        );
        let world = lab.running().fleet.world().load();
        let catalog = world.resource(type_url::ADDRESS, "shop/catalog.shop.svc.mesh.internal");
        let catalog: Address = unpack(&catalog.unwrap().any).unwrap();
        let Some(Type::Service(catalog)) = catalog.r#type else {
            panic!("{catalog:?}")
        };
        let id = |name: &str| format!("spiffe://{name}/ns/shop/sa/catalog");
        assert_eq!(catalog.subject_alt_names, ["east.example", "new.example"].map(id));
    }
    // What is taken once is taken for all.
    let mut invite = Invite::of("fourth");
    invite.request.trust_domain = "new.example".into();
    let refused = invite.make(&west).await.unwrap_err();
    assert_eq!(code(&refused), "TMB0714", "{refused}");
    // All of it is there after a restart.
    let mut south = south;
    south.shut_down().await;
    south.boot().await;
    assert_eq!(told(&south)["east.example"].also, ["new.example"]);
    wait_state(&south, "east", "Connected").await;

    drop_name(&west, "east", "new.example", false).await.unwrap();
    for lab in [&west, &south] {
        lab.wait_for("the name is gone", async || {
            !told(lab).contains_key("new.example")
        })
        .await;
        // It may have let somebody in: those connections run on.
        assert_eq!(told(lab)["east.example"].former, ["new.example"]);
    }
    assert_eq!(state(&west, "east").await.as_deref(), Some("Connected"));
    let refused = drop_name(&west, "east", "east.example", true).await.unwrap_err();
    assert!(refused.message().contains("all that east has"), "{refused}");
    let log = west.audit_log();
    for part in [
        "Cluster east is also new.example",
        "Cluster east is no longer new.example",
    ] {
        assert!(log.contains(part), "{part} is not in the audit log");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_comes_under_the_names_of_its_record_only() {
    let (west, mut keys) = (cluster("west").await, cluster("mallory").await);
    admit(&west, &keys, "mallory").await;
    wait_state(&west, "mallory", "Connected").await;
    keys.shut_down().await;
    let old = HostileMember::steal(&keys, "mallory");
    let named = |name: &str| HostileMember {
        identity: certificate(&keys, &SpiffeId::discovery(name.parse().unwrap())),
        believes: vec![name.into(), "mallory.example".into()],
        ..HostileMember::steal(&keys, "mallory")
    };
    let new = named("new.example");
    let refused = async |member: &HostileMember| {
        let opened = peer_stream::<pb::PeerMessage>(&west, Arc::clone(&member.identity)).await;
        opened.is_err()
    };
    assert!(refused(&new).await, "its own root does not make it that name");
    add_name(&west, "mallory", "new.example").await.unwrap();
    let mut stream = new.session(&west).await;
    let service = |name: &str, trust_domain: &str| pb::ExportedService {
        namespace: "shop".into(),
        name: name.into(),
        subject_alt_names: vec![format!("spiffe://{trust_domain}/ns/shop/sa/{name}")],
        presences: vec![pb::Presence {
            healthy: 1,
            capacity: 1,
            ..pb::Presence::default()
        }],
        ..pb::ExportedService::default()
    };
    let part = pb::ExportsPart {
        to_seq: 1,
        last: true,
        services: vec![
            service("new", "new.example"),
            service("old", "mallory.example"),
            service("stolen", "west.example"),
        ],
        ..pb::ExportsPart::default()
    };
    stream.say(Message::Exports(part)).await;
    wait_refused(&west, "mallory", "TMB0717").await;
    west.wait_for("what is its own", async || {
        imported(&west, "new").len() == 1 && imported(&west, "old").len() == 1
    })
    .await;
    assert!(imported(&west, "stolen").is_empty());
    // Of its names the one that it makes certificates for.
    assert_eq!(imported(&west, "old")[0].trust_domain, "new.example");
    // One that it says to use is not taken by mistake; by force it is, and with it everything that was of it.
    for name in ["mallory.example", "new.example"] {
        let refused = drop_name(&west, "mallory", name, false).await.unwrap_err();
        assert_eq!(code(&refused), "TMB0728", "{refused}");
    }
    drop_name(&west, "mallory", "new.example", true).await.unwrap();
    while stream.next().await.is_some() {}
    assert!(refused(&new).await);
    west.wait_for("what was of the old name stays", async || {
        imported(&west, "new").is_empty() && imported(&west, "old").len() == 1
    })
    .await;
    assert_eq!(imported(&west, "old")[0].trust_domain, "mallory.example");
    let mut stream = old.session(&west).await;
    // Under a name of another member, whatever its root is.
    assert!(refused(&named("west.example")).await);
    remove(&west, "mallory").await.unwrap();
    assert_eq!(stream.refused().await.as_deref(), Some("TMB0710"));
}
