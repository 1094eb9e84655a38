//! What a decision looked at: for comparisons of machines and sizes, where times say less.

/// Counts of one decision, without its commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// 64-bit words of sets: of the order and of the class, a cache line each at worst.
    pub words: u64,
    /// Entries of fronts and inboxes, and bounds of blocks.
    pub entries: u64,
    /// Records of nodes, two cache lines each.
    pub records: u64,
}

impl Work {
    /// Cache lines at most, all of them counted as different.
    pub fn lines(&self) -> u64 {
        self.words + self.entries + 2 * self.records
    }

    /// Words of the order that were looked at, each with the word of the class.
    pub(super) fn looks(&self) -> i64 {
        i64::try_from(self.words / 2).unwrap_or(i64::MAX)
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.words += other.words;
        self.entries += other.entries;
        self.records += other.records;
    }
}
