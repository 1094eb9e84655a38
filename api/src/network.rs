//! Overlay networks and the blocks of addresses that hosts own.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::{Meta, NetworkId, NodeId};

/// What a user asks of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkSpec {
    /// Unique in the cluster; of a stack: `<stack>_<network>`.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Stack that made it.
    pub stack: Option<String>,
    /// IPv4 subnet; none lets the master choose a free one of its pool.
    pub subnet4: Option<Ipv4Net>,
    /// No way out of it and none in.
    pub internal: bool,
    /// Plain `docker run --network` may use it on every host.
    pub attachable: bool,
}

/// A network as the cluster keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Identity.
    pub id: NetworkId,
    /// Common fields.
    #[serde(default)]
    pub meta: Meta,
    /// What the user asked for.
    pub spec: NetworkSpec,
    /// VXLAN network identifier, 4096 to 2^24 - 1, unique.
    pub vni: u32,
    /// IPv4 subnet.
    pub subnet4: Ipv4Net,
    /// IPv6 subnet, a /64 of the cluster's ULA prefix (RFC 4193). The low 32 bits of an address are its IPv4 offset.
    pub subnet6: Ipv6Net,
    /// Prefix length of the IPv4 blocks that hosts own.
    pub block_prefix4: u8,
}

impl Network {
    /// The gateway: first address of the subnet.
    pub fn gateway4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet4.network()) + 1)
    }
    /// Number of its blocks.
    pub fn blocks(&self) -> u32 {
        1 << (self.block_prefix4 - self.subnet4.prefix_len())
    }
    /// Addresses of a block.
    pub fn block_len(&self) -> u32 {
        1 << (32 - self.block_prefix4)
    }
    /// The addresses of the block at a position.
    pub fn block4(&self, index: u32) -> Ipv4Net {
        let base = u32::from(self.subnet4.network()) + index * self.block_len();
        Ipv4Net::new(base.into(), self.block_prefix4).expect("a prefix of at most 31")
    }
    /// The position of the block that an address is in; none for one before the subnet.
    pub fn block_index(&self, address: Ipv4Addr) -> Option<u32> {
        let offset = u32::from(address).checked_sub(u32::from(self.subnet4.network()))?;
        Some(offset / self.block_len())
    }
    /// Whether nobody is given this address: the subnet's first and last, and the gateway.
    pub fn is_reserved(&self, address: Ipv4Addr) -> bool {
        [self.subnet4.network(), self.subnet4.broadcast(), self.gateway4()].contains(&address)
    }
    /// The IPv6 gateway: `::1` of the subnet.
    pub fn gateway6(&self) -> Ipv6Addr {
        address6(self.subnet6, self.subnet4, self.gateway4())
    }
}

/// The IPv6 address that belongs to an IPv4 address of the same network: the subnet's prefix with the IPv4 address's
/// offset in its subnet as the interface identifier.
pub fn address6(subnet6: Ipv6Net, subnet4: Ipv4Net, address4: Ipv4Addr) -> Ipv6Addr {
    let offset = u32::from(address4).wrapping_sub(u32::from(subnet4.network()));
    Ipv6Addr::from(u128::from(subnet6.network()) | u128::from(offset))
}

/// The IPv6 block that belongs to an IPv4 block of the same network.
pub fn block6(subnet6: Ipv6Net, subnet4: Ipv4Net, block4: Ipv4Net) -> Ipv6Net {
    let prefix = 128 - (32 - block4.prefix_len());
    Ipv6Net::new(address6(subnet6, subnet4, block4.network()), prefix).expect("a prefix of at most 128")
}

/// A block of addresses of a network, owned by one host, which hands them out without asking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// The network.
    pub network: NetworkId,
    /// Position within the subnet, in blocks.
    pub index: u32,
    /// The owner.
    pub node: NodeId,
    /// Common fields.
    #[serde(default)]
    pub meta: Meta,
    /// The addresses.
    pub block4: Ipv4Net,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_share_their_offset() {
        let (s4, s6): (Ipv4Net, Ipv6Net) = ("10.57.0.0/16".parse().unwrap(), "fd57:1:2:3::/64".parse().unwrap());
        let check = |v4: &str, v6: &str| {
            assert_eq!(address6(s6, s4, v4.parse().unwrap()), v6.parse::<Ipv6Addr>().unwrap(), "{v4}");
        };
        check("10.57.0.1", "fd57:1:2:3::1");
        check("10.57.1.7", "fd57:1:2:3::107");
        check("10.57.255.254", "fd57:1:2:3::fffe");
        let block = block6(s6, s4, "10.57.1.16/28".parse().unwrap());
        assert_eq!(block, "fd57:1:2:3::110/124".parse::<Ipv6Net>().unwrap());
    }
}
