//! Requests at a steady rate, and what became of each.

use anyhow::{Context as _, Result};
use std::{
    process::{Child, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tombolo_testkit::Vm;

/// Unix milliseconds.
pub(crate) fn now_ms() -> u128 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis()
}

/// A load that runs.
#[derive(Debug)]
pub(crate) struct Load(Child);

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Unix milliseconds.
    pub(crate) start: u128,
    pub(crate) took: Duration,
    /// None: it was answered.
    pub(crate) error: Option<String>,
}

/// What became of them.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) requests: Vec<Request>,
}

impl Load {
    /// GET on a new connection each, `rate` times a second.
    pub(crate) fn start(from: &Vm, host: &str, port: u16, rate: u32) -> Result<Self> {
        let (port, rate) = (port.to_string(), rate.to_string());
        let mut command = from.host.command("tombolo-peer");
        command.args(["call", "load", host, &port, &rate]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        Ok(Self(child))
    }

    /// Stops, and waits for those that are on their way.
    pub(crate) fn stop(mut self) -> Result<Outcome> {
        drop(self.0.stdin.take());
        let output = self.0.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let request = |line: &str| {
            let mut words = line.split_whitespace();
            let start = words.next()?.parse().ok()?;
            let took = Duration::from_millis(words.next()?.parse::<f64>().ok()? as u64);
            let error = words.next().filter(|word| *word != "ok").map(str::to_owned);
            Some(Request { start, took, error })
        };
        let requests: Option<Vec<_>> = text.lines().map(request).collect();
        Ok(Outcome {
            requests: requests.with_context(|| text.into_owned())?,
        })
    }
}

impl Outcome {
    /// Those that did not end before `moment` (Unix milliseconds).
    pub(crate) fn since(&self, moment: u128) -> Self {
        let late = |request: &&Request| request.start + request.took.as_millis() >= moment;
        Self {
            requests: self.requests.iter().filter(late).cloned().collect(),
        }
    }

    pub(crate) fn failed(&self) -> Vec<&Request> {
        self.requests
            .iter()
            .filter(|request| request.error.is_some())
            .collect()
    }

    /// How long after `moment` (Unix milliseconds) the last failed one ended.
    pub(crate) fn last_failure(&self, moment: u128) -> Duration {
        let end = |request: &&Request| request.start + request.took.as_millis();
        let last = self.failed().iter().map(end).max().unwrap_or_default();
        Duration::from_millis(u64::try_from(last.saturating_sub(moment)).unwrap_or(u64::MAX))
    }

    pub(crate) fn slowest(&self) -> Duration {
        self.requests
            .iter()
            .map(|request| request.took)
            .max()
            .unwrap_or_default()
    }
}
