//! Every number that bounds what a peer can make this core hold, send or do.

use std::time::Duration;

/// Members of one set of clusters, removed ones not counted.
pub const MEMBERS_MAX: usize = 256;
/// Membership records held: each member may have one per admitting member, and removed ones stay. At 36 KiB each the
/// ceiling is 36 MiB.
pub const RECORDS_MAX: usize = 1024;
/// Admits from the founder to a member.
pub const DEPTH_MAX: usize = 16;
/// Bytes of the root certificates of one member: eight roots of 2 KiB.
pub const ROOTS_BYTES_MAX: usize = 16 * 1024;
/// Endpoints of one discovery.
pub const ENDPOINTS_MAX: usize = 8;
/// Namespaces in one grant.
pub const NAMESPACES_MAX: usize = 256;
/// Other names of one member's trust domain: one is in use while it is renamed, and more only where a renaming is not
/// finished before the next.
pub const ALIASES_MAX: usize = 4;
/// Admissions that wait for the first contact of the joining cluster.
pub const ADMISSIONS_MAX: usize = 64;
/// How far a version may stand above what is held: nobody changes a record a million times unseen, and a forged
/// counter near its end would leave no next version.
pub const VERSION_JUMP_MAX: u64 = 1 << 20;

/// Services that one member may export.
pub const SERVICES_MAX: usize = 10_000;
/// Ports of one exported service.
pub const PORTS_MAX: usize = 64;
/// Identities of one exported service.
pub const SUBJECT_ALT_NAMES_MAX: usize = 64;
/// Networks times localities of one exported service.
pub const PRESENCES_MAX: usize = 64;
/// Gateways of one member.
pub const GATEWAYS_MAX: usize = 256;
/// Bytes of all exported services of one member as protobuf.
pub const EXPORTS_BYTES_MAX: usize = 16 << 20;
/// Bytes of one message; the shell sets it as the decoding limit of the stream.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// A sender starts another part, or another message of records, at this many bytes: with the largest single item
/// (a service of 64 ports, identities and presences is under 96 KiB) a message stays under half the limit.
pub const PART_BYTES: usize = 256 * 1024;
/// Connections in all, before and after their Hello.
pub const CONNECTIONS_MAX: usize = 1024;

/// Connections of one trust domain that have not said yet who they are: an honest member needs two.
pub const NAMELESS_MAX: usize = 16;

/// Between two heartbeats of a session.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A connection that brought nothing for five heartbeats is closed.
pub const SILENCE_MAX: Duration = Duration::from_secs(5);
/// A member is stale when nothing was heard of it for so long: a lost connection that comes back by the second dial
/// is never seen.
pub const STALE_AFTER: Duration = Duration::from_secs(10);
/// Least time of a good session before a member that was stale no longer is; doubled each time that it turns stale
/// again within [`FLAP_WINDOW`].
pub const HOLD_DOWN: Duration = Duration::from_secs(2);
/// Longest hold-down.
pub const HOLD_DOWN_MAX: Duration = Duration::from_secs(60);
/// A member that stayed good for so long starts with the least hold-down again.
pub const FLAP_WINDOW: Duration = Duration::from_secs(300);
/// Time for the Hello of a new connection, and for the shell to answer a dial.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Wait after the first failed dial; doubled with each further one, half of it jitter.
pub const DIAL_BACKOFF: Duration = Duration::from_millis(500);
/// Longest wait between two dials.
pub const DIAL_BACKOFF_MAX: Duration = Duration::from_secs(15);
/// Wait before the dial of a peer that broke the protocol.
pub const PENALTY: Duration = Duration::from_secs(60);
/// Head start of the member with the lower name, so that two do not dial each other at the same moment.
pub const DIAL_COURTESY: Duration = Duration::from_secs(1);
/// Between two full exports on one connection, whatever the peer asks for.
pub const RESYNC_INTERVAL: Duration = Duration::from_secs(1);
/// Between two exchanges of all records on one connection when the digests differ.
pub const RECORDS_INTERVAL: Duration = Duration::from_secs(3);
/// Between two audit lines of the same member and code.
pub const AUDIT_INTERVAL: Duration = Duration::from_secs(10);
/// Between two raises of the own epoch.
pub const EPOCH_INTERVAL: Duration = Duration::from_secs(1);
/// How far a peer may raise the own epoch at once.
pub const EPOCH_JUMP_MAX: u64 = 1 << 32;
/// An admission waits for the first contact until the invite expires, and at least so long.
pub const ADMISSION_GRACE: Duration = Duration::from_secs(600);
