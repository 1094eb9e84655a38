//! `cargo xtask bench scheduler`: what a decision costs, from 1,000 to 100,000 nodes.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::{
    Outcome,
    figures::{self, Figure},
    rows::{Goal, Row},
};
use crate::ui;

const NAME: &str = "scheduler";

/// Arguments of `bench scheduler`.
#[derive(Clone, Debug, Args)]
pub struct SchedulerArgs {
    /// Numbers of nodes; none takes 1000, 10000 and 100000
    #[arg(value_name = "NODES", value_parser = clap::value_parser!(u32).range(64..=1_000_000))]
    nodes: Vec<u32>,
}

/// Builds the program that measures and runs it.
///
/// # Errors
/// It cannot be built or fails, or a line of it is no figure.
pub fn run(args: &SchedulerArgs) -> Result<Outcome> {
    let program = figures::program("skein-bench")?;
    ui::note("some minutes on one core; other work on the machine spoils the figures");
    let sizes = args.nodes.iter().map(u32::to_string);
    let output = Command::new(program).args(sizes).output().context("failed to start skein-bench")?;
    ensure!(output.status.success(), "skein-bench failed: {}", String::from_utf8_lossy(&output.stderr));
    let rows = figures::read(output.stdout)?.iter().map(row).collect();
    let notes = vec![
        "One thread. A cluster in a steady state: 20 labels with 2 values to one per node, three constraints and exact CPU and \
         memory for each service, five tasks per node, one removal for each placement. A placement is the full decision (own \
         tasks first, then load, ties by position, all filters) and its commit into every index, by handles of classes and \
         profiles; maps by names and ids are the caller's. Medians come from 16 operations per sample, tails from single ones \
         by the cycle counter, whose own cost of some 20 ns is in them. \"All features\": an eighth of the services each \
         publish a host port, keep away from themselves, prefer nodes without some label of tasks, prefer a label of the \
         node, spread over zones and racks (two eighths), limit replicas per node, and take a generic resource."
            .to_owned(),
        "What a placement looks at is what it needs to find the node, without the commit; cache lines count every word, entry \
         and record as one that is not there yet. The memory is that of the engine alone: postings, names and the maps of the \
         scheduler around it come on top. An explanation is held to 1.1 times the loop that counts its rows, alone and in \
         turn, with the processor's best instructions."
            .to_owned(),
    ];
    Ok(Outcome { name: NAME, title: "Decisions of the scheduler", rows, notes })
}

fn row(figure: &Figure) -> Row {
    let row = Row::new(NAME, &figure.case, &figure.metric, &figure.unit, figure.value);
    match figure.at_most {
        Some(most) => row.goal(Goal::AtMost(most)),
        None => row,
    }
}
