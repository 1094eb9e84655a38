//! Planning against the simulated kernel: whatever the states, they converge, the second plan is empty, and what is not
//! ours stays as it was.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlib::{
    Endpoint, EndpointId, Error, HostConfig, HostIndex, HostState, Ingress, IngressPort, Kernel, NetworkId,
    NetworkState, Peer, Proto, PublishedPort, Report, Scope, Service, Translated, driver,
    fake::{FakeKernel, FakeState},
    fast::{FastFound, Way},
    names,
    plan::Op,
    state::{Direction, Family, Link, LinkKind, Observed, Query, Route, RouteKey, Target},
};
use proptest::prelude::*;

const SUBNET: [u8; 2] = [10, 57];

fn config() -> HostConfig {
    HostConfig::new(HostIndex(1), IpAddr::from([192, 0, 2, 1]), 1500)
}

fn addr4(host: u8, nth: u8) -> Ipv4Addr {
    Ipv4Addr::new(SUBNET[0], SUBNET[1], host, nth)
}

fn addr6(host: u8, nth: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd57, 0, 0, u16::from(host), 0, 0, 0, u16::from(nth))
}

fn blocks(host: u8, six: bool) -> BTreeSet<ipnet::IpNet> {
    let mut blocks = BTreeSet::from([format!("10.57.{host}.0/24").parse().expect("net")]);
    if six {
        blocks.insert(format!("fd57:0:0:{host}::/64").parse().expect("net"));
    }
    blocks
}

fn state(peers: &BTreeSet<u8>, endpoints: &BTreeSet<u8>, six: bool, internal: bool, vni: u32) -> NetworkState {
    let peer = |host: &u8| {
        (
            HostIndex(u16::from(*host)),
            Peer { vtep: IpAddr::from([192, 0, 2, *host]), blocks: blocks(*host, six), mtu: None },
        )
    };
    let endpoint =
        |nth: &u8| (EndpointId(format!("e{nth}")), Endpoint::new(addr4(1, *nth), six.then(|| addr6(1, *nth))));
    let published = endpoints.iter().take(2).map(|nth| PublishedPort {
        proto: Proto::Tcp,
        host_ip: None,
        host_port: 8000 + u16::from(*nth),
        target: IpAddr::V4(addr4(1, *nth)),
        target_port: 80,
        draining: false,
    });
    NetworkState {
        id: "blue".parse().expect("id"),
        vni,
        subnet4: "10.57.0.0/16".parse().expect("net"),
        subnet6: six.then(|| "fd57::/32".parse().expect("net")),
        gateway4: addr4(0, 1),
        gateway6: six.then(|| addr6(0, 1)),
        mtu: 1450,
        internal,
        local_blocks: blocks(1, six),
        peers: peers.iter().map(peer).collect(),
        endpoints: endpoints.iter().map(endpoint).collect(),
        published: published.collect(),
        services: endpoints.first().map(|nth| service(250, &[*nth], six)).into_iter().flatten().collect(),
        ingress: endpoints.first().filter(|_| !internal).map(|_| ingress(six)),
    }
}

/// A service with these backends on this host, by its virtual addresses.
/// Port 80 of every host leads to service 250, from .254 of this one.
fn ingress(six: bool) -> Ingress {
    let (vip4, vip6) = (addr4(250, 250), six.then(|| addr6(250, 250)));
    let ports = [((Proto::Tcp, 80), IngressPort { vip4, vip6, target_port: 8080 })].into();
    Ingress { addr4: addr4(1, 254), addr6: six.then(|| addr6(1, 254)), ports }
}

fn service(vip: u8, backends: &[u8], six: bool) -> BTreeMap<IpAddr, Service> {
    let of = |addr: fn(u8, u8) -> IpAddr| {
        let backends = backends.iter().map(|nth| addr(1, *nth)).collect();
        (addr(250, vip), Service { backends, ..Service::default() })
    };
    let four = of(|host, nth| addr4(host, nth).into());
    [Some(four), six.then(|| of(|host, nth| addr6(host, nth).into()))].into_iter().flatten().collect()
}

