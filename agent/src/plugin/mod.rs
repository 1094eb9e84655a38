//! The engine's network plugin: Docker's remote network driver and IPAM driver on a unix socket.
//!
//! Owns: the protocol and its memory. Must not know: the kernel, the master; the engine is never asked from here.
//!
//! * [`wire`]: requests and replies as data. Pure.
//! * [`state`]: what the engine made, and what each request means. Pure; owned by the overlay's actor.
//! * [`socket`]: the listener, handed over or bound.
//! * [`server`]: HTTP, bounds and time limits.
//!
//! A request flows: connection's task → parsed → the actor's queue → [`state::PluginState::handle`] → changes to disk
//! → effects in the kernel → reply.

pub mod server;
pub mod socket;
pub mod state;
pub mod wire;

pub use server::PluginServer;
pub use socket::{DEFAULT_PLUGIN_SOCKET, LISTEN_FD_NAME, SocketError};
pub use state::{DRIVER, PluginEndpoint, PluginState};
