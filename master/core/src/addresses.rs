//! Addresses of a network: blocks that hosts own, static addresses, and what is done when no block is left.
//!
//! A host gives out the addresses of its blocks without asking, so what the master takes from a block it must first
//! *freeze*: the host is told to give none of these to anybody new, and answers which are in use. From then on these only
//! become fewer, and all others are the master's to give ([`Freeze`]). Three things are made of it:
//!
//! ```text
//! static address in a host's block:  freeze the address ─▶ not in use ─▶ /32 of the host where its task runs
//! no block is left:                  freeze the block that has the most room ─┬▶ none in use: it is nobody's again
//!                                                                             └▶ else: the others as /32 for whoever
//!                                                                                lacks one (*borrowed*)
//! ```
//!
//! A single address is a block of one, routed by every host like any other; the most specific route wins. A freeze is
//! never taken back: its ticket is used once, so a late answer to an earlier one is never taken for an answer to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use skein_api::{
    ApiError, Block, Freeze, Network, NetworkAttachment, NetworkId, NetworkUsage, NodeId, NodeUsage, Task, address4,
    address6,
};

use crate::{
    command::{Context, Now},
    core::Core,
    meta,
    model::{Change, Claimant, Key, Kind, Object, block_id, static_addresses},
    rng::Rng,
};

/// Addresses that a host keeps free in a network before it gets another block.
const BLOCK_SLACK: usize = 2;

/// Of a hundred addresses of a network so many are in use when it is called crowded, and fewer than the second number
/// when it is not any more.
const CROWDED_PERCENT: (u64, u64) = (80, 75);

/// Why a host gets no address now.
#[derive(Debug)]
pub(crate) struct Shortage {
    /// In words, for whoever waits for it.
    pub(crate) message: String,
    /// A block to freeze, so that there will be one.
    pub(crate) freeze: Option<Box<Block>>,
}

impl Shortage {
    /// The block to freeze.
    pub(crate) fn into_freeze(self) -> Option<Block> {
        self.freeze.map(|block| *block)
    }
}

impl From<String> for Shortage {
    fn from(message: String) -> Self {
        Self { message, freeze: None }
    }
}

/// Every address of a prefix.
fn addresses(prefix: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    (u32::from(prefix.network())..=u32::from(prefix.broadcast())).map(Ipv4Addr::from)
}

/// A number that no other freeze has: 53 bits, since many readers of JSON take numbers for floating point.
fn ticket(rng: &mut Rng) -> u64 {
    (rng.next_u64() >> 11).max(1)
}

/// Where an address of its container is kept: a service task gives it up when it ends, one without a service keeps it
/// while it is stopped.
fn keeps_addresses(task: &Task) -> bool {
    task.service.is_none() || !task.status.state.is_terminal()
}

/// The address of a task in a network, as its host reported it.
fn known_address(task: &Task, network: &NetworkId) -> Option<Ipv4Addr> {
    task.status.addresses.iter().find(|a| a.network == *network)?.v4
}

impl Core {
    // --- static addresses ---

