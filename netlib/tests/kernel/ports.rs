//! Published ports.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{TcpStream, UdpSocket},
    time::Duration,
};

use netlib::{HostState, NetworkState, Proto, PublishedPort};

use crate::{
    lab::{Lab, blue_alone, container, left_out, network, port},
    services::WAIT,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_published_port_is_reached_from_everywhere_with_the_true_address() {
    if left_out() {
        return;
    }
    let lab = Lab::new(1);
    let (host, client) = (&lab.hosts[0], lab.machine(100));
    let mut blue = network("blue", 57, host.index, 1, false);
    let mut red = network("red", 58, host.index, 1, false);
    host.overlay.ensure_network(&blue).await.expect("network");
    host.overlay.ensure_network(&red).await.expect("network");
    let web = container(host, &mut blue, 7).await;
    let near = container(host, &mut blue, 8).await;
    let stranger = container(host, &mut red, 9).await;
    let published = BTreeSet::from([
        port(Proto::Tcp, None, 8080, web.addr4(80)),
        port(Proto::Tcp, None, 8080, web.addr6(80)),
        port(Proto::Tcp, Some("10.99.0.1"), 8081, web.addr4(80)),
        port(Proto::Tcp, Some("10.99.0.77"), 8082, web.addr4(80)),
        port(Proto::Udp, None, 5353, web.addr4(53)),
    ]);
    blue.published.clone_from(&published);
    let rules = HostState { published, ipv6: true, ..HostState::default() };
    host.overlay.ensure_network(&blue).await.expect("network");
    host.overlay.ensure_host(&rules).await.expect("host");

    let listener = web.ns.listen("[::]:80");
    let reach = |from: &crate::lab::Ns, to: &str| {
        let seen = from.connect(to.parse().expect("address"), &listener);
        seen.map(|ip| ip.to_canonical().to_string()).map_err(|error| format!("{to}: {error}"))
    };
    assert_eq!(reach(&client, "10.99.0.1:8080").as_deref(), Ok("10.99.0.100"));
    assert_eq!(reach(&client, "10.99.0.1:8081").as_deref(), Ok("10.99.0.100"));
    assert_eq!(reach(&client, "[fd99::1]:8080").as_deref(), Ok("fd99::100"));
    assert!(client.cut_off("10.99.0.1:8082".parse().expect("address"), &listener), "another address of the host");
    assert_eq!(reach(&near.ns, "10.99.0.1:8080").as_deref(), Ok("10.57.1.8"), "same network, by the host's address");
    assert_eq!(reach(&near.ns, "[fd99::1]:8080").as_deref(), Ok("fd57:57:1::8"));
    assert_eq!(reach(&web.ns, "10.99.0.1:8080").as_deref(), Ok("10.57.0.1"), "itself, as the gateway");
    assert_eq!(reach(&stranger.ns, "10.99.0.1:8080").as_deref(), Ok("10.58.1.9"), "another network's container");
    assert_eq!(reach(&host.ns, "10.99.0.1:8080").as_deref(), Ok("10.99.0.1"), "the host itself");
    assert_eq!(reach(&host.ns, "127.0.0.1:8080").as_deref(), Ok("10.99.0.1"), "loopback, masqueraded");

    let server = web.ns.run(|| UdpSocket::bind("0.0.0.0:53")).expect("bind");
    server.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    let asker = client.run(|| UdpSocket::bind("0.0.0.0:0")).expect("bind");
    asker.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    asker.send_to(b"q", "10.99.0.1:5353").expect("send");
    let (_, from) = server.recv_from(&mut [0; 8]).expect("query");
    assert_eq!(from.ip().to_string(), "10.99.0.100");
    server.send_to(b"a", from).expect("answer");
    assert_eq!(asker.recv_from(&mut [0; 8]).expect("answer").1.to_string(), "10.99.0.1:5353");

    assert!(host.overlay.ensure_network(&blue).await.expect("network").is_empty());
    assert!(host.overlay.ensure_host(&rules).await.expect("host").is_empty());
    // Withdrawing one changes elements only.
    let fewer = HostState { published: BTreeSet::new(), ..rules };
    let report = host.overlay.ensure_host(&fewer).await.expect("host");
    assert_eq!(report.changes.len(), 1, "{report:?}");
    assert!(report.changes[0].contains("elements of any4, any6, one4"), "{report:?}");
    assert!(client.cut_off("10.99.0.1:8080".parse().expect("address"), &listener));
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_user_lets_our_uplinks_through() {
    if left_out() {
        return;
    }
    let (lab, mut state) = blue_alone().await;
    let (host, outside) = (&lab.hosts[0], lab.machine(100));
    let rules = HostState::default();
    host.overlay.ensure_host(&rules).await.expect("host");
    let a = container(host, &mut state, 7).await;
    // What an engine does to a host.
    host.ns.sh("iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A DOCKER-USER -j RETURN\n\
         iptables -A FORWARD -j DOCKER-USER");
    let listener = outside.listen("10.99.0.100:80");
    let there = "10.99.0.100:80".parse().expect("address");
    assert!(a.ns.cut_off(there, &listener), "the engine's policy drops it");
    let report = host.overlay.ensure_host(&rules).await.expect("host");
    assert_eq!(report.changes.len(), 2, "{report:?}");
    a.ns.connect(there, &listener).expect("egress");
    assert!(host.overlay.ensure_host(&rules).await.expect("host").is_empty());
    host.overlay.remove_host().await.expect("removed");
    assert_eq!(host.ns.sh("iptables -S DOCKER-USER"), "-N DOCKER-USER\n-A DOCKER-USER -j RETURN\n");
    assert!(host.ns.try_sh("nft list table inet skein").is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_keeps_sending_reaches_the_next_container() {
    if left_out() {
        return;
    }
    let (lab, mut state) = blue_alone().await;
    let (host, client) = (&lab.hosts[0], lab.machine(100));
    let asker = client.run(|| UdpSocket::bind("10.99.0.100:4000")).expect("bind");
    for nth in [7, 8] {
        let container = container(host, &mut state, nth).await;
        let published = port(Proto::Udp, None, 5353, container.addr4(53));
        let rules = HostState { published: [published].into(), ..HostState::default() };
        host.overlay.ensure_host(&rules).await.expect("host");
        let server = container.ns.run(|| UdpSocket::bind("0.0.0.0:53")).expect("bind");
        server.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        // The same source port each time: one connection, as far as the host can see.
        asker.send_to(b"q", "10.99.0.1:5353").expect("send");
        let seen = server.recv_from(&mut [0; 8]).expect("this container is asked").1;
        assert_eq!(seen.to_string(), "10.99.0.100:4000");
        host.overlay.remove_endpoint(&state.id, &container.endpoint).await.expect("removed");
        state.endpoints.clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_port_that_drains_keeps_what_is_open() {
    if left_out() {
        return;
    }
    let (lab, mut state) = blue_alone().await;
    let (host, outside) = (&lab.hosts[0], lab.machine(100));
    let web = container(host, &mut state, 7).await;
    let near = container(host, &mut state, 8).await;
    let set = async |state: &mut NetworkState, draining| {
        let port = port(Proto::Tcp, None, 8080, web.addr4(80));
        state.published = BTreeSet::from([PublishedPort { draining, ..port }]);
        let rules = HostState { published: state.published.clone(), ..HostState::default() };
        host.overlay.ensure_network(state).await.expect("network");
        host.overlay.ensure_host(&rules).await.expect("host");
    };
    set(&mut state, false).await;
    let listener = web.ns.listen("0.0.0.0:80");
    let to = "10.99.0.1:8080".parse().expect("address");
    let mut open: Vec<_> = [&outside, &near.ns]
        .into_iter()
        .map(|from| {
            let client = from.run(|| TcpStream::connect_timeout(&to, WAIT)).expect("connects");
            (client, listener.accept().expect("accepts").0)
        })
        .collect();
    set(&mut state, true).await;
    for (client, server) in &mut open {
        client.set_read_timeout(Some(WAIT)).expect("timeout");
        server.set_read_timeout(Some(WAIT)).expect("timeout");
        client.write_all(b"q").expect("write");
        server.read_exact(&mut [0]).expect("an open connection goes on");
        server.write_all(b"a").expect("write");
        client.read_exact(&mut [0]).expect("in both directions");
    }
    // Nothing listens there here; where an agent runs, the socket with which it holds the port refuses.
    assert!(outside.cut_off(to, &listener) && near.ns.cut_off(to, &listener), "no new ones");
}
