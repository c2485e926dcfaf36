//! Attacks over the wire on `tombolo-discovery` itself: what an invite, a member's keys or a broken stream give away.

use crate::{clusters::*, hostile_member::*, lab::*};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};
use tombolo_identity::JoinKey;
use tombolo_proto::{
    istio::workload::{Address, address::Type},
    tombolo::{
        admin::v1 as admin,
        federation::v1::{self as pb, peer_message::Message},
        v1::NetworkGateways,
    },
    type_url, unpack,
};
use tombolo_types::InviteToken;

/// What a process may grow by, whatever a member sends to it: exports in the making and their queue, in a debug build.
const GROWTH_MAX_KIB: u64 = 160 << 10;

/// West, a process; east, an honest member; and what is left of mallory, who may export `shop`.
struct Scene {
    west: Lab,
    east: Lab,
    mallory: HostileMember,
    _keys: Lab,
}

async fn scene() -> Scene {
    let (west, east, mut keys) = (
        process("west", |_| ()).await,
        cluster("east").await,
        cluster("mallory").await,
    );
    west.apply(&[exported("catalog"), entry("catalog", 1)])
        .await
        .unwrap();
    admit(&west, &east, "east").await;
    admit(&west, &keys, "mallory").await;
    wait_imported(&east, "catalog", 1).await;
    wait_state(&west, "mallory", "Connected").await;
    wait_state(&east, "mallory", "Connected").await;
    keys.shut_down().await;
    let mallory = HostileMember::steal(&keys, "mallory");
    Scene {
        west,
        east,
        mallory,
        _keys: keys,
    }
}

impl Scene {
    /// An honest member sees a change of west as it comes, and its session is there.
    async fn undisturbed(&self, weight: u32) {
        let begun = Instant::now();
        self.west.apply(&[entry("catalog", weight)]).await.unwrap();
        wait_imported(&self.east, "catalog", weight).await;
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}");
        assert_eq!(state(&self.west, "east").await.as_deref(), Some("Connected"));
    }
}

fn service(namespace: &str, name: &str, id: &str) -> pb::ExportedService {
    pb::ExportedService {
        namespace: namespace.into(),
        name: name.into(),
        ports: vec![pb::ExportedPort {
            port: 80,
            protocol: "HTTP".into(),
            name: "http".into(),
        }],
        subject_alt_names: vec![id.into()],
        presences: vec![pb::Presence {
            // The network of another cluster, as if endpoints of mallory were there.
            network: "east".into(),
            healthy: 1,
            capacity: 1,
            ..pb::Presence::default()
        }],
    }
}

fn gateway(address: &str) -> pb::ExportedGateway {
    pb::ExportedGateway {
        network: "east".into(),
        address: address.into(),
        hbone_port: 15008,
        ..pb::ExportedGateway::default()
    }
}

