//! All nodes in the order of their load, shared by every class that spreads: which nodes are the emptiest does not
//! depend on who asks.
//!
//! Owns one set of positions per load that occurs, in the order of loads and, within one, of positions. Moving a node is
//! O(1) but for sets that are small lists. It must not know what a load is made of: [`LEVELS`] of them, smaller is
//! emptier.
//!
//! Shape: `slots = [LEVELS] u32` into `sets`; `occupied = [LEVELS / 64] u64` and a summary of it, so that the next load
//! that occurs is found in three loads.

use crate::scheduler::rank::LEVELS;

const ABSENT: u32 = u32::MAX;

/// Longest list; above a set is a bitset. 256 bytes of positions.
const LIST_LEN_MAX: usize = 64;

#[derive(Clone, Debug)]
pub(super) enum Set {
    /// Sorted.
    List(Vec<u32>),
    /// `words` by position, `summary` by word.
    Dense { words: Vec<u64>, summary: Vec<u64>, len: usize },
}

#[derive(Clone, Debug, Default)]
pub(super) struct Order {
    /// By position.
    level_of: Vec<u32>,
    slots: Vec<u32>,
    sets: Vec<Set>,
    free: Vec<u32>,
    occupied: Vec<u64>,
    summary: Vec<u64>,
}

impl Order {
    /// Room for so many positions.
    pub(super) fn grow(&mut self, positions: usize) {
        self.level_of.resize(positions, ABSENT);
    }

    /// Puts a node at a level, from wherever it was.
    pub(super) fn put(&mut self, at: usize, level: u32) {
        if self.level_of[at] == level {
            return;
        }
        self.take(at);
        if self.slots.is_empty() {
            // Not before it is needed: half a megabyte.
            self.slots = vec![ABSENT; LEVELS];
            self.occupied = vec![0; LEVELS / 64];
            self.summary = vec![0; (LEVELS / 64).div_ceil(64)];
        }
        self.level_of[at] = level;
        let slot = &mut self.slots[level as usize];
        if *slot == ABSENT {
            *slot = self.free.pop().unwrap_or_else(|| {
                self.sets.push(Set::List(Vec::new()));
                u32::try_from(self.sets.len() - 1).expect("no more sets than levels")
            });
            let word = level as usize / 64;
            self.occupied[word] |= 1 << (level % 64);
            self.summary[word / 64] |= 1 << (word % 64);
        }
        self.sets[*slot as usize].insert(at, self.level_of.len());
    }

    /// Takes a node out.
    pub(super) fn take(&mut self, at: usize) {
        let level = std::mem::replace(&mut self.level_of[at], ABSENT);
        if level == ABSENT {
            return;
        }
        let slot = self.slots[level as usize];
        let set = &mut self.sets[slot as usize];
        let there = set.remove(at);
        debug_assert!(there, "a node stands in the set of its level");
        if set.is_empty() {
            // A bitset that is empty is kept for the next level that needs one.
            self.slots[level as usize] = ABSENT;
            self.free.push(slot);
            let word = level as usize / 64;
            self.occupied[word] &= !(1 << (level % 64));
            if self.occupied[word] == 0 {
                self.summary[word / 64] &= !(1 << (word % 64));
            }
        }
    }

    /// Where a node stands; none when it is not in the order.
    pub(super) fn level(&self, at: usize) -> Option<u32> {
        self.level_of.get(at).copied().filter(|level| *level != ABSENT)
    }

    /// The first level from `from` on that occurs, with its nodes.
    #[inline]
    pub(super) fn next(&self, from: u32) -> Option<(u32, &Set)> {
        let mut word = from as usize / 64;
        let mut bits = self.occupied.get(word)? & (u64::MAX << (from % 64));
        if bits == 0 {
            let mut group = (word + 1) / 64;
            let mut words = self.summary.get(group)? & (u64::MAX << ((word + 1) % 64));
            while words == 0 {
                group += 1;
                words = *self.summary.get(group)?;
            }
            word = group * 64 + words.trailing_zeros() as usize;
            bits = self.occupied[word];
        }
        let level = (word * 64) as u32 + bits.trailing_zeros();
        Some((level, &self.sets[self.slots[level as usize] as usize]))
    }

    /// Bytes on the heap.
    pub(super) fn bytes(&self) -> usize {
        let sets: usize = self.sets.iter().map(|set| size_of::<Set>() + set.bytes()).sum();
        (self.level_of.capacity() + self.slots.capacity()) * size_of::<u32>() + LEVELS / 8 + sets
    }
}

impl Default for Set {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl Set {
    /// Adds a node that is not there; `positions` is the size of the table.
    pub(super) fn insert(&mut self, at: usize, positions: usize) {
        match self {
            Self::List(list) => {
                let at = at as u32;
                if let Err(place) = list.binary_search(&at) {
                    list.insert(place, at);
                }
                if list.len() > LIST_LEN_MAX {
                    let mut dense = Self::Dense {
                        words: vec![0; positions.div_ceil(64)],
                        summary: vec![0; positions.div_ceil(64 * 64)],
                        len: 0,
                    };
                    list.iter().for_each(|at| dense.insert(*at as usize, positions));
                    *self = dense;
                }
            }
            Self::Dense { words, summary, len } => {
                if words.len() < positions.div_ceil(64) {
                    words.resize(positions.div_ceil(64), 0);
                    summary.resize(positions.div_ceil(64 * 64), 0);
                }
                if words[at / 64] == 0 {
                    summary[at / 64 / 64] |= 1 << (at / 64 % 64);
                }
                words[at / 64] |= 1 << (at % 64);
                *len += 1;
            }
        }
    }

