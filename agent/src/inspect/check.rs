//! Sends probes to the places of other hosts, through the tunnel, and finds what is wrong with the way there.
//!
//! Owns: sizes, tries and words. Must not know: how places come to be (`respond`). No channels; each target has a thread
//! of its own inside the network's namespace, at most [`SENDERS_MAX`] at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use netlib::Scope;
use skein_api::{CheckTarget, HostCheck, NetworkId, PairCheck, ProbeSockets, Protocol};
use socket2::{Domain, Socket, Type};

use super::{probe::MARK, sockets};
use crate::overlay::OverlayHandle;

/// Threads that send at a time: 127 hosts in two families that are all gone take eight rounds of a second.
const SENDERS_MAX: usize = 32;
/// How often a datagram is sent before it counts as lost.
const TRIES: usize = 3;
/// How long each try waits.
const TRY_WITHIN: Duration = Duration::from_millis(250);
/// How long a TCP connection, and each read and write on it, may take.
const TCP_WITHIN: Duration = Duration::from_millis(2_500);
/// Bytes that are sent over TCP: more than a window, so that segments of full size go.
const TCP_BYTES: usize = 128 << 10;
/// Smallest size of an IP packet that must pass everywhere: IPv6 needs it (RFC 8200, section 5).
const SIZE_MIN: u32 = 1280;

/// The answer to [`skein_api::NetQuestion::Check`].
pub(super) async fn check(overlay: &OverlayHandle, targets: Vec<CheckTarget>) -> Result<HostCheck, String> {
    let picture = overlay.picture().await.map_err(|e| e.to_string())?;
    let netlib = picture.netlib.clone().ok_or("this host has no network yet")?;
    let mtus: BTreeMap<NetworkId, u32> = picture.networks.iter().map(|n| (n.ours.id.clone(), n.ours.mtu)).collect();
    let networks: BTreeSet<NetworkId> = targets.iter().map(|t| t.place.network.clone()).collect();
    let before = checksum_errors(&netlib, &networks).await;
    let mut pairs = Vec::new();
    for network in &networks {
        let id = netlib::NetworkId::try_from(network.as_str().to_owned()).map_err(|e| e.to_string())?;
        let of_network: Vec<CheckTarget> = targets.iter().filter(|t| t.place.network == *network).cloned().collect();
        let mtu = mtus.get(network).copied().unwrap_or(SIZE_MIN);
        let sent = netlib.run_in(Scope::Fabric(id), "send probes", move || Ok(send_all(&of_network, mtu))).await;
        pairs.extend(sent.map_err(|e| skein_daemon::chain(&e))?);
    }
    let after = checksum_errors(&netlib, &networks).await;
    let clashes = clashes(picture.vtep, picture.vxlan_port, &netlib).await;
    Ok(HostCheck { clashes, checksum_errors: after.saturating_sub(before), pairs })
}

/// Wrong checksums so far, in the host and in these networks.
async fn checksum_errors(netlib: &netlib::Overlay, networks: &BTreeSet<NetworkId>) -> u64 {
    let ids = networks.iter().filter_map(|n| netlib::NetworkId::try_from(n.as_str().to_owned()).ok());
    let mut sum = 0;
    for scope in std::iter::once(Scope::Host).chain(ids.map(Scope::Fabric)) {
        let counted = netlib.counted(&scope).await.unwrap_or_default();
        let names = ["Udp.InCsumErrors", "Udp6InCsumErrors", "Tcp.InCsumErrors", "Ip6InHdrErrors", "Icmp.InCsumErrors"];
        sum += names.iter().map(|name| counted.protocol(name)).sum::<u64>();
    }
    sum
}

/// What else uses the UDP port of VXLAN on this host.
async fn clashes(vtep: Option<IpAddr>, port: u16, netlib: &netlib::Overlay) -> Vec<String> {
    let looked = tokio::task::spawn_blocking(move || {
        let waiting = sockets::waiting()?.into_iter().filter(|w| w.proto == Protocol::Udp && w.address.port() == port);
        let waiting: Vec<_> = waiting.collect();
        let holders = sockets::holders(&waiting.iter().map(|w| w.inode).collect());
        let held = waiting.iter().map(|w| (w.address, holders.get(&w.inode).cloned()));
        Ok::<_, io::Error>(held.collect::<Vec<_>>())
    });
    let mut found = match looked.await {
        Ok(Ok(held)) => eaters(vtep, &held),
        Ok(Err(error)) => vec![format!("the host's sockets cannot be read: {error}")],
        Err(error) => vec![error.to_string()],
    };
    match netlib.foreign_vxlans().await {
        Ok(devices) => found.extend(devices.into_iter().map(|(name, vni)| {
            format!("device {name} (vni {vni}), which is not Skein's, uses UDP port {port} too: one drops the other's packets")
        })),
        Err(error) => found.push(skein_daemon::chain(&error)),
    }
    found
}

