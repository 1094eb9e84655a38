//! Chooses host ports for ports that were published without one, where the engine publishes them by itself: for tasks
//! without an overlay network. For the others the network side chooses, and holds what it chose.

use std::{
    collections::{BTreeSet, VecDeque},
    io,
    net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket},
    ops::RangeInclusive,
    sync::{Mutex, PoisonError},
};

use rand::Rng;
use skein_api::{PortPublish, Protocol};

/// Where ports are chosen from that the user left open: Linux' ephemeral ports, as engines do it.
pub const RANGE: RangeInclusive<u16> = 32_768..=60_999;
/// Choices that are remembered: between a choice and the container's start nothing holds the port. A choice is in a
/// container's ports well before this many others were made.
const RECENT_MAX: usize = 1_024;

/// The ports that were chosen of late.
#[derive(Default)]
pub(super) struct PortChooser {
    recent: Mutex<VecDeque<(Protocol, u16)>>,
}

impl PortChooser {
    /// `ports` with every host port 0 replaced by a free one. `used` are the ports of other containers, running or not.
    pub(super) fn choose(
        &self,
        ports: &[PortPublish],
        used: &BTreeSet<(Protocol, u16)>,
    ) -> Result<Vec<PortPublish>, String> {
        ports
            .iter()
            .map(|port| match port.host_port {
                0 => Ok(PortPublish { host_port: self.one(port.protocol, port.host_ip, used)?, ..*port }),
                _ => Ok(*port),
            })
            .collect()
    }

    /// `used` and what was chosen of late.
    pub(super) fn with_recent(&self, used: &BTreeSet<(Protocol, u16)>) -> BTreeSet<(Protocol, u16)> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        used.iter().chain(recent.iter()).copied().collect()
    }

    fn one(&self, protocol: Protocol, ip: Option<IpAddr>, used: &BTreeSet<(Protocol, u16)>) -> Result<u16, String> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, count) = (*RANGE.start(), RANGE.end() - RANGE.start() + 1);
        let offset = rand::rng().random_range(0..count);
        for step in 0..count {
            let port = first + ((u32::from(offset) + u32::from(step)) % u32::from(count)) as u16;
            if used.contains(&(protocol, port)) || recent.contains(&(protocol, port)) || !is_free(protocol, ip, port) {
                continue;
            }
            recent.push_back((protocol, port));
            if recent.len() > RECENT_MAX {
                recent.pop_front();
            }
            return Ok(port);
        }
        Err(format!("no free host port in {} to {}", RANGE.start(), RANGE.end()))
    }
}

fn try_bind(protocol: Protocol, ip: Option<IpAddr>, port: u16) -> io::Result<()> {
    let at = (ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port);
    match protocol {
        Protocol::Tcp => TcpListener::bind(at).map(drop),
        Protocol::Udp => UdpSocket::bind(at).map(drop),
    }
}

fn is_free(protocol: Protocol, ip: Option<IpAddr>, port: u16) -> bool {
    try_bind(protocol, ip, port).is_ok()
}

/// The first fixed port that a process of this host has, in words. The overlay's rules would take the traffic away from
/// it without a word; the engine's own networks would refuse it later.
pub(super) fn taken(ports: &[PortPublish]) -> Option<String> {
    let in_use = |p: &&PortPublish| {
        let bound = try_bind(p.protocol, p.host_ip, p.host_port);
        p.host_port != 0 && bound.is_err_and(|e| e.kind() == io::ErrorKind::AddrInUse)
    };
    let port = ports.iter().find(in_use)?;
    let protocol = if port.protocol == Protocol::Udp { "udp" } else { "tcp" };
    Some(format!("host port {}/{protocol} is in use by another process of this host", port.host_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_are_chosen_and_fixed_ones_kept() {
        let chooser = PortChooser::default();
        let of = |host_port| PortPublish { protocol: Protocol::Tcp, container_port: 80, host_port, host_ip: None };
        let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a port is free");
        let taken_port = taken.local_addr().expect("is bound").port();
        let all: BTreeSet<(Protocol, u16)> = RANGE.filter(|p| *p != 40_000).map(|p| (Protocol::Tcp, p)).collect();
        let chosen = chooser.choose(&[of(8_080), of(0)], &BTreeSet::new()).expect("some are free");
        assert_eq!(chosen[0].host_port, 8_080);
        assert!(RANGE.contains(&chosen[1].host_port) && chosen[1].host_port != taken_port);
        assert!(!is_free(Protocol::Tcp, None, taken_port));
        assert_eq!(super::taken(&[of(0)]), None);
        let words = super::taken(&[of(0), of(taken_port)]).expect("it is bound above");
        assert!(words.contains(&format!("{taken_port}/tcp is in use")), "{words}");
        assert!(chooser.with_recent(&BTreeSet::new()).contains(&(Protocol::Tcp, chosen[1].host_port)));
        let only = chooser.choose(&[of(0), of(0)], &all);
        assert!(only.is_err(), "one port for two: {only:?}");
    }
}
