//! `cargo xtask bench scale`: what one master takes for thousands of agents, in CPU time, memory and seconds.
//!
//! Two programs in their release builds, one [`rig::Rig`]: the master with its store on disk, and a fleet of protocol
//! clients with model engines. Both share this machine's cores, so wall times are those of both together; CPU time is
//! the master's own.

pub mod rig;

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use skein_api::NodeState;

use self::rig::{Programs, Rig, Users};
use super::{
    Outcome,
    rows::{Goal, Row, number},
};
use crate::{
    cli::{repository_root, target_dir},
    ui,
};

/// Name of the benchmark.
const NAME: &str = "scale";

/// Tasks per service: a hundred services at full size.
const REPLICAS: u32 = 1_000;

/// Hosts that fall silent, for the time until that is noticed.
const SILENT_HOSTS: u32 = 20;

/// How long everything may take before the benchmark is given up: ten times the goals.
const PATIENCE: Duration = Duration::from_secs(600);

/// How long the master's CPU time is looked at while nothing happens: four heartbeats of each agent.
const AT_REST: Duration = Duration::from_secs(20);

/// Pause after an upheaval, before memory is looked at: the store seals, buffers are given back.
const CALM: Duration = Duration::from_secs(5);

/// Share of agents that restart in a minute of churn, and of tasks that are made and removed.
const CHURN: u32 = 100;

/// Arguments of `bench scale`.
#[derive(Clone, Debug, Args)]
pub struct ScaleArgs {
    /// How many agents
    #[arg(long, default_value_t = 10_000)]
    agents: u32,
    /// How many tasks; default is ten for each agent
    #[arg(long)]
    tasks: Option<u32>,
    /// How many minutes of churn; the goal is an hour
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1_440))]
    churn: u32,
    /// Take programs from this directory instead of building them
    #[arg(long)]
    programs: Option<PathBuf>,
}

/// Runs it.
///
/// # Errors
/// A program does not start, or does not get there at all.
pub fn run(args: &ScaleArgs) -> Result<Outcome> {
    let dir = match &args.programs {
        Some(dir) => dir.clone(),
        None => build()?,
    };
    let programs = Programs { master: dir.join("skein-master"), fleet: dir.join("skein-fleet") };
    let tasks = args.tasks.unwrap_or(args.agents * 10);
    let few = (args.agents / 10).max(1);
    let mut rows = small(&programs, few)?;
    let mut bench = Bench::start(&programs, args.agents)?;
    bench.size(args.agents, tasks);
    // In a master that has done nothing else: what tasks left behind is not the agents'.
    let (at_few, _) = bench.joined(0, few)?;
    let large = bench.join(few, args.agents)?;
    let slope_kib = (large - at_few) / f64::from(args.agents - few);
    bench.row("memory per further idle agent", "KB", slope_kib * 1.024, Some(Goal::AtMost(50.0)));
    bench.at_rest(args.agents)?;
    bench.lost_hosts(args.agents)?;
    bench.tasks("load", tasks)?;
    bench.users(args.agents)?;
    bench.restart(args.agents)?;
    bench.churn(args.agents, tasks, args.churn)?;
    rows.append(&mut bench.rows);
    Ok(Outcome { name: NAME, title: "One master at scale", rows, notes: notes() })
}

/// A tenth of the agents in a cluster of their own, to show how cost grows.
fn small(programs: &Programs, agents: u32) -> Result<Vec<Row>> {
    let mut bench = Bench::start(programs, agents)?;
    bench.size(agents, agents * 10);
    bench.join(0, agents)?;
    bench.at_rest(agents)?;
    bench.tasks("load", agents * 10)?;
    bench.restart(agents)?;
    Ok(std::mem::take(&mut bench.rows))
}

fn build() -> Result<PathBuf> {
    let root = repository_root();
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "-p", "skein-master", "-p", "skein-fleet"]).current_dir(&root);
    ensure!(command.status().context("failed to start cargo")?.success(), "the programs do not build");
    Ok(target_dir()?.join("release"))
}

