//! `skein-sim`: runs worlds. `cargo xtask sim` builds and starts it; docs/simulation.md tells how to read it.

#![expect(clippy::print_stdout, reason = "the program's output")]

use std::{
    fs::File,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::Context as _;
use clap::Parser;
use skein_sim::{
    Arrival, Verdict,
    faults::Profile,
    shrink,
    world::{Config, Outcome, Stats, World},
};

/// A third of a run's time goes to making and dropping documents.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs of the shrinker at most.
const SHRINK_RUNS_MAX: usize = 200;

/// Simulate whole clusters, each from one seed.
#[derive(Debug, Parser)]
#[command(name = "skein-sim")]
struct Args {
    /// The seed, or the first of several
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// So many seeds, one after the other
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Hosts
    #[arg(long, default_value_t = 300)]
    agents: u32,
    /// With several seeds: hosts at most; each seed has a number between the two
    #[arg(long)]
    agents_max: Option<u32>,
    /// Simulated minutes; the last five are without faults
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Tasks per host, on average
    #[arg(long, default_value_t = 5)]
    tasks_per_agent: u64,
    /// Mean seconds between two changes of one stack
    #[arg(long, default_value_t = 60)]
    deploy_every: u64,
    /// What goes wrong
    #[arg(long, value_enum, default_value_t = Profile::Swarm)]
    faults: Profile,
    /// Of the schedule only these faults, by number
    #[arg(long, value_delimiter = ',')]
    only: Option<Vec<u32>>,
    /// Write what happens, line by line
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Containers come and go as in this recording (CSV, gzip: arrival_s,cpu_cores,mem_gib,duration_s,…)
    #[arg(long, value_name = "FILE")]
    arrivals: Option<PathBuf>,
    /// A deliberate bug, to see that it is found (a build with the feature `mutants`); `list` names them
    #[arg(long)]
    mutant: Option<String>,
    /// With several seeds: end with the first that fails
    #[arg(long)]
    first: bool,
    /// Do not look for the fewest faults that break it
    #[arg(long)]
    no_shrink: bool,
    /// Worlds at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

impl Args {
    fn config(&self, seed: u64) -> Config {
        let agents = match self.agents_max {
            Some(max) => {
                self.agents
                    + u32::try_from(seed.wrapping_mul(0x9e37_79b9) % u64::from(max - self.agents + 1)).unwrap_or(0)
            }
            None => self.agents,
        };
        Config {
            seed,
            agents,
            for_ms: self.minutes * 60_000,
            tasks_per_agent: self.tasks_per_agent,
            deploy_every_ms: self.deploy_every * 1_000,
            profile: self.faults,
            only: self.only.clone(),
        }
    }

    /// What to type to see one world again.
    fn again(&self, config: &Config, only: Option<&[u32]>) -> String {
        let profile = clap::ValueEnum::to_possible_value(&config.profile).expect("no profile is hidden");
        let mut words = format!(
            "cargo xtask sim --seed {} --agents {} --minutes {} --faults {}",
            config.seed,
            config.agents,
            self.minutes,
            profile.get_name()
        );
        if let Some(only) = only {
            let numbers: Vec<String> = only.iter().map(u32::to_string).collect();
            words.push_str(&format!(" --only {}", numbers.join(",")));
        }
        if let Some(mutant) = &self.mutant {
            words.push_str(&format!(" --mutant {mutant}"));
        }
        words
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if let Some(max) = args.agents_max {
        anyhow::ensure!(max >= args.agents, "--agents-max is less than --agents");
    }
    match args.mutant.as_deref() {
        Some("list") => {
            for (name, what) in skein_api::mutant::MUTANTS {
                println!("{name:<18} {what}");
            }
            return Ok(ExitCode::SUCCESS);
        }
        Some(name) => skein_api::mutant::activate(name).map_err(anyhow::Error::msg)?,
        None => {}
    }
    let arrivals = args.arrivals.as_ref().map(read_arrivals).transpose()?.unwrap_or_default();
    if args.seeds == 1 { one(&args, &arrivals) } else { Ok(many(&args, &arrivals)) }
}

fn one(args: &Args, arrivals: &[Arrival]) -> anyhow::Result<ExitCode> {
    let config = args.config(args.seed);
    let began = Instant::now();
    let outcome = match &args.trace {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("failed to create {}", path.display()))?;
            World::new(config.clone(), arrivals.to_vec(), Some(file)).run()
        }
        None => shrink::run(&config, arrivals),
    };
    println!("{}", line(&config, &outcome, began.elapsed().as_secs_f64()));
    if outcome.verdict == Verdict::Passed {
        return Ok(ExitCode::SUCCESS);
    }
    explain(args, arrivals, &config, &outcome);
    Ok(ExitCode::FAILURE)
}

fn line(config: &Config, outcome: &Outcome, seconds: f64) -> String {
    let Stats { events, heartbeats, faults, requests, answered, actions, commits, tasks, .. } = outcome.stats;
    format!(
        "seed {} hash {:016x}: {} at {} s; {} hosts, {tasks} tasks, {events} events ({heartbeats} heartbeats), \
         {faults} faults, {answered} of {requests} requests, {commits} commits, {actions} actions, in {seconds:.2} s",
        config.seed,
        outcome.hash,
        outcome.verdict,
        outcome.at_ms / 1_000,
        config.agents,
    )
}

/// A failed run: how to see it again, and with how few faults it still fails.
fn explain(args: &Args, arrivals: &[Arrival], config: &Config, outcome: &Outcome) {
    println!("  again: {}", args.again(config, config.only.as_deref()));
    if args.no_shrink || args.trace.is_some() {
        return;
    }
    let all: Vec<u32> = match outcome.faults.as_slice() {
        [] => config.only.clone().unwrap_or_else(|| (0..10_000).collect()),
        faults => faults.iter().map(|(at, _)| *at).collect(),
    };
    let fewest = shrink::shrink(config, arrivals, all, SHRINK_RUNS_MAX);
    println!("  fewest faults: {}", args.again(config, Some(&fewest)));
    for (_, words) in outcome.faults.iter().filter(|(at, _)| fewest.contains(at)) {
        println!("    {words}");
    }
}

/// Several seeds, `jobs` at a time; each world has one thread.
fn many(args: &Args, arrivals: &[Arrival]) -> ExitCode {
    let next = AtomicU64::new(args.seed);
    let total = Mutex::new((0_u64, 0_u64, 0_u64, Vec::new()));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let enough = args.first && !total.lock().expect("nobody panics with it").3.is_empty();
                    if seed >= args.seed + args.seeds || enough {
                        return;
                    }
                    let config = args.config(seed);
                    let began = Instant::now();
                    let outcome = shrink::run(&config, arrivals);
                    let failed = outcome.verdict != Verdict::Passed;
                    if failed {
                        println!("{}", line(&config, &outcome, began.elapsed().as_secs_f64()));
                    }
                    let mut total = total.lock().expect("nobody panics with it");
                    total.0 += u64::from(config.agents) * outcome.at_ms;
                    total.1 += outcome.stats.faults;
                    total.2 += outcome.stats.events;
                    if failed {
                        total.3.push((config, outcome));
                    }
                }
            });
        }
    });
    let (agent_ms, faults, events, mut failed) = total.into_inner().expect("nobody panics with it");
    failed.sort_by_key(|(config, _)| config.seed);
    println!(
        "{} worlds, {} failed; {} agent-hours, {faults} faults, {events} events, in {:.1} s",
        args.seeds,
        failed.len(),
        agent_ms / 3_600_000,
        began.elapsed().as_secs_f64()
    );
    if let Some((config, outcome)) = failed.first() {
        println!("{}", line(config, outcome, 0.0));
        explain(args, arrivals, config, outcome);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Reads a recording through `gzip -dc`.
fn read_arrivals(path: &PathBuf) -> anyhow::Result<Vec<Arrival>> {
    let shown = path.display();
    let output = std::process::Command::new("gzip").arg("-dc").arg(path).output().context("failed to run gzip")?;
    anyhow::ensure!(output.status.success(), "failed to read {shown}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).with_context(|| format!("{shown} is not text"))?;
    let arrival = |(at, line): (usize, &str)| {
        let fields: Vec<f64> = line.split(',').map_while(|f| f.parse().ok()).collect();
        let [arrival_s, cpu_cores, mem_gib, duration_s, ..] = fields.as_slice() else {
            anyhow::bail!("{shown}:{}: not arrival_s,cpu_cores,mem_gib,duration_s", at + 1);
        };
        let whole = |x: f64| x.max(0.0) as u64;
        Ok(Arrival {
            // Bins of five minutes; within one they come evenly.
            at_ms: whole(arrival_s * 1_000.0) + (at as u64 * 7_919) % 300_000,
            lasts_ms: if *duration_s < 0.0 { u64::MAX >> 20 } else { whole(duration_s * 1_000.0).max(1_000) },
            nano_cpus: whole(cpu_cores * 1e9 / 8.0),
            mem_bytes: whole(mem_gib * f64::from(1 << 30) / 32.0),
        })
    };
    let mut arrivals = text.lines().enumerate().skip(1).map(arrival).collect::<anyhow::Result<Vec<_>>>()?;
    arrivals.sort_by_key(|a| a.at_ms);
    Ok(arrivals)
}
