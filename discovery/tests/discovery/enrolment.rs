use crate::lab::*;
use serde_json::json;
use tombolo_identity::proof;
use tombolo_proto::tombolo::{
    admin::v1 as admin,
    v1::{self as pb, enrollment_client::EnrollmentClient},
};

fn code(result: Result<(), tonic::Status>) -> String {
    result
        .expect_err("refused")
        .message()
        .split(' ')
        .next()
        .unwrap()
        .to_owned()
}

#[tokio::test]
async fn a_host_enrols() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let r = &host.registration;
    assert_eq!(
        (r.namespace.as_str(), r.service_account.as_str(), r.generation),
        ("shop", "catalog", 1)
    );
    assert_eq!(r.workload_name, format!("catalog-{}", r.device_id));
    assert_eq!(r.hostnames, ["catalog.shop.svc.mesh.internal"]);
    assert_eq!(r.vip_prefixes, ["240.240.0.0/16", "2001:2::/48"]);
    let identity = host.identity.as_ref().unwrap();
    assert_eq!(
        identity.id().to_string(),
        "spiffe://mesh.example/ns/shop/sa/catalog"
    );
    assert_eq!(identity.device().unwrap().to_string(), r.device_id);
    let entry = lab.get("WorkloadEntry", &r.workload_name).await.unwrap();
    assert_eq!(entry["spec"]["address"], "10.1.2.3");
    assert_eq!(entry["spec"]["labels"]["networking.istio.io/tunnel"], "http");
    assert_eq!(
        entry["metadata"]["annotations"]["istio.io/autoRegistrationGroup"],
        "catalog"
    );
    let vms = lab.vms().await;
    assert_eq!(
        (vms.len(), vms[0].state.as_str(), vms[0].connected),
        (1, "Away", false),
        "its agent has not connected"
    );
    assert!(lab.audit_log().contains(r#""verb":"enroll""#));
    assert!(host.warnings.is_empty(), "{:?}", host.warnings);
}

#[tokio::test]
async fn refused_tokens_each_with_its_own_code_and_nothing_half_done() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let token = lab.token("catalog", |_| ()).await;
    // A token that was never made here.
    let stranger = Token {
        id: [9; 16],
        key: tombolo_identity::JoinKey::from_seed(&[9; 32]),
    };
    assert_eq!(code(Host::new().enrol(&lab, &stranger).await), "TMB0104");
    // The right id, another seed.
    let forged = Token {
        id: token.id,
        key: tombolo_identity::JoinKey::from_seed(&[9; 32]),
    };
    assert_eq!(code(Host::new().enrol(&lab, &forged).await), "TMB0106");
    // A proof that was made for another connection.
    let host = Host::new();
    let ((_, other), (channel, _)) = (lab.dial(None).await, lab.dial(None).await);
    let replayed = EnrollmentClient::new(channel)
        .enroll(host.request(&token, &other))
        .await;
    assert_eq!(code(replayed.map(drop)), "TMB0106");
    // From outside of its CIDRs.
    let elsewhere = lab
        .token("catalog", |spec| spec["cidr"] = json!(["192.0.2.0/24"]))
        .await;
    assert_eq!(code(Host::new().enrol(&lab, &elsewhere).await), "TMB0105");
    let here = lab
        .token("catalog", |spec| spec["cidr"] = json!(["127.0.0.0/8"]))
        .await;
    Host::new().enrol(&lab, &here).await.unwrap();
    // Deleted by its maker.
    let mut admin = lab.admin().await;
    let delete = admin::DeleteRequest {
        kind: "JoinToken".into(),
        namespace: SHOP.into(),
        name: token.name(),
        dry_run: false,
    };
    admin.delete(delete).await.unwrap();
    assert_eq!(code(Host::new().enrol(&lab, &token).await), "TMB0104");
    assert_eq!(lab.vms().await.len(), 1, "only the one that was let in");
    let log = lab.audit_log();
    for wanted in ["TMB0104", "TMB0105", "TMB0106"] {
        assert!(log.contains(wanted), "{wanted} is audited");
    }
}

#[tokio::test]
async fn an_expired_token() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let soon = (jiff::Timestamp::now() + std::time::Duration::from_millis(1500)).to_string();
    let token = lab.token("catalog", |spec| spec["expires"] = json!(soon)).await;
    tokio::time::sleep(std::time::Duration::from_millis(1600)).await; // the token's own clock
    assert_eq!(code(Host::new().enrol(&lab, &token).await), "TMB0102");
}

