//! Client, server and copying over loopback, with real TLS.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../support/mod.rs"]
mod support;
mod trust;
mod world;

use http::HeaderValue;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use tombolo_tunnel::{Authority, ConnectRequest, Ended, Forwarded, Limits, OpenError, PoolLimits};
use tombolo_types::DeviceId;
use world::{WAIT, backend, request, target, until, world, world_with};

/// Different bytes at every place of a large transfer.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_arrive_both_ways_and_half_closes_are_kept() {
    let w = world().await;
    let (address, listener) = backend().await;
    let (mut app, monitor, copy) = w.application(address).await;
    let (mut server, _) = listener.accept().await.unwrap();

    app.write_all(b"question").await.unwrap();
    app.shutdown().await.unwrap();
    let mut read = Vec::new();
    server.read_to_end(&mut read).await.unwrap();
    assert_eq!(
        read, b"question",
        "the end of the question is seen while the answer is still open"
    );
    let answer = pattern(300_000, 3);
    server.write_all(&answer).await.unwrap();
    drop(server);
    let mut read = Vec::new();
    app.read_to_end(&mut read).await.unwrap();
    assert!(read == answer);
    assert!(matches!(
        timeout(WAIT, copy).await.unwrap().unwrap(),
        Ended::Complete
    ));
    assert_eq!((monitor.to_stream(), monitor.from_stream()), (8, 300_000));
    until(|| w.service.open.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_may_speak_first_and_headers_arrive() {
    let w = world().await;
    let (address, listener) = backend().await;
    let mut connect = request(address);
    connect.forwarded = Forwarded {
        source: Some("10.9.8.7:1234".parse().unwrap()),
        host: "x.y".into(),
    }
    .to_header();
    connect.baggage = Some(HeaderValue::from_static("service.name=web"));
    let stream = w
        .pool
        .open(&w.target, &connect, Instant::now() + WAIT)
        .await
        .unwrap();
    assert_eq!(stream.peer().id, w.mesh.id("shop", "catalog"));
    assert_eq!(stream.peer().device, Some(DeviceId(8)));
    assert_eq!(stream.baggage().unwrap().service, "10.9.8.7:1234");
    drop(stream);
    let (mut app, ..) = w.application(address).await;
    let (_, _) = listener.accept().await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    server.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    app.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_transfer_each_way_at_once_is_whole() {
    let w = world().await;
    let (address, listener) = backend().await;
    let (app, _, copy) = w.application(address).await;
    let (server, _) = listener.accept().await.unwrap();
    let up = Arc::new(pattern(40_000_000, 1));
    let down = Arc::new(pattern(40_000_000, 2));
    let (mut app_read, mut app_write) = app.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    let (u, d) = (Arc::clone(&up), Arc::clone(&down));
    let send = async move {
        app_write.write_all(&u).await.unwrap();
        app_write.shutdown().await.unwrap();
    };
    let answer = async move {
        // Odd sizes: frames and records must not depend on how it was written.
        for chunk in d.chunks(70_001) {
            server_write.write_all(chunk).await.unwrap();
        }
        server_write.shutdown().await.unwrap();
    };
    let take = async {
        let mut read = Vec::new();
        server_read.read_to_end(&mut read).await.unwrap();
        assert!(read == **up);
    };
    let receive = async {
        let mut read = Vec::new();
        app_read.read_to_end(&mut read).await.unwrap();
        assert!(read == **down);
    };
    timeout(Duration::from_secs(60), async {
        tokio::join!(send, answer, take, receive)
    })
    .await
    .unwrap();
    assert!(matches!(copy.await.unwrap(), Ended::Complete));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_stops_the_sender_and_nobody_else() {
    let w = world().await;
    let (address, listener) = backend().await;
    let (mut slow, monitor, _copy) = w.application(address).await;
    let (_stuck, _) = listener.accept().await.unwrap();
    let fill = timeout(Duration::from_millis(700), slow.write_all(&vec![7; 64 << 20])).await;
    assert!(fill.is_err(), "64 MiB do not fit anywhere");
    let taken = monitor.to_stream();
    assert!(
        taken < 24 << 20,
        "{taken} bytes are held for a reader that takes nothing"
    );
    let (mut app, ..) = w.application(address).await;
    let (mut server, _) = listener.accept().await.unwrap();
    app.write_all(b"hi").await.unwrap();
    let mut read = [0; 2];
    timeout(WAIT, server.read_exact(&mut read))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(w.pool.connections(), 1);
}

fn reset(tcp: &TcpStream) {
    socket2::SockRef::from(tcp)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_are_kept_in_both_directions() {
    let w = world().await;
    let (address, listener) = backend().await;

    let (mut app, _, copy) = w.application(address).await;
    let (server, _) = listener.accept().await.unwrap();
    reset(&server);
    drop(server);
    let error = timeout(WAIT, app.read(&mut [0; 8])).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(matches!(
        copy.await.unwrap(),
        Ended::PeerReset(h2::Reason::CONNECT_ERROR)
    ));

    let (app, _, copy) = w.application(address).await;
    let (mut server, _) = listener.accept().await.unwrap();
    reset(&app);
    drop(app);
    let error = timeout(WAIT, server.read(&mut [0; 8]))
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(matches!(copy.await.unwrap(), Ended::ApplicationReset(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_after_the_peers_half_close_is_seen() {
    let w = world().await;
    let (address, listener) = backend().await;
    let (mut app, _, copy) = w.application(address).await;
    let (mut server, _) = listener.accept().await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(app.read(&mut [0; 8]).await.unwrap(), 0);
    reset(&server);
    drop(server);
    // The server's agent learns of it when something is to be written.
    app.write_all(b"x").await.unwrap();
    let ended = timeout(WAIT, copy).await.unwrap().unwrap();
    assert!(matches!(ended, Ended::PeerReset(_)), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cutting_resets_both_ends() {
    let w = world().await;
    let (address, listener) = backend().await;
    let (mut app, monitor, copy) = w.application(address).await;
    let (mut server, _) = listener.accept().await.unwrap();
    monitor.cut();
    assert!(matches!(timeout(WAIT, copy).await.unwrap().unwrap(), Ended::Cut));
    for socket in [&mut app, &mut server] {
        let error = timeout(WAIT, socket.read(&mut [0; 8]))
            .await
            .unwrap()
            .unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_shared_up_to_the_limit_of_streams() {
    let w = world().await;
    let (address, listener) = backend().await;
    let opens = (0..250).map(|_| w.open(address));
    let (streams, _) = tokio::join!(futures_util::future::join_all(opens), async {
        let mut sockets = Vec::new();
        for _ in 0..250 {
            sockets.push(listener.accept().await.unwrap());
        }
        sockets
    });
    let streams: Vec<_> = streams.into_iter().map(Result::unwrap).collect();
    assert_eq!(w.pool.connections(), 3, "100 streams a connection");
    assert_eq!(
        w.server.connections().iter().map(|c| c.streams).sum::<usize>(),
        250
    );
    drop(streams);
    until(|| w.service.open.load(Ordering::SeqCst) == 0).await;
    let _again = w.open(address).await.unwrap();
    assert_eq!(w.pool.connections(), 3, "an open connection is used again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_allows_few_streams_gets_few() {
    let w = world_with(
        PoolLimits::default(),
        Limits {
            streams_max: 2,
            ..Limits::default()
        },
    )
    .await;
    let (address, _listener) = backend().await;
    let _first = w.open(address).await.unwrap(); // the server's settings have arrived with the answer
    let _streams = futures_util::future::join_all((0..5).map(|_| w.open(address))).await;
    assert!(_streams.iter().all(Result::is_ok), "{_streams:?}");
    assert!(
        (3..=4).contains(&w.pool.connections()),
        "{}",
        w.pool.connections()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_told_apart() {
    let w = world().await;
    let closed = {
        let (address, _listener) = backend().await;
        address
    };
    assert!(matches!(w.open(closed).await, Err(OpenError::Status(503))));
    assert!(matches!(
        w.open("127.0.0.1:1".parse().unwrap()).await,
        Err(OpenError::Status(401))
    ));
    let name = ConnectRequest::new(Authority::Name {
        host: "a.b".into(),
        port: 80,
    });
    let refused = w.pool.open(&w.target, &name, Instant::now() + WAIT).await;
    assert!(matches!(refused, Err(OpenError::Status(400))));
    let deadline = Instant::now() + Duration::from_millis(100);
    let late = w
        .pool
        .open(&w.target, &request("127.0.0.1:2".parse().unwrap()), deadline)
        .await;
    assert!(matches!(late, Err(OpenError::Timeout(_))));
    let nobody = target(closed, &w.mesh.id("shop", "catalog"));
    let refused = w
        .pool
        .open(&nobody, &request(closed), Instant::now() + WAIT)
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, OpenError::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
    );
    assert_eq!(refused.reason(), "connect_failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn goaway_lets_streams_end_and_new_ones_go_elsewhere() {
    let w = world().await;
    let (address, listener) = backend().await;
    let (mut app, ..) = w.application(address).await;
    let (mut server, _) = listener.accept().await.unwrap();
    w.server.drain();
    // The port is closed now, and the old connection takes nothing new.
    let refused = timeout(WAIT, async {
        loop {
            match w.open(address).await {
                Err(error) => break error,
                Ok(stream) => drop(stream), // the GOAWAY was still under way
            }
        }
    });
    assert!(matches!(refused.await.unwrap(), OpenError::Io(_)));
    app.write_all(b"go on").await.unwrap();
    let mut read = [0; 5];
    server.read_exact(&mut read).await.unwrap();
    server.write_all(b"yes").await.unwrap();
    app.read_exact(&mut read[..3]).await.unwrap();
    drop((app, server));
    until(|| w.pool.connections() == 0 && w.server.connections().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_pool_opens_nothing() {
    let w = world().await;
    let (address, _listener) = backend().await;
    let stream = w.open(address).await.unwrap();
    w.pool.drain();
    assert!(matches!(w.open(address).await, Err(OpenError::Draining)));
    drop(stream);
    until(|| w.pool.connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_peer_is_noticed_while_an_application_waits() {
    let w = world().await;
    // A relay that can be frozen between client and server.
    let (relay, listener) = backend().await;
    let upstream = w.server.local_addr();
    let (freeze_tx, freeze_rx) = tokio::sync::watch::channel(false);
    w.tasks.spawn("relay", async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut far = TcpStream::connect(upstream).await.unwrap();
            let mut frozen = freeze_rx.clone();
            loop {
                tokio::select! {
                    _ = async { drop(frozen.wait_for(|frozen| *frozen).await) } => {}
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => break,
                }
                std::future::pending::<()>().await;
            }
        }
    });
    let target = target(relay, &w.mesh.id("shop", "catalog"));
    let (address, _listener) = backend().await;
    let _stream = w
        .pool
        .open(&target, &request(address), Instant::now() + WAIT)
        .await
        .unwrap();
    freeze_tx.send(true).unwrap();
    let started = Instant::now();
    let refused = w
        .pool
        .open(&target, &request(address), Instant::now() + WAIT)
        .await
        .unwrap_err();
    assert!(matches!(refused, OpenError::Timeout(_)), "{refused:?}");
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
    until(|| w.pool.connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_silence_are_closed() {
    let limits = Limits {
        handshake_timeout: Duration::from_millis(300),
        ..Limits::default()
    };
    let w = world_with(PoolLimits::default(), limits).await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0x16, 3, 1, 0xff, 0xff],
        &[0xff; 70_000],
        b"",
    ] {
        let mut tcp = TcpStream::connect(w.server.local_addr()).await.unwrap();
        let _ = tcp.write_all(garbage).await;
        let mut rest = Vec::new();
        let _ = timeout(WAIT, tcp.read_to_end(&mut rest))
            .await
            .expect("closed within the handshake timeout");
    }
    let (address, _listener) = backend().await;
    w.open(address).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_are_released() {
    let limits = PoolLimits {
        idle_timeout: Duration::from_secs(1),
        ..PoolLimits::default()
    };
    let w = world_with(limits, Limits::default()).await;
    let (address, _listener) = backend().await;
    drop(w.open(address).await.unwrap());
    assert_eq!(w.pool.connections(), 1);
    until(|| w.pool.connections() == 0).await;
}
