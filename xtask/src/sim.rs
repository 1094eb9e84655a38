//! `cargo xtask sim`: whole clusters in one thread, from one seed, with faults; docs/simulation.md says how to read it.
//!
//! Builds `skein-sim` in the profile `sim`, with its deliberate bugs, and passes the arguments on. `check` is what CI
//! runs of it: many small worlds, two large ones, and each deliberate bug, which must be found.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use clap::Args;

use crate::cli::{repository_root, target_dir};
use crate::{test, ui};

/// Worlds of the short form, 200 to 1,000 hosts each, about a second of a core for each.
const WORLDS: u64 = 300;
/// Worlds of 10,000 hosts.
const LARGE_WORLDS: u64 = 5;
/// Worlds in which a deliberate bug must be found; most are found in one of the first ten.
const MUTANT_WORLDS: u64 = 400;

/// Arguments of `sim`.
#[derive(Debug, Clone, Args)]
pub struct SimArgs {
    /// Every deliberate bug must be found: runs worlds with each of them
    #[arg(long)]
    mutants: bool,
    /// Arguments of `skein-sim`; `--help` after `--` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<String>,
}

/// Builds the simulation and runs it.
///
/// # Errors
/// When it cannot be built or started. A world that fails is the exit code.
pub fn run(args: &SimArgs) -> anyhow::Result<ExitCode> {
    let root = repository_root();
    let program = build(&root)?;
    if args.mutants {
        mutants(&program)?;
        return Ok(ExitCode::SUCCESS);
    }
    let status = Command::new(&program).args(&args.args).status().context("failed to start skein-sim")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The short form: what CI runs.
///
/// # Errors
/// When a world fails, or a deliberate bug is not found.
pub(crate) fn check(root: &Path) -> anyhow::Result<()> {
    let program = build(root)?;
    let (worlds, large) = (WORLDS.to_string(), LARGE_WORLDS.to_string());
    let sized = ["--agents", "200", "--agents-max", "1000", "--deploy-every", "300"];
    worlds_pass(&program, &[&["--seed", "1", "--seeds", &worlds][..], &sized].concat())?;
    worlds_pass(&program, &["--seed", "7", "--seeds", &large, "--agents", "10000", "--deploy-every", "1800"])?;
    mutants(&program)
}

pub(crate) fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let build = ["build", "--quiet", "--profile", "sim", "--package", "skein-sim", "--features", "mutants"];
    test::must(test::cargo(root, &build))?;
    Ok(target_dir()?.join("sim/skein-sim"))
}

fn worlds_pass(program: &Path, args: &[&str]) -> anyhow::Result<()> {
    let status = Command::new(program).args(args).status().context("failed to start skein-sim")?;
    if !status.success() {
        bail!("a simulated cluster broke a promise: the lines above say how to see it again");
    }
    Ok(())
}

/// Runs worlds with each deliberate bug until one fails.
fn mutants(program: &Path) -> anyhow::Result<()> {
    let list = Command::new(program).args(["--mutant", "list"]).output().context("failed to start skein-sim")?;
    let list = String::from_utf8(list.stdout).context("the list of deliberate bugs is not text")?;
    let names: Vec<&str> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    if names.is_empty() {
        bail!("skein-sim names no deliberate bugs");
    }
    let mut survivors = Vec::new();
    for name in &names {
        let worlds = MUTANT_WORLDS.to_string();
        let args =
            ["--mutant", name, "--seeds", &worlds, "--agents", "20", "--agents-max", "60", "--first", "--no-shrink"];
        let mut command = Command::new(program);
        let status = command.args(args).stdout(Stdio::null()).status().context("failed to start skein-sim")?;
        if status.success() {
            survivors.push(*name);
        }
    }
    if !survivors.is_empty() {
        bail!("{MUTANT_WORLDS} worlds did not find these deliberate bugs: {}", survivors.join(", "));
    }
    ui::note(&format!("{} of {0} deliberate bugs found", names.len()));
    Ok(())
}
