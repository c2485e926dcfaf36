//! Real hosts on one machine: network namespaces with their own `/etc`, `/run`, `/var/lib` and `/var/log`, joined by
//! a router, and the applications that run on them. The netns and interop suites, the demo and the benchmark stand
//! on it.
//!
//! A [`Lab`] owns everything that it makes and removes it when it is dropped, also when a test panics. Nothing outside
//! the namespaces is changed: no file of the machine, no route, no rule.
//!
//! **Invariant:** loops are bounded by deadlines; nothing here talks to the internet.

mod apps;
mod clock;
mod envoy;
mod gateway;
mod host;
mod lab;
mod lan;
mod mesh;
mod process;
mod suite;
mod wan;

pub use apps::{EchoServer, Nginx, Postgres, Redis};
pub use clock::Clock;
pub use envoy::{
    envoy_client, envoy_double_client, envoy_east_west, envoy_server, envoy_sidecar_client,
    envoy_sidecar_server,
};
pub use gateway::Gateway;
pub use host::Host;
pub use lab::{Lab, Shape};
pub use lan::Lan;
pub use mesh::{Mesh, MeshOptions, Vm};
pub use process::{Output, Process};
pub use suite::{binaries, envoy, require_root, skip, wait_for};
pub use wan::{Wan, WanCount, WanOptions, enter, in_namespace};
