//! Sets of node positions: dense bitsets, and postings that are a list while they are small.
//!
//! Owns the representation, knows nothing of what the sets mean. Pure, no tasks, no channels.
//!
//! Shape: `[nodes/64] u64`, bit `i` = `NodeIdx(i)`; words that are missing at the end count as zero, so that a set
//! need not be touched when the table grows. AND, OR and counting are O(nodes/64).

use super::words;

/// A position in the node table: dense, reused after a node is removed. Not an identity: that is `NodeId`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeIdx(pub(super) u32);

impl NodeIdx {
    /// The position as an array index.
    pub fn index(self) -> usize {
        self.0 as usize
    }

    pub(super) fn from_index(index: usize) -> Self {
        Self(u32::try_from(index).expect("the node table stays under 2^32 slots: each slot takes far more than a byte"))
    }
}

/// A dense set of node positions.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits {
    words: Vec<u64>,
}

/// Equal when the same positions are in both, whatever the lengths.
impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        let (short, long) = if self.words.len() <= other.words.len() { (self, other) } else { (other, self) };
        let (head, tail) = long.words.split_at(short.words.len());
        head == short.words && tail.iter().all(|word| *word == 0)
    }
}

impl Eq for Bits {}

impl Bits {
    pub(super) fn insert(&mut self, idx: NodeIdx) {
        let word = idx.index() / 64;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (idx.index() % 64);
    }

    pub(super) fn remove(&mut self, idx: NodeIdx) {
        if let Some(word) = self.words.get_mut(idx.index() / 64) {
            *word &= !(1 << (idx.index() % 64));
        }
    }

    pub(super) fn assign(&mut self, idx: NodeIdx, member: bool) {
        if member {
            self.insert(idx);
        } else {
            self.remove(idx);
        }
    }

    pub(super) fn contains(&self, idx: NodeIdx) -> bool {
        self.words.get(idx.index() / 64).is_some_and(|word| word & (1 << (idx.index() % 64)) != 0)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Number of members.
    pub(super) fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Keeps what is in both.
    pub(super) fn and(&mut self, other: &Self) {
        self.words.truncate(other.words.len());
        for (word, theirs) in self.words.iter_mut().zip(&other.words) {
            *word &= theirs;
        }
    }

    /// Keeps what is not in the other.
    pub(super) fn and_not(&mut self, other: &Self) {
        for (word, theirs) in self.words.iter_mut().zip(&other.words) {
            *word &= !theirs;
        }
    }

    /// Adds what is in the other.
    pub(super) fn or(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (word, theirs) in self.words.iter_mut().zip(&other.words) {
            *word |= theirs;
        }
    }

    /// Members in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = NodeIdx> + '_ {
        self.words.iter().enumerate().flat_map(|(at, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                if left == 0 {
                    return None;
                }
                let bit = left.trailing_zeros() as usize;
                left &= left - 1;
                Some(NodeIdx::from_index(at * 64 + bit))
            })
        })
    }

    /// Members among `len` positions from `start`, both multiples of `len`, a power of two; in ascending order.
    pub(super) fn within(&self, start: usize, len: usize) -> impl Iterator<Item = usize> + '_ {
        let words = if len >= 64 { len / 64 } else { 1 };
        let mask = if len >= 64 { u64::MAX } else { ((1 << len) - 1) << (start % 64) };
        let first = start / 64;
        let last = self.words.len().min(first + words);
        let words = self.words.get(first..last).unwrap_or_default();
        words.iter().enumerate().flat_map(move |(at, word)| {
            let mut left = *word & mask;
            std::iter::from_fn(move || {
                if left == 0 {
                    return None;
                }
                let bit = left.trailing_zeros() as usize;
                left &= left - 1;
                Some((first + at) * 64 + bit)
            })
        })
    }

    /// Takes sets as words.
    pub(super) fn from_words(words: Vec<u64>) -> Self {
        Self { words }
    }

    /// Keeps what is in the other too, or with `negated` what is not. Returns the numbers of members of the other and
    /// of what is left.
    pub(super) fn narrow(&mut self, other: &Self, negated: bool) -> (usize, usize) {
        words::narrow(&mut self.words, &other.words, negated)
    }

    /// The word of 64 positions; zero beyond the end.
    #[inline]
    pub(super) fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or(0)
    }

    /// Bytes on the heap.
    pub(super) fn bytes(&self) -> usize {
        self.words.capacity() * size_of::<u64>()
    }

    /// The member with `rank` smaller ones before it.
    pub(super) fn nth(&self, rank: usize) -> Option<NodeIdx> {
        let mut left = rank;
        for (at, word) in self.words.iter().enumerate() {
            let ones = word.count_ones() as usize;
            if left >= ones {
                left -= ones;
                continue;
            }
            let mut word = *word;
            for _ in 0..left {
                word &= word - 1;
            }
            return Some(NodeIdx::from_index(at * 64 + word.trailing_zeros() as usize));
        }
        None
    }
}

