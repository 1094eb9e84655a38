//! Faults that are no crash, in one cluster under load: processes that are paused, an underlay that is cut, an engine that
//! dies, a backup that is taken while everything changes.
//!
//! Two containers are watched all the time by probes of packets and requests, and writers keep a history: see `watched`
//! and `history`.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::Value;
use xtask::{
    cluster::{Cluster, PATIENCE, program},
    lab::{Lab, wait_for},
};

use super::{
    cluster,
    history::{self, History},
    lab,
    recovery::wait_for_node,
    support::{Checks, run},
    watched::Watched,
};

/// Longer than the 15 s of silence after which a node counts as lost, so that a pause is seen as such.
const PAUSE: Duration = Duration::from_secs(18);

/// How long two hosts do not reach each other: many packets, and short enough for a request to be repeated by TCP.
const CUT: Duration = Duration::from_secs(4);

/// How long a host is without an engine.
const WITHOUT_ENGINE: Duration = Duration::from_secs(2);

/// Backups under load; each is restored.
const BACKUPS: usize = 3;

/// A service that can run anywhere, with a task on each host.
const ROAM: &str = "services:\n  \
    roam: {image: busybox, command: [sleep, \"1000\"], deploy: {replicas: 2}, stop_grace_period: 0s}\n";

struct Faults<'a> {
    lab: &'a Lab,
    cluster: &'a Cluster<'a>,
    watched: Watched,
    history: History,
    checks: Checks,
}

/// The running tasks of the service, sorted: id and node.
fn roaming(cluster: &Cluster<'_>) -> Result<Vec<(String, String)>> {
    let tasks = cluster.tasks()?;
    let live = |t: &&Value| {
        let roam = t["name"].as_str().is_some_and(|name| name.starts_with("s_roam."));
        roam && t["desired_state"] == "running" && t["status"]["state"] == "running"
    };
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let mut found: Vec<_> = tasks.iter().filter(live).map(|t| (text(&t["id"]), text(&t["node"]))).collect();
    found.sort();
    Ok(found)
}

/// Each node with its state and since when it has it: the same later means that nothing happened in between.
pub(crate) fn states(cluster: &Cluster<'_>) -> Result<Vec<String>> {
    let nodes = cluster.json(&["node", "ls"])?;
    let state = |n: &Value| format!("{} {} since {}", n["name"], n["status"]["state"], n["status"]["since"]);
    Ok(nodes.as_array().into_iter().flatten().map(state).collect())
}

