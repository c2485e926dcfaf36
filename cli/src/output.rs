use crate::failure::Failure;
use serde_json::Value;
use std::{fmt::Write as _, io::Write as _, process};

/// How a read verb prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// `kind.group/name` lines.
    Name,
}

/// `-o FORMAT`, or `--json`.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Output {
    /// Output format.
    #[arg(
        short = 'o',
        long = "output",
        value_enum,
        value_name = "FORMAT",
        default_value = "table",
        conflicts_with = "json"
    )]
    format: Format,
    /// The same as -o json.
    #[arg(long)]
    json: bool,
}

impl Output {
    pub(crate) const fn format(self) -> Format {
        if self.json { Format::Json } else { self.format }
    }
}

/// Prints to stdout. A reader that went away (`| head`) ends the program quietly.
pub(crate) fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .is_err()
    {
        process::exit(0);
    }
}

/// Prints a line to stdout.
pub(crate) fn line(text: impl AsRef<str>) {
    print(&format!("{}\n", text.as_ref()));
}

/// Prints a value as JSON or YAML.
pub(crate) fn value(format: Format, value: &Value) -> Result<(), Failure> {
    print(&rendered(format, value)?);
    Ok(())
}

/// A value as JSON or YAML, with a line end.
pub(crate) fn rendered(format: Format, value: &Value) -> Result<String, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::plain(format!("cannot print this: {error}"));
    let mut text = if format == Format::Yaml {
        serde_saphyr::to_string(value).map_err(|error| failed(&error))?
    } else {
        serde_json::to_string_pretty(value).map_err(|error| failed(&error))?
    };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// Columns, aligned. Empty cells are `<none>`.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self {
            rows: vec![header.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        let cells = cells.into_iter().map(|cell| {
            if cell.is_empty() {
                "<none>".to_owned()
            } else {
                cell
            }
        });
        self.rows.push(cells.collect());
    }

    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, "{cell:<width$}   ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let mut table = Table::new(&["NAME", "AGE"]);
        table.row(vec!["a-long-name".into(), "3m".into()]);
        table.row(vec!["ü".into(), String::new()]);
        assert_eq!(
            table.render(),
            "NAME          AGE\na-long-name   3m\nü             <none>\n"
        );
    }

    #[test]
    fn yaml_reads_back() {
        let value = serde_json::json!({"a": {"b": ["1", 1, true, "true", "x: y"]}, "n": null, "e": {}});
        let text = rendered(Format::Yaml, &value).unwrap();
        let back: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(back, value, "{text}");
    }
}
