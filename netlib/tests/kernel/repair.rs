//! What is damaged is repaired and told; what is foreign is left alone; what is removed leaves nothing.

use std::time::Duration;

use netlib::{HostState, Scope};
use tokio::time::timeout;

use crate::lab::{Lab, blue, container, left_out, network, vtep};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_comes_back() {
    if left_out() {
        return;
    }
    let (lab, mut states) = blue(2).await;
    let a = container(&lab.hosts[0], &mut states[0], 7).await;
    let far = container(&lab.hosts[1], &mut states[1], 9).await;
    let host = &lab.hosts[0];
    let rules = HostState { vteps: [vtep(lab.hosts[1].index, false)].into(), ipv6: true, ..HostState::default() };
    host.overlay.ensure_host(&rules).await.expect("host");
    let listener = far.ns.listen(&far.addr4(80).to_string());
    let mut watch = host.overlay.watch().await.expect("watch");
    watch.changed().await.expect("the first look");
    let (fabric, blue) = (host.fabric("blue"), Scope::Fabric("blue".parse().expect("id")));
    let damages = [
        (&fabric, &blue, "ip route del 10.57.2.0/24"),
        (&fabric, &blue, "ip -6 route del fd57:57:2::/48"),
        (&fabric, &blue, "ip route del 10.57.1.7/32"),
        (&fabric, &blue, "ip route replace 10.57.2.0/24 dev skup"),
        (&fabric, &blue, "ip neigh del fe80::53:2 dev skvx"),
        (&fabric, &blue, "ip neigh replace 10.57.1.7 lladdr 02:00:00:00:00:99 dev skv-0a390107"),
        (&fabric, &blue, "bridge fdb del 02:00:00:39:00:02 dev skvx dst 10.99.0.2"),
        (&fabric, &blue, "ip nexthop flush"),
        (&fabric, &blue, "ip link set skvx down"),
        (&fabric, &blue, "ip link set skvx address 02:11:22:33:44:55"),
        (&fabric, &blue, "ip link set skv-0a390107 down"),
        (&fabric, &blue, "ip link del skvx"),
        (&fabric, &blue, "ip link del skup"),
        (&fabric, &blue, "nft flush ruleset"),
        (&fabric, &blue, "ip addr del 10.57.0.1/32 dev lo"),
        (&host.ns, &Scope::Host, "ip link del ske-57"),
        (&host.ns, &Scope::Host, "ip link set ske-57 down; ip link set ske-57 name other"),
        (&host.ns, &Scope::Host, "ip route del 10.57.1.0/24"),
        (&host.ns, &Scope::Host, "ip neigh del 169.254.83.2 dev ske-57"),
        (&host.ns, &Scope::Host, "nft flush ruleset"),
    ];
    for (ns, scope, damage) in damages {
        ns.sh(damage);
        let told =
            timeout(Duration::from_secs(20), async { while !watch.changed().await.expect("watch").contains(scope) {} });
        told.await.unwrap_or_else(|_| panic!("{damage}: nobody was told"));
        let mut report = host.overlay.ensure_network(&states[0]).await.expect("network");
        report.merge(host.overlay.ensure_host(&rules).await.expect("host"));
        assert!(!report.changes.is_empty(), "{damage}");
        let mut again = host.overlay.ensure_network(&states[0]).await.expect("network");
        again.merge(host.overlay.ensure_host(&rules).await.expect("host"));
        assert!(again.is_empty(), "{damage}: {again:?}");
        let seen = a.ns.connect(far.addr4(80), &listener);
        assert!(seen.is_ok(), "{damage}: {seen:?} after {report:?}");
    }
    // Sysctls do not notify; the timer finds them.
    fabric.sh("sysctl -qw net.ipv4.ip_forward=0");
    assert_eq!(host.overlay.ensure_network(&states[0]).await.expect("network").changes.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_things_stay_and_a_removed_network_leaves_nothing() {
    if left_out() {
        return;
    }
    let lab = Lab::new(1);
    let host = &lab.hosts[0];
    let state = network("blue", 57, host.index, 2, false);
    host.ns.sh("ip link add foreign type veth peer name foreign2; ip link set foreign up\n\
         ip addr add 192.0.2.1/24 dev foreign; ip route add 10.57.1.0/24 dev foreign proto static\n\
         nft add table inet foreign");
    let before = host.ns.sh("ip -o addr; ip route; nft list ruleset; ip neigh show nud permanent");
    let report = host.overlay.ensure_network(&state).await.expect("network");
    assert_eq!(report.conflicts.len(), 1, "{report:?}");
    assert!(report.conflicts[0].contains("10.57.1.0/24"), "{report:?}");
    let routes = host.overlay.host_routes().await.expect("routes");
    assert!(routes.iter().any(|route| route.dst.to_string() == "10.57.1.0/24"), "{routes:?}");
    assert!(routes.iter().any(|route| route.dst.to_string() == "10.99.0.0/24"), "{routes:?}");
    assert!(!routes.iter().any(|route| route.dev.as_deref() == Some("ske-57")), "{routes:?}");
    let fabric = host.fabric("blue");
    fabric.sh("ip link add mine type veth peer name mine2; ip link set mine up; ip route add 198.51.100.0/24 dev mine");
    host.overlay.ensure_network(&state).await.expect("network");
    assert!(fabric.sh("ip route").contains("198.51.100.0/24 dev mine"));
    drop(fabric);

    let listed = host.overlay.list_networks().await.expect("list");
    assert_eq!(listed, std::slice::from_ref(&state.id));
    assert!(host.overlay.remove_network(&state.id).await.expect("removed"));
    assert!(!host.overlay.remove_network(&state.id).await.expect("gone already"));
    assert_eq!(host.overlay.list_networks().await.expect("list"), []);
    assert_eq!(host.ns.sh("ip -o addr; ip route; nft list ruleset; ip neigh show nud permanent"), before);
    assert_eq!(std::fs::read_dir(host.dir.path()).expect("dir").count(), 0);
    // At once again: the VNI is free.
    host.overlay.ensure_network(&state).await.expect("network");
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_come_and_go() {
    if left_out() {
        return;
    }
    let lab = Lab::new(1);
    let host = &lab.hosts[0];
    let mut state = network("blue", 57, host.index, 1, false);
    let endpoint = netlib::Endpoint::new("10.57.1.7".parse().expect("address"), None);
    assert!(host.overlay.add_endpoint(&state, &endpoint, "skc-x").await.is_err(), "no such network yet");
    host.overlay.ensure_network(&state).await.expect("network");
    assert_eq!(host.overlay.underlay_mtu(None, vtep(host.index, false)).await.expect("mtu"), 1500);

    // A link left over from a container of the same address gives way; its routes work for the new one.
    host.overlay.add_endpoint(&state, &endpoint, "skc-old").await.expect("endpoint");
    drop(container(host, &mut state, 7).await);
    assert!(host.ns.try_sh("ip link show skc-old").is_err());
    // The namespace of that container has ended, and its veth with it.
    let id = state.endpoints.keys().next().expect("one").clone();
    let report = timeout(Duration::from_secs(20), async {
        loop {
            let report = host.overlay.ensure_network(&state).await.expect("network");
            if !report.lost_endpoints.is_empty() {
                return report;
            }
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(report.await.expect("lost").lost_endpoints, [id].into());

    // A name that is taken: an error, and nothing stays.
    host.ns.sh("ip link add taken type veth peer name taken2");
    let error = host.overlay.add_endpoint(&state, &endpoint, "taken").await.expect_err("taken");
    assert!(error.to_string().contains("make veth pair skv-0a390107 and taken"), "{error}");
    assert!(host.fabric("blue").try_sh("ip link show skv-0a390107").is_err());

    let kept = container(host, &mut state, 8).await;
    host.overlay.remove_endpoint(&state.id, &kept.endpoint).await.expect("removed");
    host.overlay.remove_endpoint(&state.id, &kept.endpoint).await.expect("idempotent");
    assert!(kept.ns.try_sh("ip link show eth0").is_err());
    state.endpoints.clear();
    assert!(host.overlay.ensure_network(&state).await.expect("network").is_empty());

    let gateway = std::net::SocketAddr::from((state.gateway4, 53));
    let gateway6 = std::net::SocketAddr::from((state.gateway6.expect("has ipv6"), 53));
    host.overlay.udp_socket_in(&state.id, gateway).await.expect("udp on the gateway");
    host.overlay.tcp_listener_in(&state.id, gateway6).await.expect("tcp on the gateway");
}
