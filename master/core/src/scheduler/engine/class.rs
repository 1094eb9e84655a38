//! A class: one request, compiled against the cluster and kept up to date as nodes change.
//!
//! Owns which nodes pass its filters (but for amounts, which a placement reads from the node itself), the keys by which
//! its strategy orders them, and the lanes that soft expressions and preferences divide them into. It must not know
//! what other classes want.
//!
//! Rows have one bit per node position. `fixed` is what follows from what a node is; `row` is `fixed`, less nodes that
//! are not up, and less those where a port or an affinity says no.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    ops::{Index, IndexMut},
};

use skein_api::{Resources, Strategy};
use smallvec::SmallVec;

use super::{
    columns::{Columns, DIMENSIONS, Record},
    front::{Front, Standing},
    order::Set,
    profile::ProfileId,
    tree::{MinTree, NONE},
};
use crate::scheduler::{
    bits::{Bits, NodeIdx},
    expr::{Affinity, Constraint, NodeKey},
    facts::{Dimension, NodeAttr, NodeFacts, Placed, ports_conflict},
    rank::{emptiest, fullest, level, packed},
    request::{Filter, Request, Soft},
};

/// A class by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClassId(pub(super) u32);

impl ClassId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }

    pub(super) fn from_index(index: usize) -> Self {
        Self(u32::try_from(index).expect("fewer classes than 2^32"))
    }
}

/// Classes by number; a number that is free holds none.
#[derive(Clone, Debug, Default)]
pub(super) struct Classes(Vec<Option<Class>>);

impl Classes {
    /// Numbers that were ever given, free ones among them.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The lowest free number, without making one.
    pub(super) fn free(&self) -> Option<ClassId> {
        self.0.iter().position(Option::is_none).map(ClassId::from_index)
    }

    /// One free number more.
    pub(super) fn grow(&mut self) -> ClassId {
        self.0.push(None);
        ClassId::from_index(self.0.len() - 1)
    }

    pub(super) fn put(&mut self, id: ClassId, class: Class) {
        self.0[id.index()] = Some(class);
    }

    /// Takes a class out; its number is free then.
    pub(super) fn take(&mut self, id: ClassId) -> Class {
        self.0[id.index()].take().expect("a class is asked for while it is there")
    }

    /// Numbers in use, ascending.
    pub(super) fn ids(&self) -> Vec<ClassId> {
        let used = self.0.iter().enumerate().filter(|(_, class)| class.is_some());
        used.map(|(at, _)| ClassId::from_index(at)).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Class> {
        self.0.iter().flatten()
    }
}

impl Index<ClassId> for Classes {
    type Output = Class;

    fn index(&self, id: ClassId) -> &Class {
        self.0[id.index()].as_ref().expect("a class is asked for while it is there")
    }
}

impl IndexMut<ClassId> for Classes {
    fn index_mut(&mut self, id: ClassId) -> &mut Class {
        self.0[id.index()].as_mut().expect("a class is asked for while it is there")
    }
}

/// Nodes per block that an average block shall have in the running: the more, the fewer keys are kept, and the more
/// nodes a placement reads.
const MEMBERS_PER_BLOCK: usize = 2;

/// Blocks have 4 to 256 positions.
const SHIFTS: std::ops::RangeInclusive<u32> = 2..=8;

/// What the key of a node needs of its class; one cache line.
#[derive(Clone, Debug, Default)]
#[repr(align(64))]
pub(super) struct Hot {
    pub(super) amounts: [u64; DIMENSIONS],
    pub(super) service: u32,
    /// Most replicas per node; `u32::MAX` for no limit.
    pub(super) replicas_max: u32,
    pub(super) shift: u32,
    pub(super) binpack: bool,
    /// Whether it reserves anything: then shares rank before counts.
    pub(super) reserves: bool,
    /// Whether it takes more than CPU and memory of a node that limits it.
    pub(super) further: bool,
    /// Whether somebody wants to know when a node has room.
    pub(super) waiting: bool,
    pub(super) way: Way,
    /// Whether it spreads over the values of something first.
    pub(super) prefers: bool,
}

/// How a class finds its nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Way {
    /// It looks through the order of all nodes and keeps nothing.
    #[default]
    Shared,
    /// It keeps its next nodes in that order.
    Fronted,
    /// It has bounds of its own, since it orders nodes differently.
    Bounded,
}

