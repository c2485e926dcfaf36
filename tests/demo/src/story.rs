//! How the demo tells its story: numbered steps, the commands that were typed, results with their time, a table.

use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};
use tombolo_testkit::{Host, Output};

/// A measured claim.
struct Row {
    step: u32,
    what: String,
    value: String,
    /// None: it holds, and there is nothing to measure.
    took: Option<Duration>,
}

/// The story so far.
pub(crate) struct Story {
    begun: Instant,
    pause: bool,
    rows: Vec<Row>,
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

    /// Leaves out the steps before this one, so that each has one number whatever is played.
    pub(crate) fn next_is(&mut self, step: u32) {
        self.step = step - 1;
    }

    /// Says something.
    pub(crate) fn say(&self, text: &str) {
        println!("   {text}");
    }

    /// Runs a line on a host as a person would type it and shows what it printed. The output has both in its `stdout`, in
    /// the order in which they came.
    pub(crate) fn type_on(&self, host: &Host, line: &str) -> Result<(Output, Duration)> {
        self.run(host, line, "exec 2>&1\n")
    }

    fn run(&self, host: &Host, line: &str, before: &str) -> Result<(Output, Duration)> {
        let begun = Instant::now();
        let output = host.sh(&format!("{before}{line}"))?;
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
        Ok((succeeded(host, line, output)?, took))
    }

    /// As [`Self::must`] for a line that makes a token or an invite, which is returned.
    pub(crate) fn secret(&self, host: &Host, line: &str) -> Result<String> {
        let (output, _) = self.run(host, line, "")?;
        Ok(succeeded(host, line, output)?.trim().to_owned())
    }

    /// A row of the table at the end.
    pub(crate) fn result(&mut self, what: &str, value: impl Into<String>, took: Duration) {
        self.row(what, value.into(), Some(took));
    }

    /// As [`Self::result`] where there is no time to tell.
    pub(crate) fn holds(&mut self, what: &str, value: impl Into<String>) {
        self.row(what, value.into(), None);
    }

    fn row(&mut self, what: &str, value: String, took: Option<Duration>) {
        let timed = took.map(|took| format!(" ({})", time(took)));
        println!("   => {what}: {value}{}", timed.unwrap_or_default());
        self.rows.push(Row {
            step: self.step,
            what: what.to_owned(),
            value,
            took,
        });
    }

    /// Ends it with the table.
    pub(crate) fn end(&self) {
        let longest = |of: fn(&Row) -> &str| {
            let all = self.rows.iter().map(|row| of(row).chars().count());
            all.max().unwrap_or(0)
        };
        let (width, middle) = (longest(|row| &row.what), longest(|row| &row.value));
        println!("\nResults");
        for row in &self.rows {
            let took = row.took.map(time).unwrap_or_default();
            println!(
                "  {:2}  {:width$}  {:middle$}  {took}",
                row.step, row.what, row.value
            );
        }
        let all = time(self.begun.elapsed());
        println!("      {:width$}  {:middle$}  {all}", "the whole story", "");
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }
}

fn succeeded(host: &Host, line: &str, output: Output) -> Result<String> {
    let done = output.checked();
    Ok(done
        .with_context(|| format!("on {}: {line}", host.name()))?
        .stdout)
}

/// What matters here of a line of the access log.
pub(crate) fn logged(line: &str) -> String {
    let wanted = [
        "connection",
        "complete",
        "direction=",
        "src_identity=",
        "dst_service=",
        "bytes_",
    ];
    let words = line
        .split(' ')
        .filter(|word| wanted.iter().any(|start| word.starts_with(start)));
    words.collect::<Vec<_>>().join(" ")
}

/// Tokens and invites are secrets and long: only their beginning is shown.
fn shorten(line: &str) -> String {
    let Some(start) = ["tmb1_", "tmi1_"].iter().find_map(|prefix| line.find(prefix)) else {
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
