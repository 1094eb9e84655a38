//! A fleet: thousands of agents in one process, against a real master.
//!
//! Every agent has a key and a certificate of its own, joins with a real token, and keeps a session of the real
//! protocol over a TLS connection of its own. Its decisions are `agent_core::reconcile`'s; only what the decisions are
//! about, an engine with its containers, is a model. So what a master is measured and tested with at 10,000 hosts is
//! what it has to do for 10,000 hosts.
//!
//! - [`host`]: one host's desired state, its model engine and its plans; pure
//! - [`agent`]: one agent's identity and session
//! - [`fleet`]: all of them, and what they count
//! - [`users`]: many users of the API at once

pub mod agent;
pub mod fleet;
pub mod host;
pub mod users;
