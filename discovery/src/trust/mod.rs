//! The roots and the names of the own trust domain, and how one follows another while everything goes on.
//!
//! | step | believed | signs | how it ends |
//! |---|---|---|---|
//! | steady | the root | the root | `start` |
//! | started | old, new | old | `switch`, or `abort` back to steady |
//! | switched | new, old | new; the old one's signature under the new one is sent along | `finish` |
//!
//! Names are exchanged in the same steps (the names module says how), one exchange at a time: of roots or of names. What
//! depends on the name is everywhere, so discovery opens itself anew after each step of a renaming.
//!
//! One owner task makes the steps. A step is one write to the store; what it needs on disk was made before, and what
//! follows from it (certificate, bundles) is put into force after it, at a start of discovery too.
//!
//! **Invariant:** nothing is believed or signed that the record in the store does not say.
//! **Invariant:** after `finish` the old root lets nobody in; connections that it let in run on until it is cut, or
//! ninety days have passed.

mod holders;
mod keeper;
mod names;
mod record;
mod rename;

pub use holders::{Holders, Named};
pub use keeper::{Opened, TrustConfig, open, start};
pub use names::OwnNames;

use crate::refusal::Refusal;
use tokio::sync::{mpsc, oneshot};
use tombolo_ca::Authority;
use tombolo_runtime::Reader;

/// Commands that wait for the owner.
const COMMANDS_MAX: usize = 16;
/// No rotation is under way.
const STEADY: &str = "steady";
/// Hours that the end of certificates without a device is rounded to: at most one write each.
const HOUR_SECONDS: u64 = 3600;

/// A step of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// Makes a root, and publishes it beside the one that signs.
    Start,
    /// The new root signs from now on.
    Switch,
    /// The old root lets nobody in from now on.
    Finish,
    /// Takes a start back.
    Abort,
    /// Connections that retired roots let in are cut.
    Cut,
}

impl Rotation {
    /// By its name on the command line.
    pub fn find(name: &str) -> Option<Self> {
        match name {
            "start" => Some(Self::Start),
            "switch" => Some(Self::Switch),
            "finish" => Some(Self::Finish),
            "abort" => Some(Self::Abort),
            "cut" => Some(Self::Cut),
            _ => None,
        }
    }

    /// Its name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Switch => "switch",
            Self::Finish => "finish",
            Self::Abort => "abort",
            Self::Cut => "cut",
        }
    }
}

/// Who asks for a step, and how.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Which.
    pub rotation: Rotation,
    /// Although not everybody is ready.
    pub force: bool,
    /// Only says what would be done.
    pub dry_run: bool,
    /// For the record.
    pub by: String,
}

/// How a rotation stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// `steady`, `started`, `switched`.
    pub step: &'static str,
    /// Unix milliseconds; 0 when steady.
    pub since_unix_ms: i64,
    /// Who made the step.
    pub by: String,
    /// Steps that may come next.
    pub next: Vec<&'static str>,
    /// Who holds the published roots.
    pub holders: Holders,
    /// What is in the way of the next step without force.
    pub blockers: Vec<Named>,
    /// What the next step costs, for people.
    pub notes: Vec<String>,
    /// PEM of roots that are believed and do not sign: coming or leaving.
    pub beside_pem: String,
    /// PEM of retired roots.
    pub retired_pem: String,
}

/// A step of a renaming.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migration {
    /// Another name is believed beside the one that certificates are made for.
    Start,
    /// Certificates are made for the new name from now on.
    Switch,
    /// The old name lets nobody in from now on.
    Finish,
    /// Takes a start back.
    Abort,
}

impl Migration {
    /// By its name on the command line.
    pub fn find(name: &str) -> Option<Self> {
        match name {
            "start" => Some(Self::Start),
            "switch" => Some(Self::Switch),
            "finish" => Some(Self::Finish),
            "abort" => Some(Self::Abort),
            _ => None,
        }
    }

    /// Its name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Switch => "switch",
            Self::Finish => "finish",
            Self::Abort => "abort",
        }
    }
}

/// Who asks for a step of a renaming, and how.
#[derive(Debug, Clone)]
pub struct AskedName {
    /// Which.
    pub migration: Migration,
    /// For a start: the new name.
    pub name: String,
    /// Although not everybody is ready.
    pub force: bool,
    /// Only says what would be done.
    pub dry_run: bool,
    /// For the record.
    pub by: String,
}

/// How a renaming stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameStatus {
    /// As of a rotation; there are no roots in it.
    pub status: Status,
    /// The names that are in force.
    pub names: OwnNames,
}

type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

#[derive(Debug)]
enum Command {
    Show(Reply<Status>),
    Rotate(Asked, Reply<Status>),
    ShowNames(Reply<NameStatus>),
    Migrate(AskedName, Reply<NameStatus>),
    /// A certificate without a device ends then, Unix seconds.
    Other(u64),
}

/// The handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Trust {
    authority: Reader<Authority>,
    step: Reader<&'static str>,
    commands_tx: mpsc::Sender<Command>,
}

impl Trust {
    /// The CA that signs now. Load it once per certificate.
    pub fn authority(&self) -> std::sync::Arc<Authority> {
        self.authority.load()
    }

    /// `started` or `switched` while the root or the name is exchanged.
    pub fn under_way(&self) -> Option<&'static str> {
        Some(*self.step.load()).filter(|step| *step != STEADY)
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refusal> {
        let stopping = || Refusal::busy("discovery is stopping");
        let (reply, answer) = oneshot::channel();
        self.commands_tx
            .send(command(reply))
            .await
            .map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// How it stands.
    ///
    /// # Errors
    /// While discovery stops.
    pub async fn show(&self) -> Result<Status, Refusal> {
        self.ask(Command::Show).await
    }

    /// Makes a step, or says what would be in its way. Not cancelled with its caller once it is taken.
    ///
    /// # Errors
    /// TMB0801 when it is not the turn of this step, TMB0802 when not everybody is ready and `force` is not set.
    pub async fn rotate(&self, asked: Asked) -> Result<Status, Refusal> {
        self.ask(|reply| Command::Rotate(asked, reply)).await
    }

    /// How a renaming stands.
    ///
    /// # Errors
    /// While discovery stops.
    pub async fn names(&self) -> Result<NameStatus, Refusal> {
        self.ask(Command::ShowNames).await
    }

    /// Makes a step of a renaming, or says what would be in its way. Not cancelled with its caller once it is taken.
    /// After the answer discovery opens itself anew.
    ///
    /// # Errors
    /// TMB0801 when it is not the turn of this step, TMB0802 when not everybody is ready and `force` is not set, TMB0714
    /// and TMB0729 for a name that other clusters have or do not know.
    pub async fn migrate(&self, asked: AskedName) -> Result<NameStatus, Refusal> {
        self.ask(|reply| Command::Migrate(asked, reply)).await
    }

    /// A certificate was issued to a client without a device: nobody else remembers it.
    pub async fn issued_without_device(&self, not_after: u64) {
        let _ = self.commands_tx.send(Command::Other(not_after)).await; // discovery stops
    }
}
