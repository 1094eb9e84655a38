//! Nodes: what a host is, offers and is labelled with.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Meta, NetworkId, NodeId, TaskId, UnixMillis};

/// A host of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Identity, the same for the life of the node's key.
    pub id: NodeId,
    /// Common fields.
    pub meta: Meta,
    /// Unique in the cluster; the host name at the time of joining.
    pub name: String,
    /// What the operator wants of it.
    pub spec: NodeSpec,
    /// What the agent last said about the host.
    pub description: NodeDescription,
    /// Number of this host in the overlay, unique and never zero: VTEP MAC and next-hop addresses follow from it.
    pub host_index: u16,
    /// SHA-256 of the node's public key (SubjectPublicKeyInfo, DER), hex.
    pub key_digest: String,
    /// Liveness; memory of the leading master, never stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<NodeStatus>,
}

/// What the operator wants of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// Labels given by the operator; constraints see them as `node.labels.<key>`. They win over the agent's own.
    pub labels: BTreeMap<String, String>,
    /// Whether tasks may be placed or stay here.
    pub availability: Availability,
}

/// Whether tasks may be placed on a node (Docker swarm-mode words).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Availability {
    /// New tasks may come, present ones stay.
    #[default]
    Active,
    /// No new tasks, present ones stay.
    Pause,
    /// No new tasks; present service tasks move away.
    Drain,
}

/// Whether the master hears from a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Not heard of since this master started, and the detection period is not over yet.
    #[default]
    Unknown,
    /// Has a session and its heartbeats come.
    Ready,
    /// No heartbeat within the detection period.
    Down,
}

/// Liveness of a node as the leading master sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Ready, down or not known yet.
    pub state: NodeState,
    /// Since when.
    pub since: UnixMillis,
    /// Why, in a few words.
    pub message: String,
}

/// What an agent says about its host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeDescription {
    /// The host's name.
    pub hostname: String,
    /// Data centre or other place; default is empty.
    pub site: String,
    /// Labels from the agent's own configuration.
    pub labels: BTreeMap<String, String>,
    /// What the host has.
    pub capacity: Resources,
    /// What of it the cluster may use: capacity less `reserve`, or `offer`.
    pub offered: Resources,
    /// How much more than `offered` may be set aside here; none: the cluster's ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overcommit: Option<Overcommit>,
    /// `linux`.
    pub os: String,
    /// As Docker names it: `x86_64`, `aarch64`.
    pub arch: String,
    /// Name of the distribution.
    pub operating_system: String,
    /// Kernel release.
    pub kernel: String,
    /// Version of the container engine.
    pub engine_version: String,
    /// Labels of the engine.
    pub engine_labels: BTreeMap<String, String>,
    /// The engine's storage driver.
    pub storage_driver: String,
    /// What the engine runs containers with unless told otherwise: `runc`. Constraints see it as `executiondriver`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub execution_driver: String,
    /// What else is counted on this host, by kind: GPUs, licences. See docs/scheduling.md, "Generic resources".
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub generic: BTreeMap<String, GenericOffer>,
    /// Volume plugins of the engine.
    pub volume_plugins: Vec<String>,
    /// Network plugins of the engine.
    pub network_plugins: Vec<String>,
    /// Version of the agent.
    pub agent_version: String,
    /// Underlay address of the VTEP, if it has IPv4.
    pub underlay4: Option<Ipv4Addr>,
    /// Underlay address of the VTEP, if it has IPv6.
    pub underlay6: Option<Ipv6Addr>,
    /// UDP port of the VXLAN devices.
    pub vxlan_port: u16,
    /// MTU of the underlay interface, bytes.
    pub underlay_mtu: u32,
    /// Prefixes that the host routes somewhere itself; no overlay subnet may overlap one.
    pub routes: Vec<IpNet>,
    /// Resolvers of the host outside of it; no overlay subnet may hold one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resolvers: Vec<IpAddr>,
    /// Its agent answers freezes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freezes: bool,
    /// Addresses that are in use of those that are frozen on this host, by the freeze's ticket. At most
    /// [`FREEZES_MAX`] tickets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub frozen: BTreeMap<u64, Vec<Ipv4Addr>>,
    /// Addresses by network that containers have here which the engine runs by itself.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub plain_addresses: BTreeMap<NetworkId, u32>,
    /// What does not work on this host now, in words for its operator; empty when all is well. At most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub troubles: Vec<String>,
    /// Containers in networks of the cluster that were started here by hand; at most [`ATTACHED_MAX`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub attached: Vec<AttachedContainer>,
}

/// Most containers of one host that were started by hand and have names in the cluster.
pub const ATTACHED_MAX: usize = 256;

/// Most names of one such container in one network.
pub const ATTACHED_NAMES_MAX: usize = 16;

/// A container that somebody started with the host's own engine, in a network of the cluster
/// (`docker run --network`).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct AttachedContainer {
    /// The first digits of the engine's id: it stands where tasks have theirs.
    pub id: TaskId,
    /// The network.
    pub network: NetworkId,
    /// The container's name first, then its aliases in the network.
    pub names: Vec<String>,
    /// IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

/// Most freezes that a host tells of: what it is asked about beyond that waits.
pub const FREEZES_MAX: usize = 1_024;

/// An amount of CPU and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Billionths of a CPU.
    pub nano_cpus: u64,
    /// Bytes.
    pub mem_bytes: u64,
}

/// How much may be set aside of what is offered, in percent; default 100. Limits are not touched by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overcommit {
    /// Of CPUs, within [`OVERCOMMIT_PERCENT`].
    pub cpu_percent: u32,
    /// Of memory, within [`OVERCOMMIT_PERCENT`].
    pub memory_percent: u32,
}

/// Percentages that an [`Overcommit`] may have: from a tenth to a hundred times the offer.
pub const OVERCOMMIT_PERCENT: std::ops::RangeInclusive<u32> = 10..=10_000;

impl Default for Overcommit {
    fn default() -> Self {
        Self { cpu_percent: 100, memory_percent: 100 }
    }
}

/// How many of one kind of generic resource a host has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum GenericOffer {
    /// A number; nothing tells one from the other.
    Count(u64),
    /// Each with an id that the task is told: `GPU-0`. At most [`GENERIC_IDS_MAX`].
    Named(BTreeSet<String>),
}

/// Most kinds of generic resources of one host, and that one task asks for.
pub const GENERIC_KINDS_MAX: usize = 16;

/// Most ids of one kind of generic resource on one host.
pub const GENERIC_IDS_MAX: usize = 1_024;

impl GenericOffer {
    /// How many there are.
    pub fn count(&self) -> u64 {
        match self {
            Self::Count(count) => *count,
            Self::Named(ids) => ids.len() as u64,
        }
    }
}

/// A change of a node's specification; what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeUpdate {
    /// Labels to set.
    pub labels_add: BTreeMap<String, String>,
    /// Labels to remove.
    pub labels_remove: Vec<String>,
    /// New availability.
    pub availability: Option<Availability>,
}