struct Bench {
    rig: Rig,
    rows: Vec<Row>,
    case: String,
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1_024.0
}

impl Bench {
    fn start(programs: &Programs, agents: u32) -> Result<Self> {
        Ok(Self { rig: Rig::start(programs.clone(), agents * 2)?, rows: Vec::new(), case: String::new() })
    }

    fn size(&mut self, agents: u32, tasks: u32) {
        self.case = if tasks == 0 { format!("{agents} agents") } else { format!("{agents} agents, {tasks} tasks") };
        ui::heading(&self.case);
    }

    fn row(&mut self, metric: &str, unit: &str, value: f64, goal: Option<Goal>) {
        let row = Row::new(NAME, &self.case, metric, unit, value);
        let row = match goal {
            Some(goal) => row.goal(goal),
            None => row,
        };
        let goal = row.goal.as_ref().map(|goal| format!(" ({goal})")).unwrap_or_default();
        ui::note(&format!("{metric}: {} {unit}{goal}", number(value)));
        self.rows.push(row);
    }

    /// Agents up to `until` join; the master's memory afterwards, KiB, and how long it took.
    #[allow(clippy::cast_precision_loss, reason = "kibibytes of one process")]
    fn joined(&mut self, from: u32, until: u32) -> Result<(f64, Duration)> {
        let began = Instant::now();
        self.rig.tell(&format!("join {}", until - from))?;
        self.rig.wait("all agents to have a session", PATIENCE, |s| s.sessions == until as usize)?;
        let took = began.elapsed();
        std::thread::sleep(CALM);
        Ok((self.rig.master_memory_kib()?.0 as f64, took))
    }

    /// The same with rows.
    fn join(&mut self, from: u32, until: u32) -> Result<f64> {
        let cpu = self.rig.master_cpu()?;
        let (kib, took) = self.joined(from, until)?;
        let goal = (until >= 10_000).then_some(Goal::AtMost(60.0));
        self.row(&format!("{} agents join, until all have a session", until - from), "s", took.as_secs_f64(), goal);
        self.row("join, CPU of the master", "s", (self.rig.master_cpu()? - cpu).as_secs_f64(), None);
        self.row("memory, idle", "MiB", kib / 1_024.0, None);
        Ok(kib)
    }

