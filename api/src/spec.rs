//! What a user asks for: container, task and service specifications, in the words of Docker's swarm mode.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

use crate::{NetworkId, Resources};

/// How long a container gets between its stop signal and SIGKILL unless it says otherwise (Docker's default).
pub const DEFAULT_STOP_GRACE_MS: u64 = 10_000;

/// One container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSpec {
    /// Image reference as a user writes it.
    pub image: String,
    /// Replaces the image's entry point; an empty list clears it.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Option<Vec<String>>,
    /// Environment, sorted by name. `None` unsets a variable of the image.
    pub env: BTreeMap<String, Option<String>>,
    /// Labels of the container.
    pub labels: BTreeMap<String, String>,
    /// Host name inside; default is the engine's.
    pub hostname: Option<String>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Working directory.
    pub working_dir: Option<String>,
    /// `os/architecture[/variant]` that the image is for; none: whatever the host has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Namespaces of other services or container tasks that it shares; they run on the same host.
    #[serde(skip_serializing_if = "Namespaces::is_empty")]
    pub share: Namespaces<String>,
    /// All capabilities and devices of the host.
    pub privileged: bool,
    /// Read-only root file system.
    pub read_only: bool,
    /// Run an init that reaps children.
    pub init: Option<bool>,
    /// Allocate a terminal.
    pub tty: bool,
    /// Keep standard input open.
    pub stdin_open: bool,
    /// Capabilities to add.
    pub cap_add: Vec<String>,
    /// Capabilities to drop.
    pub cap_drop: Vec<String>,
    /// Devices that a driver of the engine gives it; how many is said by `resources.generic`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceRequest>,
    /// Lines for `/etc/hosts`: `name:address`.
    pub extra_hosts: Vec<String>,
    /// Volumes, binds and tmpfs.
    pub mounts: Vec<Mount>,
    /// Take the volumes of these services or container tasks; they run on the same host.
    pub volumes_from: Vec<VolumesFrom>,
    /// Names by which other services are known inside; they run on the same host.
    pub links: Vec<Link>,
    /// Signal that asks the container to stop; default is the image's, then SIGTERM.
    pub stop_signal: Option<String>,
    /// Time between the stop signal and SIGKILL; default [`DEFAULT_STOP_GRACE_MS`].
    pub stop_grace_ms: Option<u64>,
    /// How the engine finds out whether the container is healthy.
    pub healthcheck: Option<Healthcheck>,
    /// Name that the user chose for the container; unique in the cluster, so at most one replica.
    pub container_name: Option<String>,
    /// Ports that the container listens on without publishing them (documentation).
    pub expose: Vec<String>,
}

/// Something mounted into a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What it is.
    pub kind: MountKind,
    /// Volume name or host path; none for an anonymous volume and for tmpfs.
    #[serde(default)]
    pub source: Option<String>,
    /// Absolute path inside.
    pub target: String,
    /// Mount read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Size limit of a tmpfs.
    #[serde(default)]
    pub tmpfs_size_bytes: Option<u64>,
    /// Driver of a volume that is made for this; none: the engine's own, `local`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_driver: Option<String>,
}

/// The kinds of [`Mount`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// A named or anonymous volume of the engine, local to the host.
    Volume,
    /// A path of the host.
    Bind,
    /// Memory.
    Tmpfs,
}

/// Devices of one kind that a driver of the engine gives to a container (Docker Engine API, `DeviceRequest`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceRequest {
    /// The kind of generic resource under which they are counted; ids of that kind are the driver's ids.
    pub kind: String,
    /// The driver; empty: whichever has the capabilities.
    pub driver: String,
    /// What they must be able to do, all of it: `gpu`.
    pub capabilities: Vec<String>,
    /// For the driver.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
}

/// `volumes_from`: whose volumes, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumesFrom {
    /// Name of a service of the same stack, or of a container task.
    pub from: String,
    /// Mount them read-only.
    #[serde(default)]
    pub read_only: bool,
}

/// `links`: a service on the same host, by another name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Name of the service or container task.
    pub target: String,
    /// The name inside.
    pub alias: String,
}

/// Whose namespaces a container shares instead of having its own (`network_mode: service:x`, `pid`, `ipc`); `T` names
/// the other one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespaces<T> {
    /// Interfaces, addresses and ports.
    pub network: Option<T>,
    /// Processes.
    pub pid: Option<T>,
    /// Shared memory and queues.
    pub ipc: Option<T>,
}

impl<T> Default for Namespaces<T> {
    fn default() -> Self {
        Self { network: None, pid: None, ipc: None }
    }
}

