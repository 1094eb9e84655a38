//! The underlay changes: what it takes, and where a host is. Nothing restarts.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, TcpStream},
    time::Duration,
};

use netlib::{HostState, NetworkState};
use nix::sys::socket::{getsockopt, sockopt};

use crate::lab::{Container, Lab, blue, container, left_out, vtep};

/// More than fits into any buffer on the way.
const BULK: usize = 4 << 20;

/// Two hosts with a container each.
async fn two() -> (Lab, Vec<NetworkState>, Container, Container) {
    let (lab, mut states) = blue(2).await;
    for host in &lab.hosts {
        let others = lab.hosts.iter().map(|other| other.index).filter(|other| *other != host.index);
        let rules = HostState { vteps: others.map(|o| vtep(o, false)).collect(), ipv6: true, ..HostState::default() };
        host.overlay.ensure_host(&rules).await.expect("host");
    }
    let a = container(&lab.hosts[0], &mut states[0], 7).await;
    let far = container(&lab.hosts[1], &mut states[1], 9).await;
    (lab, states, a, far)
}

/// A connection, and both its ends.
fn connection(from: &Container, to: &Container, six: bool) -> (TcpStream, TcpStream) {
    let addr = if six { to.addr6(80) } else { to.addr4(80) };
    let listener = to.ns.listen(&addr.to_string());
    let limit = Duration::from_secs(5);
    let client = from.ns.run(|| TcpStream::connect_timeout(&addr, limit)).expect("connects");
    let (server, _) = listener.accept().expect("accepts");
    for end in [&client, &server] {
        end.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        end.set_write_timeout(Some(Duration::from_secs(20))).expect("timeout");
    }
    (client, server)
}

