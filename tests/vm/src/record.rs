use anyhow::{Context as _, Result};
use std::{path::PathBuf, process::Command};

/// What a run of the suite saw, as a section of `RESULTS.md`, which is committed.
#[derive(Debug)]
pub struct Record {
    section: String,
    rows: Vec<(String, String)>,
}

impl Record {
    /// An empty one.
    pub fn new(section: &str) -> Self {
        Self {
            section: section.to_owned(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, and prints it.
    #[allow(clippy::print_stdout, reason = "a run that takes minutes shows where it is")]
    pub fn add(&mut self, what: &str, seen: impl std::fmt::Display) {
        println!("{what}: {seen}");
        self.rows.push((what.to_owned(), seen.to_string()));
    }

    /// Replaces the section in the file that `TOMBOLO_VM_RESULTS` names. Without it, or after a failure, the file stays.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn write(&self) -> Result<()> {
        let Some(path) = std::env::var_os("TOMBOLO_VM_RESULTS").map(PathBuf::from) else {
            return Ok(());
        };
        let said = |program: &str, args: &[&str]| -> Result<String> {
            let text = crate::output(Command::new(program).args(args))?;
            Ok(text.trim().to_owned())
        };
        let root = tombolo_packages::workspace().display().to_string();
        let commit = said(
            "git",
            &[
                "-c",
                "safe.directory=*",
                "-C",
                &root,
                "rev-parse",
                "--short",
                "HEAD",
            ],
        )?;
        let date = said("date", &["-u", "+%Y-%m-%d %H:%M UTC"])?;
        let agent = tombolo_testkit::binaries().join("tombolo-agent");
        let built = said(
            "date",
            &["-u", "+%Y-%m-%d %H:%M UTC", "-r", &agent.display().to_string()],
        )?;
        let mut section = format!(
            "## {}\n{date}, commit {commit}, programs built {built}.\n\n| what | seen |\n|---|---|\n",
            self.section
        );
        for (what, seen) in &self.rows {
            let seen = seen.replace('|', "\\|").replace('\n', "<br>");
            section.push_str(&format!("| {what} | {seen} |\n"));
        }
        let old = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        std::fs::write(&path, replace(&old, &self.section, &section))?;
        Ok(())
    }
}

/// The text with one section, from its heading to the next one, replaced or added.
fn replace(text: &str, heading: &str, section: &str) -> String {
    let title = format!("## {heading}\n");
    let Some(start) = text.find(&title) else {
        return format!("{}\n\n{section}", text.trim_end());
    };
    let end = text[start + 1..].find("\n## ").map(|at| start + 1 + at + 1);
    let (before, after) = (&text[..start], end.map_or("", |end| &text[end..]));
    let gap = if after.is_empty() { "" } else { "\n" };
    format!("{before}{section}{gap}{after}")
}

#[cfg(test)]
mod tests {
    use super::replace;

    #[test]
    fn a_section_is_replaced_and_the_others_stay() {
        let text = "# R\nintro\n\n## a\nold\n\n## b\nkept\n";
        assert_eq!(
            replace(text, "a", "## a\nnew\n"),
            "# R\nintro\n\n## a\nnew\n\n## b\nkept\n"
        );
        assert_eq!(
            replace(text, "b", "## b\nnew\n"),
            "# R\nintro\n\n## a\nold\n\n## b\nnew\n"
        );
        assert_eq!(replace("# R\n", "c", "## c\nnew\n"), "# R\n\n## c\nnew\n");
    }
}
