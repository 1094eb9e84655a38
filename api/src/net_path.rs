//! The way from one container to another, as `skein net path` tells it.
//!
//! The master asks the host of each end ([`crate::NetQuestion`]); each answers with hops, in the order in which a packet
//! passes them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{NetworkId, NodeId, Protocol, TaskId};

/// One end of a path: a task's place in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathEnd {
    /// The task.
    pub task: TaskId,
    /// Its name.
    pub name: String,
    /// Its host.
    pub node: NodeId,
    /// Its host's name.
    pub node_name: String,
    /// Its address in the network.
    pub address: IpAddr,
}

/// What is asked of the host of either end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathQuestion {
    /// The network that both ends are in.
    pub network: NetworkId,
    /// Where it begins.
    pub from: PathEnd,
    /// Where it ends.
    pub to: PathEnd,
    /// The virtual address that leads there, if the user named a service.
    #[serde(default)]
    pub vip: Option<IpAddr>,
    /// The name to look up, if it is one that containers can look up.
    #[serde(default)]
    pub lookup: Option<String>,
    /// Port of the target.
    #[serde(default)]
    pub port: Option<u16>,
    /// Its protocol.
    #[serde(default = "tcp")]
    pub proto: Protocol,
}

fn tcp() -> Protocol {
    Protocol::Tcp
}

/// How a hop is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HopState {
    /// As it should be.
    Fine,
    /// Nothing gets past here.
    Broken,
    /// It could not be looked at, or says nothing for sure.
    #[default]
    #[serde(other)]
    Unknown,
}

/// One step of a path: wanted beside found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hop {
    /// Name of the host that saw it; empty: the master's own knowledge.
    pub node: String,
    /// Which: `name`, `route`, `neighbour`, `forwarding entry`, …
    pub hop: String,
    /// How it is.
    pub state: HopState,
    /// What it shall be.
    pub wanted: String,
    /// What it is.
    pub found: String,
    /// What is wrong, as half a sentence; empty when nothing is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fault: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub repair: String,
}

impl Hop {
    /// A hop that is as it should be.
    pub fn fine(hop: &str, wanted: impl Into<String>, found: impl Into<String>) -> Self {
        let (wanted, found) = (wanted.into(), found.into());
        Self { hop: hop.into(), state: HopState::Fine, wanted, found, ..Self::default() }
    }

    /// A hop that nothing gets past.
    pub fn broken(
        hop: &str,
        (wanted, found): (impl Into<String>, impl Into<String>),
        fault: impl Into<String>,
        repair: impl Into<String>,
    ) -> Self {
        let (fault, repair) = (fault.into(), repair.into());
        Self { state: HopState::Broken, fault, repair, ..Self::fine(hop, wanted, found) }
    }

    /// A hop of which nothing can be said, and why.
    pub fn unknown(hop: &str, wanted: impl Into<String>, why: impl Into<String>) -> Self {
        Self { state: HopState::Unknown, ..Self::fine(hop, wanted, why) }
    }
}

/// What the host of one end saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PathSide {
    /// In the order in which a packet passes them.
    pub hops: Vec<Hop>,
    /// What came of a connection, a datagram or an echo request from the container of the first end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<Hop>,
    /// Packets that the VXLAN device has received (the target's host) or sent (the other).
    pub vxlan_packets: u64,
    /// Rules that are not Skein's and may drop packets of the overlay: where and what.
    pub suspects: Vec<String>,
}

/// The whole path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PathReport {
    /// Where it begins, in words: `task s_a.1 on h1`.
    pub from: String,
    /// Where it ends.
    pub to: String,
    /// Name of the network that leads there.
    pub network: Option<String>,
    /// Something got there and was answered.
    pub works: bool,
    /// One sentence: that it works, or the first broken hop with its repair.
    pub summary: String,
    /// Every hop.
    pub hops: Vec<Hop>,
}