/// Nodes that are alike for soft expressions and preferences; all nodes where there are none.
#[derive(Clone, Debug, Default)]
pub(super) struct Lane {
    /// Bit 63 is cleared where the first soft expression holds, and so on: smaller is better.
    soft: u64,
    branch: u32,
    /// Nodes of the row by own tasks: those of the class's service. For classes that spread, like the fronts.
    pub(super) by_own: Vec<Set>,
    /// By own tasks: which nodes come next. For classes that do not search the order alone.
    pub(super) fronts: Vec<Front>,
    /// For classes that want the fullest node.
    pub(super) tree: MinTree,
}

impl Lane {
    /// The fewest own tasks, but at least `from`, that some node has.
    #[inline]
    pub(super) fn next_own_count(&self, from: u32) -> Option<u32> {
        let from = from as usize;
        let found = self.by_own.get(from..)?.iter().position(|nodes| !nodes.is_empty())?;
        Some(u32::try_from(from + found).expect("own tasks are counted in u32"))
    }

    /// A node stands here now: the front of those with as many own tasks, if there is one, shall know.
    #[inline]
    fn offer(&mut self, standing: Standing) {
        let mut with_own = self.fronts.iter_mut().zip(&self.by_own);
        if let Some((front, _)) = with_own.find(|(_, nodes)| nodes.contains(standing.at())) {
            front.offer(standing);
        }
    }

    fn enter(&mut self, at: usize, own: u32, positions: usize) {
        let own = own as usize;
        if self.by_own.len() <= own {
            self.by_own.resize_with(own + 1, Set::default);
        }
        self.by_own[own].insert(at, positions);
    }

    /// False when the node is not there.
    fn leave(&mut self, at: usize, own: u32) -> bool {
        self.by_own.get_mut(own as usize).is_some_and(|nodes| nodes.remove(at))
    }

    fn bytes(&self) -> usize {
        let sets: usize = self.by_own.iter().map(|set| size_of::<Set>() + set.bytes()).sum();
        let fronts: usize = self.fronts.iter().map(|front| size_of::<Front>() + front.bytes()).sum();
        size_of::<Self>() + sets + fronts + self.tree.bytes()
    }
}

/// One soft expression.
#[derive(Clone, Debug)]
struct SoftRow {
    row: Bits,
    /// Profiles that make an affinity hold; none for what follows from the node itself.
    matching: Option<Vec<ProfileId>>,
    negated: bool,
}

/// The values of spread preferences, and how many tasks of the service stand in each branch.
#[derive(Clone, Debug, Default)]
pub(super) struct Branches {
    /// Branches of every level by their values; the outer levels first.
    ids: BTreeMap<Vec<String>, u32>,
    /// By number: the branches that contain it, itself last.
    paths: Vec<Vec<u32>>,
    /// By number: own tasks on nodes that keep their tasks.
    pub(super) own: Vec<u64>,
    /// By position: the innermost branch.
    pub(super) of: Vec<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct Class {
    pub(super) request: Request,
    pub(super) row: Bits,
    pub(super) fixed: Bits,
    /// Sorted: profiles that keep the class off their node.
    blocking: Vec<ProfileId>,
    /// For each hard affinity that wants something: what it wants.
    wanted: Vec<Vec<ProfileId>>,
    soft: Vec<SoftRow>,
    pub(super) branches: Branches,
    /// Whether soft expressions or preferences divide the nodes into lanes; otherwise there is one.
    pub(super) divides: bool,
    pub(super) lanes: Vec<Lane>,
    lane_ids: BTreeMap<(u64, u32), u32>,
    /// Work of the present way to search that the other one would not have had, less what it costs to change.
    pub(super) regret: i64,
    pub(super) used_at: u64,
}

impl Class {
    /// A class with no node. `fixed` are the nodes that pass what follows from what a node is, `soft` the same for
    /// each soft expression about nodes (empty rows for the others).
    pub(super) fn new(request: Request, fixed: Bits, soft: Vec<Bits>) -> Self {
        let rows = request.soft.iter().zip(soft).map(|(expression, row)| match expression {
            Soft::Affinity(affinity) => SoftRow { row, matching: Some(Vec::new()), negated: affinity.negated },
            // The row says who passes, negation included.
            Soft::Constraint(_) | Soft::VolumeAffinity(_) => SoftRow { row, matching: None, negated: false },
        });
        let soft = rows.collect();
        let wanted = request.affinities.iter().filter(|a| !a.negated).map(|_| Vec::new()).collect();
        Self {
            row: Bits::default(),
            fixed,
            blocking: Vec::new(),
            wanted,
            soft,
            branches: Branches::default(),
            divides: !request.soft.is_empty() || !request.preferences.is_empty(),
            lanes: vec![Lane::default()],
            lane_ids: BTreeMap::new(),
            regret: 0,
            used_at: 0,
            request,
        }
    }

