//! Federation: this discovery among those of other clusters.
//!
//! One owner task drives the pure core (`tombolo_federation`): events go in (streams, the registry's exports, time,
//! verbs of operators), and it carries out the actions in their order. Everybody else holds a [`Federation`] handle.
//!
//! | who | on 15012 | how it shows who it is |
//! |---|---|---|
//! | a cluster that joins | `Join` | the invite's key and its own over the TLS exporter; it checked the pinned root |
//! | a member | `Peer` | certificate of discovery by a root of that member's record, and the member key over the exporter |
//!
//! **Invariant:** what the core says is durable is in the store before anything behind it is done or answered.
//! **Invariant:** certificates of other clusters open the `Peer` stream and nothing else.
//! **Invariant:** the member key is in one file of mode 0600, is not the CA's, and never leaves the process.

mod convert;
mod dial;
mod join;
mod keep;
mod owner;
mod service;

pub use join::JoinOptions;
pub use keep::ClusterInvite;
pub use owner::{FederationConfig, start};
pub use service::FederationService;

use crate::refusal::Refusal;
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tombolo_federation::{ConnId, Grant, Joining, MemberStatus, NameChange};
use tombolo_identity::LiveIdentity;
use tombolo_proto::tombolo::{admin::v1::RefusedExport, federation::v1 as pb};
use tombolo_types::{InviteToken, TrustDomain};

/// Commands that wait for the owner. Messages of peers are among them, each at most 1 MiB.
const COMMANDS_MAX: usize = 64;
/// Messages that wait for a peer: all exports in full (64 parts) and all records (144) fit. A peer that is slower is
/// cut: with parts of 256 KiB at 64 MiB.
pub(crate) const QUEUE_MAX: usize = 256;
/// How long an ended stream may take to bring what was sent on it.
pub(crate) const LINGER: Duration = Duration::from_secs(2);

type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// A stream to a peer, as the owner holds it.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// What is sent; dropping it ends the stream.
    pub(crate) messages_tx: mpsc::Sender<pb::PeerMessage>,
    /// Cancelled when the owner wants no more of it.
    pub(crate) closing: CancellationToken,
}

/// What the owner is asked.
#[derive(Debug)]
pub(crate) enum Command {
    Opened {
        conn: ConnId,
        dialled: Option<Arc<str>>,
        trust_domain: TrustDomain,
        exporter: [u8; 32],
        outgoing: Outgoing,
    },
    Received(ConnId, Box<pb::PeerMessage>),
    Closed(ConnId),
    Broken(ConnId, String),
    DialFailed(Arc<str>, String),
    Redeem {
        request: Box<pb::JoinRequest>,
        exporter: [u8; 32],
        from: String,
        reply: Reply<pb::JoinResponse>,
    },
    Invite {
        id: [u8; 16],
        invite: Box<ClusterInvite>,
        dry_run: bool,
        reply: Reply<()>,
    },
    RevokeInvite(String, Reply<()>),
    Invites(Reply<Vec<(String, ClusterInvite)>>),
    PrepareJoin {
        token: Box<InviteToken>,
        exporter: [u8; 32],
        share_trust_domain: bool,
        reply: Reply<pb::JoinRequest>,
    },
    Accept(Box<pb::JoinResponse>, Reply<()>),
    Rollback(Reply<()>),
    Settled,
    Remove(String, Reply<()>),
    Roots(String, Reply<()>),
    Grant(String, Grant, Option<bool>, Reply<()>),
    Name(String, NameChange, Reply<()>),
    PrepareName(TrustDomain, Reply<()>),
    BehindName(TrustDomain, Reply<Vec<(String, String)>>),
    ReleaseName(TrustDomain, Reply<Option<String>>),
    /// With the names of services, or without.
    Show(bool, Reply<Shown>),
}

/// What was refused of a member, the last time for each code.
#[derive(Debug, Clone)]
pub struct Refused {
    /// Coded message.
    pub message: String,
    /// Unix milliseconds.
    pub at_unix_ms: i64,
    /// How often, since the start.
    pub count: u64,
}

/// A member, as operators see it.
#[derive(Debug, Clone)]
pub struct ShownMember {
    /// As the core has it.
    pub status: MemberStatus,
    /// Unix milliseconds of the last message; 0: none since the start.
    pub heard_unix_ms: i64,
    /// Gateways that it offers.
    pub gateways: usize,
    /// What was refused of it.
    pub refused: Vec<Refused>,
    /// `namespace/name` of what it exports, if asked for.
    pub services: Vec<String>,
    /// Why the last dial failed; empty: it did not.
    pub dial_failure: String,
}

/// All that operators see.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Name of the own cluster.
    pub own: String,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// All members, the own cluster too.
    pub members: Vec<ShownMember>,
    /// Clusters that were admitted here and have not come yet.
    pub joining: Vec<Joining>,
    /// Services that the own cluster exports.
    pub exported: usize,
    /// Number of the state of the own exports.
    pub seq: u64,
    /// Where other clusters reach this discovery.
    pub endpoints: Vec<String>,
    /// What is refused of the own exports.
    pub refused_exports: Vec<RefusedExport>,
    /// Version of this program.
    pub version: String,
}

