use crate::lab::*;
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::{TcpListener, TcpStream};
use tombolo_discovery::config::Life;
use tombolo_identity::{LiveIdentity, hbone_server_config};
use tombolo_proto::{
    google::rpc::Status,
    istio::workload::{Address, WorkloadStatus, address::Type},
    type_url,
    xds::DeltaDiscoveryRequest,
};
use tombolo_runtime::TaskGroup;

async fn state(lab: &Lab) -> (String, String) {
    let vm = lab.vms().await.remove(0);
    (vm.state, vm.reason)
}

fn health(message: Option<&str>) -> DeltaDiscoveryRequest {
    let error_detail = message.map(|message| Status {
        code: 13,
        message: message.into(),
        ..Default::default()
    });
    DeltaDiscoveryRequest {
        type_url: type_url::HEALTH.into(),
        error_detail,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_stream_and_its_probe_decide_health() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    assert_eq!(state(&lab).await.0, "Away", "its agent has not connected");
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    ads.next().await.unwrap();
    lab.wait_for("healthy", async || state(&lab).await.0 == "Healthy")
        .await;
    ads.send(health(Some("connection refused"))).await;
    lab.wait_for("unhealthy", async || state(&lab).await.0 == "Unhealthy")
        .await;
    assert!(state(&lab).await.1.contains("connection refused"));
    let entry = lab
        .get("WorkloadEntry", &host.registration.workload_name)
        .await
        .unwrap();
    assert_eq!(entry["status"]["conditions"][0]["status"], "False", "merged live");
    ads.send(health(None)).await;
    lab.wait_for("healthy again", async || state(&lab).await.0 == "Healthy")
        .await;
    // The stream is lost; nobody reached its endpoint before, so nobody takes it out.
    drop(ads);
    lab.wait_for("suspect", async || state(&lab).await.0 == "Suspect")
        .await;
    assert!(state(&lab).await.1.contains("control stream is lost"));
    // A stop on purpose holds until it is back.
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    ads.send(health(Some("draining"))).await;
    lab.wait_for("draining", async || state(&lab).await.0 == "Unhealthy")
        .await;
    drop(ads);
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    lab.wait_for("back", async || state(&lab).await.0 == "Healthy")
        .await;
}

#[tokio::test]
async fn a_group_with_a_probe_waits_for_its_first_report() {
    let lab = Lab::start().await;
    let mut probed = group("catalog");
    probed["spec"]["probe"] = serde_json::json!({ "tcpSocket": { "port": 8080 } });
    lab.apply(&[probed, service("catalog")]).await.unwrap();
    let host = lab.enrol("catalog").await;
    assert!(host.registration.probe_json.contains("tcpSocket"));
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    lab.wait_for("connected", async || lab.vms().await[0].connected)
        .await;
    assert_eq!(state(&lab).await.0, "Unhealthy");
    ads.send(health(None)).await;
    lab.wait_for("healthy", async || state(&lab).await.0 == "Healthy")
        .await;
}

#[tokio::test]
async fn health_survives_a_restart_without_being_in_the_store() {
    let mut lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let version = lab
        .get("WorkloadEntry", &host.registration.workload_name)
        .await
        .unwrap()["metadata"]["resourceVersion"]
        .clone();
    let mut ads = host.ads(&lab).await;
    ads.subscribe(type_url::ADDRESS).await;
    ads.send(health(Some("disk full"))).await;
    lab.wait_for("unhealthy", async || state(&lab).await.0 == "Unhealthy")
        .await;
    lab.shut_down().await;
    lab.boot().await;
    assert_eq!(state(&lab).await.0, "Unhealthy", "the last known health");
    let entry = lab
        .get("WorkloadEntry", &host.registration.workload_name)
        .await
        .unwrap();
    assert_eq!(
        entry["metadata"]["resourceVersion"], version,
        "no heartbeat was written"
    );
}

/// A cable that can be cut: forwards to discovery, until it does not any more and nobody is told.
struct Cable {
    address: SocketAddr,
    cut: tokio_util::sync::CancellationToken,
    tasks: TaskGroup,
}

impl Cable {
    async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((target.ip(), 0)).await.unwrap();
        let (address, cut) = (
            listener.local_addr().unwrap(),
            tokio_util::sync::CancellationToken::new(),
        );
        let tasks = TaskGroup::new("cable");
        let (token, group) = (cut.clone(), tasks.clone());
        tasks.spawn_until_stopped("cable", async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let token = token.clone();
                group.spawn_until_stopped("strand", async move {
                    let mut far = TcpStream::connect(target).await.unwrap();
                    let forward = tokio::io::copy_bidirectional(&mut near, &mut far);
                    let _ = token.run_until_cancelled(forward).await;
                    std::future::pending::<()>().await; // the sockets stay open, and silent
                });
            }
        });
        Self { address, cut, tasks }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

