//! What a member may do, changed without a join.

use super::{confirm, namespaces, show};
use crate::{failure::Failure, objects::Admin, output};
use std::collections::BTreeSet;
use tombolo_proto::tombolo::admin::v1::{Cluster, GrantClusterRequest};

/// Change what a member may export.
///
/// It is for whoever admitted the member, or stands above on its chain of admits. What it does not name any more
/// vanishes in all other clusters; what it names anew is there without a join.
#[derive(Debug, clap::Args)]
pub(crate) struct Grant {
    /// Which member.
    #[arg(value_name = "NAME")]
    cluster: String,
    /// All namespaces whose services it may export from now on; * for every one that is not reserved.
    #[arg(long, value_name = "LIST", value_delimiter = ',', required = true)]
    namespaces: Vec<String>,
    /// Whether it may invite others itself; as before unless given.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    may_admit: Option<bool>,
    /// Do not ask for confirmation.
    #[arg(long)]
    yes: bool,
}

pub(super) async fn grant(args: &Grant, admin: &mut Admin) -> Result<(), Failure> {
    let before = show::find(admin, &args.cluster).await?;
    let plan = plan(&before, args);
    if plan.is_empty() {
        output::line(format!(
            "nothing to change: {} may export {}",
            before.name,
            namespaces(&before.namespaces)
        ));
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
    };
    admin.grant_cluster(request).await?;
    let after = show::find(admin, &args.cluster).await?;
    let admits = if after.may_admit {
        ", and may admit others"
    } else {
        ""
    };
    output::line(format!(
        "cluster {} may export {}{admits} (record version {})",
        after.name,
        namespaces(&after.namespaces),
        after.record_version
    ));
    Ok(())
}

/// What would change, in words.
fn plan(before: &Cluster, args: &Grant) -> Vec<String> {
    let set = |list: &[String]| list.iter().cloned().collect::<BTreeSet<String>>();
    let (old, new) = (set(&before.namespaces), set(&args.namespaces));
    let mut plan = Vec::new();
    if old != new {
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
}
