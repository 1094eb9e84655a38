//! Questions to the network side of a host and their answers: `skein net`.
//!
//! An agent answers only what [`NetQuestion`] names. Fields that a reader does not know are ignored and absent ones take
//! their default, so neighbours of one release apart understand each other; an agent that does not know a question says
//! so.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::{CheckTarget, NetworkId, NodeId, PathQuestion, Protocol, TaskId, UnixMillis};

/// Longest answer of an agent, bytes of JSON: some thousand networks with what differs in each.
pub const NET_ANSWER_BYTES_MAX: usize = 4 << 20;

/// Words that a list of an answer holds at most; the count beside it says how many there are.
pub const NET_LIST_MAX: usize = 16;

/// What the network side of a host can be asked. Nothing here changes anything that lasts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum NetQuestion {
    /// How its networks are: [`NetStatus`].
    Status,
    /// What an outsider can reach on it: a list of [`ExposedPort`].
    Exposed,
    /// The way out of a container of its own, tried at the end: [`crate::PathSide`].
    PathFrom(Box<PathQuestion>),
    /// The way in to a container of its own: [`crate::PathSide`].
    PathTo(Box<PathQuestion>),
    /// Opens places for probes in these networks for as long as the stream is open, two minutes at most: a list of
    /// [`crate::ProbePlace`], and no end.
    Respond {
        /// The networks.
        networks: Vec<NetworkId>,
    },
    /// Sends probes to places of other hosts: [`crate::HostCheck`].
    Check {
        /// The places.
        targets: Vec<CheckTarget>,
    },
    /// An address outside of the overlay, from a container of its own or from the host: a list of [`crate::Hop`].
    Reach {
        /// The container's task; none: from the host.
        #[serde(default)]
        task: Option<TaskId>,
        /// Where to.
        to: IpAddr,
        /// Port there.
        #[serde(default)]
        port: Option<u16>,
        /// Its protocol.
        proto: Protocol,
    },
}

/// What one host answered, or why it did not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostAnswer<T> {
    /// The host.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Generation of the assignments that the master sent it last; 0: none yet.
    pub generation_sent: u64,
    /// The one that it has in its ledger, its kernel and its names; 0: none, or no session.
    pub generation_acked: u64,
    /// There is more for it that was not sent yet.
    pub waiting: bool,
    /// The answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<T>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How the networks of a host are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetStatus {
    /// Source of its VXLAN packets.
    pub vtep: Option<IpAddr>,
    /// UDP port of VXLAN.
    pub vxlan_port: u16,
    /// MTU of the underlay device in bytes; 0 before the first network.
    pub underlay_mtu: u32,
    /// What does not work now, in words.
    pub troubles: Vec<String>,
    /// Looks at the kernel's state since the agent's start, one per network or host.
    pub audits_total: u64,
    /// Differences found and repaired since then.
    pub repairs_total: u64,
    /// Looks that failed.
    pub failures_total: u64,
    /// Containers found without their link.
    pub lost_endpoints_total: u64,
    /// The host's own namespace.
    pub host: ScopeStatus,
    /// Each network.
    pub networks: Vec<NetworkStatus>,
    /// The name server, all networks together.
    pub dns: DnsStatus,
}

/// One network on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkStatus {
    /// The network.
    pub id: NetworkId,
    /// Its name.
    pub name: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// MTU of its containers, bytes.
    pub mtu: u32,
    /// MTU that this host's underlay would allow, bytes.
    pub mtu_max: u32,
    /// Other hosts that it reaches.
    pub peers: usize,
    /// Those that it cannot reach, by node id: no underlay address of the right family.
    pub unreachable: Vec<String>,
    /// Containers on this host.
    pub containers: usize,
    /// The addresses that this host gives.
    pub blocks: Vec<BlockStatus>,
    /// Its namespace, with the host's end of the uplink.
    pub scope: ScopeStatus,
}

/// A namespace: what it shall be beside what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScopeStatus {
    /// What differs now, in words; the first [`NET_LIST_MAX`].
    pub differences: Vec<String>,
    /// How many differ.
    pub differences_total: usize,
    /// Why it could not be looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Repairs since the agent's start.
    pub repairs_total: u64,
    /// The last [`NET_LIST_MAX`] of them, the newest last.
    pub repairs: Vec<Repair>,
    /// Packets that were dropped, by reason, since the counting thing was made. Reasons that never occurred are absent.
    pub drops: BTreeMap<String, u64>,
}

/// One repair.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Repair {
    /// When, by the host's clock.
    pub at: UnixMillis,
    /// What was wrong, as what was done about it: `network blue: put route 10.1.2.0/24 to next hop 5`.
    pub what: String,
}

/// A block of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStatus {
    /// The block.
    pub block: Ipv4Net,
    /// The IPv6 addresses that belong to it.
    pub block6: Ipv6Net,
    /// Addresses that somebody has.
    pub used: u64,
    /// Addresses in it that can be given.
    pub size: u64,
}

/// What the name server counted since the agent's start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DnsStatus {
    /// Questions answered from the cluster's names, or refused.
    pub answered_total: u64,
    /// Questions that went to the host's resolvers.
    pub forwarded_total: u64,
    /// Of these, the ones that no resolver answered.
    pub forward_failures_total: u64,
    /// Questions and connections over a bound.
    pub rejected_total: u64,
}

/// A port of a host at which somebody waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExposedPort {
    /// Protocol.
    pub proto: Protocol,
    /// The address of the host; none: every one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Port.
    pub port: u16,
    /// Only the host itself reaches it.
    #[serde(default)]
    pub only_here: bool,
    /// Who waits there.
    pub by: ExposedBy,
}

/// Who waits at a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ExposedBy {
    /// A container of the overlay, by a published port.
    Published {
        /// Its task; none for a plain `docker run`.
        #[serde(default)]
        task: Option<TaskId>,
        /// The task's name.
        #[serde(default)]
        name: String,
        /// The network through which the port leads.
        #[serde(default)]
        network: String,
        /// Where it leads.
        target: SocketAddr,
    },
    /// A program of the host: `sshd (pid 812)`.
    Program {
        /// Its name and process.
        program: String,
    },
    /// VXLAN of the overlay.
    Vxlan {
        /// The only addresses from which it is taken.
        #[serde(default)]
        open_to: Vec<IpAddr>,
    },
    /// The kernel itself, for something else.
    Kernel,
    /// Something that this release does not know.
    #[serde(other)]
    Unknown,
}
