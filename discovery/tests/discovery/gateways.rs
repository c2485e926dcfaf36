//! Gateways: who may make them, what they may say, and how hosts reach discovery through them.

use crate::lab::*;
use tombolo_identity::JoinKey;
use tombolo_proto::tombolo::{
    admin::v1 as admin,
    v1::{self as pb, enrollment_client::EnrollmentClient},
};

const SYSTEM: &str = "tombolo-system";

async fn token(lab: &Lab, network: &str) -> (Token, admin::CreateGatewayTokenResponse) {
    let (id, seed): ([u8; 16], [u8; 32]) = (rand::random(), rand::random());
    let token = Token {
        id,
        key: JoinKey::from_seed(&seed),
    };
    let request = admin::CreateGatewayTokenRequest {
        network: network.into(),
        token_id: id.to_vec(),
        public_key: token.key.public_key().to_vec(),
        uses: 1,
        ttl_seconds: 900,
        cidr: Vec::new(),
    };
    let mut client = lab.admin().await;
    let answer = client.create_gateway_token(request).await.unwrap().into_inner();
    (token, answer)
}

async fn join(
    lab: &Lab,
    host: &mut Host,
    token: &Token,
    claims: Option<pb::GatewayClaims>,
) -> Result<(), tonic::Status> {
    let (channel, exporter) = lab.dial(None).await;
    let request = pb::EnrollRequest {
        gateway: claims,
        ..host.request(token, &exporter)
    };
    let response = EnrollmentClient::new(channel).enroll(request).await?.into_inner();
    host.take(response.registration, &response.cert_chain);
    Ok(())
}

fn at(addresses: &[&str]) -> Option<pb::GatewayClaims> {
    Some(pb::GatewayClaims {
        addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
        quic_port: 443,
    })
}