#[tokio::test]
async fn a_lost_answer_burns_no_use_and_a_spent_token_admits_no_other() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let token = lab.token("catalog", |_| ()).await;
    let mut host = Host::new();
    host.enrol(&lab, &token).await.unwrap();
    let (device, serial) = (host.registration.device_id.clone(), host.serial());
    host.enrol(&lab, &token).await.unwrap();
    assert_eq!(
        (&host.registration.device_id, host.serial()),
        (&device, serial),
        "the same certificate"
    );
    // Killed before it kept its TLS key: a new request, the same device.
    host.new_csr();
    host.enrol(&lab, &token).await.unwrap();
    assert_eq!(host.registration.device_id, device);
    assert_eq!(code(Host::new().enrol(&lab, &token).await), "TMB0103");
    assert_eq!(lab.vms().await.len(), 1);
    assert!(lab.audit_log().contains("TMB0103"));
    let stored = lab.get("JoinToken", &token.name()).await.unwrap();
    assert_eq!(stored["status"]["used"].as_array().unwrap().len(), 1);
    // After it has renewed, whoever comes with the spent token and its key is a copy.
    host.new_csr();
    host.renew(&lab, 2).await.unwrap();
    assert_eq!(code(host.enrol(&lab, &token).await), "TMB0121");
}

#[tokio::test]
async fn many_at_once_never_overspend_a_token() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let token = lab.token("catalog", |spec| spec["uses"] = json!(3)).await;
    let tries = (0..8).map(|_| async {
        let mut host = Host::new();
        host.enrol(&lab, &token).await
    });
    let results = futures_util::future::join_all(tries).await;
    let ok = results.iter().filter(|result| result.is_ok()).count();
    assert_eq!((ok, lab.vms().await.len()), (3, 3));
    for refused in results.into_iter().filter(Result::is_err) {
        assert_eq!(code(refused), "TMB0103");
    }
}

#[tokio::test]
async fn same_address_and_hostname_twice_are_two_machines() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let first = lab.enrol("catalog").await;
    let _stream = {
        let mut ads = first.ads(&lab).await;
        ads.subscribe(tombolo_proto::type_url::ADDRESS).await;
        ads.next().await.unwrap();
        ads
    };
    let second = lab.enrol("catalog").await;
    assert_ne!(first.registration.device_id, second.registration.device_id);
    assert!(
        second
            .warnings
            .iter()
            .any(|warning| warning.starts_with("TMB0130")),
        "{:?}",
        second.warnings
    );
    let entry = lab
        .get("WorkloadEntry", &second.registration.workload_name)
        .await
        .unwrap();
    assert!(entry["spec"]["address"].is_null(), "{entry}");
    assert_eq!(entry["status"]["addressCandidates"], json!(["10.1.2.3"]));
    let vms = lab.vms().await;
    let vm = vms
        .iter()
        .find(|vm| vm.device_id == second.registration.device_id)
        .unwrap();
    assert!(
        vm.conditions
            .iter()
            .any(|c| c.r#type == "AddressConflict" && c.reason == "TMB0130"),
        "{vm:?}"
    );
}

