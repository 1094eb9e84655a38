//! The index: what the filters and the ranking read, kept up to date fact by fact.
//!
//! Owns postings by attribute value, what is used on each node, and who claims which port. It must not know
//! requests, filters or strategies. Everything here follows from nodes and tasks: `check` rebuilds and compares.
//! Pure, no tasks, no channels.

use std::collections::BTreeMap;

use skein_api::{Availability, Protocol, Resources, ServiceId};

use super::{
    bits::{Bits, NodeIdx, Posting},
    facts::{Dimension, HostAddr, NodeAttr, NodeFacts, Placed, TaskAttr},
};

/// How many tasks per node; nodes without one are absent.
pub(super) type Counts = BTreeMap<NodeIdx, u32>;

/// Nodes whose tasks have a value of an attribute, with how many have it. A name is one task's nearly always, and a map's
/// least part has room for eleven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holders {
    One(NodeIdx, u32),
    /// Two at least.
    Many(Counts),
}

impl Holders {
    fn add(&mut self, idx: NodeIdx) {
        match self {
            Self::One(one, count) if *one == idx => *count += 1,
            Self::One(one, count) => *self = Self::Many(Counts::from([(*one, *count), (idx, 1)])),
            Self::Many(counts) => *counts.entry(idx).or_default() += 1,
        }
    }

    /// False when no node is left.
    fn remove(&mut self, idx: NodeIdx) -> bool {
        let counts = match self {
            Self::One(one, count) => {
                assert_eq!(*one, idx, "the task was entered for this node");
                *count -= 1;
                return *count > 0;
            }
            Self::Many(counts) => counts,
        };
        let count = counts.get_mut(&idx).expect("the task was entered for this node");
        *count -= 1;
        if *count == 0 {
            counts.remove(&idx);
        }
        if let (1, Some((one, count))) = (counts.len(), counts.first_key_value()) {
            *self = Self::One(*one, *count);
        }
        true
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = NodeIdx> + '_ {
        let (one, many) = match self {
            Self::One(one, _) => (Some(*one), None),
            Self::Many(counts) => (None, Some(counts.keys().copied())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

/// Everything derived, by node position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    /// Positions that hold a node.
    pub(super) nodes: Bits,
    /// Nodes that are there.
    pub(super) ready: Bits,
    /// Nodes that take new tasks.
    pub(super) active: Bits,
    /// Nodes with a limit of slots: few, where there are any.
    pub(super) limited: Bits,
    /// Postings of each attribute.
    attrs: BTreeMap<NodeAttr, Values>,
    /// Per position; a free one holds the default.
    loads: Vec<Load>,
    /// What is set aside of each kind of generic resource, per node; nodes without are absent.
    generic: BTreeMap<String, BTreeMap<NodeIdx, u128>>,
    /// Claims of each port: how many tasks of which node at which address.
    ports: BTreeMap<(Protocol, u16), BTreeMap<(NodeIdx, HostAddr), u32>>,
    /// Tasks of each service per node.
    services: BTreeMap<ServiceId, Counts>,
    /// Nodes by what their tasks are, but for their ids.
    task_attrs: BTreeMap<TaskAttr, BTreeMap<String, Holders>>,
}

/// One attribute: who has it, and who has which value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Values {
    /// Nodes with any value. Needed where one attribute hides another.
    pub(super) present: Posting,
    /// Nodes by value.
    pub(super) by_value: BTreeMap<String, Posting>,
}

/// What a node offers and what of it is set aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) offered: Resources,
    /// Sums are wider than their parts: reservations are only bounded by u64, and overcommit can exceed the offer.
    pub(super) nano_cpus: u128,
    pub(super) mem_bytes: u128,
    pub(super) tasks: u32,
}

impl Index {
    /// Enters a node at a position that is free.
    pub(super) fn add_node(&mut self, idx: NodeIdx, facts: &NodeFacts) {
        self.nodes.insert(idx);
        self.ready.assign(idx, facts.ready);
        self.active.assign(idx, facts.availability == Availability::Active);
        self.limited.assign(idx, facts.slots.is_some());
        if self.loads.len() <= idx.index() {
            self.loads.resize(idx.index() + 1, Load::default());
        }
        self.loads[idx.index()].offered = facts.offered;
        let slots = self.loads.len();
        for (attr, value) in facts.attributes() {
            let values = self.attrs.entry(attr).or_default();
            values.present.insert(idx, slots);
            if let Some(posting) = values.by_value.get_mut(value) {
                posting.insert(idx, slots);
            } else {
                values.by_value.entry(value.to_owned()).or_default().insert(idx, slots);
            }
        }
    }

