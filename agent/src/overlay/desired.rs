//! From what the master assigned and the engine made to what the kernel shall have.
//!
//! Owns: the translation to netlib's words. Must not know: the kernel's present state, the disk. Pure; no tasks, no
//! channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use agent_core::lease::Leases;
use ipnet::{IpNet, Ipv4Net};
use netlib::{Endpoint, EndpointId, HostIndex, HostState, NetworkState, Peer};
use skein_api::{NetworkAssignment, NetworkId, PeerAssignment, address6, block6};

use crate::plugin::PluginState;

/// A peer that cannot be reached: it has no underlay address of the family that this host uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// The network.
    pub network: NetworkId,
    /// The other host, by its node id.
    pub node: String,
}

/// The state of one network, without its peers and published ports: enough for `netlib::Overlay::add_endpoint`.
///
/// # Errors
/// The network's id cannot be a name in the kernel.
pub fn bare_network(ours: &NetworkAssignment) -> Result<NetworkState, netlib::InvalidState> {
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
    })
}

/// The whole state of one network. Peers that cannot be reached are left out and returned beside it.
///
/// # Errors
/// As [`bare_network`].
pub fn network(
    ours: &NetworkAssignment,
    peers: &[PeerAssignment],
    plugin: &PluginState,
    leases: &Leases,
    vtep: IpAddr,
) -> Result<(NetworkState, Vec<Unreachable>), netlib::InvalidState> {
    let mut state = bare_network(ours)?;
    let mut unreachable = Vec::new();
    for peer in peers.iter().filter(|p| p.host_index != ours.host_index) {
        match vtep_of(peer, vtep) {
            Some(vtep) => {
                let entry = Peer { vtep, blocks: blocks(ours, &peer.blocks) };
                state.peers.insert(HostIndex(peer.host_index), entry);
            }
            None => unreachable.push(Unreachable { network: ours.id.clone(), node: peer.node.to_string() }),
        }
    }
    for (id, endpoint) in plugin.joined(&ours.id) {
        state.endpoints.insert(EndpointId(id.clone()), endpoint.to_netlib());
        state.published.extend(endpoint.published());
    }
    if plugin.misses_endpoints() {
        state.endpoints.extend(stand_ins(ours, plugin, leases));
    }
    Ok((state, unreachable))
}

/// What may be the endpoints that cannot be read: every address that the engine has and no endpoint uses. Without them
/// the link, the routes and the guards of a running container would be removed as nobody's. Those that have no link
/// change nothing in the kernel.
fn stand_ins(
    ours: &NetworkAssignment,
    plugin: &PluginState,
    leases: &Leases,
) -> impl Iterator<Item = (EndpointId, Endpoint)> {
    leases.asked_for(&ours.id).filter(|(v4, _, _)| !plugin.has_address(&ours.id, *v4)).filter_map(|(v4, mac, v6)| {
        let addr6 = v6.then(|| address6(ours.subnet6, ours.subnet4, v4));
        let endpoint = Endpoint { mac: mac.parse().ok()?, addr4: v4, addr6 };
        Some((EndpointId(format!("unreadable-{v4}")), endpoint))
    })
}

/// The state of the host's own namespace.
pub fn host<'a>(
    networks: impl IntoIterator<Item = &'a NetworkAssignment>,
    peers: impl IntoIterator<Item = &'a PeerAssignment>,
    plugin: &PluginState,
    vtep: IpAddr,
) -> HostState {
    HostState {
        vteps: peers.into_iter().filter_map(|p| vtep_of(p, vtep)).collect(),
        published: plugin.endpoints().values().filter(|e| e.sandbox.is_some()).flat_map(|e| e.published()).collect(),
        ipv6: networks.into_iter().any(|n| !n.internal),
    }
}

