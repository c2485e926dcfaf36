use crate::lab::*;
use serde_json::{Value, json};
use tombolo_proto::tombolo::admin::v1::{self as admin, admin_client::AdminClient};

#[tokio::test]
async fn apply_creates_configures_and_leaves_alone() {
    let lab = Lab::start().await;
    let outcome = async |object: Value| {
        let response = lab.apply(&[object]).await.unwrap();
        response
            .applied
            .into_iter()
            .map(|applied| applied.outcome)
            .collect::<Vec<_>>()
    };
    assert_eq!(outcome(service("catalog")).await, ["created"]);
    assert_eq!(outcome(service("catalog")).await, ["unchanged"]);
    let before = lab.get("ServiceEntry", "catalog").await.unwrap();
    let mut changed = service("catalog");
    changed["spec"]["ports"][0]["targetPort"] = json!(9090);
    assert_eq!(outcome(changed).await, ["configured"]);
    let after = lab.get("se", "catalog").await.unwrap();
    assert_eq!(
        after["status"], before["status"],
        "a change keeps the virtual addresses"
    );
    assert_eq!(after["metadata"]["uid"], before["metadata"]["uid"]);
    assert_ne!(
        after["metadata"]["resourceVersion"],
        before["metadata"]["resourceVersion"]
    );
    assert_eq!(after["metadata"]["generation"], json!(2));
    // What was read and not changed applies again.
    assert_eq!(outcome(after).await, ["unchanged"]);
}

#[tokio::test]
async fn a_batch_is_all_or_nothing() {
    let lab = Lab::start().await;
    let mut bad = service("bad");
    bad["spec"]["prots"] = json!([]);
    let status = lab.apply(&[group("catalog"), bad]).await.unwrap_err();
    assert!(
        status.message().starts_with("TMB0201") && status.message().contains("ports"),
        "{status:?}"
    );
    assert_eq!(
        lab.get("WorkloadGroup", "catalog").await.unwrap_err().code(),
        tonic::Code::NotFound
    );
    assert!(
        lab.apply(&[group("catalog"), group("catalog")]).await.is_err(),
        "twice the same"
    );
}

#[tokio::test]
async fn a_name_that_is_not_there_is_answered_with_the_nearest() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let status = lab.get("WorkloadGroup", "catlog").await.unwrap_err();
    assert!(status.message().contains("did you mean catalog?"), "{status:?}");
    let mut client = lab.admin().await;
    let delete = |name: &str| admin::DeleteRequest {
        kind: "WorkloadGroup".into(),
        namespace: "shop".into(),
        name: name.into(),
        dry_run: false,
    };
    let status = client.delete(delete("catalogue")).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
    assert!(status.message().contains("did you mean catalog?"), "{status:?}");
    let status = client.delete(delete("payments")).await.unwrap_err();
    assert!(!status.message().contains("did you mean"), "{status:?}");
}

#[tokio::test]
async fn conflicts_dry_runs_and_create_only() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let mut stale = lab.get("WorkloadGroup", "catalog").await.unwrap();
    stale["metadata"]["resourceVersion"] = json!("999");
    stale["spec"]["template"]["weight"] = json!(7);
    let status = lab.apply(&[stale]).await.unwrap_err();
    assert!(status.message().starts_with("TMB0202"), "{status:?}");
    let mut client = lab.admin().await;
    let objects = vec![admin::Object {
        json: group("other").to_string(),
    }];
    let dry = admin::ApplyRequest {
        objects,
        dry_run: true,
        create_only: false,
    };
    assert_eq!(
        client.apply(dry).await.unwrap().into_inner().applied[0].outcome,
        "created"
    );
    assert!(lab.get("WorkloadGroup", "other").await.is_err());
    let objects = vec![admin::Object {
        json: group("catalog").to_string(),
    }];
    let create = admin::ApplyRequest {
        objects,
        dry_run: false,
        create_only: true,
    };
    assert!(
        client
            .apply(create)
            .await
            .unwrap_err()
            .message()
            .starts_with("TMB0204")
    );
}

