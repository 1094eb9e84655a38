//! The reference scheduler: the same decisions by plain loops over facts, as the oracle of tests and benchmarks.
//!
//! Owns a second, independent statement of what every filter and strategy means: no bitsets, no postings, no sums
//! that are carried along, everything counted anew for each question. It shares with the real one what a request
//! *is* (parsed expressions, the list of filters) and must not use its index. Cost: O(nodes × filters × tasks).
//! Never used by a master. Pure, no tasks, no channels.

use std::{cmp::Reverse, collections::BTreeMap};

use skein_api::{Availability, NodeId, PortPublish, Resources, Strategy, TaskId};

use super::{
    batch::Batch,
    explain::{FilterTally, Rejection},
    expr::NodeKey,
    facts::{Dimension, HostAddr, NodeAttr, NodeFacts, Placed, ROLE, TaskAttr, arch_alias, image_names},
    rank::{batch_seed, pick},
    request::{Filter, Request},
};

/// Facts, and nothing derived from them.
#[derive(Clone, Debug, Default)]
pub struct Naive {
    /// In table order: ties go to the earlier one, and a new node takes the first gap.
    nodes: Vec<Option<NodeFacts>>,
    tasks: BTreeMap<TaskId, Placed>,
}

impl Naive {
    /// As [`super::Scheduler::apply_node`].
    pub fn apply_node(&mut self, facts: NodeFacts) {
        let known = self.nodes.iter().position(|slot| slot.as_ref().is_some_and(|node| node.id == facts.id));
        match known.or_else(|| self.nodes.iter().position(Option::is_none)) {
            Some(at) => self.nodes[at] = Some(facts),
            None => self.nodes.push(Some(facts)),
        }
    }

    /// As [`super::Scheduler::remove_node`].
    pub fn remove_node(&mut self, id: &NodeId) {
        for slot in &mut self.nodes {
            if slot.as_ref().is_some_and(|node| node.id == *id) {
                *slot = None;
            }
        }
    }

    /// As [`super::Scheduler::apply_task`].
    pub fn apply_task(&mut self, task: Placed) {
        self.tasks.insert(task.task.clone(), task);
    }

    /// As [`super::Scheduler::remove_task`].
    pub fn remove_task(&mut self, id: &TaskId) {
        self.tasks.remove(id);
    }

    /// As [`super::Scheduler::place`].
    ///
    /// # Errors
    /// As there, with the same counts.
    pub fn place(&self, request: &Request, seed: u64) -> Result<NodeId, Rejection> {
        let mut left: Vec<&NodeFacts> = self.all().filter(|node| self.passes_all(request, node)).collect();
        if left.is_empty() {
            return Err(self.reject(request));
        }
        for soft in request.soft_filters() {
            let narrowed: Vec<_> = left.iter().copied().filter(|node| self.passes(&soft, node)).collect();
            if !narrowed.is_empty() {
                left = narrowed;
            }
        }
        for level in 1..=request.preferences.len() {
            let least = left.iter().map(|node| self.own_tasks(request, node, level)).min();
            left.retain(|node| Some(self.own_tasks(request, node, level)) == least);
        }
        let chosen = match request.strategy {
            Strategy::Random => left[pick(seed, left.len())],
            // Of equal ones, `min_by_key` takes the first.
            Strategy::Spread => left
                .into_iter()
                .min_by_key(|node| (self.replicas(request, node), self.emptiness(request, node)))
                .expect("not empty"),
            Strategy::Binpack => {
                left.into_iter().min_by_key(|node| Reverse(self.fullness(request, node))).expect("not empty")
            }
        };
        Ok(chosen.id.clone())
    }

    /// As [`super::Scheduler::place_batch`], one by one on a copy.
    pub fn place_batch(&self, request: &Request, count: u32, seed: u64) -> Batch {
        let mut copy = self.clone();
        let mut counts: BTreeMap<usize, u32> = BTreeMap::new();
        let mut batch = Batch::default();
        for step in 0..count {
            match copy.place(request, batch_seed(seed, step)) {
                Ok(node) => {
                    let at = copy.nodes.iter().position(|slot| slot.as_ref().is_some_and(|n| n.id == node));
                    *counts.entry(at.expect("a node of the table")).or_default() += 1;
                    batch.placed += 1;
                    // Affinities to containers do not see the batch: no id that an expression could mean.
                    let id = TaskId::new(format!("\u{0}batch-{step}"));
                    copy.apply_task(request.placed(id, String::new(), node));
                }
                Err(rejection) => {
                    batch.rejection = Some(rejection);
                    break;
                }
            }
        }
        let id = |at: usize| copy.nodes[at].as_ref().expect("a node of the table").id.clone();
        batch.runs = counts.into_iter().map(|(at, count)| (id(at), count)).collect();
        batch
    }

    /// As [`super::Scheduler::fitting`].
    pub fn fitting(&self, request: &Request) -> Vec<NodeId> {
        self.all().filter(|node| self.passes_all(request, node)).map(|node| node.id.clone()).collect()
    }

