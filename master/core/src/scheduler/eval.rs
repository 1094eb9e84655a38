//! Filters over the index: which nodes pass, as bitsets.
//!
//! Owns the meaning of each filter on sets; `naive.rs` says the same node by node. It must not know strategies.
//! Costs: `==` on one attribute is one posting; a glob or regex looks at each *distinct* value once; amounts look at
//! the nodes that are still in the running; ports, replicas and affinities at the nodes that have such a task.
//! Pure, no tasks, no channels.

use std::collections::BTreeMap;

use skein_api::{NodeId, TaskId};

use super::{
    Scheduler,
    bits::{Bits, NodeIdx, Posting},
    expr::{NodeKey, Pattern},
    facts::{Dimension, HostAddr, NodeAttr, NodeFacts, TaskAttr},
    index::Holders,
    request::{Filter, Request},
};

/// Copies of the request that are to be counted as placed although they are not in the index.
pub(super) type Copies = BTreeMap<NodeIdx, u32>;

/// Values of the preferences of a request, the outer first; a part of it is a branch of an outer level.
pub(super) type Branch<'a> = Vec<&'a str>;

/// The nodes that pass a filter.
pub(super) enum Row<'a> {
    /// A set that is kept anyway.
    Kept(&'a Bits),
    /// All nodes but these, which are kept anyway.
    But(&'a Bits),
    /// Made for the question.
    Made(Bits),
}

/// A request against the present state.
pub(super) struct Evaluation<'a> {
    pub(super) scheduler: &'a Scheduler,
    pub(super) request: &'a Request,
    pub(super) hard: Vec<Filter<'a>>,
    pub(super) soft: Vec<Filter<'a>>,
}

impl<'a> Evaluation<'a> {
    pub(super) fn new(scheduler: &'a Scheduler, request: &'a Request) -> Self {
        let mut hard = request.filters();
        // Every task asks for a slot, and most clusters count none.
        if scheduler.index.limited.is_empty() {
            hard.retain(|filter| !matches!(filter, Filter::Amount(Dimension::Slots, _)));
        }
        Self { scheduler, request, hard, soft: request.soft_filters() }
    }

    /// Nodes that pass every hard filter.
    pub(super) fn fitting(&self) -> Bits {
        let mut left = self.scheduler.index.nodes.clone();
        for filter in &self.hard {
            left = self.passing(filter, left);
            if left.is_empty() {
                break;
            }
        }
        left
    }

    /// Nodes that pass what follows from what a node is: the row that a class begins with.
    pub(super) fn fixed(&self) -> Bits {
        self.hard.iter().fold(self.scheduler.index.nodes.clone(), |left, filter| match filter {
            Filter::Amount(Dimension::Generic(kind), ask) => {
                let offers = |idx: &NodeIdx| self.scheduler.at(*idx).and_then(|facts| facts.generic.get(kind));
                left.iter().filter(|idx| offers(idx).is_some_and(|count| count >= ask)).collect()
            }
            Filter::VolumeAffinity(_) => self.passing(filter, left),
            filter if filter.is_lasting() => self.passing(filter, left),
            _ => left,
        })
    }

