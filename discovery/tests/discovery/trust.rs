//! The own root is rotated, on a discovery over loopback.

use crate::lab::*;
use tombolo_identity::{TrustBundle, root_pin};
use tombolo_proto::{
    tombolo::{admin::v1 as admin, v1::TrustBundle as Told},
    type_url, unpack,
};

async fn rotate_with(lab: &Lab, step: &str, force: bool) -> Result<admin::RotationStatus, tonic::Status> {
    let request = admin::RotateTrustRequest {
        step: step.into(),
        force,
        dry_run: false,
    };
    let answer = lab.admin().await.rotate_trust(request).await?;
    Ok(answer.into_inner().rotation.unwrap())
}

async fn rotate(lab: &Lab, step: &str) -> Result<admin::RotationStatus, tonic::Status> {
    rotate_with(lab, step, false).await
}

async fn shown(lab: &Lab) -> admin::ListTrustResponse {
    let request = admin::ListTrustRequest {};
    lab.admin().await.list_trust(request).await.unwrap().into_inner()
}

/// State and pin of each own root.
async fn states(lab: &Lab) -> Vec<(String, Vec<u8>)> {
    let roots = shown(lab).await.roots;
    roots.into_iter().map(|root| (root.state, root.pin)).collect()
}

async fn words(lab: &Lab) -> String {
    let all: Vec<String> = states(lab).await.into_iter().map(|(state, _)| state).collect();
    all.join(" ")
}

/// What subscribers are told of the own trust domain.
fn told(lab: &Lab) -> TrustBundle {
    let world = lab.running().fleet.world().load();
    let found = world.resources(type_url::TRUST_BUNDLE).unwrap();
    let told: Told = unpack(&found.get("mesh.example").unwrap().any).unwrap();
    TrustBundle::from_pem(lab.trust_domain(), &told.roots_pem).unwrap()
}

#[tokio::test]
async fn each_step_survives_a_restart() {
    let mut lab = Lab::start().await;
    lab.group("catalog").await;
    let mut host = lab.enrol("catalog").await;
    let old = told(&lab);
    assert_eq!(words(&lab).await, "signing");
    for wrong in ["switch", "finish", "abort", "cut", "fly"] {
        rotate(&lab, wrong).await.unwrap_err();
    }
    let mut plan = admin::RotateTrustRequest {
        step: "start".into(),
        ..Default::default()
    };
    plan.dry_run = true;
    lab.admin().await.rotate_trust(plan).await.unwrap();
    assert_eq!(words(&lab).await, "signing", "a plan changes nothing");

    let started = rotate(&lab, "start").await.unwrap();
    assert_eq!((started.step.as_str(), started.next.len()), ("started", 2));
    for _ in 0..2 {
        assert_eq!(words(&lab).await, "signing coming");
        assert_eq!(told(&lab).roots().len(), 2);
        assert_eq!(told(&lab).roots()[0], old.roots()[0]);
        lab.shut_down().await;
        lab.boot().await;
    }
    // Back, and once more.
    rotate(&lab, "abort").await.unwrap();
    assert_eq!((words(&lab).await.as_str(), told(&lab)), ("signing", old.clone()));
    rotate(&lab, "start").await.unwrap();
    // An enrolled host that is not there holds nothing up; it is named.
    let status = shown(&lab).await.rotation.unwrap();
    assert_eq!((status.away.len(), status.blockers.len()), (1, 0), "{status:?}");

    rotate(&lab, "switch").await.unwrap();
    for _ in 0..2 {
        assert_eq!(words(&lab).await, "signing leaving");
        assert_eq!(told(&lab).roots()[1], old.roots()[0]);
        lab.shut_down().await;
        lab.boot().await;
    }
    let mesh = lab
        .admin()
        .await
        .mesh(admin::MeshRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(mesh.root_pin, root_pin(&told(&lab).roots()[0]).unwrap());
    // Its certificate is of the old root: finish waits for it. It knows only the old root, and renews by that.
    let refused = rotate(&lab, "finish").await.unwrap_err();
    assert!(
        refused.message().contains("TMB0802") && refused.message().contains("shop/catalog-"),
        "{refused}"
    );
    host.new_csr();
    host.renew(&lab, 2).await.unwrap();
    assert_eq!(
        host.identity.as_ref().unwrap().chain().len(),
        2,
        "the old root's signature is sent along"
    );

    rotate(&lab, "finish").await.unwrap();
    for _ in 0..2 {
        assert_eq!(words(&lab).await, "signing retired");
        assert_eq!((told(&lab).roots().len(), told(&lab).retired().len()), (1, 1));
        lab.shut_down().await;
        lab.boot().await;
    }
    assert!(!lab.config.state_dir.join("ca").exists(), "the old key is gone");
    // Who was away all the time follows still.
    host.new_csr();
    host.renew(&lab, 3).await.unwrap();
    rotate(&lab, "cut").await.unwrap();
    assert_eq!(words(&lab).await, "signing");
    let audit = lab.audit_log();
    for verb in [
        "rotate-start",
        "rotate-abort",
        "rotate-switch",
        "rotate-finish",
        "rotate-cut",
    ] {
        assert!(audit.contains(verb), "{verb}: {audit}");
    }
    assert!(audit.contains("TMB0802"), "{audit}");
    // And again from there.
    rotate(&lab, "start").await.unwrap();
    rotate(&lab, "switch").await.unwrap();
    assert_eq!(words(&lab).await, "signing leaving");
    host.new_csr();
    host.renew(&lab, 4).await.unwrap();
    assert_eq!(
        host.identity.as_ref().unwrap().chain().len(),
        3,
        "over two roots to the first one"
    );
}

#[tokio::test]
async fn a_step_is_forced_by_name_and_tokens_end_with_the_root() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let mut host = lab.enrol("catalog").await;
    let token = lab.token("catalog", |_| ()).await;
    rotate(&lab, "start").await.unwrap();
    rotate(&lab, "switch").await.unwrap();
    // A token of before the switch leads here until finish: by the old root, which is all that its holder believes.
    let mut other = Host::new();
    other.enrol(&lab, &token).await.unwrap();
    let _unused = lab.token("catalog", |_| ()).await;
    rotate(&lab, "finish").await.unwrap_err();
    rotate_with(&lab, "finish", true).await.unwrap();
    assert!(lab.audit_log().contains("rotate-finish --force"));
    // Left behind with a certificate that nobody believes any more, it still has its device key.
    host.new_csr();
    host.renew(&lab, 2).await.unwrap();
}
