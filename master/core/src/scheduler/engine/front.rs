//! The next nodes of one class, in order: a short list that is filled from the order of all nodes and taken from its end.
//!
//! Owns the promise that nothing before `bound` is missing but what is in the class's inbox. It must not know what a
//! node is: entries are checked by who takes them, since other classes make nodes worse without a word.

use crate::scheduler::rank::LEVELS;

/// Load and position: what nodes with equally many own tasks are ordered by. One number, so that comparing is one
/// instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Standing(u64);

impl Standing {
    #[inline]
    pub(super) fn new(level: u32, at: usize) -> Self {
        Self(u64::from(level) << 32 | at as u64)
    }

    #[inline]
    pub(super) fn level(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline]
    pub(super) fn at(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }
}

/// After every node.
pub(super) const END: Standing = Standing((LEVELS as u64) << 32);

/// Longest front; half of a longer one is dropped, and found again.
const LEN_MAX: usize = 64;

/// Nodes of an inbox: four cache lines with what else is in it.
const INBOX_LEN: usize = 62;

/// Nodes of which a class with fronts was told that they got better, and which it did not look at yet.
///
/// Most of them another class has taken before this one is asked: so to tell is one store, and to look at them all when
/// asked is cheaper than to enter each in its place at once.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Inbox {
    len: u32,
    nodes: [u32; INBOX_LEN],
    /// Whether it was full since the class was asked last.
    pub(super) was_full: bool,
}

impl Default for Inbox {
    fn default() -> Self {
        Self { len: 0, nodes: [0; INBOX_LEN], was_full: false }
    }
}

impl Inbox {
    /// False when it is full.
    #[inline]
    pub(super) fn push(&mut self, at: usize) -> bool {
        let place = self.nodes.get_mut(self.len as usize);
        let room = place.is_some();
        if let Some(place) = place {
            *place = at as u32;
            self.len += 1;
        }
        room
    }

    /// What is in it, in the order in which it came.
    pub(super) fn nodes(&self) -> &[u32] {
        &self.nodes[..self.len as usize]
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }
}

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

    /// A node stands here now.
    #[inline]
    pub(super) fn offer(&mut self, standing: Standing) {
        if standing >= self.bound {
            return;
        }
        let at = self.nodes.partition_point(|other| *other > standing);
        if self.nodes.get(at) == Some(&standing) {
            return;
        }
        self.nodes.insert(at, standing);
        if self.nodes.len() > LEN_MAX {
            self.bound = self.nodes.drain(..LEN_MAX / 2).next_back().expect("there are as many");
        }
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
        standing < self.bound && !self.nodes.iter().any(|entry| entry.at() == standing.at() && *entry <= standing)
    }

    /// Bytes on the heap.
    pub(super) fn bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Standing>()
    }
}
