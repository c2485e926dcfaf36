//! What is known of the clusters, for people and programs.

use super::namespaces;
use crate::{
    failure::Failure,
    objects::Admin,
    output::{self, Format, Output, Table},
    text,
};
use serde_json::{Value, json};
use tombolo_control_client::host;
use tombolo_proto::tombolo::admin::v1::{Cluster, ListClustersRequest, ListClustersResponse};
use tombolo_types::Code;

/// All clusters.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Removed ones too.
    #[arg(long)]
    removed: bool,
    #[command(flatten)]
    output: Output,
}

/// One cluster, or all.
#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    /// Which; all unless given.
    #[arg(value_name = "NAME")]
    cluster: Option<String>,
    #[command(flatten)]
    output: Output,
}

pub(super) async fn list(args: &List, admin: &mut Admin) -> Result<(), Failure> {
    let found = admin.list_clusters(ListClustersRequest {}).await?.into_inner();
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let shown = found
                .clusters
                .iter()
                .filter(|c| args.removed || c.state != "Removed");
            output::value(format, &json!({"clusters": shown.map(value).collect::<Vec<_>>()}))?;
        }
        Format::Name => found.clusters.iter().for_each(|c| output::line(&c.name)),
        format @ (Format::Table | Format::Wide) => {
            output::print(&table(&found, format == Format::Wide, args.removed).render());
        }
    }
    Ok(())
}

pub(super) async fn status(args: &Status, admin: &mut Admin) -> Result<(), Failure> {
    let found = admin.list_clusters(ListClustersRequest {}).await?.into_inner();
    let wanted = |cluster: &&Cluster| args.cluster.as_ref().is_none_or(|name| *name == cluster.name);
    let shown: Vec<&Cluster> = found.clusters.iter().filter(wanted).collect();
    if let (Some(name), true) = (&args.cluster, shown.is_empty()) {
        return Err(Failure::coded(
            Code::MemberUnknown,
            format!("{name}; tombolo cluster list names them"),
        ));
    }
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let clusters: Vec<Value> = shown.into_iter().map(value).collect();
            output::value(
                format,
                &json!({"cluster": found.cluster, "exportedServices": found.exported_services,
                        "exportsVersion": found.seq, "clusters": clusters}),
            )?;
        }
        Format::Name => shown.iter().for_each(|c| output::line(&c.name)),
        Format::Table | Format::Wide => {
            let described: Vec<String> = shown
                .iter()
                .map(|cluster| described(cluster, &found, host::now_unix_ms()))
                .collect();
            output::print(&described.join("\n"));
        }
    }
    Ok(())
}

fn heard(cluster: &Cluster, now_unix_ms: i64) -> String {
    match cluster.last_heard_unix_ms {
        _ if cluster.state == "Own" => "-".into(),
        0 => "never".into(),
        at => text::relative(at.min(now_unix_ms), now_unix_ms),
    }
}

pub(super) fn table(found: &ListClustersResponse, wide: bool, removed: bool) -> Table {
    let mut header = vec!["NAME", "TRUST DOMAIN", "STATE", "HEARD", "SERVICES", "GATEWAYS"];
    if wide {
        header.extend(["EXPORTS", "ADMITTED BY", "MAY ADMIT", "ENDPOINTS", "REFUSED"]);
    }
    let mut table = Table::new(&header);
    let now = host::now_unix_ms();
    for cluster in found.clusters.iter().filter(|c| removed || c.state != "Removed") {
        let services = if cluster.state == "Own" {
            found.exported_services
        } else {
            cluster.imported_services
        };
        let mut cells = vec![
            cluster.name.clone(),
            cluster.trust_domain.clone(),
            cluster.state.clone(),
            heard(cluster, now),
            services.to_string(),
            cluster.gateways.to_string(),
        ];
        if wide {
            let refused: u64 = cluster.refused.iter().map(|refused| refused.count).sum();
            cells.extend([
                namespaces(&cluster.namespaces),
                cluster.admitted_by.clone(),
                if cluster.may_admit { "yes" } else { "no" }.into(),
                cluster.endpoints.join(","),
                refused.to_string(),
            ]);
        }
        table.row(cells);
    }
    table
}