    /// Takes a node out; its tasks must be out already. `facts` are those it was entered with.
    pub(super) fn remove_node(&mut self, idx: NodeIdx, facts: &NodeFacts) {
        self.forget_attributes(idx, facts);
        self.nodes.remove(idx);
        self.ready.remove(idx);
        self.active.remove(idx);
        self.limited.remove(idx);
        self.loads[idx.index()] = Load::default();
        // Free positions at the end count as absent, so that an index compares equal to one that was rebuilt.
        while self.loads.last().is_some_and(|load| *load == Load::default()) && !self.nodes_at_end() {
            self.loads.pop();
        }
    }

    fn nodes_at_end(&self) -> bool {
        self.loads.len().checked_sub(1).is_some_and(|last| self.nodes.contains(NodeIdx::from_index(last)))
    }

    /// Replaces a node's facts; its tasks stay.
    pub(super) fn update_node(&mut self, idx: NodeIdx, before: &NodeFacts, after: &NodeFacts) {
        // Heartbeats and availability change often, labels seldom: leave the postings alone when they stay.
        let same_attributes = before.attributes().eq(after.attributes());
        if same_attributes {
            self.ready.assign(idx, after.ready);
            self.active.assign(idx, after.availability == Availability::Active);
            self.limited.assign(idx, after.slots.is_some());
            self.loads[idx.index()].offered = after.offered;
        } else {
            self.forget_attributes(idx, before);
            self.add_node(idx, after);
        }
    }

    fn forget_attributes(&mut self, idx: NodeIdx, facts: &NodeFacts) {
        let slots = self.loads.len();
        for (attr, value) in facts.attributes() {
            // Absent where an attribute has two values and the first already took the last node out.
            let Some(values) = self.attrs.get_mut(&attr) else { continue };
            values.present.remove(idx, slots);
            if let Some(posting) = values.by_value.get_mut(value) {
                posting.remove(idx, slots);
                if posting.is_empty() {
                    values.by_value.remove(value);
                }
            }
            if values.by_value.is_empty() {
                self.attrs.remove(&attr);
            }
        }
    }

    /// Enters a task of this name, and like this otherwise, on a node that is in the index.
    pub(super) fn add_task(&mut self, idx: NodeIdx, name: &str, task: &Placed) {
        let load = &mut self.loads[idx.index()];
        load.nano_cpus += u128::from(task.reservations.nano_cpus);
        load.mem_bytes += u128::from(task.reservations.mem_bytes);
        load.tasks += 1;
        for (kind, count) in task.generic.iter().filter(|(_, count)| **count > 0) {
            *self.generic.entry(kind.clone()).or_default().entry(idx).or_default() += u128::from(*count);
        }
        for port in task.ports.iter().filter(|port| port.host_port != 0) {
            let claims = self.ports.entry((port.protocol, port.host_port)).or_default();
            *claims.entry((idx, HostAddr::of(port))).or_default() += 1;
        }
        if let Some(service) = &task.service {
            *self.services.entry(service.clone()).or_default().entry(idx).or_default() += 1;
        }
        for (attr, value) in task.attributes(name) {
            let values = self.task_attrs.entry(attr).or_default();
            match values.get_mut(value) {
                Some(holders) => holders.add(idx),
                None => drop(values.insert(value.to_owned(), Holders::One(idx, 1))),
            }
        }
    }