    /// The static address that an attachment asks for, as IPv4. Who may have had it before is in `ours`, names of
    /// services: those that are changed by the same command.
    ///
    /// # Errors
    /// It is outside of the network, reserved, or somebody else's.
    pub(crate) fn static_address(
        &self,
        name: &str,
        attachment: &NetworkAttachment,
        network: &Network,
        ours: &BTreeSet<&str>,
    ) -> Result<Option<Ipv4Addr>, ApiError> {
        let Network { spec, subnet4, subnet6, .. } = network;
        let bad = |message: String| ApiError::new("bad_address", format!("{name}: {message}"));
        let hint = format!("skein network inspect {}", spec.name);
        let of6 = |v6| {
            let outside = format!("{v6} is outside of network {}: {subnet6}, low 32 bits as in {subnet4}", spec.name);
            address4(*subnet6, *subnet4, v6).ok_or_else(|| bad(outside).with_hint(&hint))
        };
        let address = match (attachment.ipv4, attachment.ipv6) {
            (None, None) => return Ok(None),
            (None, Some(v6)) => of6(v6)?,
            (Some(v4), v6) => {
                let right = address6(*subnet6, *subnet4, v4);
                if let Some(v6) = v6.filter(|v6| *v6 != right && subnet4.contains(&v4)) {
                    let message = format!("{v6} does not belong to {v4} in network {}: {right} does", spec.name);
                    return Err(bad(message).with_hint("leave the IPv6 address out, it follows from the IPv4 address"));
                }
                v4
            }
        };
        if !subnet4.contains(&address) {
            return Err(bad(format!("{address} is outside of network {} ({subnet4})", spec.name)).with_hint(hint));
        }
        if network.is_reserved(address) {
            let message = format!("{address} is the first, the last or the gateway's of network {}", spec.name);
            return Err(bad(message).with_hint(hint));
        }
        match self.address_owner(network, address, name, ours) {
            None => Ok(Some(address)),
            Some(owner) => {
                let message = format!("{name}: {address} of network {} belongs to {owner}", spec.name);
                Err(ApiError::new("address_taken", message).with_hint("choose another address, or none"))
            }
        }
    }

    /// Who has an address that service or container `name` asks for. Services of `ours` give up what they have by name,
    /// the service itself what its task has by chance.
    fn address_owner(&self, network: &Network, address: Ipv4Addr, name: &str, ours: &BTreeSet<&str>) -> Option<String> {
        let model = &self.model;
        let service_of = |task: &Task| Some(model.services.get(task.service.as_ref()?)?.spec.name.as_str());
        let claimant = model.claimants(&network.id, address).find_map(|claimant| match claimant {
            Claimant::Service(id) => {
                let name = model.services[id].spec.name.as_str();
                (!ours.contains(name)).then(|| format!("service {name}"))
            }
            Claimant::Task(id) => {
                let task = &model.tasks[id];
                (keeps_addresses(task) && !service_of(task).is_some_and(|s| ours.contains(s)))
                    .then(|| format!("task {}", task.name))
            }
        });
        let vip = || {
            let (_, service) = model.vips(&network.id).find(|(vip, _)| **vip == address)?;
            Some(format!("service {}, as its virtual address", model.services[service].spec.name))
        };
        let task = || {
            let known = |t: &Task| known_address(t, &network.id) == Some(address);
            // Those that have it by name were looked at.
            let by_chance = |t: &Task| t.spec.static_address(&network.id) != Some(address);
            let has = |t: &&Task| keeps_addresses(t) && known(t) && by_chance(t) && service_of(t) != Some(name);
            model.network_tasks(&network.id).find(has).map(|t| format!("task {}", t.name))
        };
        claimant.or_else(vip).or_else(task)
    }

    /// A task whose container may still have an address that `task` shall have, in words.
    pub(crate) fn static_holder(&self, task: &Task) -> Option<String> {
        static_addresses(&task.spec).find_map(|(network, address)| {
            let other = |claimant: &Claimant| match claimant {
                Claimant::Task(id) if *id != task.id => Some(&self.model.tasks[id]),
                _ => None,
            };
            let mut others = self.model.claimants(&network, address).filter_map(other);
            let holder = others.find(|t| t.node.is_some() && !t.status.state.is_terminal())?;
            Some(format!("waits for address {address}, which task {} still has", holder.name))
        })
    }

    /// The ticket under which hosts are asked about a static address: another one with each specification that names it.
    fn static_ticket(&self, network: &NetworkId, address: Ipv4Addr) -> u64 {
        let Some(first) = self.model.claimants(network, address).next() else { return 0 };
        let (id, generation) = match first {
            Claimant::Service(id) => (id.as_str(), self.model.services[id].meta.generation),
            Claimant::Task(id) => (id.as_str(), 1),
        };
        let seed =
            id.bytes().fold(u64::from(u32::from(address)), |seed, byte| Rng::new(seed ^ u64::from(byte)).next_u64());
        ticket(&mut Rng::new(seed ^ generation))
    }