#[tokio::test]
async fn renewals_lost_answers_clones_and_readmission() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let mut host = lab.enrol("catalog").await;
    let device = host.registration.device_id.clone();
    host.new_csr();
    host.renew(&lab, 2).await.unwrap();
    assert_eq!(host.registration.generation, 2);
    let serial = host.serial();
    host.renew(&lab, 2).await.unwrap();
    assert_eq!(host.serial(), serial, "the lost answer again");
    // A restored disk: another key at a used generation.
    let (kept, registration) = (
        std::mem::replace(&mut host.csr, tombolo_identity::generate_csr(None).unwrap()),
        host.registration.clone(),
    );
    assert_eq!(code(host.renew(&lab, 2).await), "TMB0121");
    assert_eq!(code(host.renew(&lab, 1).await), "TMB0121");
    let vm = lab.vms().await.remove(0);
    assert!(vm.conditions.iter().any(|c| c.r#type == "CloneRefused"));
    // The one that was first goes on, and the copy stays out.
    let copy = std::mem::replace(&mut host.csr, kept);
    host.registration = registration;
    host.new_csr();
    host.renew(&lab, 3).await.unwrap();
    // Its operator says that the copy is the right one.
    host.csr = copy;
    let mut admin = lab.admin().await;
    assert_eq!(code(host.renew(&lab, 2).await), "TMB0121");
    admin
        .readmit_vm(admin::ReadmitVmRequest { vm: device.clone() })
        .await
        .unwrap();
    host.renew(&lab, 2).await.unwrap();
    assert_eq!(
        host.registration.generation, 4,
        "past everything that was given out"
    );
    // Now the other one is the clone.
    host.new_csr();
    assert_eq!(code(host.renew(&lab, 4).await), "TMB0121");
    assert!(
        admin
            .readmit_vm(admin::ReadmitVmRequest { vm: "no/such".into() })
            .await
            .is_err()
    );
    // Somebody else's key proves nothing.
    host.key = tombolo_identity::DeviceKey::generate().unwrap();
    assert_eq!(code(host.renew(&lab, 5).await), "TMB0106");
    host.registration.device_id = "00000000000000ff".into();
    assert_eq!(code(host.renew(&lab, 5).await), "TMB0122");
}

#[tokio::test]
async fn revoked_is_refused_everywhere_at_once() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let (mut guilty, innocent) = (lab.enrol("catalog").await, lab.enrol("catalog").await);
    let mut streams = Vec::new();
    for host in [&guilty, &innocent] {
        let mut ads = host.ads(&lab).await;
        ads.subscribe(tombolo_proto::type_url::REVOCATIONS).await;
        ads.next().await.unwrap();
        streams.push(ads);
    }
    let device = guilty.registration.device_id.clone();
    let start = std::time::Instant::now();
    let revoke = admin::RevokeVmRequest {
        vm: device.clone(),
        reason: "stolen".into(),
    };
    lab.admin().await.revoke_vm(revoke).await.unwrap();
    // The other is told, the one itself is cut (it may be told first).
    let told = streams[1].next().await.unwrap();
    let set: pb::Revocations = tombolo_proto::unpack(told.resources[0].resource.as_ref().unwrap()).unwrap();
    assert_eq!(
        set.device_ids
            .iter()
            .map(|id| format!("{id:016x}"))
            .collect::<Vec<_>>(),
        std::slice::from_ref(&device)
    );
    let ended = loop {
        match streams[0].next().await {
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    assert!(ended.message().starts_with("TMB0120"), "{ended:?}");
    assert!(
        start.elapsed() < std::time::Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    guilty.new_csr();
    assert_eq!(code(guilty.renew(&lab, 2).await), "TMB0120");
    let token = lab.token("catalog", |_| ()).await;
    assert_eq!(
        code(guilty.enrol(&lab, &token).await),
        "TMB0120",
        "not with a new token either"
    );
    assert!(streams[1].is_quiet().await, "the innocent lives on");
    let states: Vec<String> = lab
        .vms()
        .await
        .into_iter()
        .filter(|vm| vm.device_id == device)
        .map(|vm| vm.state)
        .collect();
    assert_eq!(states, ["Revoked"]);
    // Deleted, it may enrol anew; its old certificates stay refused.
    lab.admin()
        .await
        .delete_vm(admin::DeleteVmRequest { vm: device.clone() })
        .await
        .unwrap();
    assert!(lab.running().fleet.is_revoked(device.parse().unwrap()));
    guilty.enrol(&lab, &token).await.unwrap();
    assert_ne!(guilty.registration.device_id, device);
}

#[tokio::test]
async fn leaving_removes_everything() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let device = host.registration.device_id.parse().unwrap();
    let (channel, exporter) = lab.dial(None).await;
    let mut client = EnrollmentClient::new(channel);
    let request = |signature| pb::LeaveRequest {
        device_id: host.registration.device_id.clone(),
        device_signature: signature,
        ..Default::default()
    };
    let other = tombolo_identity::DeviceKey::generate().unwrap();
    let message = proof::leave(&exporter, device);
    let refused = client.leave(request(other.sign(&message))).await;
    assert_eq!(code(refused.map(drop)), "TMB0106");
    client.leave(request(host.key.sign(&message))).await.unwrap();
    assert!(lab.vms().await.is_empty());
    assert_eq!(
        lab.get("WorkloadEntry", &host.registration.workload_name)
            .await
            .unwrap_err()
            .code(),
        tonic::Code::NotFound
    );
}

#[tokio::test]
async fn everything_survives_a_restart() {
    let mut lab = Lab::start().await;
    lab.group("catalog").await;
    let mut host = lab.enrol("catalog").await;
    let vip = lab.get("ServiceEntry", "catalog").await.unwrap()["status"]["addresses"].clone();
    assert_eq!(vip.as_array().unwrap().len(), 2, "{vip}");
    lab.shut_down().await;
    lab.boot().await;
    assert_eq!(
        lab.get("ServiceEntry", "catalog").await.unwrap()["status"]["addresses"],
        vip
    );
    host.new_csr();
    host.renew(&lab, 2).await.unwrap();
    let mut ads = host.ads(&lab).await;
    ads.subscribe(tombolo_proto::type_url::ADDRESS).await;
    assert_eq!(ads.next().await.unwrap().resources.len(), 2);
}

#[tokio::test]
async fn preflight_says_what_it_is() {
    let lab = Lab::start().await;
    let (channel, _) = lab.dial(None).await;
    let answer = EnrollmentClient::new(channel)
        .preflight(pb::PreflightRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (answer.trust_domain.as_str(), answer.mesh_domain.as_str()),
        ("mesh.example", "mesh.internal")
    );
    assert!((answer.server_time_unix_ms - jiff::Timestamp::now().as_millisecond()).abs() < 5_000);
}
