//! From what the master assigned and the engine made to what the kernel shall have.
//!
//! Owns: what the engine's side adds to the translation of assignments (`agent_network`). Must not know: the kernel's
//! present state, the disk. Pure; no tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use agent_core::lease::Leases;
use agent_network::Attached;
pub use agent_network::{Unreachable, bare_network, fit};
use netlib::{Endpoint, EndpointId, HostState, Ingress, IngressPort, NetworkState, Proto, PublishedPort, Service};
use skein_api::{
    EndpointAssignment, NetworkAssignment, NetworkId, PeerAssignment, ServiceAssignment, ServiceId, TaskId, address6,
};

use crate::plugin::{PluginState, state::PluginEndpoint};

/// The whole state of one network. Peers that cannot be reached are left out and returned beside it.
///
/// # Errors
/// As [`bare_network`].
pub fn network(
    ours: &NetworkAssignment,
    peers: &[PeerAssignment],
    (plugin, draining): (&PluginState, &BTreeSet<TaskId>),
    leases: &Leases,
    vtep: IpAddr,
) -> Result<(NetworkState, Vec<Unreachable>), netlib::InvalidState> {
    let joined = plugin.joined(&ours.id).map(|(id, endpoint)| {
        let published = published(endpoint, draining).collect();
        (EndpointId(id.clone()), Attached { endpoint: endpoint.to_netlib(), published })
    });
    let (mut state, unreachable) = agent_network::network(ours, peers, joined, vtep)?;
    if plugin.misses_endpoints() {
        state.endpoints.extend(stand_ins(ours, plugin, leases));
    }
    Ok((state, unreachable))
}

/// The published ports of an endpoint; `draining` are tasks that are about to stop.
fn published<'a>(
    endpoint: &'a PluginEndpoint,
    draining: &BTreeSet<TaskId>,
) -> impl Iterator<Item = PublishedPort> + use<'a> {
    let draining = endpoint.task.as_ref().is_some_and(|task| draining.contains(task));
    endpoint.published().map(move |port| PublishedPort { draining, ..port })
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
        let endpoint = Endpoint { mac: mac.parse().ok()?, addr4: v4, addr6, mtu: None };
        Some((EndpointId(format!("unreadable-{v4}")), endpoint))
    })
}

/// Services of one network by virtual address.
pub type Services = BTreeMap<IpAddr, Service>;

/// Where the virtual addresses of each network lead: to the endpoints that name the service, of the same family.
/// O((services + endpoints) log services).
pub fn services(services: &[ServiceAssignment], endpoints: &[EndpointAssignment]) -> BTreeMap<NetworkId, Services> {
    let mut all: BTreeMap<NetworkId, Services> = BTreeMap::new();
    let mut vips: BTreeMap<(&NetworkId, &ServiceId), [IpAddr; 2]> = BTreeMap::new();
    for service in services {
        let both = [IpAddr::V4(service.v4), IpAddr::V6(service.v6)];
        let network = all.entry(service.network.clone()).or_default();
        network.extend(both.map(|vip| (vip, Service::default())));
        vips.insert((&service.network, &service.service), both);
    }
    for endpoint in endpoints {
        let of = endpoint.service.as_ref().and_then(|service| vips.get(&(&endpoint.network, service)));
        let (Some([vip4, vip6]), Some(network)) = (of, all.get_mut(&endpoint.network)) else { continue };
        let pairs = [(vip4, endpoint.v4.map(IpAddr::V4)), (vip6, endpoint.v6.map(IpAddr::V6))];
        for (vip, addr) in pairs.into_iter().filter_map(|(vip, addr)| Some((vip, addr?))) {
            let service = network.get_mut(vip).expect("made above");
            let set = match (endpoint.healthy, endpoint.draining) {
                (true, _) => &mut service.backends,
                (false, true) => &mut service.draining,
                (false, false) => &mut service.unhealthy,
            };
            set.insert(addr);
        }
    }
    all
}

/// The tasks of this host that are about to stop, as the endpoints say.
pub fn draining(endpoints: &[EndpointAssignment], plugin: &PluginState) -> BTreeSet<TaskId> {
    let here: BTreeSet<&TaskId> = plugin.endpoints().values().filter_map(|endpoint| endpoint.task.as_ref()).collect();
    let stops = |e: &&EndpointAssignment| e.draining && here.contains(&e.task);
    endpoints.iter().filter(stops).map(|endpoint| endpoint.task.clone()).collect()
}

