//! What the outside, and a container that means no good, must not achieve.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv6Addr, SocketAddrV6, UdpSocket},
    os::fd::AsRawFd,
    time::Duration,
};

use netlib::{HostState, Proto};
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, setsockopt, socket, sockopt,
    },
};

use crate::lab::{Ns, blue, blue_alone, container, left_out, port};

/// A packet that must arrive.
const ARRIVE: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn a_port_published_on_loopback_is_for_the_host_alone() {
    if left_out() {
        return;
    }
    let (lab, mut state) = blue_alone().await;
    let (host, client) = (&lab.hosts[0], lab.machine(100));
    let web = container(host, &mut state, 7).await;
    let published = BTreeSet::from([
        port(Proto::Tcp, Some("127.0.0.1"), 8080, web.addr4(80)),
        port(Proto::Tcp, None, 8081, web.addr4(80)),
    ]);
    state.published.clone_from(&published);
    let rules = HostState { published, ..HostState::default() };
    host.overlay.ensure_network(&state).await.expect("network");
    host.overlay.ensure_host(&rules).await.expect("host");
    let listener = web.ns.listen("0.0.0.0:80");
    let at = |addr: &str| addr.parse().expect("address");
    host.ns.connect(at("127.0.0.1:8080"), &listener).expect("the host itself");
    client.connect(at("10.99.0.1:8081"), &listener).expect("what is published for all");
    assert!(client.cut_off(at("10.99.0.1:8080"), &listener));
    // A neighbour that has made 127.0.0.1 the host's: its packets do arrive there.
    host.ns.sh("nft add table inet seen; nft 'add chain inet seen pre { type filter hook prerouting priority -400; }'
         nft add rule inet seen pre iifname eth0 ip daddr 127.0.0.1 counter");
    client.sh("ip addr flush dev lo; sysctl -qw net.ipv4.conf.all.route_localnet=1\n\
         ip route add 127.0.0.1/32 via 10.99.0.1 dev eth0 src 10.99.0.100");
    for published in ["127.0.0.1:8080", "127.0.0.1:8081"] {
        assert!(client.cut_off(at(published), &listener), "{published}");
    }
    let seen = host.ns.sh("nft list chain inet seen pre");
    assert!(!seen.contains("packets 0 "), "they did arrive: {seen}");
    // Nothing of it needed the kernel's consent for the whole host.
    for dev in ["all", "default", "eth0", "lo"] {
        assert_eq!(host.ns.sh(&format!("sysctl -n net.ipv4.conf.{dev}.route_localnet")).trim(), "0", "{dev}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_53_does_not_take_what_is_for_other_machines() {
    if left_out() {
        return;
    }
    let (lab, mut state) = blue_alone().await;
    let (host, client) = (&lab.hosts[0], lab.machine(100));
    // A machine behind the host, which routes for its neighbours.
    let behind = Ns::new();
    host.ns.sh(&format!(
        "ip link add eth1 type veth peer name eth0 netns {}; ip addr add 10.98.0.1/24 dev eth1; ip link set eth1 up",
        behind.path()
    ));
    behind.sh("ip addr add 10.98.0.2/24 dev eth0; ip link set eth0 up; ip route add default via 10.98.0.1");
    client.sh("ip route add 10.98.0.0/24 via 10.99.0.1");
    let dns = container(host, &mut state, 7).await;
    let inside = container(host, &mut state, 8).await;
    let published = BTreeSet::from([port(Proto::Udp, None, 53, dns.addr4(53))]);
    state.published.clone_from(&published);
    host.overlay.ensure_network(&state).await.expect("network");
    host.overlay.ensure_host(&HostState { published, ..HostState::default() }).await.expect("host");
    let server = |ns: &Ns| {
        let server = ns.run(|| UdpSocket::bind("0.0.0.0:53")).expect("bind");
        server.set_read_timeout(Some(ARRIVE)).expect("timeout");
        server
    };
    let (published, other) = (server(&dns.ns), server(&behind));
    for (from, what) in [(&client, b"from outside"), (&inside.ns, b"from a cont.")] {
        let asker = from.run(|| UdpSocket::bind("0.0.0.0:0")).expect("bind");
        let mut buffer = [0; 64];
        asker.send_to(what, "10.98.0.2:53").expect("send");
        let (len, _) = other.recv_from(&mut buffer).expect("the machine behind is asked");
        assert_eq!(&buffer[..len], what);
        asker.send_to(b"to the host", "10.99.0.1:53").expect("send");
        let (len, _) = published.recv_from(&mut buffer).expect("the container is asked");
        assert_eq!(&buffer[..len], b"to the host", "and nothing else came there");
    }
}

/// Sends a router advertisement (RFC 4861, section 4.2) to everybody on a link: this is a router for half an hour, and
/// 2001:db8:bad::/64 is on the link, with addresses for everybody.
fn advertise(ns: &Ns, dev: &str) -> io::Result<()> {
    ns.run(|| {
        let flags = SockFlag::empty();
        let raw = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)?;
        setsockopt(&raw, sockopt::Ipv6MulticastHops, &255)?;
        let mut packet = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
        packet.extend([3, 4, 64, 0xc0]);
        packet.extend([0, 0, 7, 8].repeat(2));
        packet.extend([0; 4]);
        packet.extend("2001:db8:bad::".parse::<Ipv6Addr>().expect("address").octets());
        let all: Ipv6Addr = "ff02::1".parse().expect("address");
        let to = SockaddrIn6::from(SocketAddrV6::new(all, 0, 0, if_nametoindex(dev)?));
        sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty())?;
        Ok(())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rogue_router_advertisement_changes_nothing() {
    if left_out() {
        return;
    }
    let (lab, mut states) = blue(2).await;
    for host in &lab.hosts {
        host.overlay.ensure_host(&HostState { ipv6: true, ..HostState::default() }).await.expect("host");
    }
    let rogue = container(&lab.hosts[0], &mut states[0], 7).await;
    let near = container(&lab.hosts[0], &mut states[0], 8).await;
    let far = container(&lab.hosts[1], &mut states[1], 9).await;
    let (fabric, fabric2) = (lab.hosts[0].fabric("blue"), lab.hosts[1].fabric("blue"));
    let all = [&near.ns, &far.ns, &fabric, &fabric2, &lab.hosts[0].ns, &lab.hosts[1].ns];
    // Addresses of links become usable after a while, which is not what is looked for.
    for ns in all.into_iter().chain([&rogue.ns]) {
        ns.sh("for i in $(seq 100); do [ -z \"$(ip -6 addr show tentative)\" ] && break; sleep 0.1; done");
    }
    let shown =
        || all.map(|ns| ns.sh("ip -6 route show table all | sed 's/expires.*//'; ip -6 -o addr | sed 's/scope.*//'"));
    let before = shown();
    for _ in 0..5 {
        advertise(&rogue.ns, "eth0").expect("sent");
    }
    // In order on one path: when this is through, the advertisements were.
    let listener = near.ns.listen(&near.addr6(80).to_string());
    rogue.ns.connect(near.addr6(80), &listener).expect("connects");
    assert_eq!(shown(), before);
    let count = fabric.sh("cat /proc/thread-self/net/snmp6 | grep Icmp6InRouterAdvertisements");
    let count: u64 = count.split_whitespace().last().expect("a number").parse().expect("a number");
    assert!(count >= 5, "they did arrive in the fabric: {count}");
    // The same packet does its work where somebody listens to it.
    let (victim, neighbour) = (lab.machine(101), lab.machine(102));
    victim.sh("sysctl -qw net.ipv6.conf.eth0.accept_ra=1");
    let believed = (0..100).any(|_| {
        // Its link's address is not usable at once.
        let _ = advertise(&neighbour, "eth0");
        victim.sh("sleep 0.1; ip -6 route").contains("2001:db8:bad::/64")
    });
    assert!(believed, "a machine that listens believes it");
}