    /// What a node of a network shall give to nobody who does not ask for it by name. O(static addresses and single
    /// ones of the network).
    pub(crate) fn freezes(&self, network: &Network, node: &NodeId) -> Vec<Freeze> {
        let inside = |address: Ipv4Addr| {
            self.model.block_of(network, address).is_some_and(|block| block.node == *node)
                || self.model.single(network, address).is_some_and(|block| block.node == *node)
        };
        let statics = self.model.statics(&network.id).map(|(address, _)| *address).filter(|a| inside(*a));
        let mut freezes: BTreeMap<Ipv4Net, u64> =
            statics.map(|a| (Ipv4Net::from(a), self.static_ticket(&network.id, a))).collect();
        for block in self.model.loose_blocks_of(&network.id) {
            match (block.node == *node, block.frozen) {
                (true, Some(ticket)) => drop(freezes.insert(block.block4, ticket)),
                (true, None) => {}
                // Another host's, out of a block of this one.
                (false, _) if block.is_single() && inside(block.block4.addr()) => {
                    freezes.entry(block.block4).or_default();
                }
                (false, _) => {}
            }
        }
        freezes.into_iter().map(|(prefix, ticket)| Freeze { prefix, ticket }).collect()
    }

    // --- for the placement of tasks ---

    /// The block that a node needs so that a task of it has an address in a network; none when it needs none. Idempotent.
    ///
    /// # Errors
    /// There is none now.
    pub(crate) fn ensure_address(
        &self,
        network: &Network,
        node: &NodeId,
        task: &Task,
        ctx: &Context,
    ) -> Result<Option<Block>, Shortage> {
        match task.spec.static_address(&network.id) {
            Some(address) => self.ensure_static(network, node, address, ctx),
            None => self.ensure_block(network, node, self.without_block(network, node, None) + 1, ctx),
        }
    }

    /// A static address comes to the node where its task is to run.
    fn ensure_static(
        &self,
        network: &Network,
        node: &NodeId,
        address: Ipv4Addr,
        ctx: &Context,
    ) -> Result<Option<Block>, Shortage> {
        let owner = self.model.single(network, address).or_else(|| self.model.block_of(network, address));
        let asked = match owner {
            Some(block) if block.node == *node && !(block.is_single() && block.borrowed) => return Ok(None),
            // From where its last task ran.
            Some(block) if block.is_single() && !block.borrowed => None,
            other => other,
        };
        if let Some(block) = asked.filter(|block| block.node != *node) {
            let name = self.model.node_name(&block.node);
            let ticket = self.static_ticket(&network.id, address);
            let answer = self.model.nodes.get(&block.node).and_then(|n| n.description.frozen.get(&ticket));
            match answer {
                Some(in_use) if in_use.contains(&address) && !self.ended_with(network, &block.node, address) => {
                    return Err(
                        format!("address {address} of network {} is in use on host {name}", network.spec.name).into()
                    );
                }
                Some(_) => {}
                None => {
                    let words =
                        format!("waits for host {name} to give up address {address} of its block {}", block.block4);
                    return Err(words.into());
                }
            }
        }
        Ok(Some(single(network, node, address, false, ctx)))
    }

    /// Whether a node keeps an address only for a task that has ended and never starts again: its container is there for
    /// its logs.
    fn ended_with(&self, network: &Network, node: &NodeId, address: Ipv4Addr) -> bool {
        let mut had = self.model.node_tasks(node).filter(|t| known_address(t, &network.id) == Some(address)).peekable();
        had.peek().is_some() && !had.any(keeps_addresses)
    }

