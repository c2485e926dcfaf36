use crate::lab::*;
use std::{collections::BTreeSet, time::Duration};
use tombolo_proto::{google::rpc::Status, type_url, xds::DeltaDiscoveryRequest};

fn names(response: &tombolo_proto::xds::DeltaDiscoveryResponse) -> BTreeSet<&str> {
    response
        .resources
        .iter()
        .map(|resource| resource.name.as_str())
        .collect()
}

#[tokio::test]
async fn a_stranger_is_ready_without_a_single_resource() {
    let lab = Lab::start().await;
    let bearer = bearer(&lab, "shop", "x").await;
    let (channel, _) = lab.dial(None).await;
    // As ztunnel on a VM: no NAMESPACE, both types at once.
    let mut ads = Ads::open(channel, node(&[("NAMESPACE", "")]), Some(&bearer)).await;
    ads.node_id("ztunnel~1.1.1.1~.~.svc.cluster.local");
    ads.subscribe(type_url::ADDRESS).await;
    ads.subscribe(type_url::AUTHORIZATION).await;
    let mut types = BTreeSet::new();
    for _ in 0..2 {
        let response = ads.next().await.unwrap();
        assert!(!response.nonce.is_empty());
        // As istiod: the policy that strict workloads name is always there.
        let mut found = names(&response);
        found.remove("istio-system/istio_converted_static_strict");
        assert_eq!(found, BTreeSet::new(), "{}", response.type_url);
        types.insert(response.type_url);
    }
    assert_eq!(types.len(), 2);
}

pub(crate) async fn bearer(lab: &Lab, namespace: &str, account: &str) -> String {
    let request = tombolo_proto::tombolo::admin::v1::CreateBearerRequest {
        namespace: namespace.into(),
        service_account: account.into(),
        ttl_seconds: 0,
        all_roots: false,
    };
    lab.admin()
        .await
        .create_bearer(request)
        .await
        .unwrap()
        .into_inner()
        .token
}

#[tokio::test]
async fn who_is_not_who_it_says_is_refused() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let refused = async |node, bearer: Option<&str>, identity| {
        let (channel, _) = lab.dial(identity).await;
        let mut ads = Ads::open(channel, node, bearer).await;
        ads.subscribe(type_url::ADDRESS).await;
        ads.next().await.unwrap_err().code()
    };
    let token = bearer(&lab, "shop", "x").await;
    assert_eq!(
        refused(node(&[("NAMESPACE", "other")]), Some(&token), None).await,
        tonic::Code::PermissionDenied
    );
    let other = node(&[("NAMESPACE", "shop"), ("NAME", "payments-1")]);
    assert_eq!(
        refused(other, None, host.identity.clone()).await,
        tonic::Code::PermissionDenied
    );
}

#[tokio::test]
async fn wildcard_updates_and_removals() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    let first = ads.next().await.unwrap();
    let uid = format!(
        "Kubernetes/networking.istio.io/WorkloadEntry/shop/{}",
        host.registration.workload_name
    );
    // Its own stream has made it healthy, in this response or the next one.
    assert!(
        names(&first).contains("shop/catalog.shop.svc.mesh.internal") && names(&first).contains(uid.as_str())
    );
    lab.group("payments").await;
    let update = loop {
        let update = ads.next().await.unwrap();
        if names(&update).contains("shop/payments.shop.svc.mesh.internal") {
            break update;
        }
    };
    assert!(
        !names(&update).contains("shop/catalog.shop.svc.mesh.internal"),
        "only what changed"
    );
    let delete = tombolo_proto::tombolo::admin::v1::DeleteRequest {
        kind: "ServiceEntry".into(),
        namespace: SHOP.into(),
        name: "payments".into(),
        dry_run: false,
    };
    lab.admin().await.delete(delete).await.unwrap();
    assert_eq!(
        ads.next().await.unwrap().removed_resources,
        ["shop/payments.shop.svc.mesh.internal"]
    );
}

#[tokio::test]
async fn a_reconnect_gets_only_the_difference() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    let mut held = std::collections::HashMap::new();
    let first = ads.next().await.unwrap();
    held.extend(
        first
            .resources
            .iter()
            .map(|r| (r.name.clone(), r.version.clone())),
    );
    while !ads.is_quiet().await {}
    held.insert("shop/gone.example".into(), "1".into());
    let service = "shop/catalog.shop.svc.mesh.internal";
    let mut again = host.ads(&lab).await;
    again
        .send(DeltaDiscoveryRequest {
            type_url: type_url::ADDRESS.into(),
            initial_resource_versions: held,
            ..Default::default()
        })
        .await;
    let response = again.next().await.unwrap();
    assert_eq!(response.removed_resources, ["shop/gone.example"]);
    assert!(!names(&response).contains(service), "{:?}", names(&response));
}