fn any_state() -> impl Strategy<Value = NetworkState> {
    let peers = prop::collection::btree_set(2u8..20, 0..8);
    let endpoints = prop::collection::btree_set(2u8..20, 0..8);
    (peers, endpoints, any::<bool>(), any::<bool>(), 1u32..4)
        .prop_map(|(peers, endpoints, six, internal, vni)| state(&peers, &endpoints, six, internal, vni))
}

/// What the engine and the agent do: containers that are wanted and have no link yet are attached.
fn attach(kernel: &FakeKernel, state: &NetworkState, report: &Report) {
    for id in &report.lost_endpoints {
        driver::add_endpoint(kernel, state, &state.endpoints[id], &format!("c-{id}")).expect("attaches");
    }
}

fn settle(kernel: &FakeKernel, state: &NetworkState) -> Result<(), Error> {
    let report = driver::ensure_network(kernel, &config(), state)?;
    assert!(report.conflicts.is_empty(), "{report:?}");
    attach(kernel, state, &report);
    Ok(())
}

fn quiet(kernel: &FakeKernel, state: &NetworkState) {
    let report = driver::ensure_network(kernel, &config(), state).expect("ensures");
    assert!(report.is_empty(), "the second plan is empty: {report:?}");
}

/// Things that are not ours, in the host and in the fabric, and one link of the host with its route and sysctl.
fn plant(kernel: &FakeKernel, id: &NetworkId) {
    let link = || Link { kind: LinkKind::Other, mac: netlib::Mac([4; 6]), mtu: 1500, up: true };
    let key = RouteKey::new("198.51.100.0/24".parse().expect("net"));
    let route = || Route { target: Target::Dev { dev: "eth9".into(), via: None }, protocol: 4, mtu: None };
    kernel.with(|state| {
        let fabric = state.fabrics.get_mut(id).expect("fabric");
        for ns in [&mut state.host, fabric] {
            ns.links.insert("eth9".into(), link());
            ns.routes.insert(key, route());
            ns.addrs.insert(("eth9".into(), "198.51.100.1/24".parse().expect("net")));
            ns.neighs.insert(("eth9".into(), IpAddr::from([198, 51, 100, 2])), netlib::Mac([6; 6]));
        }
    });
}

fn foreign(state: &FakeState) -> String {
    let of = |ns: &Observed| {
        let links: Vec<_> = ns.links.iter().filter(|(name, _)| !name.starts_with("sk")).collect();
        let routes: Vec<_> = ns.routes.iter().filter(|(_, route)| route.protocol != names::RTPROT_SKEIN).collect();
        let addrs: Vec<_> = ns.addrs.iter().filter(|(dev, _)| !dev.starts_with("sk") && dev != "lo").collect();
        let neighs: Vec<_> = ns.neighs.iter().filter(|((dev, _), _)| !dev.starts_with("sk")).collect();
        format!("{links:?} {routes:?} {addrs:?} {neighs:?}")
    };
    let fabrics: Vec<_> = state.fabrics.values().map(of).collect();
    // The engine's ends of containers' veths come and go by other hands.
    let mut host = state.host.clone();
    host.links.retain(|name, _| !name.starts_with("c-"));
    format!("{} {fabrics:?}", of(&host))
}

