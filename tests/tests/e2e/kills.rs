//! `kill -9` of master and agents at random points under load.
//!
//! Writers change objects and the size of a service all the time, packets and requests pass between two containers. Each round
//! kills the master, an agent, or everything, after a random number of acknowledgements, and starts it again after a random
//! pause. What was acknowledged is there after each round; at the end not one packet or request was lost, the two
//! containers were not touched, and what runs is what was asked for. 20 rounds, 200 with `SKEIN_LONG=1`; the seed is
//! printed, and taken from `SKEIN_SEED`.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::{Lab, wait_for},
};

use super::{
    cluster,
    history::{self, History},
    lab,
    watched::Watched,
};

/// Rounds in CI and with `SKEIN_LONG=1`.
const ROUNDS: (usize, usize) = (20, 200);

/// Acknowledgements before a kill, at most.
const ACKNOWLEDGED_MAX: usize = 150;

/// How long what was killed stays away, at most: well below the time after which a node counts as lost.
const AWAY_MS_MAX: u64 = 800;

/// What can be killed: the master, agents.
const VICTIMS: [(bool, &[&str]); 5] =
    [(true, &[]), (false, &["h1"]), (false, &["h2"]), (false, &["h1", "h2"]), (true, &["h1", "h2"])];

fn round(cluster: &Cluster<'_>, history: &mut History, rng: &mut StdRng) -> Result<()> {
    let (master, agents) = *VICTIMS.choose(rng).context("nobody to kill")?;
    let acknowledgements = rng.random_range(1..=ACKNOWLEDGED_MAX);
    let away = Duration::from_millis(rng.random_range(0..=AWAY_MS_MAX));
    history.start();
    history.wait_for(acknowledgements)?;
    for host in agents {
        cluster.process(host, "skein-agent")?.kill()?;
    }
    if master {
        cluster.process("master", "skein-master")?.kill()?;
    }
    // Not to wait for anything: this is how long the fault is.
    std::thread::sleep(away);
    for host in agents {
        cluster.start_agent(host)?;
    }
    if master {
        history.settle()?;
        cluster.start_master()?;
    } else {
        history.wait_for_more(1)?;
        history.settle()?;
    }
    history.verify().with_context(|| format!("master {master}, agents {agents:?}, after {acknowledgements}, {away:?}"))
}

/// As many tasks run as shall, besides those that are watched, and no container is left of others.
pub(crate) fn settled(lab: &Lab, cluster: &Cluster<'_>, tasks: usize) -> Result<()> {
    wait_for(&format!("{tasks} tasks and containers of the service"), PATIENCE, || {
        let running = cluster.json(&["ps"])?;
        let running = running.as_array().into_iter().flatten();
        let running = running.filter(|t| t["status"]["state"] == "running" && t["desired_state"] == "running");
        let mut containers = 0;
        for host in lab.engines() {
            containers += host.docker(&["ps", "-q"])?.lines().count();
        }
        // Two are those that are watched.
        Ok((running.count() == tasks + 2 && containers == tasks + 2).then_some(()))
    })
    .with_context(|| cluster.skein(&["ps", "--all"]).unwrap_or_default())
}

fn rounds(lab: &Lab, cluster: &Cluster<'_>, seed: u64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let watched = Watched::start(lab, cluster)?;
    let mut history = History::new(cluster.socket(), "h1", true, seed)?;
    for number in 0..history::rounds(ROUNDS.0, ROUNDS.1) {
        round(cluster, &mut history, &mut rng).with_context(|| format!("seed {seed}, round {number}"))?;
    }
    cluster.wait_for_nodes(2)?;
    settled(lab, cluster, history.churn_tasks())?;
    history.verify().context("at rest")?;
    watched.untouched()?;
    let [packets, requests] = watched.stop();
    #[expect(clippy::print_stderr, reason = "how much was tried")]
    {
        eprintln!("packets: {packets}\nrequests: {requests}\nobjects: {}", history.known());
    }
    ensure!(packets.lost == 0 && packets.answered > 1_000, "packets: {packets}");
    ensure!(requests.lost == 0 && requests.answered > 100, "requests: {requests}");
    Ok(())
}

#[test]
fn masters_and_agents_killed_under_load_lose_nothing() -> Result<()> {
    let seed = history::seed()?;
    let lab = lab("kills", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    rounds(&lab, &cluster, seed).with_context(|| lab.logs(30))
}
