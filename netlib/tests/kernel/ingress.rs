//! Ports of every host.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
};

use netlib::{HostState, Ingress, IngressPort, NetworkState, Proto};

use crate::{
    lab::{Container, Host, Lab, Ns, container, left_out, network, vtep},
    services::{WAIT, asked, lead, listen, reached, refused, seen, vip4, vip6},
};

/// Makes service `nth` of a network answer at these ports of this host.
fn publish(state: &mut NetworkState, here: &Host, nth: u8, ports: &[(Proto, u16, u16)]) {
    let v4 = |addr| match addr {
        IpAddr::V4(addr) => addr,
        IpAddr::V6(_) => unreachable!("of IPv4"),
    };
    let v6 = |addr| match addr {
        IpAddr::V6(addr) => Some(addr),
        IpAddr::V4(_) => None,
    };
    let (vni, on) = (state.vni, here.index);
    let addr6 = format!("fd57:{vni}:{on}::2").parse().expect("address");
    let port = |(proto, port, target_port): &(Proto, u16, u16)| {
        (
            (*proto, *port),
            IngressPort { vip4: v4(vip4(state, nth)), vip6: v6(vip6(state, nth)), target_port: *target_port },
        )
    };
    let ports = ports.iter().map(port).collect();
    let addr4 = Ipv4Addr::new(10, vni as u8, on.0 as u8, 2);
    state.ingress = Some(Ingress { addr4, addr6: Some(addr6), ports });
}

/// What the host's own rules are, with the ports of these networks.
fn rules(lab: &Lab, here: &Host, states: &[&NetworkState]) -> HostState {
    let others = lab.hosts.iter().filter(|host| host.index != here.index);
    let ingress = || states.iter().filter_map(|state| state.ingress.as_ref());
    HostState {
        vteps: others.map(|host| vtep(host.index, false)).collect(),
        published: ingress().flat_map(Ingress::published).collect(),
        ingress: ingress().flat_map(Ingress::addrs).collect(),
        ipv6: true,
    }
}