/// One kind of damage to what is ours, chosen by numbers.
fn damage(state: &mut FakeState, kind: u8, nth: usize) {
    fn pick<'a, K: Clone + 'a>(keys: impl Iterator<Item = &'a K>, nth: usize) -> Option<K> {
        let keys: Vec<&K> = keys.collect();
        keys.get(nth % keys.len().max(1)).map(|key| (*key).clone())
    }
    let Some((id, fabric)) = state.fabrics.iter_mut().next() else {
        return;
    };
    let scope = Scope::Fabric(id.clone());
    let ours = |name: &str| name.starts_with("sk");
    match kind {
        0 => {
            let routes = fabric.routes.iter().filter(|(_, route)| route.protocol == names::RTPROT_SKEIN);
            drop(pick(routes.map(|(key, _)| key), nth).map(|key| fabric.routes.remove(&key)));
        }
        1 => {
            let neighs = fabric.neighs.keys().filter(|(dev, _)| ours(dev));
            if let Some(key) = pick(neighs, nth) {
                fabric.neighs.remove(&key);
            }
        }
        2 => {
            if let Some(key) = pick(fabric.fdb.keys(), nth) {
                fabric.fdb.remove(&key);
            }
        }
        3 => {
            if let Some(id) = pick(fabric.nexthops.keys(), nth) {
                fabric.drop_nexthop(id);
            }
        }
        4 => {
            let name = pick(fabric.links.keys().filter(|name| ours(name)), nth);
            if let Some(name) = name {
                state.delete_link(&scope, &name);
            }
        }
        5 => fabric.table = None,
        6 => drop(fabric.sysctls.insert("net/ipv4/ip_forward".into(), "0".into())),
        7 => {
            let name = pick(fabric.links.keys().filter(|name| ours(name)), nth);
            if let Some(link) = name.and_then(|name| fabric.links.get_mut(&name)) {
                link.mtu += 1;
                link.up = false;
            }
        }
        8 => state.host.routes.retain(|_, route| route.protocol != names::RTPROT_SKEIN),
        9 => state.host.neighs.retain(|(dev, _), _| !ours(dev)),
        10 => {
            let name = pick(state.host.links.keys().filter(|name| name.starts_with("ske-")), nth);
            if let Some(name) = name {
                state.delete_link(&Scope::Host, &name);
            }
        }
        _ => {
            let stray = Route::ours(Target::Unreachable);
            fabric.routes.insert(RouteKey::new("203.0.113.0/24".parse().expect("net")), stray);
        }
    }
}

fn fast_config() -> HostConfig {
    HostConfig { fast_path: true, ..config() }
}

/// What the fast path is in the fabric.
fn fast_of(kernel: &FakeKernel, state: &NetworkState) -> FastFound {
    kernel.with(|all| all.fabrics[&state.id].fast.clone().unwrap_or_default())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_fast_path_follows_and_goes(first in any_state(), second in any_state()) {
        let kernel = FakeKernel::new();
        for state in [&first, &second, &first] {
            let report = driver::ensure_network(&kernel, &fast_config(), state).expect("ensures");
            for id in &report.lost_endpoints {
                let endpoint = &state.endpoints[id];
                driver::add_endpoint(&kernel, state, endpoint, &format!("c-{id}")).expect("attaches");
                driver::speed_up_endpoint(&kernel, &fast_config(), state, endpoint);
            }
            let report = driver::ensure_network(&kernel, &fast_config(), state).expect("ensures");
            prop_assert!(report.is_empty(), "the second plan is empty: {report:?}");
            let fast = fast_of(&kernel, state);
            prop_assert_eq!(fast.programs.len(), 1 + state.endpoints.len(), "tunnel and containers");
            let addrs: BTreeSet<IpAddr> = state.endpoints.values().flat_map(Endpoint::addrs).collect();
            prop_assert_eq!(fast.locals.keys().copied().collect::<BTreeSet<_>>(), addrs);
            let to_peers = fast.ways.values().filter(|way| matches!(way, Way::Peer { .. })).count();
            prop_assert_eq!(to_peers, state.peers.values().map(|peer| peer.blocks.len()).sum::<usize>());
            prop_assert_eq!(&fast.ways[&ipnet::IpNet::V4(state.subnet4)], &Way::Nobody);
        }
        driver::ensure_network(&kernel, &config(), &first).expect("ensures");
        prop_assert_eq!(fast_of(&kernel, &first), FastFound::default());
    }

    #[test]
    fn any_states_converge_in_any_order(
        states in prop::collection::vec(any_state(), 1..5),
        damages in prop::collection::vec((0u8..12, any::<usize>()), 0..6),
    ) {
        let kernel = FakeKernel::new();
        settle(&kernel, &states[0]).expect("settles");
        plant(&kernel, &states[0].id);
        let before = kernel.with(|state| foreign(state));
        for state in &states {
            settle(&kernel, state).expect("settles");
            quiet(&kernel, state);
            let links = kernel.with(|fake| fake.fabrics[&state.id].links.clone());
            let containers = links.keys().filter(|name| name.starts_with(names::ENDPOINT_PREFIX)).count();
            prop_assert_eq!(containers, state.endpoints.len());
            let uplink = names::host_uplink_ifname(state.vni);
            let block = RouteKey::new("10.57.1.0/24".parse().expect("net"));
            let out = kernel.with(|fake| (fake.host.links.contains_key(&uplink), fake.host.routes.contains_key(&block)));
            prop_assert_eq!(out, (!state.internal, !state.internal));
        }
        let last = states.last().expect("not empty");
        for (kind, nth) in damages {
            kernel.with(|state| damage(state, kind, nth));
            settle(&kernel, last).expect("repairs");
            quiet(&kernel, last);
        }
        prop_assert_eq!(kernel.with(|state| foreign(state)), before);
        prop_assert!(driver::remove_network(&kernel, &last.id).expect("removes"));
        let left = kernel.with(|state| state.host.routes.values().any(|route| route.protocol == names::RTPROT_SKEIN));
        prop_assert!(!left);
    }
}

