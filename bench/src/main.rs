//! What decisions of the scheduler cost. `cargo xtask bench scheduler` runs it and writes the figures down.
//!
//! One JSON object a line: `{"case","metric","unit","value"}`, and `"at_most"` where there is a goal.

mod calibration;
mod cases;
mod figures;
mod world;

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![1_000, 10_000, 100_000] } else { sizes };
    cases::run(&sizes);
}
