use crate::{Machine, Yard};
use anyhow::{Context as _, Result, ensure};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

/// A line there and back takes less than a millisecond; a cut or hanging connection takes for ever.
const PATIENCE: Duration = Duration::from_secs(2);

/// A connection to a machine that stays open, as one of ssh does: from the switch, to a program that echoes lines.
#[derive(Debug)]
pub struct Session {
    client: Child,
    lines: Receiver<String>,
}

impl Session {
    /// Opens it, with a server of its own on the machine.
    ///
    /// # Errors
    /// When the server does not start, or the first line does not come back.
    pub fn open(yard: &Yard, machine: &Machine) -> Result<Self> {
        let socket = "[Socket]\nListenStream=2222\nAccept=yes\n";
        machine.write("/run/systemd/system/session.socket", "0644", socket)?;
        let service = "[Service]\nStandardInput=socket\nExecStart=/bin/cat\n";
        machine.write("/run/systemd/system/session@.service", "0644", service)?;
        machine.ok("systemctl daemon-reload && systemctl start session.socket")?;
        let script = format!(
            "exec 3<>/dev/tcp/{}/2222; cat <&3 & exec cat >&3",
            machine.address()
        );
        let mut client = Command::new("ip")
            .args(["netns", "exec", &yard.hub(), "bash", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (sender, lines) = channel();
        let echoes = BufReader::new(client.stdout.take().context("no output")?);
        std::thread::spawn(move || {
            echoes
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        let mut session = Self { client, lines };
        session.check("opened")?;
        Ok(session)
    }

    /// Sends a word and gets it back.
    ///
    /// # Errors
    /// When the connection was cut or hangs.
    pub fn check(&mut self, word: &str) -> Result<()> {
        let stdin = self.client.stdin.as_mut().context("no input")?;
        writeln!(stdin, "{word}")?;
        let echo = self.lines.recv_timeout(PATIENCE);
        let echo = echo.with_context(|| format!("the open connection did not echo {word:?}"))?;
        ensure!(echo == word, "{echo:?} is not {word:?}");
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}
