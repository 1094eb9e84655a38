//! One case alone, for profilers: `skein-bench cycle NODES CLASSES [all]`.
//!
//! Times say little on a machine that others use too; instructions and cache lines under callgrind do not depend on
//! them (docs/benchmarks.md, "Where the time goes"). So what is measured stands in functions of its own.

use crate::{
    figures::{cpu_per, figure},
    world::{Features, World},
};

/// Cycles that are measured.
const OPERATIONS: usize = 200_000;

/// Places and removes in a cluster that is in use.
pub(crate) fn run(nodes: usize, classes: usize, features: Features) {
    let tasks = if classes == 1 { nodes / 2 } else { nodes * 5 };
    let mut world = World::new(nodes, classes, tasks, features);
    for _ in 0..nodes.max(100_000) {
        remove(&mut world);
        place(&mut world);
    }
    let case = format!("{nodes} nodes, {classes} classes, {features:?}");
    let cycle = cpu_per(OPERATIONS, || measured(&mut world));
    figure(&case, "place and remove, CPU", "ns", cycle);
}

/// What `--toggle-collect` names.
#[inline(never)]
fn measured(world: &mut World) {
    for _ in 0..OPERATIONS {
        remove(world);
        place(world);
    }
}

#[inline(never)]
fn remove(world: &mut World) {
    world.remove();
}

#[inline(never)]
fn place(world: &mut World) {
    let service = world.any_service();
    world.place(service);
}