impl Faults<'_> {
    /// What must hold after each fault: acknowledged changes are there, and the watched containers are the same.
    fn verify(&mut self, name: &str) {
        let settled = self.history.settle();
        self.checks.ok(&format!("{name}: writers"), settled);
        let verified = self.history.verify();
        self.checks.ok(&format!("{name}: history"), verified);
        let untouched = self.watched.untouched();
        self.checks.ok(&format!("{name}: watched containers"), untouched);
    }

    /// A master that was not given a processor has heard nobody for longer than a host may be silent. That is no reason to
    /// give the hosts up.
    fn master_paused(&mut self) -> Result<()> {
        let name = "master paused";
        let (from, nodes, tasks) = (Instant::now(), states(self.cluster)?, roaming(self.cluster)?);
        let master = self.cluster.process("master", "skein-master")?;
        self.history.start();
        self.history.wait_for(20)?;
        master.signal(Signal::SIGSTOP)?;
        std::thread::sleep(PAUSE);
        master.signal(Signal::SIGCONT)?;
        self.history.wait_for_more(20)?;
        self.verify(name);
        let now = states(self.cluster)?;
        self.checks.ensure(&format!("{name}: nodes stay ready"), now == nodes, format_args!("{nodes:?} -> {now:?}"));
        let now = roaming(self.cluster)?;
        self.checks.ensure(&format!("{name}: no task is replaced"), now == tasks, format_args!("{tasks:?} -> {now:?}"));
        self.watched.lost_nothing(&mut self.checks, name, from);
        Ok(())
    }

    /// A node that is not heard of counts as lost and its service tasks run elsewhere; its containers go on, and when it
    /// is back the second copies are stopped.
    fn node_lost(
        &mut self,
        name: &str,
        begin: impl FnOnce(&Self) -> Result<()>,
        end: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<()> {
        let from = Instant::now();
        self.history.start();
        self.history.wait_for(20)?;
        begin(self)?;
        wait_for_node(self.cluster, "h2", "down").with_context(|| name.to_owned())?;
        let h1 = self.cluster.json(&["node", "inspect", "h1"])?["id"].clone();
        let both_on_h1 = || {
            let tasks = roaming(self.cluster)?;
            Ok((tasks.len() == 2 && tasks.iter().all(|(_, node)| h1 == **node)).then_some(()))
        };
        wait_for("both tasks on h1", PATIENCE, both_on_h1).with_context(|| name.to_owned())?;
        // Not yet at its end: nothing may have been lost while it lasts.
        self.watched.lost_nothing(&mut self.checks, name, from);
        let from = Instant::now();
        end(self)?;
        wait_for_node(self.cluster, "h2", "ready").with_context(|| name.to_owned())?;
        wait_for("the second copy to be stopped", PATIENCE, || {
            let running = self.lab.host("h2").docker(&["ps", "--format", "{{.Names}}"])?;
            Ok((!running.contains("roam")).then_some(()))
        })
        .with_context(|| name.to_owned())?;
        self.verify(name);
        self.watched.lost_nothing(&mut self.checks, &format!("after {name}"), from);
        self.spread()
    }

    /// A task on each host again: the scheduler moves nothing by itself.
    fn spread(&self) -> Result<()> {
        let file = self.cluster.compose_file("s", ROAM)?;
        self.cluster.skein(&["down", "-p", "s", "--yes"])?;
        self.cluster.stack_up("s", &file)?;
        wait_for("a task on each host", PATIENCE, || {
            let tasks = roaming(self.cluster)?;
            Ok((tasks.len() == 2 && tasks[0].1 != tasks[1].1).then_some(()))
        })
        .with_context(|| self.cluster.skein(&["ps", "--all"]).unwrap_or_default())
    }

    /// Two hosts do not reach each other, but the master reaches both: what passes between them is lost, and nothing else
    /// happens.
    fn hosts_cut(&mut self) -> Result<()> {
        let name = "hosts cut";
        let (nodes, tasks) = (states(self.cluster)?, roaming(self.cluster)?);
        self.history.start();
        let from = Instant::now();
        self.lab.cut("h1", "h2")?;
        std::thread::sleep(CUT);
        self.lab.heal()?;
        let [(_, packets), _] = self.watched.since(from);
        self.checks.ensure(&format!("{name}: the probe notices"), packets.longest_gap > CUT / 2, &packets);
        // Neighbours are permanent and flows have no state on the way: the first packet after the cut arrives.
        let from = Instant::now();
        self.history.wait_for_more(200)?;
        self.watched.lost_nothing(&mut self.checks, &format!("after {name}"), from);
        self.verify(name);
        let now = (states(self.cluster)?, roaming(self.cluster)?);
        self.checks.ensure(&format!("{name}: nothing else happens"), now == (nodes, tasks), format_args!("{now:?}"));
        Ok(())
    }

    /// Backups at random moments under load; each of them in turn, in place of the store, adopts everything that runs. So
    /// the cluster goes back, then on from there, then to another past that knows nothing of either.
    fn backup_and_restore(&mut self, rng: &mut StdRng) -> Result<()> {
        let name = "restore";
        let from = Instant::now();
        let mut backups = Vec::new();
        for number in 0..BACKUPS {
            let before = self.history.mark();
            self.history.start();
            self.history.wait_for(rng.random_range(1..100))?;
            let path = self.lab.dir().join(format!("backup-{number}"));
            self.cluster.skein(&["backup", &path.display().to_string()])?;
            self.history.wait_for_more(rng.random_range(1..50))?;
            self.verify(name);
            backups.push((before, path, self.history.mark()));
        }
        for (number, (before, path, after)) in backups.iter().enumerate() {
            self.restore(number, path)?;
            let restored = self.history.verify_between(before, after);
            self.checks.ok(&format!("restore {number}: the backup is of a moment after it was asked for"), restored);
            // It works: more changes, also such that agents have to follow.
            self.history.start();
            self.history.wait_for(50)?;
            self.verify(&format!("{name} {number}"));
            self.spread()?;
        }
        self.watched.lost_nothing(&mut self.checks, name, from);
        Ok(())
    }

    /// Puts a backup in place of the store.
    fn restore(&self, number: usize, backup: &Path) -> Result<()> {
        self.cluster.process("master", "skein-master")?.kill()?;
        let data = self.cluster.master().dir().join("skein-master");
        fs::rename(&data, data.with_extension(format!("lost-{number}")))?;
        let mut command = self.cluster.master().command(program("skein-master")?);
        let said = run(command.arg("--data-dir").arg(&data).arg("restore").arg(backup))?;
        ensure!(said.code == 0, "{said:?}");
        self.cluster.start_master()?;
        self.cluster.wait_for_nodes(2)
    }

    /// An engine that was killed leaves its containers running; started again it ends them all, and they are started anew.
    fn engine_killed(&mut self) -> Result<()> {
        let name = "engine killed";
        let host = self.lab.host("h2");
        self.history.start();
        let from = Instant::now();
        host.stop_engine(Signal::SIGKILL)?;
        std::thread::sleep(WITHOUT_ENGINE);
        self.watched.lost_nothing(&mut self.checks, name, from);
        host.start_engine()?;
        let running = || {
            let b = self.cluster.task("b")?;
            Ok((b["status"]["state"] == "running" && b["run"] == 2).then_some(()))
        };
        wait_for("b to run for the second time", PATIENCE, running)?;
        wait_for("both tasks of the service", PATIENCE, || Ok((roaming(self.cluster)?.len() == 2).then_some(())))?;
        let answered = || {
            let from = Instant::now();
            std::thread::sleep(Duration::from_millis(200));
            let [_, (_, requests)] = self.watched.since(from);
            Ok((requests.lost == 0 && requests.answered > 0).then_some(()))
        };
        wait_for("requests to be answered again", PATIENCE, answered)?;
        let settled = self.history.settle();
        self.checks.ok(&format!("{name}: writers"), settled);
        let verified = self.history.verify();
        self.checks.ok(&format!("{name}: history"), verified);
        Ok(())
    }
}

fn all(lab: &Lab, cluster: &Cluster<'_>, seed: u64) -> Result<()> {
    let watched = Watched::start(lab, cluster)?;
    let history = History::new(cluster.socket(), "h1", false, seed)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let file = cluster.compose_file("s", ROAM)?;
    cluster.stack_up("s", &file)?;
    let mut faults = Faults { lab, cluster, watched, history, checks: Checks::default() };
    faults.hosts_cut()?;
    faults.master_paused()?;
    let agent = cluster.process("h2", "skein-agent")?;
    faults.node_lost("agent paused", |_| agent.signal(Signal::SIGSTOP), |_| agent.signal(Signal::SIGCONT))?;
    faults.node_lost("host cut from the master", |f| f.lab.cut("h2", "master"), |f| f.lab.heal())?;
    faults.backup_and_restore(&mut rng)?;
    faults.engine_killed()?;
    faults.checks.finish()
}

#[test]
fn pauses_cuts_engines_and_restores_keep_every_promise() -> Result<()> {
    let seed = history::seed()?;
    let lab = lab("faults", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    all(&lab, &cluster, seed).with_context(|| lab.logs(30)).with_context(|| format!("seed {seed}"))
}
