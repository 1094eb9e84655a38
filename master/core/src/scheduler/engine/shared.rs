//! How a class that spreads finds its node: through the order of all nodes, which it shares with every other.
//!
//! A class that may go to every third node finds one among the first few, and needs to keep nothing. One that may go to
//! few, or whose nodes are full, would look at many in vain: it keeps a [`Front`], and an [`Inbox`] where others tell it
//! of nodes that get better. It gives them up again when too much of what it is told is of no use, or when it is told
//! much and seldom asked. Decisions are the same either way.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{
    ClassId, Engine, NodeIdx, Work,
    class::{Way, has_room},
    front::{END, Front, Inbox, Standing},
    order::{Set, each_bit},
};

/// Words of the order that a search may look at without a thought of a front.
const FREE_LOOKS: i64 = 32;

/// Entries of a front that may be out of date without a thought of the order.
const FREE_CHECKS: i64 = 6;

/// What an entry that is out of date costs, in looks: it was put in and taken out.
const LOOKS_PER_CHECK: i64 = 8;

/// Nodes that got better that may be looked at without such a thought, and what each costs, in looks.
const FREE_READS: i64 = 16;
const LOOKS_PER_READ: i64 = 2;

/// Looks in vain after which a class changes its way.
const CHANGE_LOOKS: i64 = 2_000;

/// Nodes that a front is filled with.
const FILL: usize = 16;

/// A set whose length squared is less than so many times all nodes is looked through node by node: the order has a word
/// per node or so, so that the next of 447 members among 100,000 nodes lies some 224 words ahead, and to look where all
/// of them stand costs twice that and fills the front.
const SPARSE: usize = 2;

/// Words that filling looks at before it is content with one node.
const FILL_LOOKS: i64 = 128;

impl Engine {
    /// The best node of a class that spreads.
    pub(super) fn select_shared(&mut self, id: ClassId) -> Option<NodeIdx> {
        let (found, work) = self.search(id);
        self.work = work;
        if self.regret(id, work.looks() - FREE_LOOKS) {
            self.hot[id.index()].way = Way::Fronted;
            self.listen(id);
        }
        found
    }

    /// The best node of such a class by its front.
    pub(super) fn select_fronted(&mut self, id: ClassId) -> Option<NodeIdx> {
        let read = self.read_inbox(id);
        self.inboxes[id.index()].was_full = false;
        let (found, checks) = self.search_fronts(id);
        if self.regret(id, (checks - FREE_CHECKS) * LOOKS_PER_CHECK + (read - FREE_READS) * LOOKS_PER_READ) {
            self.drop_fronts(id);
        }
        found
    }

    /// Tells a class with fronts that a node got better, or has as many own tasks as others have of which it keeps one.
    #[inline]
    pub(super) fn note(&mut self, id: ClassId, at: usize) {
        if self.inboxes[id.index()].push(at) {
            return;
        }
        if self.inboxes[id.index()].was_full {
            // Who is asked so seldom is better off with a search of the order.
            self.drop_fronts(id);
            return;
        }
        self.read_inbox(id);
        let inbox = &mut self.inboxes[id.index()];
        inbox.was_full = true;
        inbox.push(at);
    }

    /// Enters into the fronts what is in the inbox and still before their bounds; returns how many nodes that were.
    fn read_inbox(&mut self, id: ClassId) -> i64 {
        let (class, inbox) = (&mut self.classes[id], &mut self.inboxes[id.index()]);
        let order = &self.orders[usize::from(self.hot[id.index()].reserves)];
        let bound = class.bound();
        for at in inbox.nodes().iter().map(|at| *at as usize) {
            if let Some(level) = order.level(at)
                && Standing::new(level, at) < bound
            {
                class.offer(Standing::new(level, at));
            }
        }
        let read = inbox.nodes().len();
        inbox.clear();
        self.work.entries += read as u64;
        read as i64
    }

    fn drop_fronts(&mut self, id: ClassId) {
        let class = &mut self.classes[id];
        class.lanes.iter_mut().for_each(|lane| lane.fronts = Vec::new());
        class.regret = 0;
        self.inboxes[id.index()] = Inbox::default();
        self.hot[id.index()].way = Way::Shared;
        self.listen(id);
    }

    /// Counts what the other way would have saved; true when it is time to change.
    fn regret(&mut self, id: ClassId, looks: i64) -> bool {
        let class = &mut self.classes[id];
        class.regret = (class.regret + looks).max(0);
        let shared = self.hot[id.index()].way == Way::Shared;
        let restless = self.restless && (shared || self.clock.is_multiple_of(4));
        let changes = class.regret > CHANGE_LOOKS || restless;
        if changes {
            class.regret = 0;
        }
        changes
    }

    /// As [`Engine::search`] decides; and how many entries were out of date.
    fn search_fronts(&mut self, id: ClassId) -> (Option<NodeIdx>, i64) {
        let mut checks = 0;
        let mut lanes = self.classes[id].lanes_after(None);
        while let Some(first) = lanes.first().copied() {
            let found = lanes.iter().filter_map(|lane| self.search_lane(id, *lane, &mut checks)).min();
            if let Some((_, standing)) = found {
                return (Some(NodeIdx::from_index(standing.at())), checks);
            }
            lanes = self.classes[id].lanes_after(Some(first));
        }
        (None, checks)
    }

    /// The best node of a lane by its fronts, with its own tasks.
    fn search_lane(&mut self, id: ClassId, lane: usize, checks: &mut i64) -> Option<(u32, Standing)> {
        let mut from = 0;
        while let Some(own) = self.next_own_count(id, lane, from) {
            if let Some(standing) = self.search_front(id, lane, own, checks) {
                return Some((own, standing));
            }
            from = own + 1;
        }
        None
    }

