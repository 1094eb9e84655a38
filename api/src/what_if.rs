//! Questions to a copy of the cluster, and their answers.

use serde::{Deserialize, Serialize};

use crate::{Resources, StackApply, StackPlan};

/// Most hosts that a question may add.
pub const WHAT_IF_NODES_MAX: u32 = 1_000;

/// What would happen if.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhatIf {
    /// These hosts failed for good; by name, id or prefix.
    NodeDown(Vec<String>),
    /// These hosts were drained.
    Drain(Vec<String>),
    /// Hosts joined that are like one that is there.
    AddNode {
        /// Name, id or prefix of the one.
        like: String,
        /// How many: 1 to [`WHAT_IF_NODES_MAX`].
        count: u32,
    },
    /// A stack was applied.
    Up(Box<StackApply>),
}

/// What would happen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WhatIfAnswer {
    /// One sentence.
    pub summary: String,
    /// Tasks that would be elsewhere, new, gone or without a place, by name.
    pub tasks: Vec<WhatIfTask>,
    /// Nodes that would have other tasks, by name.
    pub nodes: Vec<WhatIfNode>,
    /// For whom room would be made by stopping tasks that count less, one sentence each, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rooms: Vec<String>,
    /// What applying the stack would change.
    pub plan: Option<StackPlan>,
}

/// One task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WhatIfTask {
    /// Its name.
    pub name: String,
    /// Where it is; none when it is new or waits.
    pub from: Option<String>,
    /// Where it would be; none when it would wait or be gone.
    pub to: Option<String>,
    /// Why it would wait, or what else is to say.
    pub message: String,
}

/// One node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WhatIfNode {
    /// Its name.
    pub name: String,
    /// Live tasks now.
    pub tasks_before: u32,
    /// Live tasks then.
    pub tasks_after: u32,
    /// What is set aside now.
    pub reserved_before: Resources,
    /// What would be set aside then.
    pub reserved_after: Resources,
    /// What may be set aside.
    pub offered: Resources,
}
