//! The engine: a placement that costs the same on a thousand nodes and on a hundred thousand.
//!
//! What is asked for again and again is compiled once into a *class*, and what runs is counted by *profile*; both are
//! numbers here, so that one placement is a few loads and compares.
//!
//! - Each class has a row of the nodes that it may go to, kept up to date as nodes and tasks change.
//! - **Spread** ranks by own tasks, then by a load that does not depend on who asks. So all nodes stand in one order,
//!   which every class searches from the emptiest on, one word of 64 nodes at a time ([`order`]). A class that would
//!   look at many nodes in vain keeps a short list of its next ones ([`front`]), and changes back when that costs more.
//! - **Binpack** ranks by the load with the task: there every block of a few nodes has a **lower bound** of its best
//!   key, in a tree of minima ([`tree`]). The smallest bound is looked at; when it is true the node is found, otherwise
//!   it is raised.
//! - Soft expressions and spread preferences divide the nodes of a class into *lanes*. Lanes are ranked by them, and
//!   only nodes of equal lanes by what is above; each lane finds its best node as a class without lanes does.
//! - A change that makes a node *worse* for a class tells nobody: who gets there finds out. A change that makes a node
//!   *better* is told to the classes that keep lists or bounds; a matrix with a row per node says which. A list is told
//!   by one store into an inbox, since most such nodes are taken by another class before the list is read.
//!
//! So a placement pays for what changed where it looks, not for the number of nodes.
//!
//! ```text
//! columns.rs  per node: amounts, tasks, what runs     class.rs   a compiled request: rows, keys, lanes
//! profile.rs  what equal tasks have in common         order.rs   all nodes by load
//! shared.rs   the search of classes that spread       front.rs   the next nodes of one class
//! tree.rs     lower bounds                            batch.rs   many equal tasks
//! check.rs    everything against a rebuild           work.rs    what a decision looked at
//! ```
//!
//! It must not know node ids, task ids or names. Pure, no tasks, no channels.

mod batch;
mod check;
mod class;
mod columns;
mod front;
mod interner;
mod order;
mod profile;
mod shared;
mod tree;
mod work;

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hasher as _},
};

pub use self::{class::ClassId, profile::ProfileId, work::Work};
use self::{
    class::{Class, Classes, Hot, Way, has_room, key},
    columns::Columns,
    front::Inbox,
    interner::Services,
    order::{Order, each_bit},
    profile::Profiles,
    tree::NONE,
};
use super::{
    bits::{Bits, NodeIdx},
    facts::{Dimension, NodeFacts, Placed},
    request::Request,
};

/// Classes that are kept; the one that was not used for longest goes. At four bits and some bounds per node and class
/// that is some 150 MB at 100,000 nodes and nothing to speak of at 1,000.
const CLASSES_MAX: usize = 1_024;

/// Everything that placements read.
#[derive(Clone, Debug, Default)]
pub struct Engine {
    columns: Columns,
    /// Nodes that take new tasks.
    up: Bits,
    /// Nodes whose tasks stay: ready and not drained.
    keeping: Bits,
    classes: Classes,
    hot: Vec<Hot>,
    by_hash: BTreeMap<u64, Vec<ClassId>>,
    /// `[nodes][stride] u64`: bit `c` of a node's row when class `c` may go there.
    matrix: Vec<u64>,
    stride: usize,
    /// Classes that want the fullest node, as a row of the matrix.
    binpack: Vec<u64>,
    /// Classes that hear of nodes that get better: those with fronts or bounds of their own, and those that wait.
    told: Vec<u64>,
    /// By class, for those that keep fronts.
    inboxes: Vec<Inbox>,
    /// Nodes by load, for requests that reserve nothing and for those that do; each kept from the first class on that
    /// searches it.
    orders: [Order; 2],
    ordered: [bool; 2],
    profiles: Profiles,
    services: Services,
    /// By service number: its classes.
    of_service: Vec<Vec<ClassId>>,
    woken: Vec<ClassId>,
    clock: u64,
    restless: bool,
    /// What the last decision looked at.
    work: Work,
}

impl Engine {
    // Nodes

