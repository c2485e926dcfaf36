//! YAML and JSON text to untyped values, bounded in size, depth and expansion.

use crate::Diagnostic;
use serde_json::Value;
use std::borrow::Cow;

/// Bytes of one input: Kubernetes allows 1.5 MiB per object; four times that is a large manifest.
pub(crate) const INPUT_BYTES_MAX: usize = 4 << 20;
/// Levels of nesting; the deepest Istio schema has 12.
const DEPTH_MAX: usize = 64;
/// Documents of one input.
const DOCUMENTS_MAX: usize = 10_000;
/// Values that anchors may add to a document by being repeated.
const REPLAYED_EVENTS_MAX: usize = 100_000;
/// Values of a document.
const NODES_MAX: usize = 250_000;

/// Reads a stream of YAML or JSON documents, untyped; empty ones are left out. Bounded: 4 MiB, 10,000 documents.
///
/// # Errors
/// With one finding per unreadable document.
pub fn documents(text: &str) -> Result<Vec<Value>, Vec<Diagnostic>> {
    if text.len() > INPUT_BYTES_MAX {
        let reason = format!(
            "{} bytes are too much; at most {INPUT_BYTES_MAX} are read at once",
            text.len()
        );
        return Err(vec![Diagnostic::error("", reason)]);
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (mut values, mut refused) = (Vec::new(), Vec::new());
    for (number, chunk) in split(text).into_iter().enumerate() {
        if number == DOCUMENTS_MAX {
            refused.push(Diagnostic::error(
                "",
                format!("more than {DOCUMENTS_MAX} documents"),
            ));
            break;
        }
        match serde_saphyr::from_str_with_options::<Value>(&chunk.text, options()) {
            Ok(value) => values.push(value),
            // JSON has escapes that YAML has not; but it would let a repeated key pass.
            Err(error) if !is_duplicate(&error) && looks_like_json(&chunk.text) => {
                match serde_json::from_str(&chunk.text) {
                    Ok(value) => values.push(value),
                    Err(error) => refused.push(Diagnostic::error("", error.to_string()).of(number, "")),
                }
            }
            Err(error) => refused.push(Diagnostic::error("", describe(&error, chunk.line)).of(number, "")),
        }
    }
    if refused.is_empty() {
        Ok(values)
    } else {
        Err(refused)
    }
}

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH_MAX,
            max_documents: 1,
            max_nodes: NODES_MAX,
            max_total_scalar_bytes: INPUT_BYTES_MAX,
            max_recorded_anchor_bytes: INPUT_BYTES_MAX,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: REPLAYED_EVENTS_MAX },
        // `yes` and `on` are words, as in YAML 1.2.
        strict_booleans: true,
        with_snippet: false,
    }
}

fn looks_like_json(text: &str) -> bool {
    text.trim_start().starts_with('{')
}

fn is_duplicate(error: &serde_saphyr::Error) -> bool {
    error.to_string().to_ascii_lowercase().contains("duplicate")
}

fn describe(error: &serde_saphyr::Error, first_line: usize) -> String {
    let text = crate::typed::shorten_reason(&error.to_string());
    match error.location() {
        // The parser numbers lines within the document; people look at the file.
        Some(place) if place.line() > 0 => {
            let found = format!(" at line {}, column {}", place.line(), place.column());
            let text = text.replace(&found, "");
            format!(
                "line {}, column {}: {text}",
                first_line + place.line() as usize,
                place.column()
            )
        }
        _ => text,
    }
}

struct Chunk<'a> {
    text: Cow<'a, str>,
    /// Lines of the stream before it.
    line: usize,
}

/// Splits at document markers, which YAML allows at the start of a line only, so that one unreadable document does not
/// hide the findings of the others. Documents of blank lines and comments alone are left out.
fn split(text: &str) -> Vec<Chunk<'_>> {
    let mut chunks: Vec<Chunk<'_>> = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 0, 0);
    let mut take = |from: usize, to: usize, line: usize| {
        let text = &text[from..to];
        if text.lines().any(has_content) {
            chunks.push(Chunk {
                text: Cow::Borrowed(text),
                line,
            });
        }
    };
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let word = line.trim_end_matches(['\n', '\r']);
        let marker = |mark: &str| {
            word.strip_prefix(mark)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
        };
        if marker("---") {
            take(start, offset, start_line);
            // What stands behind the marker on its line belongs to the document.
            (start, start_line) = (offset, number);
        } else if marker("...") {
            take(start, offset, start_line);
            (start, start_line) = (offset + line.len(), number + 1);
        }
        offset += line.len();
    }
    take(start, text.len(), start_line);
    chunks
}