/// Programs that have the port in our family. The kernel's own sockets, VXLAN's, have none. A socket of all IPv6
/// addresses takes IPv4 too where VXLAN has no socket; where it has one, the kernel let them both be.
fn eaters(vtep: Option<IpAddr>, sockets: &[(SocketAddr, Option<String>)]) -> Vec<String> {
    let v4 = vtep.is_none_or(|vtep| vtep.is_ipv4());
    let ours = sockets.iter().any(|(address, holder)| holder.is_none() && address.is_ipv4() == v4);
    let eats = |address: &SocketAddr| address.is_ipv4() == v4 || (!ours && address.ip().is_unspecified());
    let held = sockets.iter().filter(|(address, _)| eats(address));
    held.filter_map(|(address, holder)| Some(format!("{} has UDP {address} and eats VXLAN", holder.as_ref()?)))
        .collect()
}

fn send_all(targets: &[CheckTarget], mtu: u32) -> Vec<PairCheck> {
    let work: Vec<(&CheckTarget, ProbeSockets)> =
        targets.iter().flat_map(|t| t.place.sockets.iter().map(move |s| (t, *s))).collect();
    let mut pairs = Vec::with_capacity(work.len());
    for chunk in work.chunks(SENDERS_MAX) {
        // Threads that a thread in a namespace starts are in it too.
        std::thread::scope(|scope| {
            let senders: Vec<_> = chunk.iter().map(|(t, s)| scope.spawn(move || send(t, *s, mtu))).collect();
            pairs.extend(senders.into_iter().filter_map(|sender| sender.join().ok()));
        });
    }
    pairs
}

fn send(target: &CheckTarget, to: ProbeSockets, mtu: u32) -> PairCheck {
    let v6 = to.address.is_ipv6();
    let mut pair = PairCheck {
        node: target.node.clone(),
        name: target.name.clone(),
        network: target.place.network.clone(),
        v6,
        ..PairCheck::default()
    };
    let Some(from) = target.from.iter().find(|a| a.is_ipv6() == v6).copied() else {
        pair.faults.push(format!("no address of this host for {}", family(v6)));
        return pair;
    };
    match largest(mtu, |size| datagram(from, to, size)) {
        Ok(found) => {
            pair.largest_bytes = found.bytes;
            pair.round_trip_us = found.round_trip.map(|t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX));
            pair.faults.extend(size_fault(&found, mtu, v6));
        }
        Err(error) => pair.faults.push(format!("{} over UDP: {error}", family(v6))),
    }
    // Where nothing comes back over UDP, a connection has as long as one try of it.
    let within = if pair.largest_bytes == 0 { TRY_WITHIN } else { TCP_WITHIN };
    if let Err(error) = stream(from, to, within) {
        pair.faults.push(format!("{} over TCP: {error}", family(v6)));
    }
    pair
}

fn family(v6: bool) -> &'static str {
    if v6 { "IPv6" } else { "IPv4" }
}

/// Which sizes come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Largest {
    /// The largest that does; 0: none.
    bytes: u32,
    /// The smallest that was tried and does not.
    lost: Option<u32>,
    /// Of the smallest one.
    round_trip: Option<Duration>,
}

/// Finds the largest size of an IP packet that comes back, up to `mtu`. `try_size` says how long it took; none: lost.
fn largest(mtu: u32, mut try_size: impl FnMut(u32) -> io::Result<Option<Duration>>) -> io::Result<Largest> {
    let small = 128;
    let Some(round_trip) = try_size(small)? else { return Ok(Largest { lost: Some(small), ..Largest::default() }) };
    let mut found = Largest { bytes: small, lost: None, round_trip: Some(round_trip) };
    if try_size(mtu)?.is_some() {
        return Ok(Largest { bytes: mtu, ..found });
    }
    let mut lost = mtu;
    if SIZE_MIN < mtu && try_size(SIZE_MIN)?.is_some() {
        found.bytes = SIZE_MIN;
    } else {
        lost = SIZE_MIN.min(mtu);
    }
    while lost - found.bytes > 1 {
        let middle = found.bytes + (lost - found.bytes) / 2;
        match try_size(middle)? {
            Some(_) => found.bytes = middle,
            None => lost = middle,
        }
    }
    Ok(Largest { lost: Some(lost), ..found })
}

fn size_fault(found: &Largest, mtu: u32, v6: bool) -> Option<String> {
    let family = family(v6);
    match found.lost {
        None => None,
        Some(_) if found.bytes == 0 => Some(format!("{family} over UDP: nothing comes back")),
        Some(lost) => Some(format!(
            "{family}: packets of {lost} bytes and more are lost, {} pass, and the network's MTU is {mtu}: \
             something on the way carries less than the underlay's devices say",
            found.bytes
        )),
    }
}

