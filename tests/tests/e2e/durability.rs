//! What was acknowledged is there, whenever the master is killed.
//!
//! Several writers change objects through the native API without a pause; the master is killed with `kill -9` after a
//! random number of acknowledgements and started again, and the [`History`] is compared. 10 rounds, 50 with
//! `SKEIN_LONG=1`; the seed is printed, and taken from `SKEIN_SEED`.

use anyhow::{Context as _, Result, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use xtask::{cluster::Cluster, lab::Lab};

use super::{
    history::{self, History},
    lab,
    support::add_node,
};

/// Rounds in CI and with `SKEIN_LONG=1`.
const ROUNDS: (usize, usize) = (10, 50);

/// Acknowledgements before a kill, at most: a few hundred commits.
const ACKNOWLEDGED_MAX: usize = 300;

/// One round: load, kill, start, compare.
fn round(cluster: &Cluster<'_>, history: &mut History, acknowledgements: usize) -> Result<()> {
    history.start();
    let waited = history.wait_for(acknowledgements);
    cluster.process("master", "skein-master")?.kill()?;
    history.settle()?;
    waited?;
    cluster.start_master()?;
    history.verify()
}

fn rounds(lab: &Lab, seed: u64) -> Result<()> {
    let cluster = Cluster::of(lab);
    cluster.start_master()?;
    add_node(&cluster, "n1")?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut history = History::new(cluster.socket(), "n1", false, seed)?;
    let count = history::rounds(ROUNDS.0, ROUNDS.1);
    for number in 0..count {
        let acknowledgements = rng.random_range(1..=ACKNOWLEDGED_MAX);
        round(&cluster, &mut history, acknowledgements)
            .with_context(|| format!("seed {seed}, round {number}, killed after {acknowledgements}"))?;
    }
    // A master that is not there loses nothing.
    ensure!(history.known() > count, "hardly anything was acknowledged: {}", history.known());
    Ok(())
}

#[test]
fn killed_masters_lose_nothing_acknowledged() -> Result<()> {
    let seed = history::seed()?;
    let lab = lab("durable", 0, &[])?;
    rounds(&lab, seed).with_context(|| lab.logs(20))
}
