//! The pure core of the master: given the state, a request and the time, what changes.
//!
//! Knows no tokio, no socket, no file and no clock, iterates over no hash map, and takes its randomness as a seed: the
//! same calls give the same changes, in production, in a simulation and in a question about "what if".
//!
//! - [`model`]: the objects and lookups over them
//! - [`core`]: the verbs: execute, settle, take what was staged, take what agents are to be told
//! - [`leader`]: a term of office: sessions, turns, what may be said when
//! - `admit`, `workloads`, `networks`, `reports`: what each request changes
//! - `addresses`: who gives out which addresses of a network
//! - `orchestrator`: what follows from it: tasks, replacements, removal
//! - `pending`: nodes for the tasks that wait for one; `starved`: global services that miss a task on a node
//! - `preempt`: room for those that count more
//! - [`scheduler`]: filters and strategies over bitset indexes
//! - [`dispatch`]: the documents of each agent
//! - `readiness`: who must have heard of a task before it starts
//! - `drain`: who must have heard that a task stops before it does
//! - `ingress`: ports of every host
//! - `what_if`: the same on a copy, for questions; [`sketch`]: what the copy is made from
//! - [`liveness`]: who is heard of; `loss`: which of the silent ones are given up, and how fast

mod addresses;
mod admit;
mod check;
pub mod command;
pub mod core;
pub mod dispatch;
mod drain;
mod ingress;
pub mod leader;
pub mod liveness;
mod lookup;
mod loss;
mod meta;
pub mod model;
mod networks;
mod orchestrator;
mod pending;
mod placement;
mod preempt;
mod readiness;
mod reports;
pub mod rng;
pub mod scheduler;
pub mod sketch;
mod starved;
mod vips;
mod what_if;
mod workloads;

pub use crate::{
    admit::check_clock,
    command::{Command, Context, Now, Reply},
    core::{Core, Settings},
};
