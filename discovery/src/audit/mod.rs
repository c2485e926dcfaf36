//! The audit log: one JSON object a line, append-only, for every write, refusal, enrolment and revocation.
//!
//! Lines are queued in order and written by a thread of their own, many at once, followed by one fdatasync. No call is
//! answered before the lines that it caused are on the disk ([`Audit::flushed`]). When the disk takes no more, what is
//! done is done: the mesh goes on, TMB0605 says so, and the first line that fits again says how many are missing.

mod files;
mod writer;

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// Refusals of callers who hold no role are written at most so often, so that nobody fills the disk.
const BOUNDED_PER_SECOND: u32 = 20;
/// Characters of a field that are kept: names and messages come from the caller.
const FIELD_MAX: usize = 1000;
/// [`Line::who`] of callers who have shown nothing.
pub(crate) const ANONYMOUS: &str = "anonymous";
/// Lines that wait for the disk; more are counted and left out.
const QUEUE_MAX: usize = 16_384;
/// Longest wait of a call for its lines: a disk that hangs must not stop the mesh.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
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

/// Lines on their way to the disk.
#[derive(Debug)]
struct Queue {
    /// Each with its line feed.
    lines: Vec<String>,
    /// Number of the last line, from the start of the process.
    last: u64,
    /// Left out because the queue was full, or refused by the disk.
    lost: u64,
    closed: bool,
    strangers: Budget,
    workloads: Budget,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Number of the last line that is on the disk, or that the disk has refused.
    done: watch::Sender<u64>,
    /// The disk takes no lines.
    failing: watch::Sender<Option<String>>,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
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
        Self::open_with(path, files::Limits::default())
    }

    fn open_with(path: &Path, limits: files::Limits) -> io::Result<Self> {
        let log = files::Log::open(path, limits)?;
        let queue = Queue {
            lines: Vec::new(),
            last: 0,
            lost: 0,
            closed: false,
            strangers: Budget::new(),
            workloads: Budget::new(),
        };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            wake: Condvar::new(),
            done: watch::Sender::new(0),
            failing: watch::Sender::new(None),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("audit".into())
                .spawn(move || writer::run(log, &shared))?
        };
        Ok(Self {
            path: path.to_owned(),
            shared,
            thread: Some(thread),
        })
    }

    /// Appends a line. It is on the disk when [`Self::flushed`] returns.
    pub fn write(&self, line: Line) {
        self.append(line, false);
    }

    /// As [`Self::write`], for refusals of callers who hold no role: bounded in number, strangers apart from members.
    pub fn write_bounded(&self, line: Line) {
        self.append(line, true);
    }

    fn append(&self, mut line: Line, bounded: bool) {
        for field in [&mut line.who, &mut line.from, &mut line.object, &mut line.result] {
            if let Some((end, _)) = field.char_indices().nth(FIELD_MAX) {
                field.truncate(end);
                field.push('…');
            }
        }
        let mut queue = self.shared.queue();
        if bounded {
            // Two budgets: a flood of strangers does not hide what a member was refused.
            let budget = if line.who == ANONYMOUS {
                &mut queue.strangers
            } else {
                &mut queue.workloads
            };
            let Some(omitted) = budget.take() else { return };
            line.omitted = omitted;
        }
        if queue.lines.len() >= QUEUE_MAX {
            queue.lost += 1;
            return;
        }
        // Under the lock: lines are in the order of their times.
        if let Some(text) = text_of(line) {
            queue.lines.push(text);
            queue.last += 1;
        }
        drop(queue);
        self.shared.wake.notify_one();
    }

    /// Waits until all lines so far are on the disk, or the disk has refused them; 5 s at most. Cancel-safe.
    pub async fn flushed(&self) {
        let last = self.shared.queue().last;
        let mut done = self.shared.done.subscribe();
        let wait = done.wait_for(|done| *done >= last);
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, wait).await; // a disk that hangs is said by the writer
    }

    /// Why lines cannot be written, while they cannot.
    pub fn problem(&self) -> Option<String> {
        self.shared.failing.borrow().clone()
    }

    /// The newest lines since a time (Unix ms), newest last, older files of the log included; `limit` 0 is a default.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn read(&self, since_unix_ms: i64, limit: usize) -> io::Result<Vec<String>> {
        let limit = if limit == 0 { LINES_DEFAULT } else { limit };
        files::tail(&self.path, limit, |line| {
            let time = serde_json::from_str::<Line>(line)
                .ok()
                .and_then(|l| l.time.parse::<jiff::Timestamp>().ok());
            time.is_some_and(|time| time.as_millisecond() >= since_unix_ms)
        })
    }
}

