//! Networks: subnets, VNIs, and the blocks of addresses that hosts own.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use skein_api::{ApiError, Network, NetworkId, NetworkSpec, Node, OVERLAPS_MAX, UnixMillis, check_labels};

use crate::{
    admit::check_name,
    command::{Context, Decision, Reply},
    core::Core,
    meta,
    model::{Change, Cluster, Key, Kind, Object, block_id},
    rng::Rng,
    workloads::is_removed,
};

/// First VNI: small ones are what people use by hand.
const VNI_MIN: u32 = 4_096;

/// Last VNI (RFC 7348: 24 bits).
const VNI_MAX: u32 = (1 << 24) - 1;

/// Largest and smallest prefix of a user's subnet: 2^24 to 4 addresses.
const SUBNET_PREFIXES: std::ops::RangeInclusive<u8> = 8..=30;

/// Prefix length of the blocks of a subnet: 1,024 blocks where they have 16 addresses or more, at most /24
/// (256 addresses). Small subnets have 16 blocks, or as many as they have addresses.
pub(crate) fn block_prefix(subnet_prefix: u8) -> u8 {
    match subnet_prefix {
        0..=18 => (subnet_prefix + 10).max(24),
        19..=24 => 28,
        _ => (subnet_prefix + 4).min(32),
    }
}

impl Core {
    pub(crate) fn network_create(&self, spec: &NetworkSpec, ctx: &Context) -> Decision {
        let mut cluster = self.cluster()?;
        let network = self.new_network(spec, &[], &mut cluster, &mut Rng::new(ctx.seed), ctx)?;
        let id = network.id.clone();
        let changes = vec![
            Change::Upsert(Object::Cluster(Box::new(cluster))),
            Change::Upsert(Object::Network(Box::new(network))),
        ];
        Ok((changes, Reply::Network(id)))
    }

    pub(crate) fn cluster(&self) -> Result<Cluster, ApiError> {
        self.model.cluster.clone().ok_or_else(|| ApiError::new("not_ready", "the cluster was not made yet"))
    }

    /// Allocates subnet and VNI for a network. `planned` are networks of the same command.
    pub(crate) fn new_network(
        &self,
        spec: &NetworkSpec,
        planned: &[Network],
        cluster: &mut Cluster,
        rng: &mut Rng,
        ctx: &Context,
    ) -> Result<Network, ApiError> {
        check_name("network", &spec.name)?;
        check_labels(&spec.labels).map_err(|e| ApiError::new("bad_request", format!("network {}: {e}", spec.name)))?;
        if planned.iter().any(|n| n.spec.name == spec.name) {
            return Err(ApiError::new("bad_request", format!("network {} stands twice in the stack", spec.name)));
        }
        if self.model.network(&spec.name).is_some_and(is_removed) {
            let message = format!("network {} is being removed and goes with its last task", spec.name);
            return Err(ApiError::new("in_use", message).with_hint("skein ps --all, then try again"));
        }
        if self.model.network(&spec.name).is_some() {
            return Err(ApiError::new("name_taken", format!("a network named {} is there already", spec.name))
                .with_hint(format!("skein network inspect {}", spec.name)));
        }
        let subnet4 = match spec.subnet4 {
            Some(subnet) => self.check_subnet(subnet, planned)?,
            None => self.free_subnet(planned)?,
        };
        let vni = self.free_vni(cluster.last_vni, planned)?;
        cluster.last_vni = vni;
        Ok(Network {
            id: NetworkId::new(rng.id()),
            meta: meta::created(ctx),
            spec: spec.clone(),
            vni,
            subnet4,
            subnet6: subnet6(cluster.ula_global_id, vni),
            block_prefix4: block_prefix(subnet4.prefix_len()),
            crowded: false,
            usage: None,
        })
    }

