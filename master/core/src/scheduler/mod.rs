//! The scheduler: filter, rank, place, explain.
//!
//! Owns the node table, the bitset index over it and the decision where a task goes. It follows the model: the core
//! applies every changed node and task, in any order and as often as it likes. It must not know services' rollouts,
//! restart policies, dependencies between tasks or anything that is not a fact about nodes and placed tasks; what
//! depends on other objects (where a volume lives) comes in with the request as a set of nodes and a reason.
//!
//! Pure and deterministic: no clock, no hash map, random choice only by the caller's seed, ties go to the lower
//! position. Positions are given out in the order in which nodes come, lowest free one first, so equal histories
//! give equal decisions, on any machine.
//!
//! ```text
//! facts.rs    NodeFacts, Placed: what there is to know      expr.rs     `node.labels.disk==ssd` -> Constraint
//! bits.rs     NodeIdx, Bits, Posting: sets of nodes         request.rs  TaskSpec -> Request: the filters in order
//! index.rs    postings, loads, ports, counts                eval.rs     filters on sets, for explanations
//! engine/     decisions: classes, profiles, orders          batch.rs    many equal tasks -> (node, count) runs
//! rank.rs     strategies
//! explain.rs  counts per filter, sentences                  naive.rs    the same by plain loops: the oracle
//! reasons.rs  all reasons of each node, what to change
//! size.rs     requests larger than any host                 contradiction.rs  expressions that exclude each other
//! words.rs    loops over sets, by the processor's best instructions
//! ```
//!
//! No tasks, no channels. What users read about it is docs/scheduling.md.

mod batch;
mod bits;
mod contradiction;
mod engine;
mod eval;
mod explain;
mod expr;
mod facts;
#[cfg(test)]
mod fuzz;
mod index;
pub mod naive;
mod rank;
mod reasons;
mod request;
mod size;
pub mod words;

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{NodeId, Resources, TaskId};

pub use self::{
    batch::Batch,
    bits::NodeIdx,
    contradiction::Contradiction,
    engine::{ClassId, Engine, ProfileId, Work},
    explain::{FilterTally, Findings, Rejection},
    expr::{ConstraintError, EXPRESSION_CHARS_MAX},
    facts::{Dimension, NodeFacts, Placed},
    rank::{batch_seed, millionths},
    reasons::NodeReasons,
    request::{
        EXPRESSIONS_MAX, Expressions, FilterKind, Pin, Request, expressions_from_env, expressions_from_labels,
        is_expression_variable,
    },
    size::{Largest, TooLarge},
};
use self::{
    bits::Bits,
    eval::{Copies, Evaluation},
    index::Index,
};

/// The node table with its index. Cloning gives an independent copy for questions of the form "what if".
#[derive(Clone, Debug, Default)]
pub struct Scheduler {
    /// By position; free ones are none.
    table: Vec<Option<NodeFacts>>,
    /// Free positions below the table's length.
    free: BTreeSet<NodeIdx>,
    positions: BTreeMap<NodeId, NodeIdx>,
    /// Also those whose node is not known (yet).
    tasks: BTreeMap<TaskId, Held>,
    by_node: BTreeMap<NodeId, BTreeSet<TaskId>>,
    index: Index,
    engine: Engine,
}

/// A task that holds its place. What it has in common with others stands once in their profile.
#[derive(Clone, Debug)]
struct Held {
    node: NodeId,
    /// See [`Placed::name`].
    name: Box<str>,
    profile: ProfileId,
}

impl Scheduler {
    /// An empty cluster.
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters a node or replaces its facts. Idempotent. A node keeps its position until it is removed; tasks that
    /// were applied before their node count from now on.
    pub fn apply_node(&mut self, facts: NodeFacts) {
        if let Some(idx) = self.positions.get(&facts.id).copied() {
            let before = self.table[idx.index()].replace(facts).expect("a known node has its position");
            let after = self.table[idx.index()].as_ref().expect("replaced just now");
            if before != *after {
                self.index.update_node(idx, &before, after);
                self.engine.put_node(idx, after, !before.is_same_host(after));
            }
            return;
        }
        let idx = self.free.pop_first().unwrap_or_else(|| NodeIdx::from_index(self.table.len()));
        if idx.index() == self.table.len() {
            self.table.push(None);
        }
        self.index.add_node(idx, &facts);
        self.engine.put_node(idx, &facts, true);
        for task in self.by_node.get(&facts.id).into_iter().flatten() {
            let held = &self.tasks[task];
            self.index.add_task(idx, &held.name, self.engine.like(held.profile));
            self.engine.commit(held.profile, idx);
        }
        self.positions.insert(facts.id.clone(), idx);
        self.table[idx.index()] = Some(facts);
    }