    fn packs(&self) -> bool {
        self.request.strategy == Strategy::Binpack
    }

    pub(super) fn hot(&self, service: u32) -> Hot {
        let request = &self.request;
        Hot {
            amounts: [request.reservations.nano_cpus, request.reservations.mem_bytes],
            service,
            replicas_max: if request.max_replicas > 0 && service != 0 { request.max_replicas } else { u32::MAX },
            shift: *SHIFTS.start(),
            binpack: self.packs(),
            reserves: request.reservations != Resources::default(),
            further: !request.generic.is_empty(),
            waiting: false,
            way: if self.packs() { Way::Bounded } else { Way::Shared },
            prefers: !request.preferences.is_empty(),
        }
    }

    /// Whether what runs on a node can decide more than amounts and replicas.
    pub(super) fn reacts(&self) -> bool {
        let request = &self.request;
        let soft = request.soft.iter().any(|soft| matches!(soft, Soft::Affinity(_)));
        !request.ports.is_empty() || !request.affinities.is_empty() || soft
    }

    /// Enters what a profile means for the class: whether it can decide if the class may go to a node; none when it
    /// means nothing.
    pub(super) fn meet(&mut self, id: ProfileId, profile: &Placed) -> Option<bool> {
        let request = &self.request;
        let mut blocks = profile.ports.iter().any(|taken| request.ports.iter().any(|port| ports_conflict(taken, port)));
        let mut wanted = self.wanted.iter_mut();
        let (mut decides, mut ranks) = (false, false);
        for affinity in &request.affinities {
            let matching = matches(affinity, profile);
            if affinity.negated {
                blocks |= matching;
                continue;
            }
            let list = wanted.next().expect("one for each that wants something");
            if matching {
                insert(list, id);
                decides = true;
            }
        }
        for (soft, row) in request.soft.iter().zip(&mut self.soft) {
            if let (Soft::Affinity(affinity), Some(list)) = (soft, &mut row.matching)
                && matches(affinity, profile)
            {
                insert(list, id);
                ranks = true;
            }
        }
        if blocks {
            insert(&mut self.blocking, id);
        }
        decides |= blocks;
        (decides || ranks).then_some(decides)
    }

    /// Forgets a profile.
    pub(super) fn part(&mut self, id: ProfileId) {
        let soft = self.soft.iter_mut().filter_map(|row| row.matching.as_mut());
        for list in [&mut self.blocking].into_iter().chain(&mut self.wanted).chain(soft) {
            if let Ok(at) = list.binary_search(&id) {
                list.remove(at);
            }
        }
    }

    /// Whether a node is in the running, amounts aside.
    pub(super) fn admits(&self, at: usize, up: bool, columns: &Columns) -> bool {
        let idx = NodeIdx::from_index(at);
        if !up || !self.fixed.contains(idx) {
            return false;
        }
        let record = &columns.records[at];
        (self.blocking.is_empty() || !record.runs_any(&self.blocking))
            && self.wanted.iter().all(|list| record.runs_any(list))
    }

    /// Looks anew at what runs on a node, for soft affinities; `service` is the class's. True when that brings it into
    /// another lane.
    pub(super) fn refresh_soft(&mut self, at: usize, service: u32, columns: &Columns) -> bool {
        let idx = NodeIdx::from_index(at);
        let mut moves = false;
        for number in 0..self.soft.len() {
            let soft = &self.soft[number];
            let Some(matching) = &soft.matching else { continue };
            let holds = columns.records[at].runs_any(matching) != soft.negated;
            if holds != soft.row.contains(idx) {
                let own = columns.replicas(at, service);
                self.change_lane(at, own, columns.len(), |class| class.soft[number].row.assign(idx, holds));
                moves = true;
            }
        }
        moves
    }

