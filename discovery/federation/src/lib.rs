//! The pure core of federation: what one discovery knows of the others, and what it tells them.
//!
//! Position: layer 2. The shell in discovery opens streams, keeps the store and reads the clock; it calls
//! [`Federation::handle`] and carries out the [`Action`]s in their order.
//!
//! # What the shell does
//! * At start: read the store's keys into [`Saved`], draw a seed, [`Federation::start`]; then [`Event::Exports`].
//! * Carry out each list of [`Action`]s in order. [`Action::Persist`] is one transaction that is done before anything
//!   behind it in the list is, and before an answer of [`Federation::redeem`] is sent. When it fails: start anew.
//! * [`Federation::next_timeout`] after each call, [`Event::Tick`] then.
//! * `Peer`: both ends give [`Event::Connected`] as soon as TLS and the stream are up. The peer must be discovery of its
//!   trust domain by a root of any member whose record is held (a removed one too: it learns its removal that way).
//!   Set [`limits::MESSAGE_BYTES_MAX`] as the decoding limit; a full queue closes the connection.
//! * `Join` on the inviting side: find the ClusterInvite by `invite_id`, [`Federation::redeem`], persist, answer. On the
//!   joining side: [`Federation::join_request`] with the key of the token's seed, call, [`Federation::accept`].
//! * Verbs: [`Federation::check_invite`], [`Federation::remove`], [`Federation::set_grant`],
//!   [`Federation::change_names`], [`Federation::leave`], [`Federation::set_profile`], [`Federation::members`].
//!
//! ```
//! use tombolo_federation::{Action, Ed25519, Federation, Now, Own, Saved};
//! let own = Own {
//!     cluster: "west".into(),
//!     trust_domain: "west.example".parse().unwrap(),
//!     also: Vec::new(),
//!     roots_pem: "-----BEGIN CERTIFICATE-----".into(),
//!     endpoints: vec!["gateway.west.example:443".into()],
//!     version: "0.1.0".into(),
//!     share_trust_domain: false,
//! };
//! let now = Now { monotonic: std::time::Duration::ZERO, unix_ms: 0 };
//! let (core, actions) = Federation::start(own, Ed25519::from_seed(&[7; 32]), &Saved::new(), 1, now);
//! assert!(matches!(actions[0], Action::Persist(_))); // its start is counted before anybody hears of it
//! assert!(core.is_member() && core.world().clusters.is_empty()); // a set of one
//! ```
//!
//! # Membership
//! A [`Record`] says who a member is and what it may do; the member that admitted it signs it. The founder signs its
//! own, and its key, pinned at the join, is where every chain starts. What the view is follows from the statements
//! held and never from their order, so all members come to the same. What a member says about itself (roots,
//! endpoints) is its [`Profile`], signed by its own key. Whoever stands on a member's chain of admits may change or
//! remove it, and then answers itself for those that it admitted.
//!
//! **Invariant:** a removed member is none again in its incarnation; only a new invite by whoever removed it, or stands
//! above, makes it one.
//! **Invariant:** a new member counts for nobody before its first contact with any member: a join that fails half way
//! leaves nothing but a spent invite.
//! **Invariant:** a member speaks only for itself. Exports are believed on the connection of the member that proved
//! its key on it, inside its grant, with identities of its own trust domain, as `<name>.<namespace>` only.
//! **Invariant:** a member has no name of its trust domain that its record does not give it, and nobody gives itself
//! one but the founder. An alias that is another member's name, or its alias, counts for nothing.
//! **Invariant:** at most one session per member; of two that both work the one that the lower name dialled stays.
//! **Invariant:** the imports of a member that cannot be reached are served, marked stale, until it is removed. The
//! mark ends after a session was good for the hold-down, which grows when it flaps.
//! **Invariant:** everything that a peer can make this core hold or do is bounded in [`limits`].
//! **Invariant:** no tokio, clock, files, sockets; no randomness but the seed of the start.
//!
//! Stated limits: whoever may admit can take a name from a member that is as far from the founder as itself, or
//! further; removing it gives the name back. The founder's key is the root of the set: keep a backup of it. What was
//! signed and reached nobody before its writer was restored from an older backup is lost.

mod action;
mod codec;
mod connection;
mod crypto;
mod exchange;
mod exports;
mod federation;
mod gossip;
mod hello;
mod join;
pub mod limits;
mod membership;
mod names;
mod own;
mod record;
mod refusal;
mod saved;
mod session;
mod statements;
mod timers;
mod trust;
mod verbs;
mod world;

pub use action::{Action, ConnId, Event, Now, Write};
pub use crypto::{Crypto, Ed25519, MemberKey};
pub use exports::{
    ExportedGateway, ExportedPort, ExportedService, Exports, Locality, Presence, ServiceName, Services,
};
pub use federation::{Federation, Joining, MemberStatus};
pub use join::Invite;
pub use membership::{Member, Standing};
pub use names::NameChange;
pub use own::Own;
pub use record::{Grant, Profile, Record};
pub use refusal::Refusal;
pub use saved::Saved;
pub use world::{Imports, World};