    /// Takes a node out and frees its position. Idempotent. Its tasks stay known, and count again should it return.
    pub fn remove_node(&mut self, id: &NodeId) {
        let Some(idx) = self.positions.remove(id) else { return };
        let facts = self.table[idx.index()].take().expect("a known node has its position");
        for task in self.by_node.get(id).into_iter().flatten() {
            let held = &self.tasks[task];
            self.index.remove_task(idx, &held.name, self.engine.like(held.profile));
            self.engine.release(held.profile, idx);
        }
        self.index.remove_node(idx, &facts);
        self.engine.remove_node(idx);
        self.free.insert(idx);
    }

    /// Enters a task that holds its place, or replaces what is known of it. Idempotent.
    pub fn apply_task(&mut self, task: Placed) {
        if self.knows(&task) {
            return;
        }
        self.remove_task(&task.task);
        let profile = self.engine.profile(&task);
        if let Some(idx) = self.positions.get(&task.node) {
            self.index.add_task(*idx, &task.name, &task);
            self.engine.commit(profile, *idx);
        }
        self.by_node.entry(task.node.clone()).or_default().insert(task.task.clone());
        self.tasks.insert(task.task, Held { node: task.node, name: task.name.into(), profile });
    }

    /// Takes a task out: it ended or lost its place. Idempotent.
    pub fn remove_task(&mut self, id: &TaskId) {
        let Some(Held { node, name, profile }) = self.tasks.remove(id) else { return };
        if let Some(idx) = self.positions.get(&node) {
            self.index.remove_task(*idx, &name, self.engine.like(profile));
            self.engine.release(profile, *idx);
        }
        self.engine.forget(profile);
        let siblings = self.by_node.get_mut(&node).expect("every task is listed under its node");
        siblings.remove(id);
        if siblings.is_empty() {
            self.by_node.remove(&node);
        }
    }

    /// Asks while a task is not counted, whatever the answer; then all is as before. Only what explanations look at is
    /// changed meanwhile, so nobody who waits for a node is woken. O(the task's attributes).
    pub fn without<T>(&mut self, task: &TaskId, ask: impl FnOnce(&Self) -> T) -> T {
        let Some(held) = self.tasks.remove(task) else { return ask(self) };
        let idx = self.positions.get(&held.node).copied();
        idx.into_iter().for_each(|idx| self.index.remove_task(idx, &held.name, self.engine.like(held.profile)));
        let answer = ask(self);
        idx.into_iter().for_each(|idx| self.index.add_task(idx, &held.name, self.engine.like(held.profile)));
        self.tasks.insert(task.clone(), held);
        answer
    }

    /// The nodes by position, with gaps.
    pub fn table(&self) -> impl Iterator<Item = Option<&NodeId>> {
        self.table.iter().map(|facts| facts.as_ref().map(|facts| &facts.id))
    }

    /// The class of a request: compiled once, found again afterwards.
    pub fn class(&mut self, request: &Request) -> ClassId {
        if let Some(known) = self.engine.find_class(request) {
            return known;
        }
        let evaluation = Evaluation::new(self, request);
        let (fixed, soft) = (evaluation.fixed(), evaluation.fixed_soft());
        self.engine.add_class(request, fixed, soft, &self.table)
    }

    /// Asks to be told of the first node that has room for a request that found none; the class to look for in
    /// [`Scheduler::take_woken`], or none for requests that have no class: those are tried again after any change.
    pub fn wait(&mut self, request: &Request) -> Option<ClassId> {
        request.has_class().then(|| {
            let class = self.class(request);
            self.engine.wait(class);
            class
        })
    }

    /// Whether a class waits and was not told yet.
    pub fn waits(&self, class: ClassId) -> bool {
        self.engine.waits(class)
    }

    /// The class of a request, if it has one and it is kept.
    pub fn class_of(&self, request: &Request) -> Option<ClassId> {
        self.engine.known_class(request)
    }

    /// Classes that waited and for which a node got room, or which are no longer kept; each waits no more.
    pub fn take_woken(&mut self) -> Vec<ClassId> {
        self.engine.take_woken()
    }

    /// The engine behind [`Scheduler::place`], for callers that keep classes and profiles.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// The node for one task. `seed` decides under the strategy random, and is not used by the others.
    ///
    /// Nothing is taken: apply the task for the next decision to see it.
    ///
    /// # Errors
    /// No node passes the hard filters; counts per filter.
    pub fn place(&mut self, request: &Request, seed: u64) -> Result<NodeId, Rejection> {
        let chosen = if request.has_class() {
            let class = self.class(request);
            self.engine.select(class)
        } else {
            self.place_by_sets(request, seed)
        };
        match chosen {
            Some(idx) => Ok(self.id_at(idx).clone()),
            None => Err(Rejection::of(&Evaluation::new(self, request), &Copies::new())),
        }
    }

