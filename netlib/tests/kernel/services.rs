//! Virtual addresses of services.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use netlib::{NetworkState, Service};

use crate::lab::{Container, Lab, Ns, blue_alone, container, left_out, network};

pub(crate) const WAIT: Duration = Duration::from_secs(5);
/// Connections after which each of two backends was chosen, but for one time in 2^39.
const MANY: usize = 40;

pub(crate) fn vip4(state: &NetworkState, nth: u8) -> IpAddr {
    format!("10.{}.250.{nth}", state.vni).parse().expect("address")
}

pub(crate) fn vip6(state: &NetworkState, nth: u8) -> IpAddr {
    format!("fd57:{}:250::{nth}", state.vni).parse().expect("address")
}

/// Gives a service these backends in both families.
pub(crate) fn lead(state: &mut NetworkState, nth: u8, backends: &[&Container]) {
    let (vip4, vip6) = (vip4(state, nth), vip6(state, nth));
    let of = |addr: fn(&Container) -> SocketAddr| Service {
        backends: backends.iter().map(|backend| addr(backend).ip()).collect(),
        ..Service::default()
    };
    state.services.extend([(vip4, of(|c| c.addr4(0))), (vip6, of(|c| c.addr6(0)))]);
}

pub(crate) fn listen(on: &Container, port: u16) -> TcpListener {
    let listener = on.ns.listen(&format!("[::]:{port}"));
    listener.set_nonblocking(true).expect("nonblocking");
    listener
}

