//! Untyped values to typed ones, strictly: every unknown field and bad value with its path and the nearest name.

use crate::{Diagnostic, nearest, strict::Strict};
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::Segment;

/// Findings after which the rest is not looked for.
const FINDINGS_MAX: usize = 20;

/// Reads `value` into `T`. A refused field is taken out and the rest read again, so that one run names every slip.
///
/// # Errors
/// With the findings in the order in which they were met; paths are relative to `value`.
pub(crate) fn typed<T: DeserializeOwned>(mut value: Value) -> Result<T, Vec<Diagnostic>> {
    let (mut findings, mut removed): (Vec<Diagnostic>, Vec<String>) = (Vec::new(), Vec::new());
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(Strict(&value)) {
            Ok(typed) if findings.is_empty() => return Ok(typed),
            Ok(_) => return Err(findings),
            Err(error) => error,
        };
        let segments: Vec<Segment> = error.path().iter().cloned().collect();
        let finding = describe(&path_text(&segments), &error.inner().to_string());
        // Missing only because its bad value was taken out just now.
        if removed.contains(&finding.path) {
            return Err(findings);
        }
        findings.push(finding);
        match remove(&mut value, &segments) {
            Some(path) if findings.len() < FINDINGS_MAX => removed.push(path),
            _ => return Err(findings),
        }
    }
}