    /// Takes a task out; `name` and `task` are what it was entered with.
    pub(super) fn remove_task(&mut self, idx: NodeIdx, name: &str, task: &Placed) {
        let load = &mut self.loads[idx.index()];
        load.nano_cpus -= u128::from(task.reservations.nano_cpus);
        load.mem_bytes -= u128::from(task.reservations.mem_bytes);
        load.tasks -= 1;
        for (kind, count) in task.generic.iter().filter(|(_, count)| **count > 0) {
            let used = self.generic.get_mut(kind).expect("the task was entered with this kind");
            let left = used.get_mut(&idx).expect("the task was entered for this node");
            *left -= u128::from(*count);
            if *left == 0 {
                used.remove(&idx);
            }
            if used.is_empty() {
                self.generic.remove(kind);
            }
        }
        let claimed = task.ports.iter().filter(|port| port.host_port != 0);
        for port in claimed.filter(|_| !skein_api::mutant!("stale-index-bit")) {
            release_in(&mut self.ports, &(port.protocol, port.host_port), &(idx, HostAddr::of(port)));
        }
        if let Some(service) = &task.service {
            release_in(&mut self.services, service, &idx);
        }
        for (attr, value) in task.attributes(name) {
            let values = self.task_attrs.get_mut(&attr).expect("the task was entered with this attribute");
            if !values.get_mut(value).expect("the task was entered with this value").remove(idx) {
                values.remove(value);
            }
            if values.is_empty() {
                self.task_attrs.remove(&attr);
            }
        }
    }

    /// What a node offers and what of it is set aside.
    pub(super) fn load(&self, idx: NodeIdx) -> &Load {
        &self.loads[idx.index()]
    }

    /// What is set aside of a dimension on a node.
    pub(super) fn used(&self, dimension: &Dimension, idx: NodeIdx) -> u128 {
        let load = self.load(idx);
        match dimension {
            Dimension::Cpu => load.nano_cpus,
            Dimension::Memory => load.mem_bytes,
            Dimension::Slots => u128::from(load.tasks),
            Dimension::Generic(kind) => self.generic.get(kind).and_then(|used| used.get(&idx)).copied().unwrap_or(0),
        }
    }

    /// Who has which value of an attribute; none when no node has it.
    pub(super) fn values(&self, attr: &NodeAttr) -> Option<&Values> {
        self.attrs.get(attr)
    }

    /// Nodes by the value of an attribute of their tasks.
    pub(super) fn task_values(&self, attr: &TaskAttr) -> Option<&BTreeMap<String, Holders>> {
        self.task_attrs.get(attr)
    }

    /// Tasks of a service per node.
    pub(super) fn service(&self, service: &ServiceId) -> Option<&Counts> {
        self.services.get(service)
    }

    /// Who claims a port, and at which addresses. A node may appear more than once.
    pub(super) fn claims(&self, protocol: Protocol, port: u16) -> impl Iterator<Item = (NodeIdx, HostAddr)> + '_ {
        self.ports.get(&(protocol, port)).into_iter().flat_map(|claims| claims.keys().copied())
    }

    /// Names of the parts in which two indexes differ.
    pub(super) fn differences(&self, other: &Self) -> Vec<&'static str> {
        [
            ("node positions", self.nodes == other.nodes),
            ("ready nodes", self.ready == other.ready),
            ("active nodes", self.active == other.active),
            ("nodes with slots", self.limited == other.limited),
            ("node attributes", self.attrs == other.attrs),
            ("node loads", self.loads == other.loads),
            ("generic resources", self.generic == other.generic),
            ("port claims", self.ports == other.ports),
            ("service counts", self.services == other.services),
            ("task attributes", self.task_attrs == other.task_attrs),
        ]
        .into_iter()
        .filter_map(|(part, same)| (!same).then_some(part))
        .collect()
    }
}

/// Counts one down under `outer`, `inner`; what reaches zero is removed, so that absence and zero are the same.
fn release_in<K, Q, I>(table: &mut BTreeMap<K, BTreeMap<I, u32>>, outer: &Q, inner: &I)
where
    K: Ord + std::borrow::Borrow<Q>,
    Q: Ord + ?Sized,
    I: Ord,
{
    let counts = table.get_mut(outer).expect("the task was entered here");
    let count = counts.get_mut(inner).expect("the task was entered for this node");
    *count -= 1;
    if *count == 0 {
        counts.remove(inner);
    }
    if counts.is_empty() {
        table.remove(outer);
    }
}