#[tokio::test]
async fn a_refusal_is_shown_and_not_answered() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::AUTHORIZATION).await;
    ads.next().await.unwrap();
    lab.apply(&[policy("p")]).await.unwrap();
    let response = ads.unacknowledged().await.unwrap();
    assert_eq!(names(&response), BTreeSet::from(["shop/p"]));
    ads.send(DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        error_detail: Some(Status {
            code: 0,
            message: "shop/p: cannot be read".into(),
            ..Default::default()
        }),
        ..Default::default()
    })
    .await;
    assert!(ads.is_quiet().await);
    let shown = http_get(lab.running().debug_address.unwrap(), "/debug/subscribers").await;
    assert!(shown.contains("shop/p: cannot be read"), "{shown}");
    let metrics = http_get(lab.running().debug_address.unwrap(), "/metrics").await;
    assert!(metrics.contains("tombolo_discovery_nacks_total 1"), "{metrics}");
}

#[tokio::test]
async fn a_client_that_does_not_acknowledge_gets_one_answer_and_then_the_latest() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::AUTHORIZATION).await;
    let pending = ads.unacknowledged().await.unwrap();
    for round in 0..20 {
        lab.apply(&[policy(&format!("p{}", round % 4))]).await.unwrap();
    }
    assert!(
        ads.is_quiet().await,
        "nothing is sent while a response is under way"
    );
    ads.ack(&pending).await;
    let latest = ads.next().await.unwrap();
    assert_eq!(latest.resources.len(), 4);
    assert!(ads.is_quiet().await);
}

#[tokio::test]
async fn a_burst_of_changes_is_one_push() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::AUTHORIZATION).await;
    ads.next().await.unwrap();
    let batch: Vec<_> = (0..50).map(|i| policy(&format!("p{i}"))).collect();
    lab.apply(&batch).await.unwrap();
    let response = ads.next().await.unwrap();
    assert_eq!(response.resources.len(), 50);
}

#[tokio::test]
async fn exposure_is_served_to_its_own_workload_only() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    lab.group("payments").await;
    let (catalog, payments) = (lab.enrol("catalog").await, lab.enrol("payments").await);
    let own = format!("shop/{}", catalog.registration.workload_name);
    let other = format!("shop/{}", payments.registration.workload_name);
    let mut ads = catalog.ads(&lab).await;
    ads.subscribe(type_url::EXPOSURE).await;
    assert_eq!(names(&ads.next().await.unwrap()), BTreeSet::from([own.as_str()]));
    let mut ads = catalog.ads(&lab).await;
    let subscribe = vec![own.clone(), other.clone()];
    ads.send(DeltaDiscoveryRequest {
        type_url: type_url::EXPOSURE.into(),
        resource_names_subscribe: subscribe,
        ..Default::default()
    })
    .await;
    let response = ads.next().await.unwrap();
    assert_eq!(names(&response), BTreeSet::from([own.as_str()]));
    assert_eq!(response.removed_resources, [other]);
}

#[tokio::test]
async fn on_demand_by_address() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let vip = lab.get("ServiceEntry", "catalog").await.unwrap()["status"]["addresses"][0]["value"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut ads = host.ads(&lab).await;
    let star = || vec!["*".to_owned()];
    ads.send(DeltaDiscoveryRequest {
        type_url: type_url::ADDRESS.into(),
        resource_names_subscribe: star(),
        resource_names_unsubscribe: star(),
        ..Default::default()
    })
    .await;
    assert!(ads.next().await.unwrap().resources.is_empty());
    let key = format!("/{vip}");
    ads.send(DeltaDiscoveryRequest {
        type_url: type_url::ADDRESS.into(),
        resource_names_subscribe: vec![key.clone(), "/192.0.2.9".into()],
        ..Default::default()
    })
    .await;
    let response = ads.next().await.unwrap();
    let found = names(&response);
    assert!(
        found.contains(key.as_str()) && found.contains("shop/catalog.shop.svc.mesh.internal"),
        "{found:?}"
    );
    assert_eq!(response.removed_resources, ["/192.0.2.9"]);
}

#[tokio::test]
async fn state_of_the_world_is_declined_politely() {
    use tombolo_proto::xds::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
    let lab = Lab::start().await;
    let (channel, _) = lab.dial(None).await;
    let status = AggregatedDiscoveryServiceClient::new(channel)
        .stream_aggregated_resources(tokio_stream::pending())
        .await
        .map(drop)
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unimplemented);
    assert!(status.message().contains("DeltaAggregatedResources"));
}

#[tokio::test]
async fn readiness_and_debug() {
    let mut lab = Lab::start().await;
    let (debug, ready) = (
        lab.running().debug_address.unwrap(),
        lab.running().readiness_address.unwrap(),
    );
    assert!(
        http_get(ready, "/healthz/ready")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(
        http_get(debug, "/debug/world")
            .await
            .contains("istio.workload.Address")
    );
    assert!(http_get(ready, "/debug/world").await.starts_with("HTTP/1.1 404"));
    let start = std::time::Instant::now();
    lab.shut_down().await;
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "a stop does not wait for streams"
    );
}