impl<T> Namespaces<T> {
    /// Nothing is shared.
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// What is shared, by the Compose specification's key, with whom.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &T)> {
        let all = [("network_mode", &self.network), ("pid", &self.pid), ("ipc", &self.ipc)];
        all.into_iter().filter_map(|(key, with)| Some((key, with.as_ref()?)))
    }

    /// The same for others by which these are known; none for what `find` does not know.
    pub fn map<U>(&self, mut find: impl FnMut(&T) -> Option<U>) -> Namespaces<U> {
        let mut one = |with: &Option<T>| with.as_ref().and_then(&mut find);
        Namespaces { network: one(&self.network), pid: one(&self.pid), ipc: one(&self.ipc) }
    }
}

/// A health check, run by the engine (Docker Engine API, `HealthConfig`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Healthcheck {
    /// `["CMD", …]`, `["CMD-SHELL", line]` or `["NONE"]`; empty inherits the image's.
    pub test: Vec<String>,
    /// Between two checks; 0 inherits.
    pub interval_ms: u64,
    /// Of one check; 0 inherits.
    pub timeout_ms: u64,
    /// Failures that do not count after the start; 0 inherits.
    pub start_period_ms: u64,
    /// Failures in a row until unhealthy; 0 inherits.
    pub retries: u32,
}

/// When an ended task is replaced (service) or started again (container task).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartCondition {
    /// Never.
    None,
    /// When it failed.
    OnFailure,
    /// Always.
    #[default]
    Any,
}

/// Restart policy (Docker swarm-mode words and defaults).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RestartPolicy {
    /// When.
    pub condition: RestartCondition,
    /// Pause before each attempt; default 5 s.
    pub delay_ms: u64,
    /// Attempts within `window_ms`; none means no limit.
    pub max_attempts: Option<u32>,
    /// Over which time attempts are counted; 0 means for ever.
    pub window_ms: u64,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self { condition: RestartCondition::Any, delay_ms: 5_000, max_attempts: None, window_ms: 0 }
    }
}

/// Where a task may run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Placement {
    /// Expressions in either spelling: `node.labels.disk==ssd`, `constraint:disk==ssd`; see docs/scheduling.md.
    pub constraints: Vec<String>,
    /// `affinity:` expressions.
    pub affinities: Vec<String>,
    /// Sets of node names of which each must hold the task's node: `node==a|b|c`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub whitelists: Vec<String>,
    /// Over what the tasks of a service are spread, the first before the next; at most [`PREFERENCES_MAX`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub preferences: Vec<Preference>,
    /// Network plugins that the engine must have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub network_plugins: Vec<String>,
    /// How to choose among the nodes that fit; none takes the cluster's default.
    pub strategy: Option<Strategy>,
    /// At most this many tasks of the service on one node; 0 means no limit.
    pub max_replicas_per_node: u32,
    /// What counts more is placed first; -[`PRIORITY_MAX`] to [`PRIORITY_MAX`].
    #[serde(skip_serializing_if = "is_zero")]
    pub priority: i32,
    /// Whether tasks of services of a lower priority may be stopped to make room. Of services only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub preempt: bool,
}

/// Largest priority of a service, up and down.
pub const PRIORITY_MAX: i32 = 1_000;

fn is_zero(number: &i32) -> bool {
    *number == 0
}

/// Most preferences of one service: a site, a zone and a rack, with one to spare.
pub const PREFERENCES_MAX: usize = 4;

/// Over what the tasks of a service are spread (Docker swarm mode, `--placement-pref`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preference {
    /// Evenly over the values of this key of a constraint: `node.labels.zone`.
    Spread(String),
}

/// How to choose among the nodes that fit (Docker Swarm's words).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The emptiest node.
    #[default]
    Spread,
    /// The fullest node.
    Binpack,
    /// Any, by a seeded choice.
    Random,
}

/// Reservations steer placement, limits are enforced by the engine. 0 means none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourceRequirements {
    /// Set aside on the node.
    pub reservations: Resources,
    /// Not to be exceeded.
    pub limits: Resources,
    /// Generic resources set aside on the node, by kind; 0 counts as absent.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub generic: BTreeMap<String, u64>,
}

/// Transport protocol of a published port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// Most ports that one task publishes: more would make maps of the host's rules that take the kernel seconds to replace.
pub const PORTS_MAX: usize = 4_096;

/// A port of the container on the host that runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortPublish {
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
    /// Port inside.
    pub container_port: u16,
    /// Port of the host; 0 lets the agent choose a free one of 32768 to 60999.
    #[serde(default)]
    pub host_port: u16,
    /// Address of the host; none means all.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
}

/// A port of every host of the cluster that leads to the tasks of a service, here or elsewhere (Docker swarm mode's
/// publishing mode `ingress`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IngressPort {
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
    /// Port of the hosts, 1 to 65535; no other service and no container has it anywhere.
    pub published: u16,
    /// Port inside.
    pub target: u16,
}

/// A network that a task is attached to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkAttachment {
    /// Name or id of the network.
    pub network: String,
    /// Further names of the task in that network's DNS.
    pub aliases: Vec<String>,
    /// The address that the task shall have there; none: the next free one of its host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// The same as IPv6. Both families share their offset in the subnet ([`crate::address6`]), so this one must be the
    /// one that belongs to `ipv4`, or says it alone. The master keeps `ipv4` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
}

