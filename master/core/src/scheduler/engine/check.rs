//! The engine against what it is derived from: every sum, row and bound.

use super::{
    ClassId, Engine, NodeIdx, ProfileId, Way,
    class::passes_fixed,
    columns::Record,
    front::Standing,
    order::{Set, each_bit},
    tree::NONE,
};
use crate::scheduler::facts::NodeFacts;

/// Nodes times classes that one check looks at, each for a few microseconds. Tests and simulations check after every
/// step, so that few at a time come to all of them; who asks for a check of a real cluster wants the whole.
const PAIRS_MAX: usize = if cfg!(debug_assertions) { 200 } else { 10_000_000 };

impl Engine {
    /// Compares with the facts of the nodes and with the profiles of the tasks on each, both by position; one sentence
    /// for each part that is wrong. Looks at some nodes each time, and others the next, where all would take long.
    pub(in crate::scheduler) fn check(&self, facts: &[Option<NodeFacts>], tasks: &[Vec<ProfileId>]) -> Vec<String> {
        let mut broken = Vec::new();
        let classes = self.classes.ids();
        for id in &classes {
            if !self.counts_replicas(*id) {
                broken.push(format!("engine: class {} counts nodes by own tasks wrongly", id.index()));
            }
        }
        // What each class says of a node is compared expression by expression.
        let every = (self.columns.len() * classes.len()).div_ceil(PAIRS_MAX).max(1);
        for at in (0..self.columns.len()).filter(|at| (at + self.clock as usize).is_multiple_of(every)) {
            let there = facts.get(at).and_then(Option::as_ref);
            if !self.sums_are_right(at, there, tasks.get(at).map_or(&[], Vec::as_slice)) {
                broken.push(format!("engine: the sums of position {at} differ from its tasks"));
            }
            for id in &classes {
                if let Some(what) = self.wrong_in_class(*id, at, there) {
                    broken.push(format!("engine: class {} at position {at}: {what}", id.index()));
                }
            }
        }
        broken
    }

    /// Whether a class knows which of its nodes have how many own tasks.
    fn counts_replicas(&self, id: ClassId) -> bool {
        let (class, hot) = (&self.classes[id], &self.hot[id.index()]);
        let own = |idx: NodeIdx| self.columns.replicas(idx.index(), hot.service) as usize;
        let counted = class.row.iter().filter(|_| hot.way != Way::Bounded);
        let mut expected: Vec<_> = counted.map(|idx| (class.find_lane(idx.index()), own(idx), idx.index())).collect();
        expected.sort_unstable();
        let mut found = Vec::new();
        for (number, lane) in class.lanes.iter().enumerate() {
            for (own, nodes) in lane.by_own.iter().enumerate() {
                nodes.each(|word, bits| {
                    each_bit(word, bits, |at| {
                        found.push((Some(number), own, at));
                        true
                    })
                });
            }
        }
        let members: usize = class.lanes.iter().flat_map(|lane| &lane.by_own).map(Set::len).sum();
        found == expected && members == expected.len()
    }

    fn sums_are_right(&self, at: usize, facts: Option<&NodeFacts>, tasks: &[ProfileId]) -> bool {
        let mut expected = super::Columns::default();
        expected.grow(1);
        if let Some(facts) = facts {
            expected.offer(0, [facts.offered.nano_cpus, facts.offered.mem_bytes], facts.slots);
        } else {
            expected.offer(0, Default::default(), None);
        }
        for id in tasks {
            let profile = &self.profiles.all[id.index()];
            expected.introduce(*id, profile.service);
            expected.add(0, *id, profile);
        }
        let found = &self.columns.records[at];
        let expected = &expected.records[0];
        let sums = |record: &Record| (record.offered, record.used, record.scale, record.tasks, record.slots);
        let running = |record: &Record| {
            let mut list = record.running.to_vec();
            list.sort_unstable();
            list
        };
        let levels = [false, true].map(|reserves| expected.level(reserves));
        let kept = self.orders.iter().zip(levels).zip(self.ordered).filter(|(_, ordered)| *ordered);
        let placed = kept.into_iter().all(|((order, level), _)| order.level(at) == facts.map(|_| level));
        let never_used = facts.is_none() && sums(found) == sums(&Record::default());
        placed && (never_used || sums(found) == sums(expected)) && running(found) == running(expected)
    }

    fn wrong_in_class(&self, id: ClassId, at: usize, facts: Option<&NodeFacts>) -> Option<&'static str> {
        let (class, hot) = (&self.classes[id], &self.hot[id.index()]);
        let idx = NodeIdx::from_index(at);
        let fixed = facts.is_some_and(|f| class.request.filters().iter().all(|filter| passes_fixed(filter, f)));
        if facts.is_some() && class.fixed.contains(idx) != fixed {
            return Some("what follows from the node itself");
        }
        let up = facts.is_some_and(NodeFacts::takes_tasks);
        let admitted = self.admitted(id, at);
        if class.row.contains(idx) != class.admits(at, up, &self.columns) || admitted != class.row.contains(idx) {
            return Some("whether it may go there");
        }
        let key = self.key(id, at, 0);
        if !admitted || key == NONE {
            return None;
        }
        if hot.way != Way::Bounded {
            let own = self.columns.replicas(at, hot.service);
            let level = self.orders[usize::from(hot.reserves)].level(at);
            let standing = level.map(|level| Standing::new(level, at));
            let front = class.find_lane(at).and_then(|lane| class.lanes[lane].fronts.get(own as usize));
            let lacks = |standing| front.is_some_and(|front| front.lacks(standing));
            let missing = standing.is_some_and(lacks) && !self.inboxes[id.index()].nodes().contains(&idx.0);
            return missing.then_some("a node is missing in a front");
        }
        let tree = class.find_lane(at).map(|lane| &class.lanes[lane].tree).filter(|tree| !tree.is_empty());
        match tree.map(|tree| tree.get(at >> hot.shift)) {
            Some(bound) if bound <= key => None,
            Some(_) => Some("a bound above a key"),
            None => Some("no lane"),
        }
    }
}
