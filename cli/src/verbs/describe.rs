use super::Namespace;
use crate::{
    failure::Failure,
    objects::{self, at},
    output::{self, Format},
    sockets::Sockets,
    text,
};
use serde_json::Value;
use std::{fmt::Write as _, process::ExitCode};
use tombolo_control_client::host;

/// Show objects with everything that is known about them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// KIND NAME... or KIND/NAME...; a KIND alone describes all of it.
    #[arg(required = true, value_name = "KIND [NAME]")]
    words: Vec<String>,
    #[command(flatten)]
    namespace: Namespace,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let targets = objects::targets(&args.words)?;
    let mut admin = sockets.admin().await?;
    let namespace = args.namespace.or_default();
    let mut first = true;
    for target in &targets {
        let found = match &target.name {
            Some(name) => vec![objects::get(&mut admin, target.kind, namespace, name).await?],
            None => objects::list(&mut admin, target.kind, namespace).await?,
        };
        for object in &found {
            if !std::mem::take(&mut first) {
                output::line("\n");
            }
            output::print(&described(object)?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn described(object: &Value) -> Result<String, Failure> {
    let mut shown = String::new();
    let mut field = |name: &str, value: &str| {
        let _ = writeln!(
            shown,
            "{:<14}{}",
            format!("{name}:"),
            if value.is_empty() { "<none>" } else { value }
        );
    };
    field("Name", at(object, "/metadata/name"));
    field("Namespace", at(object, "/metadata/namespace"));
    field(
        "Kind",
        &format!("{} ({})", at(object, "/kind"), at(object, "/apiVersion")),
    );
    for (name, pointer) in [
        ("Labels", "/metadata/labels"),
        ("Annotations", "/metadata/annotations"),
    ] {
        let map = object.pointer(pointer).and_then(Value::as_object);
        let lines: Vec<_> = map
            .into_iter()
            .flatten()
            .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or("?")))
            .collect();
        field(name, &lines.join(&format!("\n{:14}", "")));
    }
    if let Some(created) = tombolo_config::unix_ms(at(object, "/metadata/creationTimestamp")) {
        field(
            "Created",
            &format!(
                "{} ({})",
                text::time(created),
                text::relative(created, host::now_unix_ms())
            ),
        );
    }
    field("Version", at(object, "/metadata/resourceVersion"));
    for owner in object
        .pointer("/metadata/ownerReferences")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        field(
            "Owned by",
            &format!("{}/{}", at(owner, "/kind"), at(owner, "/name")),
        );
    }
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    let mut status = object.get("status").cloned().unwrap_or(Value::Null);
    if let Some(fields) = status.as_object_mut() {
        fields.remove("conditions");
    }
    for (title, part) in [
        ("Spec", object.get("spec").unwrap_or(&Value::Null)),
        ("Status", &status),
    ] {
        if part.as_object().is_none_or(serde_json::Map::is_empty) {
            continue;
        }
        let yaml = output::rendered(Format::Yaml, part)?;
        let _ = writeln!(shown, "{title}:");
        shown.push_str(&text::indented(&yaml, 2));
    }
    if let Some(conditions) = conditions.filter(|all| !all.is_empty()) {
        let mut table = output::Table::new(&["TYPE", "STATUS", "SINCE", "REASON", "MESSAGE"]);
        for condition in conditions {
            let since = tombolo_config::unix_ms(at(condition, "/lastTransitionTime"));
            table.row(vec![
                at(condition, "/type").to_owned(),
                at(condition, "/status").to_owned(),
                since.map_or_else(String::new, |at| text::age(host::now_unix_ms() - at)),
                at(condition, "/reason").to_owned(),
                at(condition, "/message").to_owned(),
            ]);
        }
        shown.push_str("Conditions:\n");
        shown.push_str(&text::indented(&table.render(), 2));
    }
    Ok(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_shown_once() {
        let object = serde_json::json!({
            "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
            "metadata": {"name": "a", "namespace": "shop", "labels": {"x": "1", "y": "2"}, "resourceVersion": "7",
                "ownerReferences": [{"kind": "WorkloadGroup", "name": "g"}]},
            "spec": {"address": "10.0.0.1"},
            "status": {"conditions": [{"type": "Healthy", "status": "False", "message": "connection refused"}]}
        });
        let text = described(&object).unwrap();
        for part in [
            "Name:         a\n",
            "x=1\n",
            "y=2\n",
            "WorkloadGroup/g",
            "  address: ",
            "connection refused",
        ] {
            assert_eq!(text.matches(part).count(), 1, "{part}\n{text}");
        }
        assert!(
            !text.contains("Status:\n"),
            "conditions are the whole status: {text}"
        );
    }
}
