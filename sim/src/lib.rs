//! A deterministic simulation of a whole cluster: one world, one seed, one thread.
//!
//! The decisions are the ones that ship: `master_core` (leader, scheduler, orchestrator, dispatch) and `agent_core`
//! (reconcile, assignments, outbox, leases, back-off). Below them are models of what they run on: engine, disk, clock,
//! network, processes. Nothing here knows tokio, a socket or the real time, so a seed and a commit say everything.
//!
//! - [`world`]: the queue, the clock, the packets; start here
//! - `master`, `host`, `agents`: the two processes' shells
//! - `engine`, `net`: models of what is below them; `kernel`: netlib on its typed kernel, on some of the hosts
//! - `store`, `version`: the master's disk; releases side by side
//! - `users`, [`faults`]: what is asked for, what goes wrong
//! - `check`: what must hold
//! - [`shrink`]: the fewest faults that still break it

mod agents;
mod check;
mod engine;
pub mod faults;
mod host;
mod kernel;
mod master;
mod net;
mod queue;
mod random;
pub mod shrink;
mod store;
mod trace;
mod users;
mod version;
pub mod world;

pub use trace::Verdict;
pub use users::Arrival;
