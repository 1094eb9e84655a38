//! From what the master assigned to what the kernel shall have.
//!
//! Owns: the translation of assignments to netlib's words, for the agent and for the simulation. Must not know: the
//! engine, the kernel's present state, the disk. Pure; no tasks, no channels.
//!
//! [`path`]: the way of a packet through this host, wanted beside found.

pub mod path;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::{IpNet, Ipv4Net};
use netlib::{
    Endpoint, EndpointId, HostIndex, HostState, InvalidState, NetworkState, Peer, PublishedPort,
    types::{MTU_MIN, overlay_mtu},
};
use skein_api::{NetworkAssignment, NetworkId, PeerAssignment, block6};

/// A peer that cannot be reached: it has no underlay address of the family that this host uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// The network.
    pub network: NetworkId,
    /// The other host, by its node id.
    pub node: String,
}

/// A container's place in a network, with the ports of the host that lead to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its address and link.
    pub endpoint: Endpoint,
    /// Its ports, an entry per family.
    pub published: Vec<PublishedPort>,
}

/// The state of one network, without its peers and containers: enough for `netlib::driver::add_endpoint`.
///
/// # Errors
/// The network's id cannot be a name in the kernel.
pub fn bare_network(ours: &NetworkAssignment) -> Result<NetworkState, InvalidState> {
    Ok(NetworkState {
        id: ours.id.as_str().parse()?,
        vni: ours.vni,
        subnet4: ours.subnet4,
        subnet6: Some(ours.subnet6),
        gateway4: ours.gateway4,
        gateway6: Some(ours.gateway6),
        mtu: ours.mtu,
        internal: ours.internal,
        local_blocks: blocks(ours, &ours.blocks),
        peers: BTreeMap::new(),
        endpoints: BTreeMap::new(),
        published: BTreeSet::new(),
        services: BTreeMap::new(),
        ingress: None,
    })
}

/// The whole state of one network. Peers that cannot be reached are left out and returned beside it.
///
/// # Errors
/// As [`bare_network`].
pub fn network<'a>(
    ours: &NetworkAssignment,
    peers: impl IntoIterator<Item = &'a PeerAssignment>,
    attached: impl IntoIterator<Item = (EndpointId, Attached)>,
    vtep: IpAddr,
) -> Result<(NetworkState, Vec<Unreachable>), InvalidState> {
    let mut state = bare_network(ours)?;
    let mut unreachable = Vec::new();
    for peer in peers.into_iter().filter(|p| p.host_index != ours.host_index) {
        match vtep_of(peer, vtep) {
            Some(vtep) => {
                let entry = Peer { vtep, blocks: blocks(ours, &peer.blocks), mtu: None };
                state.peers.insert(HostIndex(peer.host_index), entry);
            }
            None => unreachable.push(Unreachable { network: ours.id.clone(), node: peer.node.to_string() }),
        }
    }
    if skein_api::mutant!("lost-peer") && state.peers.len() > 1 {
        state.peers.pop_last();
    }
    for (id, Attached { endpoint, published }) in attached {
        state.endpoints.insert(id, endpoint);
        state.published.extend(published);
    }
    Ok((state, unreachable))
}

/// The state of the host's own namespace.
pub fn host<'a>(
    networks: impl IntoIterator<Item = &'a NetworkAssignment>,
    peers: impl IntoIterator<Item = &'a PeerAssignment>,
    published: impl IntoIterator<Item = PublishedPort>,
    vtep: IpAddr,
) -> HostState {
    let mut vteps: BTreeSet<IpAddr> = peers.into_iter().filter_map(|p| vtep_of(p, vtep)).collect();
    if skein_api::mutant!("lost-vtep") && vteps.len() > 1 {
        vteps.pop_last();
    }
    let ipv6 = networks.into_iter().any(|n| !n.internal);
    HostState { vteps, published: published.into_iter().collect(), ingress: BTreeSet::new(), ipv6 }
}

/// The peer's underlay address of the family that we use: IPv4 where this host has it, IPv6 otherwise.
fn vtep_of(peer: &PeerAssignment, ours: IpAddr) -> Option<IpAddr> {
    match ours {
        IpAddr::V4(_) => peer.underlay4.map(IpAddr::V4),
        IpAddr::V6(_) => peer.underlay6.map(IpAddr::V6),
    }
}

/// Fits a network to what the underlay takes: `underlay_mtu` of this host's own device and `paths` to peers, bytes, by
/// VTEP. The master knows the former and makes it the network's soon, for all hosts; until then packets shall not be lost.
pub fn fit(state: &mut NetworkState, vtep: IpAddr, underlay_mtu: u32, paths: &BTreeMap<IpAddr, u32>) {
    let fits = |underlay: u32| overlay_mtu(underlay, vtep).max(MTU_MIN);
    state.mtu = state.mtu.min(fits(underlay_mtu));
    for peer in state.peers.values_mut() {
        peer.mtu = paths.get(&peer.vtep).map(|mtu| fits(*mtu)).filter(|mtu| *mtu < state.mtu);
    }
}

/// Blocks of both families.
fn blocks(ours: &NetworkAssignment, blocks: &[Ipv4Net]) -> BTreeSet<IpNet> {
    let both = |b: &Ipv4Net| [IpNet::V4(b.trunc()), IpNet::V6(block6(ours.subnet6, ours.subnet4, b.trunc()).trunc())];
    blocks.iter().flat_map(both).collect()
}
