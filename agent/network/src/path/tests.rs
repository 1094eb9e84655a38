//! Every hop broken in turn, on what a simulated kernel really has after the driver made it.

use std::collections::BTreeMap;

use netlib::{
    EndpointId, HostConfig, HostIndex, HostState, NetworkState, Peer, Service, driver, fake::FakeKernel, look,
    state::Nexthop,
};
use skein_api::HopState;

use super::*;

const HERE: &str = "10.57.1.7";
const THERE: &str = "10.57.2.9";
const VIP: &str = "10.57.250.1";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn endpoint() -> Endpoint {
    Endpoint::new("10.57.1.7".parse().expect("an address"), None)
}

/// What a host has that runs `HERE` and has a peer with the block of `THERE`.
fn looks() -> (Look, Look) {
    let kernel = FakeKernel::default();
    let config = HostConfig::new(HostIndex(1), ip("192.0.2.1"), 1500);
    let peer = Peer { vtep: ip("192.0.2.2"), mtu: None, blocks: ["10.57.2.0/24".parse().expect("a block")].into() };
    let service = Service { backends: [ip(THERE)].into(), ..Service::default() };
    let state = NetworkState {
        id: "blue".parse().expect("an id"),
        vni: 4096,
        subnet4: "10.57.0.0/16".parse().expect("a subnet"),
        subnet6: None,
        gateway4: "10.57.0.1".parse().expect("an address"),
        gateway6: None,
        mtu: 1450,
        internal: false,
        local_blocks: ["10.57.1.0/24".parse().expect("a block")].into(),
        peers: [(HostIndex(2), peer)].into(),
        endpoints: [(EndpointId("e".into()), endpoint())].into(),
        published: Default::default(),
        services: [(ip(VIP), service)].into(),
        ingress: None,
    };
    driver::ensure_network(&kernel, &config, &NetworkState { endpoints: BTreeMap::new(), ..state.clone() })
        .expect("made");
    driver::add_endpoint(&kernel, &state, &endpoint(), "skc-1").expect("made");
    driver::ensure_network(&kernel, &config, &state).expect("made");
    let host = HostState { vteps: [ip("192.0.2.2")].into(), ..HostState::default() };
    driver::ensure_host(&kernel, &config, &host).expect("made");
    let mut fabric = look::network(&kernel, &config, &state).expect("looks");
    (fabric.remove(0), look::host(&kernel, &config, &host).expect("looks"))
}

/// The first broken hop, by name, with what is wrong.
fn first(hops: &[Hop]) -> Option<(&str, &str)> {
    hops.iter().find(|h| h.state == HopState::Broken).map(|h| (h.hop.as_str(), h.fault.as_str()))
}

#[test]
fn what_is_as_wanted_is_fine_at_every_hop() {
    let (fabric, host) = looks();
    let out = outgoing(&fabric, &endpoint(), ip(HERE), ip(THERE), None);
    let names: Vec<&str> = out.iter().map(|h| h.hop.as_str()).collect();
    let expected = [
        "container's link",
        "container's neighbour",
        "container's route",
        "vxlan device",
        "rules",
        "forwarding",
        "route",
        "next hop",
        "neighbour",
        "forwarding entry",
    ];
    assert_eq!(names, expected);
    let all = [
        out,
        incoming(&fabric, &endpoint(), ip(HERE), ip(THERE)),
        vec![
            guard(&host, ip("192.0.2.2")),
            virtual_address(&fabric, ip(VIP), ip(THERE), true),
            name("web", &[ip("10.57.2.8"), ip(THERE)], ip(THERE)),
        ],
    ];
    let bad: Vec<&Hop> = all.iter().flatten().filter(|h| h.state != HopState::Fine).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(vtep_of(&fabric.want, ip(THERE)), Some(ip("192.0.2.2")));
    assert_eq!(vtep_of(&fabric.want, ip(HERE)), None);
}

