//! How the networks of this host are: wanted beside found, repairs, drops, addresses.
//!
//! Owns: what is counted under which reason. Must not know: who asks. No tasks, no channels.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

use netlib::{
    Scope,
    look::{Counted, Look},
    names,
};
use skein_api::{DnsStatus, NET_LIST_MAX, NetStatus, NetworkStatus, ScopeStatus};
use skein_daemon::chain;

use crate::overlay::{
    OverlayHandle,
    picture::{NetworkPicture, OF_HOST, Picture, of_network},
};

/// The answer to [`skein_api::NetQuestion::Status`].
pub(super) async fn status(overlay: &OverlayHandle) -> Result<NetStatus, String> {
    let picture = overlay.picture().await.map_err(|e| e.to_string())?;
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (counters, dns) = (overlay.counters(), picture.dns.counters());
    let mut networks = Vec::with_capacity(picture.networks.len());
    for network in &picture.networks {
        networks.push(network_status(overlay, &picture, network).await);
    }
    Ok(NetStatus {
        vtep: picture.vtep,
        vxlan_port: picture.vxlan_port,
        underlay_mtu: picture.netlib.as_ref().map_or(0, |netlib| netlib.config().underlay_mtu),
        troubles: picture.troubles.clone(),
        audits_total: read(&counters.audits_total),
        repairs_total: read(&counters.repairs_total),
        failures_total: read(&counters.failures_total),
        lost_endpoints_total: read(&counters.lost_endpoints_total),
        host: host_status(overlay, &picture).await,
        networks,
        dns: DnsStatus {
            answered_total: read(&dns.answered_total),
            forwarded_total: read(&dns.forwarded_total),
            forward_failures_total: read(&dns.forward_failures_total),
            rejected_total: read(&dns.rejected_total),
        },
    })
}

async fn host_status(overlay: &OverlayHandle, picture: &Picture) -> ScopeStatus {
    let (Some(netlib), Some(wanted)) = (&picture.netlib, &picture.host) else { return ScopeStatus::default() };
    let looked = netlib.look_host(wanted).await.map(|look| vec![look]);
    scope_status(overlay, OF_HOST, looked, netlib.counted(&Scope::Host).await, host_drops)
}

async fn network_status(overlay: &OverlayHandle, picture: &Picture, network: &NetworkPicture) -> NetworkStatus {
    let ours = &network.ours;
    let scope = match (&picture.netlib, &network.state) {
        (Some(netlib), Ok(state)) => {
            let counted = netlib.counted(&Scope::Fabric(state.id.clone())).await;
            scope_status(overlay, &of_network(&ours.name), netlib.look_network(state).await, counted, fabric_drops)
        }
        (_, Err(why)) => ScopeStatus { error: Some(why.clone()), ..ScopeStatus::default() },
        (None, Ok(_)) => ScopeStatus { error: Some("nothing was made of it yet".to_owned()), ..ScopeStatus::default() },
    };
    NetworkStatus {
        id: ours.id.clone(),
        name: ours.name.clone(),
        vni: ours.vni,
        mtu: ours.mtu,
        mtu_max: picture.netlib.as_ref().map_or(0, |netlib| netlib.config().overlay_mtu_max()),
        peers: network.state.as_ref().map_or(0, |state| state.peers.len()),
        unreachable: network.unreachable.clone(),
        containers: network.containers.len(),
        blocks: network.blocks.clone(),
        scope,
    }
}

fn scope_status(
    overlay: &OverlayHandle,
    what: &str,
    looked: Result<Vec<Look>, netlib::Error>,
    counted: Result<Counted, netlib::Error>,
    drops: fn(&Counted) -> Vec<(&'static str, u64)>,
) -> ScopeStatus {
    let (repairs_total, repairs) = overlay.repairs(what);
    let mut status = ScopeStatus { repairs_total, repairs, ..ScopeStatus::default() };
    match looked {
        Ok(looks) => {
            let mut differences: Vec<String> = looks.iter().flat_map(Look::differences).collect();
            status.differences_total = differences.len();
            differences.truncate(NET_LIST_MAX);
            status.differences = differences;
        }
        Err(error) => status.error = Some(chain(&error)),
    }
    match counted {
        Ok(counted) => {
            let seen = drops(&counted).into_iter().filter(|(_, packets)| *packets > 0);
            status.drops = seen.map(|(reason, packets)| (reason.to_owned(), packets)).collect::<BTreeMap<_, _>>();
        }
        Err(error) => status.error = status.error.or_else(|| Some(chain(&error))),
    }
    status
}

/// What a fabric drops. Names say what it means; docs/networking.md lists them.
fn fabric_drops(counted: &Counted) -> Vec<(&'static str, u64)> {
    let vxlan = counted.device(names::VXLAN_IFNAME);
    vec![
        ("source address is not the container's (IPv4)", counted.protocol("TcpExt.IPReversePathFilter")),
        ("source address is not the container's (IPv6)", counted.rule("spoof")),
        ("VXLAN sent by a container", counted.rule("inject")),
        (
            "answered as unreachable: nobody has the address, or too large (IPv4)",
            counted.protocol("Icmp.OutDestUnreachs"),
        ),
        ("answered as unreachable: nobody has the address (IPv6)", counted.protocol("Icmp6OutDestUnreachs")),
        ("answered as too large (IPv6)", counted.protocol("Icmp6OutPktTooBigs")),
        ("no way to the other host", vxlan.tx_errors),
        ("without a forwarding entry, the host's own multicast among them", vxlan.tx_dropped),
        ("dropped by the VXLAN device, receiving", vxlan.rx_dropped),
        ("broken VXLAN packet", vxlan.rx_errors),
    ]
}

/// What the host's namespace drops of ours.
fn host_drops(counted: &Counted) -> Vec<(&'static str, u64)> {
    vec![
        ("VXLAN from an address that is no host of the cluster", counted.rule("vxlan")),
        ("VXLAN sent by a container of the engine's own networks", counted.rule("inject")),
        ("into a network without being asked for or published", counted.rule("into")),
        ("UDP with a wrong checksum (IPv4)", counted.protocol("Udp.InCsumErrors")),
        ("UDP with a wrong checksum (IPv6)", counted.protocol("Udp6InCsumErrors")),
    ]
}

#[cfg(test)]
mod tests {
    use netlib::look::Device;

    use super::*;

    #[test]
    fn each_counter_has_a_reason() {
        let counted = Counted {
            rules: [("spoof", 3), ("inject", 4), ("own", 9)].map(|(name, n)| (name.to_owned(), n)).into(),
            devices: [("skvx".to_owned(), Device { tx_errors: 5, ..Device::default() })].into(),
            protocols: [("TcpExt.IPReversePathFilter", 6), ("Udp.InDatagrams", 9)]
                .map(|(n, c)| (n.to_owned(), c))
                .into(),
        };
        let seen: Vec<u64> =
            fabric_drops(&counted).into_iter().map(|(_, packets)| packets).filter(|p| *p > 0).collect();
        assert_eq!(seen, [6, 3, 4, 5]);
        let seen: Vec<_> = host_drops(&counted).into_iter().filter(|(_, packets)| *packets > 0).collect();
        assert_eq!(seen, [("VXLAN sent by a container of the engine's own networks", 4)]);
    }
}
