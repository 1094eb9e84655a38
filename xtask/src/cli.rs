//! The commands of `cargo xtask`. The one place where commands are wired; each is written in a module of its own.
//!
//! Exit codes: 0 success, 1 failure with its reason on standard error, 2 wrong usage.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};

use crate::{bench, demo, fuzz, lab, setup, sim, test, tidy, ui};

/// Automation of this repository
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure something at full size
    Bench(bench::BenchArgs),
    /// Run the main job: a cluster of three hosts on this machine, an application and its database
    Demo(demo::DemoArgs),
    /// Feed parsers with bad input for long: list the targets, or run one or all of them
    Fuzz(fuzz::FuzzArgs),
    /// Several hosts with an engine each, on this machine
    Lab(lab::cli::LabArgs),
    /// Simulate whole clusters with faults, each from one seed
    Sim(sim::SimArgs),
    /// Install what the lab, the tests and the demo need from the distribution's packages
    Setup(SetupArgs),
    /// Run every check and every test, as CI does
    Test(test::TestArgs),
    /// Check the rules of this repository that no other tool checks
    Tidy,
}

/// Arguments of `setup`.
#[derive(Debug, Args)]
struct SetupArgs {
    /// Install without asking
    #[arg(long, short)]
    yes: bool,
}

/// Runs the command that the process's arguments name. Starts no thread before the command does.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Demo(args) => demo::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Lab(args) => lab::cli::main(args).map(|()| ExitCode::SUCCESS),
        Command::Sim(args) => sim::run(&args),
        Command::Setup(args) => setup::ensure(args.yes).map(|()| ExitCode::SUCCESS),
        Command::Test(args) => test::run(&args),
        Command::Tidy => tidy::run(&repository_root()).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        ui::error(&error);
        ExitCode::FAILURE
    })
}

/// Where cargo puts what it builds: this program is in a profile's folder of it.
///
/// # Errors
/// When this program is not found.
pub fn target_dir() -> Result<PathBuf> {
    let me = std::env::current_exe().context("failed to find this program")?;
    Ok(me.ancestors().nth(2).context("failed to find the folder of what is built")?.to_path_buf())
}

/// The root of the repository that this program was built from.
pub fn repository_root() -> PathBuf {
    // Known at compile time: the program is run from its repository, by cargo.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the repository").to_path_buf()
}
