//! Ports of the host that published ports take.
//!
//! Owns: a bound socket per published port, so that two programs cannot both believe that they have it, and the search
//! for who has one. Must not know: containers and nft: traffic to a published port is redirected before it would reach
//! the socket, which never listens. No tasks, no channels; calls take microseconds, except for the search after a
//! refusal, which reads /proc.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netlib::Proto;
use socket2::{Domain, Socket, Type};
use thiserror::Error;

use crate::{executor::HOST_PORT_RANGE, plugin::wire::PortBinding};

/// A port of the host.
pub type HostPort = (Proto, Option<IpAddr>, u16);

/// Why a port cannot be published.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Another process has it.
    #[error("port {port}/{proto} of this host is in use by {holder}")]
    InUse {
        /// Host port.
        port: u16,
        /// Protocol.
        proto: Proto,
        /// The process, if it can be found.
        holder: String,
    },
    /// The system refused for another reason: an address that the host does not have, most often.
    #[error("failed to take port {port}/{proto} of this host at {address}")]
    Refused {
        /// Host port.
        port: u16,
        /// Protocol.
        proto: Proto,
        /// Address.
        address: IpAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Every port of a range is in use.
    #[error("no port from {first} to {last}/{proto} of this host is free")]
    NoneFree {
        /// First of the range.
        first: u16,
        /// Last of the range.
        last: u16,
        /// Protocol.
        proto: Proto,
    },
}

/// The sockets that hold our ports. They are gone when the agent dies and taken again when it comes back.
#[derive(Debug, Default)]
pub struct Claims {
    held: BTreeMap<HostPort, Socket>,
}

impl Claims {
    /// Takes the ports of one endpoint and makes those that were left open concrete. Ports that are ours already are
    /// no error. On a failure none of them is newly held.
    ///
    /// # Errors
    /// See [`ClaimError`].
    pub fn claim(&mut self, ports: &[PortBinding]) -> Result<Vec<PortBinding>, ClaimError> {
        self.claim_but(ports, &BTreeSet::new())
    }