/// The handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Federation {
    commands_tx: mpsc::Sender<Command>,
    trusted: Arc<LiveIdentity>,
    mesh_domain: Arc<str>,
}

/// True if the connection failed, and not the call: what the transport reports carries its own error as the source.
fn of_transport(status: &tonic::Status) -> bool {
    std::error::Error::source(status).is_some()
}

fn stopping() -> Refusal {
    Refusal::busy("discovery is stopping")
}

impl From<tombolo_federation::Refusal> for Refusal {
    fn from(refusal: tombolo_federation::Refusal) -> Self {
        Self::new(refusal.code, refusal.cause)
    }
}

impl Federation {
    /// Roots of clients on 15012: the own ones, and those by which discoveries of other clusters may come.
    pub fn trusted(&self) -> &Arc<LiveIdentity> {
        &self.trusted
    }

    async fn tell(&self, command: Command) -> Result<(), Refusal> {
        self.commands_tx.send(command).await.map_err(|_| stopping())
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.tell(command(reply)).await?;
        answer.await.map_err(|_| stopping())?
    }

    /// All members and how they are.
    ///
    /// # Errors
    /// While discovery stops.
    pub async fn show(&self) -> Result<Shown, Refusal> {
        self.show_all(false).await
    }

    /// The same, with the names of what each exports if `services`.
    ///
    /// # Errors
    /// While discovery stops.
    pub async fn show_all(&self, services: bool) -> Result<Shown, Refusal> {
        self.ask(|reply| Command::Show(services, reply)).await
    }

    /// Changes what a member may export, and whether it may admit others.
    ///
    /// # Errors
    /// When there is no such member, or this cluster may not.
    pub async fn grant(
        &self,
        cluster: String,
        namespaces: Grant,
        may_admit: Option<bool>,
    ) -> Result<(), Refusal> {
        self.ask(|reply| Command::Grant(cluster, namespaces, may_admit, reply))
            .await
    }

    /// Gives a member another name of its trust domain, or takes one.
    ///
    /// # Errors
    /// When there is no such member, this cluster may not, the name is another member's, or is still used.
    pub async fn change_names(&self, cluster: String, change: NameChange) -> Result<(), Refusal> {
        self.ask(|reply| Command::Name(cluster, change, reply)).await
    }

    /// For the first step of a migration of the own trust domain to `name`, before anything is written: sees to it that
    /// the own record lists the name, so that the other clusters learn it. The founder, and a cluster without others,
    /// says so itself. Nothing happens if the name is listed already: safe to repeat.
    ///
    /// # Errors
    /// [`Code::TrustDomainUnlisted`](tombolo_types::Code::TrustDomainUnlisted) with the command that an operator runs on
    /// the cluster that admitted this one; when the name is another member's, or the store cannot be written.
    pub async fn prepare_name(&self, name: TrustDomain) -> Result<(), Refusal> {
        self.ask(|reply| Command::PrepareName(name, reply)).await
    }

    /// Before certificates are made for `name`: the other clusters that do not know yet, as far as this one knows, that it
    /// is a name of this one, each with the reason, for people. They would refuse this cluster under it. None: all do.
    ///
    /// # Errors
    /// While discovery stops.
    pub async fn behind_name(&self, name: TrustDomain) -> Result<Vec<(String, String)>, Refusal> {
        self.ask(|reply| Command::BehindName(name, reply)).await
    }

    /// After the own trust domain has given up `name` (the old one at the end of a migration, the new one when it was
    /// aborted): the founder, and a cluster without others, takes it from its record itself. Otherwise what an operator
    /// is to do elsewhere, for people. `None`: nothing. Safe to repeat.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn release_name(&self, name: TrustDomain) -> Result<Option<String>, Refusal> {
        self.ask(|reply| Command::ReleaseName(name, reply)).await
    }

    /// Keeps a new invite, or only says whether it could be used.
    ///
    /// # Errors
    /// When this cluster may not admit, or not that one.
    pub async fn invite(&self, id: [u8; 16], invite: ClusterInvite, dry_run: bool) -> Result<(), Refusal> {
        let invite = Box::new(invite);
        self.ask(|reply| Command::Invite {
            id,
            invite,
            dry_run,
            reply,
        })
        .await
    }

    /// All invites by their ids.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn invites(&self) -> Result<Vec<(String, ClusterInvite)>, Refusal> {
        self.ask(Command::Invites).await
    }

    /// Forgets an invite.
    ///
    /// # Errors
    /// When it is not there.
    pub async fn revoke_invite(&self, id: String) -> Result<(), Refusal> {
        self.ask(|reply| Command::RevokeInvite(id, reply)).await
    }

    /// Says what the own roots are from now on, to all members.
    ///
    /// # Errors
    /// When they are out of bounds, or the store cannot be written: they are told when it can.
    pub async fn set_roots(&self, roots_pem: String) -> Result<(), Refusal> {
        self.ask(|reply| Command::Roots(roots_pem, reply)).await
    }

    /// Ends the membership of a cluster, for all.
    ///
    /// # Errors
    /// When there is no such member, or this cluster may not.
    pub async fn remove(&self, cluster: String) -> Result<(), Refusal> {
        self.ask(|reply| Command::Remove(cluster, reply)).await
    }
}
