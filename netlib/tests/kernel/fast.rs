//! The fast path. That a packet took it is proved by a fabric that does not forward: what arrives then was not routed.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use netlib::{NetworkState, Service, fast::FastCounters};

use crate::lab::{Container, Host, Lab, container, left_out, network};

const WAIT: Duration = Duration::from_secs(5);
/// How long what must not arrive is waited for.
const SILENCE: Duration = Duration::from_millis(500);
/// Enough for large packets that are cut and put together again.
const BYTES: usize = 4 << 20;

/// Two hosts with a container of network `blue` each.
struct Pair {
    lab: Lab,
    states: Vec<NetworkState>,
    near: Container,
    far: Container,
}

impl Pair {
    async fn new(six: bool) -> Self {
        let lab = Lab::with(2, six);
        let mut states: Vec<_> = lab.hosts.iter().map(|host| network("blue", 57, host.index, 2, six)).collect();
        for (host, state) in lab.hosts.iter().zip(&states) {
            let report = host.overlay.ensure_network(state).await.expect("network");
            assert!(report.conflicts.is_empty(), "{report:?}");
        }
        let near = container(&lab.hosts[0], &mut states[0], 7).await;
        let far = container(&lab.hosts[1], &mut states[1], 9).await;
        let pair = Self { lab, states, near, far };
        pair.quiet().await;
        pair
    }

    /// Nothing is to do, for this process and for the next.
    async fn quiet(&self) {
        for (host, state) in self.lab.hosts.iter().zip(&self.states) {
            for overlay in [&host.overlay, &host.reborn()] {
                let report = overlay.ensure_network(state).await.expect("network");
                assert!(report.is_empty(), "{report:?}");
            }
        }
    }

    fn forward(&self, on: bool) {
        let value = u8::from(on);
        for host in &self.lab.hosts {
            host.fabric("blue").sh(&format!(
                "echo {value} > /proc/sys/net/ipv4/ip_forward; echo {value} > /proc/sys/net/ipv6/conf/all/forwarding"
            ));
        }
    }

    /// A stream there and back arrives whole.
    fn stream(&self, to: SocketAddr) {
        let listener = self.far.ns.listen(&to.to_string());
        echo(&self.near, to, &listener, BYTES).unwrap_or_else(|error| panic!("{to}: {error}"));
    }

    async fn counters(&self, host: usize) -> FastCounters {
        self.lab.hosts[host].overlay.fast_counters(&self.states[host].id).await.expect("counters")
    }
}

/// Sends `bytes` and takes as many back.
fn echo(from: &Container, to: SocketAddr, listener: &TcpListener, bytes: usize) -> io::Result<()> {
    thread::scope(|scope| {
        scope.spawn(move || {
            let Ok((stream, _)) = listener.accept() else { return };
            let (mut read, mut write) = (&stream, &stream);
            let _ = io::copy(&mut read, &mut write);
        });
        let connected = from.ns.run(|| TcpStream::connect_timeout(&to, WAIT));
        let mut stream = match connected {
            Ok(stream) => stream,
            Err(error) => {
                // The listener would wait for ever.
                nix::sys::socket::shutdown(
                    std::os::fd::AsRawFd::as_raw_fd(listener),
                    nix::sys::socket::Shutdown::Read,
                )?;
                return Err(error);
            }
        };
        stream.set_read_timeout(Some(WAIT))?;
        let sent: Vec<u8> = (0..bytes).map(|nth| (nth % 251) as u8).collect();
        let mut writer = stream.try_clone()?;
        let copy = sent.clone();
        scope.spawn(move || writer.write_all(&copy).and_then(|()| writer.shutdown(std::net::Shutdown::Write)));
        let mut got = Vec::new();
        stream.read_to_end(&mut got)?;
        if got == sent { Ok(()) } else { Err(io::Error::other(format!("{} of {bytes} bytes", got.len()))) }
    })
}

