//! `cargo xtask bench sim`: how long simulated clusters take, and how much is found out in that time.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::{
    Outcome,
    rows::{Goal, Row},
};
use crate::{cli::repository_root, sim, ui};

const NAME: &str = "sim";

/// Arguments of `bench sim`.
#[derive(Clone, Debug, Args)]
pub struct SimArgs {}

/// A case, its arguments for `skein-sim`, and the most seconds that it may take.
const CASES: &[(&str, &str, f64)] = &[
    (
        "1,000 agents, 10,000 tasks, 1 h",
        "--agents 1000 --tasks-per-agent 10 --minutes 60 --deploy-every 36000 --faults calm",
        2.0,
    ),
    (
        "10,000 agents, 50,000 tasks, 1 h",
        "--agents 10000 --tasks-per-agent 5 --minutes 60 --deploy-every 36000 --faults calm",
        30.0,
    ),
    (
        "300 worlds of 200 to 1,000 agents, 10 min, faults, two at a time",
        "--seed 1 --seeds 300 --agents 200 --agents-max 1000 --deploy-every 300",
        240.0,
    ),
];

/// Runs the cases one after the other.
///
/// # Errors
/// When the simulation cannot be built, or a world fails.
pub fn run(_: &SimArgs) -> Result<Outcome> {
    let program = sim::build(&repository_root())?;
    let rows = CASES.iter().map(|(case, args, goal)| measure(&program, case, args, *goal)).collect::<Result<_>>()?;
    let notes = vec![
        "Wall time; a world has one thread. The profile `sim` has assertions and overflow checks on.".to_owned(),
        "Where the time goes: in an hour with few changes a fifth each is `Core::check`, which builds every index \
         anew, and what a turn settles; the rest is spread over queue, users, agents and the other work of a turn. \
         In worlds with faults a tenth each is what hosts are told, documents between releases, the kernels of the \
         sample, what a turn settles, what agents plan, and `Core::check`; a fifteenth is what a master that \
         starts again reads."
            .to_owned(),
    ];
    Ok(Outcome { name: NAME, title: "Simulated clusters", rows, notes })
}

fn measure(program: &Path, case: &str, args: &str, goal: f64) -> Result<Row> {
    ui::note(case);
    let began = Instant::now();
    let status = Command::new(program).args(args.split(' ')).status().context("failed to start skein-sim")?;
    ensure!(status.success(), "a world failed: the lines above say how to see it again");
    Ok(Row::new(NAME, case, "time", "s", began.elapsed().as_secs_f64()).goal(Goal::AtMost(goal)))
}