    /// Takes out a node; false when it is not there.
    pub(super) fn remove(&mut self, at: usize) -> bool {
        match self {
            Self::List(list) => {
                let place = list.binary_search(&(at as u32));
                place.map(|place| list.remove(place)).is_ok()
            }
            Self::Dense { words, summary, len } => {
                let Some(word) = words.get_mut(at / 64).filter(|word| **word & (1 << (at % 64)) != 0) else {
                    return false;
                };
                *word &= !(1 << (at % 64));
                if *word == 0 {
                    summary[at / 64 / 64] &= !(1 << (at / 64 % 64));
                }
                *len -= 1;
                // Half of what made it dense, so that a set at the limit does not flip at every change.
                if *len == LIST_LEN_MAX / 2 {
                    let mut list = Vec::with_capacity(*len);
                    Self::Dense { words: std::mem::take(words), summary: std::mem::take(summary), len: *len }.each(
                        |word, bits| {
                            each_bit(word, bits, |at| {
                                list.push(at as u32);
                                true
                            })
                        },
                    );
                    *self = Self::List(list);
                }
                true
            }
        }
    }

    pub(super) fn contains(&self, at: usize) -> bool {
        match self {
            Self::List(list) => list.binary_search(&(at as u32)).is_ok(),
            Self::Dense { words, .. } => words.get(at / 64).is_some_and(|word| word & (1 << (at % 64)) != 0),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::List(list) => list.len(),
            Self::Dense { len, .. } => *len,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::List(list) => list.is_empty(),
            Self::Dense { len, .. } => *len == 0,
        }
    }

    /// Visits the words that are not empty, in ascending order, until `visit` says stop (false). Returns false when it
    /// was stopped.
    #[inline]
    pub(super) fn each(&self, visit: impl FnMut(usize, u64) -> bool) -> bool {
        self.each_from(0, visit)
    }

    /// The same for the positions from `first` on.
    #[inline]
    pub(super) fn each_from(&self, first: usize, mut visit: impl FnMut(usize, u64) -> bool) -> bool {
        match self {
            Self::List(list) => {
                let start = list.partition_point(|at| (*at as usize) < first);
                list[start..].iter().all(|at| visit(*at as usize / 64, 1 << (at % 64)))
            }
            Self::Dense { words, summary, .. } => {
                let start = first / 64;
                summary.iter().enumerate().skip(start / 64).all(|(group, bits)| {
                    let before = if group == start / 64 { !(u64::MAX << (start % 64)) } else { 0 };
                    each_bit(group, bits & !before, |word| {
                        let before = if word == start { !(u64::MAX << (first % 64)) } else { 0 };
                        visit(word, words[word] & !before)
                    })
                })
            }
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::List(list) => list.capacity() * size_of::<u32>(),
            Self::Dense { words, summary, .. } => (words.capacity() + summary.capacity()) * size_of::<u64>(),
        }
    }
}

/// Visits the positions of one word's bits; false when it was stopped.
#[inline]
pub(super) fn each_bit(word: usize, bits: u64, mut visit: impl FnMut(usize) -> bool) -> bool {
    let mut left = bits;
    while left != 0 {
        if !visit(word * 64 + left.trailing_zeros() as usize) {
            return false;
        }
        left &= left - 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::rng::Rng;

    #[test]
    fn nodes_come_by_level_then_position() {
        let (mut order, mut model, mut rng) = (Order::default(), BTreeMap::new(), Rng::new(7));
        order.grow(1_000);
        for step in 0..20_000 {
            let at = (rng.next_u64() % 1_000) as usize;
            // Few levels first, so that sets become dense, then many, so that they become lists again.
            let levels = if step < 10_000 { 4 } else { LEVELS as u64 };
            if rng.next_u64().is_multiple_of(4) {
                order.take(at);
                model.remove(&at);
            } else {
                let level = (rng.next_u64() % levels) as u32;
                order.put(at, level);
                model.insert(at, level);
            }
            if step % 500 == 0 {
                let mut expected: Vec<_> = model.iter().map(|(at, level)| (*level, *at)).collect();
                expected.sort_unstable();
                let (mut found, mut from) = (Vec::new(), 0);
                while let Some((level, set)) = order.next(from) {
                    set.each(|word, bits| {
                        each_bit(word, bits, |at| {
                            found.push((level, at));
                            true
                        })
                    });
                    from = level + 1;
                }
                assert_eq!(found, expected);
                assert!(model.iter().all(|(at, level)| order.level(*at) == Some(*level)));
            }
        }
    }
}
