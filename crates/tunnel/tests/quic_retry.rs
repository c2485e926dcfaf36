//! First messages of QUIC from sources that never answer: above a number of them everybody has to prove its address.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use quinn::{ClientConfig, Endpoint, crypto::rustls::QuicClientConfig};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use support::Mesh;
use tokio::{
    net::{TcpListener, UdpSocket},
    time::{Instant, timeout},
};
use tombolo_identity::{Peer, hbone_client_config};
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{Incoming, Limits, Observe, Service, Side, serve};

/// More than may be under way before addresses have to be proven, less than one source may have.
const FLOOD: usize = 90;
const PROBES: usize = 20;

struct Nothing;

impl Service for Nothing {
    fn admit(&self, _: &Peer) -> bool {
        true
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        incoming.refuse(http::StatusCode::SERVICE_UNAVAILABLE);
    }
}

#[derive(Default)]
struct Counting {
    retries: AtomicUsize,
}

impl Observe for Counting {
    fn handshake(&self, _: Side, result: &'static str) {
        self.retries
            .fetch_add(usize::from(result == "retry"), Ordering::SeqCst);
    }
}

/// First datagrams of clients that nobody answers, one for each connection.
async fn first_datagrams(config: &ClientConfig, count: usize) -> Vec<Vec<u8>> {
    let sink = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = sink.local_addr().unwrap();
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut found = BTreeMap::new();
    let mut buffer = vec![0; 2048];
    let mut connecting = Vec::new();
    while found.len() < count {
        connecting.push(
            endpoint
                .connect_with(config.clone(), address, "gateway.invalid")
                .unwrap(),
        );
        let (length, _) = timeout(Duration::from_secs(5), sink.recv_from(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        let datagram = &buffer[..length];
        // Source: RFC 9000, 17.2: first byte, version, length of the connection id, connection id.
        let id = datagram[6..6 + usize::from(datagram[5])].to_vec();
        found.entry(id).or_insert_with(|| datagram.to_vec());
    }
    found.into_values().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn above_a_number_of_handshakes_addresses_have_to_be_proven() {
    let (mesh, tasks) = (Mesh::new("mesh.example"), TaskGroup::new("test"));
    let (service, counting) = (Arc::new(Nothing), Arc::new(Counting::default()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = serve(
        listener,
        &mesh.workload("tombolo-system", "gateway", 9),
        Arc::clone(&service),
        Limits::default(),
        Arc::clone(&counting) as _,
        &tasks,
    )
    .unwrap();
    let gateway: SocketAddr = server
        .listen_quic("127.0.0.1:0".parse().unwrap(), &service, Arc::new(|_| ()), &tasks)
        .unwrap();
    let expected = vec![mesh.id("tombolo-system", "gateway")];
    let mut tls = hbone_client_config(&mesh.workload("shop", "webapp", 7), expected).unwrap();
    tls.alpn_protocols = vec![b"tombolo/1".to_vec()];
    let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));

    let mut datagrams = first_datagrams(&config, FLOOD + PROBES).await;
    let probes = datagrams.split_off(FLOOD);
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    // A calm gateway asks nobody for a proof.
    assert_eq!(counting.retries.load(Ordering::SeqCst), 0);
    for datagram in &datagrams {
        silent.send_to(datagram, gateway).await.unwrap();
        tokio::time::sleep(Duration::from_micros(200)).await; // the socket's buffer is short on some hosts
    }
    // A new first message is answered with a Retry, which is shorter and costs nothing that stays.
    let mut answered = None;
    for probe in &probes {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(probe, gateway).await.unwrap();
        let mut buffer = vec![0; 2048];
        if let Ok(Ok((length, _))) = timeout(Duration::from_millis(200), socket.recv_from(&mut buffer)).await
            && buffer[0] & 0xf0 == 0xf0
        {
            answered = Some(length);
            break;
        }
    }
    let length = answered.expect("a Retry");
    assert!(length < 1200, "{length} bytes for 1200");
    assert!(counting.retries.load(Ordering::SeqCst) > 0);
    // Who proves its address is served meanwhile.
    let begun = Instant::now();
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = endpoint.connect_with(config, gateway, "gateway.invalid").unwrap();
    timeout(Duration::from_secs(3), connecting)
        .await
        .unwrap()
        .unwrap();
    println!(
        "connected within {:?} beside {FLOOD} handshakes, {} Retries",
        begun.elapsed(),
        counting.retries.load(Ordering::SeqCst)
    );
    tasks.stop();
}
