//! Stacks: what one compose file describes, and the plan that applying it makes.

use serde::{Deserialize, Serialize};

use crate::{NetworkSpec, ServiceSpec};

/// What one compose file describes. All names are the cluster's already (`<stack>_<name>`), except external ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StackSpec {
    /// Name of the stack (Compose: project name).
    pub name: String,
    /// Its networks.
    pub networks: Vec<NetworkSpec>,
    /// Networks that must be there already, by name.
    pub external_networks: Vec<String>,
    /// Its named volumes.
    pub volumes: Vec<String>,
    /// Its services.
    pub services: Vec<ServiceSpec>,
}

/// A request to apply a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StackApply {
    /// What shall be.
    pub stack: StackSpec,
    /// Remove services and networks of the stack that are not in it.
    pub remove_orphans: bool,
    /// Only plan.
    pub dry_run: bool,
}

/// What happens, or would happen, to one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlanAction {
    /// Made.
    Create,
    /// Changed in a way that replaces its containers.
    Recreate,
    /// Changed without touching its containers (replicas, labels of the service).
    Update,
    /// Left alone.
    Keep,
    /// Removed.
    Remove,
    /// In the cluster but not in the file; stays without `--remove-orphans`.
    Orphan,
}

/// One line of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanItem {
    /// `service`, `network` or `volume`.
    pub kind: String,
    /// Name in the cluster.
    pub name: String,
    /// What happens.
    pub action: PlanAction,
    /// What differs: `image: a -> b`.
    #[serde(default)]
    pub differences: Vec<String>,
}

/// What applying a stack does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StackPlan {
    /// One line per object, sorted by kind and name.
    pub items: Vec<PlanItem>,
    /// What the user should know: a constraint that no node meets now, …
    pub warnings: Vec<String>,
}