#[tokio::test]
async fn a_gateway_enrols_renews_and_is_revoked() {
    let lab = Lab::start().await;
    let (first, answer) = token(&lab, "").await;
    assert_eq!(
        (answer.namespace.as_str(), answer.workload_group.as_str()),
        (SYSTEM, "gateway")
    );
    let mut gateway = Host::new();
    join(&lab, &mut gateway, &first, at(&["gw.example.com:443"]))
        .await
        .unwrap();
    let id = gateway.identity.as_ref().unwrap().id().to_string();
    assert_eq!(id, "spiffe://mesh.example/ns/tombolo-system/sa/gateway");
    // No other gateway stands between it and discovery.
    assert_eq!(gateway.registration.discovery_endpoints, ["discovery.test:15012"]);
    let request = admin::GetRequest {
        kind: "WorkloadEntry".into(),
        namespace: SYSTEM.into(),
        name: gateway.registration.workload_name.clone(),
    };
    let entry = lab.admin().await.get(request).await.unwrap().into_inner().json;
    let entry: serde_json::Value = serde_json::from_str(&entry).unwrap();
    let annotations = &entry["metadata"]["annotations"];
    assert_eq!(annotations["tombolo.io/gateway-address"], "gw.example.com:443");
    assert_eq!(annotations["tombolo.io/gateway-quic-port"], "443");
    gateway.new_csr();
    gateway.renew(&lab, 2).await.unwrap();
    assert_eq!(gateway.identity.as_ref().unwrap().id().to_string(), id);
    // With a new token it says another address.
    let (second, _) = token(&lab, "").await;
    gateway.new_csr();
    join(&lab, &mut gateway, &second, at(&["192.0.2.7:443"]))
        .await
        .unwrap();
    let vms = lab.vms().await;
    assert_eq!(
        (vms.len(), vms[0].namespace.as_str()),
        (1, SYSTEM),
        "the same device"
    );
    let mesh = lab
        .admin()
        .await
        .mesh(admin::MeshRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(mesh.gateway_endpoints, ["192.0.2.7:443"]);
    // Hosts are told of it as a way to discovery; those that only dial out go there first.
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    assert_eq!(
        host.registration.discovery_endpoints,
        ["discovery.test:15012", "192.0.2.7:443"]
    );
    let mut away = group("away");
    away["metadata"]["annotations"] = serde_json::json!({"tombolo.io/reach": "outbound"});
    lab.apply(&[away]).await.unwrap();
    let host = lab.enrol("away").await;
    assert_eq!(
        host.registration.discovery_endpoints,
        ["192.0.2.7:443", "discovery.test:15012"]
    );
    // One of another network reaches discovery through the gateways of discovery's.
    let (third, answer) = token(&lab, "lan").await;
    assert_eq!(answer.workload_group, "gateway-lan");
    let mut lan = Host::new();
    join(&lab, &mut lan, &third, at(&["198.51.100.1:443"]))
        .await
        .unwrap();
    assert_eq!(lan.registration.network, "lan");
    assert_eq!(
        lan.registration.discovery_endpoints,
        ["discovery.test:15012", "192.0.2.7:443"]
    );
    let vm = gateway.registration.device_id.clone();
    let revoke = admin::RevokeVmRequest {
        vm: vm.clone(),
        reason: "stolen".into(),
    };
    lab.admin().await.revoke_vm(revoke).await.unwrap();
    gateway.new_csr();
    assert!(gateway.renew(&lab, 4).await.is_err());
    let delete = admin::DeleteVmRequest { vm };
    lab.admin().await.delete_vm(delete).await.unwrap();
    let log = lab.audit_log();
    for object in [
        "WorkloadGroup tombolo-system/gateway",
        "JoinToken tombolo-system/",
    ] {
        assert!(log.contains(object), "{object} is audited");
    }
}

#[tokio::test]
async fn the_way_into_the_system_namespace_is_no_wider() {
    let lab = Lab::start().await;
    let (gateways, _) = token(&lab, "").await;
    // An agent does not become a gateway, nor a gateway a member of a shop.
    assert!(join(&lab, &mut Host::new(), &gateways, None).await.is_err());
    lab.group("catalog").await;
    let members = lab.token("catalog", |_| ()).await;
    assert!(join(&lab, &mut Host::new(), &members, at(&[])).await.is_err());
    for bad in ["127.0.0.1:443", "240.240.0.9:443", "gw", "gw.example.com:0"] {
        let refused = join(&lab, &mut Host::new(), &gateways, at(&[bad])).await;
        assert!(refused.is_err(), "{bad}");
    }
    assert!(lab.vms().await.is_empty(), "nothing is half done");
    // Neither groups nor tokens nor entries are written there by hand.
    for kind in ["WorkloadGroup", "JoinToken", "WorkloadEntry"] {
        let mut object = object(
            if kind == "JoinToken" {
                "tombolo.io/v1"
            } else {
                "networking.istio.io/v1"
            },
            kind,
            "0123456789abcdef0123456789abcdef",
            match kind {
                "WorkloadGroup" => serde_json::json!({"template": {"serviceAccount": "gateway"}}),
                "JoinToken" => serde_json::json!({
                    "publicKey": "AAAA", "workloadGroup": "gateway", "uses": 1, "expires": "2099-01-01T00:00:00Z",
                }),
                _ => serde_json::json!({"address": "10.0.0.1", "serviceAccount": "gateway"}),
            },
        );
        object["metadata"]["namespace"] = SYSTEM.into();
        let refused = lab.apply(&[object]).await.unwrap_err();
        assert!(refused.message().starts_with("TMB0206"), "{kind}: {refused:?}");
    }
    // What a token says is checked as everywhere.
    let request = |edit: fn(&mut admin::CreateGatewayTokenRequest)| {
        let mut request = admin::CreateGatewayTokenRequest {
            network: String::new(),
            token_id: vec![1; 16],
            public_key: vec![2; 32],
            uses: 1,
            ttl_seconds: 60,
            cidr: Vec::new(),
        };
        edit(&mut request);
        request
    };
    let mut client = lab.admin().await;
    for bad in [
        request(|r| r.token_id.truncate(15)),
        request(|r| r.public_key.clear()),
        request(|r| r.uses = 0),
        request(|r| r.ttl_seconds = 8 * 24 * 3600),
        request(|r| r.ttl_seconds = -1),
        request(|r| r.network = "No Network".into()),
        request(|r| r.cidr = vec!["x".into()]),
    ] {
        assert!(client.create_gateway_token(bad.clone()).await.is_err(), "{bad:?}");
    }
    client.create_gateway_token(request(|_| ())).await.unwrap();
    let again = client.create_gateway_token(request(|_| ())).await.unwrap_err();
    assert!(again.message().starts_with("TMB0204"), "{again:?}");
    // An operator's certificate is needed; a workload's holds no role.
    let host = lab.enrol("catalog").await;
    let (channel, _) = lab.dial(host.identity.clone()).await;
    let refused = admin::admin_client::AdminClient::new(channel)
        .create_gateway_token(request(|_| ()))
        .await;
    assert!(refused.is_err());
}
