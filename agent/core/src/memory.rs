//! What an agent remembers between two plans, and how the outcome of an action changes it.
//!
//! [`TaskLocal`] and [`ImageUse`] are written to the ledger, so that restarts, their pauses and the words already
//! said survive the agent. [`Failure`]s are not: a new agent tries at once.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use skein_api::{TaskAddress, TaskId, TaskReport, TaskState, TaskStatus, UnixMillis};

use crate::{Action, ActionKey, ActionKind, Desired, Plan};

/// First pause after a failed action.
pub const FAILURE_PAUSE_MIN_MS: u64 = 1_000;
/// Longest pause after failed actions: 1 s doubled six times, cut.
pub const FAILURE_PAUSE_MAX_MS: u64 = 60_000;

/// Everything that is remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Tasks that are assigned, or whose container or addresses are still here. In the ledger.
    pub tasks: BTreeMap<TaskId, TaskLocal>,
    /// Images that we pulled, by reference. In the ledger.
    pub images: BTreeMap<String, ImageUse>,
    /// Actions that failed and wait. Not in the ledger.
    pub failures: BTreeMap<ActionKey, Failure>,
}

/// What is remembered of one task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskLocal {
    /// The run that `status` is about. Never less than the assignment's once that run began; more when the agent
    /// restarted the container by itself.
    pub run: u64,
    /// The assignment's `run` that this run answers: a higher one is a user's start. It may be less than `run`.
    pub assigned_run: u64,
    /// The last status that was reported.
    pub status: TaskStatus,
    /// We asked the container of this run to stop, and why.
    pub stopping: Option<StopReason>,
    /// `started_at` of the container when this run began: as long as it shows the same, this run has not started.
    pub prev_started: UnixMillis,
    /// The container of this run could not be made or started, for good.
    pub rejected: Option<String>,
    /// Restarts by policy since a user last started it.
    pub restarts: u32,
    /// Times of the last restarts by policy, oldest first; at most [`crate::restart::ATTEMPTS_KEPT_MAX`].
    pub restarted_at: Vec<UnixMillis>,
    /// Runs in a row that ended before they were stable.
    pub quick_ends: u32,
    /// The network side may hold addresses for it.
    pub reserved: bool,
    /// The addresses that were reserved.
    pub addresses: Vec<TaskAddress>,
}

impl TaskLocal {
    /// The same but for the words of `status.message`: such a change is not worth a write to disk.
    pub fn same_on_disk(&self, other: &Self) -> bool {
        let mut other = other.clone();
        other.status.message.clone_from(&self.status.message);
        *self == other
    }

    /// What the master is to be told.
    pub fn report(&self, task: &TaskId) -> TaskReport {
        TaskReport { task: task.clone(), run: self.run, status: self.status.clone() }
    }
}

/// Why a container is being stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// The master asked.
    Requested,
    /// The engine calls it unhealthy.
    Unhealthy,
    /// To be started again as the next run.
    Restart,
}

/// An image that we pulled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageUse {
    /// When a task or container last referred to it, to within [`crate::collect::IMAGE_TOUCH_MS`].
    pub last_used: UnixMillis,
}

/// An action that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What failed.
    pub kind: ActionKind,
    /// How often in a row.
    pub count: u32,
    /// Not tried before this time.
    pub not_before: UnixMillis,
    /// Why.
    pub message: String,
}

/// What an action brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Addresses that were reserved; none: unchanged.
    pub addresses: Option<Vec<TaskAddress>>,
    /// An image that was pulled for it, by reference.
    pub pulled: Option<String>,
}

/// Why an action failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActionError {
    /// With the values needed to act on it.
    pub message: String,
    /// Trying again cannot help: no such image, no such program, a port that is taken.
    pub fatal: bool,
}

/// Changes of what is on disk: `None` forgets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Updates {
    /// Tasks.
    pub tasks: BTreeMap<TaskId, Option<TaskLocal>>,
    /// Images.
    pub images: BTreeMap<String, Option<ImageUse>>,
}

impl Updates {
    /// No change.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty() && self.images.is_empty()
    }
}

