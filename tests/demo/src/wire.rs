//! What somebody on the wire sees.

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use tombolo_testkit::{Process, wait_for};

/// Seen at the applications, never on the wire.
pub(crate) const CANARY: &str = "canary-7d1f0b62e9";

/// tcpdump on every link, until it is finished.
pub(crate) struct Capture {
    tcpdump: Process,
    file: PathBuf,
}

impl Capture {
    /// `tcpdump` is the command in its namespace, without arguments. Files go to `dir`.
    pub(crate) fn start(mut tcpdump: Command, dir: &Path) -> Result<Self> {
        let file = dir.join("wire.pcap");
        tcpdump.args(["-i", "any", "-U", "--immediate-mode", "-w"]);
        tcpdump.arg(&file).arg("tcp or udp");
        let tcpdump = Process::start("tcpdump", tcpdump, &dir.join("tcpdump.log"))?;
        wait_for("tcpdump", Duration::from_secs(15), || {
            if tcpdump.log().contains("listening on") {
                Ok(())
            } else {
                bail!("not yet: {}", tcpdump.log())
            }
        })?;
        Ok(Self { tcpdump, file })
    }

    /// Fails if the canary can be read in what was captured, or nothing was; bytes captured otherwise.
    pub(crate) fn finish(mut self) -> Result<usize> {
        let _ = self.tcpdump.signal(Signal::SIGINT);
        let _ = self.tcpdump.wait(Duration::from_secs(5));
        let wire = std::fs::read(&self.file)?;
        let seen = wire
            .windows(CANARY.len())
            .filter(|window| *window == CANARY.as_bytes())
            .count();
        ensure!(wire.len() > 2_000, "tcpdump saw only {} bytes", wire.len());
        ensure!(seen == 0, "the canary was seen {seen} times on the wire");
        Ok(wire.len())
    }
}