fn at(addr: &str) -> SocketAddr {
    addr.parse().expect("address")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_of_every_host_leads_to_backends_wherever_they_are() {
    if left_out() {
        return;
    }
    let (lab, ports) = (Lab::new(2), [(Proto::Tcp, 8080, 80)]);
    let [one, two] = &lab.hosts[..] else { panic!("two hosts") };
    let outside = lab.machine(100);
    let mut here = network("blue", 57, one.index, 2, false);
    let mut there = network("blue", 57, two.index, 2, false);
    let mut red = network("red", 58, one.index, 1, false);
    for (host, state) in [(one, &here), (two, &there), (one, &red)] {
        host.overlay.ensure_network(state).await.expect("network");
    }
    let a = container(one, &mut here, 7).await;
    let near = container(one, &mut here, 8).await;
    let (b, c) = (container(two, &mut there, 7).await, container(two, &mut there, 8).await);
    let stranger = container(one, &mut red, 9).await;
    let (on_a, on_b, on_c) = (listen(&a, 80), listen(&b, 80), listen(&c, 80));
    let listeners = [&on_a, &on_b, &on_c];
    let reached = |from: &Ns, to: &str| reached(from, at(to), &listeners);

    for (host, state) in [(one, &mut here), (two, &mut there)] {
        lead(state, 1, &[&a, &b, &c]);
        publish(state, host, 1, &ports);
        let rules = rules(&lab, host, &[state]);
        host.overlay.ensure_network(state).await.expect("network");
        host.overlay.ensure_host(&rules).await.expect("host");
        assert!(host.overlay.ensure_network(state).await.expect("network").is_empty());
        assert!(host.overlay.ensure_host(&rules).await.expect("host").is_empty());
    }
    // A backend on the host itself is preferred, and sees the client's address.
    assert_eq!(reached(&outside, "10.99.0.1:8080"), seen(&[(0, "10.99.0.100")]));
    assert_eq!(reached(&outside, "[fd99::1]:8080"), seen(&[(0, "fd99::100")]));
    assert_eq!(reached(&outside, "10.99.0.2:8080"), seen(&[(1, "10.99.0.100"), (2, "10.99.0.100")]));
    assert_eq!(reached(&near.ns, "10.99.0.1:8080"), seen(&[(0, "10.57.1.8")]), "same network, by the host's address");
    assert_eq!(reached(&a.ns, "10.99.0.1:8080"), seen(&[(0, "10.57.0.1")]), "itself, as the gateway");
    assert_eq!(reached(&a.ns, "[fd99::1]:8080"), seen(&[(0, "fd57:57::1")]));
    assert_eq!(reached(&stranger.ns, "10.99.0.1:8080"), seen(&[(0, "10.58.1.9")]), "another network's container");
    assert_eq!(reached(&one.ns, "10.99.0.1:8080"), seen(&[(0, "10.99.0.1")]), "the host itself");
    assert_eq!(reached(&one.ns, "127.0.0.1:8080"), seen(&[(0, "10.99.0.1")]));

    // None is here: those elsewhere see this host's address in the network, and containers' own.
    lead(&mut here, 1, &[&b, &c]);
    one.overlay.ensure_rules(&here).await.expect("rules");
    assert_eq!(reached(&outside, "10.99.0.1:8080"), seen(&[(1, "10.57.1.2"), (2, "10.57.1.2")]));
    assert_eq!(reached(&outside, "[fd99::1]:8080"), seen(&[(1, "fd57:57:1::2"), (2, "fd57:57:1::2")]));
    assert_eq!(reached(&near.ns, "10.99.0.1:8080"), seen(&[(1, "10.57.1.8"), (2, "10.57.1.8")]));
    assert_eq!(reached(&one.ns, "127.0.0.1:8080"), seen(&[(1, "10.57.1.2"), (2, "10.57.1.2")]));

    // None is anywhere: refused, by whatever way.
    lead(&mut here, 1, &[]);
    one.overlay.ensure_rules(&here).await.expect("rules");
    for (from, to) in [(&outside, "10.99.0.1:8080"), (&outside, "[fd99::1]:8080"), (&near.ns, "10.99.0.1:8080")] {
        assert_eq!(refused(from, at(to)), Some(io::ErrorKind::ConnectionRefused), "{to}");
    }
    // An idle connection is remembered for longer than two hours, on both of its stretches.
    for ns in [&one.ns, &one.fabric("blue")] {
        let idle = ns.sh("cat /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established");
        assert!(idle.trim().parse::<u64>().expect("seconds") >= 7_200, "{idle}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_leave_a_dead_backend_and_a_withdrawn_port() {
    if left_out() {
        return;
    }
    let (lab, ports) = (Lab::new(2), [(Proto::Udp, 5353, 53)]);
    let [one, two] = &lab.hosts[..] else { panic!("two hosts") };
    let outside = lab.machine(100);
    let mut blue = network("blue", 57, one.index, 2, false);
    let mut there = network("blue", 57, two.index, 2, false);
    let mut red = network("red", 58, one.index, 1, false);
    for (host, state) in [(one, &blue), (two, &there), (one, &red)] {
        host.overlay.ensure_network(state).await.expect("network");
    }
    two.overlay.ensure_host(&rules(&lab, two, &[])).await.expect("host");
    let a = container(one, &mut blue, 7).await;
    let b = container(two, &mut there, 7).await;
    let other = container(one, &mut red, 9).await;
    let servers = [&a, &b, &other].map(|on: &Container| {
        let server = on.ns.run(|| UdpSocket::bind("0.0.0.0:53")).expect("bind");
        server.set_nonblocking(true).expect("nonblocking");
        server
    });
    let servers: Vec<&UdpSocket> = servers.iter().collect();
    // The same source port each time: one connection, as far as the hosts can see.
    let asker = outside.run(|| UdpSocket::bind("10.99.0.100:4000")).expect("bind");
    asker.set_read_timeout(Some(WAIT)).expect("timeout");
    let to = at("10.99.0.1:5353");

    lead(&mut blue, 1, &[&a, &b]);
    publish(&mut blue, one, 1, &ports);
    one.overlay.ensure_network(&blue).await.expect("network");
    one.overlay.ensure_host(&rules(&lab, one, &[&blue])).await.expect("host");
    assert_eq!(asked(&asker, to, &servers), 0);
    lead(&mut blue, 1, &[&b]);
    one.overlay.ensure_rules(&blue).await.expect("rules");
    assert_eq!(asked(&asker, to, &servers), 1);

    // The port goes to a service of another network.
    blue.ingress.as_mut().expect("made above").ports.clear();
    lead(&mut red, 1, &[&other]);
    publish(&mut red, one, 1, &ports);
    one.overlay.ensure_network(&blue).await.expect("network");
    one.overlay.ensure_network(&red).await.expect("network");
    one.overlay.ensure_host(&rules(&lab, one, &[&blue, &red])).await.expect("host");
    assert_eq!(asked(&asker, to, &servers), 2);
}
