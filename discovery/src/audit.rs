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

/// Refusals of callers who have shown no identity are written at most so often, so that nobody fills the disk.
const ANONYMOUS_PER_SECOND: u32 = 20;
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
    second: Instant,
    anonymous: u32,
    omitted: u64,
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
            second: Instant::now(),
            anonymous: 0,
            omitted: 0,
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

    /// As [`Self::write`], for callers without an identity: bounded in number.
    pub fn write_anonymous(&self, line: Line) {
        self.append(line, true);
    }

    fn append(&self, mut line: Line, anonymous: bool) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if anonymous {
            if writer.second.elapsed() >= Duration::from_secs(1) {
                (writer.second, writer.anonymous) = (Instant::now(), 0);
            }
            writer.anonymous += 1;
            if writer.anonymous > ANONYMOUS_PER_SECOND {
                writer.omitted += 1;
                return;
            }
            line.omitted = std::mem::take(&mut writer.omitted);
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
        (0..1000).for_each(|_| audit.write_anonymous(line("enroll")));
        audit.write(line("apply"));
        assert!(audit.read(0, 0).unwrap().len() <= 2 * ANONYMOUS_PER_SECOND as usize + 1);
        assert!(audit.writer.lock().unwrap().omitted > 900);
    }
}