    fn all(&self) -> impl Iterator<Item = &NodeFacts> {
        self.nodes.iter().flatten()
    }

    fn passes_all(&self, request: &Request, node: &NodeFacts) -> bool {
        request.filters().iter().all(|filter| self.passes(filter, node))
    }

    fn reject(&self, request: &Request) -> Rejection {
        let mut filters = request.filters();
        if self.all().all(|node| node.slots.is_none()) {
            filters.retain(|filter| !matches!(filter, Filter::Amount(Dimension::Slots, _)));
        }
        let count = |nodes: usize| u32::try_from(nodes).expect("few nodes");
        let tally = |at: usize| {
            let before = |node: &&NodeFacts| filters[..at].iter().all(|filter| self.passes(filter, node));
            let rejects = |node: &&NodeFacts| !self.passes(&filters[at], node);
            FilterTally {
                kind: filters[at].kind(),
                filter: filters[at].to_string(),
                rejected: count(self.all().filter(before).filter(rejects).count()),
                rejected_alone: count(self.all().filter(rejects).count()),
            }
        };
        Rejection { nodes: count(self.all().count()), filters: (0..filters.len()).map(tally).collect() }
    }

    fn tasks_on<'a>(&'a self, node: &'a NodeFacts) -> impl Iterator<Item = &'a Placed> {
        self.tasks.values().filter(|task| task.node == node.id)
    }

    fn reserved_on(&self, node: &NodeFacts) -> (u128, u128) {
        let sum = |amount: fn(&Resources) -> u64| {
            self.tasks_on(node).map(|task| u128::from(amount(&task.reservations))).sum::<u128>()
        };
        (sum(|r| r.nano_cpus), sum(|r| r.mem_bytes))
    }

    fn passes(&self, filter: &Filter<'_>, node: &NodeFacts) -> bool {
        match filter {
            Filter::Health => node.ready,
            Filter::Availability => node.availability == Availability::Active,
            Filter::Pinned(pin) => pin.nodes.contains(&node.id),
            Filter::Constraint(constraint) | Filter::Whitelist(constraint) | Filter::VolumeAffinity(constraint) => {
                let matches = |value: &str| constraint.pattern.matches(value);
                key_values(&constraint.key, node).into_iter().any(matches) != constraint.negated
            }
            Filter::Affinity(affinity) => {
                let matches = |task| task_values(&affinity.key, task).into_iter().any(|v| affinity.pattern.matches(v));
                self.tasks_on(node).any(matches) != affinity.negated
            }
            Filter::Platform(platform) => {
                let is = |attr, wanted: &str| wanted.is_empty() || node_values(&attr, node).contains(&wanted);
                is(NodeAttr::Os, &platform.os) && is(NodeAttr::Arch, &platform.arch)
            }
            Filter::VolumePlugin(name) => node.volume_plugins.iter().any(|plugin| plugin == name),
            Filter::NetworkPlugin(name) => node.network_plugins.iter().any(|plugin| plugin == name),
            Filter::Amount(dimension, amount) => {
                let taken = |task: &Placed| -> u128 {
                    task.takes().filter(|(of, _)| of == *dimension).map(|(_, amount)| u128::from(amount)).sum()
                };
                let used: u128 = self.tasks_on(node).map(taken).sum();
                node.offer(dimension).is_none_or(|offered| used + u128::from(*amount) <= u128::from(offered))
            }
            Filter::Port(wanted) => {
                !self.tasks_on(node).flat_map(|task| &task.ports).any(|taken| conflicts(taken, wanted))
            }
            Filter::MaxReplicas { service, max } => {
                let own = self.tasks_on(node).filter(|task| task.service.as_ref() == Some(*service)).count();
                own < *max as usize
            }
        }
    }

    /// Tasks of the request's service on the nodes that have the same values of the first `level` preferences, without
    /// those on nodes that are lost or drained.
    fn own_tasks(&self, request: &Request, node: &NodeFacts, level: usize) -> usize {
        let same = |other: &&NodeFacts| {
            let keys = request.preferences[..level].iter().map(|preference| &preference.key);
            keys.into_iter().all(|key| preferred_value(key, other) == preferred_value(key, node))
        };
        let stays = |other: &&NodeFacts| other.ready && other.availability != Availability::Drain;
        self.all().filter(same).filter(stays).map(|other| self.replicas(request, other)).sum()
    }

    fn replicas(&self, request: &Request, node: &NodeFacts) -> usize {
        self.tasks_on(node).filter(|task| task.service.is_some() && task.service == request.service).count()
    }

    /// Spread: how full the node is, in steps of 1/256 of its offer and at most twice of it, with at most 255 tasks told
    /// apart. By share then tasks if the request reserves anything, else by tasks then share.
    fn emptiness(&self, request: &Request, node: &NodeFacts) -> (u64, u64) {
        let (cpus, memory) = self.reserved_on(node);
        let share = share(cpus, node.offered.nano_cpus).max(share(memory, node.offered.mem_bytes)) / (1 << 15);
        let tasks = (self.tasks_on(node).count() as u64).min(255);
        if request.reservations == Resources::default() { (tasks, share) } else { (share, tasks) }
    }