fn numbers(values: impl IntoIterator<Item = u8>) -> BTreeSet<u8> {
    values.into_iter().collect()
}

#[test]
fn a_block_that_moves_is_replaced_and_never_absent() {
    let kernel = FakeKernel::new();
    let before = state(&numbers([2, 3]), &numbers([]), true, false, 5);
    settle(&kernel, &before).expect("settles");
    let mut after = before.clone();
    let blocks = after.peers.remove(&HostIndex(2)).expect("peer").blocks;
    after.peers.get_mut(&HostIndex(3)).expect("peer").blocks.extend(blocks);
    let report = driver::ensure_network(&kernel, &config(), &after).expect("ensures");
    let at = |text: &str| report.changes.iter().position(|change| change.contains(text)).expect(text);
    assert!(at("put route 10.57.2.0/24") < at("remove next hop"), "{report:?}");
    assert!(!report.changes.iter().any(|change| change.contains("remove route")), "{report:?}");
    quiet(&kernel, &after);
}

#[test]
fn the_host_is_brought_into_shape_once() {
    let kernel = FakeKernel::new();
    kernel.with(|state| {
        state.host.docker_user.insert(Family::V4, [Direction::Out].into());
    });
    let port = PublishedPort {
        proto: Proto::Udp,
        host_ip: None,
        host_port: 53,
        target: IpAddr::V4(addr4(1, 2)),
        target_port: 53,
        draining: false,
    };
    let vteps = [IpAddr::from([192, 0, 2, 2])].into();
    let want = HostState { vteps, published: [port].into(), ipv6: true, ..HostState::default() };
    let report = driver::ensure_host(&kernel, &config(), &want).expect("ensures");
    let expected = [
        "host: set sysctl net.ipv6.conf.lo.accept_ra to 2",
        "host: set sysctl net.ipv4.ip_forward to 1",
        "host: set sysctl net.ipv6.conf.all.forwarding to 1",
        "host: put nft table inet skein",
        "host: accept packets from overlay networks in iptables chain DOCKER-USER",
    ];
    assert_eq!(report.changes, expected);
    assert!(driver::ensure_host(&kernel, &config(), &want).expect("ensures").is_empty());
    let more = HostState { vteps: ["192.0.2.2", "192.0.2.3"].map(|ip| ip.parse().expect("ip")).into(), ..want };
    let report = driver::ensure_host(&kernel, &config(), &more).expect("ensures");
    assert_eq!(report.changes, ["host: put elements of vteps4 in nft table inet skein"]);
}

