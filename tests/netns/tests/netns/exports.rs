//! What a cluster exports, who says so, and what its grant says to it.

use crate::{
    PATIENCE,
    federation::{Clusters, EAST, WEST, serve, url},
    needs_root,
};
use anyhow::{Context as _, Result, ensure};
use tombolo_testkit::wait_for;

/// A service that nothing exports.
fn plain(namespace: &str, name: &str, labels: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
         metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\nspec:\n  \
         hosts: [{name}.{namespace}.svc.mesh.internal]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
         ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}]\n  \
         workloadSelector: {{labels: {{app: {name}}}}}\n"
    )
}

fn service_export(namespace: &str, name: &str) -> String {
    format!(
        "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\n\
         metadata: {{name: {name}, namespace: {namespace}}}\n"
    )
}

fn namespace(name: &str, global: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/global: '{global}'}}}}\n"
    )
}

impl Clusters {
    fn apply(&mut self, at: usize, yaml: &str) -> Result<()> {
        self.on(at, |mesh, _| mesh.apply(yaml)).map(drop)
    }

    /// What west has taken from east.
    fn imported(&mut self) -> Result<Vec<String>> {
        let shown = self.tombolo(WEST, "cluster status east -o json")?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        let services = shown["clusters"][0]["services"]
            .as_array()
            .context("no services")?;
        let names = services.iter().filter_map(|name| name.as_str());
        Ok(names.map(str::to_owned).collect())
    }

    fn imports(&mut self, expected: &[&str]) -> Result<()> {
        wait_for(&format!("imports {expected:?}"), PATIENCE, || {
            let found = self.imported()?;
            ensure!(found == expected, "{found:?}");
            Ok(())
        })
    }

    /// `Valid=True Valid, Ready=True Exported, ...` of an object of east.
    fn conditions(&mut self, of: &str) -> Result<String> {
        let object = self.tombolo(EAST, &format!("get {of} -o json"))?;
        let object: serde_json::Value = serde_json::from_str(&object)?;
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let all = object["status"]["conditions"].as_array();
        let all = all.into_iter().flatten().map(|condition| {
            let [kind, status, reason] = ["type", "status", "reason"].map(|field| text(&condition[field]));
            format!("{kind}={status} {reason}")
        });
        Ok(all.collect::<Vec<_>>().join(", "))
    }

    fn is(&mut self, of: &str, expected: &str) -> Result<()> {
        wait_for(&format!("{of} {expected}"), PATIENCE, || {
            let found = self.conditions(of)?;
            ensure!(found.contains(expected), "{found}");
            Ok(())
        })
    }
}

#[test]
fn three_ways_to_export_and_one_grant() -> Result<()> {
    needs_root!();
    let mut clusters = Clusters::start("exports")?;
    let _server = serve(&clusters.vms[EAST], "back")?;
    clusters.join()?;
    clusters.answers(WEST, "back")?;
    clusters.is("se back -n shop", "Exported=True Exported")?;

    // Without its label nobody exports it, and its name is gone elsewhere.
    clusters.apply(EAST, &plain("shop", "back", ""))?;
    clusters.imports(&[])?;
    wait_for("no call", PATIENCE, || {
        ensure!(!clusters.vms[WEST].curl(&url("back"))?.ok());
        Ok(())
    })?;

    // As the Multi-Cluster Services API has it.
    clusters.apply(EAST, &service_export("shop", "back"))?;
    clusters.tombolo(
        EAST,
        "wait svcex/back -n shop --for=condition=Ready --timeout 20s",
    )?;
    clusters.is(
        "svcex back -n shop",
        "Valid=True Valid, Ready=True Exported, Conflict=False NoConflicts",
    )?;
    clusters.answers(WEST, "back")?;
    clusters.apply(EAST, &service_export("shop", "bakc"))?;
    clusters.is("svcex bakc -n shop", "Valid=False NoService")?;
    clusters.tombolo(EAST, "delete svcex back bakc -n shop")?;
    clusters.imports(&[])?;

    // A whole namespace; the label of the service itself comes first.
    clusters.apply(EAST, &namespace("shop", "true"))?;
    clusters.imports(&["back.shop"])?;
    clusters.apply(EAST, &plain("shop", "back", "istio.io/global: 'false'"))?;
    clusters.imports(&[])?;
    clusters.apply(EAST, &plain("shop", "back", ""))?;
    clusters.imports(&["back.shop"])?;

    // Outside of the grant: refused, and said where the wish stands.
    clusters.apply(EAST, &plain("bank", "ledger", "istio.io/global: 'true'"))?;
    clusters.apply(EAST, &service_export("bank", "ledger"))?;
    clusters.is("se ledger -n bank", "Exported=False TMB0716")?;
    clusters.is("svcex ledger -n bank", "Valid=False TMB0716, Ready=False Failed")?;
    let described = clusters.tombolo(EAST, "describe svcex ledger -n bank")?;
    ensure!(described.contains("TMB0716"), "{described}");
    let own = clusters.tombolo(EAST, "cluster status east")?;
    ensure!(own.contains("ledger.bank: TMB0716"), "{own}");
    clusters.imports(&["back.shop"])?;

    // Only who admitted it changes what it may do.
    let refused = clusters.tombolo(EAST, "cluster grant east --namespaces shop,bank --yes");
    let refused = format!("{:#}", refused.err().context("a member granted itself")?);
    ensure!(refused.contains("TMB0707"), "{refused}");
    let line = "exec 3<>/dev/tcp/back.shop.svc.mesh.internal/80 && printf 'GET / HTTP/1.1\\r\\nHost: back\\r\\n\\r\\n' >&3 && cat <&3";
    let mut open = clusters.vms[WEST].host.spawn("bash", &["-c", line])?;
    wait_for("an answer on a connection that stays open", PATIENCE, || {
        ensure!(
            open.is_running() && open.log().contains("back speaks"),
            "{}",
            open.log()
        );
        Ok(())
    })?;
    let told = clusters.tombolo(WEST, "cluster grant east --namespaces bank --yes")?;
    ensure!(told.contains("may export bank"), "{told}");
    ensure!(
        open.wait(PATIENCE).is_some(),
        "an open call goes on after the grant"
    );
    let gateway = clusters.gateways[EAST].log();
    ensure!(gateway.contains("export_withdrawn"), "{gateway}");
    clusters.imports(&["ledger.bank"])?;
    clusters.is("se back -n shop", "Exported=False TMB0716")?;
    clusters.is("se ledger -n bank", "Exported=True Exported")?;
    wait_for("no call", PATIENCE, || {
        ensure!(!clusters.vms[WEST].curl(&url("back"))?.ok());
        Ok(())
    })?;
    clusters.tombolo(WEST, "cluster grant east --namespaces shop,bank --yes")?;
    clusters.imports(&["ledger.bank", "back.shop"])?;
    clusters.answers(WEST, "back")?;
    Ok(())
}
