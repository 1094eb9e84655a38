//! The agent of a host: keeps its containers and its part of the overlay as the master wants them.
//!
//! A shell around `agent-core`, which decides: this package talks to the engine, the kernel, the disk and the master.
//! The map: `engine` drives the host's container engine, `ledger` keeps assignments on disk, `executor` runs the plans
//! of `agent-core`, `streams` serves logs and exec.
//! Towards the master: `session` keeps the one connection, `identity` is key and certificate, `host` says what this host
//! is, `config` what its operator wants.
//! The network side: `overlay` brings assignments to kernel and names, `plugin` answers the engine's network requests,
//! `dns` serves names, `fdstore` keeps their sockets over restarts, `inspect` answers people's questions about it.

pub mod attached;
pub mod config;
pub mod dns;
pub mod engine;
pub mod executor;
pub mod fdstore;
pub mod host;
pub mod identity;
pub mod inspect;
pub mod ledger;
pub mod overlay;
pub mod plugin;
pub mod session;
pub mod streams;