#[test]
fn a_foreign_route_on_the_host_is_told_and_left_alone() {
    let kernel = FakeKernel::new();
    let key = RouteKey::new("10.57.1.0/24".parse().expect("net"));
    let theirs = Route { target: Target::Other, protocol: 4, mtu: None };
    kernel.with(|state| state.host.routes.insert(key, theirs.clone()));
    let want = state(&numbers([2]), &numbers([]), false, false, 5);
    let report = driver::ensure_network(&kernel, &config(), &want).expect("ensures");
    assert_eq!(report.conflicts.len(), 1, "{report:?}");
    assert_eq!(kernel.with(|state| state.host.routes[&key].clone()), theirs);
}

/// A kernel that takes a link away between the observation and the first change of a fabric.
struct Vanishing {
    kernel: FakeKernel,
    link: std::sync::Mutex<Option<String>>,
}

impl Kernel for Vanishing {
    fn networks(&self) -> Result<Vec<NetworkId>, Error> {
        self.kernel.networks()
    }

    fn create_fabric(&self, id: &NetworkId) -> Result<bool, Error> {
        self.kernel.create_fabric(id)
    }

    fn remove_fabric(&self, id: &NetworkId) -> Result<bool, Error> {
        self.kernel.remove_fabric(id)
    }

    fn observe(&self, scope: &Scope, query: &Query) -> Result<Observed, Error> {
        self.kernel.observe(scope, query)
    }

    fn apply(&self, scope: &Scope, ops: &[Op]) -> Result<(), Error> {
        if let (Scope::Fabric(_), Some(link)) = (scope, self.link.lock().expect("not poisoned").take()) {
            self.kernel.with(|state| state.delete_link(scope, &link));
        }
        self.kernel.apply(scope, ops)
    }

    fn forget_connections(&self, scope: &Scope, goes: &(dyn Fn(&Translated) -> bool + Sync)) -> Result<usize, Error> {
        self.kernel.forget_connections(scope, goes)
    }
}

#[test]
fn a_link_that_vanishes_while_it_is_wired_is_lost_and_no_failure() {
    let kernel = Vanishing { kernel: FakeKernel::new(), link: Default::default() };
    let mut want = state(&numbers([2]), &numbers([7, 8]), true, false, 57);
    settle(&kernel.kernel, &want).expect("settles");
    let (doomed, endpoint) = want.endpoints.first_key_value().map(|(id, it)| (id.clone(), it.clone())).expect("two");
    // Something to do on the doomed link, and something elsewhere that still must be done.
    kernel.kernel.with(|state| {
        let fabric = state.fabrics.get_mut(&want.id).expect("fabric");
        fabric.neighs.retain(|(dev, _), _| *dev != endpoint.fabric_ifname());
        fabric.routes.remove(&RouteKey::new(IpAddr::V4(addr4(1, 7)).into()));
    });
    want.peers.extend(state(&numbers([3]), &numbers([]), true, false, 57).peers);
    *kernel.link.lock().expect("not poisoned") = Some(endpoint.fabric_ifname());
    let report = driver::ensure_network(&kernel, &config(), &want).expect("no failure");
    assert_eq!(report.lost_endpoints, [doomed].into(), "{report:?}");
    assert!(report.changes.iter().any(|change| change.contains("10.57.3.0/24")), "{report:?}");
    assert!(!report.changes.iter().any(|change| change.contains(&endpoint.fabric_ifname())), "{report:?}");
    settle(&kernel.kernel, &want).expect("settles");
    quiet(&kernel.kernel, &want);
}

