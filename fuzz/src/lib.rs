//! How every fuzz target of this repository runs: inputs from bolero's generators, a limit of memory and of time for
//! each, kept inputs first, the same inputs for the same seed.
//!
//! A target stands beside the parser that it feeds, as a test in a module named `fuzz`, so that it reaches what is
//! private. It takes bytes, as the parser does from a stranger, and says whether they were accepted. What is kept for a
//! target (valid samples and regressions) are files in `testdata/fuzz/<target>` of its package: each runs as it is, and
//! is what generated inputs are made from. docs/testing.md tells how to run and extend them.
//!
//! bolero's own engine for tests takes its seeds from the operating system, so it cannot keep a green commit green; this
//! one, on bolero's drivers and shrinker, derives every input from one number. Threads: one per running target, which
//! watches the time.

mod generate;
mod json;
mod run;

pub use self::{
    generate::{Form, Mutants, Pick, mutate_bytes, mutate_text},
    json::mutate as mutate_json,
    run::{INPUT_TIME_MAX, Target, Verdict},
};

/// The target of this name, with what the calling package keeps for it.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        $crate::Target::new(env!("CARGO_MANIFEST_DIR"), $name)
    };
}
