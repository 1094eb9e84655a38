//! What [`crate::reconcile`] answers: actions, reports, what to remember, when to look again.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use skein_api::{NetworkId, TaskId, TaskReport, UnixMillis};

use crate::Updates;

/// The object of an action. At most one action is in flight per key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ActionKey {
    /// A network.
    Network(NetworkId),
    /// A task, its container and its addresses.
    Task(TaskId),
    /// An image, by reference.
    Image(String),
}

/// The kind of an [`Action`], without its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ActionKind {
    /// [`Action::EnsureEngineNetwork`].
    EnsureEngineNetwork,
    /// [`Action::CreateContainer`].
    CreateContainer,
    /// [`Action::StartContainer`].
    StartContainer,
    /// [`Action::StopContainer`].
    StopContainer,
    /// [`Action::RemoveContainer`].
    RemoveContainer,
    /// [`Action::ReleaseTask`].
    ReleaseTask,
    /// [`Action::RemoveEngineNetwork`].
    RemoveEngineNetwork,
    /// [`Action::RemoveImage`].
    RemoveImage,
}

/// One step. It leaves its executor no choice, is idempotent, and is tried once: when it fails, the next plan says
/// what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Make the engine's network for an overlay network.
    EnsureEngineNetwork {
        /// The network.
        network: NetworkId,
    },
    /// Have the image (pull it if it is not there), reserve addresses and ports, make the container.
    CreateContainer {
        /// The task.
        task: TaskId,
    },
    /// Attach the networks that are still missing and start.
    StartContainer {
        /// The task.
        task: TaskId,
        /// The engine's id.
        container: String,
    },
    /// Stop signal, and SIGKILL when the grace is over.
    StopContainer {
        /// The task.
        task: TaskId,
        /// The engine's id.
        container: String,
        /// Time between the two.
        grace_ms: u64,
    },
    /// Remove a container that does not run, with its anonymous volumes.
    RemoveContainer {
        /// The task.
        task: TaskId,
        /// The engine's id.
        container: String,
    },
    /// Give the task's addresses back.
    ReleaseTask {
        /// The task.
        task: TaskId,
    },
    /// Remove the engine's network.
    RemoveEngineNetwork {
        /// The network.
        network: NetworkId,
        /// The engine's id.
        engine_id: String,
    },
    /// Remove an image that we pulled and nobody used for long.
    RemoveImage {
        /// Its reference.
        image: String,
    },
}

impl Action {
    /// The object that it is about.
    pub fn key(&self) -> ActionKey {
        match self {
            Self::EnsureEngineNetwork { network } | Self::RemoveEngineNetwork { network, .. } => {
                ActionKey::Network(network.clone())
            }
            Self::CreateContainer { task }
            | Self::StartContainer { task, .. }
            | Self::StopContainer { task, .. }
            | Self::RemoveContainer { task, .. }
            | Self::ReleaseTask { task } => ActionKey::Task(task.clone()),
            Self::RemoveImage { image } => ActionKey::Image(image.clone()),
        }
    }

    /// Its kind.
    pub fn kind(&self) -> ActionKind {
        match self {
            Self::EnsureEngineNetwork { .. } => ActionKind::EnsureEngineNetwork,
            Self::CreateContainer { .. } => ActionKind::CreateContainer,
            Self::StartContainer { .. } => ActionKind::StartContainer,
            Self::StopContainer { .. } => ActionKind::StopContainer,
            Self::RemoveContainer { .. } => ActionKind::RemoveContainer,
            Self::ReleaseTask { .. } => ActionKind::ReleaseTask,
            Self::RemoveEngineNetwork { .. } => ActionKind::RemoveEngineNetwork,
            Self::RemoveImage { .. } => ActionKind::RemoveImage,
        }
    }
}

/// The answer of [`crate::reconcile`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Steps in order; each has a key of its own, so they may run side by side.
    pub actions: Vec<Action>,
    /// Actions in flight that nobody wants any more: a pull or a start of a task that is to stop. They are cut off;
    /// what they did until then is observed.
    pub cancel: BTreeSet<ActionKey>,
    /// One report per task whose status changed.
    pub reports: Vec<TaskReport>,
    /// What to remember before the actions begin.
    pub updates: Updates,
    /// Look again at this time at the latest, even if nothing happens: a pause or a back-off is over then.
    pub wake_at: Option<UnixMillis>,
}

impl Plan {
    /// Nothing to do and nothing to say.
    pub fn is_empty(&self) -> bool {
        self.actions.is_empty() && self.cancel.is_empty() && self.reports.is_empty() && self.updates.is_empty()
    }

    /// Makes sure that `wake_at` is not later than `at`.
    pub(crate) fn wake(&mut self, at: UnixMillis) {
        self.wake_at = Some(self.wake_at.map_or(at, |w| w.min(at)));
    }
}