/// A member on this host's own address whose stream runs over a cable, and another one that watches.
async fn powered(witness: u16, address: IpAddr) -> (Lab, Host, Ads, Cable, Ads) {
    let lab = Lab::start_with(|config| {
        config.listen = SocketAddr::new(address, 0);
        config.witness_port = witness;
        config.start_grace = Life(Duration::ZERO);
    })
    .await;
    lab.group("catalog").await;
    let token = lab.token("catalog", |_| ()).await;
    let mut host = Host::new();
    host.addresses = vec![address.to_string()];
    host.enrol(&lab, &token).await.unwrap();
    assert!(
        host.warnings.is_empty(),
        "the source of the connection: {:?}",
        host.warnings
    );
    let cable = Cable::to(lab.running().address).await;
    let (channel, _) = lab.dial_at(cable.address, host.identity.clone()).await;
    let mut stream = Ads::open(channel, host.node(), None).await;
    stream.subscribe(type_url::ADDRESS).await;
    stream.next().await.unwrap();
    let mut observer = lab.enrol("catalog").await.ads(&lab).await;
    observer.subscribe(type_url::ADDRESS).await;
    let memory = lab.config.state_dir.join("members.json");
    lab.wait_for("the witness to have reached it", async || {
        std::fs::read_to_string(&memory)
            .unwrap_or_default()
            .contains(r#""reached":true"#)
    })
    .await;
    while !observer.is_quiet_after_acks().await {}
    (lab, host, stream, cable, observer)
}

#[tokio::test]
async fn power_off_is_pushed_within_three_seconds() {
    let Some(address) = host_address() else {
        return skip("this host has no address besides loopback");
    };
    let witness = TcpListener::bind((address, 0)).await.unwrap();
    let (_lab, host, _stream, cable, mut observer) =
        powered(witness.local_addr().unwrap().port(), address).await;
    drop(witness);
    let start = Instant::now();
    cable.cut.cancel();
    loop {
        let push = observer.next().await.unwrap();
        let gone = push.resources.iter().any(|resource| {
            let address: Address = tombolo_proto::unpack(resource.resource.as_ref().unwrap()).unwrap();
            matches!(address.r#type, Some(Type::Workload(workload))
                if workload.name == host.registration.workload_name && workload.status() == WorkloadStatus::Unhealthy)
        });
        if gone {
            break;
        }
    }
    println!("power-off to push: {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_lost_stream_alone_takes_nobody_out() {
    let Some(address) = host_address() else {
        return skip("this host has no address besides loopback");
    };
    let witness = TcpListener::bind((address, 0)).await.unwrap();
    let (lab, host, _stream, cable, mut observer) =
        powered(witness.local_addr().unwrap().port(), address).await;
    cable.cut.cancel();
    let vm = async || {
        lab.vms()
            .await
            .into_iter()
            .find(|vm| vm.device_id == host.registration.device_id)
            .unwrap()
    };
    lab.wait_for("suspect", async || vm().await.state == "Suspect")
        .await;
    lab.wait_for("its witness", async || {
        vm().await.reason.contains("still answers")
    })
    .await;
    assert!(observer.is_quiet().await, "nothing was pushed");
}

#[tokio::test]
async fn an_address_goes_to_whoever_shows_the_certificate_there() {
    let Some(address) = host_address() else {
        return skip("this host has no address besides loopback");
    };
    let witness = TcpListener::bind((address, 0)).await.unwrap();
    let (lab, first, _stream, _cable, _observer) =
        powered(witness.local_addr().unwrap().port(), address).await;
    let token = lab.token("catalog", |_| ()).await;
    let mut second = Host::new();
    second.addresses = vec![address.to_string()];
    second.enrol(&lab, &token).await.unwrap();
    assert!(second.warnings[0].starts_with("TMB0130"), "{:?}", second.warnings);
    let address_of = async |host: &Host| {
        let entry = lab
            .get("WorkloadEntry", &host.registration.workload_name)
            .await
            .unwrap();
        entry["spec"]["address"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(
        (address_of(&first).await, address_of(&second).await),
        (address.to_string(), String::new())
    );
    // The second one is who answers on the HBONE port.
    let live = LiveIdentity::new(second.identity.clone(), vec![lab.bundle()]);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(hbone_server_config(&live).unwrap()));
    let tasks = TaskGroup::new("hbone");
    tasks.spawn_until_stopped("hbone", async move {
        while let Ok((socket, _)) = witness.accept().await {
            let _ = acceptor.accept(socket).await;
        }
    });
    let _stream = {
        let mut ads = second.ads(&lab).await;
        ads.subscribe(type_url::ADDRESS).await;
        ads
    };
    lab.wait_for("the address to move", async || {
        address_of(&second).await == address.to_string()
    })
    .await;
    assert_eq!(address_of(&first).await, "");
    tasks.stop();
}

#[tokio::test]
async fn a_copy_elsewhere_says_nothing_while_the_device_is_where_it_was() {
    let Some(address) = host_address() else {
        return skip("this host has no address besides loopback");
    };
    let witness = TcpListener::bind((address, 0)).await.unwrap();
    let lab = Lab::start_with(|config| {
        config.listen = "0.0.0.0:0".parse().unwrap();
        config.witness_port = witness.local_addr().unwrap().port();
    })
    .await;
    lab.group("catalog").await;
    let mut host = lab.enrol("catalog").await;
    let open = async |host: &Host, from: IpAddr| {
        let at = SocketAddr::new(from, lab.running().address.port());
        let (channel, _) = lab.dial_at(at, host.identity.clone()).await;
        let mut ads = Ads::open(channel, host.node(), None).await;
        ads.subscribe(type_url::ADDRESS).await;
        ads
    };
    let address_is = async |wanted: IpAddr| {
        lab.wait_for("the address", async || {
            lab.vms().await[0].addresses == [wanted.to_string()]
        })
        .await;
    };
    let live = LiveIdentity::new(host.identity.clone(), vec![lab.bundle()]);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(hbone_server_config(&live).unwrap()));
    let tasks = TaskGroup::new("hbone");
    tasks.spawn_until_stopped("hbone", async move {
        while let Ok((socket, _)) = witness.accept().await {
            let _ = acceptor.accept(socket).await;
        }
    });
    host.addresses = vec![address.to_string()];
    let original = open(&host, address).await;
    address_is(address).await;
    // The same device from loopback, with an address that the group may claim.
    let (elsewhere, loopback) = (IpAddr::from([10, 1, 2, 3]), IpAddr::from([127, 0, 0, 1]));
    host.addresses = vec![elsewhere.to_string()];
    let mut copy = open(&host, loopback).await;
    copy.send(health(Some("draining"))).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    address_is(address).await;
    assert_eq!(state(&lab).await.0, "Healthy");
    // It has left: now the other one is the device, and what it says counts.
    tasks.stop();
    tasks.drain(Duration::from_secs(1)).await;
    drop((original, copy));
    let mut moved = open(&host, loopback).await;
    moved.send(health(Some("connection refused"))).await;
    address_is(elsewhere).await;
    lab.wait_for("its report", async || state(&lab).await.0 == "Unhealthy")
        .await;
}
