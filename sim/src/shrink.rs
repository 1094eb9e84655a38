//! Fewer faults that still break it: delta debugging (Zeller, Hildebrandt: "Simplifying and isolating failure-inducing
//! input", 2002) over the numbers of a schedule.

use crate::{
    Arrival, Verdict,
    world::{Config, Outcome, World},
};

/// Runs one world; a panic of the code under test is an outcome too.
pub fn run(config: &Config, arrivals: &[Arrival]) -> Outcome {
    let (config, arrivals) = (config.clone(), arrivals.to_vec());
    let outcome = std::panic::catch_unwind(|| World::new(config, arrivals, None).run());
    outcome.unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().cloned();
        let words = words.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Outcome {
            verdict: Verdict::Crash(words.unwrap_or_else(|| "a panic without words".into())),
            at_ms: 0,
            hash: 0,
            stats: Default::default(),
            faults: Vec::new(),
        }
    })
}

/// The fewest faults with which the world still fails, after at most `runs_max` runs.
pub fn shrink(config: &Config, arrivals: &[Arrival], faults: Vec<u32>, runs_max: usize) -> Vec<u32> {
    fewest(faults, runs_max, |only| {
        let config = Config { only: Some(only.to_vec()), ..config.clone() };
        run(&config, arrivals).verdict != Verdict::Passed
    })
}

/// A subset of `all` of which no part can be left out, as far as `runs_max` questions tell. `fails` holds for `all`.
pub fn fewest(all: Vec<u32>, runs_max: usize, mut fails: impl FnMut(&[u32]) -> bool) -> Vec<u32> {
    if fails(&[]) {
        return Vec::new();
    }
    let mut kept = all;
    let mut parts = 2;
    let mut runs = 1;
    while kept.len() > 1 && runs < runs_max {
        let size = kept.len().div_ceil(parts);
        let without = |at: usize| -> Vec<u32> {
            kept.chunks(size).enumerate().filter(|(i, _)| *i != at).flat_map(|(_, c)| c.iter().copied()).collect()
        };
        let smaller = (0..kept.len().div_ceil(size)).map(without).find(|rest| {
            runs += 1;
            runs <= runs_max && fails(rest)
        });
        match smaller {
            Some(rest) => {
                kept = rest;
                parts = (parts - 1).max(2);
            }
            None if size == 1 => break,
            None => parts = (parts * 2).min(kept.len()),
        }
    }
    kept
}