/// A datagram that is an IP packet of this size, there and back.
fn datagram(from: IpAddr, to: ProbeSockets, size: u32) -> io::Result<Option<Duration>> {
    // IPv4 20 or IPv6 40, and UDP 8.
    let overhead = if from.is_ipv4() { 28 } else { 48 };
    let payload = pattern(usize::try_from(size - overhead).unwrap_or_default());
    let socket = UdpSocket::bind((from, 0))?;
    socket.connect((to.address, to.udp))?;
    socket.set_read_timeout(Some(TRY_WITHIN))?;
    let mut buffer = vec![0; payload.len() + 1];
    for _ in 0..TRIES {
        let began = Instant::now();
        socket.send(&payload)?;
        match socket.recv(&mut buffer) {
            Ok(n) if buffer[..n] == payload[..] => return Ok(Some(began.elapsed())),
            Ok(_) => return Err(io::Error::other("what comes back is not what was sent")),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// The mark, then bytes that differ from their neighbours.
fn pattern(len: usize) -> Vec<u8> {
    let fill = (0_u8..=250).cycle();
    MARK.iter().copied().chain(fill).take(len).collect()
}

/// A connection with some hundred segments, there and back.
fn stream(from: IpAddr, to: ProbeSockets, within: Duration) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(from, 0)), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect_timeout(&SocketAddr::new(to.address, to.tcp).into(), within)?;
    let mut writer = TcpStream::from(socket);
    writer.set_write_timeout(Some(TCP_WITHIN))?;
    writer.set_read_timeout(Some(TCP_WITHIN))?;
    let mut reader = writer.try_clone()?;
    let sent = pattern(TCP_BYTES);
    let mut got = vec![0; TCP_BYTES];
    let late = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "data gets stuck"),
        _ => error,
    };
    // Both at a time: the other side echoes as it reads.
    std::thread::scope(|scope| {
        let write = scope.spawn(|| writer.write_all(&sent));
        let read = reader.read_exact(&mut got).map_err(late);
        write.join().map_err(|_| io::Error::other("the sender died"))?.map_err(late)?;
        read
    })?;
    if got == sent { Ok(()) } else { Err(io::Error::other("what comes back is not what was sent")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_that_fails_is_found() {
        let check = |limit: u32, bytes: u32, lost: Option<u32>| {
            let mut tries = 0;
            let found = largest(1450, |size| {
                tries += 1;
                Ok((size <= limit).then_some(Duration::ZERO))
            });
            let found = found.unwrap();
            assert_eq!((found.bytes, found.lost), (bytes, lost), "{limit}");
            assert!(tries <= 15, "{tries} tries for {limit}");
        };
        check(9_000, 1450, None);
        check(1449, 1449, Some(1450));
        check(1400, 1400, Some(1401));
        check(600, 600, Some(601));
        check(0, 0, Some(128));
        assert!(largest(1450, |_| Err(io::Error::other("no"))).is_err());
    }

    #[test]
    fn programs_that_eat_vxlan_are_named() {
        let check = |vtep: &str, sockets: &[(&str, Option<&str>)], expected: &[&str]| {
            let sockets: Vec<_> = sockets.iter().map(|(a, h)| (a.parse().unwrap(), h.map(str::to_owned))).collect();
            assert_eq!(eaters(Some(vtep.parse().unwrap()), &sockets), expected, "{sockets:?}");
        };
        let vxlan = ("0.0.0.0:4789", None);
        check("192.0.2.1", &[vxlan], &[]);
        check("192.0.2.1", &[vxlan, ("[::]:4789", Some("nc (pid 7)"))], &[]);
        check("192.0.2.1", &[("[::]:4789", Some("nc (pid 7)"))], &["nc (pid 7) has UDP [::]:4789 and eats VXLAN"]);
        let held = ("192.0.2.1:4789", Some("nc (pid 7)"));
        check("192.0.2.1", &[held], &["nc (pid 7) has UDP 192.0.2.1:4789 and eats VXLAN"]);
        check("2001:db8::1", &[("[::]:4789", None), held], &[]);
    }

    #[test]
    fn faults_name_the_size() {
        let found = Largest { bytes: 1399, lost: Some(1401), round_trip: None };
        let fault = size_fault(&found, 1450, true).unwrap();
        assert!(fault.contains("IPv6: packets of 1401 bytes and more are lost, 1399 pass"), "{fault}");
        assert_eq!(size_fault(&Largest { bytes: 1450, lost: None, round_trip: None }, 1450, false), None);
    }

    #[test]
    fn what_is_sent_comes_back_the_same_or_is_an_error() {
        let here = IpAddr::from([127, 0, 0, 1]);
        let udp = UdpSocket::bind((here, 0)).unwrap();
        let tcp = std::net::TcpListener::bind((here, 0)).unwrap();
        let to = ProbeSockets {
            address: here,
            tcp: tcp.local_addr().unwrap().port(),
            udp: udp.local_addr().unwrap().port(),
        };
        std::thread::spawn(move || {
            let mut buffer = [0; 2000];
            while let Ok((n, from)) = udp.recv_from(&mut buffer) {
                // The second size comes back changed.
                buffer[20] ^= u8::from(n > 1000);
                udp.send_to(&buffer[..n], from).unwrap();
            }
        });
        std::thread::spawn(move || {
            let (mut stream, _) = tcp.accept().unwrap();
            let mut reader = stream.try_clone().unwrap();
            io::copy(&mut reader, &mut stream).unwrap();
        });
        assert!(datagram(here, to, 200).unwrap().is_some());
        assert!(datagram(here, to, 1200).is_err(), "changed on the way");
        stream(here, to, TCP_WITHIN).unwrap();
    }
}