#[test]
fn each_entry_that_is_gone_or_wrong_is_the_first_broken_hop() {
    let check = |breaking: &dyn Fn(&mut Look), hop: &str, fault: &str| {
        let (mut fabric, _) = looks();
        breaking(&mut fabric);
        let hops = outgoing(&fabric, &endpoint(), ip(HERE), ip(THERE), None);
        let broken = hops.iter().find(|h| h.state == HopState::Broken);
        assert_eq!(first(&hops), Some((hop, fault)), "{hops:#?}");
        assert!(broken.is_some_and(|h| !h.repair.is_empty()));
    };
    let block = RouteKey::new("10.57.2.0/24".parse().expect("a block"));
    let own = RouteKey::new("10.57.1.7/32".parse().expect("a route"));
    let (skvx, skv) = ("skvx".to_owned(), "skv-0a390107".to_owned());
    check(&|l| drop(l.found.routes.remove(&block)), "route", "the route to 10.57.2.9 is gone");
    check(&|l| drop(l.found.routes.remove(&own)), "container's route", "the route to 10.57.1.7 is gone");
    check(
        &|l| {
            let away = Target::Dev { dev: "skup".to_owned(), via: None };
            l.found.routes.insert(block, Route::ours(away));
        },
        "route",
        "the route to 10.57.2.9 is wrong: 10.57.2.0/24 on skup instead of 10.57.2.0/24 next hop 1392508930",
    );
    check(&|l| l.found.nexthops.clear(), "next hop", "the next hop 1392508930 is gone");
    check(
        &|l| {
            let hop = l.found.nexthops.values().next().cloned().expect("a hop");
            l.found.nexthops.insert(1_392_508_930, Nexthop { via: ip("fe80::53:9"), ..hop });
        },
        "next hop",
        "the next hop 1392508930 is wrong: fe80::53:9 on skvx instead of fe80::53:2 on skvx",
    );
    let neighbour = (skvx.clone(), ip("fe80::53:2"));
    check(&|l| _ = l.found.neighs.remove(&neighbour), "neighbour", "the neighbour fe80::53:2 is gone");
    check(&|l| l.found.fdb.clear(), "forwarding entry", "the forwarding entry of 02:00:10:00:00:02 is gone");
    check(
        &|l| l.found.fdb.values_mut().for_each(|vtep| *vtep = ip("192.0.2.66")),
        "forwarding entry",
        "the forwarding entry of 02:00:10:00:00:02 is wrong: 02:00:10:00:00:02 at VTEP 192.0.2.66 instead of \
         02:00:10:00:00:02 at VTEP 192.0.2.2",
    );
    check(&|l| drop(l.found.links.remove(&skvx)), "vxlan device", "the VXLAN device skvx is gone");
    check(
        &|l| l.found.links.get_mut(&skvx).expect("there").up = false,
        "vxlan device",
        "the VXLAN device skvx is down",
    );
    check(&|l| drop(l.found.links.remove(&skv)), "container's link", "the container's link skv-0a390107 is gone");
    check(
        &|l| _ = l.found.neighs.remove(&(skv.clone(), ip(HERE))),
        "container's neighbour",
        "the neighbour 10.57.1.7 on skv-0a390107 is gone",
    );
    check(&|l| l.found.table = None, "rules", "the rules of the network are gone");
    check(
        &|l| drop(l.found.sysctls.insert("net/ipv4/ip_forward".into(), "0".into())),
        "forwarding",
        "sysctl net.ipv4.ip_forward is 0 instead of 1",
    );
}

#[test]
fn what_was_never_wanted_is_told_apart_from_what_is_gone() {
    let (fabric, host) = looks();
    let hops = outgoing(&fabric, &endpoint(), ip(HERE), ip("10.57.77.1"), None);
    assert_eq!(first(&hops), Some(("route", "it knows no host that has 10.57.77.1")));
    let fault = "192.0.2.3 is no host of the cluster for it, and its VXLAN is dropped";
    assert_eq!(first(&[guard(&host, ip("192.0.2.3"))]), Some(("vxlan guard", fault)));
    let mut broken = host.clone();
    let table = broken.found.table.as_mut().expect("a table");
    table.sets.get_mut("vteps4").expect("a set").1.clear();
    let fault = "192.0.2.2 is not among the hosts whose VXLAN its guard lets in";
    assert_eq!(first(&[guard(&broken, ip("192.0.2.2"))]), Some(("vxlan guard", fault)));
}

