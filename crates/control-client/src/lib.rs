//! Control client: how a node joins the mesh, stays in it and hears of it.
//!
//! Position: layer 4. Discovery's answers become one immutable [`tombolo_snapshot::Snapshot`] that the data path
//! reads, and the node's certificate in a [`tombolo_identity::LiveIdentity`]. [`State`] is what survives a restart:
//! device key, registration, certificate, roots and the last snapshot.
//!
//! ```no_run
//! # async fn join(text: &str) -> Result<(), Box<dyn std::error::Error>> {
//! use tombolo_control_client::{Claims, Enroller, State};
//! let state = State::open("/var/lib/tombolo/agent".as_ref(), None)?;
//! let token = tombolo_types::JoinToken::decode(text)?;
//! let enroller = Enroller::connect(&token).await?; // checks pin and exact identity before anything is said
//! let preflight = enroller.preflight().await?;
//! assert!(preflight.clock_problem().is_none());
//! let registration = enroller.enroll(&state, Claims::of_this_host()).await?;
//! println!("{} is {}", registration.workload_name, registration.identity);
//! # Ok(()) }
//! ```
//!
//! **Invariant:** nothing secret is said to a server before its exact identity is proven.
//! **Invariant:** the device key is never overwritten, moved or sent.
//! **Invariant:** a new TLS key is on disk, with its generation, before a request names it.

pub mod ads;
pub mod backoff;
mod certificates;
mod connect;
mod control;
mod enroll;
pub mod host;
pub mod probe;
mod problem;
mod push;
mod registration;
mod state;
mod status;

pub use certificates::renew;
pub use control::{Control, Inputs, Restored, follow, restore};
pub use enroll::{Claims, Enroller, GatewayClaims, Preflight, TokenFacts, leave};
pub use probe::Health;
pub use problem::Problem;
pub use push::MetricsPush;
pub use registration::{Registration, RegistrationError};
pub use state::{Pending, State, StateError};
pub use status::{ControlPath, ControlStatus};
