//! What [`crate::reconcile`] looks at: desired and observed state, in the decision's own words.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use skein_api::{
    Assignment, Health, NetworkAssignment, NetworkId, PortPublish, ServiceId, TaskAddress, TaskAssignment, TaskId,
    UnixMillis,
};

use crate::{ActionKey, ActionKind};

/// The agent's ledger, and how far it may be trusted.
#[derive(Clone, Copy, Debug)]
pub struct Desired<'a> {
    /// All documents by [`Assignment::key`].
    pub assignments: &'a BTreeMap<String, Assignment>,
    /// The ledger was loaded whole and a master said, since this agent started, that it is complete. Until then
    /// nothing is removed for being unknown: an empty or old ledger must not cost a container.
    pub confirmed: bool,
}

impl<'a> Desired<'a> {
    /// Documents of one kind in the order of their ids: most documents of a host are peers and endpoints, which a plan
    /// does not look at. O(log n + those of the kind). `0` follows `/` in ASCII.
    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &'a Assignment> + use<'a> {
        self.assignments.range(format!("{kind}/")..format!("{kind}0")).map(|(_, document)| document)
    }

    /// Tasks in the order of their ids.
    pub fn tasks(&self) -> impl Iterator<Item = &'a TaskAssignment> + use<'a> {
        self.of_kind("task").filter_map(|a| match a {
            Assignment::Task(t) => Some(&**t),
            _ => None,
        })
    }

    /// Networks in the order of their ids.
    pub fn networks(&self) -> impl Iterator<Item = &'a NetworkAssignment> + use<'a> {
        self.of_kind("network").filter_map(|a| match a {
            Assignment::Network(n) => Some(n),
            _ => None,
        })
    }

    /// One task. O(log n).
    pub fn task(&self, id: &TaskId) -> Option<&'a TaskAssignment> {
        match self.assignments.get(&format!("task/{id}")) {
            Some(Assignment::Task(t)) => Some(t),
            _ => None,
        }
    }

    /// Whether a network is assigned. O(log n).
    pub fn has_network(&self, id: &NetworkId) -> bool {
        self.assignments.contains_key(&format!("network/{id}"))
    }
}

/// What the engine reports now, only of what carries this cluster's labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Containers by the engine's id.
    pub containers: BTreeMap<String, Container>,
    /// Networks by the cluster's id.
    pub networks: BTreeMap<NetworkId, EngineNetwork>,
    /// Actions that have begun and not ended. One object has at most one.
    pub in_flight: BTreeMap<ActionKey, ActionKind>,
    /// Tasks with a container of which the engine says nothing now, and said nothing before: nothing is decided about
    /// them, and nothing is removed that they may use.
    pub unseen: BTreeSet<TaskId>,
    /// What a running preparation is at: `pulling image: 12 of 40 MB`.
    pub progress: BTreeMap<TaskId, String>,
}

/// A container of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The engine's id.
    pub id: String,
    /// The task that its label names.
    pub task: TaskId,
    /// The service that its label names.
    pub service: Option<ServiceId>,
    /// Place within the service, from its label.
    pub slot: u32,
    /// Time between stop signal and SIGKILL when no assignment says it, from its label.
    pub stop_grace_ms: u64,
    /// Image reference that it was made from, as the user wrote it.
    pub image: String,
    /// Networks that its labels name.
    pub networks: BTreeSet<NetworkId>,
    /// Addresses in them, as the engine reports them while it runs; empty when not known.
    pub addresses: Vec<TaskAddress>,
    /// Published ports, with the host port that was taken.
    pub ports: Vec<PortPublish>,
    /// State.
    pub state: ContainerState,
    /// Of the last end; meaningless while it runs.
    pub exit_code: i64,
    /// The kernel killed it for memory.
    pub oom_killed: bool,
    /// What the engine says went wrong.
    pub error: Option<String>,
    /// Health, if it has a health check.
    pub health: Option<Health>,
    /// When it was made.
    pub created_at: UnixMillis,
    /// When it was last started; 0: never.
    pub started_at: UnixMillis,
    /// When it last ended; 0: never.
    pub finished_at: UnixMillis,
}

/// State of a container (Docker Engine API, `ContainerState.Status`; `restarting` cannot be: the engine's own restart
/// policy is always `no`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ContainerState {
    /// Made, never started.
    Created,
    /// Runs.
    Running,
    /// Frozen by somebody; counts as running.
    Paused,
    /// Ended.
    Exited,
    /// Ended and half removed: the engine failed to remove it.
    Dead,
    /// Being removed.
    Removing,
}

impl ContainerState {
    /// Has a process.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// A network of ours as the engine has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineNetwork {
    /// The engine's id.
    pub engine_id: String,
    /// Its name there.
    pub name: String,
}

/// The rules that the host's operator may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Remove images that we pulled after they were unused for this long; none: never.
    pub image_unused_ms: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { image_unused_ms: Some(crate::collect::IMAGE_UNUSED_MS) }
    }
}