    /// Who already has addresses of this subnet, in words.
    fn overlap(&self, subnet: Ipv4Net, planned: &[Network]) -> Option<String> {
        let meets = |other: &Ipv4Net| other.contains(&subnet.network()) || subnet.contains(&other.network());
        let networks = self.model.networks.values().chain(planned);
        if let Some(network) = networks.into_iter().find(|n| meets(&n.subnet4)) {
            return Some(format!("network {} ({})", network.spec.name, network.subnet4));
        }
        self.model.nodes.values().find_map(|node| Some(format!("a {}", on_host(node, subnet).next()?)))
    }

    /// Networks of the cluster in which a host has routes or resolvers of its own, in words.
    pub(crate) fn overlaps_of(&self, node: &Node) -> BTreeSet<String> {
        let networks = self.model.networks.values();
        let of = |n: &Network| {
            let name = format!("network {} ({})", n.spec.name, n.subnet4);
            on_host(node, n.subnet4).map(move |what| format!("{name} overlaps a {what}")).collect::<Vec<_>>()
        };
        networks.flat_map(of).collect()
    }

    /// The routes and resolvers of hosts in a network's subnet, in words. O(all routes of all hosts).
    pub(crate) fn overlaps_in(&self, network: &Network) -> Vec<String> {
        self.model.nodes.values().flat_map(|node| on_host(node, network.subnet4)).take(OVERLAPS_MAX).collect()
    }

    fn check_subnet(&self, subnet: Ipv4Net, planned: &[Network]) -> Result<Ipv4Net, ApiError> {
        let subnet = subnet.trunc();
        if !SUBNET_PREFIXES.contains(&subnet.prefix_len()) {
            return Err(ApiError::new("bad_subnet", format!("subnet {subnet} is not between a /8 and a /30")));
        }
        match self.overlap(subnet, planned) {
            None => Ok(subnet),
            Some(other) => Err(ApiError::new("subnet_overlaps", format!("subnet {subnet} overlaps {other}"))
                .with_hint("choose another subnet, or none: the master then finds a free one")),
        }
    }

    /// The first subnet of the pool that meets no network and no host's route or resolver. O(n log n) in these.
    fn free_subnet(&self, planned: &[Network]) -> Result<Ipv4Net, ApiError> {
        let (pool, prefix) = (self.settings.subnet_pool, self.settings.subnet_prefix);
        let subnets = pool.subnets(prefix).map_err(|e| ApiError::new("bad_config", e.to_string()))?;
        let networks = self.model.networks.values().chain(planned).map(|n| n.subnet4);
        let routes = self.model.nodes.values().flat_map(|n| &n.description.routes);
        let routes = routes.filter_map(|r| if let IpNet::V4(r) = r { Some(*r) } else { None });
        let resolvers = self.model.nodes.values().flat_map(|n| &n.description.resolvers);
        let resolvers = resolvers.filter_map(|r| if let IpAddr::V4(r) = r { Some(Ipv4Net::from(*r)) } else { None });
        let all = networks.chain(routes).chain(resolvers);
        let mut taken: Vec<(Ipv4Addr, Ipv4Addr)> = all.map(|n| (n.network(), n.broadcast())).collect();
        taken.sort_unstable();
        // Subnets come in order, so what ends before one of them ends before all that follow.
        let mut next = 0;
        let mut reaches = None;
        for subnet in subnets {
            while let Some((_, end)) = taken.get(next).filter(|(start, _)| *start <= subnet.broadcast()) {
                reaches = reaches.max(Some(*end));
                next += 1;
            }
            if reaches < Some(subnet.network()) {
                return Ok(subnet);
            }
        }
        Err(ApiError::new("no_subnet", format!("no /{prefix} of the pool {pool} is free on all hosts"))
            .with_hint("skein network create --subnet, or set subnet_pool in the master's configuration"))
    }

    fn free_vni(&self, last: u32, planned: &[Network]) -> Result<u32, ApiError> {
        let used: BTreeSet<u32> = self.model.networks.values().chain(planned).map(|n| n.vni).collect();
        let last = last.max(VNI_MIN - 1);
        let mut following = (last + 1..=VNI_MAX).chain(VNI_MIN..=last);
        following.find(|vni| !used.contains(vni)).ok_or_else(|| ApiError::new("no_vni", "all VNIs are in use"))
    }

