//! How well the scheduler packs: a trace of arrivals replayed on fleets of hosts, by its strategies and by other rules.
//!
//! Knows what a trace, a fleet and a figure are; what shall be reached is `cargo xtask bench packing`'s to say. The
//! scheduler is `master_core`'s own, through its public interface. Nothing here looks at a clock but for the time that
//! decisions take.
//!
//! - [`trace`]: arrivals, read from text
//! - [`fleet`]: hosts, and what is set aside on them
//! - [`rules`]: who chooses the host: the scheduler, or a full scan by another rule
//! - [`replay`]: filling up, coming and going, counting hosts

pub mod fleet;
pub mod replay;
pub mod rules;
pub mod trace;
