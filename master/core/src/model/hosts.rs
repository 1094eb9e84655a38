//! Lookups of nodes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use skein_api::{NetworkId, Node, NodeDescription, NodeId, TaskId};

use super::drop_from;

/// Nodes by what no two of them share, or should not.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Hosts {
    pub(super) names: BTreeMap<String, NodeId>,
    pub(super) key_digests: BTreeMap<String, NodeId>,
    pub(super) indexes: BTreeSet<u16>,
    /// By address of the underlay, either family.
    pub(super) underlays: BTreeMap<IpAddr, BTreeSet<NodeId>>,
    /// By network: containers that somebody started there by hand, and where.
    pub(super) attached: BTreeMap<NetworkId, BTreeSet<(TaskId, NodeId)>>,
}

fn underlays(node: &Node) -> impl Iterator<Item = IpAddr> {
    let NodeDescription { underlay4, underlay6, .. } = &node.description;
    underlay4.map(IpAddr::V4).into_iter().chain(underlay6.map(IpAddr::V6))
}

impl Hosts {
    pub(super) fn add(&mut self, node: &Node) {
        self.names.insert(node.name.clone(), node.id.clone());
        self.key_digests.insert(node.key_digest.clone(), node.id.clone());
        self.indexes.insert(node.host_index);
        for address in underlays(node) {
            self.underlays.entry(address).or_default().insert(node.id.clone());
        }
        for container in &node.description.attached {
            let place = (container.id.clone(), node.id.clone());
            self.attached.entry(container.network.clone()).or_default().insert(place);
        }
    }

    pub(super) fn remove(&mut self, node: &Node) {
        self.names.remove(&node.name);
        self.key_digests.remove(&node.key_digest);
        self.indexes.remove(&node.host_index);
        for address in underlays(node) {
            drop_from(&mut self.underlays, &address, &node.id);
        }
        for container in &node.description.attached {
            let place = (container.id.clone(), node.id.clone());
            drop_from(&mut self.attached, &container.network, &place);
        }
    }
}
