//! Who reaches whom, and who must not.

use std::{net::UdpSocket, time::Duration};

use netlib::HostState;
use serde_json::{Value, json};

use crate::lab::{Lab, blue, blue_alone, container, left_out, network, vtep};

async fn talk_between_two_hosts(six: bool) {
    let lab = Lab::with(2, six);
    let mut states: Vec<_> = lab.hosts.iter().map(|host| network("blue", 57, host.index, 2, six)).collect();
    for (host, state) in lab.hosts.iter().zip(&states) {
        let report = host.overlay.ensure_network(state).await.expect("network");
        assert!(!report.changes.is_empty() && report.conflicts.is_empty(), "{report:?}");
        let peers = lab.hosts.iter().map(|other| other.index).filter(|other| *other != host.index);
        let rules =
            HostState { vteps: peers.map(|peer| vtep(peer, six)).collect(), ipv6: true, ..HostState::default() };
        host.overlay.ensure_host(&rules).await.expect("host");
        assert!(host.overlay.ensure_host(&rules).await.expect("host").is_empty());
    }
    let a = container(&lab.hosts[0], &mut states[0], 7).await;
    let near = container(&lab.hosts[0], &mut states[0], 8).await;
    let far = container(&lab.hosts[1], &mut states[1], 9).await;
    for other in [&near, &far] {
        for addr in [other.addr4(80), other.addr6(80)] {
            let listener = other.ns.listen(&addr.to_string());
            let seen = a.ns.connect(addr, &listener).expect("connects");
            let own = if addr.is_ipv4() { a.addr4(0).ip() } else { a.addr6(0).ip() };
            assert_eq!(seen, own, "the true address of the caller");
        }
    }
    a.ns.sh(&format!("busybox ping -c 1 -W 5 {}", far.endpoint.addr4));
    for (host, state) in lab.hosts.iter().zip(&states) {
        let report = host.overlay.ensure_network(state).await.expect("network");
        assert!(report.is_empty(), "{report:?}");
        let report = host.reborn().ensure_network(state).await.expect("network");
        assert!(report.is_empty(), "a new process adopts: {report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_talk_across_hosts() {
    if left_out() {
        return;
    }
    talk_between_two_hosts(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_talk_across_an_ipv6_underlay() {
    if left_out() {
        return;
    }
    talk_between_two_hosts(true).await;
}

fn find<'a>(list: &'a Value, key: &str, value: &Value) -> Option<&'a Value> {
    list.as_array()?.iter().find(|one| one[key] == *value)
}

#[tokio::test(flavor = "multi_thread")]
async fn other_tools_see_the_layout() {
    if left_out() {
        return;
    }
    let lab = Lab::new(1);
    let host = &lab.hosts[0];
    let mut state = network("blue", 57, host.index, 3, false);
    host.overlay.ensure_network(&state).await.expect("network");
    let a = container(host, &mut state, 7).await;
    let fabric = host.fabric("blue");

    let link = &fabric.json("ip -j -d link show skvx")[0];
    assert_eq!(link["address"], "02:00:00:39:00:01");
    assert_eq!(link["mtu"], 1450);
    let data = &link["linkinfo"]["info_data"];
    assert_eq!((&data["id"], &data["port"], &data["local"]), (&json!(57), &json!(4789), &json!("10.99.0.1")));
    assert_eq!(data["learning"], false);

    let fdb = fabric.json("bridge -j fdb show dev skvx");
    assert_eq!(fdb.as_array().map(Vec::len), Some(2), "one entry per peer: {fdb}");
    assert_eq!(find(&fdb, "mac", &json!("02:00:00:39:00:03")).expect("peer 3")["dst"], "10.99.0.3");
    let neighs = fabric.json("ip -j neigh show dev skvx nud permanent");
    assert_eq!(neighs.as_array().map(Vec::len), Some(2), "one neighbour per peer for both families: {neighs}");
    assert_eq!(find(&neighs, "dst", &json!("fe80::53:3")).expect("peer 3")["lladdr"], "02:00:00:39:00:03");

    let routes = fabric.json("ip -j route show proto 83");
    assert!(find(&routes, "dst", &json!("10.57.3.0/24")).expect("block of peer 3")["nhid"].is_u64(), "{routes}");
    assert_eq!(find(&routes, "dst", &json!("10.57.0.0/16")).expect("subnet")["type"], "unreachable");
    assert_eq!(find(&routes, "dst", &json!("default")).expect("egress")["dev"], "skup");
    assert_eq!(find(&routes, "dst", &json!("10.57.1.7")).expect("container")["dev"], "skv-0a390107");
    let routes6 = fabric.json("ip -6 -j route show proto 83");
    assert!(find(&routes6, "dst", &json!("fd57:57:3::/48")).is_some(), "{routes6}");

    let own = host.ns.json("ip -j route show proto 83");
    assert_eq!(find(&own, "dst", &json!("10.57.1.0/24")).expect("local block")["dev"], "ske-57");
    assert!(
        host.ns.json("ip -j addr show dev ske-57")[0]["addr_info"]
            .as_array()
            .is_some_and(|addrs| { addrs.iter().all(|addr| addr["scope"] == "link") })
    );
    let inside = &a.ns.json("ip -j link show eth0")[0];
    assert_eq!((&inside["address"], &inside["mtu"]), (&json!("06:53:0a:39:01:07"), &json!(1450)));
    let table = fabric.json("nft -j list table inet skein")["nftables"].to_string();
    assert!(table.contains("\"spoof\"") && table.contains("\"inject\""), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_leaves_as_its_host_and_networks_stay_apart() {
    if left_out() {
        return;
    }
    let lab = Lab::new(1);
    let (host, outside) = (&lab.hosts[0], lab.machine(100));
    let mut blue = network("blue", 57, host.index, 1, false);
    let mut red = network("red", 58, host.index, 1, false);
    let mut inner = network("inner", 59, host.index, 1, false);
    inner.internal = true;
    for state in [&blue, &red, &inner] {
        host.overlay.ensure_network(state).await.expect("network");
    }
    host.overlay.ensure_host(&HostState { ipv6: true, ..HostState::default() }).await.expect("host");
    let a = container(host, &mut blue, 7).await;
    let b = container(host, &mut red, 8).await;
    let c = container(host, &mut inner, 9).await;

    for (addr, host_addr) in [("10.99.0.100:80", "10.99.0.1"), ("[fd99::100]:80", "fd99::1")] {
        let listener = outside.listen(addr);
        let seen = a.ns.connect(addr.parse().expect("address"), &listener).expect("egress");
        assert_eq!(seen.to_string(), host_addr, "masqueraded as its host");
        assert!(c.ns.cut_off(addr.parse().expect("address"), &listener), "an internal network has no way out");
    }
    for addr in [b.addr4(80), b.addr6(80)] {
        let listener = b.ns.listen(&addr.to_string());
        assert!(a.ns.cut_off(addr, &listener), "{addr} is in another network");
    }
    // Another machine may route to the container's block; without a published port it gets nowhere.
    outside.sh("ip route add 10.57.0.0/16 via 10.99.0.1");
    let listener = a.ns.listen(&a.addr4(80).to_string());
    assert!(outside.cut_off(a.addr4(80), &listener));
}

#[tokio::test(flavor = "multi_thread")]
async fn spoofed_and_injected_packets_are_dropped() {
    if left_out() {
        return;
    }
    let (lab, mut state) = blue_alone().await;
    let (host, victim) = (&lab.hosts[0], lab.machine(100));
    host.overlay.ensure_host(&HostState { ipv6: true, ..HostState::default() }).await.expect("host");
    let a = container(host, &mut state, 7).await;
    let b = container(host, &mut state, 8).await;
    a.ns.sh("ip addr add 10.57.1.99/32 dev eth0; ip addr add fd57:57:1::99/128 dev eth0 nodad");
    // In order on one path: had the first packet passed, it would be received first.
    let first_seen = |to: String, sources: [&str; 2]| {
        let server = b.ns.run(|| UdpSocket::bind(&to)).expect("bind");
        server.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        for source in sources {
            let client = a.ns.run(|| UdpSocket::bind((source, 0))).expect("bind");
            client.send_to(b"x", &to).expect("send");
        }
        server.recv_from(&mut [0; 8]).expect("the true one arrives").1.ip().to_string()
    };
    assert_eq!(first_seen(b.addr4(99).to_string(), ["10.57.1.99", "10.57.1.7"]), "10.57.1.7");
    assert_eq!(first_seen(b.addr6(99).to_string(), ["fd57:57:1::99", "fd57:57:1::7"]), "fd57:57:1::7");

    let vxlan = victim.run(|| UdpSocket::bind("10.99.0.100:4789")).expect("bind");
    let other = victim.run(|| UdpSocket::bind("10.99.0.100:4790")).expect("bind");
    let client = a.ns.run(|| UdpSocket::bind("0.0.0.0:0")).expect("bind");
    client.send_to(b"inject", "10.99.0.100:4789").expect("send");
    client.send_to(b"x", "10.99.0.100:4790").expect("send");
    other.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    other.recv_from(&mut [0; 8]).expect("other ports are open");
    vxlan.set_nonblocking(true).expect("nonblocking");
    assert!(vxlan.recv_from(&mut [0; 8]).is_err(), "vxlan from a container");
}

#[tokio::test(flavor = "multi_thread")]
async fn vxlan_is_taken_from_known_vteps_only() {
    if left_out() {
        return;
    }
    let (lab, mut states) = blue(2).await;
    for host in &lab.hosts {
        host.overlay.ensure_host(&HostState::default()).await.expect("host");
    }
    let a = container(&lab.hosts[0], &mut states[0], 7).await;
    let far = container(&lab.hosts[1], &mut states[1], 9).await;
    let listener = far.ns.listen(&far.addr4(80).to_string());
    assert!(a.ns.cut_off(far.addr4(80), &listener), "no vtep is known");
    for (host, other) in [(0, 1), (1, 0)] {
        let vteps = [vtep(lab.hosts[other].index, false)].into();
        let rules = HostState { vteps, ..HostState::default() };
        let report = lab.hosts[host].overlay.ensure_host(&rules).await.expect("host");
        assert_eq!(report.changes, ["host: put elements of vteps4 in nft table inet skein"]);
    }
    a.ns.connect(far.addr4(80), &listener).expect("known now");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_ipv6_switched_off_still_carries_it_inside() {
    if left_out() {
        return;
    }
    let lab = Lab::new(2);
    let mut states: Vec<_> = lab.hosts.iter().map(|host| network("blue", 57, host.index, 2, false)).collect();
    for (host, state) in lab.hosts.iter().zip(&states) {
        host.ns.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
        host.overlay.ensure_network(state).await.expect("network");
        let again = host.overlay.ensure_network(state).await.expect("network");
        assert!(again.is_empty(), "{again:?}");
    }
    let a = container(&lab.hosts[0], &mut states[0], 7).await;
    let far = container(&lab.hosts[1], &mut states[1], 9).await;
    for addr in [far.addr4(80), far.addr6(80)] {
        let listener = far.ns.listen(&addr.to_string());
        a.ns.connect(addr, &listener).expect("connects");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_while_a_new_process_adopts() {
    if left_out() {
        return;
    }
    /// Packets sent while the network is ensured again and again.
    const PACKETS: u32 = 300;
    let (lab, mut states) = blue(2).await;
    let a = container(&lab.hosts[0], &mut states[0], 7).await;
    let far = container(&lab.hosts[1], &mut states[1], 9).await;
    let echo = far.ns.run(|| UdpSocket::bind(far.addr4(7))).expect("bind");
    let asker = a.ns.run(|| UdpSocket::bind(a.addr4(0))).expect("bind");
    for socket in [&echo, &asker] {
        socket.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
    }
    let to = far.addr4(7);
    let traffic = std::thread::spawn(move || {
        let mut buffer = [0; 4];
        for nth in 0..PACKETS {
            asker.send_to(&nth.to_be_bytes(), to).expect("send");
            let (_, from) = echo.recv_from(&mut buffer).expect("the question arrives");
            echo.send_to(&buffer, from).expect("send");
            asker.recv_from(&mut buffer).expect("the answer arrives");
            assert_eq!(u32::from_be_bytes(buffer), nth);
        }
    });
    let mut rounds = 0;
    while rounds < 3 || !traffic.is_finished() {
        for (host, state) in lab.hosts.iter().zip(&states) {
            let report = host.reborn().ensure_network(state).await.expect("network");
            assert!(report.is_empty(), "{report:?}");
        }
        rounds += 1;
    }
    traffic.join().expect("no packet is lost");
}
