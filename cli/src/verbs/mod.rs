//! One file per verb.

mod apply;
mod audit;
mod cluster;
mod completion;
mod config;
mod delete;
mod describe;
mod diff;
mod down;
mod from_istio;
mod get;
mod leave;
mod status;
mod token;
mod trust;
mod up;
mod version;
mod vm;
mod wait;
mod why;
mod workload_group;

use crate::{failure::Failure, sockets::Sockets};
use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one per process")]
pub(crate) enum Verb {
    /// Join the mesh with a token, or start again what was stopped.
    Up(up::Args),
    /// Stop agent and netd; the host stays enrolled.
    Down(down::Args),
    /// Leave the mesh: deregister, stop, remove the state.
    Leave(leave::Args),
    /// What this host is in the mesh and how it is.
    Status(status::Args),
    /// Walk a connection from this host hop by hop and name what is broken.
    Why(why::Args),
    /// List objects.
    Get(get::Args),
    /// Show an object with everything that is known about it.
    Describe(describe::Args),
    /// Create or change objects from files.
    Apply(apply::Args),
    /// Delete objects by name or from files.
    Delete(delete::Args),
    /// Show what `apply` would change.
    Diff(diff::Args),
    /// Wait for a condition of objects.
    Wait(wait::Args),
    /// Make a WorkloadGroup and its service.
    #[command(subcommand, visible_alias = "wg")]
    WorkloadGroup(workload_group::Verb),
    /// Make, list and revoke join tokens.
    #[command(subcommand)]
    Token(token::Verb),
    /// The fleet: list, revoke, delete, readmit VMs.
    #[command(subcommand)]
    Vm(vm::Verb),
    /// Join clusters with each other: invite, join, list, remove.
    #[command(subcommand)]
    Cluster(cluster::Verb),
    /// The roots that are believed.
    #[command(subcommand)]
    Trust(trust::Verb),
    /// Who did what, when, from where.
    Audit(audit::Args),
    /// The agent's configuration, and that of an Istio VM in our words.
    #[command(subcommand)]
    Config(config::Verb),
    /// Completion script for a shell.
    Completion(completion::Args),
    /// Versions of this program, the agent and discovery.
    Version(version::Args),
}

/// `-n NAMESPACE`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Namespace {
    /// Namespace.
    #[arg(
        short = 'n',
        long = "namespace",
        env = "TOMBOLO_NAMESPACE",
        value_name = "NAMESPACE",
        hide_env_values = true
    )]
    namespace: Option<String>,
}

impl Namespace {
    /// As given, or `default`.
    pub(crate) fn or_default(&self) -> &str {
        self.namespace.as_deref().unwrap_or("default")
    }

    /// As given.
    pub(crate) fn given(&self) -> Option<&str> {
        self.namespace.as_deref()
    }
}

/// `-n NAMESPACE` or `-A`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Namespaces {
    #[command(flatten)]
    one: Namespace,
    /// All namespaces.
    #[arg(short = 'A', long = "all-namespaces", conflicts_with = "namespace")]
    all: bool,
}

impl Namespaces {
    /// For lists: empty means all.
    pub(crate) fn filter(&self) -> &str {
        if self.all { "" } else { self.one.or_default() }
    }

    pub(crate) const fn is_all(&self) -> bool {
        self.all
    }

    pub(crate) fn given(&self) -> Option<&str> {
        self.one.given()
    }
}

/// Runs a verb.
pub(crate) async fn run(verb: Verb, sockets: &Sockets) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Up(args) => up::run(args, sockets).await,
        Verb::Down(args) => down::run(&args).await,
        Verb::Leave(args) => leave::run(&args).await,
        Verb::Status(args) => status::run(args, sockets).await,
        Verb::Why(args) => why::run(&args, sockets).await,
        Verb::Get(args) => get::run(&args, sockets).await,
        Verb::Describe(args) => describe::run(&args, sockets).await,
        Verb::Apply(args) => apply::run(&args, sockets).await,
        Verb::Delete(args) => delete::run(&args, sockets).await,
        Verb::Diff(args) => diff::run(&args, sockets).await,
        Verb::Wait(args) => wait::run(&args, sockets).await,
        Verb::WorkloadGroup(verb) => workload_group::run(&verb, sockets).await,
        Verb::Token(verb) => token::run(verb, sockets).await,
        Verb::Vm(verb) => vm::run(verb, sockets).await,
        Verb::Cluster(verb) => cluster::run(verb, sockets).await,
        Verb::Trust(verb) => trust::run(verb, sockets).await,
        Verb::Audit(args) => audit::run(&args, sockets).await,
        Verb::Config(verb) => config::run(&verb, sockets).await,
        Verb::Completion(args) => Ok(completion::run(&args)),
        Verb::Version(args) => version::run(args, sockets).await,
    }
}
