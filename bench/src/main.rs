//! What decisions of the scheduler cost. `cargo xtask bench scheduler` runs it and writes the figures down.
//!
//! Arguments: numbers of nodes, and `questions` for what is asked of a whole core alone, or `cycle` for one case alone
//! ([`cycle`]). One JSON object a line: `{"case","metric","unit","value"}`, and `"at_most"` where there is a goal.

mod calibration;
mod cases;
mod cycle;
mod figures;
mod questions;
mod world;

/// A cluster has at most 10,000 hosts (docs/limits.md); the scheduler alone is measured beyond.
const QUESTIONS_NODES_MAX: usize = 10_000;

fn main() {
    let has = |word: &str| std::env::args().any(|arg| arg == word);
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![1_000, 10_000, 100_000] } else { sizes };
    if has("cycle") {
        let [nodes, classes] = sizes[..] else { panic!("usage: skein-bench cycle NODES CLASSES [all]") };
        let features = if has("all") { world::Features::All } else { world::Features::Plain };
        return cycle::run(nodes, classes, features);
    }
    if !has("questions") {
        cases::run(&sizes);
    }
    sizes.iter().filter(|nodes| **nodes <= QUESTIONS_NODES_MAX).for_each(|nodes| questions::run(*nodes));
}
