//! What is known of the clusters, for people and programs.

use super::namespaces;
use crate::{
    failure::Failure,
    objects::Admin,
    output::{self, Format, Output, Table},
    text,
};
use serde_json::{Value, json};
use tombolo_config::nearest;
use tombolo_control_client::host;
use tombolo_proto::tombolo::admin::v1::{Cluster, ListClustersRequest, ListClustersResponse};
use tombolo_types::Code;

/// Services that are named to people.
const NAMED_MAX: usize = 50;

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

async fn all(admin: &mut Admin, services: bool) -> Result<ListClustersResponse, Failure> {
    let request = ListClustersRequest { services };
    Ok(admin.list_clusters(request).await?.into_inner())
}

/// One cluster by its name.
pub(super) async fn find(admin: &mut Admin, name: &str) -> Result<Cluster, Failure> {
    let found = all(admin, false).await?;
    one(&found, name).cloned()
}

fn one<'a>(found: &'a ListClustersResponse, name: &str) -> Result<&'a Cluster, Failure> {
    let clusters = &found.clusters;
    clusters
        .iter()
        .find(|cluster| cluster.name == name)
        .ok_or_else(|| {
            let meant = nearest(name, clusters.iter().map(|cluster| cluster.name.as_str()));
            let meant = meant.map_or_else(String::new, |meant| format!("; did you mean {meant}?"));
            Failure::coded(Code::MemberUnknown, format!("{name}{meant}"))
        })
}

/// Those that a list shows: the own cluster always.
fn listed(found: &ListClustersResponse, removed: bool) -> impl Iterator<Item = &Cluster> {
    let clusters = found.clusters.iter();
    clusters.filter(move |c| removed || c.state != "Removed" || c.name == found.cluster)
}

pub(super) async fn list(args: &List, admin: &mut Admin) -> Result<(), Failure> {
    let found = all(admin, false).await?;
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let shown = listed(&found, args.removed);
            output::value(format, &json!({"clusters": shown.map(value).collect::<Vec<_>>()}))?;
        }
        Format::Name => {
            let shown = listed(&found, args.removed);
            shown.for_each(|c| output::line(&c.name));
        }
        format @ (Format::Table | Format::Wide) => {
            output::print(&table(&found, format == Format::Wide, args.removed).render());
        }
    }
    Ok(())
}

pub(super) async fn status(args: &Status, admin: &mut Admin) -> Result<(), Failure> {
    let found = all(admin, true).await?;
    let shown: Vec<&Cluster> = match &args.cluster {
        Some(name) => vec![one(&found, name)?],
        None => found.clusters.iter().collect(),
    };
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

/// All names of its trust domain.
fn trust_domains(cluster: &Cluster, separator: &str) -> String {
    let also = cluster.also_trust_domains.iter().map(String::as_str);
    let names: Vec<&str> = std::iter::once(cluster.trust_domain.as_str())
        .chain(also)
        .collect();
    names.join(separator)
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
        header.extend([
            "VERSION",
            "MAY EXPORT",
            "ADMITTED BY",
            "MAY ADMIT",
            "ENDPOINTS",
            "REFUSED",
        ]);
    }
    let mut table = Table::new(&header);
    let now = host::now_unix_ms();
    for cluster in listed(found, removed) {
        let services = if cluster.state == "Own" {
            found.exported_services
        } else {
            cluster.imported_services
        };
        let mut cells = vec![
            cluster.name.clone(),
            trust_domains(cluster, ","),
            cluster.state.clone(),
            heard(cluster, now),
            services.to_string(),
            // Those of the own cluster are not imported: vm list -n tombolo-system.
            if cluster.state == "Own" {
                "-".to_owned()
            } else {
                cluster.gateways.to_string()
            },
        ];
        if wide {
            let refused: u64 = cluster.refused.iter().map(|refused| refused.count).sum();
            cells.extend([
                cluster.version.clone(),
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
    let refused_exports = cluster.refused_exports.iter().map(
        |refused| json!({"namespace": refused.namespace, "name": refused.name, "message": refused.message}),
    );
    json!({
        "name": cluster.name, "trustDomain": cluster.trust_domain,
        "alsoTrustDomains": cluster.also_trust_domains, "contestedTrustDomains": cluster.contested_trust_domains,
        "state": cluster.state, "reason": cluster.reason,
        "connected": cluster.connected,
        "lastHeard": (cluster.last_heard_unix_ms > 0).then(|| text::time(cluster.last_heard_unix_ms)),
        "importedServices": cluster.imported_services, "gateways": cluster.gateways, "exportsVersion": cluster.seq,
        "namespaces": cluster.namespaces, "mayAdmit": cluster.may_admit,
        "shareTrustDomain": cluster.share_trust_domain, "admittedBy": cluster.admitted_by,
        "endpoints": cluster.endpoints, "incarnation": cluster.incarnation, "recordVersion": cluster.record_version,
        "refused": refused.collect::<Vec<_>>(), "version": cluster.version, "services": cluster.services,
        "refusedExports": refused_exports.collect::<Vec<_>>(),
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
        ("Trust domain", trust_domains(cluster, ", also ")),
        ("State", cluster.state.clone()),
    ];
    if !cluster.reason.is_empty() {
        fields.push(("Reason", cluster.reason.clone()));
    }
    if !cluster.contested_trust_domains.is_empty() {
        let names = cluster.contested_trust_domains.join(", ");
        fields.push(("Not counted", format!("{names}: another member has it")));
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
    if !cluster.version.is_empty() {
        fields.push(("Version", cluster.version.clone()));
    }
    let mut shown: String = fields
        .iter()
        .map(|(name, value)| format!("{:<14}{value}\n", format!("{name}:")))
        .collect();
    let named = if own {
        "Exported services"
    } else {
        "Imported services"
    };
    if !cluster.services.is_empty() {
        shown.push_str(&format!("{named}:\n"));
        let names = cluster.services.iter().take(NAMED_MAX);
        names.for_each(|name| shown.push_str(&format!("  {name}\n")));
        if cluster.services.len() > NAMED_MAX {
            let more = cluster.services.len() - NAMED_MAX;
            shown.push_str(&format!("  and {more} more: -o json\n"));
        }
    }
    if !cluster.refused_exports.is_empty() {
        shown.push_str("Exports that are refused:\n");
        for refused in &cluster.refused_exports {
            let line = format!("{}.{}: {}\n", refused.name, refused.namespace, refused.message);
            shown.push_str(&text::indented(&line, 2));
        }
    }
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
    use tombolo_proto::tombolo::admin::v1::{RefusedExport, RefusedStatement};

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
            version: "0.1.0".into(),
            also_trust_domains: vec!["new.example".into()],
            contested_trust_domains: vec!["new.example".into()],
            services: vec!["catalog.shop".into()],
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
            "east.example, also new.example",
            "new.example: another member has it",
            "7 imported",
            "every namespace",
            "3 times",
            "TMB0716 y",
            "ago",
            "0.1.0",
            "Imported services:\n  catalog.shop\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(table(&found, false, false).render().contains("Stale"));
        let unknown = one(&found, "eats").unwrap_err().to_string();
        assert!(unknown.contains("did you mean east?"), "{unknown}");
        let own = Cluster {
            state: "Own".into(),
            refused_exports: vec![RefusedExport {
                namespace: "bank".into(),
                name: "ledger".into(),
                message: "TMB0716 z".into(),
            }],
            ..east
        };
        let text = described(&own, &found, 61_000);
        assert!(text.contains("  ledger.bank: TMB0716 z\n"), "{text}");
    }
}
