use crate::lab::*;
use tombolo_proto::{google::rpc::Status, type_url, xds::DeltaDiscoveryRequest};

async fn state(lab: &Lab) -> (String, String) {
    let vm = lab.vms().await.remove(0);
    (vm.state, vm.reason)
}

fn health(message: Option<&str>) -> DeltaDiscoveryRequest {
    let error_detail = message.map(|message| Status {
        code: 13,
        message: message.into(),
        ..Default::default()
    });
    DeltaDiscoveryRequest {
        type_url: type_url::HEALTH.into(),
        error_detail,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_stream_and_its_probe_decide_health() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    assert_eq!(state(&lab).await.0, "Away", "its agent has not connected");
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    ads.next().await.unwrap();
    lab.wait_for("healthy", async || state(&lab).await.0 == "Healthy")
        .await;
    ads.send(health(Some("connection refused"))).await;
    lab.wait_for("unhealthy", async || state(&lab).await.0 == "Unhealthy")
        .await;
    assert!(state(&lab).await.1.contains("connection refused"));
    let entry = lab
        .get("WorkloadEntry", &host.registration.workload_name)
        .await
        .unwrap();
    assert_eq!(entry["status"]["conditions"][0]["status"], "False", "merged live");
    ads.send(health(None)).await;
    lab.wait_for("healthy again", async || state(&lab).await.0 == "Healthy")
        .await;
    // The stream is lost; nobody reached its endpoint before, so nobody takes it out.
    drop(ads);
    lab.wait_for("suspect", async || state(&lab).await.0 == "Suspect")
        .await;
    assert!(state(&lab).await.1.contains("control stream is lost"));
    // A stop on purpose holds until it is back.
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    ads.send(health(Some("draining"))).await;
    lab.wait_for("draining", async || state(&lab).await.0 == "Unhealthy")
        .await;
    drop(ads);
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    lab.wait_for("back", async || state(&lab).await.0 == "Healthy")
        .await;
}

#[tokio::test]
async fn a_group_with_a_probe_waits_for_its_first_report() {
    let lab = Lab::start().await;
    let mut probed = group("catalog");
    probed["spec"]["probe"] = serde_json::json!({ "tcpSocket": { "port": 8080 } });
    lab.apply(&[probed, service("catalog")]).await.unwrap();
    let host = lab.enrol("catalog").await;
    assert!(host.registration.probe_json.contains("tcpSocket"));
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    lab.wait_for("connected", async || lab.vms().await[0].connected)
        .await;
    assert_eq!(state(&lab).await.0, "Unhealthy");
    ads.send(health(None)).await;
    lab.wait_for("healthy", async || state(&lab).await.0 == "Healthy")
        .await;
}

#[tokio::test]
async fn health_survives_a_restart_without_being_in_the_store() {
    let mut lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let version = lab
        .get("WorkloadEntry", &host.registration.workload_name)
        .await
        .unwrap()["metadata"]["resourceVersion"]
        .clone();
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    ads.send(health(Some("disk full"))).await;
    lab.wait_for("unhealthy", async || state(&lab).await.0 == "Unhealthy")
        .await;
    lab.shut_down().await;
    lab.boot().await;
    assert_eq!(state(&lab).await.0, "Unhealthy", "the last known health");
    let entry = lab
        .get("WorkloadEntry", &host.registration.workload_name)
        .await
        .unwrap();
    assert_eq!(
        entry["metadata"]["resourceVersion"], version,
        "no heartbeat was written"
    );
}