/// What a discovery tells a host of a type, as soon as a resource is there.
async fn resources(ads: &mut Ads, url: &str, wanted: &str) -> BTreeMap<String, prost_types::Any> {
    ads.subscribe(url).await;
    let mut held = BTreeMap::new();
    while !held.keys().any(|name: &String| name.contains(wanted)) {
        let response = ads.next().await.unwrap();
        if response.type_url != url {
            continue;
        }
        for removed in &response.removed_resources {
            held.remove(removed);
        }
        for resource in response.resources {
            held.insert(resource.name, resource.resource.unwrap());
        }
    }
    held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stolen_member_key_gives_no_more_than_its_grant() {
    let scene = scene().await;
    let (west, mallory) = (&scene.west, &scene.mallory);
    let own = "spiffe://mallory.example/ns/shop/sa/web";
    let mut stream = mallory.session(west).await;

    // Exports: one that may be, and lies.
    let lies = [
        ("bank", "ledger", "spiffe://mallory.example/ns/bank/sa/ledger"),
        ("tombolo-system", "discovery", own),
        ("shop", "of-east", "spiffe://east.example/ns/shop/sa/web"),
        ("shop", "of-west", "spiffe://west.example/ns/shop/sa/catalog"),
        (
            "shop",
            "as-gateway",
            "spiffe://mallory.example/ns/tombolo-system/sa/gateway",
        ),
        ("shop", "catalog.shop.svc.mesh.internal", own),
        ("shop", "no-identity", "catalog"),
    ];
    let lies = lies.map(|(namespace, name, id)| service(namespace, name, id));
    let part = pb::ExportsPart {
        to_seq: 1,
        last: true,
        services: lies.into_iter().chain([service("shop", "web", own)]).collect(),
        gateways: Some(pb::GatewayList {
            // That of east, say; the callers' own hosts; the metadata service of their cloud; their virtual addresses.
            gateways: [
                "198.51.100.7",
                "127.0.0.1",
                "169.254.169.254",
                "240.240.0.1",
                "localhost",
            ]
            .map(gateway)
            .into(),
        }),
        mesh_domain: "west internal".into(),
        ..pb::ExportsPart::default()
    };
    stream.say(Message::Exports(part)).await;
    for code in ["TMB0716", "TMB0717", "TMB0718"] {
        wait_refused(west, "mallory", code).await;
    }
    let shown = status(west, "mallory").await.unwrap();
    assert_eq!((shown.imported_services, shown.gateways), (1, 1), "{shown:?}");
    west.group("watcher").await;
    let watcher = west.enrol("watcher").await;
    let mut ads = watcher.ads(west).await;
    let addresses = resources(&mut ads, type_url::ADDRESS, "SplitHorizonWorkload/mallory").await;
    let of_mallory: Vec<Address> = addresses
        .iter()
        .filter(|(name, _)| name.contains("mallory") || name.contains("web"))
        .map(|(_, any)| unpack(any).unwrap())
        .collect();
    for address in &of_mallory {
        match address.r#type.as_ref().unwrap() {
            Type::Workload(workload) => {
                assert_eq!(
                    (&*workload.network, &*workload.trust_domain, &*workload.hostname),
                    ("mallory/east", "mallory.example", ""),
                    "{workload:?}"
                );
            }
            Type::Service(service) => {
                assert_eq!(service.hostname, "web.shop.svc.mesh.internal");
                assert_eq!(service.subject_alt_names, [own]);
            }
        }
    }
    assert!(of_mallory.len() >= 2, "{of_mallory:?}");
    let gateways = resources(&mut ads, type_url::NETWORK_GATEWAYS, "mallory").await;
    assert_eq!(gateways.keys().collect::<Vec<_>>(), ["mallory/east"]);
    let gateways: NetworkGateways = unpack(gateways.values().next().unwrap()).unwrap();
    let gateways: Vec<_> = gateways
        .gateways
        .iter()
        .map(|gateway| (&*gateway.address, &*gateway.trust_domain))
        .collect();
    // Whoever is dialled there must prove to be mallory's gateway: east's cannot.
    assert_eq!(gateways, [("198.51.100.7", "mallory.example")]);

    // Membership: it admits nobody, not in its own name and not in another's, and it gives itself no more rights.
    let more = tombolo_federation::Record {
        cluster: "mallory".into(),
        trust_domain: mallory.trust_domain.clone(),
        rank: 1,
        version: 2,
        ..mallory.ghost("west")
    };
    // Nor other names of its trust domain: of another cluster, or of nobody, by its own word or in the name of west.
    let named = |name: &str, by: &str| tombolo_federation::Record {
        aliases: [name.parse().unwrap()].into(),
        admitted_by: by.into(),
        ..more.clone()
    };
    let lies = [
        mallory.ghost("mallory"),
        mallory.ghost("west"),
        named("east.example", "west"),
        named("new.example", "mallory"),
        more.clone(),
    ];
    for record in lies {
        let records = pb::Records {
            records: vec![mallory.signs(&record)],
            profiles: Vec::new(),
        };
        stream.say(Message::Records(records)).await;
    }
    wait_refused(west, "mallory", "TMB0711").await;
    let shown = status(west, "mallory").await.unwrap();
    assert_eq!(
        (shown.namespaces.as_slice(), shown.may_admit, shown.record_version),
        (["shop".to_owned()].as_slice(), false, 1)
    );
    assert!(shown.also_trust_domains.is_empty(), "{shown:?}");
    // Again and again: it is closed.
    for version in 2..12 {
        let record = tombolo_federation::Record {
            version,
            ..mallory.ghost("west")
        };
        let records = pb::Records {
            records: vec![mallory.signs(&record)],
            profiles: Vec::new(),
        };
        stream.say(Message::Records(records)).await;
    }
    assert_eq!(stream.refused().await.as_deref(), Some("TMB0711"));
    for lab in [west, &scene.east] {
        let names: Vec<String> = clusters(lab).await.into_iter().map(|c| c.name).collect();
        assert_eq!(names, ["east", "mallory", "west"]);
    }

    // Somebody else's name with these keys.
    assert_eq!(
        mallory
            .greets(west, "east", env!("CARGO_PKG_VERSION"))
            .await
            .as_deref(),
        Some("TMB0721")
    );
    wait_refused(west, "mallory", "TMB0721").await;
    scene.undisturbed(7).await;
    assert_eq!(state(west, "ghost").await, None);

    // Removed, it is told so; its old record, which was good once, makes it no member again.
    let mut stream = mallory.session(west).await;
    let old = loop {
        if let Some(Message::Records(records)) = stream.next().await {
            break records;
        }
    };
    remove(west, "mallory").await.unwrap();
    assert_eq!(stream.refused().await.as_deref(), Some("TMB0710"));
    let greeting = mallory.greets(west, "mallory", env!("CARGO_PKG_VERSION")).await;
    assert_eq!(greeting.as_deref(), Some("TMB0710"));
    let mut stream = mallory.open(&scene.east).await;
    let Message::Hello(mut hello) = mallory.hello(&stream.exporter, "mallory", env!("CARGO_PKG_VERSION"))
    else {
        unreachable!()
    };
    hello.chain = old.records;
    stream.say(Message::Hello(hello)).await;
    assert_eq!(stream.refused().await.as_deref(), Some("TMB0710"));
    for lab in [west, &scene.east] {
        wait_state(lab, "mallory", "Removed").await;
    }
    assert!(imported(&scene.east, "web").is_empty());
    scene.undisturbed(8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stolen_invite_admits_one_named_cluster_once() {
    let west = process("west", |_| ()).await;
    let invite = async |ttl_seconds: i64| -> InviteToken {
        let mut invite = Invite::of("thief");
        invite.request.ttl_seconds = ttl_seconds;
        invite.token(&west).await.unwrap()
    };
    let (expired, revoked, token) = (invite(1).await, invite(600).await, invite(600).await);
    let id = revoked.id.iter().map(|b| format!("{b:02x}")).collect();
    let request = admin::RevokeClusterInviteRequest { id };
    west.admin().await.revoke_cluster_invite(request).await.unwrap();
    let (key, other_key) = (JoinKey::from_seed(&[7; 32]), JoinKey::from_seed(&[8; 32]));
    assert_eq!(Redemption::of(&revoked, &key).refusal(&west).await, "TMB0704");
    let another_name = Redemption {
        cluster: "other",
        ..Redemption::of(&token, &key)
    };
    assert_eq!(another_name.refusal(&west).await, "TMB0706");
    let another_domain = Redemption {
        trust_domain: "other.example",
        ..Redemption::of(&token, &key)
    };
    assert_eq!(another_domain.refusal(&west).await, "TMB0706");
    for version in ["1.0.0", "0.3.0", "x"] {
        let much_newer = Redemption {
            version,
            ..Redemption::of(&token, &key)
        };
        assert_eq!(much_newer.refusal(&west).await, "TMB0720", "{version}");
    }
    // What was overheard on another connection.
    let replayed = Redemption::of(&token, &key).ask(&west, Some([1; 32])).await;
    assert!(replayed.unwrap_err().message().starts_with("TMB0705"));
    // Without the seed of the invite.
    let guessed = InviteToken {
        seed: zeroize::Zeroizing::new([9; 32]),
        id: token.id,
        root_pin: token.root_pin,
        trust_domain: token.trust_domain.clone(),
        cluster: token.cluster.clone(),
        endpoints: token.endpoints.clone(),
    };
    assert_eq!(Redemption::of(&guessed, &key).refusal(&west).await, "TMB0705");
    tokio::time::sleep(Duration::from_millis(1100)).await; // the invite's whole life
    assert_eq!(Redemption::of(&expired, &key).refusal(&west).await, "TMB0702");
    assert_eq!(clusters(&west).await.len(), 1, "nobody came in");

    // Once; by the same key the same again, of the next release too; by another key never.
    Redemption::of(&token, &key).ask(&west, None).await.unwrap();
    let newer = Redemption {
        version: "0.2.0",
        ..Redemption::of(&token, &key)
    };
    newer.ask(&west, None).await.unwrap();
    assert_eq!(Redemption::of(&token, &other_key).refusal(&west).await, "TMB0703");
    let shown = status(&west, "thief").await.unwrap();
    assert_eq!(shown.state, "Joining");
    assert!(shown.reason.starts_with("TMB0727"), "{}", shown.reason);
    let log = west.audit_log();
    for code in ["TMB0702", "TMB0703", "TMB0704", "TMB0705", "TMB0706", "TMB0720"] {
        assert!(log.contains(code), "{code} is not in the audit log");
    }
    // The owner of west takes it back: nothing of it counts any more.
    remove(&west, "thief").await.unwrap();
    assert_eq!(state(&west, "thief").await.as_deref(), Some("Removed"));
    assert_eq!(Redemption::of(&token, &key).refusal(&west).await, "TMB0703");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_silence_harm_nobody_and_are_named() {
    let scene = scene().await;
    let (west, mallory) = (&scene.west, &scene.mallory);
    let identity = || Arc::clone(&mallory.identity);
    let before = west.resident_kib();

    // What is no message, and what is larger than one may be.
    for bytes in [vec![0xff; 300], vec![0; 3 << 20]] {
        let mut stream = peer_stream::<Vec<u8>>(west, identity()).await.unwrap();
        stream.messages.send(bytes).await.unwrap();
        assert_eq!(stream.refused().await.as_deref(), Some("TMB0722"));
    }
    wait_refused(west, "mallory", "TMB0722").await;
    assert!(west.log().contains("TMB0722"), "{}", west.log());
    scene.undisturbed(11).await;

    // Streams on which nothing comes: few are kept, not for long, and those of others come in beside them.
    let begun = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..8 {
        let (channel, exporter) = peer_channel(west, identity()).await.unwrap();
        for _ in 0..8 {
            silent.push(
                stream_on::<pb::PeerMessage>(channel.clone(), exporter)
                    .await
                    .unwrap(),
            );
        }
    }
    let mut codes = BTreeMap::new();
    scene.undisturbed(12).await;
    for stream in &mut silent {
        *codes.entry(stream.refused().await).or_insert(0) += 1;
    }
    assert!(begun.elapsed() >= Duration::from_secs(9), "{:?}", begun.elapsed());
    assert_eq!(
        codes,
        BTreeMap::from([(Some("TMB0722".to_owned()), 16), (None, 48)]),
        "{codes:?}"
    );
    west.wait_for("the silence to be named", async || {
        let shown = status(west, "mallory").await.unwrap();
        shown
            .refused
            .iter()
            .any(|refused| refused.message.contains("no hello"))
    })
    .await;
    scene.undisturbed(13).await;
    let grown = west.resident_kib().saturating_sub(before);
    println!("garbage and silence: west grew by {grown} KiB");
    assert!(grown < GROWTH_MAX_KIB, "{grown} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exports_without_end_and_a_peer_that_reads_nothing_are_cut() {
    let scene = scene().await;
    let (west, mallory) = (&scene.west, &scene.mallory);
    let own = "spiffe://mallory.example/ns/shop/sa/web";
    let mut stream = mallory.session(west).await;
    let part = pb::ExportsPart {
        to_seq: 1,
        last: true,
        services: vec![service("shop", "web", own)],
        ..pb::ExportsPart::default()
    };
    stream.say(Message::Exports(part)).await;
    west.wait_for("its honest export", async || {
        status(west, "mallory").await.unwrap().imported_services == 1
    })
    .await;
    let before = west.resident_kib();

    // Parts and parts, and never the last one.
    let large = |index: u32| {
        let mut large = service("shop", &format!("large-{index}"), own);
        large.subject_alt_names = (0..64)
            .map(|n| format!("spiffe://mallory.example/ns/shop/sa/{n}-{}", "x".repeat(50)))
            .collect();
        large.presences = (0..64)
            .map(|n| pb::Presence {
                network: format!("{n}-{}", "n".repeat(100)),
                region: "r".repeat(100),
                ..pb::Presence::default()
            })
            .collect();
        large
    };
    let messages = stream.messages.clone();
    let endless = async {
        for index in 0..400 {
            let part = pb::ExportsPart {
                to_seq: 2,
                part: index,
                services: (0..20).map(|n| large(index * 20 + n)).collect(),
                ..pb::ExportsPart::default()
            };
            let message = Some(Message::Exports(part));
            if messages.send(pb::PeerMessage { message }).await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        code = stream.refused() => assert_eq!(code.as_deref(), Some("TMB0719")),
        () = endless => panic!("nobody stops it"),
    }
    wait_refused(west, "mallory", "TMB0719").await;
    scene.undisturbed(21).await;

    // Thousands of changes, whose acknowledgements it does not read.
    let stream = mallory.session(west).await;
    let full = pb::ExportsPart {
        to_seq: 3,
        last: true,
        services: vec![service("shop", "web", own)],
        ..pb::ExportsPart::default()
    };
    stream.say(Message::Exports(full)).await;
    let flood = async {
        for seq in 3..200_000 {
            let part = pb::ExportsPart {
                from_seq: seq,
                to_seq: seq + 1,
                last: true,
                ..pb::ExportsPart::default()
            };
            if !stream.say(Message::Exports(part)).await {
                return std::future::pending().await;
            }
        }
    };
    let named = west.wait_for("it is named", async || {
        let shown = status(west, "mallory").await.unwrap();
        shown
            .refused
            .iter()
            .any(|refused| refused.message.contains("does not read"))
    });
    let others = async {
        for weight in 22..25 {
            scene.undisturbed(weight).await;
        }
    };
    let cut = async {
        tokio::select! {
            () = flood => panic!("nobody stops it"),
            () = named => {}
        }
    };
    tokio::join!(cut, others);
    // What it said before all this, and could prove, is served on.
    let shown = status(west, "mallory").await.unwrap();
    assert_eq!(shown.imported_services, 1);
    let grown = west.resident_kib().saturating_sub(before);
    println!("endless exports and a peer that does not read: west grew by {grown} KiB");
    assert!(grown < GROWTH_MAX_KIB, "{grown} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neighbouring_releases_speak_with_each_other_and_others_are_told_why_not() {
    let scene = scene().await;
    let (west, mallory) = (&scene.west, &scene.mallory);
    let mut words = env!("CARGO_PKG_VERSION")
        .split('.')
        .map(|word| word.parse::<u32>().unwrap());
    let (major, minor) = (words.next().unwrap(), words.next().unwrap());
    let mut fitting = vec![
        format!("{major}.{}.0", minor + 1),
        format!("{major}.{minor}.99-rc.1"),
    ];
    if let Some(older) = minor.checked_sub(1) {
        fitting.push(format!("{major}.{older}.7"));
    }
    for version in &fitting {
        assert_eq!(mallory.greets(west, "mallory", version).await, None, "{version}");
    }
    // What a later release says beyond that is passed over.
    let mut stream = mallory.open(west).await;
    let hello = mallory.hello(&stream.exporter, "mallory", &fitting[0]);
    stream.say(hello).await;
    stream.started().await.unwrap();
    let unknown = pb::PeerMessage { message: None };
    stream.messages.send(unknown).await.unwrap();
    let own = "spiffe://mallory.example/ns/shop/sa/web";
    let part = pb::ExportsPart {
        to_seq: 4,
        last: true,
        services: vec![service("shop", "web", own)],
        ..pb::ExportsPart::default()
    };
    stream.say(Message::Exports(part)).await;
    west.wait_for("its exports", async || {
        status(west, "mallory").await.unwrap().imported_services == 1
    })
    .await;
    for version in [
        format!("{major}.{}.0", minor + 2),
        format!("{}.{minor}.0", major + 1),
        "latest".to_owned(),
    ] {
        let code = mallory.greets(west, "mallory", &version).await;
        assert_eq!(code.as_deref(), Some("TMB0720"), "{version}");
    }
    wait_refused(west, "mallory", "TMB0720").await;
    // The session of before goes on, and so does everybody else's.
    let names: BTreeSet<String> = clusters(west)
        .await
        .into_iter()
        .map(|cluster| cluster.name)
        .collect();
    assert_eq!(names.len(), 3);
    scene.undisturbed(31).await;
}
