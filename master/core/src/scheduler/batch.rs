//! Batches: many tasks of one request, placed as (node, count) runs.
//!
//! Owns the equality with placing one by one. A task changes only its own node for the next one of the same request
//! (room, ports, replicas, affinities to itself), so the filters run once over all nodes and then once per task on
//! one node: O(filters · nodes/64 + fitting + n · (filters + log fitting)). Pure, no tasks, no channels.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
};

use skein_api::{NodeId, Strategy, TaskId};

use super::{
    Scheduler,
    bits::{Bits, NodeIdx},
    eval::{Branch, Copies, Evaluation},
    explain::Rejection,
    rank::{Rank, batch_seed, pick, rank},
    request::Request,
};

/// Where a batch goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// How many tasks each node gets, by position in the table; each node once, no count is 0.
    pub runs: Vec<(NodeId, u32)>,
    /// Sum of the runs.
    pub placed: u32,
    /// Why the rest has no place, with the placed ones counted; none when all are placed.
    pub rejection: Option<Rejection>,
}

/// Preference among soft expressions, best first: bit 63 is cleared when the first one holds, and so on. Comparing
/// these numbers is the same as trying the expressions in turn and giving up those that leave nothing.
type SoftRank = u64;

impl Scheduler {
    /// Places `count` tasks of one request. The same as `count` calls of [`Scheduler::place`], each applied before
    /// the next, with [`batch_seed`]`(seed, step)` for each step.
    ///
    /// Affinities to a *container* do not see the tasks of the batch, whose names are the caller's: where such an
    /// expression is meant to match the service itself, place one by one. (Image and label affinities see them.)
    pub fn place_batch(&mut self, request: &Request, count: u32, seed: u64) -> Batch {
        if !request.has_class() {
            return self.place_batch_by_sets(request, count, seed);
        }
        let class = self.class(request);
        let profile = self.engine.profile(&request.placed(TaskId::default(), String::new(), NodeId::default()));
        let runs = self.engine.batch(class, profile, count);
        self.engine.forget(profile);
        let placed = runs.iter().map(|(_, count)| count).sum();
        let copies: Copies = if placed < count { runs.iter().copied().collect() } else { Copies::new() };
        let rejection = (placed < count).then(|| Rejection::of(&Evaluation::new(self, request), &copies));
        let runs = runs.into_iter().map(|(idx, count)| (self.id_at(idx).clone(), count)).collect();
        Batch { runs, placed, rejection }
    }

    /// The same with sets of all nodes: for requests that have no class.
    fn place_batch_by_sets(&self, request: &Request, count: u32, seed: u64) -> Batch {
        let evaluation = Evaluation::new(self, request);
        let mut run = Run::new(&evaluation);
        match request.strategy {
            _ if !request.preferences.is_empty() => run.place_preferred(count, seed),
            Strategy::Random => run.place_random(count, seed),
            Strategy::Spread | Strategy::Binpack => run.place_ranked(count),
        }
        let copies = run.copies;
        let placed = copies.values().sum();
        let rejection = (placed < count).then(|| Rejection::of(&evaluation, &copies));
        let runs = copies.into_iter().map(|(idx, count)| (self.id_at(idx).clone(), count)).collect();
        Batch { runs, placed, rejection }
    }
}

/// A batch on its way.
struct Run<'a> {
    evaluation: &'a Evaluation<'a>,
    /// Nodes where the first copy fits.
    fitting: Bits,
    /// For each soft expression the nodes that meet it without a copy.
    soft: Vec<Bits>,
    copies: Copies,
}

impl<'a> Run<'a> {
    fn new(evaluation: &'a Evaluation<'a>) -> Self {
        let fitting = evaluation.fitting();
        let soft = evaluation.soft.iter().map(|filter| evaluation.passing(filter, fitting.clone())).collect();
        Self { evaluation, fitting, soft, copies: Copies::new() }
    }

    fn soft_rank(&self, idx: NodeIdx, copies: u32) -> SoftRank {
        let mut rank = SoftRank::MAX;
        for (at, (filter, passing)) in self.evaluation.soft.iter().zip(&self.soft).enumerate() {
            if self.evaluation.passes_with(filter, passing.contains(idx), idx, copies) {
                rank &= !(1 << (63 - at));
            }
        }
        rank
    }

