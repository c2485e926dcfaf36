use crate::{
    failure::Failure,
    output::{self, Format, Output},
    sockets::Sockets,
    text,
};
use serde_json::{Value, json};
use std::{process::ExitCode, time::Duration};
use tombolo_control_client::host;
use tombolo_proto::tombolo::admin::v1::AuditRequest;

/// Who did what, when, from where; newest last.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only entries younger than this.
    #[arg(long, value_name = "DURATION", value_parser = text::duration)]
    since: Option<Duration>,
    /// At most so many, the newest.
    #[arg(long, value_name = "N", default_value = "1000")]
    limit: u32,
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let back = args
        .since
        .map(|since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX));
    let request = AuditRequest {
        since_unix_ms: back.map_or(0, |back| host::now_unix_ms().saturating_sub(back)),
        limit: args.limit,
    };
    let lines = sockets.admin().await?.audit(request).await?.into_inner().lines;
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let entries: Vec<Value> = lines
                .iter()
                .map(|line| serde_json::from_str(line).unwrap_or(json!(line)))
                .collect();
            output::value(format, &Value::Array(entries))?;
        }
        Format::Table | Format::Wide | Format::Name => {
            lines.iter().for_each(|line| output::line(shown(line)))
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An entry on one line: the time, then every field that says something.
fn shown(line: &str) -> String {
    let Ok(Value::Object(mut fields)) = serde_json::from_str::<Value>(line) else {
        return line.to_owned();
    };
    let plain = |value: &Value| match value {
        Value::String(text) if text.chars().any(|c| c.is_whitespace() || c.is_control()) => {
            format!("{text:?}")
        }
        Value::String(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    };
    let mut words: Vec<String> = fields.remove("time").iter().map(plain).collect();
    let says = |value: &Value| !matches!(value, Value::Null) && value.as_str() != Some("");
    words.extend(
        fields
            .iter()
            .filter(|(_, value)| says(value))
            .map(|(key, value)| format!("{key}={}", plain(value))),
    );
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_each() {
        let line = r#"{"time":"2026-01-01T00:00:00Z","who":"uid 0","verb":"enroll","result":"TMB0103 spent\nnext","after":"","n":1}"#;
        let text = shown(line);
        assert!(
            text.starts_with("2026-01-01T00:00:00Z ")
                && text.contains("who=\"uid 0\"")
                && text.contains("TMB0103")
        );
        assert!(!text.contains('\n') && !text.contains("after"), "{text}");
        assert_eq!(shown("not json"), "not json");
    }
}
