//! What the machine can do at the same footprint, so that figures of different machines can be compared.

use std::hint::black_box;

use master_core::{rng::Rng, scheduler::words::narrow};

use crate::figures::{cpu_per, figure};

/// A chase through as many cache lines as there are nodes, and an AND and count over as many bits.
pub(crate) fn run(nodes: usize) {
    let case = format!("this machine at {nodes} nodes");
    figure(&case, "a dependent load from a line per node", "ns", chase(nodes));
    figure(&case, "AND and count of two rows", "ns", and_count(nodes));
}

fn chase(lines: usize) -> f64 {
    // One cycle through all lines in random order (Sattolo's algorithm).
    let mut next: Vec<[usize; 8]> = (0..lines).map(|at| [at; 8]).collect();
    let mut rng = Rng::new(1);
    for at in (1..lines).rev() {
        let other = (rng.next_u64() % at as u64) as usize;
        next.swap(at, other);
    }
    let loads = 2_000_000;
    cpu_per(loads, || {
        let mut at = 0;
        for _ in 0..loads {
            at = next[at][0];
        }
        black_box(at);
    })
}

/// What an explanation of `filters` filters cannot do without: each filter's row is counted alone and within what the
/// ones before it left. Nanoseconds of CPU.
pub(crate) fn count_filters(bits: usize, filters: usize) -> f64 {
    let mut rng = Rng::new(3);
    let mut row = || (0..bits.div_ceil(64)).map(|_| rng.next_u64()).collect::<Vec<_>>();
    let rows: Vec<_> = (0..filters).map(|_| row()).collect();
    let mut left = row();
    let rounds = 2_000;
    cpu_per(rounds, || {
        for _ in 0..rounds {
            left.fill(u64::MAX);
            let mut counted = (0, 0);
            for row in black_box(&rows) {
                let (alone, in_turn) = narrow(&mut left, row, false);
                counted = (counted.0 + alone, counted.1 + in_turn);
            }
            black_box(counted);
        }
    })
}

fn and_count(bits: usize) -> f64 {
    let mut rng = Rng::new(2);
    let mut row = || (0..bits.div_ceil(64)).map(|_| rng.next_u64()).collect::<Vec<_>>();
    let (a, b) = (row(), row());
    let rounds = 20_000;
    cpu_per(rounds, || {
        for _ in 0..rounds {
            let (a, b) = (black_box(&a), black_box(&b));
            black_box(a.iter().zip(b).map(|(a, b)| (a & b).count_ones()).sum::<u32>());
        }
    })
}