    /// A node's facts changed; `service` is the class's.
    pub(super) fn place_node(&mut self, at: usize, service: u32, facts: &NodeFacts, columns: &Columns) {
        let own = columns.replicas(at, service);
        let idx = NodeIdx::from_index(at);
        self.fixed.assign(idx, self.request.filters().iter().all(|filter| passes_fixed(filter, facts)));
        self.change_lane(at, own, columns.len(), |class| {
            for (soft, row) in class.request.soft.iter().zip(&mut class.soft) {
                if let Soft::Constraint(constraint) | Soft::VolumeAffinity(constraint) = soft {
                    row.row.assign(idx, meets(constraint, facts));
                }
            }
            class.enter_branch(at, facts);
        });
        self.refresh_soft(at, service, columns);
    }

    /// Enters a node of a new class into soft rows and branches.
    pub(super) fn enter_lanes(&mut self, at: usize, facts: &NodeFacts, columns: &Columns) {
        self.refresh_soft(at, 0, columns);
        self.enter_branch(at, facts);
    }

    /// Changes what a node is to soft expressions and preferences, which may bring it into another lane.
    fn change_lane(&mut self, at: usize, own: u32, positions: usize, change: impl FnOnce(&mut Self)) {
        let before = self.find_lane(at).filter(|lane| self.lanes[*lane].leave(at, own));
        change(self);
        if before.is_some() {
            let lane = self.lane(at);
            self.lanes[lane].enter(at, own, positions);
        }
    }

    fn enter_branch(&mut self, at: usize, facts: &NodeFacts) {
        if !self.request.preferences.is_empty() {
            let values: Vec<&str> = self.request.preferences.iter().map(|p| facts.value_of(&p.key)).collect();
            self.branches.place(at, &values);
        }
    }

    /// The node's place among soft expressions.
    fn soft_rank(&self, at: usize) -> u64 {
        let idx = NodeIdx::from_index(at);
        let holds = |(k, soft): (usize, &SoftRow)| if soft.row.contains(idx) { 1 << (63 - k) } else { 0 };
        !self.soft.iter().enumerate().map(holds).fold(0, |all: u64, bit: u64| all | bit)
    }

    /// What the node's lane is known by.
    fn lane_key(&self, at: usize) -> (u64, u32) {
        (self.soft_rank(at), self.branches.of.get(at).copied().unwrap_or(0))
    }

    /// The node's lane, if there ever was a node in it.
    #[inline]
    pub(super) fn find_lane(&self, at: usize) -> Option<usize> {
        if self.divides { self.lane_ids.get(&self.lane_key(at)).map(|lane| *lane as usize) } else { Some(0) }
    }

    /// The node's lane; made when it is the first of its kind.
    pub(super) fn lane(&mut self, at: usize) -> usize {
        if !self.divides {
            return 0;
        }
        let (soft, branch) = self.lane_key(at);
        let next = self.lane_ids.len();
        let id = *self.lane_ids.entry((soft, branch)).or_insert(next as u32) as usize;
        if id == next {
            // The first is there already.
            self.lanes.resize_with(next + 1, Lane::default);
            (self.lanes[id].soft, self.lanes[id].branch) = (soft, branch);
        }
        id
    }

    /// Whether a node belongs to a lane now.
    pub(super) fn in_lane(&self, at: usize, lane: usize) -> bool {
        !self.divides || self.lane_key(at) == (self.lanes[lane].soft, self.lanes[lane].branch)
    }

