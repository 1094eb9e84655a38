//! Many equal tasks in one go: the same nodes as one by one, for less.
//!
//! Copies are entered as tasks of a profile while the batch runs and taken out again at its end, so every rule counts
//! them as it will count the real ones. Other classes hear nothing of it: for them nothing happened.

use std::collections::BTreeMap;

use super::{
    ClassId, Engine, NodeIdx, ProfileId, Work,
    columns::{DIMENSIONS, coarse},
    front::Standing,
    order::each_bit,
    tree::NONE,
};
use crate::scheduler::bits::Bits;

impl Engine {
    /// Where `count` tasks of this profile go, by position: each node once. As many as fit.
    ///
    /// The profile must be the one of the class's tasks.
    pub fn batch(&mut self, id: ClassId, profile: ProfileId, count: u32) -> Vec<(NodeIdx, u32)> {
        let class = &self.classes[id];
        let hot = &self.hot[id.index()];
        let plain = !class.divides && !hot.further && !class.reacts();
        match (hot.binpack, hot.service) {
            (true, _) if plain => self.by_block(id, profile, count).into_iter().collect(),
            (false, service) if plain && service != 0 => self.by_round(id, profile, count),
            _ => self.one_by_one(id, profile, count).into_iter().collect(),
        }
    }

    /// For classes whose tasks change more than amounts and replicas for the next one, and for those without a service.
    fn one_by_one(&mut self, id: ClassId, profile: ProfileId, count: u32) -> BTreeMap<NodeIdx, u32> {
        let mut copies = BTreeMap::new();
        for _ in 0..count {
            let Some(idx) = self.select(id) else { break };
            self.commit(profile, idx);
            *copies.entry(idx).or_default() += 1;
        }
        for (idx, count) in &copies {
            (0..*count).for_each(|_| self.release(profile, *idx));
        }
        copies
    }

    /// Spread fills by water level: every node with `r` own tasks gets one more, the emptiest first, before any gets
    /// another. Within a round nothing that ranks changes, so each is one walk through the order of all nodes.
    fn by_round(&mut self, id: ClassId, profile: ProfileId, count: u32) -> Vec<(NodeIdx, u32)> {
        let (mut left, mut rounds) = (count, Vec::new());
        let mut own = 0;
        while left > 0 {
            let Some(next) = self.classes[id].lanes[0].next_own_count(own) else { break };
            if next >= self.hot[id.index()].replicas_max {
                break;
            }
            let taken = self.round(id, next, left as usize);
            left -= u32::try_from(taken.len()).expect("no more than are left");
            if left > 0 {
                taken.iter().for_each(|at| self.enter(id, profile, *at as usize));
            }
            rounds.push(taken);
            own = next + 1;
        }
        let entered = rounds.len() - usize::from(left == 0 && !rounds.is_empty());
        for taken in rounds[..entered].iter().rev() {
            taken.iter().for_each(|at| self.leave(id, profile, *at as usize));
        }
        by_position(&rounds, self.columns.len())
    }

    /// The first `most` nodes with so many own tasks that have room, in no order when that is all of them.
    fn round(&self, id: ClassId, own: u32, most: usize) -> Vec<u32> {
        let mut taken: Vec<u32> = Vec::with_capacity(most.min(1 << 20));
        let set = &self.classes[id].lanes[0].by_own[own as usize];
        if set.len() <= most {
            // Who comes first does not matter.
            let room = self.room(id, set.len());
            set.each(|word, bits| {
                let bits = bits & room.as_ref().map_or(u64::MAX, |room| room.word(word));
                each_bit(word, bits, |at| {
                    if room.is_some() || self.has_room(id, at) {
                        taken.push(at as u32);
                    }
                    true
                })
            });
            return taken;
        }
        let hot = &self.hot[id.index()];
        let by_amounts = !hot.further && !self.columns.limits_slots();
        let asks = hot.amounts.map(coarse);
        let fits = |at| by_amounts && self.columns.surely_free(at, asks) || self.has_room(id, at);
        self.walk_from(id, (0, own), Standing::default(), &mut Work::default(), |standing, _| {
            if fits(standing.at()) {
                taken.push(standing.at() as u32);
            }
            taken.len() < most
        });
        taken
    }

