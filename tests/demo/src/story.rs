//! How the demo tells its story: numbered steps, the commands that were typed, results with their time, a table.

use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};
use tombolo_testkit::{Host, Output};

/// The story so far.
pub(crate) struct Story {
    begun: Instant,
    pause: bool,
    rows: Vec<(String, String, Duration)>,
    step: u32,
}

impl Story {
    pub(crate) fn new(pause: bool) -> Self {
        Self {
            begun: Instant::now(),
            pause,
            rows: Vec::new(),
            step: 0,
        }
    }

    /// Opens a step.
    pub(crate) fn step(&mut self, title: &str) {
        if self.pause && self.step > 0 {
            println!("\n-- press Enter --");
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        self.step += 1;
        println!("\n{}. {title}", self.step);
    }

    /// Says something.
    pub(crate) fn say(&self, text: &str) {
        println!("   {text}");
    }

    /// Runs a line on a host as a person would type it and shows what it printed.
    pub(crate) fn type_on(&self, host: &Host, line: &str) -> Result<(Output, Duration)> {
        let begun = Instant::now();
        let output = host.sh(line)?;
        let took = begun.elapsed();
        println!("   {}$ {}", host.name(), shorten(line));
        for text in output.text().trim_end().lines().take(12) {
            println!("     {}", shorten(text));
        }
        println!("     ({})", time(took));
        Ok((output, took))
    }

    /// As [`Self::type_on`] for a line that must succeed.
    pub(crate) fn must(&self, host: &Host, line: &str) -> Result<(String, Duration)> {
        let (output, took) = self.type_on(host, line)?;
        let stdout = output
            .checked()
            .with_context(|| format!("on {}: {line}", host.name()))?
            .stdout;
        Ok((stdout, took))
    }

    /// A row of the table at the end.
    pub(crate) fn result(&mut self, what: &str, value: impl Into<String>, took: Duration) {
        let value = value.into();
        println!("   => {what}: {value} ({})", time(took));
        self.rows.push((what.to_owned(), value, took));
    }

    /// Ends it with the table.
    pub(crate) fn end(&self) {
        let width = self
            .rows
            .iter()
            .map(|row| row.0.chars().count())
            .max()
            .unwrap_or(0);
        let middle = self
            .rows
            .iter()
            .map(|row| row.1.chars().count())
            .max()
            .unwrap_or(0);
        println!("\nResults");
        for (what, value, took) in &self.rows {
            println!("  {what:width$}  {value:middle$}  {}", time(*took));
        }
        println!(
            "  {:width$}  {:middle$}  {}",
            "the whole story",
            "",
            time(self.begun.elapsed())
        );
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }
}

/// Tokens are secrets and long: only their beginning is shown.
fn shorten(line: &str) -> String {
    let Some(start) = line.find("tmb1_") else {
        return line.chars().take(160).collect();
    };
    let end = line[start..]
        .find(|c: char| c.is_whitespace())
        .map_or(line.len(), |n| start + n);
    format!("{}…{}", &line[..(start + 12).min(end)], &line[end..])
}

pub(crate) fn time(took: Duration) -> String {
    if took < Duration::from_millis(100) {
        format!("{} ms", took.as_millis())
    } else {
        format!("{:.2} s", took.as_secs_f64())
    }
}
