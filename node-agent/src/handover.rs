//! What two processes of the agent say to each other when one takes over from the other.
//!
//! The protocol has a format number of its own. Two programs that differ in it refuse each other before anything is
//! handed over, and the one that runs goes on.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::timeout;
use tombolo_capture::handover::{Packets, from_file, to_file};
use tombolo_control_client::Health;

/// Format of the messages below. A change of their meaning is a new number.
pub(crate) const FORMAT: u32 = 1;
/// Largest table or snapshot, in bytes: a snapshot of 100,000 workloads has about 40 MB.
pub(crate) const FILE_MAX: u64 = 1 << 30;

/// First message of both sides.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) format: u32,
    pub(crate) version: String,
    pub(crate) pid: u32,
    /// Of a process that has handed over: when, Unix milliseconds.
    #[serde(default)]
    pub(crate) since_unix_ms: i64,
}

impl Hello {
    pub(crate) fn new(since_unix_ms: i64) -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            since_unix_ms,
        }
    }

    /// Why the two cannot talk.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.format == FORMAT {
            return Ok(());
        }
        Err(format!(
            "version {} hands over in format {}, this is version {} with format {FORMAT}: a restart is needed",
            self.version,
            self.format,
            env!("CARGO_PKG_VERSION")
        ))
    }
}

/// What a descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Tun,
    Capture,
    Table,
    Hbone,
    Lock,
    Snapshot,
    Admin,
    Metrics,
    Readiness,
}

/// All messages.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub(crate) enum Message {
    Hello(Hello),
    /// The new process cannot; the other one goes on.
    Failed {
        message: String,
    },
    /// The new process has read configuration and state, and waits.
    Prepared,
    /// Everything that the new process needs; the packet loop stands still until it answers.
    TakeOver {
        kinds: Vec<Kind>,
        families: (bool, bool),
        /// Healthy, or why not; none while it is not known.
        health: Option<Result<(), String>>,
        device: String,
    },
    /// The new process serves.
    Serving,
    /// The state directory and systemd's attention are the new process's.
    Yours,
    /// The new process has a control stream of its own, or has given up waiting for it.
    Online,
    /// To a process that has handed over: the newest snapshot is beside the message.
    World,
    /// To a process that has handed over: end what is open, within the limit of a drain.
    Drain,
    /// To a process that has handed over: which connections are open?
    Flows,
    /// The answer, beside the message.
    OpenFlows,
    /// From a process that has handed over.
    Connections {
        count: u64,
    },
}

/// Sends a message with descriptors.
pub(crate) async fn send(packets: &Packets, message: &Message, descriptors: &[OwnedFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(|fd| fd.as_fd()).collect();
    packets.send(&bytes, &borrowed).await
}

/// Sends a message with bytes beside it.
pub(crate) async fn send_file(packets: &Packets, message: &Message, content: &[u8]) -> io::Result<()> {
    send(packets, message, &[to_file(content)?]).await
}

/// The next message; an error when the other side is gone or silent for `patience`.
pub(crate) async fn receive(packets: &Packets, patience: Duration) -> io::Result<(Message, Vec<OwnedFd>)> {
    let received = timeout(patience, packets.receive())
        .await
        .map_err(io::Error::from)??;
    let (bytes, descriptors) = received
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the other process has ended"))?;
    Ok((parse(&bytes)?, descriptors))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The one file beside a message.
pub(crate) fn file(descriptors: Vec<OwnedFd>) -> io::Result<Vec<u8>> {
    let file = descriptors.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
    from_file(file, FILE_MAX)
}

/// Where processes that have handed over are found.
pub(crate) fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("previous")
}

/// The process that `tombolo down` signals where there is no systemd.
pub(crate) fn pid_file(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.pid")
}

pub(crate) fn health_said(health: &Health) -> Option<Result<(), String>> {
    match health {
        Health::Unknown => None,
        Health::Healthy => Some(Ok(())),
        Health::Unhealthy(reason) => Some(Err(reason.clone())),
    }
}

pub(crate) fn health_heard(said: Option<Result<(), String>>) -> Health {
    match said {
        None => Health::Unknown,
        Some(Ok(())) => Health::Healthy,
        Some(Err(reason)) => Health::Unhealthy(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_format_is_refused_and_named() {
        let mut hello = Hello::new(0);
        assert_eq!(hello.check(), Ok(()));
        hello.format = 2;
        let refused = hello.check().unwrap_err();
        assert!(
            refused.contains("format 2") && refused.contains("restart"),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn messages_travel_with_what_is_beside_them() {
        let (here, there) = Packets::pair().unwrap();
        let there = Packets::from_fd(there).unwrap();
        let take_over = Message::TakeOver {
            kinds: vec![Kind::Tun, Kind::Snapshot],
            families: (true, false),
            health: Some(Err("refused".into())),
            device: "x".into(),
        };
        send_file(&here, &take_over, b"bytes").await.unwrap();
        let (message, descriptors) = receive(&there, Duration::from_secs(1)).await.unwrap();
        assert!(matches!(message, Message::TakeOver { kinds, .. } if kinds == [Kind::Tun, Kind::Snapshot]));
        assert_eq!(file(descriptors).unwrap(), b"bytes");
        here.send(b"{\"say\":\"dance\"}", &[]).await.unwrap();
        let error = receive(&there, Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(here);
        let error = receive(&there, Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
