//! What an agent decides: the pure half of the agent.
//!
//! [`reconcile`] compares what a master wants of this host with what its engine reports and returns a [`Plan`]: the
//! actions that bring the one to the other, the reports that the master shall get, and what to remember. It owns the
//! state machine of tasks ([`state`]), the restart policy of container tasks ([`restart`]), the rules by which ended
//! containers and unused images are collected ([`collect`]), and how much runs at a time ([`mod@admit`]). Beside it: what a
//! master's words do to this host's documents ([`Assignments`]), what a session says and when ([`session`]), and who has
//! which address of this host's blocks ([`lease`]).
//!
//! It must not know: tokio, a clock, a disk, the engine's API. Time is an argument, every order is total, and the
//! shell does exactly what the plan says.

pub mod admit;
mod assignments;
pub mod collect;
pub mod lease;
mod memory;
mod plan;
mod reconcile;
pub mod restart;
pub mod session;
pub mod state;
mod view;

pub use assignments::{AssignmentChange, Assignments, Head, Mismatch};
pub use memory::{
    ActionError, FAILURE_PAUSE_MAX_MS, FAILURE_PAUSE_MIN_MS, Failure, ImageUse, Memory, Outcome, StopReason, TaskLocal,
    Updates, failure_pause_ms,
};
pub use plan::{Action, ActionKey, ActionKind, Plan};
pub use reconcile::reconcile;
pub use view::{Container, ContainerState, Desired, EngineNetwork, Observed, Settings};