/// `spec.ports[0].protocol`; a key that is no plain word is quoted.
fn path_text(segments: &[Segment]) -> String {
    let mut text = String::new();
    for segment in segments {
        match segment {
            Segment::Seq { index } => text.push_str(&format!("[{index}]")),
            Segment::Map { key } => push_key(&mut text, key),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    text
}

/// Appends a key to a path.
pub(crate) fn push_key(path: &mut String, key: &str) {
    if key.is_empty() || key.contains(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-')) {
        path.push_str(&format!("[{:?}]", shorten(key)));
    } else {
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(&shorten(key));
    }
}

/// Joins two paths.
pub(crate) fn join(parent: &str, child: &str) -> String {
    match (parent.is_empty(), child.is_empty()) {
        (true, _) => child.to_owned(),
        (_, true) => parent.to_owned(),
        _ if child.starts_with('[') => format!("{parent}{child}"),
        _ => format!("{parent}.{child}"),
    }
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= 64 {
        text.to_owned()
    } else {
        text.chars().take(64).chain(['…']).collect()
    }
}

/// Takes out what the error is about, or the list it stands in, since the places behind it would move. Gives its path.
fn remove(value: &mut Value, segments: &[Segment]) -> Option<String> {
    let end = segments
        .iter()
        .rposition(|segment| matches!(segment, Segment::Map { .. }))?;
    let (parents, last) = (&segments[..end], &segments[end]);
    let mut place = value;
    for segment in parents {
        place = match segment {
            Segment::Seq { index } => place.get_mut(index)?,
            Segment::Map { key } => place.get_mut(key)?,
            Segment::Enum { .. } | Segment::Unknown => return None,
        };
    }
    let Segment::Map { key } = last else { return None };
    place.as_object_mut()?.remove(key)?;
    Some(path_text(&segments[..=end]))
}

/// Turns serde's message into ours.
fn describe(path: &str, message: &str) -> Diagnostic {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if message.starts_with("missing field ") {
        let field = quoted.first().copied().unwrap_or_default();
        return Diagnostic::error(join(path, field), "is required");
    }
    for (start, what) in [("unknown field ", "field"), ("unknown variant ", "value")] {
        if !message.starts_with(start) {
            continue;
        }
        let Some((word, known)) = quoted.split_first() else {
            break;
        };
        let nearest = nearest(word, known.iter().copied());
        let shown = if what == "value" {
            format!(" {:?}", shorten(word))
        } else {
            String::new()
        };
        let reason = match (&nearest, known.is_empty()) {
            (Some(_), _) => format!("unknown {what}{shown}"),
            (None, true) => format!("unknown {what}{shown}; there are none"),
            (None, false) => format!("unknown {what}{shown}; known are {}", known.join(", ")),
        };
        return Diagnostic::error(path, reason).with_nearest(nearest);
    }
    for start in ["invalid type: ", "invalid value: "] {
        let found = message
            .strip_prefix(start)
            .and_then(|rest| rest.rsplit_once(", expected "));
        if let Some((found, expected)) = found {
            return Diagnostic::error(
                path,
                format!("must be {}, not {}", expected_text(expected), found_text(found)),
            );
        }
    }
    Diagnostic::error(path, shorten_reason(message))
}

/// Text of a library, which may repeat what it was given.
pub(crate) fn shorten_reason(text: &str) -> String {
    if text.len() <= 300 {
        text.to_owned()
    } else {
        text.chars().take(300).chain(['…']).collect()
    }
}

fn expected_text(expected: &str) -> &str {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number from 0 that fits",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number that fits",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "a mapping",
        _ if expected.starts_with("struct ") => "a mapping",
        other => other,
    }
}

fn found_text(found: &str) -> String {
    let found = match found {
        "null" | "unit value" => "null",
        "map" => "a mapping",
        "sequence" => "a list",
        other => other,
    };
    match found.split_once(' ') {
        Some(("string", text)) => format!("the text {}", shorten(text)),
        Some(("integer" | "boolean", value)) => value.trim_matches('`').to_owned(),
        _ => match found.strip_prefix("floating point ") {
            Some(value) => value.trim_matches('`').to_owned(),
            None => found.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeMap;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "camelCase")]
    #[allow(dead_code, reason = "only read into")]
    struct Outer {
        name: String,
        #[serde(default)]
        inner_list: Vec<Inner>,
        #[serde(default)]
        labels: BTreeMap<String, String>,
        #[serde(default)]
        mode: Mode,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only read into")]
    struct Inner {
        number: u16,
        #[serde(default)]
        on: bool,
    }

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(rename_all = "UPPERCASE")]
    enum Mode {
        #[default]
        Strict,
        Permissive,
    }

    fn check(value: Value, expected: &[&str]) {
        let found: Vec<String> = match typed::<Outer>(value) {
            Ok(_) => vec![],
            Err(findings) => findings.iter().map(ToString::to_string).collect(),
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn every_slip_has_path_reason_and_nearest() {
        check(
            json!({"name": "a", "innerList": [{"number": 1}], "mode": "STRICT"}),
            &[],
        );
        check(
            json!({"nam": "a", "name": "b"}),
            &["nam: unknown field; did you mean name?"],
        );
        check(
            json!({"name": "b", "xyz": 1}),
            &["xyz: unknown field; known are name, innerList, labels, mode"],
        );
        check(json!({}), &["name: is required"]);
        check(json!({"name": 1}), &["name: must be a string, not 1"]);
        check(
            json!({"name": "a", "innerList": [{"number": 1}, {"number": "80"}]}),
            &["innerList[1].number: must be a whole number from 0 that fits, not the text \"80\""],
        );
        check(
            json!({"name": "a", "innerList": [{"number": 70_000}]}),
            &["innerList[0].number: must be a whole number from 0 that fits, not 70000"],
        );
        check(
            json!({"name": "a", "innerList": [{"number": 80.5}]}),
            &["innerList[0].number: must be a whole number from 0 that fits, not 80.5"],
        );
        check(
            json!({"name": "a", "innerList": {}}),
            &["innerList: must be a list, not a mapping"],
        );
        check(
            json!({"name": "a", "innerList": ["x"]}),
            &["innerList[0]: must be a mapping, not the text \"x\""],
        );
        check(
            json!({"name": "a", "labels": {"app.kubernetes.io/name": 1}}),
            &["labels[\"app.kubernetes.io/name\"]: must be a string, not 1"],
        );
        check(
            json!({"name": "a", "mode": "STRIKT"}),
            &["mode: unknown value \"STRIKT\"; did you mean STRICT?"],
        );
        check(
            json!({"name": "a", "mode": "X"}),
            &["mode: unknown value \"X\"; known are STRICT, PERMISSIVE"],
        );
        check(
            json!({"name": "a", "mode": 3}),
            &["mode: must be string or map, not 3"],
        );
        check(json!([]), &["must be a mapping, not a list"]);
    }

    #[test]
    fn one_run_names_every_slip() {
        check(
            json!({"name": 1, "innerlist": [], "innerList": [{"number": 1, "onn": true, "of": 1}], "mode": "x"}),
            &[
                "innerList[0].of: unknown field; known are number, on",
                "innerList[0].onn: unknown field; did you mean on?",
                "innerlist: unknown field; did you mean innerList?",
                "mode: unknown value \"x\"; known are STRICT, PERMISSIVE",
                "name: must be a string, not 1",
            ],
        );
        let many: serde_json::Map<String, Value> = (0..100).map(|i| (format!("f{i}"), json!(1))).collect();
        assert_eq!(
            typed::<Outer>(Value::Object(many)).unwrap_err().len(),
            FINDINGS_MAX
        );
    }
}