    /// Another block, or a single address, for a node that has too few addresses for `tasks` tasks. Idempotent.
    ///
    /// # Errors
    /// The subnet has no free one.
    pub(crate) fn ensure_block(
        &self,
        network: &Network,
        node: &NodeId,
        tasks: usize,
        ctx: &Context,
    ) -> Result<Option<Block>, Shortage> {
        let owned = self.owned(network, node, None);
        let slack = BLOCK_SLACK.min(network.block_len() as usize / 4);
        if owned > 0 && owned >= tasks + slack {
            return Ok(None);
        }
        if let Some(index) = self.free_block(network) {
            return Ok(Some(whole(network, node, index, ctx)));
        }
        if owned > 0 && owned >= tasks {
            return Ok(None);
        }
        match self.spare_address(network) {
            Some(address) => Ok(Some(single(network, node, address, true, ctx))),
            None => Err(self.shortage(network, ctx)),
        }
    }

    /// Addresses that a node may give to any task: of its blocks but those that are frozen, and `but` one.
    fn owned(&self, network: &Network, node: &NodeId, but: Option<u32>) -> usize {
        let blocks = self.model.node_blocks(&network.id, node).filter(|b| b.frozen.is_none() && Some(b.index) != but);
        blocks.map(|b| self.room(network, b)).sum()
    }

    /// Tasks of a node that need an address of [`Core::owned`]: not static, and not known to have one elsewhere.
    fn without_block(&self, network: &Network, node: &NodeId, but: Option<u32>) -> usize {
        let elsewhere: Vec<Ipv4Net> = self
            .model
            .loose_blocks_of(&network.id)
            .filter(|b| b.node == *node && b.frozen.is_some())
            .map(|b| b.block4)
            .chain(but.and_then(|index| self.model.blocks.get(&(network.id.clone(), index))).map(|b| b.block4))
            .collect();
        let needs = |task: &&Task| {
            let attached = task.spec.attachment(&network.id).is_some_and(|a| a.ipv4.is_none());
            let has = || known_address(task, &network.id).is_some_and(|a| elsewhere.iter().any(|b| b.contains(&a)));
            attached && keeps_addresses(task) && (elsewhere.is_empty() || !has())
        };
        self.model.node_tasks(node).filter(needs).count() + self.plain(network, node)
    }

    /// How many addresses containers of a node have that its engine runs by itself.
    fn plain(&self, network: &Network, node: &NodeId) -> usize {
        let count = self.model.nodes.get(node).and_then(|n| n.description.plain_addresses.get(&network.id));
        count.map_or(0, |count| *count as usize)
    }

    /// Nodes whose engines run containers by themselves get addresses for their tasks all the same. Idempotent.
    pub(crate) fn grow_plain(&mut self, node: &NodeId, now: Now, rng: &mut Rng) {
        let Some(known) = self.model.nodes.get(node) else { return };
        let member = |id: &&NetworkId| self.model.is_member(id, node);
        let networks: Vec<NetworkId> = known.description.plain_addresses.keys().filter(member).cloned().collect();
        for network in networks.iter().filter_map(|id| self.model.networks.get(id)).cloned().collect::<Vec<_>>() {
            let ctx = Context { seed: rng.next_u64(), ..meta::internal("allocator", "plain containers", now, 0) };
            let grown = self.ensure_block(&network, node, self.without_block(&network, node, None), &ctx);
            if let Some(block) = grown.unwrap_or_else(Shortage::into_freeze) {
                self.stage(Change::Upsert(Object::Block(block)));
            }
        }
    }

    /// Addresses of a block that are for whoever comes: not reserved, nobody's by name, and not taken out of it.
    fn room(&self, network: &Network, block: &Block) -> usize {
        let taken = self.taken_out(network, block.block4, block.is_single());
        block.block4.hosts_len() - taken
    }

