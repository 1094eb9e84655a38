//! `cargo xtask bench NAME [--json FILE]`: benchmarks, each with its rows in `docs/benchmarks.md`.
//!
//! A benchmark is a command, never a timed test: it takes the machine for itself for minutes. [`rows`] is what all of
//! them measure, [`report`] where it goes; each benchmark is a module that gives rows.

mod figures;
pub mod overlay;
pub mod packing;
pub mod report;
pub mod rows;
pub mod scale;
pub mod scheduler;
pub mod sim;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::{cli::repository_root, ui};

/// Arguments of `bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Write the rows into this file, as a JSON list
    #[arg(long, global = true)]
    json: Option<PathBuf>,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Clone, Debug, Subcommand)]
enum Bench {
    /// The overlay beside Swarm's, a bare VXLAN device and the underlay, in a lab of its own
    Overlay(overlay::OverlayArgs),
    /// How full hosts get: a trace of arrivals by every strategy and by other rules
    Packing(packing::PackingArgs),
    /// One real master and thousands of agents
    Scale(scale::ScaleArgs),
    /// What a decision of the scheduler costs
    Scheduler(scheduler::SchedulerArgs),
    /// How long simulated clusters take
    Sim(sim::SimArgs),
}

/// Runs a benchmark, prints its table, and writes it down.
///
/// # Errors
/// It could not be run. A missed goal is no error: it is shown as missed.
pub fn run(args: &BenchArgs) -> Result<()> {
    let outcome = match &args.bench {
        Bench::Overlay(overlay) => overlay::run(overlay)?,
        Bench::Packing(packing) => packing::run(packing)?,
        Bench::Scale(scale) => scale::run(scale)?,
        Bench::Scheduler(scheduler) => scheduler::run(scheduler)?,
        Bench::Sim(sim) => sim::run(sim)?,
    };
    ui::note(&rows::table(&outcome.rows));
    if let Some(path) = &args.json {
        report::write_json(path, &outcome.rows)?;
    }
    let page = repository_root().join("docs/benchmarks.md");
    report::write_docs(&page, outcome.name, outcome.title, &outcome.rows, &outcome.notes)
}

/// What a benchmark gives.
#[derive(Debug)]
pub struct Outcome {
    /// Its name, as it is typed.
    pub name: &'static str,
    /// Its heading.
    pub title: &'static str,
    /// Its figures.
    pub rows: Vec<rows::Row>,
    /// What they mean, in paragraphs.
    pub notes: Vec<String>,
}