    /// The lanes that rank first of those that rank after lane `after`; all of them rank equally.
    pub(super) fn lanes_after(&self, after: Option<usize>) -> SmallVec<[usize; 8]> {
        let mut first = SmallVec::new();
        if !self.divides {
            return if after.is_none() { SmallVec::from_slice(&[0]) } else { first };
        }
        let rank = |a: usize, b: usize| {
            let (a, b) = (&self.lanes[a], &self.lanes[b]);
            a.soft.cmp(&b.soft).then_with(|| self.standing(a).cmp(self.standing(b)))
        };
        for lane in (0..self.lane_ids.len()).filter(|lane| after.is_none_or(|after| rank(*lane, after).is_gt())) {
            match first.first().map_or(Ordering::Equal, |first| rank(lane, *first)) {
                Ordering::Less => first = SmallVec::from_slice(&[lane]),
                Ordering::Equal => first.push(lane),
                Ordering::Greater => {}
            }
        }
        first
    }

    /// All lanes empty, with blocks of a size that suits the row; returns the shift. For classes with bounds.
    pub(super) fn reset_lanes(&mut self, positions: usize) -> u32 {
        let members = (self.row.len() / self.lanes.len()).max(1);
        let per_block = (positions / members).max(1) * MEMBERS_PER_BLOCK;
        let shift = per_block.next_power_of_two().trailing_zeros().clamp(*SHIFTS.start(), *SHIFTS.end());
        self.lanes.iter_mut().for_each(|lane| lane.tree = MinTree::default());
        shift
    }

    /// How many own tasks stand in each branch of a lane, the outer first.
    fn standing(&self, lane: &Lane) -> impl Iterator<Item = u64> + '_ {
        let path = self.branches.paths.get(lane.branch as usize);
        path.into_iter().flatten().map(|branch| self.branches.own[*branch as usize])
    }

    /// A node has `now` own tasks and had `before`. False when no lane has it.
    #[inline]
    pub(super) fn set_own(&mut self, at: usize, before: u32, now: u32, positions: usize) -> bool {
        let Some(lane) = self.find_lane(at) else { return false };
        let there = self.lanes[lane].leave(at, before);
        if there {
            self.lanes[lane].enter(at, now, positions);
        }
        there
    }

    /// A node of so many own tasks comes into the row, or leaves it.
    pub(super) fn admit(&mut self, at: usize, admits: bool, own: u32, positions: usize) {
        self.row.assign(NodeIdx::from_index(at), admits);
        if self.packs() {
            return;
        }
        let lane = self.lane(at);
        if admits {
            self.lanes[lane].enter(at, own, positions);
        } else {
            self.lanes[lane].leave(at, own);
        }
    }

    /// A node stands here now: the front that it belongs to, if there is one, shall know.
    #[inline]
    pub(super) fn offer(&mut self, standing: Standing) {
        if let Some(lane) = self.find_lane(standing.at()) {
            self.lanes[lane].offer(standing);
        }
    }

    /// The latest bound of a front.
    pub(super) fn bound(&self) -> Standing {
        self.lanes.iter().flat_map(|lane| &lane.fronts).map(Front::bound).max().unwrap_or_default()
    }

    /// Counts own tasks more or less in the branches of a node.
    pub(super) fn count_own(&mut self, at: usize, by: i64) {
        self.branches.count(at, by);
    }

    /// Bytes on the heap, but for the request.
    pub(super) fn bytes(&self) -> usize {
        let rows = [&self.row, &self.fixed].into_iter().chain(self.soft.iter().map(|s| &s.row));
        let rows: usize = rows.map(Bits::bytes).sum();
        let lanes: usize = self.lanes.iter().map(Lane::bytes).sum();
        size_of::<Self>() + rows + lanes + self.branches.of.capacity() * size_of::<u32>()
    }
}

impl Branches {
    /// Enters a node under its values.
    fn place(&mut self, at: usize, values: &[&str]) {
        let mut path = Vec::with_capacity(values.len());
        let mut prefix = Vec::with_capacity(values.len());
        for value in values {
            prefix.push((*value).to_owned());
            let next = u32::try_from(self.paths.len()).expect("fewer branches than nodes times levels");
            let id = *self.ids.entry(prefix.clone()).or_insert(next);
            path.push(id);
            if id == next {
                self.paths.push(path.clone());
                self.own.push(0);
            }
        }
        if self.of.len() <= at {
            self.of.resize(at + 1, 0);
        }
        self.of[at] = *path.last().expect("there is a preference");
    }