/// One task: a container and what the cluster must know about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskSpec {
    /// The container.
    pub container: ContainerSpec,
    /// Reservations and limits.
    pub resources: ResourceRequirements,
    /// What happens when it ends.
    pub restart: RestartPolicy,
    /// Where it may run.
    pub placement: Placement,
    /// Networks, in the order in which they become interfaces; none: the engine's default bridge.
    pub networks: Vec<NetworkAttachment>,
    /// Published ports.
    pub ports: Vec<PortPublish>,
}

impl TaskSpec {
    /// How it is attached to a network that it names by id.
    pub fn attachment(&self, network: &NetworkId) -> Option<&NetworkAttachment> {
        self.networks.iter().find(|a| a.network == network.as_str())
    }
    /// The address that it shall have in a network that it names by id, if it shall have a certain one.
    pub fn static_address(&self, network: &NetworkId) -> Option<Ipv4Addr> {
        self.attachment(network)?.ipv4
    }
}

/// How many tasks a service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceMode {
    /// This many.
    Replicated(u32),
    /// One on every node that fits.
    Global,
}

impl Default for ServiceMode {
    fn default() -> Self {
        Self::Replicated(1)
    }
}

/// How the name of a service finds its tasks (Docker swarm mode's words).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointMode {
    /// By one virtual address in each of its networks, behind which connections are spread over the tasks.
    #[default]
    Vip,
    /// By the addresses of all tasks.
    Dnsrr,
}

/// In which order a task of a service is replaced (Docker swarm mode's words).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateOrder {
    /// It stops, then its successor starts.
    #[default]
    StopFirst,
    /// Its successor starts, and when that is served (it runs and is healthy), it stops. For a while there are two.
    StartFirst,
}

/// How the tasks of a service follow a change of it (Compose specification, `deploy.update_config`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateConfig {
    /// Of one task; also when its node is drained.
    pub order: UpdateOrder,
    /// Tasks at a time; 0: all.
    pub parallelism: u32,
    /// From when a task is served to the next one, where there is a bound; at most [`UPDATE_DELAY_MS_MAX`].
    pub delay_ms: u64,
}

/// Longest pause between two tasks of an update: a day.
pub const UPDATE_DELAY_MS_MAX: u64 = 86_400_000;

impl UpdateConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Time that open connections of a task get before it is told to stop, unless its service says otherwise.
pub const DEFAULT_DRAIN_MS: u64 = 5_000;

/// Longest such time: an hour.
pub const DRAIN_MS_MAX: u64 = 3_600_000;

impl EndpointMode {
    fn is_vip(&self) -> bool {
        *self == Self::Vip
    }
}

/// Condition of a dependency (Compose specification, `depends_on`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DependencyCondition {
    /// All its tasks run.
    #[default]
    ServiceStarted,
    /// All its tasks are healthy.
    ServiceHealthy,
    /// All its tasks ended with 0.
    ServiceCompletedSuccessfully,
}

/// A service that must be there first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dependency {
    /// Full name of the service in the cluster (`<stack>_<service>`).
    pub service: String,
    /// What to wait for.
    pub condition: DependencyCondition,
}

/// A service: a task specification and how many of it shall run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceSpec {
    /// Unique in the cluster; services of a stack are `<stack>_<service>`.
    pub name: String,
    /// Labels of the service.
    pub labels: BTreeMap<String, String>,
    /// Stack that it belongs to.
    pub stack: Option<String>,
    /// Name within the stack: its DNS name in the stack's networks. Empty: same as `name`.
    pub short_name: String,
    /// Each task.
    pub task: TaskSpec,
    /// How many.
    pub mode: ServiceMode,
    /// What must be there before the first task starts.
    pub depends_on: Vec<Dependency>,
    /// How its name finds its tasks. A change replaces no task.
    #[serde(skip_serializing_if = "EndpointMode::is_vip")]
    pub endpoint_mode: EndpointMode,
    /// Time that open connections of a task get, between its last new connection and its stop signal, while others of
    /// the service go on; default [`DEFAULT_DRAIN_MS`], at most [`DRAIN_MS_MAX`], 0: none. A change replaces no task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_ms: Option<u64>,
    /// Ports of every host that lead to its tasks, through its first network that is not internal. At most
    /// [`PORTS_MAX`]. A change replaces no task.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<IngressPort>,
    /// How its tasks follow a change of `task`. A change of it replaces none.
    #[serde(skip_serializing_if = "UpdateConfig::is_default")]
    pub update: UpdateConfig,
}

impl ServiceSpec {
    /// [`Self::drain_ms`] or the default.
    pub fn drain_ms(&self) -> u64 {
        self.drain_ms.unwrap_or(DEFAULT_DRAIN_MS)
    }
}
