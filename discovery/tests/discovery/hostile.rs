//! Callers that mean harm and hold no right.

use crate::lab::*;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tombolo_discovery::nameless::CALLS_MAX;
use tombolo_identity::{LiveIdentity, control_client_config, control_server_name};
use tombolo_proto::{
    tombolo::{
        admin::v1::{self as admin, admin_client::AdminClient},
        v1::{EnrollRequest, enrollment_client::EnrollmentClient},
    },
    xds::{DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient},
};
use tombolo_types::SpiffeId;

const WAIT: Duration = Duration::from_secs(5);

/// A whole ClientHello, and then nothing.
async fn stall(lab: &Lab) -> TcpStream {
    let live = LiveIdentity::new(None, vec![lab.bundle()]);
    let config = control_client_config(&live, &SpiffeId::discovery(trust_domain()), false).unwrap();
    let name = control_server_name(&trust_domain()).unwrap();
    let mut session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut hello = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut hello).unwrap();
    }
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 2], 0))).unwrap();
    let mut tcp = socket.connect(lab.running().address).await.unwrap();
    tcp.write_all(&hello).await.unwrap();
    tcp
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_handshakes_delay_nobody() {
    let lab = Lab::start().await;
    let mut stalled = Vec::new();
    for _ in 0..64 {
        stalled.push(stall(&lab).await);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    timeout(WAIT, lab.dial(None))
        .await
        .expect("a handshake of its own");
}

#[tokio::test]
async fn a_stranger_is_refused_before_its_first_request_is_read() {
    let lab = Lab::start().await;
    let (channel, _) = lab.dial(None).await;
    let silent = tokio_stream::pending::<DeltaDiscoveryRequest>();
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let answer = timeout(WAIT, client.delta_aggregated_resources(silent))
        .await
        .unwrap();
    assert_eq!(answer.map(drop).unwrap_err().code(), tonic::Code::Unauthenticated);
}

#[tokio::test]
async fn who_shows_no_certificate_has_a_few_calls_on_a_connection() {
    let lab = Lab::start().await;
    let (channel, _) = lab.dial(None).await;
    let mut client = EnrollmentClient::new(channel);
    let mut codes = Vec::new();
    for _ in 0..40 {
        let answer = timeout(WAIT, client.enroll(EnrollRequest::default()))
            .await
            .unwrap();
        codes.push(answer.map(drop).unwrap_err().code());
    }
    let most = CALLS_MAX as usize;
    assert_eq!(codes[..most], vec![tonic::Code::InvalidArgument; most]);
    assert_eq!(codes[most], tonic::Code::ResourceExhausted);
    let last = codes.last().copied().unwrap();
    assert!(
        !matches!(
            last,
            tonic::Code::InvalidArgument | tonic::Code::ResourceExhausted
        ),
        "the connection is closed: {codes:?}"
    );
    // Calls that nobody refuses are not counted, and a new connection has its own.
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    assert!(host.identity.is_some());
}

#[tokio::test]
async fn who_holds_no_role_learns_nothing_and_fills_nothing() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    for identity in [None, host.identity.clone()] {
        let (channel, _) = lab.dial(identity).await;
        let mut client = AdminClient::new(channel);
        let mut texts = std::collections::BTreeSet::new();
        for name in ["catalog", "not-there"] {
            let objects = vec![admin::Object {
                json: group(name).to_string(),
            }];
            let apply = admin::ApplyRequest {
                objects,
                ..Default::default()
            };
            texts.insert(client.apply(apply).await.unwrap_err().message().to_owned());
            let vm = format!("shop/{name}");
            let revoke = admin::RevokeVmRequest {
                vm,
                ..Default::default()
            };
            texts.insert(client.revoke_vm(revoke).await.unwrap_err().message().to_owned());
        }
        assert_eq!(texts.len(), 1, "{texts:?}");
        let large = admin::GetRequest {
            kind: "WorkloadGroup".into(),
            namespace: "shop".into(),
            name: "x".repeat(1 << 20),
        };
        let status = client.get(large).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::OutOfRange, "{status:?}");
        for i in 0..100 {
            let get = admin::GetRequest {
                kind: "WorkloadGroup".into(),
                namespace: "shop".into(),
                name: format!("{}{i}", "x".repeat(100_000)),
            };
            client.get(get).await.unwrap_err();
        }
    }
    let log = lab.audit_log();
    assert!(log.len() < 200_000 && log.lines().count() < 100, "{}", log.len());
    assert!(log.contains("sa/catalog") && log.contains("\"Apply\""));
}
