//! What an enrolled device may do and hold beside its control stream: metrics, connections, streams, virtual addresses.

use crate::lab::*;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tombolo_proto::{
    tombolo::v1::{
        PushMetricsRequest, enrollment_client::EnrollmentClient, telemetry_client::TelemetryClient,
    },
    type_url,
    xds::{DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient},
};
use tonic::transport::Channel;

async fn http(lab: &Lab, path: &str) -> String {
    let mut socket = tokio::net::TcpStream::connect(lab.running().debug_address.unwrap())
        .await
        .unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn push(client: &mut TelemetryClient<Channel>, text: &str) -> Result<bool, tonic::Status> {
    let request = PushMetricsRequest {
        exposition: text.into(),
        unchanged: text.is_empty(),
    };
    Ok(client.push_metrics(request).await?.into_inner().resend)
}

#[tokio::test]
async fn a_device_pushes_its_own_metrics_and_nobody_elses() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let (a, b) = (lab.enrol("catalog").await, lab.enrol("catalog").await);
    let (channel, _) = lab.dial(a.identity.clone()).await;
    let mut client = TelemetryClient::new(channel);
    assert!(
        push(&mut client, "").await.unwrap(),
        "nothing is held yet: send the text"
    );
    let text = "# TYPE x counter\nx_total{namespace=\"payments\"} 7\n# EOF\n";
    assert!(!push(&mut client, text).await.unwrap());
    assert!(!push(&mut client, "").await.unwrap());
    let page = |host: &Host| format!("/metrics/vm/shop/{}", host.registration.workload_name);
    let answer = http(&lab, &page(&a)).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("x_total{namespace=\"payments\"} 7\n"),
        "{answer}"
    );
    assert!(http(&lab, &page(&b)).await.starts_with("HTTP/1.1 404"));
    let list = http(&lab, "/http_sd").await;
    let list: Value = serde_json::from_str(list.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 1);
    // Whose they are says the certificate: what a text says of itself is not a label of the target.
    assert_eq!(list[0]["labels"]["namespace"], "shop");
    assert_eq!(
        list[0]["targets"][0],
        lab.running().debug_address.unwrap().to_string()
    );

    for (bad, code) in [
        ("garbage".to_owned(), "TMB0603"),
        ("x 1 123\n".to_owned(), "TMB0603"),
        ("x 1\n".repeat((256 << 10) / 4 + 1), "TMB0603"),
        ("x 1\n".repeat(1 << 20), ""), // longer than is read at all
    ] {
        let refused = push(&mut client, &bad).await.unwrap_err();
        assert!(refused.message().contains(code), "{refused:?}");
    }
    assert!(
        http(&lab, &page(&a)).await.contains("x_total"),
        "what was good stays"
    );
    // Who shows no certificate, or one without a device, pushes nothing.
    let (stranger, _) = lab.dial(None).await;
    let refused = push(&mut TelemetryClient::new(stranger), "x 1\n")
        .await
        .unwrap_err();
    assert!(refused.message().contains("TMB0205"), "{refused:?}");
    let metrics = http(&lab, "/metrics").await;
    assert!(
        metrics.contains("tombolo_discovery_metrics_members 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_device_holds_a_few_connections_and_streams_and_is_told_so() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let (host, other) = (lab.enrol("catalog").await, lab.enrol("catalog").await);
    let mut held = Vec::new();
    for _ in 0..8 {
        let (channel, _) = lab.dial(host.identity.clone()).await;
        push(&mut TelemetryClient::new(channel.clone()), "x 1\n")
            .await
            .unwrap();
        held.push(channel);
    }
    let (ninth, _) = lab.dial(host.identity.clone()).await;
    let refused = push(&mut TelemetryClient::new(ninth.clone()), "x 1\n")
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    assert!(refused.message().contains("TMB0604"), "{refused:?}");
    // The device key still gets a certificate: that is how a device recovers.
    let preflight = EnrollmentClient::new(ninth)
        .preflight(tombolo_proto::tombolo::v1::PreflightRequest::default())
        .await;
    preflight.unwrap();
    let (channel, _) = lab.dial(other.identity.clone()).await;
    push(&mut TelemetryClient::new(channel), "x 1\n").await.unwrap();

    let open = async |channel: &Channel| {
        let first = DeltaDiscoveryRequest {
            node: Some(host.node()),
            type_url: type_url::ADDRESS.into(),
            ..Default::default()
        };
        // The stream ends when the sender is dropped.
        let (requests_tx, requests) = tokio::sync::mpsc::channel(1);
        requests_tx.send(first).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(channel.clone());
        client
            .delta_aggregated_resources(tokio_stream::wrappers::ReceiverStream::new(requests))
            .await
            .map(|answer| (answer.into_inner(), requests_tx))
    };
    let mut streams = Vec::new();
    for channel in held.iter().take(4) {
        let mut stream = open(channel).await.unwrap();
        stream.0.message().await.unwrap().unwrap();
        streams.push(stream);
    }
    let refused = open(&held[0]).await.map(drop).unwrap_err();
    assert!(refused.message().contains("TMB0604"), "{refused:?}");
    drop(streams);
    lab.wait_for("the places to be given back", async || {
        open(&held[0]).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn an_address_of_a_deleted_service_is_not_given_again_after_a_restart() {
    let mut lab = Lab::start().await;
    let vip = async |lab: &Lab, name: &str| {
        let mut found = Value::Null;
        lab.wait_for("an address", async || {
            found = lab.get("ServiceEntry", name).await.unwrap()["status"]["addresses"][0]["value"].clone();
            found.is_string()
        })
        .await;
        found
    };
    lab.group("first").await;
    lab.group("second").await;
    let deleted = [vip(&lab, "first").await, vip(&lab, "second").await];
    for name in ["first", "second"] {
        let request = tombolo_proto::tombolo::admin::v1::DeleteRequest {
            kind: "ServiceEntry".into(),
            namespace: SHOP.into(),
            name: name.into(),
            dry_run: false,
        };
        lab.admin().await.delete(request).await.unwrap();
    }
    lab.shut_down().await;
    lab.boot().await;
    lab.group("third").await;
    let given = vip(&lab, "third").await;
    assert!(
        !deleted.contains(&given),
        "{given} was that of a deleted service {deleted:?}"
    );
}

#[tokio::test]
async fn preflight_says_what_a_token_is_good_for() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let token = lab.token("catalog", |spec| spec["uses"] = json!(5)).await;
    Host::new().enrol(&lab, &token).await.unwrap();
    let (channel, _) = lab.dial(None).await;
    let mut client = EnrollmentClient::new(channel);
    let mut facts = async |id: &[u8]| {
        let request = tombolo_proto::tombolo::v1::PreflightRequest {
            token_id: id.to_vec(),
            ..Default::default()
        };
        client.preflight(request).await.unwrap().into_inner().token
    };
    let found = facts(&token.id).await.unwrap();
    assert_eq!((found.uses, found.used), (5, 1));
    let life = Duration::from_millis((found.expires_unix_ms - found.created_unix_ms) as u64);
    assert!(
        life > Duration::from_secs(890) && life <= Duration::from_secs(900),
        "{life:?}"
    );
    for unknown in [&[0; 16][..], &[], &token.id[1..]] {
        assert!(facts(unknown).await.is_none());
    }
}
