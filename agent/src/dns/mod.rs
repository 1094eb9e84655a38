//! The agent's name server: container and service names of the cluster for the containers of this host.
//!
//! Owns: zone, messages, sockets' loops, forwarding. Must not know: the engine, the kernel, the master. The overlay's
//! actor opens the sockets inside each network's namespace and publishes zones.
//!
//! * [`zone`]: what names mean, an immutable table. Pure.
//! * [`message`]: one packet in, one decision out. Pure.
//! * [`upstream`]: the host's resolvers.
//! * [`server`]: sockets, tasks and bounds.
//!
//! Decisions: a shared name of which nobody is healthy is NODATA, not NXDOMAIN (clients cache the latter, and the name
//! exists). From internal networks nothing is forwarded, and the answer is NXDOMAIN rather than REFUSED: clients give up
//! at once instead of asking again. Over a bound or without a resolver: SERVFAIL at once, since a resolver that times
//! out costs its clients ten seconds.

#[cfg(test)]
mod fuzz;
pub mod message;
pub mod server;
pub mod upstream;
pub mod zone;

pub use server::{DnsCounters, DnsServer, Serving};
pub use upstream::UpstreamSource;
pub use zone::Zone;
