//! What crosses a wire: the native API's objects, requests and errors, and (feature `grpc`) the agent protocol.
//!
//! Types only, no logic beyond parsing and formatting. Objects are JSON with snake_case keys; fields that a reader
//! does not know are ignored and absent ones take their default, so neighbours of one release apart understand each
//! other. Quantities carry their unit in the name: `mem_bytes`, `nano_cpus` (1 CPU = 1,000,000,000), `*_ms`.

mod assignment;
#[cfg(feature = "client")]
pub mod client;
mod cluster;
mod error;
pub mod frame;
#[cfg(test)]
mod fuzz;
mod ids;
mod label;
pub mod mutant;
mod net;
mod net_check;
mod net_path;
mod network;
mod node;
mod spec;
mod stack;
mod task;
mod what_if;
mod words;

pub use assignment::*;
pub use cluster::*;
pub use error::*;
pub use ids::*;
pub use label::*;
pub use net::*;
pub use net_check::*;
pub use net_path::*;
pub use network::*;
pub use node::*;
pub use spec::*;
pub use stack::*;
pub use task::*;
pub use what_if::*;
pub use words::did_you_mean;

#[cfg(feature = "grpc")]
mod codec;
#[cfg(feature = "grpc")]
pub use codec::shed;
/// The agent protocol as generated from `proto/agent.proto`.
#[cfg(feature = "grpc")]
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all)]
pub mod grpc {
    tonic::include_proto!("skein.agent.v1");
}

/// Highest version of the agent protocol that this build speaks.
pub const AGENT_PROTOCOL: u32 = 1;

/// Default TCP port of a master: agents and remote users, mutual TLS only.
pub const DEFAULT_PORT: u16 = 7440;

/// Default unix socket of a master, for the local operator.
pub const DEFAULT_SOCKET: &str = "/run/skein/master.sock";