    /// For each soft expression about nodes those that meet it; nothing for the others.
    pub(super) fn fixed_soft(&self) -> Vec<Bits> {
        let row = |filter: &Filter<'_>| match filter {
            Filter::Affinity(_) => Bits::default(),
            _ => self.passing(filter, self.scheduler.index.nodes.clone()),
        };
        self.soft.iter().map(row).collect()
    }

    /// Nodes that pass the hard filters that look at what a node is, not at its state and load.
    pub(super) fn allowed(&self) -> Bits {
        let lasting = self.hard.iter().filter(|filter| filter.is_lasting());
        lasting.fold(self.scheduler.index.nodes.clone(), |left, filter| self.passing(filter, left))
    }

    /// Narrows `fitting` by the soft expressions in their order; one that would leave nothing is given up.
    pub(super) fn preferred(&self, fitting: Bits) -> Bits {
        self.soft.iter().fold(fitting, |left, filter| {
            let narrowed = self.passing(filter, left.clone());
            if narrowed.is_empty() { left } else { narrowed }
        })
    }

    /// The members of `within` that pass.
    pub(super) fn passing(&self, filter: &Filter<'_>, mut within: Bits) -> Bits {
        let index = &self.scheduler.index;
        match filter {
            Filter::Health => within.and(&index.ready),
            Filter::Availability => within.and(&index.active),
            Filter::Pinned(pin) => {
                let nodes = pin.nodes.iter().filter_map(|id| self.scheduler.position(id));
                within.and(&nodes.collect());
            }
            Filter::Constraint(constraint) | Filter::Whitelist(constraint) | Filter::VolumeAffinity(constraint) => {
                keep(&mut within, &self.nodes_matching(&constraint.key, &constraint.pattern), constraint.negated);
            }
            Filter::Affinity(affinity) => {
                keep(&mut within, &self.nodes_with_task(&affinity.key, &affinity.pattern), affinity.negated);
            }
            Filter::Platform(platform) => {
                for (attr, value) in [(NodeAttr::Os, &platform.os), (NodeAttr::Arch, &platform.arch)] {
                    if !value.is_empty() {
                        within.and(&self.nodes_with(&attr, value));
                    }
                }
            }
            Filter::VolumePlugin(name) => within.and(&self.nodes_with(&NodeAttr::VolumePlugin, name)),
            Filter::NetworkPlugin(name) => within.and(&self.nodes_with(&NodeAttr::NetworkPlugin, name)),
            Filter::Amount(dimension @ Dimension::Slots, amount) => {
                let mut limited = index.limited.clone();
                limited.and(&within);
                for idx in limited.iter().filter(|idx| !self.has_room(dimension, *amount, *idx, 0)) {
                    within.remove(idx);
                }
            }
            Filter::Amount(dimension, amount) => {
                return within.iter().filter(|i| self.has_room(dimension, *amount, *i, 0)).collect();
            }
            Filter::Port(port) => {
                let wanted = HostAddr::of(port);
                for (idx, claimed) in index.claims(port.protocol, port.host_port) {
                    if claimed.overlaps(wanted) {
                        within.remove(idx);
                    }
                }
            }
            Filter::MaxReplicas { service, max } => {
                for (idx, count) in index.service(service).into_iter().flatten() {
                    if count >= max {
                        within.remove(*idx);
                    }
                }
            }
        }
        within
    }

    /// All nodes that pass: what an explanation counts, without copies of sets that are there.
    pub(super) fn row(&self, filter: &Filter<'_>) -> Row<'a> {
        let scheduler = self.scheduler;
        let kept = match filter {
            Filter::Health => Some(Row::Kept(&scheduler.index.ready)),
            Filter::Availability => Some(Row::Kept(&scheduler.index.active)),
            Filter::Constraint(constraint) | Filter::Whitelist(constraint) => {
                let kept = self.kept(&constraint.key, &constraint.pattern);
                kept.map(if constraint.negated { Row::But } else { Row::Kept })
            }
            Filter::Amount(dimension, amount) => scheduler.engine.with_room(dimension, *amount).map(Row::Made),
            _ => None,
        };
        kept.unwrap_or_else(|| Row::Made(self.passing(filter, scheduler.index.nodes.clone())))
    }

    /// The members of `within` that pass when `copies` of the request are counted as placed.
    pub(super) fn passing_with(&self, filter: &Filter<'_>, within: &Bits, copies: &Copies) -> Bits {
        let mut passing = self.passing(filter, within.clone());
        for (idx, count) in copies.iter().filter(|(idx, _)| within.contains(**idx)) {
            let passes = self.passes_with(filter, passing.contains(*idx), *idx, *count);
            passing.assign(*idx, passes);
        }
        passing
    }

    /// Whether a node passes with `copies` of the request on it; `without` tells whether it passes with none.
    ///
    /// A copy changes its own node only: it takes amounts, ports and a replica, and it may be what an affinity
    /// looks for. This is what makes batches cheap.
    pub(super) fn passes_with(&self, filter: &Filter<'_>, without: bool, idx: NodeIdx, copies: u32) -> bool {
        if copies == 0 {
            return without;
        }
        match filter {
            Filter::Amount(dimension, amount) => self.has_room(dimension, *amount, idx, copies),
            // A claim conflicts with itself.
            Filter::Port(_) => false,
            Filter::MaxReplicas { max, .. } => self.replicas(idx, copies) < *max,
            Filter::Affinity(affinity) if self.request.matches_itself(affinity) => !affinity.negated,
            _ => without,
        }
    }

    /// Whether one more fits beside what is there and `copies`.
    fn has_room(&self, dimension: &Dimension, amount: u64, idx: NodeIdx, copies: u32) -> bool {
        let load = self.scheduler.index.load(idx);
        let offered = match dimension {
            Dimension::Cpu => Some(load.offered.nano_cpus),
            Dimension::Memory => Some(load.offered.mem_bytes),
            _ => self.scheduler.at(idx).and_then(|facts| facts.offer(dimension)),
        };
        let Some(offered) = offered else { return true };
        let used = self.scheduler.index.used(dimension, idx);
        let used = if skein_api::mutant!("no-capacity") { 0 } else { used };
        used + u128::from(amount) * (u128::from(copies) + 1) <= u128::from(offered)
    }

    /// The branch of a node: its values of the request's preferences, the outer first.
    pub(super) fn branch(&self, idx: NodeIdx) -> Branch<'a> {
        let facts = self.scheduler.at(idx).expect("the index only holds positions of nodes");
        self.request.preferences.iter().map(|preference| facts.value_of(&preference.key)).collect()
    }

    /// How many tasks of the request's own service each branch has, of every level, with `copies` counted as placed.
    /// Those on nodes that are lost or drained are on their way out and do not count.
    pub(super) fn own_tasks(&self, copies: &Copies) -> BTreeMap<Branch<'a>, u64> {
        let mut own = BTreeMap::new();
        let Some(service) = &self.request.service else { return own };
        let counts = self.scheduler.index.service(service);
        for (idx, count) in counts.into_iter().flatten().chain(copies) {
            if self.scheduler.at(*idx).is_some_and(NodeFacts::keeps_tasks) {
                let branch = self.branch(*idx);
                for depth in 1..=branch.len() {
                    *own.entry(branch[..depth].to_vec()).or_default() += u64::from(*count);
                }
            }
        }
        own
    }

    /// The own tasks of a node's branches, the outer first.
    pub(super) fn own_of(own: &BTreeMap<Branch<'a>, u64>, branch: &Branch<'a>) -> Vec<u64> {
        (1..=branch.len()).map(|depth| own.get(&branch[..depth]).copied().unwrap_or(0)).collect()
    }

    /// Narrows what is left to the branches with the fewest own tasks.
    pub(super) fn spread_out(&self, left: Bits) -> Bits {
        if self.request.preferences.is_empty() {
            return left;
        }
        let own = self.own_tasks(&Copies::new());
        let counted: Vec<_> = left.iter().map(|idx| (Self::own_of(&own, &self.branch(idx)), idx)).collect();
        let least = counted.iter().map(|(count, _)| count).min().cloned();
        counted.into_iter().filter(|(count, _)| Some(count) == least.as_ref()).map(|(_, idx)| idx).collect()
    }

    /// Tasks of the request's own service on a node, with `copies` more; 0 for a request without a service.
    pub(super) fn replicas(&self, idx: NodeIdx, copies: u32) -> u32 {
        let Some(service) = &self.request.service else { return 0 };
        let counts = self.scheduler.index.service(service);
        counts.and_then(|counts| counts.get(&idx)).copied().unwrap_or(0).saturating_add(copies)
    }

    fn nodes_matching(&self, key: &NodeKey, pattern: &Pattern) -> Bits {
        let mut found = Bits::default();
        match key {
            NodeKey::Any(attrs) => attrs.iter().for_each(|attr| self.add_matching(attr, pattern, &mut found)),
            NodeKey::First(attrs) => {
                // Backwards: an earlier attribute hides the later ones on the nodes that have it.
                for attr in attrs.iter().rev() {
                    if let Some(values) = self.scheduler.index.values(attr) {
                        values.present.take_from(&mut found);
                    }
                    self.add_matching(attr, pattern, &mut found);
                }
            }
        }
        found
    }

    /// The nodes that a pattern matches, when they are kept as one set: one value of the only attribute that is there.
    fn kept(&self, key: &NodeKey, pattern: &Pattern) -> Option<&'a Bits> {
        let (NodeKey::Any(attrs) | NodeKey::First(attrs)) = key;
        let scheduler = self.scheduler;
        let mut there = attrs.iter().filter_map(|attr| scheduler.index.values(attr));
        match (there.next(), there.next(), pattern) {
            (Some(values), None, Pattern::Exact(value)) => values.by_value.get(value)?.as_bits(),
            _ => None,
        }
    }

    fn add_matching(&self, attr: &NodeAttr, pattern: &Pattern, found: &mut Bits) {
        let Some(values) = self.scheduler.index.values(attr) else { return };
        match pattern {
            Pattern::Exact(value) => values.by_value.get(value).into_iter().for_each(|posting| posting.add_to(found)),
            _ => {
                let matching = values.by_value.iter().filter(|(value, _)| pattern.matches(value));
                matching.for_each(|(_, posting): (_, &Posting)| posting.add_to(found));
            }
        }
    }

    fn nodes_with(&self, attr: &NodeAttr, value: &str) -> Bits {
        let mut found = Bits::default();
        if let Some(posting) = self.scheduler.index.values(attr).and_then(|values| values.by_value.get(value)) {
            posting.add_to(&mut found);
        }
        found
    }

    fn nodes_with_task(&self, attr: &TaskAttr, pattern: &Pattern) -> Bits {
        let mut found = Bits::default();
        if *attr == TaskAttr::Container {
            self.add_with_task_id(pattern, &mut found);
        }
        let Some(values) = self.scheduler.index.task_values(attr) else { return found };
        match pattern {
            Pattern::Exact(value) => {
                values.get(value).into_iter().flat_map(Holders::nodes).for_each(|idx| found.insert(idx));
            }
            _ => {
                let matching = values.iter().filter(|(value, _)| pattern.matches(value));
                matching.flat_map(|(_, holders)| holders.nodes()).for_each(|idx| found.insert(idx));
            }
        }
        found
    }

    /// Nodes of the tasks whose id, or its short form, matches.
    fn add_with_task_id(&self, pattern: &Pattern, found: &mut Bits) {
        let Scheduler { tasks, positions, .. } = self.scheduler;
        let mut add = |node: &NodeId| positions.get(node).into_iter().for_each(|idx| found.insert(*idx));
        match pattern {
            Pattern::Exact(value) => {
                let from = tasks.range(TaskId::new(value)..).take_while(|(id, _)| id.as_str().starts_with(value));
                from.filter(|(id, _)| id.as_str() == value || id.short() == value)
                    .for_each(|(_, held)| add(&held.node));
            }
            _ => {
                let matching =
                    tasks.iter().filter(|(id, _)| [id.as_str(), id.short()].iter().any(|id| pattern.matches(id)));
                matching.for_each(|(_, held)| add(&held.node));
            }
        }
    }
}

/// Keeps what is in `matching`, or with `negated` what is not.
fn keep(within: &mut Bits, matching: &Bits, negated: bool) {
    if negated {
        within.and_not(matching);
    } else {
        within.and(matching);
    }
}