#[tokio::test]
async fn rules_that_look_at_other_objects() {
    let lab = Lab::start().await;
    let token = object(
        "tombolo.io/v1",
        "JoinToken",
        &"a".repeat(32),
        json!({
            "publicKey": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "workloadGroup": "catalog", "uses": 1,
            "expires": (jiff::Timestamp::now() + std::time::Duration::from_secs(60)).to_string(),
        }),
    );
    assert!(
        lab.apply(std::slice::from_ref(&token)).await.is_err(),
        "no such group"
    );
    lab.apply(&[group("catalog"), token]).await.unwrap();
    let host = lab.enrol("catalog").await;
    let name = &host.registration.workload_name;
    let mut client = lab.admin().await;
    let mut delete = async |kind: &str, name: &str| {
        let request = admin::DeleteRequest {
            kind: kind.into(),
            namespace: SHOP.into(),
            name: name.into(),
            dry_run: false,
        };
        client.delete(request).await
    };
    let status = delete("WorkloadGroup", "catalog").await.unwrap_err();
    assert!(status.message().contains("1 members"), "{status:?}");
    assert!(
        delete("WorkloadEntry", name)
            .await
            .unwrap_err()
            .message()
            .contains("vm delete")
    );
    let mut entry = lab.get("WorkloadEntry", name).await.unwrap();
    entry["spec"]["serviceAccount"] = json!("payments");
    assert!(
        lab.apply(&[entry])
            .await
            .unwrap_err()
            .message()
            .contains("spec.serviceAccount")
    );
    lab.admin()
        .await
        .delete_vm(admin::DeleteVmRequest {
            vm: format!("shop/{name}"),
        })
        .await
        .unwrap();
    delete("WorkloadGroup", "catalog").await.unwrap();
    // Reserved namespaces, hosts of others, and hosts that agents need.
    let mut reserved = group("x");
    reserved["metadata"]["namespace"] = json!("tombolo-system");
    let status = lab.apply(&[reserved]).await.unwrap_err();
    assert!(status.message().starts_with("TMB0206"), "{status:?}");
    let mut theirs = service("x");
    theirs["spec"]["hosts"] = json!(["x.payments.svc.mesh.internal"]);
    assert!(lab.apply(&[theirs]).await.is_err());
    let mut ours = service("x");
    ours["spec"]["hosts"] = json!(["discovery.test"]);
    assert!(lab.apply(&[ours]).await.is_err());
    let device = object(
        "tombolo.io/v1",
        "Device",
        "0000000000000001",
        json!({
            "publicKey": "", "workloadGroup": "", "serviceAccount": "", "workloadEntry": "",
        }),
    );
    assert!(
        lab.apply(&[device]).await.is_err(),
        "devices are written by enrolment alone"
    );
}

#[tokio::test]
async fn lists_come_in_pages() {
    let lab = Lab::start().await;
    let batch: Vec<Value> = (0..25).map(|i| service(&format!("s{i:02}"))).collect();
    lab.apply(&batch).await.unwrap();
    let mut client = lab.admin().await;
    let (mut token, mut names, mut pages) = (String::new(), Vec::new(), 0);
    loop {
        let request = admin::ListRequest {
            kind: "se".into(),
            limit: 10,
            continue_token: token,
            ..Default::default()
        };
        let page = client.list(request).await.unwrap().into_inner();
        pages += 1;
        for item in page.items {
            let json: Value = serde_json::from_str(&item.json).unwrap();
            names.push(json["metadata"]["name"].as_str().unwrap().to_owned());
        }
        token = page.continue_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!((pages, names.len()), (3, 25));
    assert!(names.windows(2).all(|w| w[0] < w[1]), "each once, in order");
    let kind = admin::ListRequest {
        kind: "servicentry".into(),
        ..Default::default()
    };
    assert!(
        client
            .list(kind)
            .await
            .unwrap_err()
            .message()
            .contains("ServiceEntry")
    );
}

#[tokio::test]
async fn the_same_service_on_15012_is_for_operators_only() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    for identity in [None, host.identity.clone()] {
        let (channel, _) = lab.dial(identity).await;
        let mut client = AdminClient::new(channel);
        let status = client
            .list_vms(admin::ListVmsRequest::default())
            .await
            .unwrap_err();
        assert!(status.message().starts_with("TMB0205"), "{status:?}");
        let objects = vec![admin::Object {
            json: group("x").to_string(),
        }];
        let apply = admin::ApplyRequest {
            objects,
            ..Default::default()
        };
        assert!(
            client
                .apply(apply)
                .await
                .unwrap_err()
                .message()
                .starts_with("TMB0205")
        );
    }
    let log = lab.audit_log();
    assert!(
        log.contains("sa/catalog") && log.contains("TMB0205"),
        "refusals are audited with who it was"
    );
}

#[tokio::test]
async fn audit_and_health() {
    let mut lab = Lab::start().await;
    lab.group("catalog").await;
    lab.enrol("catalog").await;
    let mut client = lab.admin().await;
    let lines = client
        .audit(admin::AuditRequest::default())
        .await
        .unwrap()
        .into_inner()
        .lines;
    let lines: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let verbs: Vec<&str> = lines.iter().map(|line| line["verb"].as_str().unwrap()).collect();
    assert_eq!(verbs, ["init", "create", "create", "create", "enroll"]);
    assert!(lines[1]["who"].as_str().unwrap().starts_with("local user"));
    assert_eq!(lines[1]["after"].as_str().unwrap().len(), 64);
    let health = client.health(admin::HealthRequest {}).await.unwrap().into_inner();
    assert_eq!((health.vms, health.vms_connected), (1, 0));
    let mesh = client.mesh(admin::MeshRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (mesh.trust_domain.as_str(), mesh.root_pin.len()),
        ("mesh.example", 32)
    );
    // Started again, with a member that has not come back yet: nobody is taken out, and it is told why.
    drop(client);
    lab.shut_down().await;
    lab.boot().await;
    let health = lab
        .admin()
        .await
        .health(admin::HealthRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(
        health
            .conditions
            .iter()
            .any(|condition| condition.reason == "TMB0602"),
        "{:?}",
        health.conditions
    );
}