/// Sends bulk over a connection: packets as large as it believes to be possible.
fn carries(ends: &mut (TcpStream, TcpStream)) {
    let (client, server) = ends;
    std::thread::scope(|scope| {
        scope.spawn(|| client.write_all(&vec![7; BULK]).expect("written"));
        server.read_exact(&mut vec![0; BULK]).expect("arrives");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_takes_less_has_an_mtu_of_its_own() {
    if left_out() {
        return;
    }
    let (lab, mut states, a, far) = two().await;
    let mut old = connection(&a, &far, false);
    let host = &lab.hosts[0];
    let peer = vtep(lab.hosts[1].index, false);
    let paths = async || host.overlay.path_mtus([peer, "203.0.113.9".parse().expect("address")].into()).await;
    assert_eq!(paths().await.expect("paths"), [(peer, 1500)].into(), "the device's; there is no way to the other one");
    host.ns.sh("ip route add 10.99.0.2/32 dev eth0 mtu 1400");
    assert_eq!(paths().await.expect("paths"), [(peer, 1400)].into());

    states[0].peers.get_mut(&lab.hosts[1].index).expect("a peer").mtu = Some(1350);
    let report = host.overlay.ensure_network(&states[0]).await.expect("network");
    let says = |change: &str, block: &str| {
        change.starts_with(&format!("network blue: put route {block} ")) && change.ends_with(", mtu 1350")
    };
    let routes: Vec<_> = report.changes.iter().filter(|change| !change.contains("fast way")).collect();
    let [v4, v6] = routes[..] else { panic!("nothing is made anew: {report:?}") };
    assert!(says(v4, "10.57.2.0/24") && says(v6, "fd57:57:2::/48"), "{report:?}");
    assert!(host.overlay.ensure_network(&states[0]).await.expect("network").is_empty());
    let fabric = host.fabric("blue");
    let shown = &fabric.json("ip -j route show 10.57.2.0/24")[0];
    assert_eq!(shown["metrics"][0]["mtu"], 1350, "{shown}");
    // New connections are told, in both families; an old one finds out.
    for (six, mss) in [(false, 1350 - 40), (true, 1350 - 60)] {
        let mut ends = connection(&a, &far, six);
        let known = getsockopt(&ends.0, sockopt::TcpMaxSeg).expect("mss");
        assert!(known <= mss, "{known}");
        // The other side heard of it in the handshake: its packets fit too.
        let theirs = getsockopt(&ends.1, sockopt::TcpMaxSeg).expect("mss");
        assert!(theirs <= mss, "{theirs}");
        carries(&mut ends);
    }
    carries(&mut old);
    // Back to what the device takes.
    states[0].peers.get_mut(&lab.hosts[1].index).expect("a peer").mtu = None;
    let report = host.overlay.ensure_network(&states[0]).await.expect("network");
    assert_eq!(report.changes.iter().filter(|change| change.contains("put route")).count(), 2, "{report:?}");
    let again = host.overlay.ensure_network(&states[0]).await.expect("network");
    assert!(again.is_empty(), "{again:?}");
    carries(&mut connection(&a, &far, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_whose_mtu_shrinks_keeps_its_containers() {
    if left_out() {
        return;
    }
    let (lab, mut states, a, far) = two().await;
    let mut old = connection(&a, &far, false);
    carries(&mut old);
    for (host, state) in lab.hosts.iter().zip(&mut states) {
        for endpoint in state.endpoints.values_mut() {
            endpoint.mtu = Some(state.mtu);
        }
        assert!(host.overlay.ensure_network(state).await.expect("network").is_empty());
        state.mtu = 1400;
        let report = host.overlay.ensure_network(state).await.expect("network");
        assert!(report.lost_endpoints.is_empty(), "{report:?}");
        assert!(host.overlay.ensure_network(state).await.expect("network").is_empty());
        let mtu = |ns: &crate::lab::Ns, dev: &str| ns.json(&format!("ip -j link show {dev}"))[0]["mtu"].clone();
        let fabric = host.fabric("blue");
        assert_eq!(
            (mtu(&fabric, "skvx"), mtu(&fabric, "skup"), mtu(&host.ns, "ske-57")),
            (1400.into(), 1400.into(), 1400.into())
        );
    }
    let link = &lab.hosts[0].fabric("blue").json("ip -j link show skv-0a390107")[0];
    assert_eq!(link["mtu"], 1450, "its other end is the container's");
    carries(&mut old);
    for six in [false, true] {
        carries(&mut connection(&a, &far, six));
    }
    // A datagram that is too large is answered, not lost: the container learns what fits.
    let large = a.ns.try_sh(&format!("busybox ping -c 3 -s 1420 -W 1 {}; ip route get {0}", far.endpoint.addr4));
    let route = a.ns.sh(&format!("ip route get {}", far.endpoint.addr4));
    assert!(route.contains("mtu 1400"), "{large:?} {route}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_moves_keeps_its_connections() {
    if left_out() {
        return;
    }
    let (lab, mut states, a, far) = two().await;
    let mut ends = connection(&a, &far, false);
    carries(&mut ends);
    let moved = lab.hosts[0].moved("10.99.0.11");
    let report = moved.ensure_network(&states[0]).await.expect("network");
    assert!(report.changes.contains(&"network blue: make vxlan device skvx for vni 57 from 10.99.0.11".to_owned()));
    assert!(report.lost_endpoints.is_empty() && moved.ensure_network(&states[0]).await.expect("network").is_empty());
    // The other host hears of it: one entry, and one VTEP instead of the other.
    let new: IpAddr = "10.99.0.11".parse().expect("address");
    states[1].peers.get_mut(&lab.hosts[0].index).expect("a peer").vtep = new;
    let other = &lab.hosts[1].overlay;
    let report = other.ensure_network(&states[1]).await.expect("network");
    let wanted = ["network blue: put forwarding entry 02:00:00:39:00:01 to vtep 10.99.0.11 on skvx"];
    assert_eq!(report.changes, wanted);
    let rules = HostState { vteps: [new].into(), ipv6: true, ..HostState::default() };
    assert_eq!(other.ensure_host(&rules).await.expect("host").changes.len(), 1);
    carries(&mut ends);
    let sets = lab.hosts[1].ns.sh("nft list set inet skein vteps4");
    assert!(sets.contains("10.99.0.11") && !sets.contains("10.99.0.1 "), "the old one is not trusted: {sets}");
}
