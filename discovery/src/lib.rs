//! Discovery: the control plane of a mesh.
//!
//! Position: layer 6. Config and enrolments go into the store; the store's watch drives the registry; the registry's
//! worlds are pushed to subscribers. Around it: the CA, the enrolment of VMs, liveness, and the admin API.
//!
//! | port | protocol | who may call |
//! |---|---|---|
//! | 15012/tcp | gRPC over TLS 1.3: ADS, `IstioCertificateService`, `tombolo.v1.Enrollment`, `tombolo.admin.v1`, `tombolo.federation.v1` | members by certificate or bearer token; enrolment by token and device key; discoveries of other clusters |
//! | admin.sock | gRPC: `tombolo.admin.v1` | root, own user, group tombolo-admin |
//! | 15014/tcp (loopback) | HTTP: metrics, debug; read-only | everybody on the host |
//! | 15021/tcp (loopback) | HTTP: readiness | everybody on the host |
//!
//! **Invariant:** every write is authorised by the one table in [`roles`], and leaves a line in the audit log.
//! **Invariant:** registry and liveness have one owner task; everybody else reads immutable snapshots.
//! **Invariant:** heartbeats and health never go into the store.
//! **Invariant:** what a subscriber costs is bounded: one response under way for each type, no queue.

pub mod address;
pub mod admin;
pub mod audit;
pub mod bearer;
pub mod caller;
pub mod certificate;
pub mod conditions;
pub mod config;
pub mod door;
pub mod enroll;
pub mod federation;
pub mod files;
pub mod fleet;
pub mod forwarders;
pub mod http;
pub mod init;
pub mod istio_ca;
pub mod limits;
pub mod listener;
pub mod members;
pub mod metrics;
pub mod nameless;
pub mod objects;
pub mod refusal;
pub mod roles;
pub mod server;
pub mod state;
pub mod telemetry;
pub mod trust;
pub mod xds;
