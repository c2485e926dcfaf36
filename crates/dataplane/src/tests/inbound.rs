use super::hosts::{CATALOG, Fleet, Host, accepted, backend, until};
use crate::{
    Settings,
    inbound::{Delivery, delivery, local_target},
};
use std::{io, net::IpAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, timeout},
};
use tombolo_capture::Refusal;
use tombolo_destination::Index as _;
use tombolo_proto::type_url;
use tombolo_snapshot::{ExposedPort, Exposure};
use tombolo_tunnel::{Authority, ConnectRequest, OpenError, Target};

/// What a host answers to a CONNECT of another.
async fn ask(from: &Host, to: &Host, expected: &str, authority: &str) -> Result<(), OpenError> {
    let target = Target {
        hbone: (to.address, 15008).into(),
        expected: [tombolo_types::SpiffeId::new("mesh.example".parse().unwrap(), "shop", expected).unwrap()]
            .into(),
    };
    let authority: Authority = authority.parse().unwrap();
    let request = ConnectRequest::new(authority);
    from.dataplane
        .context
        .pool
        .open(&target, &request, Instant::now() + super::hosts::WAIT)
        .await
        .map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statuses_are_ztunnels() {
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    let own = catalog.address;
    let name = CATALOG.split_once('/').unwrap().1;
    for (authority, status) in [
        (format!("{own}:{port}"), 200),
        (format!("{name}:80"), 200),
        (format!("{name}:81"), 503),
        ("unknown.shop.svc.mesh.internal:80".to_owned(), 503),
        (format!("10.9.9.9:{port}"), 400),
        (format!("{own}:15006"), 503),
        (format!("{own}:15008"), 503),
        (format!("{own}:22"), 503),
    ] {
        let answer = ask(&web, &catalog, "catalog", &authority).await;
        match answer {
            Ok(()) => assert_eq!(status, 200, "{authority}"),
            Err(OpenError::Status(answer)) => assert_eq!(status, answer, "{authority}"),
            Err(error) => panic!("{authority}: {error}"),
        }
    }
    assert!(catalog.measured(&["tombolo_dataplane_refused_total", "port_not_declared", " 3"]));
    fleet.deny("no-web", &web.principal());
    fleet.publish();
    let denied = ask(&web, &catalog, "catalog", &format!("{own}:{port}")).await;
    assert!(matches!(denied, Err(OpenError::Status(401))), "{denied:?}");
    drop(listener);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_policy_cuts_what_it_denies_and_nothing_else() {
    let mut fleet = Fleet::new();
    let (web, other) = (fleet.host("webapp"), fleet.host("other"));
    let catalog = fleet.host("catalog");
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    let mut denied = web.connected(&fleet.tasks).await;
    let (mut session, _) = accepted(&listener).await;
    let mut innocent = other.connected(&fleet.tasks).await;
    let (mut second, _) = accepted(&listener).await;

    fleet.deny("no-web", &web.principal());
    fleet.publish();
    for socket in [&mut denied, &mut session] {
        let cut = timeout(Duration::from_secs(1), socket.read(&mut [0]))
            .await
            .expect("cut at once");
        assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
    assert_eq!(
        web.refused(&fleet.tasks, 80).await,
        Refusal::Reset,
        "refused, not accepted and dropped"
    );
    assert!(web.measured(&[
        "tombolo_dataplane_refused_total",
        "outbound",
        "denied_by_peer",
        " 1"
    ]));
    assert!(catalog.measured(&["tombolo_dataplane_cut_total", "inbound", "denied_by_policy", " 1"]));
    innocent.write_all(b"x").await.unwrap();
    second.read_exact(&mut [0]).await.unwrap();

    fleet.remove(type_url::AUTHORIZATION, "shop/no-web");
    fleet.publish();
    let _again = web.connected(&fleet.tasks).await;
    accepted(&listener).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_device_is_cut_on_both_sides_and_its_group_lives_on() {
    let mut fleet = Fleet::new();
    let (web, twin) = (fleet.host("webapp"), fleet.host("webapp"));
    let catalog = fleet.host("catalog");
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    let mut guilty = web.connected(&fleet.tasks).await;
    accepted(&listener).await;
    let mut guilty_server = accepted_after(&web, &fleet, &listener).await;
    let mut innocent = twin.connected(&fleet.tasks).await;
    let (mut innocent_server, _) = accepted(&listener).await;

    fleet.revoke(web.device);
    let started = Instant::now();
    fleet.publish();
    for socket in [&mut guilty, &mut guilty_server.0, &mut guilty_server.1] {
        let cut = timeout(Duration::from_secs(1), socket.read(&mut [0]))
            .await
            .expect("cut within a second");
        assert!(cut.is_err() || cut.unwrap() == 0);
    }
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_ne!(
        web.connect(&fleet.tasks, (super::hosts::VIP, 80)).refusal().await,
        Refusal::Silent
    );
    innocent.write_all(b"x").await.unwrap();
    innocent_server.read_exact(&mut [0]).await.unwrap();

    // The other way: callers cut a revoked server.
    fleet.revoke(catalog.device);
    fleet.publish();
    let cut = timeout(Duration::from_secs(1), innocent.read(&mut [0]))
        .await
        .expect("cut within a second");
    assert!(cut.is_err());
    twin.connect(&fleet.tasks, (super::hosts::VIP, 80))
        .refusal()
        .await;
}

async fn accepted_after(
    host: &Host,
    fleet: &Fleet,
    listener: &tokio::net::TcpListener,
) -> (tokio::net::TcpStream, tokio::net::TcpStream) {
    let app = host.connected(&fleet.tasks).await;
    (accepted(listener).await.0, app)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_first_set_of_policies_nothing_is_admitted() {
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let (port, _listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish_types(&[type_url::ADDRESS, type_url::EXPOSURE, type_url::REVOCATIONS]);
    let refused = ask(&web, &catalog, "catalog", &format!("{}:{port}", catalog.address)).await;
    assert!(matches!(refused, Err(OpenError::Status(503))), "{refused:?}");
    assert!(catalog.measured(&["refused_total", "no_policies_received"]));
    fleet.publish();
    ask(&web, &catalog, "catalog", &format!("{}:{port}", catalog.address))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_waits_for_the_own_record() {
    let mut fleet = Fleet::new();
    let settings = Settings {
        own_record_wait: Duration::from_millis(500),
        ..Settings::default()
    };
    let (web, catalog) = (fleet.host("webapp"), fleet.host_with("catalog", settings));
    let (port, _listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    let authority = format!("{}:{port}", catalog.address);
    let refused = ask(&web, &catalog, "catalog", &authority).await;
    assert!(matches!(refused, Err(OpenError::Status(503))), "{refused:?}");
    assert!(catalog.measured(&["refused_total", "own_record_missing", " 1"]));
    let (answer, ()) = tokio::join!(ask(&web, &catalog, "catalog", &authority), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        fleet.publish();
    });
    answer.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_that_comes_during_the_decision_is_not_missed() {
    // Connections and policy changes at full speed: whatever is open in the end must be allowed.
    let mut fleet = Fleet::new();
    let (web, catalog) = (fleet.host("webapp"), fleet.host("catalog"));
    let (port, listener) = backend().await;
    fleet.catalog(port, &[&catalog]);
    fleet.publish();
    let backend_task = fleet.tasks.spawn("backend", async move {
        let mut sockets = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            sockets.push(socket);
        }
    });
    let mut open = Vec::new();
    for _ in 0..20 {
        let tries: Vec<_> = (0..5)
            .map(|_| web.connect(&fleet.tasks, (super::hosts::VIP, 80)))
            .collect();
        fleet.deny("no-web", &web.principal());
        fleet.publish();
        for one in tries {
            open.extend(one.outcome().await.ok());
        }
        until(|| catalog.dataplane.connection_count() == 0).await;
        fleet.remove(type_url::AUTHORIZATION, "shop/no-web");
        fleet.publish();
    }
    backend_task.abort();
    for mut socket in open {
        let cut = timeout(Duration::from_secs(1), socket.read(&mut [0]))
            .await
            .expect("none is left open");
        assert!(cut.is_err() || cut.unwrap() == 0);
    }
}

/// Where the peer has reached this host.
const REACHED: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deliveries() {
    let mut fleet = Fleet::new();
    let catalog = fleet.host("catalog");
    fleet.catalog(8080, &[&catalog]);
    fleet.publish();
    let world = catalog.dataplane.context.world.load();
    let own = Arc::clone(world.own_workload().unwrap());
    let some = Exposure {
        ports: vec![ExposedPort {
            port: 8080,
            loopback: false,
        }],
        all_ports: false,
    };
    let all = Exposure {
        ports: Vec::new(),
        all_ports: true,
    };
    let check = |exposure: &Exposure, authority: &str| {
        delivery(&world, &own, exposure, &authority.parse().unwrap(), REACHED)
            .map(|d| d.port)
            .map_err(|reject| reject.reason)
    };
    let own_ip = catalog.address;
    let host = CATALOG.split_once('/').unwrap().1;
    assert_eq!(check(&some, &format!("{own_ip}:8080")), Ok(8080));
    assert_eq!(check(&some, &format!("[::ffff:{own_ip}]:8080")), Ok(8080));
    assert_eq!(check(&some, &format!("{host}:80")), Ok(8080));
    assert_eq!(check(&some, &format!("{own_ip}:8081")), Err("port_not_declared"));
    assert_eq!(check(&all, &format!("{own_ip}:8081")), Ok(8081));
    for never in [22, 15008, 15001, 15021] {
        assert_eq!(
            check(&all, &format!("{own_ip}:{never}")),
            Err("port_not_declared"),
            "{never}"
        );
    }
    let ssh = Exposure {
        ports: vec![ExposedPort {
            port: 22,
            loopback: true,
        }],
        all_ports: false,
    };
    assert_eq!(
        check(&ssh, &format!("{own_ip}:22")),
        Err("port_not_declared"),
        "whatever discovery says"
    );
    assert_eq!(check(&all, "169.254.169.254:80"), Err("address_mismatch"));
    assert_eq!(check(&all, "127.0.0.1:80"), Err("address_mismatch"));
    assert!(world.service(&CATALOG.parse().unwrap()).is_some());
}

#[test]
fn local_targets() {
    let target = |address: &str, reached: &str, local: &str, loopback: bool| {
        let delivery = Delivery {
            address: address.parse().unwrap(),
            port: 80,
            loopback,
            service: None,
        };
        let local: IpAddr = local.parse().unwrap();
        local_target(&delivery, reached.parse().unwrap(), |ip| {
            ip == local.to_canonical()
        })
        .map(|target| target.ip().to_string())
        .map_err(|reject| reject.reason)
    };
    assert_eq!(
        target("10.0.0.2", "10.0.0.2", "10.0.0.2", false),
        Ok("10.0.0.2".into())
    );
    // Meant by the public address of a 1:1 NAT, reached at the inner one.
    assert_eq!(
        target("203.0.113.5", "10.0.0.2", "10.0.0.2", false),
        Ok("10.0.0.2".into())
    );
    // Another own address than the one that was reached.
    assert_eq!(
        target("2001:db8::2", "10.0.0.2", "2001:db8::2", false),
        Ok("2001:db8::2".into())
    );
    assert_eq!(
        target("10.0.0.2", "10.0.0.2", "10.0.0.2", true),
        Ok("127.0.0.1".into())
    );
    assert_eq!(
        target("2001:db8::2", "2001:db8::2", "2001:db8::2", true),
        Ok("::1".into())
    );
    assert_eq!(
        target("127.0.0.1", "127.0.0.1", "127.0.0.1", false),
        Err("loopback_not_declared")
    );
    assert_eq!(
        target("169.254.1.1", "169.254.1.1", "169.254.1.1", false),
        Err("link_local_never_delivered")
    );
    assert_eq!(
        target("203.0.113.5", "::ffff:10.0.0.2", "10.0.0.2", false),
        Ok("10.0.0.2".into())
    );
    // Addresses that mean this host's loopback, or nobody in particular, in other words.
    for (address, reason) in [
        ("::ffff:127.0.0.1", "loopback_not_declared"),
        ("::1", "loopback_not_declared"),
        ("127.8.8.8", "loopback_not_declared"),
        ("0.0.0.0", "address_never_delivered"),
        ("::", "address_never_delivered"),
        ("::ffff:0.0.0.0", "address_never_delivered"),
        ("224.0.0.1", "address_never_delivered"),
        ("255.255.255.255", "address_never_delivered"),
        ("::ffff:169.254.169.254", "link_local_never_delivered"),
        ("fe80::1", "link_local_never_delivered"),
    ] {
        assert_eq!(
            target(address, "10.0.0.2", address, false),
            Err(reason),
            "{address}"
        );
    }
}
