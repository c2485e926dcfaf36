//! Load that goes on while something breaks, and what became of each call.

use anyhow::{Context as _, Result};
use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tombolo_testkit::Host;

/// New connections at a steady rate from one host to port 80 of one service, until it is finished.
pub(crate) struct Load {
    child: Child,
    log: PathBuf,
}

/// One HTTP request on a connection of its own. Times are Unix milliseconds.
pub(crate) struct Call {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// `ok` or the error.
    pub(crate) how: String,
}

/// Calls in the order in which they ended.
pub(crate) struct Calls(Vec<Call>);

impl Load {
    pub(crate) fn start(host: &Host, service: &str, per_second: u32) -> Result<Self> {
        let log = host.dir().join(format!("load-{}", now_ms()));
        let child = host
            .command("tombolo-peer")
            .args(["call", "load", service, "80", &per_second.to_string()])
            .stdin(Stdio::piped())
            .stdout(File::create(&log)?)
            .spawn()
            .context("starting the load")?;
        Ok(Self { child, log })
    }

    /// What has ended so far.
    pub(crate) fn so_far(&self) -> Result<Calls> {
        Calls::read(&std::fs::read_to_string(&self.log)?)
    }

    /// No further calls; waits for those that are under way.
    pub(crate) fn finish(mut self) -> Result<Calls> {
        drop(self.child.stdin.take());
        self.child.wait()?;
        self.so_far()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Calls {
    fn read(lines: &str) -> Result<Self> {
        // The last line may be half written.
        let whole = lines.rfind('\n').map_or("", |end| &lines[..end]);
        let mut calls = Vec::new();
        for line in whole.lines() {
            let mut words = line.split(' ');
            let mut number = || -> Option<u64> { words.next()?.parse().ok() };
            let (start, took) = (number().context("a time")?, number().context("a duration")?);
            calls.push(Call {
                start,
                end: start + took,
                how: words.next().unwrap_or_default().to_owned(),
            });
        }
        calls.sort_by_key(|call| call.end);
        Ok(Self(calls))
    }

    pub(crate) fn total(&self) -> usize {
        self.0.len()
    }

    /// Those that failed.
    pub(crate) fn failed(&self) -> impl Iterator<Item = &Call> {
        self.0.iter().filter(|call| call.how != "ok")
    }

    /// The longest time without an answer, of those times that end after `from` and begin before `until`.
    pub(crate) fn longest_gap(&self, from: u64, until: u64) -> Duration {
        let ends: Vec<u64> = self
            .0
            .iter()
            .filter(|call| call.how == "ok")
            .map(|call| call.end)
            .collect();
        let gaps = ends.windows(2).filter(|pair| pair[1] > from && pair[0] < until);
        Duration::from_millis(gaps.map(|pair| pair[1] - pair[0]).max().unwrap_or_default())
    }
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