#[test]
fn virtual_addresses_and_names_lead_to_the_target_or_say_where_else() {
    let (mut fabric, _) = looks();
    let fault = "10.57.250.1 does not lead to 10.57.2.8, which is not healthy or about to stop";
    assert_eq!(first(&[virtual_address(&fabric, ip(VIP), ip("10.57.2.8"), false)]), Some(("virtual address", fault)));
    fabric.found.table.as_mut().expect("a table").sets.get_mut("backends4").expect("a map").1.clear();
    let fault = "10.57.250.1 does not lead to 10.57.2.9 any more";
    assert_eq!(first(&[virtual_address(&fabric, ip(VIP), ip(THERE), true)]), Some(("virtual address", fault)));
    let fault = "the name web answers with nothing instead of 10.57.2.9";
    assert_eq!(first(&[name("web", &[], ip(THERE))]), Some(("name", fault)));
}

#[test]
fn a_port_needs_a_listener_that_others_reach() {
    let check = |listeners: &[&str], expected: Option<&str>, repair: &str| {
        let listeners: Vec<SocketAddr> = listeners.iter().map(|l| l.parse().expect("an address")).collect();
        let hop = socket(&listeners, "tcp", ip(THERE), 80);
        assert_eq!(
            (first(std::slice::from_ref(&hop)).map(|(_, fault)| fault), hop.repair.as_str()),
            (expected, repair)
        );
    };
    check(&["0.0.0.0:80"], None, "");
    check(&["[::]:80"], None, "");
    check(&["10.57.2.9:80", "127.0.0.1:80"], None, "");
    let local = "its program listens on 127.0.0.1:80 only, which nobody else reaches";
    check(&["127.0.0.1:80"], Some(local), "let the program listen on 0.0.0.0:80");
    let nobody = Some("nobody in the container listens on port 80/tcp");
    check(&["0.0.0.0:443", "127.0.0.11:53"], nobody, "use one of 443/tcp, or start what listens on 80");
    check(&[], nobody, "`skein logs` shows whether the program has started");
}

#[test]
fn a_container_needs_its_address_and_a_route() {
    let gateway = ip("10.57.0.1");
    let link = Link { kind: netlib::state::LinkKind::Veth, mac: netlib::Mac([6; 6]), mtu: 1450, up: true };
    let by = |via| Route { target: Target::Dev { dev: "eth0".into(), via }, protocol: 3, mtu: None };
    let inside = Observed {
        links: [("eth0".to_owned(), link)].into(),
        addrs: [("eth0".to_owned(), "10.57.1.7/32".parse().expect("a net"))].into(),
        routes: [(RouteKey::new("0.0.0.0/0".parse().expect("a net")), by(Some(gateway)))].into(),
        ..Observed::default()
    };
    let check = |breaking: &dyn Fn(&mut Observed), expected: Option<(&str, &str)>| {
        let mut inside = inside.clone();
        breaking(&mut inside);
        assert_eq!(first(&container(&inside, ip(HERE), gateway, ip(THERE))), expected);
    };
    check(&|_| {}, None);
    let fault = "the container does not have its address 10.57.1.7";
    check(&|i| i.addrs.clear(), Some(("container's address", fault)));
    let fault = "eth0 in the container is down";
    check(&|i| i.links.get_mut("eth0").expect("there").up = false, Some(("container's address", fault)));
    let fault = "the container has no route to 10.57.2.9";
    check(&|i| i.routes.clear(), Some(("container's own route", fault)));
    let fault = "the container's route to 10.57.2.9 leads elsewhere: 10.57.2.0/24 on eth0";
    let narrower = RouteKey::new("10.57.2.0/24".parse().expect("a net"));
    check(&|i| drop(i.routes.insert(narrower, by(None))), Some(("container's own route", fault)));
}
