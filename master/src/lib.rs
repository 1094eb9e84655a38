//! The master's shell: everything of `skein-master` that touches disk, network or clock. Decisions live in `master-core`.
//!
//! - [`cluster`]: the one loop; owns the core and writes the store
//! - [`store`]: typed objects with revisions, durable before anybody sees them
//! - [`server`]: listeners; [`tls`] and [`pki`]: who is at the other end
//! - [`agents`]: the agent protocol; [`http`]: the native API; [`broker`]: logs and exec between the two;
//!   [`ask`]: questions to agents; [`tunnels`]: checks of the ways between hosts
//! - [`config`]: file, environment, flags

pub mod agents;
pub mod ask;
pub mod broker;
pub mod cluster;
pub mod config;
#[cfg(test)]
mod fuzz;
pub mod http;
pub mod pki;
pub mod server;
pub mod stall;
pub mod store;
pub mod tls;
pub mod tunnels;