/// Connects, and answers which listener got it, with the client's address as that one sees it.
fn reach(from: &Ns, to: SocketAddr, listeners: &[&TcpListener]) -> io::Result<(usize, IpAddr)> {
    let _client = from.run(|| TcpStream::connect_timeout(&to, WAIT))?;
    let deadline = Instant::now() + WAIT;
    while Instant::now() < deadline {
        for (nth, listener) in listeners.iter().enumerate() {
            if let Ok((_, seen)) = listener.accept() {
                return Ok((nth, seen.ip().to_canonical()));
            }
        }
        thread::yield_now();
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Who was reached in many connections.
pub(crate) fn reached(from: &Ns, to: SocketAddr, listeners: &[&TcpListener]) -> BTreeSet<(usize, String)> {
    let one = |_| reach(from, to, listeners).unwrap_or_else(|error| panic!("{to}: {error}"));
    (0..MANY).map(one).map(|(nth, seen)| (nth, seen.to_string())).collect()
}

pub(crate) fn refused(from: &Ns, to: SocketAddr) -> Option<io::ErrorKind> {
    let begun = Instant::now();
    let error = from.run(|| TcpStream::connect_timeout(&to, WAIT)).err()?;
    assert!(begun.elapsed() < WAIT, "{to}: a client must not have to wait for nothing");
    Some(error.kind())
}

pub(crate) fn seen(pairs: &[(usize, &str)]) -> BTreeSet<(usize, String)> {
    pairs.iter().map(|(nth, seen)| (*nth, (*seen).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_virtual_address_leads_to_each_backend_from_each_host() {
    if left_out() {
        return;
    }
    let lab = Lab::new(2);
    let [one, two] = &lab.hosts[..] else { panic!("two hosts") };
    let mut here = network("blue", 57, one.index, 2, false);
    let mut there = network("blue", 57, two.index, 2, false);
    // An internal network has no rules but these.
    (here.internal, there.internal) = (true, true);
    one.overlay.ensure_network(&here).await.expect("network");
    two.overlay.ensure_network(&there).await.expect("network");
    let a = container(one, &mut here, 7).await;
    let client = container(one, &mut here, 8).await;
    let b = container(two, &mut there, 7).await;
    for state in [&mut here, &mut there] {
        lead(state, 1, &[&a, &b]);
        lead(state, 2, &[]);
        lead(state, 3, &[&b]);
    }
    one.overlay.ensure_rules(&here).await.expect("rules");
    two.overlay.ensure_network(&there).await.expect("network");
    assert!(one.overlay.ensure_network(&here).await.expect("network").is_empty());
    assert!(two.overlay.ensure_rules(&there).await.expect("rules").is_empty());

    let (on_a, on_b) = (listen(&a, 80), listen(&b, 80));
    let listeners = [&on_a, &on_b];
    let to = |vip: IpAddr| SocketAddr::new(vip, 80);
    let [first4, none4, single4] = [1, 2, 3].map(|nth| to(vip4(&here, nth)));
    let [first6, none6, single6] = [1, 2, 3].map(|nth| to(vip6(&here, nth)));
    assert_eq!(reached(&client.ns, first4, &listeners), seen(&[(0, "10.57.1.8"), (1, "10.57.1.8")]));
    assert_eq!(reached(&client.ns, first6, &listeners), seen(&[(0, "fd57:57:1::8"), (1, "fd57:57:1::8")]));
    assert_eq!(reached(&client.ns, single4, &listeners), seen(&[(1, "10.57.1.8")]));
    assert_eq!(reached(&client.ns, single6, &listeners), seen(&[(1, "fd57:57:1::8")]));
    assert_eq!(
        reached(&b.ns, first4, &listeners),
        seen(&[(0, "10.57.2.7"), (1, "10.57.0.1")]),
        "itself, as the gateway"
    );
    assert_eq!(reached(&b.ns, first6, &listeners), seen(&[(0, "fd57:57:2::7"), (1, "fd57:57::1")]));
    client.ns.sh(&format!("ping -c1 -W2 {}; ping -c1 -W2 {}", first4.ip(), first6.ip()));

    for to in [none4, none6] {
        assert_eq!(refused(&client.ns, to), Some(io::ErrorKind::ConnectionRefused), "{to} has no backend");
        let asker = client.ns.run(|| UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })).expect("bind");
        asker.connect(to).expect("a route");
        asker.set_read_timeout(Some(WAIT)).expect("timeout");
        asker.send(b"q").expect("send");
        let error = asker.recv(&mut [0; 8]).expect_err("nobody answers");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to} has no backend");
    }

    // Nobody else can have a virtual address: neither as a source nor by taking it.
    client.ns.sh(&format!("ip addr add {}/32 dev eth0; ip addr add {}/128 dev eth0 nodad", first4.ip(), first6.ip()));
    for (vip, target) in [(first4, a.addr4(80)), (first6, a.addr6(80))] {
        let stolen = client.ns.run(|| UdpSocket::bind(SocketAddr::new(vip.ip(), 0))).expect("bind");
        let server = a.ns.run(|| UdpSocket::bind(target)).expect("bind");
        server.set_read_timeout(Some(Duration::from_millis(700))).expect("timeout");
        stolen.send_to(b"q", target).expect("send");
        server.recv_from(&mut [0; 8]).expect_err("a source that is not its own");
    }
    assert_eq!(reached(&b.ns, first4, &listeners), seen(&[(0, "10.57.2.7"), (1, "10.57.0.1")]));
    // An idle connection is remembered for longer than two hours.
    let idle = one.fabric("blue").sh("cat /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established");
    assert!(idle.trim().parse::<u64>().expect("seconds") >= 7_200, "{idle}");
}

/// Sends from one socket and answers which server got it.
pub(crate) fn asked(asker: &UdpSocket, to: SocketAddr, servers: &[&UdpSocket]) -> usize {
    asker.send_to(b"q", to).expect("send");
    let deadline = Instant::now() + WAIT;
    while Instant::now() < deadline {
        for (nth, server) in servers.iter().enumerate() {
            if let Ok((_, from)) = server.recv_from(&mut [0; 8]) {
                server.send_to(b"a", from).expect("answer");
                let (_, answers) = asker.recv_from(&mut [0; 8]).expect("answer");
                assert_eq!(answers, to, "the virtual address answers");
                return nth;
            }
        }
        thread::yield_now();
    }
    panic!("nobody got it");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_end_with_their_backend_and_not_before() {
    if left_out() {
        return;
    }
    let (lab, mut state) = blue_alone().await;
    let host = &lab.hosts[0];
    let old = container(host, &mut state, 7).await;
    let new = container(host, &mut state, 8).await;
    let client = container(host, &mut state, 9).await;
    lead(&mut state, 1, &[&old]);
    host.overlay.ensure_network(&state).await.expect("network");
    let vip = vip4(&state, 1);
    let to = SocketAddr::new(vip, 80);

    let udp = |on: &Container| {
        let server = on.ns.run(|| UdpSocket::bind("0.0.0.0:80")).expect("bind");
        server.set_nonblocking(true).expect("nonblocking");
        server
    };
    let (udp_old, udp_new) = (udp(&old), udp(&new));
    let servers = [&udp_old, &udp_new];
    let asker = client.ns.run(|| UdpSocket::bind("0.0.0.0:4000")).expect("bind");
    asker.set_read_timeout(Some(WAIT)).expect("timeout");
    let listener = old.ns.listen("0.0.0.0:80");
    let mut stream = client.ns.run(|| TcpStream::connect_timeout(&to, WAIT)).expect("connects");
    stream.set_read_timeout(Some(Duration::from_millis(700))).expect("timeout");
    let (mut server, _) = listener.accept().expect("accepts");
    let mut echo = || {
        stream.write_all(b"q")?;
        server.set_read_timeout(Some(Duration::from_millis(700)))?;
        server.read_exact(&mut [0])?;
        server.write_all(b"a")?;
        stream.read_exact(&mut [0])
    };
    assert_eq!(asked(&asker, to, &servers), 0);
    echo().expect("open");

    let service = |backends: &[&Container], draining: &[&Container], unhealthy: &[&Container]| {
        let set = |of: &[&Container]| of.iter().map(|c| c.addr4(0).ip()).collect();
        Service { backends: set(backends), draining: set(draining), unhealthy: set(unhealthy) }
    };
    state.services.insert(vip, service(&[&new], &[&old], &[]));
    let report = host.overlay.ensure_rules(&state).await.expect("rules");
    assert_eq!(report.changes, ["network blue: put elements of backends4, self4 in nft table inet skein"]);
    assert_eq!(asked(&asker, to, &servers), 0, "a backend that drains keeps its clients");
    echo().expect("open connections have time");
    let fresh = client.ns.run(|| UdpSocket::bind("0.0.0.0:4001")).expect("bind");
    fresh.set_read_timeout(Some(WAIT)).expect("timeout");
    assert_eq!(asked(&fresh, to, &servers), 1, "and gets no new ones");

    state.services.insert(vip, service(&[&new], &[], &[&old]));
    host.overlay.ensure_rules(&state).await.expect("rules");
    assert_eq!(asked(&asker, to, &servers), 1, "datagrams leave an unhealthy backend");
    echo().expect("and streams stay");

    state.services.insert(vip, service(&[&new], &[], &[]));
    host.overlay.ensure_rules(&state).await.expect("rules");
    assert!(echo().is_err(), "its backend is gone");
    assert_eq!(asked(&asker, to, &servers), 1);

    // The table is repaired like every other.
    host.fabric("blue").sh("nft flush map inet skein backends4");
    assert_eq!(refused(&client.ns, to), Some(io::ErrorKind::ConnectionRefused));
    let report = host.overlay.ensure_network(&state).await.expect("network");
    assert_eq!(report.changes, ["network blue: put elements of backends4 in nft table inet skein"]);
    assert_eq!(asked(&fresh, to, &servers), 1);
    assert!(host.overlay.ensure_network(&state).await.expect("network").is_empty());
}