    /// Counts one more copy on a node; the new count if another one fits there after it.
    fn take(&mut self, idx: NodeIdx) -> Option<u32> {
        let copies = self.copies.entry(idx).or_default();
        *copies += 1;
        let copies = *copies;
        // A node that got one passed every filter without it.
        let fits = |filter| self.evaluation.passes_with(filter, true, idx, copies);
        self.evaluation.hard.iter().all(fits).then_some(copies)
    }

    fn place_ranked(&mut self, count: u32) {
        let entry = |run: &Self, idx, copies| {
            let key: (SoftRank, Rank) = (run.soft_rank(idx, copies), rank(run.evaluation, idx, copies));
            Reverse(key)
        };
        let mut queue: BinaryHeap<_> = self.fitting.iter().map(|idx| entry(self, idx, 0)).collect();
        for _ in 0..count {
            let Some(Reverse((_, (_, idx)))) = queue.pop() else { break };
            if let Some(copies) = self.take(idx) {
                queue.push(entry(self, idx, copies));
            }
        }
    }

    /// With preferences a copy changes the standing of every node of its branches: each branch keeps its nodes in
    /// order, and a step compares the branches. O(n · (branches · levels + log nodes)).
    fn place_preferred(&mut self, count: u32, seed: u64) {
        let random = self.evaluation.request.strategy == Strategy::Random;
        let key = |run: &Self, idx, copies| {
            let rank = if random { (0, idx) } else { rank(run.evaluation, idx, copies) };
            (run.soft_rank(idx, copies), rank)
        };
        let mut branches: BTreeMap<Branch<'a>, BTreeSet<(SoftRank, Rank)>> = BTreeMap::new();
        for idx in self.fitting.iter() {
            branches.entry(self.evaluation.branch(idx)).or_default().insert(key(self, idx, 0));
        }
        let mut own = self.evaluation.own_tasks(&self.copies);
        for step in 0..count {
            let standing = |branch: &Branch<'a>, first: &(SoftRank, Rank)| {
                (first.0, Evaluation::own_of(&own, branch), if random { None } else { Some(first.1) })
            };
            let heads = branches.iter().filter_map(|(branch, nodes)| Some((standing(branch, nodes.first()?), branch)));
            let Some((best, branch)) = heads.min() else { break };
            let (entry, branch) = if random {
                // Any node of the branches that stand equal, in the order of their positions.
                let equal = branches.iter().flat_map(|(branch, nodes)| {
                    let equal = nodes.first().is_some_and(|first| standing(branch, first) == best);
                    let nodes = nodes.iter().take_while(|(soft, _)| *soft == best.0);
                    nodes.filter(move |_| equal).map(move |entry| (entry.1.1, *entry, branch))
                });
                let mut equal: Vec<_> = equal.collect();
                equal.sort_unstable();
                let (_, entry, branch) = equal[pick(batch_seed(seed, step), equal.len())];
                (entry, branch.clone())
            } else {
                (*branches[branch].first().expect("it has the best node"), branch.clone())
            };
            let nodes = branches.get_mut(&branch).expect("found there");
            nodes.remove(&entry);
            let idx = entry.1.1;
            if let Some(copies) = self.take(idx) {
                nodes.insert(key(self, idx, copies));
            }
            if self.evaluation.request.service.is_some() {
                for depth in 1..=branch.len() {
                    *own.entry(branch[..depth].to_vec()).or_default() += 1;
                }
            }
        }
    }

    fn place_random(&mut self, count: u32, seed: u64) {
        let mut classes: BTreeMap<SoftRank, Bits> = BTreeMap::new();
        for idx in self.fitting.iter() {
            classes.entry(self.soft_rank(idx, 0)).or_default().insert(idx);
        }
        for step in 0..count {
            let Some(mut best) = classes.first_entry() else { break };
            let members = best.get_mut();
            let rank = pick(batch_seed(seed, step), members.len());
            let idx = members.nth(rank).expect("a class has members, and pick stays under their number");
            members.remove(idx);
            if members.is_empty() {
                best.remove();
            }
            if let Some(copies) = self.take(idx) {
                classes.entry(self.soft_rank(idx, copies)).or_default().insert(idx);
            }
        }
    }
}
