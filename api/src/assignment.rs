//! What a master tells an agent to be so, and what the agent tells back.
//!
//! Each [`Assignment`] is one document of the agent's ledger, found by [`Assignment::key`].

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::{
    Freeze, IngressPort, Namespaces, NetQuestion, NetworkId, NodeId, Protocol, ServiceId, TaskId, TaskSpec, TaskState,
    TaskStatus,
};

/// One document of an agent's desired state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Assignment {
    /// A container to run here.
    Task(Box<TaskAssignment>),
    /// A network to have here.
    Network(NetworkAssignment),
    /// Another host of a network that this host has.
    Peer(PeerAssignment),
    /// A service with a virtual address in a network that this host has.
    Service(ServiceAssignment),
    /// A name and its address in a network that this host has.
    Endpoint(EndpointAssignment),
}

impl Assignment {
    /// The key of the document: unique within the agent.
    pub fn key(&self) -> String {
        match self {
            Self::Task(t) => format!("task/{}", t.id),
            Self::Network(n) => format!("network/{}", n.id),
            Self::Peer(p) => format!("peer/{}/{}", p.network, p.node),
            Self::Service(s) => format!("service/{}/{}", s.network, s.service),
            Self::Endpoint(e) => format!("endpoint/{}/{}", e.network, e.task),
        }
    }
}

/// A container to run on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskAssignment {
    /// The task.
    pub id: TaskId,
    /// Its name in the cluster.
    pub name: String,
    /// Its service, if it has one.
    pub service: Option<ServiceId>,
    /// Name of the service.
    pub service_name: Option<String>,
    /// Stack.
    pub stack: Option<String>,
    /// Place within the service.
    pub slot: u32,
    /// What to run. Volume names are already the cluster's.
    pub spec: TaskSpec,
    /// The networks of `spec.networks`, resolved and in the same order.
    pub networks: Vec<NetworkId>,
    /// Tasks on this host whose volumes this one takes (`volumes_from`), resolved.
    pub volumes_from: Vec<(TaskId, bool)>,
    /// Tasks on this host whose namespaces this one shares, resolved.
    #[serde(skip_serializing_if = "Namespaces::is_empty")]
    pub share: Namespaces<TaskId>,
    /// Ids of the generic resources that it got, by kind.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub generic: BTreeMap<String, Vec<String>>,
    /// `Running`, `Shutdown` (stop, keep) or `Remove`.
    pub desired_state: TaskState,
    /// Which start of a container task this is about.
    pub run: u64,
    /// This run has ended, as the host itself reported: one that does not remember it must not run it again.
    pub over: bool,
}

/// A network to have on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAssignment {
    /// The network.
    pub id: NetworkId,
    /// Its name: the name of the engine's network too.
    pub name: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// IPv4 subnet.
    pub subnet4: Ipv4Net,
    /// IPv6 subnet.
    pub subnet6: Ipv6Net,
    /// IPv4 gateway, served by each host for its own containers.
    pub gateway4: Ipv4Addr,
    /// IPv6 gateway.
    pub gateway6: Ipv6Addr,
    /// MTU for containers, bytes: the least over the cluster's underlays less the encapsulation.
    pub mtu: u32,
    /// No way out of it and none in.
    pub internal: bool,
    /// Plain `docker run --network` may use it.
    pub attachable: bool,
    /// Number of this host in the overlay.
    pub host_index: u16,
    /// Blocks of addresses that this host owns, and single addresses (/32) outside of them.
    pub blocks: Vec<Ipv4Net>,
    /// Addresses of these that this host gives to nobody who does not ask for them by name. Sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub frozen: Vec<Freeze>,
}

/// Another host of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAssignment {
    /// The network.
    pub network: NetworkId,
    /// The other host.
    pub node: NodeId,
    /// Its number in the overlay.
    pub host_index: u16,
    /// Its VTEP, if it has IPv4.
    pub underlay4: Option<Ipv4Addr>,
    /// Its VTEP, if it has IPv6.
    pub underlay6: Option<Ipv6Addr>,
    /// Blocks of addresses that it owns, and single addresses (/32) outside of them, perhaps in others' blocks.
    pub blocks: Vec<Ipv4Net>,
}

/// A service's names and virtual address in a network. Its backends are the endpoints that name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceAssignment {
    /// The network.
    pub network: NetworkId,
    /// The service.
    pub service: ServiceId,
    /// Names that answer with the virtual address, the shortest way to say it first.
    pub names: Vec<String>,
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address.
    pub v6: Ipv6Addr,
    /// Ports of every host that lead to it: each host that is told serves them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<IngressPort>,
}

/// A task's names and address in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointAssignment {
    /// The network.
    pub network: NetworkId,
    /// The task.
    pub task: TaskId,
    /// Its service, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceId>,
    /// Where it runs.
    pub node: NodeId,
    /// Names that answer with this address alone: the task's, the container's.
    pub names: Vec<String>,
    /// Names shared with other tasks: service, aliases, `tasks.<service>`.
    pub shared_names: Vec<String>,
    /// IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// Ports that it listens on, as far as its specification says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<(Protocol, u16)>,
    /// Runs and is healthy: shared names answer with it, and virtual addresses lead to it.
    pub healthy: bool,
    /// Started by hand on its host: it has only those names that nobody in the cluster has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
    /// Runs and is about to stop: it gets no new connections and keeps those that it has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
}

/// What an agent says of one task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskReport {
    /// The task.
    pub task: TaskId,
    /// Which start of a container task this is about.
    pub run: u64,
    /// What was seen.
    pub status: TaskStatus,
}

/// A stream that the master asks an agent for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum StreamRequest {
    /// Log lines of a task.
    Logs {
        /// The task.
        task: TaskId,
        /// What of it.
        #[serde(flatten)]
        options: LogOptions,
    },
    /// A process in a task's container.
    Exec {
        /// The task.
        task: TaskId,
        /// What to run.
        #[serde(flatten)]
        options: ExecOptions,
    },
    /// A question to the network side. The answer is JSON on the standard output.
    Net {
        /// What is asked.
        question: NetQuestion,
    },
}

/// Which log lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogOptions {
    /// Go on with new lines as they come.
    pub follow: bool,
    /// Only this many of the last lines.
    pub tail: Option<u64>,
    /// Only lines since this time, seconds since 1970; 0 means all.
    pub since_unix_s: i64,
    /// Each line with its time (RFC 3339) before it.
    pub timestamps: bool,
}

/// A process to run in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecOptions {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// With a terminal.
    pub tty: bool,
    /// With standard input.
    pub stdin: bool,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Working directory.
    pub working_dir: Option<String>,
}
