//! The next nodes of one class, in order: a short list that is filled from the order of all nodes and taken from its end.
//!
//! Owns the promise that nothing before `bound` is missing. It must not know what a node is: entries are checked by who
//! takes them, since other classes make nodes worse without a word.

use crate::scheduler::rank::LEVELS;

/// Load and position: what nodes with equally many own tasks are ordered by.
pub(super) type Standing = (u32, u32);

/// After every node.
pub(super) const END: Standing = (LEVELS as u32, 0);

/// Longest front; what is beyond is found again.
const LEN_MAX: usize = 128;

#[derive(Clone, Debug, Default)]
pub(super) struct Front {
    /// The best last. Entries may be worse by now.
    nodes: Vec<Standing>,
    /// Every node that is not in the list stands here or later, or had no room when it was looked at and has not got
    /// better since.
    bound: Standing,
}

impl Front {
    /// The best entry.
    pub(super) fn best(&self) -> Option<Standing> {
        self.nodes.last().copied()
    }

    /// Takes the best entry out.
    pub(super) fn drop_best(&mut self) {
        self.nodes.pop();
    }

    pub(super) fn bound(&self) -> Standing {
        self.bound
    }

    /// A node stands here now. True when the list got too long for what is last in it, and the bound is nearer.
    #[inline]
    pub(super) fn offer(&mut self, standing: Standing) -> bool {
        if standing >= self.bound {
            return false;
        }
        let at = self.nodes.partition_point(|other| *other > standing);
        if self.nodes.get(at) == Some(&standing) {
            return false;
        }
        self.nodes.insert(at, standing);
        let too_long = self.nodes.len() > LEN_MAX;
        if too_long {
            self.bound = self.nodes.remove(0);
        }
        too_long
    }

    /// What comes from `bound` on, in order, up to a new bound. The list must be empty.
    pub(super) fn fill(&mut self, ascending: Vec<Standing>, bound: Standing) {
        self.nodes = ascending;
        self.nodes.reverse();
        self.bound = bound;
    }

    /// Whether a node that stands here, and has room, is missing. One that got worse since it was entered is found by
    /// its position.
    pub(super) fn lacks(&self, standing: Standing) -> bool {
        standing < self.bound && !self.nodes.iter().any(|(level, at)| *at == standing.1 && *level <= standing.0)
    }

    /// Bytes on the heap.
    pub(super) fn bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Standing>()
    }
}