    /// Enters a node at a free position, or replaces its facts.
    pub(super) fn put_node(&mut self, idx: NodeIdx, facts: &NodeFacts, attributes_changed: bool) {
        let at = idx.index();
        if self.columns.len() <= at {
            self.grow(at + 1);
        }
        self.columns.offer(at, [facts.offered.nano_cpus, facts.offered.mem_bytes], facts.slots);
        self.reorder(at);
        self.columns.offer_generic(at, &facts.generic);
        self.up.assign(idx, facts.takes_tasks());
        let kept = self.keeping.contains(idx);
        self.keeping.assign(idx, facts.keeps_tasks());
        for id in self.classes.ids() {
            self.count_own_of_node(id, at, kept, false);
            if attributes_changed {
                let service = self.hot[id.index()].service;
                self.classes[id].place_node(at, service, facts, &self.columns);
            }
            self.count_own_of_node(id, at, facts.keeps_tasks(), true);
            self.readmit(id, at);
            // More may be offered now, or the node stands in another lane.
            self.lower(id, at);
        }
    }

    /// Takes a node out; its tasks must be out already.
    pub(super) fn remove_node(&mut self, idx: NodeIdx) {
        let at = idx.index();
        self.up.remove(idx);
        self.keeping.remove(idx);
        self.columns.offer_generic(at, &BTreeMap::new());
        self.columns.offer(at, Default::default(), None);
        self.orders.iter_mut().for_each(|order| order.take(at));
        for id in self.classes.ids() {
            self.readmit(id, at);
            self.classes[id].fixed.remove(idx);
        }
    }

    /// Room for so many positions. Bounds are made anew when their trees are too short.
    fn grow(&mut self, positions: usize) {
        // By half as much again, so that a growing cluster does not make its bounds anew for each node.
        let positions = positions.max(self.columns.len() + self.columns.len() / 2).next_multiple_of(64);
        self.columns.grow(positions);
        self.orders.iter_mut().for_each(|order| order.grow(positions));
        self.matrix.resize(positions * self.stride, 0);
        for id in self.classes.ids() {
            self.rebuild_bounds(id);
        }
    }

    /// Adds or takes the own tasks of a node to or from the branches that it is in.
    fn count_own_of_node(&mut self, id: ClassId, at: usize, counts: bool, add: bool) {
        let Hot { prefers, service, .. } = self.hot[id.index()];
        if counts && prefers && service != 0 {
            let own = i64::from(self.columns.replicas(at, service));
            self.classes[id].count_own(at, if add { own } else { -own });
        }
    }

    // Profiles

    /// A task of a profile, with neither identity, name nor node.
    pub(super) fn like(&self, id: ProfileId) -> &Placed {
        &self.profiles.all[id.index()].like
    }

    /// Whether a task has this profile.
    pub(super) fn has_profile(&self, task: &Placed, id: ProfileId) -> bool {
        profile::alike(self.like(id), task)
    }

    /// The profile of a task, counted once more. Every call is paired with one of [`Engine::forget`].
    pub fn profile(&mut self, task: &Placed) -> ProfileId {
        let (id, new) = self.profiles.intern(task, &mut self.services);
        if new {
            self.columns.introduce(id, self.profiles.all[id.index()].service);
            for class in self.classes.ids() {
                self.introduce(class, id);
            }
        }
        id
    }

    /// Counts a task of a profile less.
    pub fn forget(&mut self, id: ProfileId) {
        if self.profiles.all[id.index()].tasks == 1 {
            for (class, _) in std::mem::take(&mut self.profiles.all[id.index()].touches) {
                self.classes[class].part(id);
            }
        }
        self.profiles.release(id, &mut self.services);
    }

    /// Tells a class of a profile.
    fn introduce(&mut self, class: ClassId, id: ProfileId) {
        let known = &mut self.classes[class];
        if known.reacts()
            && let Some(decides) = known.meet(id, &self.profiles.all[id.index()].like)
        {
            self.profiles.all[id.index()].touches.push((class, decides));
        }
    }

    /// A task of this profile holds a place on a node from now on.
    pub fn commit(&mut self, id: ProfileId, idx: NodeIdx) {
        let at = idx.index();
        let profile = &self.profiles.all[id.index()];
        let left = self.columns.add(at, id, profile);
        let service = profile.service as usize;
        self.reorder(at);
        if service != 0 {
            self.count_own(service, at, left.own - 1, left.own);
        }
        if left.alike == 1 {
            self.touch(id, at);
        }
        self.tell_of_fuller(at);
    }

