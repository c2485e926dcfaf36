//! Objects of the mesh, written and read with the habits of kubectl.

use crate::{
    commands::{run, says},
    needs_root,
};
use anyhow::{Context as _, Result, ensure};
use tombolo_testkit::{Mesh, MeshOptions};

/// Istio's own examples of the five kinds, as its reference pages print them.
const ISTIO_SAMPLES: &str = r#"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  name: external-svc-https
spec:
  hosts:
  - api.dropboxapi.com
  - www.googleapis.com
  location: MESH_EXTERNAL
  ports:
  - number: 443
    name: https
    protocol: TLS
  resolution: DNS
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  name: external-svc-mongocluster
spec:
  hosts:
  - mymongodb.somedomain # not used
  addresses:
  - 192.192.192.192/24 # VIPs
  ports:
  - number: 27018
    name: mongodb
    protocol: MONGO
  location: MESH_INTERNAL
  resolution: STATIC
  endpoints:
  - address: 2.2.2.2
  - address: 3.3.3.3
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: details-svc
spec:
  serviceAccount: details-legacy
  address: 2.2.2.2
  labels:
    app: details-legacy
    instance-id: vm1
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata:
  name: reviews
  namespace: bookinfo
spec:
  metadata:
    labels:
      app.kubernetes.io/name: reviews
      app.kubernetes.io/version: "1.3.4"
  template:
    ports:
      grpc: 3550
      http: 8080
    serviceAccount: default
  probe:
    initialDelaySeconds: 5
    timeoutSeconds: 3
    periodSeconds: 4
    successThreshold: 3
    failureThreshold: 3
    httpGet:
     path: /foo/bar
     host: 127.0.0.1
     port: 3100
     scheme: HTTPS
     httpHeaders:
     - name: Lit-Header
       value: Im-The-Best
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: httpbin
  namespace: foo
spec:
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/default/sa/curl"]
    - source:
        namespaces: ["test"]
    to:
    - operation:
        methods: ["GET"]
        paths: ["/info*"]
    when:
    - key: request.auth.claims[iss]
      values: ["https://accounts.google.com"]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: foo
spec:
  selector:
    matchLabels:
      app: finance
  mtls:
    mode: STRICT
  portLevelMtls:
    8080:
      mode: DISABLE
"#;

#[test]
fn objects_with_the_habits_of_kubectl() -> Result<()> {
    needs_root!();
    let mesh = Mesh::start("objects", MeshOptions::default())?;
    let control = &mesh.control;
    control.write("/run/samples.yaml", ISTIO_SAMPLES)?;
    // Accepted unchanged; what does not do what it says is said.
    let dry = run(control, "apply --dry-run=server -f /run/samples.yaml")?;
    says(
        &dry,
        0,
        &[
            "workloadgroup.networking.istio.io/reviews created (server dry run)",
            "cannot be evaluated at layer 4",
            "agents do not look endpoints up",
            "DISABLE is enforced as PERMISSIVE",
        ],
    )?;
    ensure!(
        mesh.tombolo("get wg,we,se,ap,pa -A")?.is_empty(),
        "a dry run writes nothing"
    );
    says(
        &run(control, "diff -f /run/samples.yaml")?,
        1,
        &["+kind: PeerAuthentication"],
    )?;
    ensure!(
        mesh.tombolo("apply -f /run/samples.yaml")?
            .matches(" created")
            .count()
            == 6
    );
    ensure!(
        mesh.tombolo("apply -f /run/samples.yaml")?
            .matches(" unchanged")
            .count()
            == 6
    );
    says(&run(control, "diff -f /run/samples.yaml")?, 0, &[])?;
    let names = mesh.tombolo("get wg,we,se,ap,pa -A -o name")?;
    ensure!(names.lines().count() == 6, "{names}");
    says(
        &run(
            control,
            "get se external-svc-https nope external-svc-mongocluster",
        )?,
        1,
        &[
            "api.dropboxapi.com",
            "mymongodb.somedomain",
            "ServiceEntry default/nope",
        ],
    )?;
    says(
        &run(control, "delete -f /run/samples.yaml")?,
        0,
        &["\"httpbin\" deleted"],
    )?;
    says(&run(control, "delete -f /run/samples.yaml")?, 1, &["TMB0203"])?;
    says(
        &run(control, "delete -f /run/samples.yaml --ignore-not-found")?,
        0,
        &[],
    )?;

    // What is wrong: path, reason, nearest name.
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: x, namespace: shop}\nspec:\n";
    for (yaml, parts) in [
        (
            format!("{entry}  hots: [a.b.c]\n  ports: [{{number: 80, name: http, protocl: HTTP}}]\n"),
            &[
                "TMB0201",
                "spec.hots: unknown field; did you mean hosts?",
                "spec.ports[0].protocl",
                "protocol?",
            ][..],
        ),
        (
            format!("{entry}  hosts: [a.b.c]\n  resolution: STATIK\n"),
            &["did you mean STATIC?"],
        ),
        (
            format!("{entry}  hosts: [x.other.svc.mesh.internal]\n"),
            &["belongs to namespace other"],
        ),
        (
            entry.replace("ServiceEntry", "VirtualService"),
            &["VirtualService is not a kind of this mesh"],
        ),
        (
            format!("{entry}  hosts: [a.b\n"),
            &["TMB0201", "/run/bad.yaml", "line "],
        ),
        (
            format!("{entry}  hosts: [a.b.c]\n  hosts: [a.b.d]\n"),
            &["TMB0201", "duplicate"],
        ),
    ] {
        control.write("/run/bad.yaml", &yaml)?;
        says(&run(control, "apply -f /run/bad.yaml")?, 1, parts).with_context(|| yaml)?;
    }
    says(
        &run(control, "get servceentry")?,
        2,
        &["did you mean ServiceEntry?"],
    )?;
    says(
        &run(control, "get svc")?,
        2,
        &["known are", "serviceentries (se)"],
    )?;
    says(&run(control, "--socket /nope get se")?, 4, &["TMB0207", "/nope"])?;

    // Many at once, and conditions.
    let many: String = (0..3_000)
        .map(|n| {
            format!(
                "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: m{n}, namespace: many}}\nspec:\n  \
                 hosts: [m{n}.many.svc.mesh.internal]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
                 ports: [{{number: 80, name: http, protocol: HTTP}}]\n"
            )
        })
        .collect();
    ensure!(mesh.apply(&many)?.lines().count() == 3_000);
    mesh.tombolo("wait se/m2999 -n many --for=jsonpath={.status.addresses[0].value} --timeout 500ms")?;
    says(
        &run(control, "wait se/m1 -n many --for=condition=Nope --timeout 300ms")?,
        5,
        &["not so within 300ms"],
    )?;
    Ok(())
}
