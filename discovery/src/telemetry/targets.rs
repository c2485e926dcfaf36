//! What a scraper reads: one target per member, and the page of each.
//!
//! Source: Prometheus HTTP service discovery (`http_sd_configs`): a JSON list of `{targets, labels}`.

use super::PushedMetrics;
use crate::fleet::View;
use serde_json::{Value, json};
use std::{collections::BTreeSet, fmt::Write as _, time::Instant};
use tombolo_runtime::http::Answer;

/// Pages of members are below this path: `/metrics/vm/<namespace>/<workload>`.
pub const PAGES: &str = "/metrics/vm/";

/// The list for Prometheus. A member stays in it as long as it is a member, so that `up` is 0 for a silent one.
pub fn http_sd(pushed: &PushedMetrics, view: &View, address: &str) -> Answer {
    let target = |device| {
        let member = view.members.get(&device)?;
        let (spec, namespace) = (&member.device.spec, &member.device.metadata.namespace);
        let workload = &spec.workload_entry;
        if spec.revoked.is_some() {
            return None;
        }
        Some(json!({
            "targets": [address],
            "labels": {
                "__metrics_path__": format!("{PAGES}{namespace}/{workload}"),
                // All have one address: without this all would be one instance.
                "instance": format!("{namespace}/{workload}"),
                "namespace": namespace,
                "workload": workload,
                "workload_group": spec.workload_group,
                "service_account": spec.service_account,
                "network": spec.network,
                "locality": member.locality,
            },
        }))
    };
    let targets: Vec<Value> = pushed.devices().into_iter().filter_map(target).collect();
    Answer::json(Value::Array(targets).to_string())
}

/// The page of a member, by what follows [`PAGES`]; `None` for one that is not known or silent.
pub fn page(pushed: &PushedMetrics, view: &View, rest: &str, now: Instant) -> Option<Answer> {
    let (namespace, workload) = rest.split_once('/')?;
    let device = *view.by_entry.get(&(namespace.to_owned(), workload.to_owned()))?;
    let (text, age) = pushed.text(device, now)?;
    let mut body = as_text_format(&text);
    let name = "tombolo_metrics_age_seconds";
    let _ = writeln!(
        body,
        "# HELP {name} Seconds since the member pushed these metrics to discovery.\n# TYPE {name} gauge\n{name} {:.1}",
        age.as_secs_f64()
    );
    Some(Answer {
        content_type: "text/plain; version=0.0.4; charset=utf-8",
        ..Answer::text(body)
    })
}

/// OpenMetrics, as agents write it, in the words of the older format, which forgives more: there a counter's family is
/// named as its sample, and there is no mark at the end.
fn as_text_format(text: &str) -> String {
    let counters: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .filter(|name| !name.ends_with("_total"))
        .collect();
    let mut body = String::with_capacity(text.len() + 512);
    for line in text.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what @ ("HELP" | "TYPE")), Some(name), Some(rest))
                if counters.contains(name) =>
            {
                let _ = writeln!(body, "# {what} {name}_total {rest}");
            }
            _ => {
                let _ = writeln!(body, "{line}");
            }
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::{super::pushed::Content, *};
    use crate::fleet::Member;
    use std::sync::Arc;
    use tombolo_config::{DeviceSpec, Metadata, Object, Revoked};
    use tombolo_types::DeviceId;

    fn view(ids: &[DeviceId]) -> View {
        let mut view = View::default();
        for (n, id) in ids.iter().enumerate() {
            let spec = DeviceSpec {
                workload_group: "catalog".into(),
                service_account: "catalog-sa".into(),
                workload_entry: format!("catalog-{n}"),
                network: "net1".into(),
                ..DeviceSpec::default()
            };
            let metadata = Metadata::named("shop", id.to_string());
            view.by_entry
                .insert(("shop".into(), spec.workload_entry.clone()), *id);
            let member = Member {
                device: Object::<DeviceSpec>::new(metadata, spec),
                address: None,
                locality: "eu/a".into(),
                entry_status: None,
                standing: None,
                report: None,
                awaits_report: false,
                since_unix_ms: 0,
            };
            view.members.insert(*id, Arc::new(member));
        }
        view
    }

    #[test]
    fn counters_are_named_as_their_samples() {
        let text = "# HELP a Sum.\n# TYPE a counter\na_total{b=\"c\"} 1\n# TYPE g gauge\ng 2\n# EOF\n";
        assert_eq!(
            as_text_format(text),
            "# HELP a_total Sum.\n# TYPE a_total counter\na_total{b=\"c\"} 1\n# TYPE g gauge\ng 2\n"
        );
    }

    #[test]
    fn one_target_per_member_that_pushes() {
        let id = |n: u8| format!("{n:016x}").parse::<DeviceId>().unwrap();
        let (pushed, now) = (PushedMetrics::default(), Instant::now());
        let mut view = view(&[id(1), id(2), id(3)]);
        for n in [1, 2, 9] {
            pushed
                .push(id(n), Content::Text("a 1\n# EOF\n".into()), now)
                .unwrap();
        }
        let list: Value = serde_json::from_str(&http_sd(&pushed, &view, "10.0.0.1:15014").body).unwrap();
        assert_eq!(
            list.as_array().unwrap().len(),
            2,
            "one is silent, one no member: {list}"
        );
        assert_eq!(
            list[1],
            json!({"targets": ["10.0.0.1:15014"], "labels": {
                "__metrics_path__": "/metrics/vm/shop/catalog-1", "instance": "shop/catalog-1", "namespace": "shop",
                "workload": "catalog-1", "workload_group": "catalog", "service_account": "catalog-sa",
                "network": "net1", "locality": "eu/a",
            }})
        );
        let body = page(&pushed, &view, "shop/catalog-0", now).unwrap().body;
        assert!(
            body.starts_with("a 1\n# HELP tombolo_metrics_age_seconds"),
            "{body}"
        );
        assert!(body.ends_with("\ntombolo_metrics_age_seconds 0.0\n"), "{body}");
        for unknown in ["shop/catalog-2", "shop/none", "other/catalog-0", "shop", ""] {
            assert!(page(&pushed, &view, unknown, now).is_none(), "{unknown}");
        }
        // A revoked one is no target any more.
        let mut revoked = Member::clone(&view.members[&id(1)]);
        revoked.device.spec.revoked = Some(Revoked {
            at: String::new(),
            reason: String::new(),
        });
        view.members.insert(id(1), Arc::new(revoked));
        let list: Value = serde_json::from_str(&http_sd(&pushed, &view, "x:1").body).unwrap();
        assert_eq!(list.as_array().unwrap().len(), 1);
    }
}
