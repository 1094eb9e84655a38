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
    /// Four of five of its addresses are in use, or were not long ago: a larger subnet is called for.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub crowded: bool,
    /// Who has how many addresses; counted when asked, never stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<NetworkUsage>,
}

/// Who has how many IPv4 addresses of a network. IPv6 has the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkUsage {
    /// Addresses that can be given: those of the subnet but its first, its last and the gateway.
    pub addresses: u32,
    /// Of these, how many tasks and virtual addresses have, or are kept for by name.
    pub used: u32,
    /// Virtual addresses of services among them.
    pub virtual_addresses: u32,
    /// Routes and resolvers of hosts that lie in the subnet, in words: what is there cannot be reached from that host's
    /// containers, or this network from that host. At most [`OVERLAPS_MAX`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub overlaps: Vec<String>,
    /// What hosts may give out, by name of the node: nobody else is given these.
    pub nodes: BTreeMap<String, NodeUsage>,
}

/// Most overlaps that are told of one network.
pub const OVERLAPS_MAX: usize = 16;

/// A host's part of a network's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeUsage {
    /// Addresses of its blocks, and single ones.
    pub owned: u32,
    /// Those that tasks on it have, running or not.
    pub used: u32,
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
        Ipv4Net::new(base.into(), self.block_prefix4).expect("a prefix of at most 32")
    }
    /// The position of the block that an address is in; none for one before the subnet.
    pub fn block_index(&self, address: Ipv4Addr) -> Option<u32> {
        let offset = u32::from(address).checked_sub(u32::from(self.subnet4.network()))?;
        Some(offset / self.block_len())
    }
    /// The position of a single address ([`Block::is_single`]).
    pub fn single_index(&self, address: Ipv4Addr) -> u32 {
        SINGLE | u32::from(address).wrapping_sub(u32::from(self.subnet4.network()))
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

/// The IPv4 address that an IPv6 address of the same network belongs to: the inverse of [`address6`]; none for one that
/// belongs to none.
pub fn address4(subnet6: Ipv6Net, subnet4: Ipv4Net, address6: Ipv6Addr) -> Option<Ipv4Addr> {
    let offset = u128::from(address6).checked_sub(u128::from(subnet6.network()))?;
    let address = u32::from(subnet4.network()).checked_add(u32::try_from(offset).ok()?)?;
    Some(Ipv4Addr::from(address)).filter(|address| subnet4.contains(address))
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
    /// It is wanted back: its owner gives none of its addresses to anybody new, and says which are in use
    /// ([`Freeze::ticket`]). The others are given to single hosts; when none is in use it is nobody's again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<u64>,
    /// A single address out of a block that is frozen, for any container of the owner; a single one that is not
    /// borrowed is a static address of a service or container.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub borrowed: bool,
}

/// Positions of single addresses begin here: the offset of the address in its subnet is added. A subnet has at most
/// 2^24 addresses.
const SINGLE: u32 = 1 << 31;

impl Block {
    /// Whether it is a single address outside of its owner's blocks: a static one, or one that is borrowed from another
    /// host's block.
    pub fn is_single(&self) -> bool {
        self.index & SINGLE != 0
    }
}

/// Addresses that a host shall give to nobody who does not ask for them by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Freeze {
    /// The addresses: some of the host's blocks.
    pub prefix: Ipv4Net,
    /// Under this number the host tells which of them are in use ([`crate::NodeDescription::frozen`]), from the moment
    /// on that it gives out no more of them; 0: nobody wants to know. Never used for another freeze.
    pub ticket: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_share_their_offset() {
        let (s4, s6): (Ipv4Net, Ipv6Net) = ("10.57.0.0/16".parse().unwrap(), "fd57:1:2:3::/64".parse().unwrap());
        let check = |v4: &str, v6: &str| {
            assert_eq!(address6(s6, s4, v4.parse().unwrap()), v6.parse::<Ipv6Addr>().unwrap(), "{v4}");
            assert_eq!(address4(s6, s4, v6.parse().unwrap()), Some(v4.parse().unwrap()), "{v6}");
        };
        check("10.57.0.1", "fd57:1:2:3::1");
        check("10.57.1.7", "fd57:1:2:3::107");
        check("10.57.255.254", "fd57:1:2:3::fffe");
        for outside in ["fd57:1:2:3::1:0", "fd57:1:2:4::1", "fd57:1:2:3:1::1", "::1"] {
            assert_eq!(address4(s6, s4, outside.parse().unwrap()), None, "{outside}");
        }
        let block = block6(s6, s4, "10.57.1.16/28".parse().unwrap());
        assert_eq!(block, "fd57:1:2:3::110/124".parse::<Ipv6Net>().unwrap());
    }
}