    fn count(&mut self, at: usize, by: i64) {
        let Some(path) = self.of.get(at).and_then(|branch| self.paths.get(*branch as usize)) else { return };
        for branch in path {
            let own = &mut self.own[*branch as usize];
            *own = own.saturating_add_signed(by);
        }
    }
}

/// The rank of a node for one more task of the class beside `copies` that are counted as placed: smaller is better,
/// [`NONE`] where it does not fit.
pub(super) fn key(hot: &Hot, columns: &Columns, at: usize, copies: u32) -> u64 {
    let record = &columns.records[at];
    let more = u64::from(copies);
    if !has_room(hot, record, copies) {
        return NONE;
    }
    let replicas = columns.replicas(at, hot.service).saturating_add(if hot.service == 0 { 0 } else { copies });
    if replicas >= hot.replicas_max {
        return NONE;
    }
    let tasks = u64::from(record.tasks) + more;
    if hot.binpack {
        fullest(packed(record.shares_with(hot.amounts, more + 1), hot.amounts), tasks, hot.reserves)
    } else {
        let most = record.shares_with(hot.amounts, more).into_iter().max().expect("there are dimensions");
        emptiest(replicas, level(most, tasks, hot.reserves))
    }
}

/// Whether one more fits beside what is there and `copies`.
#[inline]
pub(super) fn has_room(hot: &Hot, record: &Record, copies: u32) -> bool {
    let more = u64::from(copies);
    let fits = |d: usize| {
        let free = if skein_api::mutant!("no-capacity") { u64::MAX } else { record.free(d) };
        hot.amounts[d] == 0 || hot.amounts[d].saturating_mul(more + 1) <= free
    };
    (0..DIMENSIONS).all(fits) && u64::from(record.tasks) + more < u64::from(record.slots)
}

fn insert(list: &mut Vec<ProfileId>, id: ProfileId) {
    if let Err(at) = list.binary_search(&id) {
        list.insert(at, id);
    }
}

fn matches(affinity: &Affinity, profile: &Placed) -> bool {
    profile.attributes("").any(|(attr, value)| attr == affinity.key && affinity.pattern.matches(value))
}

/// What follows from what a node is; every other filter passes here.
pub(super) fn passes_fixed(filter: &Filter<'_>, facts: &NodeFacts) -> bool {
    match filter {
        Filter::Pinned(pin) => pin.nodes.contains(&facts.id),
        Filter::Whitelist(c) | Filter::Constraint(c) | Filter::VolumeAffinity(c) => meets(c, facts),
        Filter::Platform(platform) => {
            let is = |attr: NodeAttr, value: &str| value.is_empty() || has(facts, &attr, |v| v == value);
            is(NodeAttr::Os, &platform.os) && is(NodeAttr::Arch, &platform.arch)
        }
        Filter::VolumePlugin(name) => facts.volume_plugins.iter().any(|plugin| plugin == name),
        Filter::NetworkPlugin(name) => facts.network_plugins.iter().any(|plugin| plugin == name),
        Filter::Amount(Dimension::Generic(kind), amount) => facts.generic.get(kind).is_some_and(|n| n >= amount),
        Filter::Health | Filter::Availability | Filter::Affinity(_) => true,
        Filter::Amount(..) | Filter::Port(_) | Filter::MaxReplicas { .. } => true,
    }
}

fn meets(constraint: &Constraint, facts: &NodeFacts) -> bool {
    let matches = |value: &str| constraint.pattern.matches(value);
    let any = |attrs: &[NodeAttr]| attrs.iter().any(|attr| has(facts, attr, matches));
    let met = match &constraint.key {
        NodeKey::Any(attrs) => any(attrs),
        NodeKey::First(attrs) => match attrs.iter().find(|attr| has(facts, attr, |_| true)) {
            Some(first) => has(facts, first, matches),
            None => false,
        },
    };
    met != constraint.negated
}

fn has(facts: &NodeFacts, attr: &NodeAttr, matches: impl Fn(&str) -> bool) -> bool {
    match attr {
        NodeAttr::NodeLabel(key) => facts.labels.get(key).is_some_and(|value| matches(value)),
        NodeAttr::EngineLabel(key) => facts.engine_labels.get(key).is_some_and(|value| matches(value)),
        _ => facts.attributes().any(|(known, value)| known == *attr && matches(value)),
    }
}
