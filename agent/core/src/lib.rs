//! What an agent decides: the pure half of the agent.
//!
//! [`reconcile`] compares what a master wants of this host with what its engine reports and returns a [`Plan`]: the
//! actions that bring the one to the other, the reports that the master shall get, and what to remember. It owns the
//! state machine of tasks ([`state`]), the restart policy of container tasks ([`restart`]) and the rules by which
//! ended containers and unused images are collected ([`collect`]).
//!
//! It must not know: tokio, a clock, a disk, the engine's API. Time is an argument, every order is total, and the
//! shell does exactly what the plan says.

pub mod collect;
mod memory;
mod plan;
mod reconcile;
pub mod restart;
pub mod state;
mod view;

pub use memory::{
    ActionError, FAILURE_PAUSE_MAX_MS, FAILURE_PAUSE_MIN_MS, Failure, ImageUse, Memory, Outcome, StopReason, TaskLocal,
    Updates, failure_pause_ms,
};
pub use plan::{Action, ActionKey, ActionKind, Plan};
pub use reconcile::reconcile;
pub use view::{Container, ContainerState, Desired, EngineNetwork, Observed, Settings};
