//! What a placement reads of one node: amounts, a task count and which profiles run there.
//!
//! Owns the sums. It must not know classes or strategies. One record is two cache lines side by side, which processors
//! fetch together.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::profile::{Profile, ProfileId};
use crate::scheduler::{
    bits::Bits,
    rank::{level, reciprocal, share},
    words,
};

/// Profiles of one node that are kept in its record; a node with more has a list.
const INLINE: usize = 8;

/// One node. Amounts are in the dimensions' units: nano-CPUs and bytes.
#[derive(Clone, Debug, Default)]
#[repr(align(128))]
pub(super) struct Record {
    pub(super) offered: [u64; DIMENSIONS],
    /// Reserved; `u64::MAX` stands for that much or more.
    pub(super) used: [u64; DIMENSIONS],
    /// Reciprocals of the offer, see [`reciprocal`].
    pub(super) scale: [u64; DIMENSIONS],
    pub(super) tasks: u32,
    /// Most tasks; `u32::MAX` for no limit.
    pub(super) slots: u32,
    /// In no order.
    pub(super) running: SmallVec<[Running; INLINE]>,
}

impl Record {
    /// Offered and not reserved; 0 when more is reserved than offered.
    #[inline]
    pub(super) fn free(&self, dimension: usize) -> u64 {
        self.offered[dimension].saturating_sub(self.used[dimension])
    }

    /// Whether the number of tasks is limited; a position that never had a node counts as one that is not.
    fn limits_slots(&self) -> bool {
        self.slots != u32::MAX && self.scale != [0; DIMENSIONS]
    }

    /// Whether a task of one of these profiles runs here; `profiles` is sorted.
    pub(super) fn runs_any(&self, profiles: &[ProfileId]) -> bool {
        self.running.iter().any(|running| profiles.binary_search(&running.profile).is_ok())
    }

    /// The shares of its offer that are set aside with `count` more of these amounts.
    #[inline]
    pub(super) fn shares_with(&self, amounts: [u64; DIMENSIONS], count: u64) -> [u64; DIMENSIONS] {
        let used = |d: usize| self.used[d].saturating_add(amounts[d].saturating_mul(count));
        std::array::from_fn(|d| share(used(d), self.scale[d]))
    }

    /// Where the node stands for classes that spread, as it is: for those that reserve nothing, and for those that do.
    #[inline]
    pub(super) fn levels(&self) -> [u32; 2] {
        let most = self.shares_with([0; DIMENSIONS], 0).into_iter().max().expect("there are dimensions");
        [false, true].map(|reserves| level(most, u64::from(self.tasks), reserves))
    }

    /// One of [`Record::levels`].
    #[inline]
    pub(super) fn level(&self, reserves: bool) -> u32 {
        self.levels()[usize::from(reserves)]
    }
}

/// CPU and memory.
pub(super) const DIMENSIONS: usize = 2;

/// How many tasks of one profile run on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Running {
    pub(super) profile: ProfileId,
    pub(super) count: u32,
}

/// What runs on a node after one task came or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Left {
    /// Tasks of its profile.
    pub(super) alike: u32,
    /// Tasks of its service; means nothing for tasks without one.
    pub(super) own: u32,
}

/// By position.
#[derive(Clone, Debug, Default)]
pub(super) struct Columns {
    pub(super) records: Vec<Record>,
    /// What is free, to eleven bits ([`coarse`]): a question about all nodes reads two bytes of each.
    free: [Vec<u16>; DIMENSIONS],
    /// By profile: its service. Replicas are counted without a look at profiles.
    services: Vec<u32>,
    /// Nodes that limit their tasks.
    limited: usize,
    /// What nodes offer of generic resources, those that have any.
    generic: BTreeMap<usize, BTreeMap<String, u64>>,
}

impl Columns {
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// Makes room for a position.
    pub(super) fn grow(&mut self, len: usize) {
        if self.records.len() < len {
            self.records.resize(len, Record::default());
            self.free.iter_mut().for_each(|column| column.resize(len, 0));
        }
    }

    /// Sets what a node offers; what is reserved stays.
    pub(super) fn offer(&mut self, at: usize, offered: [u64; DIMENSIONS], slots: Option<u64>) {
        let record = &mut self.records[at];
        self.limited -= usize::from(record.limits_slots());
        record.offered = offered;
        record.slots = slots.map_or(u32::MAX, |slots| u32::try_from(slots).unwrap_or(u32::MAX));
        record.scale = offered.map(reciprocal);
        self.limited += usize::from(record.limits_slots());
        self.refresh(at);
    }

    /// Sets what a node offers of generic resources.
    pub(super) fn offer_generic(&mut self, at: usize, offered: &BTreeMap<String, u64>) {
        if offered.is_empty() {
            self.generic.remove(&at);
        } else {
            self.generic.insert(at, offered.clone());
        }
    }

    /// Whether a node has enough of every generic resource for one more beside `copies`.
    pub(super) fn has_generic(
        &self,
        at: usize,
        asks: &BTreeMap<String, u64>,
        copies: u32,
        profiles: &[Profile],
    ) -> bool {
        asks.iter().all(|(kind, ask)| {
            let offered = self.generic.get(&at).and_then(|kinds| kinds.get(kind)).copied().unwrap_or(0);
            let used: u128 = self.records[at].running.iter().fold(0, |sum, running| {
                let like = &profiles[running.profile.index()].like;
                let takes = u128::from(like.generic.get(kind).copied().unwrap_or(0));
                sum + takes * u128::from(running.count)
            });
            used + u128::from(*ask) * (u128::from(copies) + 1) <= u128::from(offered)
        })
    }

    fn refresh(&mut self, at: usize) {
        for dimension in 0..DIMENSIONS {
            self.free[dimension][at] = coarse(self.records[at].free(dimension));
        }
    }