fn udp(on: &Container, addr: &str) -> UdpSocket {
    let socket = on.ns.run(|| UdpSocket::bind(addr)).unwrap_or_else(|error| panic!("bind {addr}: {error}"));
    socket.set_read_timeout(Some(WAIT)).expect("timeout");
    socket
}

async fn plain_packets_are_not_routed(six: bool) {
    let pair = Pair::new(six).await;
    pair.forward(false);
    for to in [pair.far.addr4(80), pair.far.addr6(80)] {
        pair.stream(to);
        let server = udp(&pair.far, &to.to_string());
        let client = udp(&pair.near, if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
        client.send_to(b"question", to).expect("send");
        let (_, from) = server.recv_from(&mut [0; 16]).expect("a datagram");
        server.send_to(b"answer", from).expect("send");
        client.recv(&mut [0; 16]).expect("an answer");
    }
    for host in [0, 1] {
        let FastCounters { out_fast, in_fast, .. } = pair.counters(host).await;
        assert!(out_fast > 100 && in_fast > 100, "host {host}: {out_fast} out, {in_fast} in");
    }
    // What is not plain is routed, and so gets nowhere now.
    let ping = format!("busybox ping -c 1 -W 1 {}", pair.far.endpoint.addr4);
    pair.near.ns.try_sh(&ping).expect_err("a ping is routed");
    pair.forward(true);
    pair.near.ns.sh(&ping);
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_packets_are_not_routed_over_ipv4() {
    if left_out() {
        return;
    }
    plain_packets_are_not_routed(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_packets_are_not_routed_over_ipv6() {
    if left_out() {
        return;
    }
    plain_packets_are_not_routed(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_plain_is_routed() {
    if left_out() {
        return;
    }
    let pair = Pair::new(false).await;
    // In fragments, and back.
    for to in [pair.far.addr4(80), pair.far.addr6(80)] {
        let server = udp(&pair.far, &to.to_string());
        let client = udp(&pair.near, if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
        let routed = pair.counters(0).await.out_routed;
        client.send_to(&[7; 4_000], to).expect("send");
        let mut got = [0; 8_000];
        let (bytes, from) = server.recv_from(&mut got).expect("a datagram in fragments");
        assert_eq!(bytes, 4_000);
        assert!(pair.counters(0).await.out_routed >= routed + 3, "each fragment was left to the routed way");
        server.send_to(&got[..bytes], from).expect("send");
        assert_eq!(client.recv(&mut got).expect("an answer"), 4_000);
        // At the end of its life the fabric says so, as a router does.
        let dying = udp(&pair.near, if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
        if to.is_ipv4() {
            dying.set_ttl(1).expect("ttl");
        } else {
            nix::sys::socket::setsockopt(&dying, nix::sys::socket::sockopt::Ipv6Ttl, &1).expect("hop limit");
        }
        server.set_read_timeout(Some(SILENCE)).expect("timeout");
        dying.send_to(b"q", to).expect("send");
        server.recv_from(&mut got).expect_err("its time was over");
    }
}

/// Sends one datagram from an address to the other container; whether it arrived.
fn arrives(pair: &Pair, source: &str, to: SocketAddr) -> bool {
    let server = udp(&pair.far, &to.to_string());
    server.set_read_timeout(Some(SILENCE)).expect("timeout");
    udp(&pair.near, source).send_to(b"q", to).expect("send");
    server.recv_from(&mut [0; 16]).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_source_is_dropped() {
    if left_out() {
        return;
    }
    let mut pair = Pair::new(false).await;
    let host = &pair.lab.hosts[0];
    let neighbour = container(host, &mut pair.states[0], 8).await;
    let foreign = ["10.57.1.8", "10.57.1.99", "10.57.2.77", "10.57.0.1", "192.0.2.7"].map(|addr| (addr, 32));
    let foreign6 = ["fd57:57:1::8", "fd57:57:2::77", "fd57:57::1"].map(|addr| (addr, 128));
    for (addr, len) in foreign.iter().chain(&foreign6) {
        // Usable at once.
        let nodad = if *len == 128 { "nodad" } else { "" };
        pair.near.ns.sh(&format!("ip addr add {addr}/{len} dev lo {nodad}"));
        let (source, to) = match len {
            32 => (format!("{addr}:0"), pair.far.addr4(80)),
            _ => (format!("[{addr}]:0"), pair.far.addr6(80)),
        };
        assert!(!arrives(&pair, &source, to), "{addr} is not its own");
        pair.near.ns.sh(&format!("ip addr del {addr}/{len} dev lo"));
    }
    for (source, to) in [(pair.near.addr4(0), pair.far.addr4(80)), (pair.near.addr6(0), pair.far.addr6(80))] {
        assert!(arrives(&pair, &source.to_string(), to), "{source} is");
    }
    drop(neighbour);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_a_virtual_address_are_routed_from_then_on() {
    if left_out() {
        return;
    }
    let mut pair = Pair::new(false).await;
    // Connections of before the first service go on.
    pair.stream(pair.far.addr4(80));
    let vips = ["10.57.250.1:80", "[fd57:57:250::1]:80"].map(|vip| vip.parse::<SocketAddr>().expect("address"));
    for state in &mut pair.states {
        for (vip, backend) in vips.iter().zip([pair.far.addr4(0).ip(), pair.far.addr6(0).ip()]) {
            state.services.insert(vip.ip(), Service { backends: [backend].into(), ..Service::default() });
        }
    }
    for (host, state) in pair.lab.hosts.iter().zip(&pair.states) {
        host.overlay.ensure_rules(state).await.expect("rules");
    }
    pair.quiet().await;
    for (vip, direct) in vips.into_iter().zip([pair.far.addr4(80), pair.far.addr6(80)]) {
        let listener = pair.far.ns.listen(&direct.to_string());
        let before = pair.counters(0).await;
        for to in [direct, vip, direct, vip] {
            echo(&pair.near, to, &listener, BYTES).unwrap_or_else(|error| panic!("{to}: {error}"));
        }
        let after = pair.counters(0).await;
        assert!(after.out_fast > before.out_fast, "before it asked for the virtual address it was on the fast path");
        let routed = (after.out_routed - before.out_routed, after.in_routed - before.in_routed);
        assert!(routed.0 > 100 && routed.1 > 100, "and not any more: {routed:?}");
        // At the backend nothing is translated.
        let backend = pair.counters(1).await;
        assert!(backend.out_fast > backend.out_routed, "{backend:?}");
    }
    // A new container at the same address begins anew.
    let endpoint = pair.near.endpoint.clone();
    pair.lab.hosts[0].overlay.remove_endpoint(&pair.states[0].id, &endpoint).await.expect("remove");
    pair.near = container(&pair.lab.hosts[0], &mut pair.states[0], 7).await;
    pair.forward(false);
    pair.stream(pair.far.addr4(81));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_switched_off_and_on_again_under_traffic() {
    if left_out() {
        return;
    }
    let pair = Pair::new(false).await;
    let host: &Host = &pair.lab.hosts[0];
    let off = host.reborn_routed().ensure_network(&pair.states[0]).await.expect("network");
    assert_eq!(off.changes, ["network blue: remove the fast path"]);
    let before = pair.counters(1).await;
    pair.stream(pair.far.addr4(80));
    assert_eq!(pair.counters(0).await, FastCounters::default(), "no program, no counter");
    // The other host still has it.
    assert!(pair.counters(1).await.out_fast > before.out_fast);
    let on = host.overlay.ensure_network(&pair.states[0]).await.expect("network");
    assert!(on.changes.iter().any(|change| change.contains("to skvx")), "{on:?}");
    pair.quiet().await;
    pair.forward(false);
    pair.stream(pair.far.addr4(81));
    // A tunnel that somebody took away comes back with it.
    pair.forward(true);
    host.fabric("blue").sh("ip link del skvx");
    host.overlay.ensure_network(&pair.states[0]).await.expect("network");
    pair.quiet().await;
    pair.forward(false);
    pair.stream(pair.far.addr6(82));
}