    pub(crate) fn network_remove(&self, reference: &str) -> Decision {
        let network = self.model.find_network(reference)?;
        self.check_unused(network)?;
        Ok((self.delete_network(network), Reply::Done))
    }

    /// Refuses when a service or a task names the network.
    pub(crate) fn check_unused(&self, network: &Network) -> Result<(), ApiError> {
        let named = |name: &str| name == network.spec.name || name == network.id.as_str();
        let service = self.model.services.values().find(|s| s.spec.task.networks.iter().any(|a| named(&a.network)));
        let user = match service {
            Some(service) => Some(format!("service {}", service.spec.name)),
            None => self.model.network_tasks(&network.id).next().map(|t| format!("task {}", t.name)),
        };
        match user {
            None => Ok(()),
            Some(user) => Err(ApiError::new("in_use", format!("network {} is used by {user}", network.spec.name))
                .with_hint("skein ps --all")),
        }
    }

    pub(crate) fn delete_network(&self, network: &Network) -> Vec<Change> {
        let blocks = self.model.blocks.values().filter(|b| b.network == network.id);
        let mut changes: Vec<Change> =
            blocks.map(|b| Change::Delete(Key { kind: Kind::Block, id: block_id(&b.network, b.index) })).collect();
        changes.push(Change::Delete(Key { kind: Kind::Network, id: network.id.to_string() }));
        changes
    }

    /// Positions of the blocks of a network that removed hosts had, with the last removal of one that had it.
    pub(crate) fn freed_blocks(&self, network: &NetworkId) -> BTreeMap<u32, UnixMillis> {
        let mut freed: BTreeMap<u32, UnixMillis> = BTreeMap::new();
        for node in self.model.removed_nodes.values() {
            for (_, index) in node.blocks.iter().filter(|(n, _)| n == network) {
                let at = freed.entry(*index).or_default();
                *at = node.removed_at.max(*at);
            }
        }
        freed
    }
}

/// Routes and resolvers of a host that meet a subnet, in words.
fn on_host(node: &Node, subnet: Ipv4Net) -> impl Iterator<Item = String> + '_ {
    let meets = move |other: &Ipv4Net| other.contains(&subnet.network()) || subnet.contains(&other.network());
    let routes = node.description.routes.iter().filter(move |r| matches!(r, IpNet::V4(r) if meets(r)));
    let routes = routes.map(|route| format!("route of host {} ({route})", node.name));
    let resolvers = node.description.resolvers.iter();
    let resolvers = resolvers.filter(move |r| matches!(r, IpAddr::V4(r) if subnet.contains(r)));
    routes.chain(resolvers.map(|resolver| format!("resolver of host {} ({resolver})", node.name)))
}

/// The /64 of a network: the cluster's ULA prefix and 16 bits of the VNI. VNIs are given in sequence, so two networks
/// meet in their low 16 bits only after 65,536 networks; the next four bits go into the global id then.
fn subnet6(global_id: u64, vni: u32) -> Ipv6Net {
    let high = (0xfd_u128 << 120) | (u128::from(global_id & 0xff_ffff_ffff) << 80);
    let high = high ^ (u128::from(vni >> 16) << 80);
    let address = high | (u128::from(vni & 0xffff) << 64);
    Ipv6Net::new(address.into(), 64).expect("64 is a prefix length")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes() {
        for (subnet, block) in [(8, 24), (14, 24), (16, 26), (18, 28), (20, 28), (24, 28), (26, 30), (28, 32), (30, 32)]
        {
            assert_eq!(block_prefix(subnet), block, "/{subnet}");
        }
    }

    #[test]
    fn ipv6_subnets_are_unique_per_vni() {
        assert_eq!(subnet6(0x12_3456_789a, 0x1001).to_string(), "fd12:3456:789a:1001::/64");
        assert_ne!(subnet6(1, 0x1_1001), subnet6(1, 0x1001));
    }
}