#[test]
fn a_change_of_services_touches_the_rules_alone() {
    let kernel = FakeKernel::new();
    let mut want = state(&numbers([2]), &numbers([7, 8]), true, false, 57);
    settle(&kernel, &want).expect("settles");
    // A route that is gone stays gone: the fast path does not look at it.
    kernel.with(|state| state.fabrics.get_mut(&want.id).expect("fabric").routes.clear());
    want.ingress = None;
    driver::ensure_rules(&kernel, &config(), &want).expect("ensures");
    let mut rules = |services: BTreeMap<IpAddr, Service>| {
        want.services = services;
        let report = driver::ensure_rules(&kernel, &config(), &want).expect("ensures");
        let again = driver::ensure_rules(&kernel, &config(), &want).expect("ensures");
        assert!(again.is_empty(), "{again:?}");
        report.changes
    };
    let frame = "network blue: put nft table inet skein";
    let elements = |sets: &str| format!("network blue: put elements of {sets} in nft table inet skein");
    assert_eq!(rules(service(250, &[8], true)), [elements("backends4, backends6, self6")]);
    assert_eq!(rules(service(250, &[7, 8], true)), [frame], "another number of backends is another rule");
    let mut two = service(251, &[7], true);
    two.extend(service(250, &[7, 8], true));
    assert_eq!(rules(two), [frame]);
    assert_eq!(rules(service(250, &[7, 8], true)), [frame]);
    assert_eq!(rules(service(250, &[], true)), [frame]);
    assert_eq!(rules(BTreeMap::new()), [frame]);
    assert!(kernel.with(|state| state.fabrics[&want.id].routes.is_empty()));
}

#[test]
fn only_connections_to_dead_backends_are_forgotten() {
    let kernel = FakeKernel::new();
    let mut want = state(&numbers([2]), &numbers([7]), true, false, 57);
    settle(&kernel, &want).expect("settles");
    let at = |nth: u8| IpAddr::from(addr4(1, nth));
    let (vip, other): (IpAddr, IpAddr) = (addr4(250, 250).into(), addr4(250, 251).into());
    let fabric = Scope::Fabric(want.id.clone());
    let one = |asked: IpAddr, nth: u8, tcp| {
        let port = Some((if tcp { Proto::Tcp } else { Proto::Udp }, 80));
        (fabric.clone(), Translated { asked, port, answers: at(nth) })
    };
    // By a published port, and in the host's own namespace: neither is a service's.
    let published = one([192, 0, 2, 1].into(), 7, false);
    let elsewhere = (Scope::Host, one(vip, 9, true).1);
    // By port 80 of every host, from outside (to this host's address in the network) and from a container here.
    let (outside, inside) = (addr4(1, 254).into(), IpAddr::from([192, 0, 2, 1]));
    let by_port = [outside, inside].map(|asked| one(asked, 3, true));
    let mut all = vec![published.clone(), elsewhere.clone(), one(other, 2, true)];
    all.extend([one(outside, 2, false), one(outside, 5, true), one(inside, 5, true), one(inside, 5, false)]);
    all.extend(by_port.clone());
    all.extend([true, false].into_iter().flat_map(|tcp| [2, 3, 4, 5].map(|nth| one(vip, nth, tcp))));
    kernel.with(|state| state.connections = all);
    let set = |nth| BTreeSet::from([at(nth)]);
    want.services = BTreeMap::from([(vip, Service { backends: set(2), draining: set(3), unhealthy: set(4) })]);
    want.ingress = Some(ingress(false));
    driver::sweep_connections(&kernel, &want).expect("sweeps");
    let mut kept = vec![published, elsewhere];
    kept.extend(by_port);
    kept.extend([one(vip, 2, true), one(vip, 3, true), one(vip, 4, true), one(vip, 2, false), one(vip, 3, false)]);
    assert_eq!(kernel.with(|state| state.connections.clone()), kept);
}

