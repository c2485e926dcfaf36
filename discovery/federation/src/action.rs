use crate::{Exports, MemberKey, Refusal, World};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tombolo_proto::tombolo::federation::v1::PeerMessage;
use tombolo_types::TrustDomain;

/// The two clocks, read by the shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Since any fixed moment of this process; never goes back. All timeouts.
    pub monotonic: Duration,
    /// Unix time in milliseconds; may jump. Only the life of invites.
    pub unix_ms: i64,
}

/// Names a connection; chosen by the shell, never used twice in one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// What the shell tells.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A mutual-TLS connection with a peer that is discovery of `trust_domain` by a root of a member is open, and so
    /// is the stream on it.
    Connected {
        /// Its name.
        conn: ConnId,
        /// The member that this side dialled; `None`: the peer dialled.
        dialled: Option<Arc<str>>,
        /// Trust domain in the peer's certificate.
        trust_domain: TrustDomain,
        /// Channel binding (RFC 9266) of the connection.
        exporter: [u8; 32],
    },
    /// A dial that [`Action::Dial`] asked for came to nothing.
    DialFailed {
        /// Which member.
        cluster: Arc<str>,
    },
    /// A message of the stream, in order.
    Received {
        /// On which connection.
        conn: ConnId,
        /// What.
        message: PeerMessage,
    },
    /// The stream ended, whoever ended it. Not told for one that [`Action::Close`] named.
    Closed {
        /// Which connection.
        conn: ConnId,
    },
    /// What came on the stream is no message, or larger than [`crate::limits::MESSAGE_BYTES_MAX`]; or the peer takes
    /// nothing of what is sent to it. The stream is of no use any more.
    Broken {
        /// Which connection.
        conn: ConnId,
        /// What, for the audit log.
        cause: String,
    },
    /// This discovery has a new certificate: the sessions that it dialled move to connections that show it.
    Renewed,
    /// Everything that this cluster wants to export from now on; what it may is decided here.
    Exports(Exports),
    /// Time has passed.
    Tick,
}

/// One change of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Keep this value under this key.
    Put {
        /// For example `record/east/west`: labels, `/` and nothing else.
        key: String,
        /// Opaque; at most 48 KiB, imports excepted.
        value: Vec<u8>,
    },
    /// Drop the value.
    Delete {
        /// As in `Put`.
        key: String,
    },
    /// Mark the invite as used by this key, in the same transaction.
    InviteUsed {
        /// The invite.
        id: [u8; 16],
        /// Who used it.
        key: MemberKey,
    },
}

/// What the shell does, in the order given.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// One transaction, done before any later action of the list (and before the answer of the call that returned
    /// it). When it fails, do none of the later ones and restart the core from the store.
    Persist(Vec<Write>),
    /// The imports of a cluster changed: within a few seconds store [`crate::Federation::imports_value`] under
    /// `imports/<cluster>`. May be merged with later ones, or lost.
    SaveImports {
        /// Which cluster.
        cluster: Arc<str>,
    },
    /// Send on the stream. When its queue is full close the connection instead and tell `Closed`.
    Send {
        /// On which connection.
        conn: ConnId,
        /// What.
        message: PeerMessage,
    },
    /// Connect to the discovery of a member; answered by `Connected` or `DialFailed`.
    Dial {
        /// Which member.
        cluster: Arc<str>,
        /// `host:port`, in order of preference.
        endpoints: Vec<String>,
        /// The peer must be discovery of one of them, names of one trust domain: it is asked for under the first.
        names: Vec<TrustDomain>,
        /// The name of the own trust domain to show to it. After a failure it is another one, if there is any: one side
        /// may have missed a change of the names.
        shown: TrustDomain,
        /// Roots of the peer's trust domain.
        roots_pem: String,
    },
    /// End the stream after what was sent on it.
    Close {
        /// Which connection.
        conn: ConnId,
    },
    /// The merged world changed: hand it to the registry.
    Publish {
        /// The whole.
        world: Arc<World>,
        /// What differs from the last one, clusters that are gone included.
        changed: BTreeSet<Arc<str>>,
    },
    /// A line for the audit log and a counter by code. At most one each ten seconds of a member and code.
    Audit(Refusal),
}
