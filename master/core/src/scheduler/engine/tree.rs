//! A tree of minima over blocks of nodes: which block holds the best node, in a few cache lines.
//!
//! Owns one key per block, smaller is better, [`NONE`] for a block without a candidate. Every level above holds the
//! minimum of eight neighbours, one cache line, so finding the first smallest key of 12,500 blocks reads five lines.
//! It must not know what keys mean: here they are lower bounds, which the caller verifies and corrects.
//!
//! Shape: `levels[0] = [blocks] u64`, `levels[k+1] = [levels[k] / 8] u64`, the last one has one entry.

/// The key of a block without a candidate.
pub(super) const NONE: u64 = u64::MAX;

/// Children of one node: a cache line of keys.
const FANOUT: usize = 8;

#[derive(Clone, Debug, Default)]
pub(super) struct MinTree {
    levels: Vec<Vec<u64>>,
}

impl MinTree {
    /// A tree over these keys; O(keys).
    pub(super) fn new(keys: Vec<u64>) -> Self {
        let mut levels = vec![keys];
        while levels.last().is_some_and(|level| level.len() > 1) {
            let below = levels.last().expect("there is one");
            levels.push(below.chunks(FANOUT).map(smallest).collect());
        }
        Self { levels }
    }

    /// Whether it has no blocks.
    pub(super) fn is_empty(&self) -> bool {
        self.levels.is_empty()
    }

    /// The key of one block.
    pub(super) fn get(&self, block: usize) -> u64 {
        self.levels[0][block]
    }

    /// The first of the blocks with the smallest key, and that key; none when no block has a candidate.
    pub(super) fn first(&self) -> Option<(usize, u64)> {
        let (top, below) = self.levels.split_last()?;
        let key = *top.first()?;
        if key == NONE {
            return None;
        }
        let mut at = 0;
        for level in below.iter().rev() {
            let start = at * FANOUT;
            let end = level.len().min(start + FANOUT);
            at = start + level[start..end].iter().position(|k| *k == key).expect("a parent is one of its children");
        }
        Some((at, key))
    }

    /// Lowers the key of a block; a higher one changes nothing.
    pub(super) fn lower(&mut self, block: usize, key: u64) {
        let mut at = block;
        for level in &mut self.levels {
            if level[at] <= key {
                return;
            }
            level[at] = key;
            at /= FANOUT;
        }
    }

    /// Sets the key of a block, whether lower or higher.
    pub(super) fn set(&mut self, block: usize, key: u64) {
        let Some((leaves, above)) = self.levels.split_first_mut() else { return };
        leaves[block] = key;
        let (mut below, mut at) = (&*leaves, block / FANOUT);
        for level in above {
            let start = at * FANOUT;
            let best = smallest(&below[start..below.len().min(start + FANOUT)]);
            if level[at] == best {
                return;
            }
            level[at] = best;
            below = level;
            at /= FANOUT;
        }
    }

    /// Bytes on the heap.
    pub(super) fn bytes(&self) -> usize {
        self.levels.iter().map(|level| level.capacity() * size_of::<u64>()).sum()
    }
}

fn smallest(keys: &[u64]) -> u64 {
    keys.iter().copied().fold(NONE, u64::min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn it_finds_the_first_smallest_after_any_change() {
        for blocks in [0_usize, 1, 2, 7, 8, 9, 63, 64, 65, 600] {
            let mut keys = vec![NONE; blocks];
            let mut tree = MinTree::new(keys.clone());
            let mut rng = Rng::new(blocks as u64);
            for _ in 0..blocks * 20 {
                let (block, key) = ((rng.next_u64() as usize) % blocks, rng.next_u64() % 50);
                let key = if key > 40 { NONE } else { key };
                if rng.next_u64().is_multiple_of(2) {
                    tree.lower(block, key);
                    keys[block] = keys[block].min(key);
                } else {
                    tree.set(block, key);
                    keys[block] = key;
                }
                let best = keys.iter().copied().enumerate().min_by_key(|(at, key)| (*key, *at)).filter(|b| b.1 != NONE);
                assert_eq!(tree.first(), best);
                assert_eq!(tree.get(block), keys[block]);
            }
        }
    }
}