#[test]
fn in_the_host_connections_end_with_their_port() {
    let kernel = FakeKernel::new();
    let (ours, container) = (IpAddr::from(addr4(1, 254)), IpAddr::from(addr4(1, 7)));
    let one = |port, answers| {
        (Scope::Host, Translated { asked: [192, 0, 2, 1].into(), port: Some((Proto::Udp, port)), answers })
    };
    kernel.with(|state| state.connections = vec![one(80, ours), one(81, ours), one(81, container)]);
    let port = PublishedPort {
        proto: Proto::Udp,
        host_ip: None,
        host_port: 80,
        target: ours,
        target_port: 80,
        draining: false,
    };
    let want = HostState { published: [port].into(), ingress: [ours].into(), ..HostState::default() };
    driver::sweep_host_connections(&kernel, &want).expect("sweeps");
    assert_eq!(kernel.with(|state| state.connections.clone()), [one(80, ours), one(81, container)]);
}

#[test]
fn the_fake_refuses_what_the_kernel_refuses() {
    let kernel = FakeKernel::new();
    let want = state(&numbers([2]), &numbers([]), false, true, 5);
    settle(&kernel, &want).expect("settles");
    let twin = NetworkState { id: "red".parse().expect("id"), ..want.clone() };
    let error = driver::ensure_network(&kernel, &config(), &twin).expect_err("the vni is taken");
    let Error::Apply { failures, .. } = &error else { panic!("{error}") };
    assert!(
        failures.0[0].what.contains("vxlan device") && failures.0[0].source.kind() == std::io::ErrorKind::AlreadyExists
    );
    let endpoint = Endpoint::new(addr4(1, 9), None);
    let nowhere = NetworkState { id: "green".parse().expect("id"), ..want };
    assert!(matches!(driver::add_endpoint(&kernel, &nowhere, &endpoint, "c"), Err(Error::NoNetwork(_))));
}

#[test]
fn contradictions_are_refused_before_anything_changes() {
    let good = state(&numbers([2, 3]), &numbers([4, 5]), true, false, 5);
    let check = |says: &str, spoil: &dyn Fn(&mut NetworkState)| {
        let kernel = FakeKernel::new();
        let mut bad = good.clone();
        spoil(&mut bad);
        let error = driver::ensure_network(&kernel, &config(), &bad).expect_err(says).to_string();
        assert!(error.starts_with("invalid network state: ") && error.contains(says), "{error}");
        assert_eq!(kernel.with(|state| state.clone()), FakeState::default());
        assert!(kernel.networks().expect("lists").is_empty());
    };
    check("vni 0", &|state| state.vni = 0);
    check("mtu 1451", &|state| state.mtu = 1451);
    check("gateway 10.9.0.1", &|state| state.gateway4 = Ipv4Addr::new(10, 9, 0, 1));
    check("ipv6 gateway", &|state| state.gateway6 = None);
    check("is outside network blue", &|state| {
        let outside = "10.58.0.0/24".parse().expect("net");
        state.local_blocks.insert(outside);
    });
    check("belongs to both host 1 and host 2", &|state| {
        state.peers.get_mut(&HostIndex(2)).expect("peer").blocks = blocks(1, false);
    });
    check("in use by another host", &|state| {
        state.peers.get_mut(&HostIndex(2)).expect("peer").vtep = IpAddr::from([192, 0, 2, 3]);
    });
    check("two families", &|state| {
        state.peers.get_mut(&HostIndex(2)).expect("peer").vtep = "2001:db8::2".parse().expect("ip");
    });
    check("cannot be a peer", &|state| {
        let peer = Peer { vtep: IpAddr::from([192, 0, 2, 9]), blocks: BTreeSet::new(), mtu: None };
        state.peers.insert(HostIndex(1), peer);
    });
    let lead = |state: &mut NetworkState, vip: IpAddr, backend: IpAddr| {
        state.services.insert(vip, Service { backends: [backend].into(), ..Service::default() });
    };
    check("virtual address 10.58.0.1 is outside", &|state| lead(state, [10, 58, 0, 1].into(), addr4(1, 4).into()));
    check("virtual address 10.57.1.4 is taken", &|state| lead(state, addr4(1, 4).into(), addr4(1, 5).into()));
    check("virtual address 10.57.0.1 is taken", &|state| lead(state, addr4(0, 1).into(), addr4(1, 5).into()));
    check("cannot lead to fd57", &|state| lead(state, addr4(250, 9).into(), addr6(1, 5).into()));
    check("cannot lead to 10.57.250.250", &|state| lead(state, addr4(250, 9).into(), addr4(250, 250).into()));
    let spoil = |state: &mut NetworkState, how: fn(&mut Ingress)| how(state.ingress.as_mut().expect("not internal"));
    check("address 10.57.1.4 cannot be this host's own", &|state| spoil(state, |i| i.addr4 = addr4(1, 4)));
    check("address 10.57.2.254 cannot be this host's own", &|state| spoil(state, |i| i.addr4 = addr4(2, 254)));
    check("port 80/tcp leads to 10.57.250.250, which is no service", &|state| state.services.clear());
    check("is internal and has ports", &|state| state.internal = true);
    check("is taken", &|state| {
        state.endpoints.insert(EndpointId("twin".into()), Endpoint::new(addr4(1, 4), None));
    });
}

