//! Services and tasks as the cluster keeps them.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{Meta, NetworkId, NodeId, PortPublish, ServiceId, ServiceSpec, TaskId, TaskSpec, UnixMillis, VolumeId};

/// A service as the cluster keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Identity.
    pub id: ServiceId,
    /// Common fields; `generation` counts changes of `spec`.
    pub meta: Meta,
    /// What the user asked for.
    pub spec: ServiceSpec,
    /// Its virtual addresses, in the order of its networks. None in a network whose addresses do not suffice, and none
    /// at all with the endpoint mode `dnsrr`: there its name finds its tasks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vips: Vec<Vip>,
}

/// A virtual address: it belongs to a service for as long as that is there, and to no host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vip {
    /// The network.
    pub network: NetworkId,
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address that belongs to it ([`crate::address6`]).
    pub v6: Ipv6Addr,
}

/// State of a task, in the order in which they are passed (swarmkit's states). States only go forward within a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Made, nothing allocated yet.
    #[default]
    New,
    /// Waits for a node that fits, or for what it depends on.
    Pending,
    /// Has a node.
    Assigned,
    /// The agent has it in its ledger.
    Accepted,
    /// The agent pulls the image and makes the container.
    Preparing,
    /// Container made, network wired; waits for the start.
    Ready,
    /// Being started.
    Starting,
    /// Runs; with a health check: is healthy.
    Running,
    /// Ended by itself with 0.
    Complete,
    /// Ended because it was asked to.
    Shutdown,
    /// Ended by itself with an error.
    Failed,
    /// Could not be started.
    Rejected,
    /// As a desired state: to be removed altogether. As an observed one: removed.
    Remove,
    /// Its node was lost or removed.
    Orphaned,
}

impl TaskState {
    /// No container runs any more in this state, and none will.
    pub fn is_terminal(self) -> bool {
        self > Self::Running
    }
}

/// Health of a running container (Docker Engine API).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Within its start period.
    Starting,
    /// Last check passed.
    Healthy,
    /// Too many checks in a row failed.
    Unhealthy,
}

/// What the agent saw of a task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskStatus {
    /// Observed state.
    pub state: TaskState,
    /// Since when, by the clock of who says it.
    pub since: UnixMillis,
    /// In a few words: `pulling image`, `exited with 1`.
    pub message: String,
    /// What went wrong, if something did.
    pub err: Option<String>,
    /// The engine's id of the container.
    pub container_id: Option<String>,
    /// Exit code, once it ended.
    pub exit_code: Option<i64>,
    /// The kernel killed it for memory.
    pub oom_killed: bool,
    /// Health, if it has a health check.
    pub health: Option<Health>,
    /// Addresses in overlay networks.
    pub addresses: Vec<TaskAddress>,
    /// Published ports, with the host port that was really taken.
    pub ports: Vec<PortPublish>,
}

/// Address of a task in one network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskAddress {
    /// The network.
    pub network: NetworkId,
    /// IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

/// One container on one host.
///
/// A *service task* is one-shot: replaced, never restarted. A *container task* has no service; it keeps its id and
/// file system over stop and start, and `run` counts its starts: states go forward within one run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Task {
    /// Identity.
    pub id: TaskId,
    /// Common fields.
    pub meta: Meta,
    /// Unique in the cluster: `<service>.<slot>` (or `.<node name>` for a global one), or the user's choice.
    /// Service tasks of one slot share it; at most one of them is live.
    pub name: String,
    /// Ids of the generic resources that it got on its node, by kind; kinds without ids are absent.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub generic: BTreeMap<String, Vec<String>>,
    /// Its service, if it has one.
    pub service: Option<ServiceId>,
    /// Stack of its service, if it has one; known also when the service is gone.
    pub stack: Option<String>,
    /// Place within the service, from 1; 0 for container tasks and global services.
    pub slot: u32,
    /// What to run. Shared: the tasks of a service have one copy, and so have a task's states from one to the next.
    pub spec: Arc<TaskSpec>,
    /// Generation of the service specification that this was made from.
    pub spec_generation: u64,
    /// Where it runs.
    pub node: Option<NodeId>,
    /// Where it shall get to: `Running`, `Shutdown` or `Remove`.
    pub desired_state: TaskState,
    /// Where it is.
    pub status: TaskStatus,
    /// Counts the starts of a container task, from 1.
    pub run: u64,
    /// Not before this time; the pause between restarts.
    pub not_before: UnixMillis,
    /// How many tasks of this slot ended before this one within the restart policy's window; 0 for the first.
    pub attempt: u32,
    /// Start of that window.
    pub attempts_since: UnixMillis,
}

/// A named volume, local to the host that made it first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Volume {
    /// Identity.
    pub id: VolumeId,
    /// Common fields.
    pub meta: Meta,
    /// Unique in the cluster; of a stack: `<stack>_<volume>`.
    pub name: String,
    /// Stack that made it.
    pub stack: Option<String>,
    /// Where it lives. Tasks that mount it run there.
    pub node: NodeId,
}