    /// Addresses of a prefix that are not for whoever comes.
    fn taken_out(&self, network: &Network, prefix: Ipv4Net, single: bool) -> usize {
        let ends = [network.subnet4.network(), network.subnet4.broadcast(), network.gateway4()];
        let statics = self.model.statics(&network.id).map(|(address, _)| *address);
        let singles = self.model.loose_blocks_of(&network.id).filter(|b| b.is_single() && !single);
        let all = ends.into_iter().chain(statics).chain(singles.map(|b| b.block4.addr()));
        all.filter(|address| prefix.contains(address)).collect::<BTreeSet<_>>().len()
    }

    /// The lowest block that nobody owns, those of removed hosts last and of these the one that was freed first: a
    /// host that was cut off may still run containers with its addresses.
    fn free_block(&self, network: &Network) -> Option<u32> {
        let count = network.blocks();
        let mut owned = self.model.owned_blocks(&network.id);
        owned.extend(self.vip_blocks(network));
        let owned = if skein_api::mutant!("block-twice") { Default::default() } else { owned };
        let freed = self.freed_blocks(&network.id);
        let usable = |index| {
            let block4 = network.block4(index);
            block4.hosts_len() > self.taken_out(network, block4, false)
        };
        let free = |index: &u32| *index < count && !owned.contains(index) && usable(*index);
        let never_used = (0..count).find(|index| !freed.contains_key(index) && free(index));
        never_used.or_else(|| freed.iter().filter(|(i, _)| free(i)).min_by_key(|(i, at)| (**at, **i)).map(|(i, _)| *i))
    }

    // --- when no block is left ---

    /// An address of a frozen block that is nobody's; those of removed hosts last.
    fn spare_address(&self, network: &Network) -> Option<Ipv4Addr> {
        let freed = self.freed_blocks(&network.id);
        let known: BTreeSet<Ipv4Addr> =
            self.model.network_tasks(&network.id).filter_map(|t| known_address(t, &network.id)).collect();
        let answered = self.model.loose_blocks_of(&network.id).filter(|b| !b.is_single()).filter_map(|block| {
            let owner = self.model.nodes.get(&block.node)?;
            Some((block, owner.description.frozen.get(&block.frozen?)?))
        });
        let spare = answered.flat_map(|(block, in_use)| addresses(block.block4).filter(|a| !in_use.contains(a)));
        let nobodys = spare.filter(|address| {
            let claimed = self.model.claimants(&network.id, *address).next().is_some();
            let single = self.model.single(network, *address).is_some();
            !network.is_reserved(*address) && !claimed && !single && !known.contains(address)
        });
        nobodys.min_by_key(|a| (freed.get(&network.single_index(*a)).copied(), *a))
    }

    /// Nothing is left to give at once: which block to freeze, or why there is none.
    fn shortage(&self, network: &Network, ctx: &Context) -> Shortage {
        let able = |block: &&Block| {
            let node = self.model.nodes.get(&block.node);
            node.is_some_and(|n| n.description.freezes) && self.is_ready(&block.node)
        };
        let asked = self.model.loose_blocks_of(&network.id).filter(able).find(|block| {
            let answered = |ticket| self.model.nodes[&block.node].description.frozen.contains_key(&ticket);
            block.frozen.is_some_and(|ticket| !answered(ticket))
        });
        let waits = |block: &Block| {
            let (host, block4, network) = (self.model.node_name(&block.node), block.block4, &network.spec.name);
            format!("network {network} has no free address: waits for host {host} to say what it can spare of {block4}")
        };
        if let Some(block) = asked {
            return waits(block).into();
        }
        let blocks = self.model.owned_blocks(&network.id).into_iter();
        let blocks = blocks.map(|index| &self.model.blocks[&(network.id.clone(), index)]).filter(able);
        let spares = blocks.filter_map(|block| Some((self.spares(network, block)?, block)));
        let Some((_, most)) = spares.max_by_key(|(spares, block)| (*spares, std::cmp::Reverse(block.index))) else {
            return self.full(network).into();
        };
        let freeze = Block { frozen: Some(ticket(&mut Rng::new(ctx.seed))), ..most.clone() };
        Shortage { message: waits(&freeze), freeze: Some(Box::new(freeze)) }
    }