fn value(cluster: &Cluster) -> Value {
    let refused = cluster.refused.iter().map(|refused| {
        json!({"message": refused.message, "last": text::time(refused.last_unix_ms), "count": refused.count})
    });
    json!({
        "name": cluster.name, "trustDomain": cluster.trust_domain, "state": cluster.state, "reason": cluster.reason,
        "connected": cluster.connected,
        "lastHeard": (cluster.last_heard_unix_ms > 0).then(|| text::time(cluster.last_heard_unix_ms)),
        "importedServices": cluster.imported_services, "gateways": cluster.gateways, "exportsVersion": cluster.seq,
        "namespaces": cluster.namespaces, "mayAdmit": cluster.may_admit,
        "shareTrustDomain": cluster.share_trust_domain, "admittedBy": cluster.admitted_by,
        "endpoints": cluster.endpoints, "incarnation": cluster.incarnation, "recordVersion": cluster.record_version,
        "refused": refused.collect::<Vec<_>>(),
    })
}

fn described(cluster: &Cluster, found: &ListClustersResponse, now_unix_ms: i64) -> String {
    let own = cluster.state == "Own";
    let services = if own {
        format!("{} exported, version {}", found.exported_services, found.seq)
    } else {
        format!(
            "{} imported, version {}; {} gateways",
            cluster.imported_services, cluster.seq, cluster.gateways
        )
    };
    let yes = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
    let mut fields = vec![
        ("Name", cluster.name.clone()),
        ("Trust domain", cluster.trust_domain.clone()),
        ("State", cluster.state.clone()),
    ];
    if !cluster.reason.is_empty() {
        fields.push(("Reason", cluster.reason.clone()));
    }
    if !own {
        fields.push(("Connected", yes(cluster.connected)));
        fields.push(("Last heard", heard(cluster, now_unix_ms)));
    }
    fields.extend([
        ("Services", services),
        ("May export", namespaces(&cluster.namespaces)),
        ("May admit", yes(cluster.may_admit)),
        ("Admitted by", cluster.admitted_by.clone()),
        (
            "Record",
            format!(
                "incarnation {}, version {}",
                cluster.incarnation, cluster.record_version
            ),
        ),
        ("Endpoints", cluster.endpoints.join(", ")),
    ]);
    let mut shown: String = fields
        .iter()
        .map(|(name, value)| format!("{:<14}{value}\n", format!("{name}:")))
        .collect();
    if !cluster.refused.is_empty() {
        shown.push_str("Refused since discovery started:\n");
        for refused in &cluster.refused {
            let line = format!(
                "{} times, last {}: {}",
                refused.count,
                text::relative(refused.last_unix_ms, now_unix_ms),
                refused.message
            );
            shown.push_str(&text::indented(&format!("{line}\n"), 2));
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_proto::tombolo::admin::v1::RefusedStatement;

    #[test]
    fn a_stale_member_at_a_glance() {
        let east = Cluster {
            name: "east".into(),
            trust_domain: "east.example".into(),
            state: "Stale".into(),
            reason: "TMB0724 x".into(),
            last_heard_unix_ms: 1000,
            imported_services: 7,
            namespaces: vec!["*".into()],
            refused: vec![RefusedStatement {
                message: "TMB0716 y".into(),
                last_unix_ms: 1000,
                count: 3,
            }],
            ..Default::default()
        };
        let found = ListClustersResponse {
            cluster: "west".into(),
            clusters: vec![east.clone()],
            ..Default::default()
        };
        let text = described(&east, &found, 61_000);
        for part in [
            "Stale",
            "TMB0724",
            "7 imported",
            "every namespace",
            "3 times",
            "TMB0716 y",
            "ago",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(table(&found, false, false).render().contains("Stale"));
    }
}