    /// Binpack: how full the node would be. By the smaller share of what the request reserves, then tasks; if it reserves
    /// nothing by tasks, then the larger share.
    fn fullness(&self, request: &Request, node: &NodeFacts) -> (u64, u64) {
        let (cpus, memory) = self.reserved_on(node);
        let asks = request.reservations;
        let cpu = share(cpus + u128::from(asks.nano_cpus), node.offered.nano_cpus);
        let memory = share(memory + u128::from(asks.mem_bytes), node.offered.mem_bytes);
        let tasks = self.tasks_on(node).count() as u64;
        match (asks.nano_cpus, asks.mem_bytes) {
            (0, 0) => (tasks, cpu.max(memory)),
            (_, 0) => (cpu, tasks),
            (0, _) => (memory, tasks),
            (_, _) => (cpu.min(memory), tasks),
        }
    }
}

/// In units of 2^-23 of the offer, rounded down twice: the reciprocal, and the product. At most twice the offer.
fn share(used: u128, offered: u64) -> u64 {
    let whole = 1_u128 << 87;
    let reciprocal = if offered == 0 { u128::MAX } else { whole / u128::from(offered) }.min(u128::from(u64::MAX));
    let share = used.min(u128::from(u64::MAX)) * reciprocal / (1 << 64);
    u64::try_from(share.min((1 << 24) - 1)).expect("24 bits")
}

fn conflicts(taken: &PortPublish, wanted: &PortPublish) -> bool {
    taken.host_port != 0
        && (taken.protocol, taken.host_port) == (wanted.protocol, wanted.host_port)
        && HostAddr::of(taken).overlaps(HostAddr::of(wanted))
}

fn key_values<'a>(key: &NodeKey, node: &'a NodeFacts) -> Vec<&'a str> {
    match key {
        NodeKey::Any(attrs) => attrs.iter().flat_map(|attr| node_values(attr, node)).collect(),
        NodeKey::First(attrs) => {
            attrs.iter().map(|attr| node_values(attr, node)).find(|values| !values.is_empty()).unwrap_or_default()
        }
    }
}

/// What a preference tells nodes apart by: the first value; having none and having an empty one are the same.
fn preferred_value<'a>(key: &NodeKey, node: &'a NodeFacts) -> &'a str {
    let values = match key {
        NodeKey::Any(attrs) | NodeKey::First(attrs) => attrs.iter().map(|attr| node_values(attr, node)),
    };
    values.into_iter().flatten().next().unwrap_or_default()
}

/// The values of one attribute; none where the node does not have it.
fn node_values<'a>(attr: &NodeAttr, node: &'a NodeFacts) -> Vec<&'a str> {
    let said = |text: &'a String| if text.is_empty() { Vec::new() } else { vec![text.as_str()] };
    match attr {
        NodeAttr::Id => vec![node.id.as_str()],
        NodeAttr::Name => said(&node.name),
        NodeAttr::Hostname => said(&node.hostname),
        NodeAttr::Role => vec![ROLE],
        NodeAttr::Site => said(&node.site),
        NodeAttr::Os => said(&node.os),
        NodeAttr::Arch => said(&node.arch).into_iter().chain(arch_alias(&node.arch)).collect(),
        NodeAttr::OperatingSystem => said(&node.operating_system),
        NodeAttr::Kernel => said(&node.kernel),
        NodeAttr::EngineVersion => said(&node.engine_version),
        NodeAttr::StorageDriver => said(&node.storage_driver),
        NodeAttr::ExecutionDriver => said(&node.execution_driver),
        NodeAttr::Ip => node.addresses.iter().map(String::as_str).collect(),
        NodeAttr::Volume => node.volumes.iter().map(String::as_str).collect(),
        NodeAttr::NodeLabel(key) => node.labels.get(key).map(String::as_str).into_iter().collect(),
        NodeAttr::EngineLabel(key) => node.engine_labels.get(key).map(String::as_str).into_iter().collect(),
        NodeAttr::VolumePlugin => node.volume_plugins.iter().map(String::as_str).collect(),
        NodeAttr::NetworkPlugin => node.network_plugins.iter().map(String::as_str).collect(),
    }
}

fn task_values<'a>(attr: &TaskAttr, task: &'a Placed) -> Vec<&'a str> {
    match attr {
        TaskAttr::Container => {
            let names = [task.task.as_str(), task.task.short(), &task.name];
            names.into_iter().filter(|name| !name.is_empty()).collect()
        }
        TaskAttr::Service => {
            let id = task.service.as_ref().map(|id| id.as_str());
            id.into_iter().chain([task.service_name.as_str()]).filter(|name| !name.is_empty()).collect()
        }
        TaskAttr::Image => image_names(&task.image),
        TaskAttr::Label(key) => task.labels.get(key).map(String::as_str).into_iter().collect(),
    }
}
