use super::{
    super::demand::{Addresses, ByName},
    *,
};
use tombolo_proto::{google::rpc::Status, istio::workload as wl, pack};

fn compiled(name: &str, version: &str) -> Arc<Compiled> {
    let any = prost_types::Any {
        type_url: "t".into(),
        value: version.into(),
    };
    Arc::new(Compiled {
        name: name.into(),
        version: version.into(),
        any,
        aliases: Vec::new(),
    })
}

fn world(items: &[(&str, &str)]) -> Resources {
    items
        .iter()
        .map(|(name, version)| (Arc::from(*name), compiled(name, version)))
        .collect()
}

fn request(subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    DeltaDiscoveryRequest {
        resource_names_subscribe: owned(subscribe),
        resource_names_unsubscribe: owned(unsubscribe),
        ..Default::default()
    }
}

struct Client {
    watch: Watch,
    first: bool,
}

impl Client {
    fn new() -> Self {
        Self {
            watch: Watch::default(),
            first: true,
        }
    }

    fn send(&mut self, request: &DeltaDiscoveryRequest) -> Heard {
        let first = std::mem::take(&mut self.first);
        self.watch.handle(request, first)
    }

    /// Names with versions, then `-name`s; acknowledges.
    fn get(&mut self, world: &Resources) -> Option<String> {
        let shown = self.take(world)?;
        let nonce = self.watch.pending.clone().unwrap_or_default();
        assert_eq!(
            self.send(&DeltaDiscoveryRequest {
                response_nonce: nonce,
                ..Default::default()
            }),
            Heard::Ack
        );
        Some(shown)
    }

    fn take(&mut self, world: &Resources) -> Option<String> {
        let (push, nonce) = self.watch.push(world, &mut ByName)?;
        assert!(!nonce.is_empty());
        let mut words: Vec<String> = push
            .resources
            .iter()
            .map(|r| format!("{}={}", r.name, r.version))
            .collect();
        words.sort();
        let mut removed: Vec<String> = push.removed.iter().map(|n| format!("-{n}")).collect();
        removed.sort();
        words.extend(removed);
        Some(words.join(" "))
    }
}

#[test]
fn wildcard_gets_everything_then_differences() {
    let mut client = Client::new();
    client.send(&request(&[], &[]));
    assert_eq!(
        client.get(&world(&[("a", "1"), ("b", "1")])).as_deref(),
        Some("a=1 b=1")
    );
    assert_eq!(
        client.get(&world(&[("a", "1"), ("b", "1")])),
        None,
        "nothing changed"
    );
    assert_eq!(
        client.get(&world(&[("a", "2"), ("c", "1")])).as_deref(),
        Some("a=2 c=1 -b")
    );
}

#[test]
fn the_first_answer_comes_even_when_there_is_nothing() {
    let mut client = Client::new();
    client.send(&request(&[], &[]));
    assert_eq!(client.get(&world(&[])).as_deref(), Some(""));
    assert_eq!(client.get(&world(&[])), None);
    // On-demand: subscribed to nothing.
    let mut client = Client::new();
    client.send(&request(&["*"], &["*"]));
    assert_eq!(client.get(&world(&[("a", "1")])).as_deref(), Some(""));
    assert_eq!(client.get(&world(&[("a", "2")])), None);
    client.send(&request(&["a"], &[]));
    assert_eq!(
        client.get(&world(&[("a", "2"), ("b", "1")])).as_deref(),
        Some("a=2")
    );
}

#[test]
fn reconnect_skips_what_is_the_same_and_removes_what_is_gone() {
    let mut client = Client::new();
    let mut first = request(&[], &[]);
    first.initial_resource_versions = [("a", "1"), ("b", "1"), ("gone", "1")]
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .into();
    client.send(&first);
    assert_eq!(
        client
            .get(&world(&[("a", "1"), ("b", "2"), ("c", "1")]))
            .as_deref(),
        Some("b=2 c=1 -gone")
    );
    assert_eq!(client.get(&world(&[("a", "1"), ("b", "2"), ("c", "1")])), None);
    assert_eq!(
        client.get(&world(&[("a", "2"), ("b", "2")])).as_deref(),
        Some("a=2 -c")
    );
}

#[test]
fn a_slow_client_gets_only_the_latest() {
    let mut client = Client::new();
    client.send(&request(&[], &[]));
    assert!(client.take(&world(&[("a", "1")])).is_some());
    for version in ["2", "3", "4"] {
        assert_eq!(
            client.take(&world(&[("a", version)])),
            None,
            "one response is under way"
        );
    }
    let nonce = client.watch.pending.clone().unwrap();
    client.send(&DeltaDiscoveryRequest {
        response_nonce: nonce,
        ..Default::default()
    });
    assert_eq!(client.get(&world(&[("a", "4")])).as_deref(), Some("a=4"));
}

