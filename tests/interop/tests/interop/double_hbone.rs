//! Double HBONE to the letter: what our agent sends, and what our gateway and agent take from others.

use crate::{
    PATIENCE,
    site::{AGENT, Captured, GATEWAY, Place, Site, url, ztunnel},
    vip,
    wire::{Keys, Layer, Recorder, call_through},
};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_testkit::{require_root, wait_for};

/// What the unmodified ztunnel (62d8265) sent in the place of `front`, as `masked` writes it.
const ZTUNNEL: &str = include_str!("../../fixtures/ztunnel-62d8265.json");
const AUTHORITY: &str = "back.shop.svc.mesh.internal:80";

#[test]
fn double_hbone_to_the_letter() -> Result<()> {
    if !require_root("interop") {
        return Ok(());
    }
    let recorded: Value = serde_json::from_str(ZTUNNEL)?;
    let mut site = Site::start("letter", true)?;
    let gateway = Keys::of(&site.west_gateway.host, GATEWAY)?;
    let endpoint = Keys::of(&site.back.host, AGENT)?;
    let caller = Keys::of(&site.front.host, AGENT)?;
    {
        let recorder = Recorder::start(&site.west_gateway.host, 443, &gateway, &endpoint)?;
        let body = site.front.curl_until(&url("back"), PATIENCE)?;
        ensure!(body == "recorded\n", "{body}");
        let (outer, inner) = recorder.next()?;
        ours(&site, &outer, &inner)?;
        // One inner connection for each call, in one outer connection for all.
        site.front.curl_until(&url("back"), PATIENCE)?;
        let (again, _) = recorder.next()?;
        ensure!(again.header("traceparent") != outer.header("traceparent"));
        if let Some(program) = ztunnel() {
            let way = &site.east_gateway.host;
            let place = Place {
                name: "captured",
                network: "",
                last: 6,
                way,
                trust_domain: "mesh.example",
                token: "",
            };
            let captured = Captured::start(&program, &mut site.mesh, &mut site.east, &place)?;
            let back = vip(&site.mesh, "back")?;
            let body = wait_for("ztunnel's call", PATIENCE, || {
                Ok(captured.get(&back)?.checked()?.stdout)
            })
            .with_context(|| captured.log())?;
            ensure!(body == "recorded\n", "{body}");
            let (outer, inner) = recorder.next()?;
            ensure!(outer.header("traceparent") == inner.header("traceparent"));
            ensure!(outer.peer == "spiffe://mesh.example/ns/shop/sa/captured" && inner.peer == outer.peer);
            let now = json!({"outer": outer.masked(), "inner": inner.masked()});
            ensure!(now == recorded, "ztunnel sends something else now: {now:#}");
        }
    }
    taken(&site, &caller, &recorded)
}

/// Our agent as a caller.
fn ours(site: &Site, outer: &Layer, inner: &Layer) -> Result<()> {
    for layer in [outer, inner] {
        ensure!(
            layer.peer == "spiffe://mesh.example/ns/shop/sa/front",
            "{layer:?}"
        );
        let aes = |suite: &String| suite.starts_with("TLS13_AES");
        ensure!(layer.suites.iter().any(aes), "{:?}", layer.suites);
    }
    let (of_outer, of_inner) = (outer.masked(), inner.masked());
    let baggage = outer.header("baggage").context("no baggage")?;
    let entry = site.mesh.tombolo("get we -n shop -o name")?;
    let entry = entry
        .split_whitespace()
        .filter_map(|line| line.rsplit('/').next())
        .find(|name| name.starts_with("front-"))
        .context("no entry of front")?;
    for expected in [
        "k8s.cluster.name=Kubernetes",
        "k8s.namespace.name=shop",
        "service.name=front",
    ] {
        ensure!(baggage.split(',').any(|member| member == expected), "{baggage}");
    }
    ensure!(
        baggage.contains("k8s.pod.name=front") || baggage.contains(entry),
        "{baggage}"
    );
    let headers = json!({
        "baggage": baggage,
        "forwarded": "for=\"SOURCE\";host=back.shop.svc.mesh.internal",
        "traceparent": "00-TRACE-PARENT-00",
    });
    let mut expected = json!({
        "server_name": null,
        "alpn": ["h2"],
        "cipher_suites": outer.suites,
        "method": "CONNECT",
        "scheme": null,
        "path": null,
        "authority": AUTHORITY,
        "headers": headers,
    });
    ensure!(of_outer == expected, "{of_outer:#}");
    expected["headers"]["x-forwarded-network"] = "".into();
    ensure!(of_inner == expected, "{of_inner:#}");
    ensure!(outer.header("traceparent") == inner.header("traceparent"));
    // ztunnel's are the same in everything but the workload.
    let mut ztunnel: Value = serde_json::from_str(ZTUNNEL)?;
    for (ours, theirs) in [(&of_outer, "outer"), (&of_inner, "inner")] {
        let theirs = &mut ztunnel[theirs];
        theirs["headers"]["baggage"] = ours["headers"]["baggage"].clone();
        theirs["cipher_suites"] = ours["cipher_suites"].clone();
        ensure!(ours == theirs, "{ours:#} {theirs:#}");
    }
    Ok(())
}

