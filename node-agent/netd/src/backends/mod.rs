//! The ways to have a host's resolver ask the mesh, one per kind of resolver.

mod folder;
mod plain;
mod resolved;

pub(crate) use folder::Folder;
pub(crate) use plain::Plain;
pub(crate) use resolved::Resolved;

use crate::{bus::Line, seen::Seen};
use async_trait::async_trait;
use std::fmt;
use tombolo_capture::netd::{DnsSettings, NamesMode};

/// What became of [`Backend::apply`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Applied {
    /// In force, and tried before.
    Known,
    /// In force as of now: lookups decide whether it stays.
    OnTrial,
}

/// One kind of resolver. Paths of the host are those below `/`, but in tests.
#[async_trait]
pub(crate) trait Backend: fmt::Debug + Send {
    /// Its name in the configuration.
    fn mode(&self) -> NamesMode;

    /// Whether it can be used on this host; the reason where it cannot. `named`: by the host's owner, whose word is
    /// taken for what is only guessed otherwise.
    fn detect(&self, seen: &Seen, named: bool) -> Result<(), String>;

    /// Has the resolver ask the mesh. All of it or nothing.
    async fn apply(&mut self, settings: &DnsSettings, line: &mut Line) -> Result<Applied, String>;

    /// Whether what was applied is still so.
    async fn verify(&mut self, line: &mut Line) -> Result<(), String>;

    /// Lookups work: it stays.
    fn keep(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// Takes back what it or an earlier netd did, if there is anything.
    async fn revert(&mut self, line: &mut Line);

    /// At the start of netd: takes back what nobody has tried, or what is not safe to leave.
    async fn repair(&mut self, line: &mut Line);

    /// Once a second.
    async fn tick(&mut self) {}

    /// The agent answers lookups.
    fn alive(&mut self) {}

    /// netd stops; its place is taken by another one, or by none.
    fn stop(&mut self) {}
}