/// The peer's underlay address of the family that we use: IPv4 where this host has it, IPv6 otherwise.
fn vtep_of(peer: &PeerAssignment, ours: IpAddr) -> Option<IpAddr> {
    match ours {
        IpAddr::V4(_) => peer.underlay4.map(IpAddr::V4),
        IpAddr::V6(_) => peer.underlay6.map(IpAddr::V6),
    }
}

/// Blocks of both families.
fn blocks(ours: &NetworkAssignment, blocks: &[Ipv4Net]) -> BTreeSet<IpNet> {
    let both = |b: &Ipv4Net| [IpNet::V4(b.trunc()), IpNet::V6(block6(ours.subnet6, ours.subnet4, b.trunc()).trunc())];
    blocks.iter().flat_map(both).collect()
}

#[cfg(test)]
mod tests {
    use skein_api::NodeId;

    use super::*;
    use crate::dns::zone::tests::network as assignment;

    fn peer(index: u16, v4: Option<&str>, v6: Option<&str>) -> PeerAssignment {
        PeerAssignment {
            network: NetworkId::new("net1"),
            node: NodeId::new(format!("node{index}")),
            host_index: index,
            underlay4: v4.map(|a| a.parse().unwrap()),
            underlay6: v6.map(|a| a.parse().unwrap()),
            blocks: vec![format!("10.1.{index}.0/24").parse().unwrap()],
        }
    }

    #[test]
    fn peers_are_reached_by_the_family_that_this_host_uses() {
        let ours = assignment(1, "shop", false);
        let peers = [
            peer(1, Some("192.0.2.1"), None),
            peer(2, Some("192.0.2.2"), Some("2001:db8::2")),
            peer(3, None, Some("2001:db8::3")),
        ];
        let vteps = |vtep: &str| {
            let vtep = vtep.parse().unwrap();
            let (state, unreachable) =
                network(&ours, &peers, &PluginState::default(), &Leases::default(), vtep).unwrap();
            let config = netlib::HostConfig::new(HostIndex(1), vtep, 1520);
            state.validate(&config).unwrap();
            let found: Vec<String> = state.peers.values().map(|p| p.vtep.to_string()).collect();
            let missing: Vec<String> = unreachable.into_iter().map(|u| u.node).collect();
            assert_eq!(host([&ours], &peers[1..], &PluginState::default(), vtep).vteps.len(), found.len());
            (found, missing)
        };
        assert_eq!(vteps("192.0.2.1"), (vec!["192.0.2.2".into()], vec!["node3".into()]));
        assert_eq!(vteps("2001:db8::1"), (vec!["2001:db8::2".into(), "2001:db8::3".into()], vec![]));
    }

    #[test]
    fn an_address_stands_in_for_an_endpoint_that_cannot_be_read() {
        let ours = assignment(1, "shop", false);
        let mut leases = Leases::default();
        let mac = "02:42:00:00:00:07";
        let (used, _) = leases.request(&ours, agent_core::lease::AddressFamily::V4, None, Some(mac)).unwrap();
        leases.reserve(&ours, &skein_api::TaskId::new("never started")).unwrap();
        let links = |documents: &[(&str, &str)]| {
            let documents = documents.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            let plugin = PluginState::load(&documents);
            let (state, _) = network(&ours, &[], &plugin, &leases, "192.0.2.1".parse().unwrap()).unwrap();
            state.endpoints.into_values().collect::<Vec<_>>()
        };
        assert_eq!(links(&[]), [], "nothing is missed");
        let found = links(&[("plugin/endpoint/p1", "{\"netw")]);
        assert_eq!(found, [Endpoint { mac: mac.parse().unwrap(), addr4: used, addr6: None }]);
    }

    #[test]
    fn both_families_of_a_block() {
        let state = bare_network(&assignment(1, "shop", false)).unwrap();
        let blocks: Vec<String> = state.local_blocks.iter().map(IpNet::to_string).collect();
        assert_eq!(blocks, ["10.1.1.0/24", "fd00:0:0:1::100/120"]);
    }
}
