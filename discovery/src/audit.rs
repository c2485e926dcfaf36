//! The audit log: one JSON object a line, append-only, for every write, refusal, enrolment and revocation.

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Refusals of callers who hold no role are written at most so often, so that nobody fills the disk.
const BOUNDED_PER_SECOND: u32 = 20;
/// Characters of a field that are kept: names and messages come from the caller.
const FIELD_MAX: usize = 1000;
/// [`Line::who`] of callers who have shown nothing.
pub(crate) const ANONYMOUS: &str = "anonymous";
/// How far back a reader sees.
const TAIL_BYTES_MAX: u64 = 32 << 20;
/// Lines a reader gets when it names no number.
const LINES_DEFAULT: usize = 1000;

/// One line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// RFC 3339, UTC; filled in by [`Audit::write`].
    #[serde(default)]
    pub time: String,
    /// SPIFFE id, operator or `anonymous`.
    pub who: String,
    /// Address, or process on this host.
    pub from: String,
    /// What was tried.
    pub verb: String,
    /// `Kind namespace/name`.
    pub object: String,
    /// SHA-256 of the object before, hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// SHA-256 of the object after, hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// `ok`, or `refused` with the coded message.
    pub result: String,
    /// Like lines that were left out just before this one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub omitted: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde wants")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[derive(Debug)]
struct Writer {
    file: File,
    strangers: Budget,
    workloads: Budget,
}

/// Lines of one second, and those left out since the last one.
#[derive(Debug)]
struct Budget {
    second: Instant,
    written: u32,
    omitted: u64,
}

impl Budget {
    fn new() -> Self {
        Self {
            second: Instant::now(),
            written: 0,
            omitted: 0,
        }
    }

    /// How many lines were left out before this one; `None`: it is left out itself.
    fn take(&mut self) -> Option<u64> {
        if self.second.elapsed() >= Duration::from_secs(1) {
            (self.second, self.written) = (Instant::now(), 0);
        }
        if self.written >= BOUNDED_PER_SECOND {
            self.omitted += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.omitted))
    }
}

/// The log.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    writer: Mutex<Writer>,
}

/// SHA-256 in hex.
pub fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes)
        .as_ref()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

impl Audit {
    /// Opens or makes the log, mode 0600.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)?;
        let writer = Writer {
            file,
            strangers: Budget::new(),
            workloads: Budget::new(),
        };
        Ok(Self {
            path: path.to_owned(),
            writer: Mutex::new(writer),
        })
    }

    /// Appends a line. A disk that is full is logged, and nothing is undone: the act has happened.
    pub fn write(&self, line: Line) {
        self.append(line, false);
    }

    /// As [`Self::write`], for refusals of callers who hold no role: bounded in number, strangers apart from members.
    pub fn write_bounded(&self, line: Line) {
        self.append(line, true);
    }

    fn append(&self, mut line: Line, bounded: bool) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if bounded {
            // Two budgets: a flood of strangers does not hide what a member was refused.
            let budget = if line.who == ANONYMOUS {
                &mut writer.strangers
            } else {
                &mut writer.workloads
            };
            let Some(omitted) = budget.take() else { return };
            line.omitted = omitted;
        }
        for field in [&mut line.who, &mut line.from, &mut line.object, &mut line.result] {
            if let Some((end, _)) = field.char_indices().nth(FIELD_MAX) {
                field.truncate(end);
                field.push('…');
            }
        }
        line.time = jiff::Timestamp::now().to_string();
        let written = serde_json::to_string(&line)
            .map_err(io::Error::other)
            .and_then(|mut text| {
                text.push('\n');
                writer.file.write_all(text.as_bytes())
            });
        if let Err(error) = written {
            tracing::error!(%error, path = %self.path.display(), "the audit log cannot be written");
        }
    }

    /// The newest lines since a time (Unix ms), newest last; `limit` 0 is a default.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn read(&self, since_unix_ms: i64, limit: usize) -> io::Result<Vec<String>> {
        let mut file = File::open(&self.path)?;
        let length = file.metadata()?.len();
        let start = length.saturating_sub(TAIL_BYTES_MAX);
        file.seek(SeekFrom::Start(start))?;
        let mut text = Vec::new();
        file.take(TAIL_BYTES_MAX).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        let recent = |line: &&str| {
            let time = serde_json::from_str::<Line>(line)
                .ok()
                .and_then(|l| l.time.parse::<jiff::Timestamp>().ok());
            time.is_some_and(|time| time.as_millisecond() >= since_unix_ms)
        };
        let limit = if limit == 0 { LINES_DEFAULT } else { limit };
        let skip = usize::from(start > 0); // the first line may be cut
        let mut lines: Vec<String> = text
            .lines()
            .skip(skip)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .take_while(recent)
            .take(limit)
            .map(str::to_owned)
            .collect();
        lines.reverse();
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn line(verb: &str) -> Line {
        Line {
            who: "root".into(),
            verb: verb.into(),
            result: "ok".into(),
            ..Line::default()
        }
    }

    #[test]
    fn appends_and_reads_the_tail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let audit = Audit::open(&path).unwrap();
        (0..5).for_each(|i| audit.write(line(&format!("v{i}"))));
        drop(audit);
        let audit = Audit::open(&path).unwrap();
        audit.write(line("v5"));
        let verbs = |since, limit| -> Vec<String> {
            let lines = audit.read(since, limit).unwrap();
            lines
                .iter()
                .map(|l| serde_json::from_str::<Line>(l).unwrap().verb)
                .collect()
        };
        assert_eq!(verbs(0, 2), ["v4", "v5"]);
        assert_eq!(verbs(0, 0).len(), 6);
        assert!(verbs(jiff::Timestamp::now().as_millisecond() + 1000, 0).is_empty());
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_flood_of_strangers_is_counted_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(&dir.path().join("audit.log")).unwrap();
        let stranger = || Line {
            who: ANONYMOUS.into(),
            ..line("enroll")
        };
        (0..1000).for_each(|_| audit.write_bounded(stranger()));
        audit.write_bounded(line("a member's"));
        audit.write(line("apply"));
        assert!(audit.read(0, 0).unwrap().len() <= 2 * BOUNDED_PER_SECOND as usize + 2);
        assert!(
            std::fs::read_to_string(&audit.path)
                .unwrap()
                .contains("a member's")
        );
        assert!(audit.writer.lock().unwrap().strangers.omitted > 900);
    }

    #[test]
    fn a_line_is_one_line_and_short_whatever_the_caller_names() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(&dir.path().join("audit.log")).unwrap();
        let forged = "x\n{\"who\":\"root\",\"verb\":\"apply\",\"result\":\"ok\"}\u{1b}[2K\u{2028}";
        audit.write(Line {
            object: forged.into(),
            ..line("get")
        });
        audit.write(Line {
            object: "é".repeat(4 << 20),
            ..line("get")
        });
        let text = std::fs::read_to_string(&audit.path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.len() < 8000 && !text.contains('\u{1b}'));
        let first: Line = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first.object, forged);
    }
}
