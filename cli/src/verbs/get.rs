use super::Namespaces;
use crate::{
    failure::Failure,
    objects::{self, Target},
    output::{self, Format, Output},
    sockets::Sockets,
};
use serde_json::{Value, json};
use std::process::ExitCode;
use tombolo_types::Code;

/// List objects.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// KIND, KIND,KIND, KIND NAME... or KIND/NAME...; kinds: wg we se ap pa svcex ns jt.
    #[arg(required = true, value_name = "KIND [NAME]")]
    words: Vec<String>,
    #[command(flatten)]
    namespaces: Namespaces,
    /// Only objects with these labels: key=value, key!=value or key, separated by commas.
    #[arg(short = 'l', long = "selector", value_name = "LABELS", default_value = "")]
    selector: String,
    /// Leave out the first line.
    #[arg(long)]
    no_headers: bool,
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let targets = objects::targets(&args.words)?;
    let named = targets.iter().all(|target| target.name.is_some());
    if named && args.namespaces.is_all() {
        return Err(Failure::usage(
            "a name needs one namespace: -n NAMESPACE instead of -A",
        ));
    }
    let mut admin = sockets.admin().await?;
    let (mut groups, mut missing) = (Vec::new(), Vec::new());
    for Target { kind, name } in &targets {
        let found = match name {
            Some(name) => match objects::get(&mut admin, *kind, args.namespaces.filter(), name).await {
                Ok(object) => vec![object],
                // The others are shown all the same.
                Err(failure) if failure.code() == Some(Code::NotFound) && targets.len() > 1 => {
                    missing.push(failure);
                    continue;
                }
                Err(failure) => return Err(failure),
            },
            None => objects::list(&mut admin, *kind, args.namespaces.filter()).await?,
        };
        let found = found.into_iter().filter(|object| selects(&args.selector, object));
        match groups.last_mut() {
            Some((last, objects)) if last == kind => Vec::extend(objects, found),
            _ => groups.push((*kind, found.collect::<Vec<_>>())),
        }
    }
    let format = args.output.format();
    match format {
        Format::Json | Format::Yaml => {
            let mut all: Vec<Value> = groups.into_iter().flat_map(|(_, objects)| objects).collect();
            let single = named && targets.len() == 1;
            let value = match all.pop() {
                Some(object) if single => object,
                last => {
                    all.extend(last);
                    json!({"apiVersion": "v1", "kind": "List", "items": all})
                }
            };
            output::value(format, &value)?;
        }
        Format::Name => {
            for (kind, objects) in &groups {
                for object in objects {
                    output::line(objects::title(*kind, objects::at(object, "/metadata/name")));
                }
            }
        }
        Format::Table | Format::Wide if groups.is_empty() && !missing.is_empty() => {}
        Format::Table | Format::Wide => tables(args, &groups),
    }
    let codes: Vec<_> = missing.iter().map(Failure::report).collect();
    Ok(codes.first().copied().unwrap_or(ExitCode::SUCCESS))
}

fn tables(args: &Args, groups: &[(tombolo_config::Kind, Vec<Value>)]) {
    let several = groups.len() > 1;
    let filled: Vec<_> = groups.iter().filter(|(_, objects)| !objects.is_empty()).collect();
    if filled.is_empty() {
        let place = match args.namespaces.filter() {
            "" => String::new(),
            namespace => format!(" in {namespace} namespace"),
        };
        eprintln!("No resources found{place}.");
    }
    for (i, (kind, objects)) in filled.into_iter().enumerate() {
        if i > 0 {
            output::line("");
        }
        let wide = args.output.format() == Format::Wide;
        let text = objects::table(*kind, objects, args.namespaces.is_all(), wide, several).render();
        let skip = if args.no_headers {
            text.find('\n').map_or(0, |end| end + 1)
        } else {
            0
        };
        output::print(&text[skip..]);
    }
}

/// kubectl's equality selectors over `metadata.labels`.
fn selects(selector: &str, object: &Value) -> bool {
    let label = |key: &str| {
        object
            .pointer("/metadata/labels")
            .and_then(|labels| labels.get(key))
            .and_then(Value::as_str)
    };
    selector
        .split(',')
        .map(str::trim)
        .filter(|term| !term.is_empty())
        .all(|term| {
            if let Some((key, value)) = term.split_once("!=") {
                label(key) != Some(value)
            } else if let Some((key, value)) = term.split_once('=') {
                label(key) == Some(value.trim_start_matches('='))
            } else if let Some(key) = term.strip_prefix('!') {
                label(key).is_none()
            } else {
                label(term).is_some()
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors() {
        let object = json!({"metadata": {"labels": {"app": "catalog", "v": "1"}}});
        for (selector, expected) in [
            ("", true),
            ("app=catalog", true),
            ("app==catalog,v=1", true),
            ("app=catalog,v=2", false),
            ("app!=catalog", false),
            ("x!=y", true),
            ("app", true),
            ("!app", false),
            ("!x,app", true),
        ] {
            assert_eq!(selects(selector, &object), expected, "{selector}");
        }
    }
}
