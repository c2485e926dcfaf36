//! What a member may do, changed without a join.

use super::{confirm, namespaces, show};
use crate::{failure::Failure, objects::Admin, output};
use std::collections::BTreeSet;
use tombolo_proto::tombolo::admin::v1::{Cluster, GrantClusterRequest};

/// Change what a member may do, and which names its trust domain has.
///
/// It is for whoever admitted the member, or stands above on its chain of admits; the founder says it of itself. What
/// the list of namespaces does not name any more vanishes in all other clusters; what it names anew is there without a
/// join. A second name of the trust domain is for the time of a migration: tombolo trust migrate.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
pub(crate) struct Grant {
    /// Which member.
    #[arg(value_name = "NAME")]
    cluster: String,
    /// All namespaces whose services it may export from now on; * for every one that is not reserved.
    #[arg(long, value_name = "LIST", value_delimiter = ',', group = "change")]
    namespaces: Vec<String>,
    /// Whether it may invite others itself; as before unless given.
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        require_equals = true,
        group = "change"
    )]
    may_admit: Option<bool>,
    /// Another name of its trust domain: its roots make identities of that one too.
    #[arg(long, value_name = "DOMAIN", group = "change")]
    trust_domain: Option<String>,
    /// A name of its trust domain that it has no more.
    #[arg(long, value_name = "DOMAIN", group = "change")]
    drop_trust_domain: Option<String>,
    /// Drop the name also while the member says that it uses it.
    #[arg(long, requires = "drop_trust_domain")]
    force: bool,
    /// Do not ask for confirmation.
    #[arg(long)]
    yes: bool,
}

pub(super) async fn grant(args: &Grant, admin: &mut Admin) -> Result<(), Failure> {
    let before = show::find(admin, &args.cluster).await?;
    let plan = plan(&before, args);
    if plan.is_empty() {
        output::line(format!("nothing to change: {}", summary(&before)));
        return Ok(());
    }
    eprintln!(
        "Cluster {} of {}: {}.",
        before.name,
        before.trust_domain,
        plan.join("; ")
    );
    confirm("Change it?", args.yes)?;
    let request = GrantClusterRequest {
        cluster: args.cluster.clone(),
        namespaces: args.namespaces.clone(),
        may_admit: args.may_admit,
        add_trust_domain: args.trust_domain.clone().unwrap_or_default(),
        drop_trust_domain: args.drop_trust_domain.clone().unwrap_or_default(),
        force: args.force,
    };
    admin.grant_cluster(request).await?;
    let after = show::find(admin, &args.cluster).await?;
    output::line(format!(
        "cluster {} (record version {})",
        summary(&after),
        after.record_version
    ));
    Ok(())
}

/// What a member is and may do, in words.
fn summary(cluster: &Cluster) -> String {
    let also = match cluster.also_trust_domains.as_slice() {
        [] => String::new(),
        names => format!(", also {}", names.join(", ")),
    };
    let admits = if cluster.may_admit {
        ", and may admit others"
    } else {
        ""
    };
    format!(
        "{} of {}{also} may export {}{admits}",
        cluster.name,
        cluster.trust_domain,
        namespaces(&cluster.namespaces)
    )
}

/// What would change, in words.
fn plan(before: &Cluster, args: &Grant) -> Vec<String> {
    let set = |list: &[String]| list.iter().cloned().collect::<BTreeSet<String>>();
    let (old, new) = (set(&before.namespaces), set(&args.namespaces));
    let mut plan = Vec::new();
    if !args.namespaces.is_empty() && old != new {
        plan.push(format!(
            "may export {} instead of {}",
            namespaces(&args.namespaces),
            namespaces(&before.namespaces)
        ));
        let all = "*".to_owned();
        let lost: Vec<&str> = old
            .iter()
            .filter(|namespace| !new.contains(&all) && !new.contains(*namespace))
            .map(String::as_str)
            .collect();
        match lost.as_slice() {
            [] => {}
            ["*"] => plan.push("its services of all other namespaces vanish in all clusters".to_owned()),
            lost => plan.push(format!(
                "its services of {} vanish in all clusters",
                lost.join(", ")
            )),
        }
    }
    match args.may_admit {
        Some(true) if !before.may_admit => plan.push("may admit others".to_owned()),
        Some(false) if before.may_admit => {
            plan.push("may admit nobody any more; this cluster answers for whom it admitted".to_owned());
        }
        Some(_) | None => {}
    }
    let has = |name: &str| {
        before.trust_domain == name || before.also_trust_domains.iter().any(|other| other == name)
    };
    if let Some(name) = args.trust_domain.as_deref().filter(|name| !has(name)) {
        plan.push(format!(
            "its roots are believed for identities of {name} too, in all clusters"
        ));
    }
    if let Some(name) = &args.drop_trust_domain {
        plan.push(format!(
            "identities of {name} are not its own any more, and are believed nowhere"
        ));
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        grant: Grant,
    }

    fn planned(old: &[&str], line: &str) -> String {
        let before = Cluster {
            name: "east".into(),
            trust_domain: "east.example".into(),
            namespaces: old.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        };
        let args = Line::parse_from(format!("grant east {line}").split_whitespace()).grant;
        plan(&before, &args).join("; ")
    }

    #[test]
    fn the_plan_names_what_is_lost() {
        assert_eq!(planned(&["shop"], "--namespaces shop"), "");
        assert_eq!(
            planned(&["shop", "bank"], "--namespaces shop"),
            "may export shop instead of shop, bank; its services of bank vanish in all clusters"
        );
        assert_eq!(
            planned(&["shop"], "--namespaces shop,bank"),
            "may export shop, bank instead of shop"
        );
        assert_eq!(
            planned(&["*"], "--namespaces shop"),
            "may export shop instead of every namespace; its services of all other namespaces vanish in all clusters"
        );
        assert_eq!(
            planned(&["shop"], "--namespaces shop --may-admit"),
            "may admit others"
        );
        assert_eq!(planned(&["shop"], "--namespaces shop --may-admit=false"), "");
    }

    #[test]
    fn the_plan_names_trust_domains() {
        assert_eq!(
            planned(&["shop"], "--trust-domain new.example"),
            "its roots are believed for identities of new.example too, in all clusters"
        );
        assert_eq!(planned(&["shop"], "--trust-domain east.example"), "");
        assert_eq!(
            planned(&["shop"], "--drop-trust-domain east.example"),
            "identities of east.example are not its own any more, and are believed nowhere"
        );
        for line in ["", "--force", "--force --namespaces shop"] {
            let line = format!("grant east {line}");
            assert!(Line::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
    }
}
