//! Typed configuration files of the programs: one YAML document, unknown keys refused.

use crate::{Diagnostic, typed, yaml};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::{io, path::Path};
use tombolo_types::Code;

/// Reads one document into `T`, which should refuse unknown fields (`#[serde(deny_unknown_fields)]`). An empty file is
/// an empty mapping.
///
/// ```
/// #[derive(serde::Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Agent { drain_seconds: u32 }
/// let findings = tombolo_config::file::read::<Agent>("drain_second: 5").err().unwrap();
/// assert_eq!(findings[0].to_string(), "drain_second: unknown field; did you mean drain_seconds?");
/// ```
///
/// # Errors
/// With every unknown key and bad value, its path, and the nearest known name.
pub fn read<T: DeserializeOwned>(text: &str) -> Result<T, Vec<Diagnostic>> {
    let mut documents = yaml::documents(text)?.into_iter();
    let document = match documents.next() {
        None | Some(Value::Null) => Value::Object(Map::new()),
        Some(document) => document,
    };
    if documents.next().is_some() {
        return Err(vec![
            Diagnostic::error("", "one document is expected; take out what follows `---`").of(1, ""),
        ]);
    }
    typed::typed(document)
}

/// The text of a program's file, from what reading `path` has given: one that is not there is an empty one.
///
/// # Errors
/// With a coded message when it could not be read.
pub fn text(path: &Path, read: io::Result<String>) -> Result<String, String> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|error| Code::ConfigInvalid.message(format!("{}: {error}", path.display()))),
    }
}

/// As [`read`], for a program's file at `path`.
///
/// # Errors
/// With one coded message of every finding.
pub fn settings<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, String> {
    read(text).map_err(|findings| {
        let lines: Vec<_> = findings
            .iter()
            .map(|finding| format!("{}: {finding}", path.display()))
            .collect();
        Code::ConfigInvalid.message(lines.join("; "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Settings {
        port: u16,
        names: Vec<String>,
    }

    impl Default for Settings {
        fn default() -> Self {
            Self {
                port: 15008,
                names: vec![],
            }
        }
    }

    #[test]
    fn files() {
        assert_eq!(read::<Settings>(""), Ok(Settings::default()));
        assert_eq!(read::<Settings>("# only a comment\n"), Ok(Settings::default()));
        assert_eq!(
            read::<Settings>("port: 1\nnames: [a]"),
            Ok(Settings {
                port: 1,
                names: vec!["a".into()]
            })
        );
        assert_eq!(
            read::<Settings>("prot: 1\nnames: a")
                .unwrap_err()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>(),
            [
                "names: must be a list, not the text \"a\"",
                "prot: unknown field; did you mean port?"
            ]
        );
        assert!(read::<Settings>("port: 1\n---\nport: 2").is_err());
        assert!(read::<Settings>("- 1").is_err());
    }
}