    /// As [`Claims::claim`]; ports of `avoid` are not chosen.
    ///
    /// # Errors
    /// See [`ClaimError`].
    pub fn claim_but(
        &mut self,
        ports: &[PortBinding],
        avoid: &BTreeSet<(Proto, u16)>,
    ) -> Result<Vec<PortBinding>, ClaimError> {
        let before: BTreeSet<HostPort> = self.held.keys().copied().collect();
        let mut taken = Vec::with_capacity(ports.len());
        for port in ports {
            match self.claim_one(port, avoid) {
                Ok(host_port) => taken.push(PortBinding { host_port, host_port_end: host_port, ..port.clone() }),
                Err(error) => {
                    self.held.retain(|key, _| before.contains(key));
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    fn claim_one(&mut self, port: &PortBinding, avoid: &BTreeSet<(Proto, u16)>) -> Result<u16, ClaimError> {
        let (proto, ip) = (port.proto, port.host_ip);
        let (first, last) = match port.host_port {
            0 => (*HOST_PORT_RANGE.start(), *HOST_PORT_RANGE.end()),
            first => (first, port.host_port_end.max(first)),
        };
        for candidate in first..=last {
            let key = (proto, ip, candidate);
            if self.held.contains_key(&key) {
                if first == last {
                    return Ok(candidate);
                }
                continue;
            }
            if first != last && avoid.contains(&(proto, candidate)) {
                continue;
            }
            match bind(key) {
                Ok(socket) => {
                    self.held.insert(key, socket);
                    return Ok(candidate);
                }
                Err(source) if source.kind() == io::ErrorKind::AddrInUse && first != last => {
                    continue;
                }
                Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                    let holder = holder(proto, candidate).unwrap_or_else(|| "another process".into());
                    return Err(ClaimError::InUse { port: candidate, proto, holder });
                }
                Err(source) => {
                    let address = ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
                    return Err(ClaimError::Refused { port: candidate, proto, address, source });
                }
            }
        }
        Err(ClaimError::NoneFree { first, last, proto })
    }

    /// Gives up every port that is not in `keep`.
    pub fn retain(&mut self, keep: &BTreeSet<HostPort>) {
        self.held.retain(|key, _| keep.contains(key));
    }
}

/// Binds without SO_REUSEADDR, so that nobody else can, and without listening. All addresses: one socket for both
/// families, or for IPv4 alone where the kernel has no IPv6.
fn bind((proto, ip, port): HostPort) -> io::Result<Socket> {
    let kind = match proto {
        Proto::Tcp => Type::STREAM,
        Proto::Udp => Type::DGRAM,
    };
    let open = |address: IpAddr| {
        let socket = Socket::new(Domain::for_address(SocketAddr::new(address, port)), kind, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(ip.is_some())?;
        }
        if proto == Proto::Udp {
            // Nobody reads it: what gets here in spite of the redirection must not fill memory.
            socket.set_recv_buffer_size(0)?;
        }
        socket.bind(&SocketAddr::new(address, port).into())?;
        Ok(socket)
    };
    match ip {
        Some(ip) => open(ip),
        None => match open(IpAddr::V6(Ipv6Addr::UNSPECIFIED)) {
            Err(e) if e.kind() != io::ErrorKind::AddrInUse => open(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            result => result,
        },
    }
}

/// The process that has a port: `process 123 (nginx)`. Reads the kernel's socket tables (proc_net_tcp) and then every
/// process's open files.
fn holder(proto: Proto, port: u16) -> Option<String> {
    let inodes: BTreeSet<u64> = ["", "6"]
        .iter()
        .filter_map(|family| {
            let table = fs::read_to_string(format!("/proc/net/{}{family}", proto.as_str())).ok()?;
            table.lines().skip(1).find_map(|line| inode_of(line, port))
        })
        .collect();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let has = files.flatten().any(|f| {
            let target = fs::read_link(f.path()).unwrap_or_default();
            let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            inode.is_some_and(|i: u64| inodes.contains(&i))
        });
        if has {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim_end()));
        }
    }
    None
}

/// The inode of a line of /proc/net/tcp whose socket waits on this local port: fields 1 local, 2 remote (port 0: not
/// connected), 9 inode.
fn inode_of(line: &str, port: u16) -> Option<u64> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let port_of = |field: &str| u16::from_str_radix(field.rsplit_once(':')?.1, 16).ok();
    let waits = port_of(fields.get(1)?)? == port && port_of(fields.get(2)?)? == 0;
    waits.then(|| fields.get(9)?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn port(host_port: u16, host_port_end: u16) -> PortBinding {
        PortBinding { proto: Proto::Tcp, host_ip: None, host_port, host_port_end, port: 80 }
    }

    #[test]
    fn a_claimed_port_is_nobody_elses_and_a_taken_one_names_its_holder() {
        let mut claims = Claims::default();
        let taken = claims.claim(&[port(0, 0)]).unwrap();
        let free = taken[0].host_port;
        assert!(HOST_PORT_RANGE.contains(&free));
        let avoided = claims.claim_but(&[port(0, 0)], &BTreeSet::from([(Proto::Tcp, free + 1)])).unwrap();
        assert!(avoided[0].host_port > free + 1, "the next one is somebody's who does not run");
        assert!(TcpListener::bind(("127.0.0.1", free)).is_err());
        assert_eq!(claims.claim(&taken).unwrap(), taken, "ours already");
        claims.retain(&BTreeSet::new());

        let other = TcpListener::bind("0.0.0.0:0").unwrap();
        let used = other.local_addr().unwrap().port();
        let error = claims.claim(&[port(0, 0), port(used, used)]).unwrap_err().to_string();
        assert!(error.contains(&format!("port {used}/tcp of this host is in use by process {}", std::process::id())));
        assert!(claims.held.is_empty(), "all or nothing");
        let error = claims.claim(&[PortBinding { host_ip: Some("192.0.2.1".parse().unwrap()), ..port(9, 9) }]);
        assert!(matches!(error, Err(ClaimError::Refused { .. })));
    }
}