/// A port of every host, for this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lead {
    /// The network that it leads into.
    pub network: NetworkId,
    /// Name of the service that it belongs to.
    pub service: String,
    /// Where it leads.
    pub to: IngressPort,
}

/// The ports of every host that the services of these networks have, by port.
pub fn leads(
    services: &[ServiceAssignment],
    networks: &BTreeMap<NetworkId, NetworkAssignment>,
) -> BTreeMap<(Proto, u16), Lead> {
    let open = services.iter().filter(|s| networks.get(&s.network).is_some_and(|network| !network.internal));
    let ports = open.flat_map(|service| service.ports.iter().map(move |port| (service, port)));
    let lead = |(service, port): (&ServiceAssignment, &skein_api::IngressPort)| {
        let to = IngressPort { vip4: service.v4, vip6: Some(service.v6), target_port: port.target };
        let lead = Lead { network: service.network.clone(), service: name_of(service), to };
        ((proto(port.protocol), port.published), lead)
    };
    ports.map(lead).collect()
}

fn name_of(service: &ServiceAssignment) -> String {
    service.names.first().cloned().unwrap_or_else(|| service.service.to_string())
}

/// netlib's word for a protocol.
pub fn proto(protocol: skein_api::Protocol) -> Proto {
    match protocol {
        skein_api::Protocol::Tcp => Proto::Tcp,
        skein_api::Protocol::Udp => Proto::Udp,
    }
}