/// The pause after the `count`th failure in a row: 1 s, 2 s, 4 s, … 60 s.
pub fn failure_pause_ms(count: u32) -> u64 {
    (FAILURE_PAUSE_MIN_MS << count.saturating_sub(1).min(16)).min(FAILURE_PAUSE_MAX_MS)
}

impl Memory {
    /// The last word about each task that is assigned: for a master that may not know it.
    pub fn reports(&self, desired: &Desired<'_>) -> Vec<TaskReport> {
        let assigned = self.tasks.iter().filter(|(task, _)| desired.task(task).is_some());
        assigned.map(|(task, local)| local.report(task)).collect()
    }

    /// Remembers what a plan says. Call it before the plan's actions begin.
    pub fn apply(&mut self, plan: &Plan) {
        self.update(&plan.updates);
    }

    fn update(&mut self, updates: &Updates) {
        for (id, local) in &updates.tasks {
            match local {
                Some(local) => {
                    self.tasks.insert(id.clone(), local.clone());
                }
                None => {
                    self.tasks.remove(id);
                    self.failures.remove(&ActionKey::Task(id.clone()));
                }
            }
        }
        for (image, used) in &updates.images {
            match used {
                Some(used) => {
                    self.images.insert(image.clone(), *used);
                }
                None => {
                    self.images.remove(image);
                    self.failures.remove(&ActionKey::Image(image.clone()));
                }
            }
        }
    }

    /// Takes the outcome of an action in. The answer is what to write to disk.
    pub fn record(&mut self, action: &Action, result: &Result<Outcome, ActionError>, now: UnixMillis) -> Updates {
        let mut updates = Updates::default();
        match result {
            Ok(outcome) => {
                self.failures.remove(&action.key());
                self.succeeded(action, outcome, now, &mut updates);
            }
            Err(error) => {
                if !(error.fatal && self.given_up(action, error, &mut updates)) {
                    let failure = self.failures.entry(action.key()).or_insert_with(|| Failure {
                        kind: action.kind(),
                        count: 0,
                        not_before: now,
                        message: String::new(),
                    });
                    failure.count = if failure.kind == action.kind() { failure.count.saturating_add(1) } else { 1 };
                    failure.kind = action.kind();
                    failure.not_before = now.plus_ms(failure_pause_ms(failure.count));
                    failure.message.clone_from(&error.message);
                }
            }
        }
        self.update(&updates);
        updates
    }

    fn succeeded(&self, action: &Action, outcome: &Outcome, now: UnixMillis, updates: &mut Updates) {
        if let Some(image) = &outcome.pulled {
            updates.images.insert(image.clone(), Some(ImageUse { last_used: now }));
        }
        match action {
            Action::CreateContainer { task } | Action::StartContainer { task, .. } => {
                if let (Some(local), Some(addresses)) = (self.tasks.get(task), &outcome.addresses)
                    && local.addresses != *addresses
                {
                    let local = TaskLocal { addresses: addresses.clone(), ..local.clone() };
                    updates.tasks.insert(task.clone(), Some(local));
                }
            }
            Action::ReleaseTask { task } => {
                if let Some(local) = self.tasks.get(task) {
                    let local = TaskLocal { reserved: false, ..local.clone() };
                    updates.tasks.insert(task.clone(), Some(local));
                }
            }
            Action::RemoveImage { image } => {
                updates.images.insert(image.clone(), None);
            }
            _ => {}
        }
    }

    /// Handles an error after which trying again is useless; false where there is nothing to give up.
    fn given_up(&mut self, action: &Action, error: &ActionError, updates: &mut Updates) -> bool {
        match action {
            Action::CreateContainer { task } | Action::StartContainer { task, .. } => {
                let Some(local) = self.tasks.get(task) else { return false };
                // A status that is terminal or Running already has its own end.
                if local.status.state >= TaskState::Running {
                    return false;
                }
                self.failures.remove(&action.key());
                let local = TaskLocal { rejected: Some(error.message.clone()), ..local.clone() };
                updates.tasks.insert(task.clone(), Some(local));
                true
            }
            Action::RemoveImage { image } => {
                // Somebody else uses it: then it is not ours to collect any more.
                updates.images.insert(image.clone(), None);
                true
            }
            _ => false,
        }
    }
}
