//! Virtual addresses of services: one in each network of a service, for as long as the service is there.
//!
//! They come from blocks of the subnet that no host owns, the last ones first, while hosts get the first ones: so neither
//! grows into the other before the subnet is full. That a block is for virtual addresses follows from those in it and is
//! written nowhere else. At most a quarter of the blocks is used so, and the last free one is left to hosts. A service
//! for which no address is left has none there, its name then finds its tasks; it is looked at again with each change of
//! it.

use std::{collections::BTreeSet, net::Ipv4Addr};

use skein_api::{EndpointMode, Network, NetworkId, Service, ServiceId, Vip, address6};

use crate::{
    core::Core,
    model::{Change, Object},
};

impl Core {
    /// Gives a service the virtual addresses that it lacks and takes those that it shall not have. Idempotent.
    pub(crate) fn ensure_vips(&mut self, service: &Service) {
        let wanted = self.wanted_vips(service);
        if wanted != service.vips {
            self.stage(Change::Upsert(Object::Service(Box::new(Service { vips: wanted, ..service.clone() }))));
        }
    }

    fn wanted_vips(&self, service: &Service) -> Vec<Vip> {
        if service.spec.endpoint_mode == EndpointMode::Dnsrr {
            return Vec::new();
        }
        let ids = service.spec.task.networks.iter().map(|attachment| NetworkId::new(&attachment.network));
        let networks = ids.filter_map(|id| self.model.networks.get(&id));
        let vip = |network: &Network| {
            let known = service.vips.iter().find(|vip| vip.network == network.id);
            known.cloned().or_else(|| {
                let v4 = self.free_vip(network, &service.id)?;
                Some(Vip { network: network.id.clone(), v4, v6: address6(network.subnet6, network.subnet4, v4) })
            })
        };
        networks.filter_map(vip).collect()
    }

    /// Positions of the blocks of a network that have virtual addresses in them.
    pub(crate) fn vip_blocks(&self, network: &Network) -> BTreeSet<u32> {
        self.model.vips(&network.id).filter_map(|(vip, _)| network.block_index(*vip)).collect()
    }

    /// An address for a service: in a block that has others already, else in the last one that is nobody's. Where in the
    /// block the search begins follows from the service's id, so that an address that was just given up, and that
    /// clients may still remember, seldom goes to the next service.
    fn free_vip(&self, network: &Network, service: &ServiceId) -> Option<Ipv4Addr> {
        let vips = self.model.vips(&network.id).map(|(vip, _)| *vip);
        let statics = self.model.statics(&network.id).map(|(address, _)| *address);
        let singles = self.model.loose_blocks_of(&network.id).filter(|b| b.is_single()).map(|b| b.block4.addr());
        let taken: BTreeSet<Ipv4Addr> = vips.chain(statics).chain(singles).collect();
        let begin = service.as_str().bytes().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let free_in = |block: u32| {
            let (base, len) = (u32::from(network.block4(block).network()), network.block_len());
            let mut addresses = (0..len).map(|nth| Ipv4Addr::from(base + begin.wrapping_add(nth) % len));
            addresses.find(|address| !taken.contains(address) && !network.is_reserved(*address))
        };
        let ours = self.vip_blocks(network);
        if let Some(found) = ours.iter().rev().find_map(|block| free_in(*block)) {
            return Some(found);
        }
        if ours.len() >= (network.blocks() / 4) as usize {
            return None;
        }
        let owned = self.model.owned_blocks(&network.id);
        let freed = self.freed_blocks(&network.id);
        let nobodys = |block: &u32| !owned.contains(block) && !ours.contains(block) && !freed.contains_key(block);
        let mut left = (0..network.blocks()).rev().filter(nobodys).filter(|block| free_in(*block).is_some());
        let block = left.next()?;
        // A service can do without a virtual address, a host cannot do without addresses.
        left.next()?;
        free_in(block)
    }
}
