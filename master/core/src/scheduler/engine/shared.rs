//! How a class that spreads finds its node: through the order of all nodes, which it shares with every other.
//!
//! A class that may go to every third node finds one among the first few, and needs to keep nothing. One that may go to
//! few, or whose nodes are full, would look at many in vain: it keeps a [`Front`], which others must tell of nodes that
//! get better, and gives it up again when too much of what it is told is of no use. Decisions are the same either way.

use super::{
    ClassId, Engine, NodeIdx, Work,
    front::{END, Front, Standing},
    order::{Set, each_bit},
};

/// Words of the order that a search may look at without a thought of a front.
const FREE_LOOKS: i64 = 32;

/// Entries of a front that may be out of date without a thought of the order.
const FREE_CHECKS: i64 = 6;

/// What an entry that is out of date costs, in looks: it was put in and taken out.
const LOOKS_PER_CHECK: i64 = 8;

/// Looks in vain after which a class changes its way.
const CHANGE_LOOKS: i64 = 2_000;

/// Nodes that a front is filled with.
const FILL: usize = 32;

/// Words that filling looks at before it is content with one node.
const FILL_LOOKS: i64 = 128;

impl Engine {
    /// The best node of a class that spreads and has no lanes.
    pub(super) fn select_shared(&mut self, id: ClassId) -> Option<NodeIdx> {
        let (found, work) = self.search(id);
        self.work = work;
        if self.regret(id, work.looks() - FREE_LOOKS) {
            self.hot[id.index()].shared = false;
            self.listen(id, true);
        }
        found
    }

    /// The best node of such a class by its front.
    pub(super) fn select_fronted(&mut self, id: ClassId) -> Option<NodeIdx> {
        let (found, checks) = self.search_fronts(id);
        if self.regret(id, (checks - FREE_CHECKS) * LOOKS_PER_CHECK) {
            let class = &mut self.classes[id];
            class.fronts.clear();
            let hot = &mut self.hot[id.index()];
            (hot.shared, hot.bound) = (true, Standing::default());
            let waits = hot.waiting;
            self.listen(id, waits);
        }
        found
    }

    /// Counts what the other way would have saved; true when it is time to change.
    fn regret(&mut self, id: ClassId, looks: i64) -> bool {
        let class = &mut self.classes[id];
        class.regret = (class.regret + looks).max(0);
        let restless = self.restless && (self.hot[id.index()].shared || self.clock.is_multiple_of(4));
        let changes = class.regret > CHANGE_LOOKS || restless;
        if changes {
            class.regret = 0;
        }
        changes
    }

    /// As [`Engine::search`] decides; and how many entries were out of date.
    fn search_fronts(&mut self, id: ClassId) -> (Option<NodeIdx>, i64) {
        let mut checks = 0;
        let mut own = 0;
        loop {
            let class = &self.classes[id];
            let Some(next) = class.next_own_count(own) else { return (None, checks) };
            own = next;
            if own >= self.hot[id.index()].replicas_max {
                return (None, checks);
            }
            if let Some(at) = self.search_front(id, own, &mut checks) {
                return (Some(NodeIdx::from_index(at)), checks);
            }
            own += 1;
        }
    }

    fn search_front(&mut self, id: ClassId, own: u32, checks: &mut i64) -> Option<usize> {
        let class = &mut self.classes[id];
        if class.fronts.len() <= own as usize {
            class.fronts.resize_with(own as usize + 1, Front::default);
        }
        loop {
            while let Some((level, at)) = self.front(id, own).best() {
                let there = self.classes[id].has_own(at as usize, own);
                let now = there.then(|| self.columns.records[at as usize].level(self.hot[id.index()].reserves));
                self.work.entries += 1;
                self.work.records += u64::from(there);
                if now == Some(level) && self.has_room(id, at as usize) {
                    return Some(at as usize);
                }
                let front = self.front(id, own);
                front.drop_best();
                // Fuller than it was: it comes again where it stands now.
                if let Some(now) = now.filter(|now| *now != level) {
                    front.offer((now, at));
                }
                *checks += 1;
            }
            let bound = self.front(id, own).bound();
            if bound == END {
                return None;
            }
            let (mut found, mut next) = (Vec::with_capacity(FILL), END);
            let take = |level, at: usize, work: Work| {
                if found.len() == FILL || (work.looks() > FILL_LOOKS && !found.is_empty()) {
                    next = (level, at as u32);
                    return false;
                }
                found.push((level, at as u32));
                true
            };
            let work = self.walk_from(id, own, bound, take);
            self.work += work;
            self.front(id, own).fill(found, next);
            self.hot[id.index()].bound = self.classes[id].bound();
        }
    }

    fn front(&mut self, id: ClassId, own: u32) -> &mut Front {
        let class = &mut self.classes[id];
        &mut class.fronts[own as usize]
    }

    /// The node with the fewest own tasks, of those the one with the lowest load, of those the first; and what that took.
    pub(super) fn search(&self, id: ClassId) -> (Option<NodeIdx>, Work) {
        let class = &self.classes[id];
        let (mut found, mut work) = (None, Work::default());
        let mut from = 0;
        while let Some(own) = class.next_own_count(from).filter(|own| *own < self.hot[id.index()].replicas_max) {
            work += self.walk_from(id, own, (0, 0), |_, at, _| {
                found = Some(NodeIdx::from_index(at));
                false
            });
            if found.is_some() {
                break;
            }
            from = own + 1;
        }
        (found, work)
    }

    /// Visits the nodes with so many own tasks that have room, in order from a standing on, until `visit` says stop
    /// (false), and tells it what it took until then; returns what it took.
    pub(super) fn walk_from(
        &self,
        id: ClassId,
        own: u32,
        start: Standing,
        mut visit: impl FnMut(u32, usize, Work) -> bool,
    ) -> Work {
        let (hot, class) = (&self.hot[id.index()], &self.classes[id]);
        let order = &self.orders[usize::from(hot.reserves)];
        let mut work = Work::default();
        let among = match class.by_own.get(own as usize) {
            None => return work,
            Some(Set::List(few)) => {
                // Fewer than the order has words.
                work.words += 2 * few.len() as u64;
                work.records += few.len() as u64;
                let standings = few.iter().map(|at| (self.columns.records[*at as usize].level(hot.reserves), *at));
                let mut sorted: Vec<_> =
                    standings.filter(|standing| *standing >= start && self.has_room(id, standing.1 as usize)).collect();
                sorted.sort_unstable();
                sorted.into_iter().all(|(level, at)| visit(level, at as usize, work));
                return work;
            }
            Some(Set::Dense { words, .. }) => words,
        };
        let mut from = start.0;
        while let Some((level, nodes)) = order.next(from) {
            let first = if level == start.0 { start.1 as usize } else { 0 };
            let went_on = nodes.each(|word, bits| {
                work.words += 2;
                let candidates = bits & among.get(word).copied().unwrap_or(0);
                each_bit(word, candidates, |at| {
                    work.records += u64::from(at >= first);
                    at < first || !self.has_room(id, at) || visit(level, at, work)
                })
            });
            if !went_on {
                break;
            }
            from = level + 1;
        }
        work
    }
}
