//! Batches: many tasks of one request, placed as (node, count) runs.
//!
//! Owns the equality with placing one by one. A task changes only its own node for the next one of the same request
//! (room, ports, replicas, affinities to itself), so the filters run once over all nodes and then once per task on
//! one node: O(filters · nodes/64 + fitting + n · (filters + log fitting)). Pure, no tasks, no channels.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use skein_api::{NodeId, Strategy};

use super::{
    Scheduler,
    bits::{Bits, NodeIdx},
    eval::{Copies, Evaluation},
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
    pub fn place_batch(&self, request: &Request, count: u32, seed: u64) -> Batch {
        let evaluation = Evaluation::new(self, request);
        let mut run = Run::new(&evaluation);
        match request.strategy {
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