    /// Counts one task more.
    pub(super) fn add(&mut self, at: usize, id: ProfileId, profile: &Profile) -> Left {
        let record = &mut self.records[at];
        for dimension in 0..DIMENSIONS {
            record.used[dimension] = record.used[dimension].saturating_add(profile.amounts[dimension]);
        }
        record.tasks += 1;
        let mut left = Left { alike: 0, own: 1 };
        for running in &mut record.running {
            if running.profile == id {
                running.count += 1;
                left.alike = running.count;
                left.own += running.count - 1;
            } else if self.services[running.profile.index()] == profile.service {
                left.own += running.count;
            }
        }
        if left.alike == 0 {
            left.alike = 1;
            record.running.push(Running { profile: id, count: 1 });
        }
        self.refresh(at);
        left
    }

    /// Counts one task less.
    pub(super) fn remove(&mut self, at: usize, id: ProfileId, profiles: &[Profile]) -> Left {
        let record = &mut self.records[at];
        let profile = &profiles[id.index()];
        let (mut entry, mut left) = (usize::MAX, Left { alike: 0, own: 0 });
        for (at, running) in record.running.iter_mut().enumerate() {
            if running.profile == id {
                running.count -= 1;
                (entry, left.alike) = (at, running.count);
                left.own += running.count;
            } else if self.services[running.profile.index()] == profile.service {
                left.own += running.count;
            }
        }
        assert!(entry != usize::MAX, "the task was counted here");
        if left.alike == 0 {
            record.running.swap_remove(entry);
        }
        record.tasks -= 1;
        for dimension in 0..DIMENSIONS {
            record.used[dimension] = if record.used[dimension] == u64::MAX {
                // Too much to be counted: what is left is added up again.
                record.running.iter().fold(0, |sum, running| {
                    let amount = profiles[running.profile.index()].amounts[dimension];
                    sum.saturating_add(amount.saturating_mul(u64::from(running.count)))
                })
            } else {
                record.used[dimension] - profile.amounts[dimension]
            };
        }
        self.refresh(at);
        left
    }

    /// Whether eleven bits of each amount tell that so much is free; `asks` as [`coarse`] has them, 0 for nothing. The
    /// columns of 100,000 nodes stay in the second cache, their records do not.
    #[inline]
    pub(super) fn surely_free(&self, at: usize, asks: [u16; DIMENSIONS]) -> bool {
        (0..DIMENSIONS).all(|dimension| asks[dimension] == 0 || self.free[dimension][at] > asks[dimension])
    }

    /// Positions where this much of a dimension, which is more than nothing, is free.
    pub(super) fn with_room(&self, dimension: usize, ask: u64) -> Bits {
        let mut room = Vec::with_capacity(self.len().div_ceil(64));
        for (word, mut unsure) in words::compare(&self.free[dimension], coarse(ask), &mut room) {
            while unsure != 0 {
                let bit = unsure.trailing_zeros();
                unsure &= unsure - 1;
                room[word] |= u64::from(self.records[word * 64 + bit as usize].free(dimension) >= ask) << bit;
            }
        }
        Bits::from_words(room)
    }

    /// Bytes on the heap.
    pub(super) fn bytes(&self) -> usize {
        let lists = self.records.iter().map(|record| &record.running).filter(|running| running.spilled());
        let lists: usize = lists.map(|running| running.capacity() * size_of::<Running>()).sum();
        self.records.capacity() * (size_of::<Record>() + DIMENSIONS * size_of::<u16>()) + lists
    }

    /// Whether any node limits its tasks.
    pub(super) fn limits_slots(&self) -> bool {
        self.limited > 0
    }

    /// Tells of which service a profile is; 0 for none.
    pub(super) fn introduce(&mut self, profile: ProfileId, service: u32) {
        if self.services.len() <= profile.index() {
            self.services.resize(profile.index() + 1, 0);
        }
        self.services[profile.index()] = service;
    }

    /// Tasks of a service on a node; 0 for no service.
    #[inline]
    pub(super) fn replicas(&self, at: usize, service: u32) -> u32 {
        if service == 0 {
            return 0;
        }
        let of = |running: &&Running| self.services[running.profile.index()] == service;
        self.records[at].running.iter().filter(of).map(|running| running.count).sum()
    }
}

/// An amount to eleven bits of precision, as its exponent and the ten bits after the first: in the same order as the
/// amounts themselves, and exact below 1,024.
pub(super) fn coarse(amount: u64) -> u16 {
    const BITS: u32 = 10;
    let exponent = amount.checked_ilog2().unwrap_or(0).saturating_sub(BITS);
    // The first bit of larger amounts counts the exponent up by one.
    let coarse = (u64::from(exponent) << BITS) + (amount >> exponent);
    u16::try_from(coarse).expect("at most 55 exponents")
}

#[cfg(test)]
mod tests {
    use super::{Record, coarse};

    #[test]
    fn a_record_is_two_cache_lines() {
        assert_eq!(size_of::<Record>(), 128);
    }

    #[test]
    fn coarse_amounts_keep_the_order() {
        assert!((0..2_048).all(|amount| u64::from(coarse(amount)) == amount));
        let mut last = 0;
        for bit in 0..64 {
            for amount in [1_u64 << bit, (1 << bit) + (1 << bit >> 3), (1 << bit) - 1 + (1 << bit)] {
                let now = coarse(amount);
                assert!(now >= last, "{amount}");
                last = now;
            }
        }
        assert_eq!((coarse(2_048), coarse(2_049), coarse(2_050)), (2_048, 2_048, 2_049));
        assert!(coarse(3_000_000_000) < coarse(3_010_000_000));
    }
}