#[test]
fn names_and_numbers_are_as_documented() {
    assert_eq!(names::vtep_mac(0x01_02_03, HostIndex(0x0405)).to_string(), "02:01:02:03:04:05");
    assert_eq!(names::endpoint_mac(addr4(1, 7)).to_string(), "06:53:0a:39:01:07");
    assert_eq!(names::endpoint_ifname(addr4(1, 7)), "skv-0a390107");
    assert_eq!(names::host_nexthop(HostIndex(2)).to_string(), "fe80::53:2");
    assert!(names::host_uplink_ifname(netlib::types::VNI_MAX).len() <= 15);
    assert_eq!("02:01:02:03:04:05".parse(), Ok(names::vtep_mac(0x01_02_03, HostIndex(0x0405))));
    for bad in ["", "02:01:02:03:04", "02:01:02:03:04:05:06", "2:1:2:3:4:5", "zz:01:02:03:04:05"] {
        assert!(bad.parse::<netlib::Mac>().is_err(), "{bad}");
    }
    for bad in ["", "..", "-x", "a/b", "a b", &"x".repeat(65)] {
        assert!(bad.parse::<NetworkId>().is_err(), "{bad}");
    }
    assert_eq!(names::network_of_netns("sk-blue"), "blue".parse().ok());
    assert_eq!(names::network_of_netns("other"), None);
}

#[test]
fn a_container_that_was_there_before_its_services_is_routed() {
    let state = state(&[2].into(), &[7].into(), false, false, 1);
    assert!(!state.services.is_empty());
    let kernel = FakeKernel::new();
    settle(&kernel, &state).expect("settles");
    let report = driver::ensure_network(&kernel, &fast_config(), &state).expect("ensures");
    let put = report.changes.iter().find(|change| change.contains("put 10.57.1.7 on")).expect("the container");
    assert!(put.ends_with("routed for now"), "{put}");
    // The ways stand before anybody asks for them.
    let at = |text: &str| report.changes.iter().position(|change| change.contains(text)).expect("a change");
    assert!(at("put fast way 10.57.0.0/16 to no host") < at("put 10.57.1.7 on"));
    assert!(at("put 10.57.1.7 on") < at("attach program sko"));
}

#[test]
fn a_virtual_address_in_a_block_ends_the_fast_path() {
    let mut state = state(&[2].into(), &[7].into(), false, false, 1);
    let kernel = FakeKernel::new();
    settle(&kernel, &state).expect("settles");
    driver::ensure_network(&kernel, &fast_config(), &state).expect("ensures");
    assert_eq!(fast_of(&kernel, &state).programs.len(), 2);
    state.services.extend([(addr4(2, 9).into(), Service::default())]);
    let report = driver::ensure_network(&kernel, &fast_config(), &state).expect("ensures");
    assert!(report.changes.iter().any(|change| change.ends_with("remove the fast path")), "{report:?}");
    assert_eq!(fast_of(&kernel, &state), FastFound::default());
}