impl FromIterator<NodeIdx> for Bits {
    fn from_iter<I: IntoIterator<Item = NodeIdx>>(members: I) -> Self {
        let mut bits = Self::default();
        members.into_iter().for_each(|idx| bits.insert(idx));
        bits
    }
}

/// Up to this length a posting stays a list whatever the table's size: two cache lines of positions.
const LIST_LEN_ALWAYS: usize = 32;

/// A list costs 4 bytes a member, a bitset 1/8 byte a slot: they meet at slots/32 members.
const SLOTS_PER_LIST_MEMBER: usize = 32;

/// The nodes that have one value of one attribute: a sorted list while small, a bitset above.
///
/// Most values (names, ids) belong to one node and a few (zones, architectures) to very many; a bitset for each
/// name would cost nodes²/8 bytes.
#[derive(Clone, Debug)]
pub(super) enum Posting {
    List(Vec<NodeIdx>),
    Dense { bits: Bits, len: usize },
}

impl Default for Posting {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

/// Equal when the same nodes are in both: the form depends on how the set grew.
impl PartialEq for Posting {
    fn eq(&self, other: &Self) -> bool {
        let collect = |posting: &Self| {
            let mut bits = Bits::default();
            posting.add_to(&mut bits);
            bits
        };
        collect(self) == collect(other)
    }
}

impl Eq for Posting {}

impl Posting {
    /// Adds a node; `slots` is the size of the table. Adding twice changes nothing.
    pub(super) fn insert(&mut self, idx: NodeIdx, slots: usize) {
        match self {
            Self::List(list) => {
                if let Err(at) = list.binary_search(&idx) {
                    list.insert(at, idx);
                }
                if list.len() > LIST_LEN_ALWAYS && list.len() > slots / SLOTS_PER_LIST_MEMBER {
                    let len = list.len();
                    *self = Self::Dense { bits: list.iter().copied().collect(), len };
                }
            }
            Self::Dense { bits, len } => {
                *len += usize::from(!bits.contains(idx));
                bits.insert(idx);
            }
        }
    }

