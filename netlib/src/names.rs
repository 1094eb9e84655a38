//! Owns every name and number by which our kernel state is known: interface names, MACs, next hops, ids, the route
//! protocol. All follow from VNI, host number and address, so that hosts agree without talking.
//!
//! Pure functions. The first byte of each MAC is locally administered and tells its kind:
//! `02` VTEP, `06` container, `0a` uplink, `0e` gateway.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::types::{HostIndex, Mac, NetworkId};

/// `rtm_protocol` of every route and next hop of ours (user space may use 5 to 255, `linux/rtnetlink.h`).
pub const RTPROT_SKEIN: u8 = 83;
/// The VXLAN device of a network, in its fabric.
pub const VXLAN_IFNAME: &str = "skvx";
/// The fabric's end of the uplink to the host.
pub const UPLINK_IFNAME: &str = "skup";
/// Every container's veth in a fabric starts like this.
pub const ENDPOINT_PREFIX: &str = "skv-";
/// Every uplink in the host's namespace starts like this.
pub const HOST_UPLINK_PREFIX: &str = "ske-";
/// Name of our nft table (family inet) in the host and in each fabric.
pub const NFT_TABLE: &str = "skein";
/// Metric of the routes that keep a network's traffic from leaving by the default route.
pub const UNREACHABLE_METRIC: u32 = 9000;
/// Metric of IPv6 routes without one (IP6_RT_PRIO_USER, `net/ip6_route.h`).
pub const V6_DEFAULT_METRIC: u32 = 1024;
/// The host's end of an uplink, as next hop; nobody holds this address, a permanent neighbour stands for it.
pub const UPLINK_HOST_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 83, 1);
/// The fabric's end of an uplink, as next hop.
pub const UPLINK_FABRIC_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 83, 2);
/// The host's end of an uplink, as IPv6 next hop.
pub const UPLINK_HOST_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x83, 1);
/// The fabric's end of an uplink, as IPv6 next hop.
pub const UPLINK_FABRIC_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x83, 2);

/// Next hop objects of ours: this plus the host's number. The high half keeps clear of the small ids others take.
const NEXTHOP_BASE: u32 = 0x5300_0000;
const NETNS_PREFIX: &str = "sk-";

fn mac_of(kind: u8, vni: u32, low: u16) -> Mac {
    let [_, a, b, c] = vni.to_be_bytes();
    let [hi, lo] = low.to_be_bytes();
    Mac([kind, a, b, c, hi, lo])
}

/// MAC of a host's VXLAN device in a network.
pub fn vtep_mac(vni: u32, host: HostIndex) -> Mac {
    mac_of(0x02, vni, host.0)
}

/// MAC of a container, from its IPv4 address.
pub fn endpoint_mac(addr: Ipv4Addr) -> Mac {
    let [a, b, c, d] = addr.octets();
    Mac([0x06, 0x53, a, b, c, d])
}

/// MAC of the gateway that containers of a network see, the same on every host.
pub fn gateway_mac(vni: u32) -> Mac {
    mac_of(0x0e, vni, 1)
}

/// MAC of the host's end of an uplink.
pub fn uplink_host_mac(vni: u32) -> Mac {
    mac_of(0x0a, vni, 1)
}

/// MAC of the fabric's end of an uplink.
pub fn uplink_fabric_mac(vni: u32) -> Mac {
    mac_of(0x0a, vni, 2)
}

/// The next hop that stands for a host in a fabric, for both families (RFC 5549): one neighbour is enough.
pub fn host_nexthop(host: HostIndex) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x53, host.0))
}

/// Id of the next hop object that stands for a host in a fabric.
pub fn nexthop_id(host: HostIndex) -> u32 {
    NEXTHOP_BASE | u32::from(host.0)
}

/// Name of a container's veth in its fabric: `skv-` and the address in hex, 12 of the 15 bytes of IFNAMSIZ.
pub fn endpoint_ifname(addr: Ipv4Addr) -> String {
    format!("{ENDPOINT_PREFIX}{:08x}", addr.to_bits())
}

/// Name of a network's uplink in the host's namespace: `ske-` and the VNI, at most 12 of the 15 bytes of IFNAMSIZ.
pub fn host_uplink_ifname(vni: u32) -> String {
    format!("{HOST_UPLINK_PREFIX}{vni}")
}

/// File name of a network's namespace.
pub fn netns_name(id: &NetworkId) -> String {
    format!("{NETNS_PREFIX}{id}")
}

/// The network of a namespace's file name, if it is one of ours.
pub fn network_of_netns(name: &str) -> Option<NetworkId> {
    name.strip_prefix(NETNS_PREFIX)?.parse().ok()
}