    /// As the engine decides, with sets of all nodes: for requests that have no class.
    fn place_by_sets(&self, request: &Request, seed: u64) -> Option<NodeIdx> {
        let evaluation = Evaluation::new(self, request);
        self.choose(&evaluation, evaluation.fitting(), seed)
    }

    /// Every node that passes the hard filters, by position: where a global service gets tasks.
    pub fn fitting(&self, request: &Request) -> Vec<NodeId> {
        let fitting = Evaluation::new(self, request).fitting();
        fitting.iter().map(|idx| self.id_at(idx).clone()).collect()
    }

    /// Nodes that meet pins, hard constraints, platform and plugins, whatever their state and load, by position:
    /// where a running task may stay after labels changed, and where a global service belongs.
    pub fn allowed(&self, request: &Request) -> Vec<NodeId> {
        let allowed = Evaluation::new(self, request).allowed();
        allowed.iter().map(|idx| self.id_at(idx).clone()).collect()
    }

    /// Whether [`Scheduler::allowed`] has any node: whether waiting can help at all.
    pub fn constraints_can_be_met(&self, request: &Request) -> bool {
        !Evaluation::new(self, request).allowed().is_empty()
    }

    /// What is known of a node.
    pub fn node(&self, id: &NodeId) -> Option<&NodeFacts> {
        self.position(id).and_then(|idx| self.at(idx))
    }

    /// What is known of a task that holds a place.
    pub fn task(&self, id: &TaskId) -> Option<Placed> {
        let Held { node, name, profile } = self.tasks.get(id)?;
        let like = self.engine.like(*profile).clone();
        Some(Placed { task: id.clone(), node: node.clone(), name: name.to_string(), ..like })
    }

    /// Whether a task holds a place.
    pub fn holds(&self, id: &TaskId) -> bool {
        self.tasks.contains_key(id)
    }

    /// Whether this is what is known of a task that holds a place.
    pub fn knows(&self, task: &Placed) -> bool {
        self.tasks.get(&task.task).is_some_and(|held| {
            held.node == task.node && *held.name == *task.name && self.engine.has_profile(task, held.profile)
        })
    }

    /// What is set aside on all nodes together; O(nodes).
    pub fn reserved(&self) -> Resources {
        let narrow = |amount: u128| u64::try_from(amount).unwrap_or(u64::MAX);
        let mut sum = (0_u128, 0_u128);
        for idx in self.positions.values() {
            let load = self.index.load(*idx);
            // Saturating: agents say what they like, and so do users.
            sum = (sum.0.saturating_add(load.nano_cpus), sum.1.saturating_add(load.mem_bytes));
        }
        Resources { nano_cpus: narrow(sum.0), mem_bytes: narrow(sum.1) }
    }

    /// Where a node stands in the table.
    pub fn position(&self, id: &NodeId) -> Option<NodeIdx> {
        self.positions.get(id).copied()
    }

    /// Rebuilds the index from the facts and compares; O(nodes + tasks). One sentence for each part that differs,
    /// which is a bug; empty when all is well.
    pub fn check(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let mut rebuilt = Index::default();
        for (at, facts) in self.table.iter().enumerate() {
            let idx = NodeIdx::from_index(at);
            match facts {
                Some(facts) => rebuilt.add_node(idx, facts),
                None if self.free.contains(&idx) => {}
                None => broken.push(format!("scheduler: position {at} is neither taken nor free")),
            }
        }
        let mut profiles: Vec<Vec<ProfileId>> = vec![Vec::new(); self.table.len()];
        for Held { node, name, profile } in self.tasks.values() {
            if let Some(idx) = self.positions.get(node) {
                rebuilt.add_task(*idx, name, self.engine.like(*profile));
                profiles[idx.index()].push(*profile);
            }
        }
        let parts = self.index.differences(&rebuilt);
        broken.extend(parts.into_iter().map(|part| format!("scheduler: a rebuilt index differs in {part}")));
        broken.extend(self.engine.check(&self.table, &profiles));
        broken
    }

    /// Soft expressions, then the strategy.
    fn choose(&self, evaluation: &Evaluation<'_>, fitting: Bits, seed: u64) -> Option<NodeIdx> {
        rank::choose(evaluation, &evaluation.spread_out(evaluation.preferred(fitting)), seed)
    }

    fn at(&self, idx: NodeIdx) -> Option<&NodeFacts> {
        self.table.get(idx.index()).and_then(Option::as_ref)
    }

    fn id_at(&self, idx: NodeIdx) -> &NodeId {
        &self.at(idx).expect("the index only holds positions of nodes").id
    }
}