/// Our gateway and agent as the others' servers.
fn taken(site: &Site, caller: &Keys, recorded: &Value) -> Result<()> {
    let at = site.west_gateway.host.at(15008).parse()?;
    let namespace = site.mesh.control.namespace();
    let call = |change: &dyn Fn(&mut Value)| {
        let mut changed = recorded.clone();
        change(&mut changed);
        call_through(namespace, at, caller, (&changed["outer"], &changed["inner"]))
    };
    let answer = call(&|_| ())?;
    ensure!(
        answer.gateway == "spiffe://mesh.example/ns/tombolo-system/sa/gateway",
        "{answer:?}"
    );
    ensure!(
        answer.endpoint == "spiffe://mesh.example/ns/shop/sa/back",
        "{answer:?}"
    );
    ensure!((answer.outer, answer.inner) == (200, 200), "{answer:?}");
    ensure!(answer.body.ends_with("back speaks\n"), "{answer:?}");
    // The endpoint describes itself, the gateway does not.
    ensure!(answer.outer_headers.is_empty(), "{answer:?}");
    let baggage = answer.inner_headers.get("baggage").context("no baggage")?;
    ensure!(baggage.to_str()?.contains("service.name=back"), "{answer:?}");
    wait_for("the endpoint's log", PATIENCE, || {
        let log = site.back.agent_log();
        ensure!(log.contains("sa/front") && !log.contains("sa/gateway"), "{log}");
        Ok(())
    })?;
    // Of Istio's headers none is needed, and none that the callers of Envoy send is in the way.
    let answer = call(&|call| {
        call["outer"]["headers"] = json!({"x-istio-source": "waypoint"});
        call["inner"]["headers"] = json!({});
    })?;
    ensure!((answer.outer, answer.inner) == (200, 200), "{answer:?}");
    // Without ALPN as with it.
    let answer = call(&|call| {
        call["outer"]["alpn"] = json!([]);
        call["inner"]["alpn"] = json!([]);
    })?;
    ensure!((answer.outer, answer.inner) == (200, 200), "{answer:?}");
    for (authority, outer) in [
        ("10.0.0.5:8080", 400),
        ("nobody.shop.svc.mesh.internal:80", 503),
        ("back.shop.svc.mesh.internal:81", 503),
        ("front.shop.svc.mesh.internal:80", 503), // of another network: no transit
    ] {
        let answer = call(&|call| call["outer"]["authority"] = authority.into())?;
        ensure!(
            answer.outer == outer && answer.endpoint.is_empty(),
            "{authority}: {answer:?}"
        );
    }
    // The gateway led to the endpoint; what is asked of it there is the endpoint's to judge.
    for (authority, inner) in [
        ("front.shop.svc.mesh.internal:80", 503),
        ("back.shop.svc.mesh.internal:81", 503),
        ("10.0.0.6:8080", 400),
    ] {
        let answer = call(&|call| call["inner"]["authority"] = authority.into())?;
        ensure!(
            (answer.outer, answer.inner) == (200, inner),
            "{authority}: {answer:?}"
        );
    }
    Ok(())
}
