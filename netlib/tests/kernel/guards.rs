//! What may not send VXLAN, and how long the guards are gone when somebody removes or rewrites them.

use std::{
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use netlib::{HostConfig, HostIndex, HostState, Overlay, Scope};
use serde_json::Value;
use tokio::time::timeout;

use crate::lab::{Host, Lab, Ns, left_out, network, vtep};

/// How long a packet that must arrive, or a notification, may take on a machine with other work to do.
const ARRIVE: Duration = Duration::from_secs(10);
/// How long a notification that must not come is waited for.
const QUIET: Duration = Duration::from_millis(300);
/// Bound of the repair after a flush; it is some 50 ms on an idle machine.
const REPAIR_MAX: Duration = Duration::from_secs(5);

/// A container on a bridge of the engine's own kind: forwarded by the host and masqueraded as the host.
fn engine_container(host: &Host) -> Ns {
    let container = Ns::new();
    host.ns.sh(&format!(
        "ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0\n\
         ip addr add fd17::1/64 dev docker0 nodad; ip link set docker0 up\n\
         ip link add engine type veth peer name eth0 netns {}; ip link set engine master docker0 up\n\
         sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.docker0.rp_filter=0\n\
         nft add table inet engine\n\
         nft 'add chain inet engine post {{ type nat hook postrouting priority 100; }}'\n\
         nft add rule inet engine post ip saddr 172.17.0.0/16 oifname != docker0 masquerade\n\
         nft add rule inet engine post ip6 saddr fd17::/64 oifname != docker0 masquerade",
        container.path()
    ));
    container.sh("ip addr add 172.17.0.2/16 dev eth0; ip addr add fd17::2/64 dev eth0 nodad; ip link set eth0 up\n\
         ip route add default via 172.17.0.1; ip -6 route add default via fd17::1");
    container
}

/// Sends from `source` to the VXLAN port of `to`, then to the port above. Answers whether the first arrived, and whose
/// address the second had: on one path, had the first passed, it would be there before.
fn sent(from: &Ns, source: &str, to: (&Ns, &str)) -> (bool, String) {
    let (target, addr) = to;
    let at = |port: u16| SocketAddr::new(addr.parse().expect("address"), port);
    let bind = |ns: &Ns, addr: SocketAddr| ns.run(|| UdpSocket::bind(addr)).expect("bind");
    let (vxlan, other) = (bind(target, at(4789)), bind(target, at(4790)));
    let client = bind(from, SocketAddr::new(source.parse().expect("address"), 0));
    client.send_to(b"inject", at(4789)).expect("send");
    client.send_to(b"x", at(4790)).expect("send");
    other.set_read_timeout(Some(ARRIVE)).expect("timeout");
    let (_, seen) = other.recv_from(&mut [0; 8]).unwrap_or_else(|error| panic!("{source} to {addr}: {error}"));
    vxlan.set_nonblocking(true).expect("nonblocking");
    (vxlan.recv_from(&mut [0; 8]).is_ok(), seen.ip().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_container_cannot_inject_vxlan() {
    if left_out() {
        return;
    }
    let lab = Lab::new(1);
    let (host, peer, stranger) = (&lab.hosts[0], lab.machine(100), lab.machine(101));
    let container = engine_container(host);
    let vteps = ["10.99.0.100", "fd99::100", "10.99.0.102", "fd99::102", "172.17.0.9", "fd17::9"];
    let vteps = vteps.map(|addr| addr.parse().expect("address")).into();
    host.overlay.ensure_host(&HostState { vteps, ipv6: true, ..HostState::default() }).await.expect("host");

    // Masqueraded as the host, which the peer trusts.
    assert_eq!(sent(&container, "172.17.0.2", (&peer, "10.99.0.100")), (false, "10.99.0.1".to_owned()));
    assert_eq!(sent(&container, "fd17::2", (&peer, "fd99::100")), (false, "fd99::1".to_owned()));
    // What is no VTEP is not our business: an overlay of the user's own.
    assert_eq!(sent(&container, "172.17.0.2", (&stranger, "10.99.0.101")), (true, "10.99.0.1".to_owned()));
    assert_eq!(sent(&container, "fd17::2", (&stranger, "fd99::101")), (true, "fd99::1".to_owned()));

    // With the address of a VTEP as source, which the engine lets a container write: to a peer and to its own host.
    container.sh("ip addr add 10.99.0.102/32 dev eth0; ip addr add fd99::102/128 dev eth0 nodad");
    assert!(!sent(&container, "10.99.0.102", (&peer, "10.99.0.100")).0);
    assert!(!sent(&container, "fd99::102", (&peer, "fd99::100")).0);
    assert!(!sent(&container, "10.99.0.102", (&host.ns, "10.99.0.1")).0);
    assert!(!sent(&container, "fd99::102", (&host.ns, "fd99::1")).0);
    // A true peer is heard, and so is a host of the cluster that is a virtual machine behind this one.
    assert!(sent(&peer, "10.99.0.100", (&host.ns, "10.99.0.1")).0);
    assert!(sent(&peer, "fd99::100", (&host.ns, "fd99::1")).0);
    container.sh("ip addr add 172.17.0.9/16 dev eth0; ip addr add fd17::9/64 dev eth0 nodad");
    assert!(sent(&container, "172.17.0.9", (&peer, "10.99.0.100")).0);
    assert!(sent(&container, "fd17::9", (&peer, "fd99::100")).0);
    assert!(sent(&container, "172.17.0.9", (&host.ns, "10.99.0.1")).0);
}

async fn told(watch: &mut netlib::Watch, scope: &Scope, what: &str) {
    let told = timeout(ARRIVE, async { while !watch.changed().await.expect("watch").contains(scope) {} });
    told.await.unwrap_or_else(|_| panic!("{what}: nobody was told"));
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stderr, reason = "the figure is wanted beside the verdict")]
async fn flushed_guards_are_back_at_once() {
    if left_out() {
        return;
    }
    let lab = Lab::new(2);
    let host = &lab.hosts[0];
    host.overlay.ensure_network(&network("blue", 57, host.index, 2, false)).await.expect("network");
    let rules = HostState { vteps: [vtep(lab.hosts[1].index, false)].into(), ..HostState::default() };
    host.overlay.ensure_host(&rules).await.expect("host");
    let fabric = host.fabric("blue");
    let inside = fabric.sh("nft list table inet skein");
    let mut watch = host.overlay.watch().await.expect("watch");
    watch.changed().await.expect("the first look");
    for round in 1..=5 {
        let since = Instant::now();
        host.ns.sh("nft flush ruleset");
        told(&mut watch, &Scope::Host, "flush").await;
        let report = host.overlay.ensure_host(&rules).await.expect("host");
        let took = since.elapsed();
        assert_eq!(report.changes, ["host: put nft table inet skein"]);
        eprintln!("round {round}: guards back {took:?} after the flush");
        assert!(took < REPAIR_MAX, "{took:?}");
        let table = host.ns.sh("nft list table inet skein");
        assert!(table.contains("chain inject") && table.contains("10.99.0.2"), "{table}");
        assert_eq!(fabric.sh("nft list table inet skein"), inside, "a flush in the host does not reach the fabric");
    }
}

/// Chain, handle and comment of every rule in our table.
fn rules_of(ns: &Ns) -> Vec<(String, u64, String)> {
    let listed = ns.json("nft -j list table inet skein");
    let text = |rule: &Value, key: &str| rule[key].as_str().expect("text").to_owned();
    let rules = listed["nftables"].as_array().expect("list").iter().filter_map(|object| object.get("rule"));
    rules.map(|rule| (text(rule, "chain"), rule["handle"].as_u64().expect("handle"), text(rule, "comment"))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_rewritten_under_its_comment_is_noticed() {
    if left_out() {
        return;
    }
    let lab = Lab::new(1);
    let host = &lab.hosts[0];
    let mut state = network("blue", 57, host.index, 1, false);
    state.published.insert(netlib::PublishedPort {
        proto: netlib::Proto::Tcp,
        host_ip: None,
        host_port: 8080,
        target: "10.57.1.7".parse().expect("address"),
        target_port: 80,
        draining: false,
    });
    let rules = HostState { published: state.published.clone(), ipv6: true, ..HostState::default() };
    host.overlay.ensure_host(&rules).await.expect("host");
    host.overlay.ensure_network(&state).await.expect("network");
    let fabric = host.fabric("blue");
    let mut rewritten = 0;
    for ns in [&host.ns, &fabric] {
        // With its neighbours of the same chain in place, so that nothing but the rule itself tells.
        for nth in 0..rules_of(ns).len() {
            let before = ns.sh("nft list table inet skein");
            let (chain, handle, comment) = rules_of(ns).swap_remove(nth);
            ns.sh(&format!("nft 'replace rule inet skein {chain} handle {handle} accept comment \"{comment}\"'"));
            let mut report = host.overlay.ensure_host(&rules).await.expect("host");
            report.merge(host.overlay.ensure_network(&state).await.expect("network"));
            assert_eq!(report.changes.len(), 1, "{chain} {comment}: {report:?}");
            assert!(report.changes[0].ends_with("put nft table inet skein"), "{report:?}");
            assert_eq!(ns.sh("nft list table inet skein"), before);
            rewritten += 1;
        }
    }
    assert!(rewritten > 20, "every rule was rewritten once: {rewritten}");
    // A new process, which has learnt nothing, sees nothing to do, and notices just as well.
    let reborn = host.reborn();
    assert!(reborn.ensure_host(&rules).await.expect("host").is_empty());
    let (chain, handle, comment) = rules_of(&host.ns).swap_remove(0);
    host.ns.sh(&format!("nft 'replace rule inet skein {chain} handle {handle} accept comment \"{comment}\"'"));
    assert_eq!(reborn.ensure_host(&rules).await.expect("host").changes, ["host: put nft table inet skein"]);
}

/// Notifications that this namespace's netlink sockets lost so far.
fn drops(ns: &Ns) -> u64 {
    let table = ns.sh("cat /proc/thread-self/net/netlink");
    let column = |line: &str| line.split_whitespace().nth(8)?.parse::<u64>().ok();
    table.lines().skip(1).filter_map(column).sum()
}

// One thread: while it is busy here, nobody reads the notifications.
#[tokio::test]
async fn lost_notifications_are_a_reason_to_look() {
    if left_out() {
        return;
    }
    /// Foreign neighbours on the host, which alone wake nobody; some 300 of them fill a socket's buffer.
    const STORM: u32 = 5_000;
    let (ns, dir) = (Ns::new(), tempfile::tempdir().expect("temporary directory"));
    let index = HostIndex(1);
    let mut config = HostConfig::new(index, vtep(index, false), 1500);
    config.netns_dir = dir.path().to_owned();
    let overlay = Overlay::try_new_in(config, ns.fd()).expect("overlay");
    let mut watch = overlay.watch().await.expect("watch");
    assert_eq!(watch.changed().await.expect("the first look"), [Scope::Host]);
    assert_eq!(drops(&ns), 0);
    let neighbours = |count: u32| {
        // The MAC is another one each time: what stays as it is notifies nobody.
        let line =
            |nth| format!("neigh replace 192.0.2.1 lladdr 02:00:00:00:00:{:02x} dev lo nud permanent\n", nth % 256);
        let batch = dir.path().join("batch");
        std::fs::write(&batch, (0..count).map(line).collect::<String>()).expect("write");
        ns.sh(&format!("ip -batch {}", batch.display()));
    };
    neighbours(10);
    assert!(timeout(QUIET, watch.changed()).await.is_err(), "foreign neighbours are nobody's business");
    assert_eq!(drops(&ns), 0);
    neighbours(STORM);
    assert!(drops(&ns) > 0, "nothing was lost: the storm is too small");
    told(&mut watch, &Scope::Host, "lost notifications").await;
    // And it goes on from there.
    ns.sh("ip route add 198.51.100.0/24 dev lo");
    told(&mut watch, &Scope::Host, "a route").await;
}
