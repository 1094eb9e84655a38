//! How a class that spreads finds its node: through the order of all nodes, which it shares with every other.
//!
//! A class that may go to every third node finds one among the first few, and needs to keep nothing. One that may go to
//! few, or whose nodes are full, would look at many in vain: it keeps a [`Front`], and an [`Inbox`] where others tell it
//! of nodes that get better. It gives them up again when too much of what it is told is of no use, or when it is told
//! much and seldom asked. Decisions are the same either way.

use super::{
    ClassId, Engine, NodeIdx, Work,
    class::Way,
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
const FILL: usize = 32;

/// Words that filling looks at before it is content with one node.
const FILL_LOOKS: i64 = 128;

impl Engine {
    /// The best node of a class that spreads and has no lanes.
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
        (class.fronts, class.regret) = (Vec::new(), 0);
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
            while let Some(entry) = self.front(id, own).best() {
                let at = entry.at();
                let order = &self.orders[usize::from(self.hot[id.index()].reserves)];
                let level = order.level(at).filter(|_| self.classes[id].has_own(at, own));
                let now = level.map(|level| Standing::new(level, at));
                self.work.entries += 1;
                if now == Some(entry) {
                    self.work.records += 1;
                    if self.has_room(id, at) {
                        return Some(at);
                    }
                }
                let front = self.front(id, own);
                front.drop_best();
                // Fuller than it was: it comes again where it stands now.
                if let Some(now) = now.filter(|now| *now != entry) {
                    front.offer(now);
                }
                *checks += 1;
            }
            let bound = self.front(id, own).bound();
            if bound == END {
                return None;
            }
            let (mut found, mut next) = (Vec::with_capacity(FILL), END);
            let take = |level, at: usize, work: Work| {
                let standing = Standing::new(level, at);
                if found.len() == FILL || (work.looks() > FILL_LOOKS && !found.is_empty()) {
                    next = standing;
                    return false;
                }
                found.push(standing);
                true
            };
            let work = self.walk_from(id, own, bound, take);
            self.work += work;
            self.front(id, own).fill(found, next);
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
            work += self.walk_from(id, own, Standing::default(), |_, at, _| {
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
                let stands = |at: usize| Standing::new(self.columns.records[at].level(hot.reserves), at);
                let standings = few.iter().map(|at| stands(*at as usize));
                let mut sorted: Vec<_> =
                    standings.filter(|standing| *standing >= start && self.has_room(id, standing.at())).collect();
                sorted.sort_unstable();
                sorted.into_iter().all(|standing| visit(standing.level(), standing.at(), work));
                return work;
            }
            Some(Set::Dense { words, .. }) => words,
        };
        let mut from = start.level();
        while let Some((level, nodes)) = order.next(from) {
            let first = if level == start.level() { start.at() } else { 0 };
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
