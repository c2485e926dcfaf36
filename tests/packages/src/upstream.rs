use crate::Yard;
use anyhow::{Context as _, Result};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// The network's own DNS server, at the switch: dnsmasq, which knows every name below example.net and counts.
#[derive(Debug)]
pub struct Upstream {
    child: Child,
    dir: TempDir,
}

impl Upstream {
    /// Address that machines ask.
    pub const ADDRESS: &'static str = "10.77.0.1";
    /// What every name below example.net is.
    pub const ANSWER: &'static str = "192.0.2.7";

    /// Starts it.
    ///
    /// # Errors
    /// When there is no dnsmasq.
    pub fn start(yard: &Yard) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // It gives up root at once, and writes as nobody then.
        let child = Command::new("ip")
            .args(["netns", "exec", &yard.hub(), "dnsmasq", "--keep-in-foreground"])
            .args([
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--pid-file=",
                "--user=root",
            ])
            .args([
                "--bind-interfaces",
                "--except-interface=lo",
                "--cache-size=0",
                "--log-queries",
            ])
            .arg(format!("--listen-address={}", Self::ADDRESS))
            .arg(format!("--address=/example.net/{}", Self::ANSWER))
            .arg(format!("--log-facility={}", dir.path().join("log").display()))
            .stdin(Stdio::null())
            .spawn()
            .context("dnsmasq (packaging/setup.sh installs it)")?;
        Ok(Self { child, dir })
    }

    /// How many questions for addresses contained a text.
    pub fn asked(&self, text: &str) -> usize {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let asked = |line: &&str| line.contains(": query[A") && line.contains(text);
        log.lines().filter(asked).count()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
