//! What an outsider can reach on this host: published ports, the host's own programs, VXLAN.
//!
//! Owns: what belongs to whom. Must not know: firewalls of others, which may close more. No channels; what blocks runs
//! on the blocking pool.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use netlib::Proto;
use skein_api::{ExposedBy, ExposedPort, Protocol};

use super::sockets::{self, Waiting};
use crate::overlay::{OverlayHandle, picture::Picture};

/// The answer to [`skein_api::NetQuestion::Exposed`].
pub(super) async fn exposed(overlay: &OverlayHandle) -> Result<Vec<ExposedPort>, String> {
    let picture = overlay.picture().await.map_err(|e| e.to_string())?;
    // Every thread of the agent is in the host's own namespace.
    let looked = tokio::task::spawn_blocking(|| {
        let waiting = sockets::waiting()?;
        let inodes: BTreeSet<u64> = waiting.iter().map(|w| w.inode).collect();
        Ok::<_, std::io::Error>((waiting, sockets::holders(&inodes)))
    });
    let (waiting, holders) = looked.await.map_err(|e| e.to_string())?.map_err(|e| format!("no socket table: {e}"))?;
    let mut ports = published(&picture);
    let ours: BTreeSet<(Protocol, u16)> = ports.iter().map(|port| (port.proto, port.port)).collect();
    let own = format!("(pid {})", std::process::id());
    for Waiting { proto, address, inode } in waiting {
        let holder = holders.get(&inode);
        // The sockets by which the agent keeps published ports from others: nothing ever reads them.
        if ours.contains(&(proto, address.port())) && holder.is_some_and(|holder| holder.ends_with(&own)) {
            continue;
        }
        let by = match holder {
            Some(program) => ExposedBy::Program { program: program.clone() },
            None if is_vxlan(&picture, proto, address) => {
                let vteps = picture.host.as_ref().map(|host| host.vteps.iter().copied().collect());
                ExposedBy::Vxlan { open_to: vteps.unwrap_or_default() }
            }
            None => ExposedBy::Kernel,
        };
        ports.push(port(proto, Some(address.ip()), address.port(), by));
    }
    ports.sort_by_key(|p| (p.port, p.proto, p.address));
    ports.dedup();
    Ok(ports)
}

fn port(proto: Protocol, address: Option<IpAddr>, port: u16, by: ExposedBy) -> ExposedPort {
    let address = address.filter(|ip| !ip.is_unspecified());
    let only_here = address.is_some_and(is_loopback);
    ExposedPort { proto, address, port, only_here, by }
}

fn is_loopback(address: IpAddr) -> bool {
    let mapped = |v6: Ipv6Addr| v6.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback());
    match address {
        IpAddr::V4(v4) => v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_loopback() || mapped(v6),
    }
}

fn is_vxlan(picture: &Picture, proto: Protocol, address: SocketAddr) -> bool {
    proto == Protocol::Udp && address.port() == picture.vxlan_port && !picture.networks.is_empty()
}

/// Ports of containers on this host; the families of one are one entry.
fn published(picture: &Picture) -> Vec<ExposedPort> {
    let mut ports = Vec::new();
    for network in &picture.networks {
        for (container, binding) in network.containers.iter().flat_map(|c| c.ports.iter().map(move |p| (c, p))) {
            let proto = match binding.proto {
                Proto::Tcp => Protocol::Tcp,
                Proto::Udp => Protocol::Udp,
            };
            let by = ExposedBy::Published {
                task: container.task.clone(),
                name: String::new(),
                network: network.ours.name.clone(),
                target: SocketAddr::new(container.v4.into(), binding.port),
            };
            ports.push(port(proto, binding.host_ip, binding.host_port, by));
        }
    }
    ports
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_out_of_reach() {
        let check = |address: &str, expected: bool| {
            let found = port(Protocol::Tcp, Some(address.parse().unwrap()), 80, ExposedBy::Kernel);
            assert_eq!(found.only_here, expected, "{address}");
        };
        check("127.0.0.1", true);
        check("127.8.8.8", true);
        check("::1", true);
        check("::ffff:127.0.0.1", true);
        check("0.0.0.0", false);
        check("::", false);
        check("192.0.2.1", false);
        assert_eq!(port(Protocol::Tcp, Some([0, 0, 0, 0].into()), 80, ExposedBy::Kernel).address, None);
    }
}
