use super::hosts::{Fleet, VIP, until};
use crate::{
    Settings,
    names::{Names, NotOurs},
};
use std::{fs, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
};

/// A question for A records.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

fn reply_to(query: &[u8], code: u8, mark: &[u8]) -> Vec<u8> {
    let mut reply = query.to_vec();
    reply[2] |= 0x80;
    reply[3] = code;
    reply.extend(mark);
    reply
}

fn names(fleet: &mut Fleet, resolv_conf: &str, port: u16) -> (Arc<Names>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("resolv.conf");
    fs::write(&path, resolv_conf).unwrap();
    let settings = Settings {
        resolv_conf: path,
        dns_in_flight_max: 2,
        ..Settings::default()
    };
    let host = fleet.host_with("webapp", settings);
    fleet.catalog(8080, &[]);
    fleet.publish();
    (
        Arc::new(Names::new(Arc::clone(&host.dataplane.context), port)),
        folder,
    )
}

#[tokio::test]
async fn mesh_names_are_answered_and_others_are_not() {
    let mut fleet = Fleet::new();
    let (names, _folder) = names(&mut fleet, "", 53);
    let Ok(Some(reply)) = names.answer(&query(7, "catalog.shop.svc.mesh.internal")) else {
        panic!("answered")
    };
    assert!(reply.windows(4).any(|bytes| bytes == VIP.octets()), "{reply:?}");
    assert!(matches!(names.answer(&query(7, "example.org")), Err(NotOurs)));
    assert!(matches!(names.answer(b"garbage"), Ok(None)));
    // Nobody to ask: said at once.
    let failed = names.forward(&query(7, "example.org"), true).await.unwrap();
    assert_eq!((&failed[..2], failed[3] & 0xf), (&[0, 7][..], 2), "SERVFAIL");
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_is_silent_or_broken() {
    let mut fleet = Fleet::new();
    let silent = UdpSocket::bind("127.0.0.11:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let broken = UdpSocket::bind(("127.0.0.12", port)).await.unwrap();
    let good = UdpSocket::bind(("127.0.0.13", port)).await.unwrap();
    let conf = "nameserver 127.0.0.11\nnameserver 127.0.0.12\nnameserver 127.0.0.13\n";
    let (names, _folder) = names(&mut fleet, conf, port);
    fleet.tasks.spawn("broken", async move {
        let mut bytes = [0; 512];
        while let Ok((length, from)) = broken.recv_from(&mut bytes).await {
            broken
                .send_to(&reply_to(&bytes[..length], 2, b""), from)
                .await
                .unwrap();
        }
    });
    fleet.tasks.spawn("good", async move {
        let mut bytes = [0; 512];
        while let Ok((length, from)) = good.recv_from(&mut bytes).await {
            let mut forged = reply_to(&bytes[..length], 0, b"forged");
            forged[0] ^= 1;
            good.send_to(&forged, from).await.unwrap();
            // Truncated: passed on as it is, the client asks again by TCP.
            let mut reply = reply_to(&bytes[..length], 0, b"!");
            reply[2] |= 2;
            good.send_to(&reply, from).await.unwrap();
        }
    });
    let reply = names.forward(&query(9, "example.org"), true).await.unwrap();
    assert_eq!(reply.last(), Some(&b'!'));
    assert_eq!(&reply[..2], &[0, 9]);
    assert_ne!(reply[2] & 2, 0);
    drop(silent);
}

#[tokio::test]
async fn queries_by_tcp_are_answered_or_passed_on() {
    let mut fleet = Fleet::new();
    let upstream = TcpListener::bind("127.0.0.14:0").await.unwrap();
    let port = upstream.local_addr().unwrap().port();
    let (names, _folder) = names(&mut fleet, "nameserver 127.0.0.14\n", port);
    fleet.tasks.spawn("upstream", async move {
        let (mut socket, _) = upstream.accept().await.unwrap();
        let mut query = vec![0; usize::from(socket.read_u16().await.unwrap())];
        socket.read_exact(&mut query).await.unwrap();
        let reply = reply_to(&query, 0, &[b'x'; 2000]);
        socket
            .write_u16(u16::try_from(reply.len()).unwrap())
            .await
            .unwrap();
        socket.write_all(&reply).await.unwrap();
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (socket, _) = listener.accept().await.unwrap();
    fleet
        .tasks
        .spawn("names", async move { names.serve_tcp(socket).await });
    for (name, length) in [("catalog.shop.svc.mesh.internal", 40), ("example.org", 2000)] {
        let query = query(3, name);
        client
            .write_u16(u16::try_from(query.len()).unwrap())
            .await
            .unwrap();
        client.write_all(&query).await.unwrap();
        let mut reply = vec![0; usize::from(client.read_u16().await.unwrap())];
        client.read_exact(&mut reply).await.unwrap();
        assert!(
            reply.len() >= length && reply[..2] == [0, 3],
            "{name}: {}",
            reply.len()
        );
    }
}

#[tokio::test]
async fn lookups_under_way_are_bounded() {
    let mut fleet = Fleet::new();
    let silent = UdpSocket::bind("127.0.0.15:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let (names, _folder) = names(&mut fleet, "nameserver 127.0.0.15\n", port);
    let waiting: Vec<_> = (0..2)
        .map(|id| {
            let names = Arc::clone(&names);
            fleet.tasks.spawn("lookup", async move {
                names.forward(&query(id, "example.org"), true).await
            })
        })
        .collect();
    silent.recv(&mut [0; 512]).await.unwrap();
    silent.recv(&mut [0; 512]).await.unwrap();
    let third = query(5, "example.org");
    let overload = tokio::time::timeout(Duration::from_millis(500), names.forward(&third, true));
    assert_eq!(overload.await.unwrap().unwrap()[3] & 0xf, 2, "SERVFAIL at once");
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    until(|| waiting.iter().all(tokio::task::JoinHandle::is_finished)).await;
}
