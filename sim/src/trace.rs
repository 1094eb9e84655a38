//! What happened, as a hash and, if asked for, as lines in a file.

use std::{
    fmt,
    fs::File,
    io::{BufWriter, Write as _},
};

/// The trace of a run. Equal hashes mean equal histories.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    hash: u64,
    file: Option<BufWriter<File>>,
}

impl Trace {
    pub(crate) fn new(file: Option<File>) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, file: file.map(BufWriter::new) }
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    /// Mixes words into the hash (FNV-1a over 64-bit words, with a rotation so that high bits count too).
    pub(crate) fn mix(&mut self, words: &[u64]) {
        for word in words {
            self.hash = (self.hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
        }
    }

    /// A line for people; costs nothing when no file was asked for.
    pub(crate) fn line(&mut self, at_ms: u64, words: impl FnOnce() -> String) {
        if let Some(file) = &mut self.file {
            // A trace that cannot be written is no reason to judge the run otherwise.
            let _ = writeln!(file, "{:>9}.{:03} {}", at_ms / 1_000, at_ms % 1_000, words());
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything that is promised held.
    Passed,
    /// An invariant was broken.
    Safety(String),
    /// The cluster did not come to rest where it should, or not in time.
    Liveness(String),
    /// The code under test panicked.
    Crash(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Safety(why) => write!(f, "safety broken: {why}"),
            Self::Liveness(why) => write!(f, "liveness broken: {why}"),
            Self::Crash(why) => write!(f, "crash: {why}"),
        }
    }
}