#[test]
fn a_refused_resource_is_not_sent_again() {
    let mut client = Client::new();
    client.send(&request(&[], &[]));
    client.take(&world(&[("bad", "1"), ("good", "1")]));
    let mut nack = DeltaDiscoveryRequest {
        response_nonce: client.watch.pending.clone().unwrap(),
        ..Default::default()
    };
    // The code is 0 even though it is a refusal: the presence of the detail counts.
    nack.error_detail = Some(Status {
        message: "bad: no".into(),
        ..Default::default()
    });
    assert_eq!(client.send(&nack), Heard::Nack("bad: no".into()));
    assert_eq!(client.get(&world(&[("bad", "1"), ("good", "1")])), None);
    assert_eq!(
        client.get(&world(&[("bad", "2"), ("good", "1")])).as_deref(),
        Some("bad=2")
    );
}

#[test]
fn old_nonces_are_ignored() {
    let mut client = Client::new();
    client.send(&request(&[], &[]));
    client.take(&world(&[("a", "1")]));
    let stale = DeltaDiscoveryRequest {
        response_nonce: "ffff".into(),
        ..Default::default()
    };
    assert_eq!(client.send(&stale), Heard::Stale);
    assert!(client.watch.is_pending());
    let changed = DeltaDiscoveryRequest {
        response_nonce: "ffff".into(),
        ..request(&["x"], &[])
    };
    assert_eq!(client.send(&changed), Heard::Subscription);
    // A type that is not watched yet, with a nonce from an earlier stream: a fresh start.
    let mut client = Client::new();
    assert_eq!(client.send(&stale), Heard::Subscription);
    assert_eq!(client.get(&world(&[("a", "1")])).as_deref(), Some("a=1"));
}

#[test]
fn named_subscriptions() {
    let mut client = Client::new();
    client.send(&request(&["a", "missing"], &[]));
    assert_eq!(
        client.get(&world(&[("a", "1"), ("b", "1")])).as_deref(),
        Some("a=1 -missing")
    );
    assert_eq!(
        client.get(&world(&[("a", "1"), ("b", "2")])),
        None,
        "b is not subscribed"
    );
    assert_eq!(
        client.get(&world(&[("a", "1"), ("missing", "1")])).as_deref(),
        Some("missing=1")
    );
    assert_eq!(client.get(&world(&[("missing", "1")])).as_deref(), Some("-a"));
    client.send(&request(&[], &["missing"]));
    assert_eq!(client.get(&world(&[("missing", "2")])), None);
    // Asked again: answered again, also in the same version.
    client.send(&request(&["missing"], &[]));
    assert_eq!(
        client.get(&world(&[("missing", "2")])).as_deref(),
        Some("missing=2")
    );
    client.send(&request(&["missing"], &[]));
    assert_eq!(
        client.get(&world(&[("missing", "2")])).as_deref(),
        Some("missing=2")
    );
}

#[test]
fn names_beside_a_wildcard() {
    let mut client = Client::new();
    client.send(&request(&["*", "a"], &[]));
    assert_eq!(
        client.get(&world(&[("a", "1"), ("b", "1")])).as_deref(),
        Some("a=1 b=1")
    );
    assert_eq!(
        client.get(&world(&[("a", "2"), ("b", "1")])).as_deref(),
        Some("a=2")
    );
    client.send(&request(&[], &["*"]));
    assert_eq!(
        client.get(&world(&[("a", "3"), ("b", "2")])).as_deref(),
        Some("a=3")
    );
}

#[test]
fn a_demand_by_address_is_answered_by_that_name() {
    let service = wl::Address {
        r#type: Some(wl::address::Type::Service(wl::Service::default())),
    };
    let mut workload = wl::Workload::default();
    workload
        .services
        .insert("shop/catalog".into(), wl::PortList::default());
    let workload = wl::Address {
        r#type: Some(wl::address::Type::Workload(workload)),
    };
    let item = |name: &str, any, alias: &str| {
        let aliases = vec![alias.to_owned()];
        (
            Arc::<str>::from(name),
            Arc::new(Compiled {
                name: name.into(),
                version: "1".into(),
                any,
                aliases,
            }),
        )
    };
    let world: Resources = [
        item("shop/catalog", pack(&service), "/240.240.0.1"),
        item("uid-1", pack(&workload), "/10.0.0.1"),
        item("other", pack(&service), "/240.240.0.2"),
    ]
    .into_iter()
    .collect();
    let mut watch = Watch::default();
    watch.handle(&request(&["/240.240.0.1"], &[]), true);
    let (push, _) = watch.push(&world, &mut Addresses::default()).unwrap();
    let names: BTreeSet<&str> = push.resources.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, BTreeSet::from(["/240.240.0.1", "shop/catalog", "uid-1"]));
    assert!(push.removed.is_empty());
}