    /// A task of this profile gives up its place.
    pub fn release(&mut self, id: ProfileId, idx: NodeIdx) {
        let at = idx.index();
        let left = self.columns.remove(at, id, &self.profiles.all);
        let service = self.profiles.all[id.index()].service as usize;
        self.reorder(at);
        if service != 0 {
            self.count_own(service, at, left.own + 1, left.own);
        }
        if left.alike == 0 && !skein_api::mutant!("stale-index-bit") {
            self.touch(id, at);
        }
        self.tell(at);
    }

    /// A node has so many tasks of a service now.
    fn count_own(&mut self, service: usize, at: usize, before: u32, now: u32) {
        let classes = self.of_service.get(service).map_or(0, Vec::len);
        for number in 0..classes {
            let id = self.of_service[service][number];
            let Hot { prefers, way, .. } = self.hot[id.index()];
            let class = &mut self.classes[id];
            if prefers && self.keeping.contains(NodeIdx::from_index(at)) {
                class.count_own(at, i64::from(now) - i64::from(before));
            }
            // One task less is news to every class, and told by `tell`.
            if class.set_own(at, before, now, self.columns.len()) && now > before && way == Way::Fronted {
                self.note(id, at);
            }
        }
    }

    /// The classes for which this profile is more than an amount look at the node anew.
    fn touch(&mut self, id: ProfileId, at: usize) {
        let touched = std::mem::take(&mut self.profiles.all[id.index()].touches);
        for (id, decides) in touched.iter().copied() {
            let service = self.hot[id.index()].service;
            let moves = self.classes[id].refresh_soft(at, service, &self.columns);
            if decides {
                self.readmit(id, at);
            }
            if decides || moves {
                self.lower(id, at);
            }
        }
        self.profiles.all[id.index()].touches = touched;
    }

    /// Tells the classes that may go to a node and keep something, or wait, that it got better.
    fn tell(&mut self, at: usize) {
        for word in 0..self.stride {
            let classes = self.matrix[at * self.stride + word] & self.told[word];
            each_bit(word, classes, |class| {
                let hot = &self.hot[class];
                if hot.waiting || hot.way != Way::Fronted || !self.inboxes[class].push(at) {
                    self.hear(ClassId::from_index(class), at);
                }
                true
            });
        }
    }

    /// Fuller is better for the classes that want the fullest only.
    fn tell_of_fuller(&mut self, at: usize) {
        for word in 0..self.stride {
            if self.binpack[word] != 0 {
                let classes = self.matrix[at * self.stride + word] & self.binpack[word];
                each_bit(word, classes, |class| {
                    self.lower_bound(ClassId::from_index(class), at);
                    true
                });
            }
        }
    }

    /// A node may be better for a class than it was.
    fn lower(&mut self, id: ClassId, at: usize) {
        if self.admitted(id, at) {
            self.hear(id, at);
        }
    }

    fn admitted(&self, id: ClassId, at: usize) -> bool {
        self.matrix[at * self.stride + id.index() / 64] & (1 << (id.index() % 64)) != 0
    }

    /// A node where a class may go got better.
    fn hear(&mut self, id: ClassId, at: usize) {
        let Hot { way, waiting, .. } = self.hot[id.index()];
        if waiting && self.key(id, at, 0) != NONE {
            self.hot[id.index()].waiting = false;
            self.woken.push(id);
            self.listen(id);
        }
        match way {
            Way::Shared => {}
            Way::Fronted => self.note(id, at),
            Way::Bounded => self.lower_bound(id, at),
        }
    }

    /// Lowers the bound of a node's block.
    fn lower_bound(&mut self, id: ClassId, at: usize) {
        let key = self.key(id, at, 0);
        if key != NONE {
            let (hot, class) = (&self.hot[id.index()], &mut self.classes[id]);
            let lane = class.lane(at);
            let tree = &mut class.lanes[lane].tree;
            if tree.is_empty() {
                *tree = tree::MinTree::new(vec![NONE; self.columns.len().div_ceil(1 << hot.shift)]);
            }
            tree.lower(at >> hot.shift, key);
        }
    }

