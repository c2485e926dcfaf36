//! The own trust domain is renamed, on a discovery over loopback.

use crate::{clusters::*, lab::*};
use serde_json::json;
use std::sync::Arc;
use tokio::io::AsyncReadExt as _;
use tombolo_identity::{LiveIdentity, WorkloadIdentity, control_client_config, control_server_name};
use tombolo_proto::{
    istio::{security::Authorization, security::string_match::MatchType},
    tombolo::{admin::v1 as admin, v1::TrustBundle as Told},
    type_url, unpack,
};
use tombolo_types::SpiffeId;

const OLD: &str = "mesh.example";
const NEW: &str = "new.example";

async fn migrate_with(lab: &Lab, step: &str, name: &str, force: bool) -> Result<(), tonic::Status> {
    let request = admin::MigrateTrustRequest {
        step: step.into(),
        trust_domain: name.into(),
        force,
        dry_run: false,
    };
    lab.admin().await.migrate_trust(request).await.map(drop)
}

/// A step, after which discovery is opened anew as its program does it.
async fn migrate(lab: &mut Lab, step: &str, name: &str, force: bool) -> Result<(), tonic::Status> {
    migrate_with(lab, step, name, force).await?;
    open_anew(lab).await;
    Ok(())
}

async fn open_anew(lab: &mut Lab) {
    let outdated = lab.running().outdated();
    tokio::time::timeout(std::time::Duration::from_secs(5), outdated)
        .await
        .unwrap();
    lab.shut_down().await;
    lab.boot().await;
}

/// Signing name, other names, former names, step.
async fn names(lab: &Lab) -> String {
    let request = admin::ListTrustRequest {};
    let shown = lab.admin().await.list_trust(request).await.unwrap().into_inner();
    let names = shown.names.unwrap();
    let step = names.migration.unwrap().step;
    format!(
        "{} [{}] [{}] {step}",
        names.trust_domain,
        names.also.join(" "),
        names.former.join(" ")
    )
}

/// What subscribers are told: bundles, each with its other names.
fn told(lab: &Lab) -> Vec<String> {
    let world = lab.running().fleet.world().load();
    let bundles = world.resources(type_url::TRUST_BUNDLE).into_iter().flatten();
    let told = bundles.map(|(name, compiled)| {
        let told: Told = unpack(&compiled.any).unwrap();
        format!("{name} [{}] [{}]", told.also.join(" "), told.former.join(" "))
    });
    told.collect()
}

/// Principals that a policy is sent with.
fn principals(lab: &Lab, name: &str) -> Vec<String> {
    let world = lab.running().fleet.world().load();
    let found = world.resources(type_url::AUTHORIZATION).unwrap();
    let policy: Authorization = unpack(&found.get(name).unwrap().any).unwrap();
    let sources = &policy.rules[0].clauses[0].matches[0].principals;
    let texts = sources.iter().map(|one| match &one.match_type {
        Some(MatchType::Exact(text)) => text.clone(),
        other => panic!("{other:?}"),
    });
    texts.collect()
}

fn policy(principal: &str) -> serde_json::Value {
    object(
        "security.istio.io/v1",
        "AuthorizationPolicy",
        "front",
        json!({"rules": [{"from": [{"source": {"principals": [principal]}}]}]}),
    )
}

/// True if discovery ends the connection of who shows this certificate.
async fn is_refused(lab: &Lab, identity: Option<Arc<WorkloadIdentity>>) -> bool {
    let live = LiveIdentity::new(identity, vec![lab.bundle()]);
    let old = lab.trust_domain();
    let tls = control_client_config(&live, &SpiffeId::discovery(old.clone()), true).unwrap();
    let socket = tokio::net::TcpStream::connect(lab.address()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(tls));
    match connector
        .connect(control_server_name(&old).unwrap(), socket)
        .await
    {
        Ok(mut stream) => stream.read_u8().await.is_err(), // else the first byte of its settings
        Err(_) => true,
    }
}

fn id_of(host: &Host) -> String {
    host.identity.as_ref().unwrap().id().to_string()
}

