use super::*;
use serde_json::json;

/// As `istioctl x workload entry configure --autoregister` writes it for a group with two ports.
const ENV: &str = include_str!("fixtures/cluster.env");
const MESH: &str = include_str!("fixtures/mesh.yaml");
const GROUP: &str = include_str!("fixtures/workloadgroup.yaml");
const HOSTS: &str = "192.0.2.10 istiod.istio-system.svc\n";

fn files() -> IstioVmFiles<'static> {
    IstioVmFiles {
        cluster_env: ENV,
        mesh_yaml: Some(MESH),
        hosts: Some(HOSTS),
        workload_group: None,
        mesh_domain: "mesh.internal",
    }
}

fn read(files: &IstioVmFiles<'_>) -> IstioVm {
    read_istio_vm(files, &["http=80:8080".parse().unwrap()]).unwrap()
}

fn keys(notes: &[Note]) -> Vec<&str> {
    notes.iter().map(|note| note.key.as_str()).collect()
}

#[test]
fn a_vm_with_all_its_files() {
    let vm = read(&files());
    let [group, service] = &vm.resources()[..] else {
        panic!()
    };
    assert_eq!(
        group.to_json()["spec"],
        json!({
            "metadata": {"labels": {"app": "catalog", "version": "v1",
                "service.istio.io/canonical-name": "catalog", "service.istio.io/canonical-revision": "v1"}},
            "template": {"ports": {"http": 8080, "redis": 6379}, "serviceAccount": "catalog-sa", "network": "vm-net"},
            "probe": {"periodSeconds": 5, "httpGet": {"path": "/healthz", "port": 8080}},
        })
    );
    assert_eq!((group.namespace(), group.name()), ("shop", "catalog"));
    let ports = &service.to_json()["spec"]["ports"];
    assert_eq!(
        ports[0],
        json!({"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080})
    );
    assert_eq!(
        service.to_json()["spec"]["hosts"][0],
        "catalog.shop.svc.mesh.internal"
    );
    assert_eq!(
        service.to_json()["spec"]["workloadSelector"]["labels"],
        json!({"app": "catalog"})
    );
    assert_eq!(
        vm.agent,
        [
            ("workers".to_owned(), json!(2)),
            ("drain_seconds".to_owned(), json!(45))
        ]
    );
    assert_eq!(vm.trust_domain, "cluster.local");
    // Every key of both files is accounted for, and what has no counterpart is named.
    assert_eq!(
        keys(&vm.lost),
        ["MY_TEAMS_OWN", "holdApplicationUntilProxyStarts", "tracing"]
    );
    assert!(vm.lost[0].text.contains("unknown key"), "{:?}", vm.lost);
    let all = vm.notes.len() + vm.lost.len();
    let lines = ENV.lines().filter(|line| line.contains('=')).count();
    // Of mesh.yaml: its own keys but proxyMetadata, whose keys are all in cluster.env too; and the hosts file.
    assert_eq!(all, lines + 6 + 1, "{:?}", keys(&vm.notes));
}

#[test]
fn the_group_itself_says_more_than_the_files_made_of_it() {
    let vm = read(&IstioVmFiles {
        workload_group: Some(GROUP),
        ..files()
    });
    assert_eq!(vm.group.spec.template.locality, "eu/eu-1");
    assert_eq!(vm.group.spec.template.weight, 5);
    assert_eq!(
        vm.group.spec.metadata.labels["service.istio.io/canonical-revision"],
        "v1"
    );
    let other = GROUP.replace("name: catalog", "name: basket");
    let refused = read_istio_vm(
        &IstioVmFiles {
            workload_group: Some(&other),
            ..files()
        },
        &[],
    );
    assert!(refused.unwrap_err()[0].reason.contains("shop/basket"));
}

#[test]
fn older_and_smaller_files() {
    let env = |ports: &str| {
        format!(
            "ISTIO_SERVICE='foo.bar'\nISTIO_NAMESPACE='bar'\nSERVICE_ACCOUNT='vm-sa'\nISTIO_INBOUND_PORTS='{ports}'\n"
        )
    };
    let of = |ports: &str| {
        let env = env(ports);
        read_istio_vm(
            &IstioVmFiles {
                cluster_env: &env,
                mesh_domain: "mesh.internal",
                ..IstioVmFiles::default()
            },
            &[],
        )
        .unwrap()
        .group
    };
    let group = of("*");
    assert_eq!(group.metadata.annotations[annotation::DELIVER_ALL_PORTS], "true");
    assert_eq!(
        (&*group.metadata.namespace, &*group.metadata.name),
        ("bar", "foo")
    );
    let group = of("8080, 9090");
    assert!(group.metadata.annotations.is_empty());
    assert_eq!(group.spec.template.ports["tcp-9090"], 9090);
}

#[test]
fn bad_files_are_named() {
    for (env, mesh, wanted) in [
        ("", None, "ISTIO_NAMESPACE is missing"),
        ("ISTIO_NAMESPACE='a'", None, "ISTIO_META_WORKLOAD_NAME is missing"),
        ("ISTIO_NAMESPACE='a", None, "line 1: not KEY='value'"),
        ("# x\nrm -rf /", None, "line 2: not KEY='value'"),
        ("A-B=1", None, "line 1"),
        ("A=b c", None, "line 1"),
        (
            "ISTIO_SERVICE=x.y\nISTIO_NAMESPACE=y\nISTIO_META_POD_PORTS='{'",
            None,
            "ISTIO_META_POD_PORTS",
        ),
        (
            "ISTIO_SERVICE=x.y\nISTIO_NAMESPACE=y\nISTIO_INBOUND_PORTS='ssh'",
            None,
            "ISTIO_INBOUND_PORTS",
        ),
        (
            "ISTIO_SERVICE=x.y\nISTIO_NAMESPACE=y\nISTIO_METAJSON_LABELS='[]'",
            None,
            "ISTIO_METAJSON_LABELS",
        ),
        (
            "ISTIO_SERVICE=x.y\nISTIO_NAMESPACE=y",
            Some("- 1"),
            "mesh.yaml: must be a map",
        ),
        (
            "ISTIO_SERVICE=x.y\nISTIO_NAMESPACE=y",
            Some("defaultConfig: 1"),
            "defaultConfig: must be a map",
        ),
        (
            "ISTIO_SERVICE=x.y\nISTIO_NAMESPACE=y",
            Some("defaultConfig: {readinessProbe: {httpGet: {prot: 1}}}"),
            "readinessProbe.httpGet",
        ),
    ] {
        let files = IstioVmFiles {
            cluster_env: env,
            mesh_yaml: mesh,
            mesh_domain: "mesh.internal",
            ..IstioVmFiles::default()
        };
        let found: Vec<String> = read_istio_vm(&files, &[])
            .unwrap_err()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert!(found.iter().any(|text| text.contains(wanted)), "{env}: {found:?}");
    }
}

#[test]
fn quoting() {
    for (text, value) in [
        ("'a b'", Some("a b")),
        (r"'it'\''s'", Some("it's")),
        (r#""a\"b""#, Some("a\"b")),
        ("plain # comment", Some("plain")),
        ("", Some("")),
        ("'{\"a\":\"b\"}'", Some("{\"a\":\"b\"}")),
        ("'open", None),
        ("a b", None),
        ("\\", None),
    ] {
        assert_eq!(unquoted(text).as_deref(), value, "{text}");
    }
}