    /// Whether a class hears of nodes that get better.
    fn listen(&mut self, id: ClassId) {
        let hot = &self.hot[id.index()];
        assign(&mut self.told, id, hot.waiting || hot.way != Way::Shared);
    }

    /// Puts a node where its load belongs.
    fn reorder(&mut self, at: usize) {
        let levels = self.columns.records[at].levels();
        for (kind, level) in levels.into_iter().enumerate() {
            if self.ordered[kind] {
                self.orders[kind].put(at, level);
            }
        }
    }

    /// The rank of a node for one more task of a class.
    #[inline]
    fn key(&self, id: ClassId, at: usize, copies: u32) -> u64 {
        let (hot, class) = (&self.hot[id.index()], &self.classes[id]);
        let key = key(hot, &self.columns, at, copies);
        let has = || self.columns.has_generic(at, &class.request.generic, copies, &self.profiles.all);
        if hot.further && key != NONE && !has() { NONE } else { key }
    }

    /// Whether a node has room for one more task of a class, replicas aside: amounts, slots and generic resources.
    #[inline]
    fn has_room(&self, id: ClassId, at: usize) -> bool {
        let hot = &self.hot[id.index()];
        let has = || self.columns.has_generic(at, &self.classes[id].request.generic, 0, &self.profiles.all);
        has_room(hot, &self.columns.records[at], 0) && (!hot.further || has())
    }

    // Classes

    /// The class of a request, when it was compiled before.
    pub(super) fn known_class(&self, request: &Request) -> Option<ClassId> {
        let same = self.by_hash.get(&hash(request))?;
        same.iter().copied().find(|id| self.classes[*id].request.same_class(request))
    }

    /// The same; counts as a use.
    pub(super) fn find_class(&mut self, request: &Request) -> Option<ClassId> {
        let id = self.known_class(request)?;
        self.clock += 1;
        self.classes[id].used_at = self.clock;
        Some(id)
    }

    /// Compiles a request. `fixed` and `soft` are the nodes that pass what follows from what a node is, and each soft
    /// expression about nodes; `branches` the values of the spread preferences by position.
    pub(super) fn add_class(
        &mut self,
        request: &Request,
        fixed: Bits,
        soft: Vec<Bits>,
        facts: &[Option<NodeFacts>],
    ) -> ClassId {
        let id = self.free_class();
        let mut class = Class::new(request.clone(), fixed, soft);
        let service = self.services.intern(request.service.as_ref());
        self.hot[id.index()] = class.hot(service);
        self.clock += 1;
        class.used_at = self.clock;
        let hot = &mut self.hot[id.index()];
        assign(&mut self.binpack, id, hot.binpack);
        let (shared, order) = (hot.way == Way::Shared, usize::from(hot.reserves));
        self.listen(id);
        if shared && !self.ordered[order] {
            self.ordered[order] = true;
            let there = facts.iter().enumerate().filter(|(_, facts)| facts.is_some());
            there.for_each(|(at, _)| self.reorder(at));
        }
        self.by_hash.entry(hash(request)).or_default().push(id);
        let service = service as usize;
        if self.of_service.len() <= service {
            self.of_service.resize(service + 1, Vec::new());
        }
        if service != 0 {
            self.of_service[service].push(id);
        }
        self.classes.put(id, class);
        for profile in self.profiles.used().collect::<Vec<_>>() {
            self.introduce(id, profile);
        }
        self.fill(id, facts);
        id
    }

    /// Enters every node into a new class.
    fn fill(&mut self, id: ClassId, facts: &[Option<NodeFacts>]) {
        let hot = &self.hot[id.index()];
        let class = &mut self.classes[id];
        for (at, facts) in facts.iter().enumerate() {
            let Some(facts) = facts.as_ref().filter(|_| class.divides) else { continue };
            class.enter_lanes(at, facts, &self.columns);
        }
        if hot.service != 0 {
            for at in 0..facts.len() {
                let own = self.columns.replicas(at, hot.service);
                if own > 0 && self.keeping.contains(NodeIdx::from_index(at)) {
                    class.count_own(at, i64::from(own));
                }
            }
        }
        let candidates: Vec<usize> = class.fixed.iter().map(NodeIdx::index).collect();
        for at in candidates {
            self.readmit(id, at);
        }
        self.rebuild_bounds(id);
    }

