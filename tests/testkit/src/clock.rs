use anyhow::{Context as _, Result};
use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicI64, AtomicU32, Ordering},
    time::Duration,
};

/// A wall clock that a test moves, for the programs of this repository on the hosts that follow it. It starts at the
/// machine's time. Monotonic time, and so every timeout, stays real: as on a host whose clock is set, or that slept.
///
/// It is libfaketime with a file; all hosts with one file see a step in the same moment.
#[derive(Debug)]
pub struct Clock {
    file: PathBuf,
    ahead_seconds: AtomicI64,
    steps: AtomicU32,
}

/// `libfaketimeMT.so.1` of the distribution's package, or what `TOMBOLO_FAKETIME` names.
fn library() -> Option<PathBuf> {
    let named = std::env::var_os("TOMBOLO_FAKETIME").map(PathBuf::from);
    let packaged = std::fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    named.into_iter().chain(packaged).find(|path| path.exists())
}

impl Clock {
    /// True if clocks can be moved here; otherwise says SKIPPED.
    ///
    /// # Panics
    /// When the suite is required and cannot run.
    pub fn require(suite: &str) -> bool {
        let found = library().is_some();
        if !found {
            crate::skip(suite, "libfaketime is missing (apt install libfaketime)");
        }
        found
    }

    /// A clock in a folder of its own below `dir`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new(dir: &Path, name: &str) -> Result<Self> {
        let dir = dir.join(format!("clock-{name}"));
        std::fs::create_dir_all(&dir)?;
        let clock = Self {
            file: dir.join("offset"),
            ahead_seconds: AtomicI64::new(0),
            steps: AtomicU32::new(0),
        };
        clock.set(0)?;
        Ok(clock)
    }

    /// Sets it `seconds` ahead of the machine's time, or behind.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set(&self, seconds: i64) -> Result<()> {
        self.ahead_seconds.store(seconds, Ordering::Relaxed);
        let step = self.steps.fetch_add(1, Ordering::Relaxed);
        // A new file each time: no reader sees half a line.
        let part = self.file.with_extension(step.to_string());
        std::fs::write(&part, format!("{seconds:+}s\n"))
            .and_then(|()| std::fs::rename(&part, &self.file))
            .with_context(|| format!("clock {}", self.file.display()))
    }

    /// Moves it forward.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn advance(&self, by: Duration) -> Result<()> {
        let by = i64::try_from(by.as_secs()).context("too far")?;
        self.set(self.ahead_seconds() + by)
    }

    /// Seconds ahead of the machine's time.
    pub fn ahead_seconds(&self) -> i64 {
        self.ahead_seconds.load(Ordering::Relaxed)
    }

    /// What makes a program follow it.
    pub(crate) fn environment(&self) -> Vec<(&'static str, std::ffi::OsString)> {
        let Some(library) = library() else {
            return Vec::new();
        };
        vec![
            ("LD_PRELOAD", library.into()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.clone().into()),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            ("DONT_FAKE_MONOTONIC", "1".into()),
            ("NO_FAKE_STAT", "1".into()),
        ]
    }
}
