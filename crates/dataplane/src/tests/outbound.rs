use super::hosts::{Fleet, VIP, accepted, backend, until};
use crate::Settings;
use std::{io, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::{Instant, timeout},
};
use tombolo_capture::Refusal;
use tombolo_destination::resolve;
use tombolo_proto::{istio::workload as wds, type_url};
use tombolo_telemetry::Direction;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_arrives_with_identity_and_is_counted_on_both_sides() {
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();

    let mut app = web.connected(&fleet.tasks).await;
    let (mut server, from) = accepted(&listener).await;
    assert_eq!(from, super::hosts::plan().host_v4(), "from mesh0's address");
    app.write_all(b"question").await.unwrap();
    app.shutdown().await.unwrap();
    let mut read = String::new();
    server.read_to_string(&mut read).await.unwrap();
    assert_eq!(read, "question");
    server.write_all(b"the answer").await.unwrap();

    until(|| web.dataplane.connection_count() + catalog.dataplane.connection_count() == 2).await;
    let [info] = &web.dataplane.connections()[..] else {
        panic!("one connection")
    };
    assert_eq!(
        (info.direction, info.destination.ip()),
        (Direction::Outbound, VIP.into())
    );
    assert_eq!(info.peer, Some(fleet.mesh.id("shop", "catalog")));
    let [info] = &catalog.dataplane.connections()[..] else {
        panic!("one connection")
    };
    assert_eq!(
        (info.direction, info.destination.port()),
        (Direction::Inbound, port)
    );
    assert_eq!(info.peer, Some(fleet.mesh.id("shop", "webapp")));

    drop(server);
    app.read_to_string(&mut read).await.unwrap();
    assert_eq!(read, "questionthe answer");
    until(|| web.dataplane.connection_count() + catalog.dataplane.connection_count() == 0).await;
    let caller = "source_principal=\"spiffe://mesh.example/ns/shop/sa/webapp\"";
    let called = "destination_principal=\"spiffe://mesh.example/ns/shop/sa/catalog\"";
    for (host, reporter) in [
        (&web, "reporter=\"source\""),
        (&catalog, "reporter=\"destination\""),
    ] {
        for (name, value) in [
            ("istio_tcp_connections_opened_total", " 1"),
            ("istio_tcp_connections_closed_total", " 1"),
            ("istio_tcp_received_bytes_total", " 8"),
            ("istio_tcp_sent_bytes_total", " 10"),
        ] {
            let parts = [
                name,
                reporter,
                caller,
                called,
                "source_workload=\"webapp\"",
                "mutual_tls",
                value,
            ];
            assert!(host.measured(&parts), "{parts:?} in {}", host.metrics.encode());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_connected_is_refused_as_what_it_is() {
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    assert_eq!(
        web.refused(&fleet.tasks, 81).await,
        Refusal::Reset,
        "no such port"
    );
    drop(listener);
    assert_eq!(
        web.refused(&fleet.tasks, 80).await,
        Refusal::Reset,
        "the application is not there"
    );
    assert!(catalog.measured(&[
        "tombolo_dataplane_refused_total",
        "inbound",
        "refused_by_application",
        " 1"
    ]));
    fleet.workload(&catalog, |wire| {
        wire.status = wds::WorkloadStatus::Unhealthy.into()
    });
    fleet.catalog(port, &[]);
    fleet.publish();
    assert_eq!(
        web.refused(&fleet.tasks, 80).await,
        Refusal::HostUnreachable,
        "nobody serves it"
    );
    let nowhere = web.connect(&fleet.tasks, ([127, 240, 0, 99], 80)).refusal().await;
    assert_eq!(nowhere, Refusal::Reset, "no such address");
    for reason in [
        "unknown_port",
        "refused_by_application",
        "no_healthy_endpoint",
        "unknown_address",
    ] {
        assert!(
            web.measured(&["tombolo_dataplane_refused_total", "outbound", reason, " 1"]),
            "{reason}"
        );
    }
    until(|| web.measured(&["tombolo_dataplane_held_flows 0"])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_endpoint_is_tried_before_the_application_knows() {
    let mut fleet = Fleet::new();
    let web = fleet.host("webapp");
    let (good, empty, gone) = (
        fleet.host("catalog"),
        fleet.host("catalog"),
        fleet.host("catalog"),
    );
    let (port, listener) = backend().await;
    let (free, unused) = backend().await;
    drop(unused);
    fleet.catalog(port, &[&good]);
    // One whose application is not there, one that nobody listens at.
    fleet.serve(&empty, free);
    fleet.serve(&gone, port);
    fleet.workload(&gone, |wire| {
        wire.addresses = vec![vec![127, 255, 255, 1]];
        let list = wds::PortList {
            ports: vec![wds::Port {
                service_port: 80,
                target_port: port.into(),
                app_protocol: 0,
            }],
        };
        wire.services.insert(super::hosts::CATALOG.to_owned(), list);
    });
    fleet.publish();
    let mut kept = Vec::new();
    for i in 0..20 {
        kept.push(web.connected(&fleet.tasks).await);
        kept.push(accepted(&listener).await.0);
        until(|| web.dataplane.connection_count() == i + 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_endpoint_costs_a_second_once() {
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let silent = fleet.host("catalog");
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog, &silent]);
    // It takes TCP connections and says nothing, as a frozen host does.
    let address = [127, 254, 0, u8::try_from(silent.device).unwrap()];
    let _frozen = TcpListener::bind((std::net::Ipv4Addr::from(address), 15008))
        .await
        .unwrap();
    fleet.workload(&silent, |wire| {
        wire.addresses = vec![address.to_vec()];
        let list = wds::PortList {
            ports: vec![wds::Port {
                service_port: 80,
                target_port: port.into(),
                app_protocol: 0,
            }],
        };
        wire.services.insert(super::hosts::CATALOG.to_owned(), list);
    });
    fleet.publish();
    let started = Instant::now();
    let mut kept = Vec::new();
    for _ in 0..10 {
        kept.push(web.connected(&fleet.tasks).await);
        kept.push(accepted(&listener).await.0);
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_identity_is_not_spoken_to() {
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    catalog.identity.set_identity(fleet.mesh.issue(
        &fleet.mesh.id("shop", "payments"),
        tombolo_types::DeviceId(catalog.device),
    ));
    assert_eq!(web.refused(&fleet.tasks, 80).await, Refusal::Reset);
    assert!(web.measured(&["tombolo_tunnel_handshakes_total", "client", "wrong_peer", " 1"]));
    let nobody = timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(nobody.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_outside_the_mesh_is_reached_by_plain_tcp() {
    let mut fleet = Fleet::new();
    let (web, outside) = (fleet.host("webapp"), fleet.host("external"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[]);
    fleet.workload(&outside, |wire| {
        wire.addresses = vec![vec![127, 0, 0, 1]];
        wire.tunnel_protocol = wds::TunnelProtocol::None.into();
        let list = wds::PortList {
            ports: vec![wds::Port {
                service_port: 80,
                target_port: port.into(),
                app_protocol: 0,
            }],
        };
        wire.services.insert(super::hosts::CATALOG.to_owned(), list);
    });
    fleet.publish();
    let mut app = web.connected(&fleet.tasks).await;
    let (mut server, _) = accepted(&listener).await;
    app.write_all(b"hi").await.unwrap();
    app.shutdown().await.unwrap();
    let mut read = String::new();
    server.read_to_string(&mut read).await.unwrap();
    assert_eq!(read, "hi");
    drop(server);
    assert_eq!(app.read_to_string(&mut read).await.unwrap(), 0);
    until(|| web.dataplane.connection_count() == 0).await;
    assert!(web.measured(&[
        "istio_tcp_received_bytes_total",
        "connection_security_policy=\"unknown\"",
        " 2"
    ]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_calls_itself() {
    let mut fleet = Fleet::new();
    let catalog = fleet.host("catalog");
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    let _app = catalog.connected(&fleet.tasks).await;
    accepted(&listener).await;
    until(|| catalog.dataplane.connection_count() == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trial_says_how_far_it_came() {
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    let world = web.dataplane.context.world.load();
    let destination = resolve(&*world, &world.source(), VIP.into(), 80).unwrap();
    let results = web.dataplane.probe(&destination).await;
    assert!(results[0].outcome.is_ok(), "{results:?}");
    assert_eq!(results[0].peer, Some(fleet.mesh.id("shop", "catalog")));
    drop(listener);
    let results = web.dataplane.probe(&destination).await;
    assert_eq!(
        results[0]
            .outcome
            .as_ref()
            .unwrap_err()
            .open_error()
            .unwrap()
            .reason(),
        "refused_by_application"
    );
    assert_eq!(web.dataplane.connection_count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_waits_then_cuts() {
    let mut fleet = Fleet::new();
    let settings = Settings {
        drain: Duration::from_millis(300),
        ..Settings::default()
    };
    let (web, catalog) = (fleet.host("webapp"), fleet.host_with("catalog", settings));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    let mut app = web.connected(&fleet.tasks).await;
    let (mut server, _) = accepted(&listener).await;
    let (_, ()) = tokio::join!(
        async {
            timeout(super::hosts::WAIT, catalog.dataplane.drain())
                .await
                .unwrap()
        },
        async {
            // Within the deadline the connection works, and nothing new is taken.
            server.write_all(b"x").await.unwrap();
            app.read_exact(&mut [0]).await.unwrap();
            until(|| catalog.dataplane.connection_count() == 1).await;
        }
    );
    let error = app.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(catalog.dataplane.connection_count(), 0);
    assert_eq!(web.refused(&fleet.tasks, 80).await, Refusal::HostUnreachable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_connections_follow_the_endpoint_with_fewest() {
    let mut fleet = Fleet::new();
    let web = fleet.host("webapp");
    let (one, two) = (fleet.host("catalog"), fleet.host("catalog"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&one, &two]);
    fleet.publish_types(&[type_url::ADDRESS, type_url::AUTHORIZATION, type_url::EXPOSURE]);
    let mut kept = Vec::new();
    for _ in 0..10 {
        kept.push(web.connected(&fleet.tasks).await);
        kept.push(accepted(&listener).await.0);
    }
    assert_eq!(
        (one.dataplane.connection_count(), two.dataplane.connection_count()),
        (5, 5)
    );
}

#[tokio::test]
async fn an_open_connection_costs_a_small_task() {
    let mut fleet = Fleet::new();
    let web = fleet.host("webapp");
    let size = web.task_size();
    // Beside it: the flow (320), the stream in HTTP/2 (about 700) and the socket of the runtime (about 300).
    assert!(size <= 640, "{size}");
}