    /// A number for a class; the class that was not used for longest makes room.
    fn free_class(&mut self) -> ClassId {
        if let Some(free) = self.classes.free() {
            return free;
        }
        if self.classes.len() == CLASSES_MAX {
            let oldest = self.classes.ids().into_iter().min_by_key(|id| self.classes[*id].used_at);
            let oldest = oldest.expect("there are classes");
            self.remove_class(oldest);
            return oldest;
        }
        self.hot.push(Hot::default());
        self.inboxes.push(Inbox::default());
        if self.hot.len() > self.stride * 64 {
            self.widen();
        }
        self.classes.grow()
    }

    fn remove_class(&mut self, id: ClassId) {
        let class = self.classes.take(id);
        let hash = hash(&class.request);
        if let Some(same) = self.by_hash.get_mut(&hash) {
            same.retain(|other| *other != id);
            if same.is_empty() {
                self.by_hash.remove(&hash);
            }
        }
        for idx in class.row.iter() {
            assign(&mut self.matrix[idx.index() * self.stride..], id, false);
        }
        for profile in &mut self.profiles.all {
            profile.touches.retain(|(class, _)| *class != id);
        }
        let service = self.hot[id.index()].service;
        if let Some(classes) = self.of_service.get_mut(service as usize) {
            classes.retain(|class| *class != id);
        }
        self.services.release(service);
        if self.hot[id.index()].waiting {
            self.woken.push(id);
        }
        self.hot[id.index()] = Hot::default();
        self.inboxes[id.index()] = Inbox::default();
    }

    /// One word more for every node's row of the matrix.
    fn widen(&mut self) {
        let (old, new) = (self.stride, self.stride + 1);
        let mut matrix = vec![0; self.columns.len() * new];
        for at in 0..self.columns.len() {
            matrix[at * new..at * new + old].copy_from_slice(&self.matrix[at * old..(at + 1) * old]);
        }
        (self.matrix, self.stride) = (matrix, new);
        self.binpack.push(0);
        self.told.push(0);
    }

    /// Decides anew whether a class may go to a node, amounts aside.
    fn readmit(&mut self, id: ClassId, at: usize) {
        let idx = NodeIdx::from_index(at);
        let class = &mut self.classes[id];
        let admits = class.admits(at, self.up.contains(idx), &self.columns);
        if admits != class.row.contains(idx) {
            let own = self.columns.replicas(at, self.hot[id.index()].service);
            class.admit(at, admits, own, self.columns.len());
        }
        assign(&mut self.matrix[at * self.stride..], id, admits);
    }

    /// Computes every bound of a class anew; O(its nodes).
    fn rebuild_bounds(&mut self, id: ClassId) {
        if self.hot[id.index()].way != Way::Bounded {
            return;
        }
        let positions = self.columns.len();
        let class = &mut self.classes[id];
        let shift = class.reset_lanes(positions);
        let members: Vec<usize> = class.row.iter().map(NodeIdx::index).collect();
        self.hot[id.index()].shift = shift;
        let blocks = positions.div_ceil(1 << shift);
        let mut keys: Vec<Vec<u64>> = Vec::new();
        for at in members {
            let key = self.key(id, at, 0);
            let lane = self.classes[id].lane(at);
            if keys.len() <= lane {
                keys.resize(lane + 1, vec![NONE; blocks]);
            }
            let bound = &mut keys[lane][at >> shift];
            *bound = key.min(*bound);
        }
        for (lane, keys) in self.classes[id].lanes.iter_mut().zip(keys) {
            lane.tree = tree::MinTree::new(keys);
        }
    }

    // Decisions

    /// The best node of a class; none when none fits. Nothing is taken: commit for the next decision to see it.
    ///
    /// Corrects bounds on its way, which is why it is `mut`: decisions do not depend on it.
    pub fn select(&mut self, id: ClassId) -> Option<NodeIdx> {
        self.work = Work::default();
        match self.hot[id.index()].way {
            Way::Shared => self.select_shared(id),
            Way::Fronted => self.select_fronted(id),
            Way::Bounded => self.select_bounded(id),
        }
    }

