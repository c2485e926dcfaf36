use crate::failure::Failure;
use serde_json::Value;
use std::{
    io::Read as _,
    path::{Path, PathBuf},
};
use tombolo_config::{Kind, Resource};

/// No more is read of standard input: what is larger is refused by its size.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// `-f FILE|DIR|-`, `-R`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Files {
    /// File, directory, or - for standard input; may be given several times.
    #[arg(short = 'f', long = "filename", value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Look into the directories below, too.
    #[arg(short = 'R', long)]
    pub(crate) recursive: bool,
}

impl Files {
    /// Reads and validates every object. An object without a namespace gets `namespace`; one with another is refused.
    pub(crate) fn read(&self, namespace: Option<&str>) -> Result<Vec<Resource>, Failure> {
        let mut resources = Vec::new();
        for file in &self.files {
            if file.as_os_str() == "-" {
                let mut text = String::new();
                let read = std::io::stdin().take(FILE_BYTES_MAX).read_to_string(&mut text);
                read.map_err(|error| Failure::plain(format!("standard input: {error}")))?;
                resources.extend(parse("standard input", &text, namespace)?);
                continue;
            }
            for path in self.expand(file)? {
                let name = path.display().to_string();
                let text = std::fs::read_to_string(&path)
                    .map_err(|error| Failure::plain(format!("{name}: {error}")))?;
                resources.extend(parse(&name, &text, namespace)?);
            }
        }
        if resources.is_empty() {
            return Err(Failure::plain("there is no object in what was given with -f"));
        }
        Ok(resources)
    }

    fn expand(&self, path: &Path) -> Result<Vec<PathBuf>, Failure> {
        if !path.is_dir() {
            return Ok(vec![path.to_owned()]);
        }
        let failed = |error: std::io::Error| Failure::plain(format!("{}: {error}", path.display()));
        let entries: Result<Vec<_>, _> = std::fs::read_dir(path)
            .map_err(failed)?
            .map(|e| e.map(|e| e.path()))
            .collect();
        let mut entries = entries.map_err(failed)?;
        entries.sort();
        let mut found = Vec::new();
        for entry in entries {
            let suffix = entry.extension().and_then(|s| s.to_str()).unwrap_or_default();
            if entry.is_dir() && self.recursive {
                found.extend(self.expand(&entry)?);
            } else if entry.is_file() && matches!(suffix, "yaml" | "yml" | "json") {
                found.push(entry);
            }
        }
        Ok(found)
    }
}

fn parse(file: &str, text: &str, namespace: Option<&str>) -> Result<Vec<Resource>, Failure> {
    let documents = tombolo_config::documents(text).map_err(|findings| Failure::findings(file, &findings))?;
    let (mut resources, mut findings) = (Vec::new(), Vec::new());
    for (number, document) in documents.into_iter().enumerate() {
        for mut object in items(document) {
            settle(&mut object, namespace).map_err(|text| Failure::plain(format!("{file}: {text}")))?;
            match Resource::from_json(&object) {
                Ok(resource) => resources.push(resource),
                Err(found) => findings.extend(found.into_iter().map(|mut finding| {
                    finding.document = number;
                    finding
                })),
            }
        }
    }
    if findings.is_empty() {
        Ok(resources)
    } else {
        Err(Failure::findings(file, &findings))
    }
}

/// The objects of a document: nothing, itself, or the items of a List.
fn items(mut document: Value) -> Vec<Value> {
    if document.is_null() {
        return Vec::new();
    }
    let is_list = document
        .get("kind")
        .and_then(Value::as_str)
        .is_some_and(|kind| kind.ends_with("List"));
    match document.get_mut("items").and_then(Value::as_array_mut) {
        Some(items) if is_list => std::mem::take(items),
        _ => vec![document],
    }
}

fn settle(object: &mut Value, namespace: Option<&str>) -> Result<(), String> {
    let Some(namespace) = namespace else { return Ok(()) };
    let kind = object.get("kind").and_then(Value::as_str);
    if kind.is_some_and(|kind| Kind::find(kind).is_ok_and(Kind::is_cluster_scoped)) {
        return Ok(());
    }
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else {
        return Ok(());
    };
    match metadata.get("namespace").and_then(Value::as_str) {
        None => {
            metadata.insert("namespace".to_owned(), namespace.into());
            Ok(())
        }
        Some(own) if own == namespace => Ok(()),
        Some(own) => {
            let name = metadata.get("name").and_then(Value::as_str).unwrap_or("?");
            Err(format!(
                "{name} says namespace {own}, the command line says {namespace}"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str =
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: NAME}\nspec: {}\n";

    fn policy(name: &str) -> String {
        POLICY.replace("NAME", name)
    }

    #[test]
    fn directories_streams_and_lists() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
        write("b.yaml", format!("{}---\n{}---\n", policy("b1"), policy("b2")));
        write("a.yml", policy("a"));
        write("notes.txt", "not: ours".into());
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "c", "namespace": "x"}, "spec": {}}
        ]});
        write("sub/c.json", list.to_string());
        let names = |recursive, namespace: Option<&str>| {
            let files = Files {
                files: vec![dir.path().to_owned()],
                recursive,
            };
            files.read(namespace).map(|all| {
                all.iter()
                    .map(|r| format!("{}/{}", r.namespace(), r.name()))
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(
            names(false, Some("shop")).unwrap(),
            ["shop/a", "shop/b1", "shop/b2"]
        );
        assert_eq!(
            names(true, None).unwrap(),
            ["default/a", "default/b1", "default/b2", "x/c"]
        );
        let Err(Failure::Plain { text, .. }) = names(true, Some("shop")) else {
            panic!("another namespace")
        };
        assert!(text.contains("c says namespace x"), "{text}");
    }

    #[test]
    fn findings_name_the_file() {
        let Err(failure) = parse("x.yaml", &policy("a").replace("spec:", "spce:"), None) else {
            panic!("taken")
        };
        let Failure::Problem(problem) = failure else {
            panic!("no code")
        };
        assert!(
            problem.cause.contains("x.yaml: ") && problem.cause.contains("spce"),
            "{problem}"
        );
        let Err(Failure::Problem(problem)) = parse("x.yaml", "a: 1\nb: [", None) else {
            panic!("no code")
        };
        assert!(
            problem.cause.starts_with("x.yaml: ") && problem.cause.contains("line 2"),
            "{problem}"
        );
    }
}