    /// Takes a node out; `slots` is the size of the table. Taking it out twice changes nothing.
    pub(super) fn remove(&mut self, idx: NodeIdx, slots: usize) {
        match self {
            Self::List(list) => {
                if let Ok(at) = list.binary_search(&idx) {
                    list.remove(at);
                }
            }
            Self::Dense { bits, len } => {
                *len -= usize::from(bits.contains(idx));
                bits.remove(idx);
                // Half of the limit that made it dense, so that a set at the limit does not flip at every change.
                if *len <= LIST_LEN_ALWAYS / 2 || *len < slots / SLOTS_PER_LIST_MEMBER / 2 {
                    *self = Self::List(bits.iter().collect());
                }
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::List(list) => list.is_empty(),
            Self::Dense { len, .. } => *len == 0,
        }
    }

    /// Adds the members to a set.
    pub(super) fn add_to(&self, set: &mut Bits) {
        match self {
            Self::List(list) => list.iter().for_each(|idx| set.insert(*idx)),
            Self::Dense { bits, .. } => set.or(bits),
        }
    }

    /// The members as a set, where they are kept as one.
    pub(super) fn as_bits(&self) -> Option<&Bits> {
        match self {
            Self::List(_) => None,
            Self::Dense { bits, .. } => Some(bits),
        }
    }

    /// Takes the members out of a set.
    pub(super) fn take_from(&self, set: &mut Bits) {
        match self {
            Self::List(list) => list.iter().for_each(|idx| set.remove(*idx)),
            Self::Dense { bits, .. } => set.and_not(bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn bits(members: &[u32]) -> Bits {
        members.iter().map(|i| NodeIdx(*i)).collect()
    }

    #[test]
    fn set_operations_agree_with_a_tree_set() {
        let (a, b) = ([0, 1, 63, 64, 200], [1, 64, 65]);
        let check = |got: &Bits, expected: &[u32]| {
            assert_eq!(got.iter().map(|i| i.0).collect::<Vec<_>>(), expected);
            assert_eq!(got.len(), expected.len());
            for (rank, idx) in expected.iter().enumerate() {
                assert_eq!(got.nth(rank), Some(NodeIdx(*idx)));
            }
            assert_eq!(got.nth(expected.len()), None);
        };
        let with = |op: fn(&mut Bits, &Bits), x: &[u32], y: &[u32]| {
            let mut out = bits(x);
            op(&mut out, &bits(y));
            out
        };
        check(&with(Bits::and, &a, &b), &[1, 64]);
        check(&with(Bits::and, &b, &a), &[1, 64]);
        check(&with(Bits::and_not, &a, &b), &[0, 63, 200]);
        check(&with(Bits::and_not, &b, &a), &[65]);
        check(&with(Bits::or, &b, &a), &[0, 1, 63, 64, 65, 200]);
        check(&with(Bits::or, &a, &b), &[0, 1, 63, 64, 65, 200]);
    }

    #[test]
    fn equality_ignores_trailing_zero_words() {
        let mut long = bits(&[3, 500]);
        long.remove(NodeIdx(500));
        assert_eq!(long, bits(&[3]));
        assert_eq!(bits(&[3]), long);
        assert_ne!(bits(&[3, 500]), bits(&[3]));
        assert!(!long.is_empty() && bits(&[]).is_empty());
    }

    #[test]
    fn a_posting_changes_its_form_and_keeps_its_members() {
        let slots = 100;
        let mut posting = Posting::default();
        let mut model = BTreeSet::new();
        let members = |posting: &Posting| {
            let mut set = Bits::default();
            posting.add_to(&mut set);
            set.iter().map(|i| i.0).collect::<BTreeSet<_>>()
        };
        for i in (0..100).map(|i| i * 37 % 100) {
            posting.insert(NodeIdx(i), slots);
            posting.insert(NodeIdx(i), slots);
            model.insert(i);
            assert_eq!(members(&posting), model);
        }
        assert!(matches!(posting, Posting::Dense { len: 100, .. }));
        for i in (0..100).map(|i| i * 61 % 100) {
            posting.remove(NodeIdx(i), slots);
            posting.remove(NodeIdx(i), slots);
            model.remove(&i);
            assert_eq!(members(&posting), model);
            assert_eq!(posting.is_empty(), model.is_empty());
        }
        assert!(matches!(posting, Posting::List(_)));
    }

    #[test]
    fn taking_a_posting_out_of_a_set() {
        for count in [3_u32, 60] {
            let mut posting = Posting::default();
            (0..count).for_each(|i| posting.insert(NodeIdx(i * 2), 128));
            let mut set: Bits = (0..128).map(NodeIdx).collect();
            posting.take_from(&mut set);
            assert_eq!(set.len(), 128 - count as usize);
            assert!(!set.contains(NodeIdx(2)) && set.contains(NodeIdx(1)));
        }
    }
}
