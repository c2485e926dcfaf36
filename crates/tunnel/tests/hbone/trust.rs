//! Who is spoken to, and what happens to connections when that changes.

use crate::{
    support::{Mesh, now_unix},
    world::{WAIT, backend, request, target, until, world},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, timeout},
};
use tombolo_identity::{LiveIdentity, Peer, PeerRefusal};
use tombolo_tunnel::{Ended, NoObserver, OpenError, Pool, PoolLimits, Service as _, Target, TlsError};
use tombolo_types::DeviceId;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_expected_identity_is_spoken_to() {
    let w = world().await;
    let wrong = target(w.server.local_addr(), &w.mesh.id("shop", "payments"));
    let (address, _listener) = backend().await;
    let refused = w
        .pool
        .open(&wrong, &request(address), Instant::now() + WAIT)
        .await
        .unwrap_err();
    let OpenError::Tls(TlsError::Peer(PeerRefusal::WrongIdentity { seen, .. })) = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!(*seen, [w.mesh.id("shop", "catalog")]);
    let several = Target {
        hbone: w.server.local_addr(),
        expected: [w.mesh.id("shop", "payments"), w.mesh.id("shop", "catalog")].into(),
    };
    w.pool
        .open(&several, &request(address), Instant::now() + WAIT)
        .await
        .unwrap();

    // A stranger, as client and as server.
    let stranger = Mesh::new("mesh.example").workload("shop", "webapp", 1);
    let pool = Pool::new(
        stranger,
        PoolLimits::default(),
        Arc::new(|_| true),
        Arc::new(NoObserver),
        &w.tasks,
    );
    let refused = pool
        .open(&w.target, &request(address), Instant::now() + WAIT)
        .await
        .unwrap_err();
    assert!(matches!(refused, OpenError::Tls(_)), "{refused:?}");
    assert_eq!(w.server.connections().len(), 1, "only the one before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_of_another_trust_domain_is_refused_by_the_server() {
    let w = world().await;
    let other = Mesh::new("other.example");
    // It knows our root and would speak to us; we do not know its.
    let stranger = LiveIdentity::new(
        Some(other.issue(&other.id("shop", "webapp"), DeviceId(1))),
        vec![w.mesh.bundle()],
    );
    let pool = Pool::new(
        stranger,
        PoolLimits::default(),
        Arc::new(|_| true),
        Arc::new(NoObserver),
        &w.tasks,
    );
    let (address, _listener) = backend().await;
    let refused = pool
        .open(&w.target, &request(address), Instant::now() + WAIT)
        .await
        .unwrap_err();
    // TLS 1.3 lets the client finish first: the alert comes when the connection is in use already.
    assert!(
        matches!(refused, OpenError::Tls(TlsError::Alert(_))),
        "{refused:?}"
    );
    assert!(w.server.connections().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_peer_is_cut_and_refused_and_others_live_on() {
    let w = world().await;
    let (address, listener) = backend().await;
    let (mut app, _, copy) = w.application(address).await;
    let (_server, _) = listener.accept().await.unwrap();
    let other = Pool::new(
        w.mesh.workload("shop", "webapp", 9),
        PoolLimits::default(),
        Arc::new(|_| true),
        Arc::new(NoObserver),
        &w.tasks,
    );
    let innocent = other
        .open(&w.target, &request(address), Instant::now() + WAIT)
        .await
        .unwrap();

    w.service.revoked.store(7, Ordering::SeqCst);
    let service = Arc::clone(&w.service);
    w.server.recheck(now_unix(), |peer| service.admit(peer));
    let error = timeout(Duration::from_secs(1), app.read(&mut [0; 8]))
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(matches!(copy.await.unwrap(), Ended::PeerLost));
    assert!(w.open(address).await.is_err(), "its next handshake is refused");
    assert_eq!(w.server.connections().len(), 1);
    drop(innocent);
    other
        .open(&w.target, &request(address), Instant::now() + WAIT)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_cuts_a_revoked_server() {
    let w = world().await;
    let revoked = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&revoked);
    let pool = Pool::new(
        Arc::clone(&w.client),
        PoolLimits::default(),
        Arc::new(move |peer: &Peer| peer.device != Some(DeviceId(seen.load(Ordering::SeqCst)))),
        Arc::new(NoObserver),
        &w.tasks,
    );
    let (address, _listener) = backend().await;
    let _stream = pool
        .open(&w.target, &request(address), Instant::now() + WAIT)
        .await
        .unwrap();
    revoked.store(8, Ordering::SeqCst);
    pool.recheck(now_unix());
    until(|| pool.connections() == 0).await;
    assert!(matches!(
        pool.open(&w.target, &request(address), Instant::now() + WAIT)
            .await,
        Err(OpenError::Tls(_))
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_certificate_starts_a_new_connection_and_leaves_streams_alone() {
    let w = world().await;
    let (address, listener) = backend().await;
    let (mut app, ..) = w.application(address).await;
    let (mut server, _) = listener.accept().await.unwrap();
    w.client
        .set_identity(w.mesh.issue(&w.mesh.id("shop", "webapp"), DeviceId(7)));
    w.pool.recheck(now_unix());
    let fresh = w.open(address).await.unwrap();
    assert_eq!(w.pool.connections(), 2);
    app.write_all(b"still here").await.unwrap();
    let mut read = [0; 10];
    server.read_exact(&mut read).await.unwrap();
    drop((app, server));
    until(|| w.pool.connections() == 1).await;
    drop(fresh);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_peer_gets_no_new_streams_and_keeps_those_it_has() {
    for at_the_server in [true, false] {
        let w = world().await;
        let (address, listener) = backend().await;
        let (mut app, ..) = w.application(address).await;
        let (mut server, _) = listener.accept().await.unwrap();
        let retire = |now: u64| {
            if at_the_server {
                w.server.retire(now);
            } else {
                w.pool.retire(now);
            }
        };
        retire(now_unix());
        let _same = w.open(address).await.unwrap();
        assert_eq!(w.pool.connections(), 1, "nobody has expired");
        retire(u64::MAX);
        let mut more = Vec::new();
        let end = Instant::now() + WAIT;
        while w.pool.connections() < 2 {
            assert!(
                Instant::now() < end,
                "new streams still go over the old connection"
            );
            more.push(w.open(address).await);
        }
        app.write_all(b"still here").await.unwrap();
        let mut read = [0; 10];
        server.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"still here");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_that_is_taken_away_cuts_who_hangs_on_it() {
    let w = world().await;
    let (address, _listener) = backend().await;
    let _stream = w.open(address).await.unwrap();
    // One more root: nobody is cut.
    let second = Mesh::new("second.example");
    w.client.set_bundles(vec![w.mesh.bundle(), second.bundle()]);
    w.server_identity
        .set_bundles(vec![w.mesh.bundle(), second.bundle()]);
    w.pool.recheck(now_unix());
    w.server.recheck(now_unix(), |_| true);
    let _more = w.open(address).await.unwrap();
    assert_eq!(w.pool.connections(), 2);
    w.client.set_bundles(vec![second.bundle()]);
    w.pool.recheck(now_unix());
    until(|| w.pool.connections() == 0).await;
    assert!(matches!(w.open(address).await, Err(OpenError::Tls(_))));
}
