//! Discoveries of several clusters over loopback: who comes in, what they tell each other, who is kept out.

use crate::{
    clusters::*,
    hostile_member::{certificate, peer_stream},
    lab::*,
};
use serde_json::json;
use std::time::{Duration, Instant};
use tombolo_identity::LiveIdentity;
use tombolo_proto::{
    tombolo::{
        admin::v1 as admin,
        federation::v1::{self as pb, peer_message::Message},
    },
    type_url, unpack,
};
use tombolo_types::SpiffeId;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_clusters_by_two_commands_and_one_leaves() {
    let (west, east, south) = (
        cluster("west").await,
        cluster("east").await,
        cluster("south").await,
    );
    west.apply(&[exported("catalog"), service("private"), entry("catalog", 1)])
        .await
        .unwrap();
    admit(&west, &east, "east").await;
    admit(&west, &south, "south").await;
    // Each learns of the others by the records, not by a command of its own.
    for (lab, others) in [
        (&west, ["east", "south"]),
        (&east, ["west", "south"]),
        (&south, ["west", "east"]),
    ] {
        for other in others {
            wait_state(lab, other, "Connected").await;
        }
    }
    for lab in [&east, &south] {
        wait_imported(lab, "catalog", 1).await;
        let workloads = imported(lab, "catalog");
        assert_eq!(workloads.len(), 1, "{workloads:?}");
        let workload = &workloads[0];
        assert_eq!(
            (&*workload.network, &*workload.trust_domain),
            ("west", "west.example")
        );
        assert!(workload.addresses.is_empty());
        assert!(imported(lab, "private").is_empty());
        assert!(bundles(lab).contains("west.example"));
    }
    // An address that a restart keeps.
    let vip = |lab: &Lab| {
        let world = lab.running().fleet.world().load();
        let key = "shop/catalog.shop.svc.mesh.internal";
        world
            .resource(type_url::ADDRESS, key)
            .map(|compiled| compiled.any.clone())
    };
    let before = vip(&east).unwrap();
    let mut east = east;
    east.shut_down().await;
    wait_state(&west, "east", "Stale").await;
    // West goes on; what changes meanwhile is there when east is back.
    west.apply(&[entry("catalog", 5)]).await.unwrap();
    wait_imported(&south, "catalog", 5).await;
    east.boot().await;
    assert_eq!(
        imported(&east, "catalog").len(),
        1,
        "served from the last run at once"
    );
    wait_imported(&east, "catalog", 5).await;
    assert_eq!(vip(&east).unwrap(), before);
    wait_state(&west, "east", "Connected").await;
    let names: Vec<String> = clusters(&west).await.into_iter().map(|c| c.name).collect();
    assert_eq!(names, ["east", "south", "west"], "no duplicate");

    // Who was not given the right admits nobody, and who did not admit it may not remove it.
    let refused = Invite::of("fourth").make(&south).await.unwrap_err();
    assert!(refused.message().starts_with("TMB0707"), "{refused}");
    let refused = remove(&south, "east").await.unwrap_err();
    assert!(refused.message().starts_with("TMB0707"), "{refused}");
    remove(&west, "east").await.unwrap();
    for lab in [&west, &south] {
        wait_state(lab, "east", "Removed").await;
        lab.wait_for("roots are withdrawn", async || {
            !bundles(lab).contains("east.example")
        })
        .await;
    }
    wait_state(&east, "east", "Removed").await;
    east.wait_for("nothing of the others is served", async || {
        imported(&east, "catalog").is_empty() && bundles(&east).len() == 1
    })
    .await;
    let log = west.audit_log();
    assert!(
        log.contains("\"verb\":\"join\"") && log.contains("Cluster east"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_seen_by_all_within_a_second() {
    let (west, east, south) = (
        cluster("west").await,
        cluster("east").await,
        cluster("south").await,
    );
    west.apply(&[exported("catalog"), entry("catalog", 1)])
        .await
        .unwrap();
    admit(&west, &east, "east").await;
    admit(&west, &south, "south").await;
    for lab in [&east, &south] {
        wait_imported(lab, "catalog", 1).await;
    }
    let mut waits = Vec::new();
    for weight in 2..42 {
        let started = Instant::now();
        west.apply(&[entry("catalog", weight)]).await.unwrap();
        for lab in [&east, &south] {
            wait_imported(lab, "catalog", weight).await;
        }
        waits.push(started.elapsed());
    }
    waits.sort();
    let (p50, worst) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    println!("{} changes: p50 {p50:?}, worst {worst:?}", waits.len());
    assert!(worst < Duration::from_secs(1), "{waits:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_admits_one_named_cluster_once() {
    let (west, east, other) = (
        cluster("west").await,
        cluster("east").await,
        cluster("other").await,
    );
    let refused = async |lab: &Lab, token: &str, code: &str| {
        let before = clusters(lab).await;
        let refused = join(lab, token).await.unwrap_err();
        assert!(refused.message().starts_with(code), "{code}: {refused}");
        assert_eq!(
            clusters(lab).await.len(),
            before.len(),
            "nothing has changed here"
        );
    };
    // Another name, or another trust domain.
    let token = Invite::of("east").make(&west).await.unwrap();
    refused(&other, &token, "TMB0706").await;
    let mut invite = Invite::of("east");
    invite.request.trust_domain = "elsewhere.example".into();
    let token_elsewhere = invite.make(&west).await.unwrap();
    refused(&east, &token_elsewhere, "TMB0706").await;
    // Over.
    let mut invite = Invite::of("east");
    invite.request.ttl_seconds = 1;
    let expired = invite.make(&west).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    refused(&east, &expired, "TMB0702").await;
    // Revoked.
    let invite = Invite::of("east");
    let revoked = invite.make(&west).await.unwrap();
    let id: String = invite
        .request
        .invite_id
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let request = admin::RevokeClusterInviteRequest { id };
    west.admin().await.revoke_cluster_invite(request).await.unwrap();
    refused(&east, &revoked, "TMB0704").await;
    // A damaged one.
    refused(&east, &token[..token.len() - 3], "TMB0701").await;
    assert!(clusters(&west).await.len() == 1, "west is alone still");

    join(&east, &token).await.unwrap();
    wait_state(&west, "east", "Connected").await;
    // A thief with the same token, who calls its cluster east too.
    let thief = cluster("east").await;
    refused(&thief, &token, "TMB0703").await;
    refused(&east, &token, "TMB0715").await;
    let names: Vec<String> = clusters(&west).await.into_iter().map(|c| c.name).collect();
    assert_eq!(names, ["east", "west"]);
    let log = west.audit_log();
    for code in ["TMB0706", "TMB0702", "TMB0704", "TMB0703"] {
        assert!(log.contains(code), "{code} is not in the audit log");
    }
    assert!(!log.contains("tmi1_"), "no secret in the log");
}

#[tokio::test]
async fn names_that_mean_something_else_are_refused() {
    let west = cluster_with("west", |config| config.network = "lan".into()).await;
    for (name, code) in [("lan", "TMB0708"), ("west", "TMB0708")] {
        let mut invite = Invite::of(name);
        invite.request.trust_domain = "x.example".into();
        let refused = invite.make(&west).await.unwrap_err();
        assert!(refused.message().starts_with(code), "{name}: {refused}");
    }
    let mut invite = Invite::of("twin");
    invite.request.trust_domain = "west.example".into();
    let refused = invite.make(&west).await.unwrap_err();
    assert!(refused.message().starts_with("TMB0714"), "{refused}");
    for namespaces in [
        vec![],
        vec!["istio-system".to_owned()],
        vec!["Bad_Name".to_owned()],
    ] {
        let mut invite = Invite::of("east");
        invite.request.namespaces = namespaces;
        invite.make(&west).await.unwrap_err();
    }
    let request = admin::ListClusterInvitesRequest {};
    let listed = west.admin().await.list_cluster_invites(request).await.unwrap();
    assert!(listed.into_inner().invites.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trust_domain_of_two_clusters_is_said_on_both_sides() {
    let west = cluster("west").await;
    let twin = cluster_with("west", |config| config.cluster_name = "twin".into()).await;
    let invite = async |share: bool| {
        let mut invite = Invite::of("twin");
        invite.request.trust_domain = "west.example".into();
        invite.request.share_trust_domain = share;
        invite.make(&west).await
    };
    let refused = invite(false).await.unwrap_err();
    assert!(refused.message().starts_with("TMB0714"), "{refused}");
    let token = invite(true).await.unwrap();
    let refused = join(&twin, &token).await.unwrap_err();
    assert!(refused.message().starts_with("TMB0714"), "{refused}");
    let request = admin::JoinClusterRequest {
        token,
        share_trust_domain: true,
        ..Default::default()
    };
    twin.admin().await.join_cluster(request).await.unwrap();
    wait_state(&west, "twin", "Connected").await;
    // Both roots make identities of the one trust domain now.
    for lab in [&west, &twin] {
        lab.wait_for("both roots", async || {
            let world = lab.running().fleet.world().load();
            let bundles = world.resources(type_url::TRUST_BUNDLE).unwrap();
            let bundle = bundles.values().next().unwrap();
            let bundle: tombolo_proto::tombolo::v1::TrustBundle = unpack(&bundle.any).unwrap();
            bundle.roots_pem.matches("BEGIN").count() == 2
        })
        .await;
    }
    let request = admin::ListTrustRequest {};
    let roots = west
        .admin()
        .await
        .list_trust(request)
        .await
        .unwrap()
        .into_inner()
        .roots;
    assert_eq!(roots.len(), 2);
    assert!(
        roots
            .iter()
            .all(|root| root.trust_domain == "west.example" && root.pin.len() == 32)
    );
    remove(&west, "twin").await.unwrap();
    west.wait_for("one root", async || {
        let request = admin::ListTrustRequest {};
        west.admin()
            .await
            .list_trust(request)
            .await
            .unwrap()
            .into_inner()
            .roots
            .len()
            == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_outside_the_grant_is_refused_and_told() {
    let west = cluster("west").await;
    // Its own idea of what it exports is wider than its grant.
    let east = cluster_with("east", |config| config.export_namespaces = vec!["*".into()]).await;
    let mut foreign = service("ledger");
    foreign["metadata"]["namespace"] = json!("bank");
    foreign["spec"]["hosts"] = json!(["ledger.bank.svc.mesh.internal"]);
    east.apply(&[service("catalog"), entry("catalog", 3), foreign])
        .await
        .unwrap();
    admit(&west, &east, "east").await;
    wait_imported(&west, "catalog", 3).await;
    assert!(imported(&west, "ledger").is_empty());
    let listed = east
        .admin()
        .await
        .list_clusters(admin::ListClustersRequest::default())
        .await
        .unwrap();
    assert_eq!(
        listed.into_inner().exported_services,
        1,
        "an honest member does not even say it"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_no_member_gets_no_stream_and_garbage_harms_nobody() {
    let (west, east, stranger) = (
        cluster("west").await,
        cluster("east").await,
        cluster("stranger").await,
    );
    west.apply(&[exported("catalog"), entry("catalog", 1)])
        .await
        .unwrap();
    admit(&west, &east, "east").await;
    wait_imported(&east, "catalog", 1).await;

    let discovery = |lab: &Lab| SpiffeId::discovery(lab.trust_domain());
    let refused = peer_stream::<pb::PeerMessage>(&west, certificate(&stranger, &discovery(&stranger))).await;
    refused.map(drop).unwrap_err();
    // A workload of a member cluster, and one of the own mesh.
    let workload = SpiffeId::new(east.trust_domain(), "shop", "catalog").unwrap();
    peer_stream::<pb::PeerMessage>(&west, certificate(&east, &workload))
        .await
        .map(drop)
        .unwrap_err();
    let workload = SpiffeId::new(west.trust_domain(), "shop", "catalog").unwrap();
    let refused = peer_stream::<pb::PeerMessage>(&west, certificate(&west, &workload)).await;
    assert!(refused.map(drop).unwrap_err().starts_with("TMB0721"));

    // The certificate of a member's discovery alone is not enough: without the member key nothing is believed.
    let foreign = certificate(&east, &discovery(&east));
    let mut stream = peer_stream::<pb::PeerMessage>(&west, foreign).await.unwrap();
    let hello = stream.next().await;
    assert!(matches!(hello, Some(Message::Hello(_))), "{hello:?}");
    let forged = pb::Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        cluster: "east".into(),
        epoch: u64::MAX,
        instance: 7,
        proof: vec![0; 64],
        ..Default::default()
    };
    stream.say(Message::Hello(forged)).await;
    assert_eq!(stream.refused().await.as_deref(), Some("TMB0721"));
    // Such a connection cannot read xDS either, whatever else it tries.
    let foreign = certificate(&east, &discovery(&east));
    let live = LiveIdentity::new(Some(foreign), vec![west.bundle()]);
    let (channel, _) = west.dial(live.current().identity.clone()).await;
    let mut ads =
        tombolo_proto::xds::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient::new(
            channel,
        );
    let refused = ads
        .delta_aggregated_resources(tokio_stream::empty())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{refused}");

    // The real one is still there.
    wait_state(&west, "east", "Connected").await;
    west.apply(&[entry("catalog", 9)]).await.unwrap();
    wait_imported(&east, "catalog", 9).await;
    assert!(west.audit_log().contains("TMB0721"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_fails_leaves_both_sides_as_they_were() {
    let (mut west, mut east) = (cluster("west").await, cluster("east").await);
    // Nobody there.
    let token = Invite::of("east").make(&west).await.unwrap();
    west.shut_down().await;
    let refused = join(&east, &token).await.unwrap_err();
    assert!(refused.message().starts_with("TMB0112"), "{refused}");
    west.boot().await;
    // The same invite works as soon as nothing is in the way, and the result outlives both processes.
    join(&east, &token).await.unwrap();
    west.shut_down().await;
    east.shut_down().await;
    west.boot().await;
    east.boot().await;
    wait_state(&west, "east", "Connected").await;
    wait_state(&east, "west", "Connected").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_cluster_calls_services_by_its_own_mesh_domain() {
    let west = cluster("west").await;
    let mut east = cluster_with("east", |config| config.mesh_domain = "east.internal".into()).await;
    let mut catalog = exported("catalog");
    catalog["spec"]["hosts"] = json!(["catalog.shop.svc.east.internal"]);
    east.apply(&[catalog, entry("catalog", 3)]).await.unwrap();
    west.apply(&[exported("orders"), entry("orders", 2)])
        .await
        .unwrap();
    admit(&west, &east, "east").await;
    wait_imported(&west, "catalog", 3).await;
    wait_imported(&east, "orders", 2).await;
    let name_at_home = |lab: &Lab, name: &str| imported(lab, name)[0].hostname.clone();
    let has = |lab: &Lab, key: &str| {
        let world = lab.running().fleet.world().load();
        world.resource(type_url::ADDRESS, key).is_some()
    };
    // Here it has a name of here; its own gateways are asked for it by the name that it has there.
    assert!(has(&west, "shop/catalog.shop.svc.mesh.internal"));
    assert_eq!(name_at_home(&west, "catalog"), "catalog.shop.svc.east.internal");
    assert!(has(&east, "shop/orders.shop.svc.east.internal"));
    assert_eq!(name_at_home(&east, "orders"), "orders.shop.svc.mesh.internal");
    // What was said is known after a restart without the other side.
    let mut west = west;
    west.shut_down().await;
    east.shut_down().await;
    west.boot().await;
    assert_eq!(name_at_home(&west, "catalog"), "catalog.shop.svc.east.internal");
}
