//! What decisions of the scheduler cost. `cargo xtask bench scheduler` runs it and writes the figures down.
//!
//! One line for each figure: case, metric, unit, value and the most that it may be, with tabs between them.

mod calibration;
mod cases;
mod figures;
mod world;

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![1_000, 10_000, 100_000] } else { sizes };
    cases::run(&sizes);
}
