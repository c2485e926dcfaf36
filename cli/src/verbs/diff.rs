use super::Namespace;
use crate::{
    failure::{self, Failure},
    files::Files,
    objects,
    output::{self, Format},
    sockets::Sockets,
};
use serde_json::Value;
use std::{fmt::Write as _, process::ExitCode};
use tombolo_types::Code;

/// Show what `apply` would change, as a unified diff. Exits with 1 if anything would.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    namespace: Namespace,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let resources = args.files.read(args.namespace.given())?;
    let mut admin = sockets.admin().await?;
    // The server's own idea of the result: defaults and kept fields included.
    let applied = objects::apply(&mut admin, &resources, true, false).await?;
    let mut different = false;
    for (resource, applied) in resources.iter().zip(&applied) {
        let live =
            match objects::get(&mut admin, resource.kind(), resource.namespace(), resource.name()).await {
                Ok(object) => yaml(object)?,
                Err(failure) if failure.code() == Some(Code::NotFound) => String::new(),
                Err(failure) => return Err(failure),
            };
        let merged = match &applied.object {
            Some(object) => yaml(objects::json(object)?)?,
            None => yaml(resource.to_json())?,
        };
        let title = format!(
            "{}/{}",
            resource.namespace(),
            objects::title(resource.kind(), resource.name())
        );
        let text = unified(&title, &live, &merged);
        different |= !text.is_empty();
        output::print(&text);
    }
    Ok(ExitCode::from(if different {
        failure::ERROR
    } else {
        failure::OK
    }))
}

/// Without what the server writes.
fn yaml(mut object: Value) -> Result<String, Failure> {
    if let Some(fields) = object.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in ["uid", "resourceVersion", "generation", "creationTimestamp"] {
            metadata.remove(field);
        }
    }
    output::rendered(Format::Yaml, &object)
}

/// Lines around a change.
const CONTEXT: usize = 3;

/// A unified diff; empty if the texts are equal. Objects are short: the table of the longest common subsequence is
/// quadratic in lines.
fn unified(title: &str, old: &str, new: &str) -> String {
    let (a, b): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let mut lengths = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            lengths[i][j] = if a[i] == b[j] {
                lengths[i + 1][j + 1] + 1
            } else {
                lengths[i + 1][j].max(lengths[i][j + 1])
            };
        }
    }
    // (mark, line, lines of old and of new before it)
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i] == b[j] {
            lines.push((' ', a[i], i, j));
            (i, j) = (i + 1, j + 1);
        } else if j == b.len() || (i < a.len() && lengths[i + 1][j] >= lengths[i][j + 1]) {
            lines.push(('-', a[i], i, j));
            i += 1;
        } else {
            lines.push(('+', b[j], i, j));
            j += 1;
        }
    }
    let changed: Vec<_> = (0..lines.len()).filter(|&at| lines[at].0 != ' ').collect();
    let Some(&first) = changed.first() else {
        return String::new();
    };
    let mut hunks = vec![(first, first)];
    for &at in &changed {
        match hunks.last_mut() {
            Some(hunk) if at <= hunk.1 + 2 * CONTEXT => hunk.1 = at,
            _ => hunks.push((at, at)),
        }
    }
    let (from, to) = if old.is_empty() {
        ("/dev/null", title)
    } else {
        (title, title)
    };
    let mut text = format!("--- {from}\n+++ {to}\n");
    for (first, last) in hunks {
        let shown = &lines[first.saturating_sub(CONTEXT)..(last + CONTEXT + 1).min(lines.len())];
        let count = |skip| shown.iter().filter(|line| line.0 != skip).count();
        let start = |before: usize, count: usize| if count == 0 { before } else { before + 1 };
        let (olds, news) = (count('+'), count('-'));
        let _ = writeln!(
            text,
            "@@ -{},{olds} +{},{news} @@",
            start(shown[0].2, olds),
            start(shown[0].3, news)
        );
        for (mark, line, ..) in shown {
            let _ = writeln!(text, "{mark}{line}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unified_diff() {
        assert_eq!(unified("t", "a\nb\n", "a\nb\n"), "");
        assert_eq!(
            unified("t", "", "a\nb\n"),
            "--- /dev/null\n+++ t\n@@ -0,0 +1,2 @@\n+a\n+b\n"
        );
        let old = "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n";
        let new = old.replace("2\n3", "2\nthree").replace("11\n", "");
        assert_eq!(
            unified("t", old, &new),
            "--- t\n+++ t\n@@ -1,6 +1,6 @@\n 1\n 2\n-3\n+three\n 4\n 5\n 6\n@@ -8,5 +8,4 @@\n 8\n 9\n 10\n-11\n 12\n"
        );
    }

    #[test]
    fn what_the_server_writes_is_no_difference() {
        let object = |uid: &str, status: &str| serde_json::json!({"kind": "X", "metadata": {"name": "a", "uid": uid, "resourceVersion": uid}, "spec": {}, "status": {"s": status}});
        assert_eq!(yaml(object("1", "a")).unwrap(), yaml(object("2", "b")).unwrap());
    }
}