    /// How many addresses a block has that its owner does not need; none when it needs the block.
    fn spares(&self, network: &Network, block: &Block) -> Option<usize> {
        if block.frozen.is_some() || (block.is_single() && !block.borrowed) {
            return None;
        }
        let (node, index) = (&block.node, Some(block.index));
        let here = self.model.node_tasks(node).filter_map(|t| known_address(t, &network.id));
        let used: BTreeSet<Ipv4Addr> = here.filter(|a| block.block4.contains(a)).collect();
        let spares = self.room(network, block).checked_sub(used.len()).filter(|spares| *spares > 0)?;
        let rest = self.owned(network, node, index);
        // Containers that the engine runs by itself are not known here: one block stays for them.
        let last = network.spec.attachable && rest == 0;
        (!last && rest >= self.without_block(network, node, index)).then_some(spares)
    }

    /// That a network has no address left, and who has them.
    fn full(&self, network: &Network) -> String {
        /// More than that help nobody.
        const SHOWN_MAX: usize = 4;
        let usage = self.network_usage(network);
        let mut nodes: Vec<(&String, &NodeUsage)> = usage.nodes.iter().collect();
        nodes.sort_by_key(|(name, node)| (std::cmp::Reverse(node.owned), *name));
        let more = nodes.len().saturating_sub(SHOWN_MAX);
        let shown = nodes.into_iter().take(SHOWN_MAX);
        let mut who: Vec<String> = shown.map(|(name, n)| format!("{name} {} ({} in use)", n.owned, n.used)).collect();
        if usage.virtual_addresses > 0 {
            who.push(format!("services {}", usage.virtual_addresses));
        }
        if more > 0 {
            who.push(format!("{more} more hosts"));
        }
        let (name, subnet) = (&network.spec.name, network.subnet4);
        format!("network {name} has no free address in {subnet}: of {}, {}", usage.addresses, who.join(", "))
    }

    /// Gives back frozen blocks that nobody uses any more, and static addresses that nobody names. Idempotent.
    pub(crate) fn collect_blocks(&mut self) {
        let over: Vec<Key> = self
            .model
            .loose_blocks()
            .filter(|block| self.is_over(block))
            .map(|block| Key { kind: Kind::Block, id: block_id(&block.network, block.index) })
            .collect();
        for key in over {
            self.stage(Change::Delete(key));
        }
    }

    fn is_over(&self, block: &Block) -> bool {
        let Some(network) = self.model.networks.get(&block.network) else { return false };
        if block.is_single() && !block.borrowed {
            return self.model.claimants(&network.id, block.block4.addr()).next().is_none();
        }
        let Some(node) = self.model.nodes.get(&block.node) else { return false };
        let Some(in_use) = block.frozen.and_then(|ticket| node.description.frozen.get(&ticket)) else { return false };
        // A task that was placed here before the freeze, or with a static address, may only be about to ask.
        let comes = |task: &Task| {
            let asked = task.spec.static_address(&network.id).or_else(|| known_address(task, &network.id));
            keeps_addresses(task) && asked.is_some_and(|address| block.block4.contains(&address))
        };
        let rest = self.owned(network, &node.id, None);
        let attached = |t: &Task| keeps_addresses(t) && t.spec.attachment(&network.id).is_some();
        let alone = self.model.node_blocks(&network.id, &node.id).count() == 1;
        in_use.is_empty()
            && !self.model.node_tasks(&node.id).any(comes)
            && !(alone && self.model.node_tasks(&node.id).any(attached))
            && rest >= self.without_block(network, &node.id, None)
    }

    // --- use ---

