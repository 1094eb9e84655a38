//! Probes: a connection, a datagram, an echo request, from wherever the calling thread is.
//!
//! Owns: the marks and the time limits. Must not know: who is asked. Blocking. No tasks, no channels.

use std::{
    io::{self, Read as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use skein_api::Protocol;
use socket2::{Domain, Socket, Type};

/// What datagrams and echo requests say, so that they are known in a capture. A connection says nothing.
pub(super) const MARK: &[u8] = b"skein net probe";
/// Tries of an echo request, and datagrams of a UDP probe.
pub(super) const TRIES: u16 = 3;
/// How long each try waits: far more than a round trip, and six of them fit into one answer.
const TRY_WITHIN: Duration = Duration::from_millis(600);
/// How long a connection may take: a lost SYN is sent again after 1 s.
const CONNECT_WITHIN: Duration = Duration::from_millis(2_500);

/// What came of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was answered.
    Answered(Duration),
    /// The target's host answered that nobody listens there.
    Refused,
    /// Somebody on the way answered that it does not go on, or it could not even be sent.
    Unreachable(String),
    /// Nothing came back.
    Silent,
}

/// A TCP connection, closed at once.
pub(super) fn tcp(to: SocketAddr) -> Outcome {
    let began = Instant::now();
    match TcpStream::connect_timeout(&to, CONNECT_WITHIN) {
        Ok(_) => Outcome::Answered(began.elapsed()),
        Err(error) => failed(&error),
    }
}

/// Datagrams. Who gets one need not answer: silence says only that nobody refused it.
pub(super) fn udp(to: SocketAddr) -> Outcome {
    try_udp(to).unwrap_or_else(|error| failed(&error))
}

fn try_udp(to: SocketAddr) -> io::Result<Outcome> {
    let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(TRY_WITHIN))?;
    let began = Instant::now();
    for _ in 0..TRIES {
        socket.send(MARK)?;
        match socket.recv(&mut [0; 64]) {
            Ok(_) => return Ok(Outcome::Answered(began.elapsed())),
            Err(error) if is_late(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Outcome::Silent)
}

/// Echo requests (RFC 792).
pub(super) fn echo(to: IpAddr) -> Outcome {
    try_echo(to).unwrap_or_else(|error| failed(&error))
}

fn try_echo(to: IpAddr) -> io::Result<Outcome> {
    let (domain, protocol, request, reply) = match to {
        IpAddr::V4(_) => (Domain::IPV4, socket2::Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, socket2::Protocol::ICMPV6, 128, 129),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    let id: [u8; 2] = rand::random();
    for seq in 0..TRIES {
        let began = Instant::now();
        socket.send(&echo_message(request, id, seq))?;
        while let Some(left) = TRY_WITHIN.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
            socket.set_read_timeout(Some(left))?;
            let mut buffer = [0; 256];
            let n = match (&socket).read(&mut buffer) {
                Ok(n) => n,
                Err(error) if is_late(&error) => break,
                Err(error) => return Err(error),
            };
            let bytes = &buffer[..n];
            // A raw socket of IPv4 gets the IP header too.
            let header = if to.is_ipv4() { usize::from(bytes.first().map_or(0, |b| b & 0xf)) * 4 } else { 0 };
            let message = bytes.get(header..).unwrap_or_default();
            if message.first() == Some(&reply) && message.get(4..6) == Some(&id) && message.ends_with(MARK) {
                return Ok(Outcome::Answered(began.elapsed()));
            }
        }
    }
    Ok(Outcome::Silent)
}

/// Type, code, checksum, id, number, mark. The kernel fills in the checksum of ICMPv6.
fn echo_message(kind: u8, id: [u8; 2], seq: u16) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, id[0], id[1]];
    message.extend(seq.to_be_bytes());
    message.extend(MARK);
    let words = message.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn failed(error: &io::Error) -> Outcome {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Outcome::Refused,
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Outcome::Silent,
        _ => Outcome::Unreachable(error.to_string()),
    }
}

/// Probes a port, or without one whether anybody is there.
pub(super) fn probe(to: IpAddr, port: Option<u16>, proto: Protocol) -> Outcome {
    match (port, proto) {
        (None, _) => echo(to),
        (Some(port), Protocol::Tcp) => tcp(SocketAddr::new(to, port)),
        (Some(port), Protocol::Udp) => udp(SocketAddr::new(to, port)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_answers_refuses_or_is_silent() {
        let here = IpAddr::from([127, 0, 0, 1]);
        let listener = TcpListener::bind((here, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(matches!(probe(here, Some(port), Protocol::Tcp), Outcome::Answered(_)));
        drop(listener);
        assert_eq!(probe(here, Some(port), Protocol::Tcp), Outcome::Refused);
        let socket = UdpSocket::bind((here, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        assert_eq!(probe(here, Some(port), Protocol::Udp), Outcome::Silent, "it takes it and says nothing");
        drop(socket);
        assert_eq!(probe(here, Some(port), Protocol::Udp), Outcome::Refused);
    }

    #[test]
    fn an_echo_message_sums_up() {
        let message = echo_message(8, [0x12, 0x34], 1);
        let sum: u32 = message.chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], *p.get(1).unwrap_or(&0)]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "RFC 1071");
    }
}