    /// The fewest own tasks, but at least `from`, that some node of a lane has and the class allows one more of.
    fn next_own_count(&self, id: ClassId, lane: usize, from: u32) -> Option<u32> {
        let next = self.classes[id].lanes[lane].next_own_count(from);
        next.filter(|own| *own < self.hot[id.index()].replicas_max)
    }

    fn search_front(&mut self, id: ClassId, lane: usize, own: u32, checks: &mut i64) -> Option<Standing> {
        loop {
            if let Some(found) = self.best_entry(id, lane, own, checks) {
                return Some(found);
            }
            let front = &mut self.classes[id].lanes[lane].fronts[own as usize];
            let bound = front.bound();
            if bound == END {
                return None;
            }
            let (mut found, mut next) = (Vec::with_capacity(FILL), END);
            let mut work = Work::default();
            // Who has no room there is found out when it is the best.
            self.walk_from(id, (lane, own), bound, &mut work, |standing, work| {
                if found.len() == FILL || (work.looks() > FILL_LOOKS && !found.is_empty()) {
                    next = standing;
                    return false;
                }
                found.push(standing);
                true
            });
            self.work += work;
            self.classes[id].lanes[lane].fronts[own as usize].fill(found, next);
        }
    }

    /// The first entry of a front that is true and has room; those before it are taken out.
    fn best_entry(&mut self, id: ClassId, lane: usize, own: u32, checks: &mut i64) -> Option<Standing> {
        let (hot, class) = (&self.hot[id.index()], &mut self.classes[id]);
        let order = &self.orders[usize::from(hot.reserves)];
        let lane = &mut class.lanes[lane];
        if lane.fronts.len() <= own as usize {
            lane.fronts.resize_with(own as usize + 1, Front::default);
        }
        let front = &mut lane.fronts[own as usize];
        while let Some(entry) = front.best() {
            let at = entry.at();
            self.work.entries += 1;
            let level = order.level(at).filter(|_| lane.by_own[own as usize].contains(at));
            let now = level.map(|level| Standing::new(level, at));
            if now == Some(entry) {
                self.work.records += 1;
                let has = || self.columns.has_generic(at, &class.request.generic, 0, &self.profiles.all);
                if has_room(hot, &self.columns.records[at], 0) && (!hot.further || has()) {
                    return Some(entry);
                }
            }
            front.drop_best();
            if now != Some(entry) {
                *checks += 1;
                // Fuller than it was: it comes again where it stands now.
                now.into_iter().for_each(|now| front.offer(now));
            }
        }
        None
    }

    /// The node of the first lane that has one, of those the one with the fewest own tasks, of those the one with the
    /// lowest load, of those the first; and what that took.
    pub(super) fn search(&self, id: ClassId) -> (Option<NodeIdx>, Work) {
        let mut work = Work::default();
        let mut lanes = self.classes[id].lanes_after(None);
        while let Some(first) = lanes.first().copied() {
            let found = lanes.iter().filter_map(|lane| self.walk_lane(id, *lane, &mut work)).min();
            if let Some((_, standing)) = found {
                return (Some(NodeIdx::from_index(standing.at())), work);
            }
            lanes = self.classes[id].lanes_after(Some(first));
        }
        (None, work)
    }

    /// The best node of a lane by the order, with its own tasks.
    fn walk_lane(&self, id: ClassId, lane: usize, work: &mut Work) -> Option<(u32, Standing)> {
        let mut from = 0;
        while let Some(own) = self.next_own_count(id, lane, from) {
            let mut found = None;
            self.walk_from(id, (lane, own), Standing::default(), work, |standing, work| {
                work.records += 1;
                found = self.has_room(id, standing.at()).then_some((own, standing));
                found.is_none()
            });
            if found.is_some() {
                return found;
            }
            from = own + 1;
        }
        None
    }

    /// Visits the nodes of a lane with so many own tasks in order from a standing on, whether they have room or not,
    /// until `visit` says stop (false); counts into `work` what it took, which `visit` is told.
    pub(super) fn walk_from(
        &self,
        id: ClassId,
        (lane, own): (usize, u32),
        start: Standing,
        work: &mut Work,
        mut visit: impl FnMut(Standing, &mut Work) -> bool,
    ) {
        let class = &self.classes[id];
        let order = &self.orders[usize::from(self.hot[id.index()].reserves)];
        let Some(nodes) = class.lanes[lane].by_own.get(own as usize) else { return };
        let among = match nodes {
            Set::Dense { words, .. } if nodes.len() * nodes.len() >= self.columns.len() * SPARSE => words,
            few => {
                // To look where each of them stands is cheaper than to look for them in the order.
                let mut standings = Vec::with_capacity(few.len());
                few.each(|word, bits| {
                    work.words += 1 + u64::from(bits.count_ones());
                    each_bit(word, bits, |at| {
                        standings.extend(order.level(at).map(|level| Reverse(Standing::new(level, at))));
                        true
                    })
                });
                standings.retain(|Reverse(standing)| *standing >= start);
                let mut ascending = BinaryHeap::from(standings);
                while let Some(Reverse(standing)) = ascending.pop() {
                    if !visit(standing, work) {
                        return;
                    }
                }
                return;
            }
        };
        let mut from = start.level();
        while let Some((level, nodes)) = order.next(from) {
            let first = if level == start.level() { start.at() } else { 0 };
            let went_on = nodes.each_from(first, |word, bits| {
                work.words += 2;
                let candidates = bits & among.get(word).copied().unwrap_or(0);
                each_bit(word, candidates, |at| visit(Standing::new(level, at), work))
            });
            if !went_on {
                return;
            }
            from = level + 1;
        }
    }
}