/// False for blank lines, comments, directives and bare document markers.
fn has_content(line: &str) -> bool {
    let line = line.strip_prefix("---").unwrap_or(line).trim();
    !(line.is_empty() || line.starts_with('#') || line.starts_with("%YAML"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> Vec<Value> {
        documents(text).unwrap()
    }

    fn reason(text: &str) -> String {
        documents(text)
            .unwrap_err()
            .into_iter()
            .map(|d| d.to_string())
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn streams_are_split() {
        for (text, values) in [
            ("", vec![]),
            ("---\n# nothing\n---\n", vec![]),
            ("a: 1", vec![json!({"a": 1})]),
            ("%YAML 1.2\n---\na: 1\n...\n", vec![json!({"a": 1})]),
            (
                "a: 1\n---\nb: x\n--- # third\nc: [1]\n",
                vec![json!({"a": 1}), json!({"b": "x"}), json!({"c": [1]})],
            ),
            ("--- {a: 1}\n--- {a: 2}", vec![json!({"a": 1}), json!({"a": 2})]),
            (
                "a: |\n  text\n  ---\n  more\n",
                vec![json!({"a": "text\n---\nmore\n"})],
            ),
            (
                "\u{feff}a: 1\r\n---\r\nb: 2\r\n",
                vec![json!({"a": 1}), json!({"b": 2})],
            ),
            (
                "{\"a\": \"\\u00e9\", \"b\":\t[1]}",
                vec![json!({"a": "é", "b": [1]})],
            ),
            ("{\"a\": \"\\ud83d\\ude00\\/\"}", vec![json!({"a": "😀/"})]),
        ] {
            assert_eq!(read(text), values, "{text:?}");
        }
    }

    #[test]
    fn scalars_are_those_of_yaml_1_2() {
        assert_eq!(
            read(
                "{a: yes, b: on, c: true, d: '80', e: 80, f: 1.5, g: ~, h: 0x10, i: 1_000, 8080: {j: null}}"
            ),
            [
                json!({"a": "yes", "b": "on", "c": true, "d": "80", "e": 80, "f": 1.5, "g": null, "h": 16, "i": 1000,
                "8080": {"j": null}})
            ]
        );
    }

    #[test]
    fn findings_name_the_line_in_the_stream_and_do_not_hide_each_other() {
        let text = reason("a: 1\n---\nb: [1\n---\nc: 1\nc: 2\n");
        assert!(text.contains("document 2: line "), "{text}");
        assert!(text.contains("document 3: line 6, column 1: "), "{text}");
        assert!(text.to_lowercase().contains("duplicate"), "{text}");
        assert!(
            reason("{\"a\": 1, \"a\": 2}")
                .to_lowercase()
                .contains("duplicate")
        );
    }

    #[test]
    fn bombs_are_refused() {
        let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let row = vec![format!("*a{}", level - 1); 10].join(", ");
            laughs.push_str(&format!("a{level}: &a{level} [{row}]\n"));
        }
        assert!(!reason(&laughs).is_empty());
        assert!(!reason(&format!("{}{}", "[".repeat(2000), "]".repeat(2000))).is_empty());
        assert!(!reason(&format!("{}{}", "{\"a\":".repeat(2000), "}".repeat(2000))).is_empty());
        assert!(reason(&" ".repeat(INPUT_BYTES_MAX + 1)).contains("too much"));
        let deep: String = (0..200)
            .map(|level| format!("{}a:\n", " ".repeat(level)))
            .collect();
        assert!(!reason(&deep).is_empty());
    }

    #[test]
    fn anchors_and_merge_keys_work_within_bounds() {
        assert_eq!(
            read("base: &b {x: 1}\nuse: *b\nmore: {<<: *b, y: 2}"),
            [json!({"base": {"x": 1}, "use": {"x": 1}, "more": {"x": 1, "y": 2}})]
        );
    }
}