    /// Who has how many addresses. O(the network's tasks, blocks and virtual addresses).
    pub fn network_usage(&self, network: &Network) -> NetworkUsage {
        let reserved = 3_u32.min(network.subnet4.hosts_len() as u32);
        let addresses = u32::try_from(network.subnet4.hosts_len()).unwrap_or(u32::MAX) - reserved;
        let overlaps = self.overlaps_in(network);
        let mut usage = NetworkUsage { addresses, overlaps, ..NetworkUsage::default() };
        for node in self.model.members(&network.id) {
            let blocks = self.model.node_blocks(&network.id, node);
            let name = self.model.node_name(node).to_owned();
            let owned = blocks.map(|b| self.room(network, b) as u32).sum();
            let used = self.model.node_tasks(node).filter(|t| keeps_addresses(t));
            let used = used.filter(|t| t.spec.attachment(&network.id).is_some()).count() + self.plain(network, node);
            let used = u32::try_from(used).unwrap_or(u32::MAX);
            usage.used += used;
            usage.nodes.insert(name, NodeUsage { owned, used });
        }
        usage.virtual_addresses = self.model.vips(&network.id).count() as u32;
        let idle = self.model.statics(&network.id).filter(|(_, claimants)| {
            !claimants.iter().any(|c| matches!(c, Claimant::Task(id) if self.model.tasks[id].node.is_some()))
        });
        usage.used += usage.virtual_addresses + idle.count() as u32;
        usage
    }

    /// A network with the use of its addresses.
    pub fn network_view(&self, network: &Network) -> Network {
        Network { usage: Some(self.network_usage(network)), ..network.clone() }
    }

    /// Says of a network whether it is crowded, when that changed.
    pub(crate) fn note_usage(&mut self, id: &NetworkId, now: Now) {
        let Some(network) = self.model.networks.get(id) else { return };
        let names = self.model.network_tasks(id).count() + self.model.vips(id).count() + self.model.statics(id).count();
        let low = names as u64 * 100 < CROWDED_PERCENT.1 * network.subnet4.hosts_len() as u64;
        if low && !network.crowded {
            // No more than these can be in use: most networks are far from it.
            return;
        }
        let usage = self.network_usage(network);
        let (used, all) = (u64::from(usage.used) * 100, u64::from(usage.addresses));
        let crowded = used >= all * if network.crowded { CROWDED_PERCENT.1 } else { CROWDED_PERCENT.0 };
        if crowded == network.crowded {
            return;
        }
        let ctx = meta::internal("allocator", "use of addresses", now, 0);
        let network = Network { crowded, meta: meta::changed(&network.meta, &ctx, false), ..network.clone() };
        if crowded {
            let (name, subnet) = (&network.spec.name, network.subnet4);
            let words =
                format!("network {name} is crowded: {} of {} addresses of {subnet} are in use", usage.used, all);
            self.readiness.notice(words);
        }
        self.stage(Change::Upsert(Object::Network(Box::new(network))));
    }
}

/// The block at a position of the subnet, as a node's.
pub(crate) fn whole(network: &Network, node: &NodeId, index: u32, ctx: &Context) -> Block {
    let (block4, node, meta) = (network.block4(index), node.clone(), meta::created(ctx));
    Block { network: network.id.clone(), index, node, meta, block4, frozen: None, borrowed: false }
}

/// One address, as a node's.
fn single(network: &Network, node: &NodeId, address: Ipv4Addr, borrowed: bool, ctx: &Context) -> Block {
    let (index, block4) = (network.single_index(address), Ipv4Net::from(address));
    let (network, node) = (network.id.clone(), node.clone());
    Block { network, index, node, meta: meta::created(ctx), block4, frozen: None, borrowed }
}

/// The number of addresses of a prefix.
trait HostsLen {
    fn hosts_len(&self) -> usize;
}

impl HostsLen for Ipv4Net {
    fn hosts_len(&self) -> usize {
        1 << (32 - self.prefix_len())
    }
}
