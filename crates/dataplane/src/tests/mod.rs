//! Two and more hosts in one process: real sockets and TLS on loopback addresses, held connections by hand.

mod hosts;
mod inbound;
mod names;
mod outbound;
mod through;