    /// The best node of a lane with its key.
    fn select_in(&mut self, id: ClassId, lane: usize) -> Option<(u64, NodeIdx)> {
        loop {
            let (block, bound) = self.classes[id].lanes[lane].tree.first()?;
            self.work.entries += 1;
            let (key, at) = self.scan(id, lane, block);
            if key == bound {
                return Some((key, NodeIdx::from_index(at)));
            }
            self.classes[id].lanes[lane].tree.set(block, key);
        }
    }

    /// The smallest key of a block, and the first node that has it.
    fn scan(&mut self, id: ClassId, lane: usize, block: usize) -> (u64, usize) {
        let class = &self.classes[id];
        let hot = &self.hot[id.index()];
        let (mut best, mut records) = ((NONE, usize::MAX), 0);
        for at in class.row.within(block << hot.shift, 1 << hot.shift) {
            if class.in_lane(at, lane) {
                best = best.min((self.key(id, at, 0), at));
                records += 1;
            }
        }
        self.work.records += records;
        best
    }

    /// The best node of a class with bounds: the bound of a lane is made true before it is believed.
    fn select_bounded(&mut self, id: ClassId) -> Option<NodeIdx> {
        let mut lanes = self.classes[id].lanes_after(None);
        while let Some(first) = lanes.first().copied() {
            let found = lanes.iter().filter_map(|lane| self.select_in(id, *lane)).min();
            if let Some((_, idx)) = found {
                return Some(idx);
            }
            lanes = self.classes[id].lanes_after(Some(first));
        }
        None
    }

    /// The node that [`Engine::select`] would give, where that takes no correction of bounds: for classes that spread.
    pub(super) fn peek(&self, id: ClassId) -> Option<NodeIdx> {
        if self.hot[id.index()].way == Way::Bounded { None } else { self.search(id).0 }
    }

    /// Positions where so much CPU or memory is free; none for other amounts, and for nothing.
    pub(super) fn with_room(&self, dimension: &Dimension, ask: u64) -> Option<Bits> {
        let column = match dimension {
            _ if ask == 0 => return None,
            Dimension::Cpu => 0,
            Dimension::Memory => 1,
            Dimension::Slots | Dimension::Generic(_) => return None,
        };
        Some(self.columns.with_room(column, ask))
    }

    /// The shares of its offer that a node sets aside with `count` more of these amounts: CPU and memory.
    pub(super) fn shares_with(&self, idx: NodeIdx, amounts: [u64; 2], count: u32) -> [u64; 2] {
        self.columns.records[idx.index()].shares_with(amounts, u64::from(count))
    }

    // Waking

    /// Asks for a word when a node has room for a class, or gets better for it; once.
    pub(super) fn wait(&mut self, id: ClassId) {
        self.hot[id.index()].waiting = true;
        self.listen(id);
    }

    /// Whether a class waits and was not told yet.
    pub(super) fn waits(&self, id: ClassId) -> bool {
        self.hot.get(id.index()).is_some_and(|hot| hot.waiting)
    }

    /// Classes for which that happened.
    pub(super) fn take_woken(&mut self) -> Vec<ClassId> {
        std::mem::take(&mut self.woken)
    }

    /// What the last decision looked at.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Makes every class change its way to search after each decision, so that tests reach every way.
    pub fn be_restless(&mut self) {
        self.restless = true;
    }

    /// Bytes on the heap, but for requests and profiles.
    pub fn bytes(&self) -> usize {
        let classes: usize = self.classes.iter().map(Class::bytes).sum();
        let orders: usize = self.orders.iter().map(Order::bytes).sum();
        classes
            + orders
            + self.columns.bytes()
            + (self.matrix.capacity() + 2 * self.binpack.capacity()) * size_of::<u64>()
            + self.inboxes.capacity() * size_of::<Inbox>()
    }
}

fn hash(request: &Request) -> u64 {
    let mut hasher = DefaultHasher::new();
    request.hash_class(&mut hasher);
    hasher.finish()
}

/// Sets or clears the bit of a class in a row of classes.
fn assign(row: &mut [u64], id: ClassId, on: bool) {
    let word = &mut row[id.index() / 64];
    *word &= !(1 << (id.index() % 64));
    *word |= u64::from(on) << (id.index() % 64);
}