    /// CPU time while nothing but heartbeats comes.
    fn at_rest(&mut self, agents: u32) -> Result<()> {
        let (cpu, began) = (self.rig.master_cpu()?, Instant::now());
        std::thread::sleep(AT_REST);
        let used = (self.rig.master_cpu()? - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
        let goal = (agents >= 10_000).then_some(Goal::AtMost(10.0));
        self.row("heartbeats, CPU of the master", "% of a core", used * 100.0, goal);
        Ok(())
    }

    /// Hosts fall silent one after the other; how long until each counts as down.
    fn lost_hosts(&mut self, agents: u32) -> Result<()> {
        let numbers: Vec<u32> = (0..SILENT_HOSTS.min(agents)).map(|i| 1 + i * (agents / SILENT_HOSTS).max(1)).collect();
        let mut silent = Vec::new();
        for number in &numbers {
            self.rig.tell(&format!("silence {number}"))?;
            silent.push((*number, Instant::now()));
            // Spread over a heartbeat's period, as accidents are.
            std::thread::sleep(Duration::from_millis(250));
        }
        let mut worst: Vec<f64> = Vec::new();
        while let Some((number, since)) = silent.first().copied() {
            let name = format!("fleet-{number:05}");
            let node = self.rig.ask(|client| async move { client.node(&name).await })?;
            if node.status.is_some_and(|s| s.state == NodeState::Down) {
                worst.push(since.elapsed().as_secs_f64());
                silent.remove(0);
            } else {
                // Each in turn, so that a late one does not hide the others.
                silent.rotate_left(1);
                std::thread::sleep(Duration::from_millis(2));
            }
            ensure!(since.elapsed() < PATIENCE, "a silent host was never noticed");
        }
        worst.sort_by(f64::total_cmp);
        self.row("lost host noticed, median", "s", worst[worst.len() / 2], None);
        self.row("lost host noticed, slowest", "s", worst[worst.len() - 1], Some(Goal::AtMost(15.0)));
        for number in &numbers {
            self.rig.tell(&format!("speak {number}"))?;
        }
        std::thread::sleep(CALM);
        Ok(())
    }

    /// Tasks from nothing to running, with the master's word that it has that on disk.
    fn tasks(&mut self, stack: &str, tasks: u32) -> Result<()> {
        let services = tasks.div_ceil(REPLICAS);
        let replicas = tasks / services;
        let all = (services * replicas) as usize;
        let (before, cpu, fleet) = (self.rig.tell("status")?, self.rig.master_cpu()?, self.rig.fleet_cpu()?);
        let began = Instant::now();
        self.rig.apply(stack, services, replicas)?;
        let placed = began.elapsed();
        let running = before.running + all;
        self.rig.wait("all tasks to run", PATIENCE, |s| s.running >= running)?;
        let took = began.elapsed();
        let (cpu, fleet) = (self.rig.master_cpu()? - cpu, self.rig.fleet_cpu()? - fleet);
        let full = tasks >= 100_000;
        self.row(&format!("{all} tasks, made and placed"), "s", placed.as_secs_f64(), None);
        let goal = full.then_some(Goal::AtMost(26.0));
        self.row(&format!("{all} tasks, until all run"), "s", took.as_secs_f64(), goal);
        let rate = f64::from(services * replicas) / took.as_secs_f64();
        self.row("tasks until running", "1/s", rate, full.then_some(Goal::AtLeast(3_750.0)));
        self.row("tasks, CPU of the master", "s", cpu.as_secs_f64(), None);
        self.row("tasks, CPU of the fleet", "s", fleet.as_secs_f64(), None);
        std::thread::sleep(CALM);
        let (kib, peak) = self.rig.master_memory_kib()?;
        self.row("memory with these tasks", "MiB", mib(kib), full.then_some(Goal::AtMost(1_024.0)));
        self.row("memory, most until now", "MiB", mib(peak), full.then_some(Goal::AtMost(1_024.0)));
        Ok(())
    }

    /// A thousand connections ask and watch, some stop reading; changes go on meanwhile.
    fn users(&mut self, agents: u32) -> Result<()> {
        let host = |share: u32| format!("fleet-{:05}", 1 + agents * share / 10);
        let mut paths: Vec<String> = (0..8).map(|share| format!("/v1/nodes/{}", host(share))).collect();
        paths.extend((1..=8).map(|slot| format!("/v1/tasks/load_s000.{slot}")));
        paths.extend([
            format!("/v1/tasks?node={}", host(3)),
            "/v1/services/load_s000".to_owned(),
            "/v1/info".to_owned(),
        ]);
        let users = Users { readers: 800, gets: 50_000, paths, watchers: 180, stuck: 20 };
        let sessions = self.rig.tell("status")?.sessions;
        let (outcome, changes) = self.rig.users(&users)?;
        ensure!(self.rig.tell("status")?.sessions == sessions, "agents lost their sessions meanwhile");
        #[allow(clippy::cast_precision_loss, reason = "thousands")]
        let rate = outcome.answers as f64 / outcome.seconds;
        self.row("50,000 GETs on 800 connections, 180 watch, 20 do not read", "1/s", rate, None);
        self.row("one GET meanwhile, median", "ms", outcome.median_ms, None);
        self.row("one GET meanwhile, slowest", "ms", outcome.slowest_ms, None);
        self.row("one change meanwhile, median", "ms", changes[changes.len() / 2] * 1_000.0, None);
        self.row(
            "one change meanwhile, slowest",
            "ms",
            changes[changes.len() - 1] * 1_000.0,
            Some(Goal::AtMost(1_000.0)),
        );
        #[allow(clippy::cast_precision_loss, reason = "a few")]
        self.row("connections cut that did not read", "", outcome.cut as f64, Some(Goal::AtLeast(20.0)));
        let (kib, _) = self.rig.master_memory_kib()?;
        self.row("memory afterwards", "MiB", mib(kib), Some(Goal::AtMost(1_024.0)));
        Ok(())
    }

    /// The master is killed and comes back: every agent returns, and nothing is changed by it.
    fn restart(&mut self, agents: u32) -> Result<()> {
        let before = self.rig.ask(|client| async move { client.info().await })?;
        self.rig.kill_master()?;
        self.rig.wait("all sessions to end", PATIENCE, |s| s.sessions == 0)?;
        let began = Instant::now();
        self.rig.start_master()?;
        let up = began.elapsed();
        self.rig.wait("all agents to come back", PATIENCE, |s| s.sessions == agents as usize)?;
        let goal = (agents >= 10_000).then_some(Goal::AtMost(30.0));
        self.row("master killed: until it answers", "s", up.as_secs_f64(), None);
        self.row("master killed: until all agents are back", "s", began.elapsed().as_secs_f64(), goal);
        // A whole detection period later everybody who was to be called lost has been.
        std::thread::sleep(Duration::from_secs(50));
        let after = self.rig.ask(|client| async move { client.info().await })?;
        #[allow(clippy::cast_precision_loss, reason = "none, it should be")]
        let changes = (after.revision - before.revision) as f64;
        self.row("master killed: commits since", "", changes, Some(Goal::AtMost(0.0)));
        Ok(())
    }

    /// Agents restart, tasks are made and removed, for so many minutes; what has grown at the end.
    fn churn(&mut self, agents: u32, tasks: u32, minutes: u32) -> Result<()> {
        let (few_agents, few_tasks) = ((agents / CHURN).max(1), (tasks / CHURN).max(1));
        // The first minute makes what the following ones use again.
        self.minute(few_agents, few_tasks)?;
        let (before, _) = self.rig.master_memory_kib()?;
        let (store, cpu, began) = (self.rig.store_bytes()?, self.rig.master_cpu()?, Instant::now());
        for _ in 0..minutes {
            self.minute(few_agents, few_tasks)?;
        }
        let used = (self.rig.master_cpu()? - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
        let (after, _) = self.rig.master_memory_kib()?;
        let metric = |what: &str| format!("1 % churn a minute for {minutes} min, {what}");
        #[allow(clippy::cast_precision_loss, reason = "figures for people")]
        let grown = |before: u64, after: u64| (after as f64 / before as f64 - 1.0) * 100.0;
        self.row(&metric("CPU of the master"), "% of a core", used * 100.0, None);
        self.row(&metric("growth of memory"), "%", grown(before, after), Some(Goal::AtMost(5.0)));
        self.row(&metric("growth of the store"), "%", grown(store, self.rig.store_bytes()?), Some(Goal::AtMost(5.0)));
        Ok(())
    }

    fn minute(&mut self, agents: u32, tasks: u32) -> Result<()> {
        let ends = Instant::now() + Duration::from_secs(60);
        let all = self.rig.tell("status")?;
        self.rig.tell(&format!("restart {agents}"))?;
        self.rig.apply("churn", 1, tasks)?;
        let running = all.running + tasks as usize;
        self.rig.wait("the new tasks to run", PATIENCE, |s| s.running >= running && s.sessions == all.sessions)?;
        self.rig.ask(|client| async move { client.stack_remove("churn", true, false).await })?;
        self.rig.wait("the new tasks to be gone", PATIENCE, |s| s.running == all.running)?;
        std::thread::sleep(ends.saturating_duration_since(Instant::now()));
        Ok(())
    }
}

/// What the table does not say.
fn notes() -> Vec<String> {
    let text = "\
One `skein-master` with its store on disk, and `skein-fleet`: protocol clients over TLS 1.3 with certificates of their \
own, whose decisions are the real agent's and whose engines are models (a container is made in 40 to 120 ms and started \
in 150 to 400 ms). Both share the cores, so seconds are those of both together; CPU is the master's process alone. \
Memory is resident memory. \"Commits since\" counts everything that the store took, not only tasks.";
    vec![text.to_owned()]
}