impl Drop for Audit {
    /// Writes what is queued.
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it does not panic; if it did, what is lost is lost
        }
    }
}

/// The text of a line, with the time of now.
fn text_of(mut line: Line) -> Option<String> {
    line.time = jiff::Timestamp::now().to_string();
    let mut text = serde_json::to_string(&line).ok()?; // strings and numbers always are JSON
    text.push('\n');
    Some(text)
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

    fn wait(audit: &Audit) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(audit.flushed());
    }

    fn verbs(audit: &Audit) -> Vec<String> {
        let lines = audit.read(0, 0).unwrap();
        let verb = |line: &String| serde_json::from_str::<Line>(line).unwrap().verb;
        lines.iter().map(verb).collect()
    }

    #[test]
    fn a_new_file_is_begun_in_time_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let limits = files::Limits {
            file_max: 1000,
            kept: 3,
        };
        let audit = Audit::open_with(&path, limits).unwrap();
        for i in 0..60 {
            audit.write(line(&format!("v{i}")));
            wait(&audit);
        }
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["audit.log", "audit.log.1", "audit.log.2", "audit.log.3"]);
        for name in &names {
            let metadata = std::fs::metadata(dir.path().join(name)).unwrap();
            assert!(metadata.len() <= 1000 && metadata.permissions().mode() & 0o777 == 0o600);
        }
        let found = verbs(&audit);
        assert!(found.len() > 20, "{found:?}");
        let expected: Vec<_> = (60 - found.len()..60).map(|i| format!("v{i}")).collect();
        assert_eq!(found, expected, "all files, in order, without a gap");
        assert_eq!(audit.read(0, 15).unwrap().len(), 15, "over the end of a file");
    }

    #[test]
    fn a_disk_that_refuses_stops_nobody_and_what_is_missing_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("state");
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("audit.log");
        // The next line begins a new file, and the folder that it would be in is gone: the disk refuses.
        let limits = files::Limits { file_max: 1, kept: 3 };
        let audit = Audit::open_with(&path, limits).unwrap();
        audit.write(line("before"));
        wait(&audit);
        std::fs::rename(&folder, dir.path().join("away")).unwrap();
        for _ in 0..5 {
            audit.write(line("lost"));
        }
        wait(&audit);
        assert!(audit.problem().unwrap().contains("audit.log"));
        std::fs::rename(dir.path().join("away"), &folder).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while audit.problem().is_some() {
            assert!(Instant::now() < end);
            audit.write(line("after"));
            std::thread::sleep(Duration::from_millis(50));
        }
        let lines = audit.read(0, 0).unwrap();
        let parsed: Vec<Line> = lines.iter().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(parsed[0].verb, "before");
        assert!(parsed[1].verb == "audit" && parsed[1].omitted >= 5, "{lines:?}");
        assert!(parsed.iter().all(|line| line.verb != "lost"), "{lines:?}");
    }

    #[test]
    fn what_is_queued_is_written_by_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let audit = Audit::open(&path).unwrap();
        (0..1000).for_each(|i| audit.write(line(&format!("v{i}"))));
        drop(audit);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1000);
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
        wait(&audit);
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
        wait(&audit);
        assert!(audit.read(0, 0).unwrap().len() <= 2 * BOUNDED_PER_SECOND as usize + 2);
        assert!(
            std::fs::read_to_string(&audit.path)
                .unwrap()
                .contains("a member's")
        );
        assert!(audit.shared.queue().strangers.omitted > 900);
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
        wait(&audit);
        let text = std::fs::read_to_string(&audit.path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.len() < 8000 && !text.contains('\u{1b}'));
        let first: Line = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first.object, forged);
    }
}