/// The state of the host's own namespace; `ingress`: its own address in each network that has one, with the ports of
/// every host that lead there.
pub fn host<'a>(
    networks: impl IntoIterator<Item = &'a NetworkAssignment>,
    peers: impl IntoIterator<Item = &'a PeerAssignment>,
    (plugin, draining): (&PluginState, &BTreeSet<TaskId>),
    ingress: &BTreeMap<NetworkId, Ingress>,
    vtep: IpAddr,
) -> HostState {
    let joined = plugin.endpoints().values().filter(|e| e.sandbox.is_some());
    let ports = joined.flat_map(|endpoint| published(endpoint, draining));
    let ports = ports.chain(ingress.values().flat_map(Ingress::published));
    let state = agent_network::host(networks, peers, ports, vtep);
    HostState { ingress: ingress.values().flat_map(Ingress::addrs).collect(), ..state }
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;
    use netlib::HostIndex;
    use skein_api::NodeId;

    use super::*;
    use crate::dns::zone::tests::{endpoint, network as assignment, service};

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
            let none = (&PluginState::default(), &BTreeSet::new());
            let (state, unreachable) = network(&ours, &peers, none, &Leases::default(), vtep).unwrap();
            let config = netlib::HostConfig::new(HostIndex(1), vtep, 1520);
            state.validate(&config).unwrap();
            let found: Vec<String> = state.peers.values().map(|p| p.vtep.to_string()).collect();
            let missing: Vec<String> = unreachable.into_iter().map(|u| u.node).collect();
            assert_eq!(host([&ours], &peers[1..], none, &BTreeMap::new(), vtep).vteps.len(), found.len());
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
        leases.reserve(&ours, &TaskId::new("never started"), None, |_, _| false).unwrap();
        let links = |documents: &[(&str, &str)]| {
            let documents = documents.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            let plugin = PluginState::load(&documents);
            let (state, _) =
                network(&ours, &[], (&plugin, &BTreeSet::new()), &leases, "192.0.2.1".parse().unwrap()).unwrap();
            state.endpoints.into_values().collect::<Vec<_>>()
        };
        assert_eq!(links(&[]), [], "nothing is missed");
        let found = links(&[("plugin/endpoint/p1", "{\"netw")]);
        assert_eq!(found, [Endpoint { mac: mac.parse().unwrap(), addr4: used, addr6: None, mtu: None }]);
    }

    #[test]
    fn virtual_addresses_lead_to_the_endpoints_of_their_service() {
        let of = |name: &str, n: u8, last: u8, healthy: bool, draining: bool| EndpointAssignment {
            service: Some(ServiceId::new(name)),
            draining,
            ..endpoint(n, last, &[], &[], healthy)
        };
        let endpoints = [
            of("web", 1, 10, true, false),
            EndpointAssignment { v6: None, ..of("web", 1, 11, true, false) },
            of("web", 1, 12, false, true),
            of("web", 1, 13, false, false),
            // Of another network, of a service without a virtual address, of none.
            of("web", 2, 14, true, false),
            of("other", 1, 15, true, false),
            endpoint(1, 16, &[], &["web"], true),
        ];
        let all = services(&[service(1, "web", 200), service(1, "empty", 201)], &endpoints);
        assert_eq!(all.keys().collect::<Vec<_>>(), [&NetworkId::new("net1")]);
        let network = &all[&NetworkId::new("net1")];
        let vips: Vec<String> = network.keys().map(IpAddr::to_string).collect();
        assert_eq!(vips, ["10.1.250.200", "10.1.250.201", "fd00:0:0:1::fac8", "fd00:0:0:1::fac9"]);
        let sets = |vip: &str| {
            let Service { backends, draining, unhealthy } = &network[&vip.parse::<IpAddr>().unwrap()];
            [backends, draining, unhealthy].map(|set| set.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(sets("10.1.250.200"), ["10.1.1.10 10.1.1.11", "10.1.1.12", "10.1.1.13"]);
        assert_eq!(sets("fd00:0:0:1::fac8"), ["fd00:0:0:1::10a", "fd00:0:0:1::10c", "fd00:0:0:1::10d"]);
        assert_eq!(sets("10.1.250.201"), ["", "", ""]);
    }

    #[test]
    fn ports_of_a_task_that_stops_are_told_apart() {
        let endpoint = |task: &str, last: u8| {
            let json = format!(
                r#"{{"network":"net1","task":"{task}","v4":"10.1.1.{last}","v6":null,"mac":"02:42:00:00:00:{last:02}",
                "sandbox":"s","ports":[{{"proto":"tcp","host_ip":null,"host_port":80{last},"host_port_end":80{last},
                "port":80}}]}}"#
            );
            (format!("plugin/endpoint/{task}"), json)
        };
        let plugin = PluginState::load(&[endpoint("t1", 10), endpoint("t2", 11)].into());
        assert_eq!(plugin.endpoints().len(), 2, "{:?}", plugin.damaged().collect::<Vec<_>>());
        let of = |task: &str, draining| EndpointAssignment {
            task: TaskId::new(task),
            draining,
            ..crate::dns::zone::tests::endpoint(1, 10, &[], &[], false)
        };
        let stops = draining(&[of("t1", true), of("t2", false), of("elsewhere", true)], &plugin);
        assert_eq!(stops, BTreeSet::from([TaskId::new("t1")]));
        let ours = assignment(1, "shop", false);
        let vtep = "192.0.2.1".parse().unwrap();
        let (state, _) = network(&ours, &[], (&plugin, &stops), &Leases::default(), vtep).unwrap();
        let rules = host([&ours], &[], (&plugin, &stops), &BTreeMap::new(), vtep);
        for published in [state.published, rules.published] {
            let found: Vec<_> = published.iter().map(|p| (p.host_port, p.draining)).collect();
            assert_eq!(found, [(8010, true), (8011, false)]);
        }
    }

    #[test]
    fn ports_of_every_host_lead_into_networks_that_are_open() {
        let ports = |network: u8, name: &str, published: u16| ServiceAssignment {
            ports: vec![skein_api::IngressPort { protocol: skein_api::Protocol::Udp, published, target: 53 }],
            ..service(network, name, 200)
        };
        let known = [assignment(1, "shop", false), assignment(2, "back", true)].map(|n| (n.id.clone(), n)).into();
        let all = leads(&[ports(1, "dns", 5353), ports(2, "inner", 5354), ports(3, "unknown", 5355)], &known);
        let keys: Vec<_> = all.keys().copied().collect();
        assert_eq!(keys, [(Proto::Udp, 5353)]);
        let Lead { network, service, to } = &all[&keys[0]];
        assert_eq!((network.as_str(), service.as_str(), to.target_port), ("net1", "dns", 53));
        assert_eq!(
            (to.vip4.to_string(), to.vip(true).map(|vip| vip.to_string())),
            ("10.1.250.200".into(), Some("fd00:0:0:1::fac8".into()))
        );
    }

    #[test]
    fn both_families_of_a_block() {
        let state = bare_network(&assignment(1, "shop", false)).unwrap();
        let blocks: Vec<String> = state.local_blocks.iter().map(IpNet::to_string).collect();
        assert_eq!(blocks, ["10.1.1.0/24", "fd00:0:0:1::100/120"]);
    }
}