    /// Positions where a class has room, when that is cheaper to know of all than of so many, and is a matter of amounts
    /// alone.
    fn room(&self, id: ClassId, members: usize) -> Option<Bits> {
        let hot = &self.hot[id.index()];
        if hot.further || self.columns.limits_slots() || members < self.columns.len() / 16 {
            return None;
        }
        let asked = (0..DIMENSIONS).filter(|dimension| hot.amounts[*dimension] > 0);
        asked.map(|dimension| self.columns.with_room(dimension, hot.amounts[dimension])).reduce(|mut both, row| {
            both.and(&row);
            both
        })
    }

    /// A task changes only its own node for the next one, so only its block must be looked at again.
    fn by_block(&mut self, id: ClassId, profile: ProfileId, count: u32) -> BTreeMap<NodeIdx, u32> {
        let mut copies: BTreeMap<NodeIdx, u32> = BTreeMap::new();
        let mut bounds: Vec<(usize, u64)> = Vec::new();
        let mut left = count;
        while left > 0 {
            let class = &mut self.classes[id];
            let Some((block, bound)) = class.lanes[0].tree.first() else { break };
            bounds.push((block, bound));
            let (mut key, mut at) = self.scan(id, 0, block);
            // What is left in the block and no worse than the bound comes before every other block.
            while key == bound && key != NONE && left > 0 {
                self.enter(id, profile, at);
                *copies.entry(NodeIdx::from_index(at)).or_default() += 1;
                left -= 1;
                (key, at) = self.scan(id, 0, block);
            }
            let class = &mut self.classes[id];
            class.lanes[0].tree.set(block, key);
        }
        for (idx, count) in &copies {
            (0..*count).for_each(|_| self.leave(id, profile, idx.index()));
        }
        let class = &mut self.classes[id];
        // Backwards: the first bound of a block is the one of before.
        for (block, bound) in bounds.into_iter().rev() {
            class.lanes[0].tree.set(block, bound);
        }
        copies
    }

    /// Counts a copy for this class and the order alone.
    fn enter(&mut self, id: ClassId, profile: ProfileId, at: usize) {
        let left = self.columns.add(at, profile, &self.profiles.all[profile.index()]);
        self.count_copy(id, at, left.own - 1, left.own);
    }

    fn leave(&mut self, id: ClassId, profile: ProfileId, at: usize) {
        let left = self.columns.remove(at, profile, &self.profiles.all);
        self.count_copy(id, at, left.own + 1, left.own);
    }

    fn count_copy(&mut self, id: ClassId, at: usize, before: u32, now: u32) {
        if self.hot[id.index()].service != 0 {
            self.classes[id].set_own(at, before, now, self.columns.len());
        }
        if !self.hot[id.index()].binpack {
            self.reorder(at);
        }
    }
}

/// How many rounds took each position, in order of positions.
fn by_position(rounds: &[Vec<u32>], positions: usize) -> Vec<(NodeIdx, u32)> {
    let total: usize = rounds.iter().map(Vec::len).sum();
    let run = |(at, count): (usize, u32)| (NodeIdx::from_index(at), count);
    if let [taken] = rounds
        && taken.len() > positions / 1_024
    {
        // Cheaper than sorting.
        let mut marks = vec![0_u64; positions.div_ceil(64)];
        taken.iter().for_each(|at| marks[*at as usize / 64] |= 1 << (at % 64));
        let mut runs = Vec::with_capacity(taken.len());
        for (word, bits) in marks.into_iter().enumerate() {
            each_bit(word, bits, |at| {
                runs.push(run((at, 1)));
                true
            });
        }
        return runs;
    }
    if total > positions / 16 {
        let mut counts = vec![0_u32; positions];
        rounds.iter().flatten().for_each(|at| counts[*at as usize] += 1);
        return counts.into_iter().enumerate().filter(|(_, count)| *count > 0).map(run).collect();
    }
    let mut all: Vec<u32> = rounds.iter().flatten().copied().collect();
    all.sort_unstable();
    all.chunk_by(|a, b| a == b).map(|same| run((same[0] as usize, same.len() as u32))).collect()
}
