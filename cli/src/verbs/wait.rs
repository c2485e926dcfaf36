use super::Namespace;
use crate::{
    failure::Failure,
    objects::{self, Target, at},
    output,
    sockets::Sockets,
    text,
};
use serde_json::Value;
use std::{
    process::ExitCode,
    str::FromStr,
    time::{Duration, Instant},
};
use tombolo_types::Code;

/// How often is looked.
const INTERVAL: Duration = Duration::from_millis(200);

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum For {
    /// `condition=TYPE[=STATUS]`.
    Condition(String, String),
    /// `delete`.
    Delete,
    /// `jsonpath={.a.b}[=value]`.
    Path(String, Option<String>),
}

impl FromStr for For {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?}: write condition=TYPE[=STATUS], delete, or jsonpath={{.PATH}}[=VALUE]");
        if text.eq_ignore_ascii_case("delete") {
            return Ok(Self::Delete);
        }
        if let Some(rest) = text.strip_prefix("condition=") {
            let (kind, status) = rest.split_once('=').unwrap_or((rest, "True"));
            return if kind.is_empty() {
                Err(wrong())
            } else {
                Ok(Self::Condition(kind.to_owned(), status.to_owned()))
            };
        }
        let rest = text.strip_prefix("jsonpath=").ok_or_else(wrong)?;
        let rest = rest
            .trim_start_matches(['\'', '"'])
            .strip_prefix('{')
            .ok_or_else(wrong)?;
        let (path, value) = rest.split_once('}').ok_or_else(wrong)?;
        let value = value
            .trim_start_matches(['\'', '"'])
            .strip_prefix('=')
            .map(str::to_owned);
        Ok(Self::Path(pointer(path).ok_or_else(wrong)?, value))
    }
}

/// `.status.conditions[0].type` as a JSON pointer.
fn pointer(path: &str) -> Option<String> {
    let mut pointer = String::new();
    for part in path.strip_prefix('.')?.split('.') {
        let (name, indices) = part
            .split_once('[')
            .map_or((part, ""), |(name, rest)| (name, rest));
        if name.is_empty() {
            return None;
        }
        pointer = format!("{pointer}/{}", name.replace('~', "~0").replace('/', "~1"));
        for index in indices.split('[').filter(|index| !index.is_empty()) {
            let index: usize = index.strip_suffix(']')?.parse().ok()?;
            pointer = format!("{pointer}/{index}");
        }
    }
    Some(pointer)
}

impl For {
    fn holds(&self, object: Option<&Value>) -> bool {
        match (self, object) {
            (Self::Delete, object) => object.is_none(),
            (_, None) => false,
            (Self::Condition(kind, status), Some(object)) => {
                let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
                conditions.into_iter().flatten().any(|condition| {
                    at(condition, "/type").eq_ignore_ascii_case(kind)
                        && at(condition, "/status").eq_ignore_ascii_case(status)
                })
            }
            (Self::Path(pointer, wanted), Some(object)) => match (object.pointer(pointer), wanted) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(Value::String(text)), Some(wanted)) => text == wanted,
                (Some(other), Some(wanted)) => {
                    let shown = other.to_string();
                    shown == *wanted
                }
            },
        }
    }
}

/// Wait until objects are as they should be.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// KIND NAME... or KIND/NAME...
    #[arg(required = true, value_name = "KIND NAME")]
    words: Vec<String>,
    #[command(flatten)]
    namespace: Namespace,
    /// All objects of the kind in the namespace, as they are now.
    #[arg(long)]
    all: bool,
    /// condition=TYPE[=STATUS], delete, or jsonpath={.PATH}[=VALUE].
    #[arg(long = "for", value_name = "WHAT")]
    condition: For,
    /// Longest wait.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = text::duration)]
    timeout: Duration,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let deadline = Instant::now() + args.timeout;
    let mut admin = sockets.admin().await?;
    let mut targets = Vec::new();
    for target in objects::targets(&args.words)? {
        match &target.name {
            Some(_) if args.all => return Err(Failure::usage("--all and a name exclude each other")),
            Some(_) => targets.push(target),
            None if args.all => {
                let found = objects::list(&mut admin, target.kind, args.namespace.or_default()).await?;
                targets.extend(found.iter().map(|object| Target {
                    kind: target.kind,
                    name: Some(at(object, "/metadata/name").to_owned()),
                }));
            }
            None => {
                return Err(Failure::usage(
                    "a name is missing; --all waits for all of the kind in the namespace",
                ));
            }
        }
    }
    for target in targets {
        let Some(name) = &target.name else { continue };
        loop {
            let object = match objects::get(&mut admin, target.kind, args.namespace.or_default(), name).await
            {
                Ok(object) => Some(object),
                Err(failure) if failure.code() == Some(Code::NotFound) => None,
                Err(failure) => return Err(failure),
            };
            if args.condition.holds(object.as_ref()) {
                let met = if args.condition == For::Delete {
                    "deleted"
                } else {
                    "condition met"
                };
                output::line(format!("{} {met}", objects::title(target.kind, name)));
                break;
            }
            if Instant::now() >= deadline {
                let missing = if object.is_none() {
                    " (there is no such object)"
                } else {
                    ""
                };
                let title = objects::title(target.kind, name);
                let text = format!("{title}: not so within {:?}{missing}", args.timeout);
                return Err(Failure::Plain {
                    exit: crate::failure::TIMEOUT,
                    text,
                });
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn conditions() {
        let object =
            json!({"status": {"conditions": [{"type": "Healthy", "status": "False"}], "n": 3, "s": "x"}});
        for (text, expected) in [
            ("condition=Healthy", false),
            ("condition=healthy=false", true),
            ("condition=Other", false),
            ("delete", false),
            ("jsonpath={.status.n}=3", true),
            ("jsonpath='{.status.s}'=x", true),
            ("jsonpath={.status.s}=y", false),
            ("jsonpath={.status.conditions[0].type}=Healthy", true),
            ("jsonpath={.status.nothing}", false),
            ("jsonpath={.status.s}", true),
        ] {
            assert_eq!(
                text.parse::<For>().unwrap().holds(Some(&object)),
                expected,
                "{text}"
            );
        }
        assert!(For::Delete.holds(None) && !"condition=Healthy".parse::<For>().unwrap().holds(None));
        for bad in [
            "",
            "condition=",
            "ready",
            "jsonpath=.a",
            "jsonpath={a}",
            "jsonpath={.a[x]}",
            "jsonpath={..a}",
        ] {
            assert!(bad.parse::<For>().is_err(), "{bad}");
        }
    }
}