#[tokio::test]
async fn each_step_survives_a_restart() {
    let mut lab = Lab::start().await;
    lab.group("catalog").await;
    let mut host = lab.enrol("catalog").await;
    let mut away = lab.enrol("catalog").await;
    let token = lab.token("catalog", |_| ()).await;
    lab.apply(&[policy("mesh.example/ns/shop/sa/front")])
        .await
        .unwrap();
    for (step, name) in [
        ("switch", ""),
        ("finish", ""),
        ("abort", ""),
        ("fly", ""),
        ("start", ""),
        ("start", "No Name"),
        ("start", OLD),
    ] {
        migrate_with(&lab, step, name, true).await.unwrap_err();
    }
    assert_eq!(names(&lab).await, "mesh.example [] [] steady");
    assert_eq!(told(&lab), ["mesh.example [] []"]);

    migrate(&mut lab, "start", "passing.example", false)
        .await
        .unwrap();
    migrate(&mut lab, "abort", "", false).await.unwrap();
    assert_eq!(told(&lab), ["mesh.example [] []"]);
    migrate(&mut lab, "start", NEW, false).await.unwrap();
    for _ in 0..2 {
        assert_eq!(names(&lab).await, "mesh.example [new.example] [] started");
        assert_eq!(told(&lab), ["mesh.example [new.example] []", "new.example [] []"]);
        assert_eq!(
            principals(&lab, "shop/front"),
            ["mesh.example/ns/shop/sa/front", "new.example/ns/shop/sa/front"]
        );
        lab.shut_down().await;
        lab.boot().await;
    }
    // One thing at a time.
    let request = admin::RotateTrustRequest {
        step: "start".into(),
        ..Default::default()
    };
    let refused = lab.admin().await.rotate_trust(request.clone()).await.unwrap_err();
    assert!(refused.message().contains("TMB0801"), "{refused}");
    host.new_csr();
    host.renew(&lab, 2).await.unwrap();
    assert_eq!(
        id_of(&host),
        "spiffe://mesh.example/ns/shop/sa/catalog",
        "as before"
    );

    migrate(&mut lab, "switch", "", false).await.unwrap();
    for _ in 0..2 {
        assert_eq!(names(&lab).await, "new.example [mesh.example] [] switched");
        assert_eq!(
            told(&lab),
            ["mesh.example [] []", "new.example [mesh.example] []"]
        );
        lab.shut_down().await;
        lab.boot().await;
    }
    // The answer to the renewal of before was lost: the same request gets a certificate that is of use now.
    host.renew(&lab, 2).await.unwrap();
    assert_eq!(id_of(&host), "spiffe://new.example/ns/shop/sa/catalog");
    assert_eq!(host.registration.trust_domain, NEW);
    assert_eq!(host.registration.other_names, [OLD]);
    let mut late = Host::new();
    late.enrol(&lab, &token).await.unwrap();
    assert_eq!(id_of(&late), "spiffe://new.example/ns/shop/sa/catalog");
    assert!(
        !is_refused(&lab, away.identity.clone()).await,
        "both names are believed"
    );
    // Of the rest each is named.
    let refused = migrate_with(&lab, "finish", "", false).await.unwrap_err();
    for named in ["TMB0802", "shop/catalog-", "AuthorizationPolicy shop/front"] {
        assert!(refused.message().contains(named), "{refused}");
    }
    lab.apply(&[policy("new.example/ns/shop/sa/front")])
        .await
        .unwrap();
    let refused = migrate_with(&lab, "finish", "", false).await.unwrap_err();
    assert!(!refused.message().contains("AuthorizationPolicy"), "{refused}");

    migrate(&mut lab, "finish", "", true).await.unwrap();
    for _ in 0..2 {
        assert_eq!(names(&lab).await, "new.example [] [mesh.example] steady");
        assert_eq!(told(&lab), ["new.example [] [mesh.example]"]);
        // Connections that the old name let in are the same peers.
        assert_eq!(
            principals(&lab, "shop/front"),
            ["new.example/ns/shop/sa/front", "mesh.example/ns/shop/sa/front"]
        );
        lab.shut_down().await;
        lab.boot().await;
    }
    // Who was away all the time asks for the old name, and is told the new one. Its certificate opens no door any more.
    let shown = away.identity.clone();
    away.new_csr();
    away.renew(&lab, 2).await.unwrap();
    assert_eq!(id_of(&away), "spiffe://new.example/ns/shop/sa/catalog");
    assert!(is_refused(&lab, shown).await);
    // The root is rotated under the new name, and the configuration may say it.
    let rotated = lab
        .admin()
        .await
        .rotate_trust(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(rotated.rotation.unwrap().step, "started");
    lab.shut_down().await;
    lab.boot().await;
    assert_eq!(told(&lab), ["new.example [] [mesh.example]"]);
    let audit = lab.audit_log();
    for verb in [
        "migrate-start passing.example",
        "migrate-abort",
        "migrate-switch",
        "migrate-finish --force",
    ] {
        assert!(audit.contains(verb), "{verb}: {audit}");
    }
}

#[tokio::test]
async fn the_configuration_says_the_first_name_or_a_present_one() {
    // As init writes it: without it the name of the cluster would follow the trust domain.
    let mut lab = Lab::start_with(|config| config.cluster_name = "mesh".into()).await;
    migrate(&mut lab, "start", NEW, false).await.unwrap();
    migrate(&mut lab, "switch", "", false).await.unwrap();
    lab.shut_down().await;
    for (name, opens) in [(NEW, true), (OLD, true), ("third.example", false)] {
        lab.config.trust_domain = name.into();
        let started = tombolo_discovery::server::start(&lab.config).await;
        assert_eq!(started.is_ok(), opens, "{name}");
        match started {
            Ok(running) => {
                assert_eq!(running.trust_domain.as_str(), NEW);
                running.stop().await;
            }
            Err(error) => assert!(format!("{error:#}").contains(OLD), "{error:#}"),
        }
    }
}

/// The founder says of itself what another cluster has said of it, and takes it back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_clusters_follow_the_founder() {
    let (mut west, east) = (cluster("west").await, cluster("east").await);
    admit(&west, &east, "east").await;
    wait_state(&east, "west", "Connected").await;
    let is_told = async |named: bool| {
        east.wait_for(&format!("east believes the new name: {named}"), async || {
            let told = told(&east);
            told.iter().any(|one| one.starts_with("new.example ")) == named
        })
        .await;
    };
    migrate(&mut west, "start", NEW, false).await.unwrap();
    is_told(true).await;
    migrate(&mut west, "abort", "", false).await.unwrap();
    is_told(false).await;
    migrate(&mut west, "start", NEW, false).await.unwrap();
    is_told(true).await;
    for step in ["switch", "finish"] {
        // Not before east is connected again, and has said that it knows.
        let refused = migrate_with(&west, step, "", false).await;
        if let Err(refused) = &refused {
            assert!(refused.message().starts_with("TMB0802"), "{refused}");
            west.wait_for(step, async || migrate_with(&west, step, "", false).await.is_ok())
                .await;
        }
        open_anew(&mut west).await;
    }
    east.wait_for("west has its new name alone", async || {
        let west = status(&east, "west").await.unwrap();
        west.trust_domain == NEW && west.also_trust_domains.is_empty() && west.connected
    })
    .await;
    assert_eq!(names(&west).await, "new.example [] [west.example] steady");
}
