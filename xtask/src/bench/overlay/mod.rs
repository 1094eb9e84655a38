//! `cargo xtask bench overlay`: our overlay beside Swarm's of the same engines, a bare VXLAN device and the underlay.
//!
//! One lab, all ways taking turns, medians of several rounds; `rig` makes the ways, `load` loads them, `life` is what
//! happens around traffic. The programs are release builds, this one too, for it makes part of the load.

mod life;
mod load;
mod rig;

use std::{os::unix::process::CommandExt as _, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use self::{
    life::Plugin,
    load::Path,
    rig::{NETWORK, Rig, SWARM},
};
use super::{
    Outcome, figures,
    rows::{Goal, Row},
};
use crate::{
    cli::{repository_root, target_dir},
    test, ui,
};

/// Name of the benchmark.
const NAME: &str = "overlay";
/// Endpoints made and taken away one after the other, for the time of one.
const ENDPOINTS: u32 = 50;

/// Arguments of `bench overlay`.
#[derive(Clone, Debug, Args)]
pub struct OverlayArgs {
    /// How many rounds; the figures are their medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds that each load lasts in each round
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// This is the release build, and the programs beside it are too
    #[arg(long, hide = true)]
    built: bool,
}

/// Runs it.
///
/// # Errors
/// Something does not start, or is not answered.
pub fn run(args: &OverlayArgs) -> Result<Outcome> {
    if !args.built {
        return Err(go_on_as_release()?);
    }
    let mut bench = Bench { rounds: args.rounds, seconds: args.seconds, figures: Vec::new() };
    let rig = Rig::up()?;
    let all = rig.paths()?;
    let paths: Vec<&Path> = all.iter().collect();
    for round in 1..=args.rounds {
        ui::note(&format!("round {round} of {}", args.rounds));
        bench.load(&paths, |path| path.name, round)?;
        rig.fast_path(false)?;
        let ours: Vec<&Path> = paths.iter().copied().filter(|path| path.name == "Skein").collect();
        bench.load(&ours, |_| "Skein, routed", round)?;
        rig.fast_path(true)?;
    }
    ui::note("what is around traffic");
    bench.life(&rig, &paths)?;
    drop(all);
    rig.lab.down()?;
    let mut rows = bench.rows();
    // Built beside this program.
    let program = std::env::current_exe()?.with_file_name("examples").join("peers");
    let output = Command::new(program).output().context("failed to start the example peers")?;
    ensure!(output.status.success(), "the example peers failed: {}", String::from_utf8_lossy(&output.stderr));
    rows.extend(figures::read(output.stdout)?.into_iter().map(|figure| {
        let row = Row::new(NAME, &figure.case, &figure.metric, &figure.unit, figure.value);
        figure.at_most.map_or(row.clone(), |most| row.goal(Goal::AtMost(most)))
    }));
    let notes = notes(&bench);
    Ok(Outcome { name: NAME, title: "Overlay networks", rows, notes })
}

/// Builds the programs for speed and becomes the one of this. Answers why it could not.
fn go_on_as_release() -> Result<anyhow::Error> {
    let root = repository_root();
    let packages = ["xtask", "skein", "skein-master", "skein-agent", "demo-app"];
    let chosen = packages.iter().flat_map(|package| ["-p", package]);
    let args: Vec<&str> = ["build", "--quiet", "--release"].into_iter().chain(chosen).collect();
    test::must(test::cargo(&root, &args))?;
    figures::example("netlib", "peers")?;
    let program = target_dir()?.join("release/xtask");
    let error = Command::new(&program).args(std::env::args_os().skip(1)).arg("--built").exec();
    Ok(anyhow::Error::new(error).context(format!("failed to start {}", program.display())))
}

/// All rounds' values of one figure.
struct Figure {
    case: String,
    metric: &'static str,
    unit: &'static str,
    goal: Option<Goal>,
    values: Vec<f64>,
}

impl Figure {
    fn median(&self) -> f64 {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }
}

struct Bench {
    rounds: u32,
    seconds: u32,
    /// In the order in which they first came.
    figures: Vec<Figure>,
}

/// Metrics of load, with their units.
const ONE: (&str, &str) = ("TCP, 1 stream", "Gbit/s");
const FOUR: (&str, &str) = ("TCP, 4 streams", "Gbit/s");
const CPU_ONE: (&str, &str) = ("CPU for a Gbit, 1 stream", "ms");
const CPU_FOUR: (&str, &str) = ("CPU for a Gbit, 4 streams", "ms");
const ROUND_TRIP: (&str, &str) = ("TCP round trip, 64 bytes", "µs");
const DATAGRAMS: (&str, &str) = ("UDP, 64 bytes", "1000/s");

/// What is compared: metric, against whom, and the goal of the ratio.
const GOALS: [((&str, &str), &str, Goal); 6] = [
    (ONE, "VXLAN device", Goal::AtLeast(0.95)),
    (FOUR, "VXLAN device", Goal::AtLeast(0.90)),
    (ROUND_TRIP, "VXLAN device", Goal::AtMost(1.05)),
    (ONE, "Swarm", Goal::AtLeast(1.12)),
    (FOUR, "Swarm", Goal::AtLeast(1.30)),
    (DATAGRAMS, "Swarm", Goal::AtLeast(1.20)),
];

impl Bench {
    fn add(&mut self, case: &str, (metric, unit): (&'static str, &'static str), value: f64) {
        self.add_with(case, (metric, unit), None, value);
    }

    fn add_with(&mut self, case: &str, (metric, unit): (&'static str, &'static str), goal: Option<Goal>, value: f64) {
        match self.figures.iter_mut().find(|known| known.case == case && known.metric == metric) {
            Some(known) => known.values.push(value),
            None => self.figures.push(Figure { case: case.to_owned(), metric, unit, goal, values: vec![value] }),
        }
    }

    fn find(&self, case: &str, metric: &str) -> Option<&Figure> {
        self.figures.iter().find(|known| known.case == case && known.metric == metric)
    }

    /// Every load over each of these ways, under a name of its own; each round begins with another way.
    fn load(&mut self, paths: &[&Path], name: impl Fn(&Path) -> &'static str, round: u32) -> Result<()> {
        let duration = Duration::from_secs(u64::from(self.seconds));
        let order = || paths.iter().cycle().skip(round as usize % paths.len()).take(paths.len());
        for (count, speed, cpu) in [(1, ONE, CPU_ONE), (4, FOUR, CPU_FOUR)] {
            for path in order() {
                let streams = path.streams(count, self.seconds)?;
                self.add(name(path), speed, streams.gbit_per_s);
                self.add(name(path), cpu, streams.cpu_s_per_gbit * 1e3);
            }
        }
        for path in order() {
            self.add(name(path), ROUND_TRIP, path.round_trip_us(duration)?);
        }
        for path in order() {
            self.add(name(path), DATAGRAMS, path.datagrams_per_s(duration)? / 1e3);
        }
        Ok(())
    }

    fn life(&mut self, rig: &Rig, paths: &[&Path]) -> Result<()> {
        const START: (&str, &str) = ("container made, to its first answered packet", "ms");
        let [first, _] = rig.hosts();
        let server = |name: &str| paths.iter().copied().find(|path| path.name == name).context("a way is missing");
        for round in 1..=self.rounds {
            for (case, network, path) in [
                ("docker run, engine's bridge", "bridge", server("underlay")?),
                ("docker run, Swarm", SWARM, server("Swarm")?),
                ("docker run, Skein", NETWORK, server("Skein")?),
            ] {
                self.add(case, START, life::engine_start_ms(first, network, &path.server, path.to)?);
            }
            let path = server("Skein")?;
            let took = life::cluster_start_ms(rig, &path.server, path.to, round)?;
            self.add("skein run, with the wait for the other hosts", START, took);
        }
        let plugin = Plugin::of(rig, first)?;
        let mut all = 0.0;
        for number in 1..=ENDPOINTS {
            let (up, down) = plugin.endpoint_ms(number)?;
            let goal = Some(Goal::AtMost(10.0));
            self.add_with("network part of a container", ("start: all plugin calls", "ms"), goal, up);
            self.add("network part of a container", ("end: all plugin calls", "ms"), down);
            all += up + down;
        }
        let per_s = f64::from(ENDPOINTS) * 1e3 / all;
        self.add("network part of a container", ("endpoints made and taken away, one by one", "1/s"), per_s);
        let fabrics = life::vip_service(rig)?;
        for _ in 0..self.rounds {
            let took = life::vip_change_ms(rig, &fabrics)?;
            self.add("virtual address", ("command, until no host leads to the backend any more", "ms"), took);
        }
        let rest = life::at_rest(rig)?;
        let goal = Some(Goal::AtMost(0.0));
        self.add_with("10 s at rest", ("changes in the fabrics", ""), goal, rest.changes);
        self.add("10 s at rest", ("CPU of both agents", "% of a core"), rest.agents_percent);
        Ok(())
    }

    /// Medians, load beside that of the bare device, then the goals.
    fn rows(&self) -> Vec<Row> {
        let load = [ONE, FOUR, CPU_ONE, CPU_FOUR, ROUND_TRIP, DATAGRAMS];
        let is_load = |figure: &&Figure| load.iter().any(|(metric, _)| *metric == figure.metric);
        let plain = |figure: &Figure| Row::new(NAME, &figure.case, figure.metric, figure.unit, figure.median());
        let mut rows = Vec::new();
        for (metric, _) in load {
            rows.extend(self.figures.iter().filter(|figure| figure.metric == metric).map(|figure| {
                let limit = self.find("VXLAN device", metric).map(Figure::median);
                limit.map_or(plain(figure), |limit| plain(figure).baseline(limit))
            }));
        }
        for ((metric, _), against, goal) in GOALS {
            if let (Some(ours), Some(theirs)) = (self.find("Skein", metric), self.find(against, metric)) {
                let ratio = ours.median() / theirs.median();
                rows.push(Row::new(NAME, &format!("Skein by {against}"), metric, "ratio", ratio).goal(goal));
            }
        }
        rows.extend(self.figures.iter().filter(|figure| !is_load(figure)).map(|figure| match figure.goal {
            Some(goal) => plain(figure).goal(goal),
            None => plain(figure),
        }));
        rows
    }
}

fn notes(bench: &Bench) -> Vec<String> {
    let spread = |figure: &Figure| {
        let (low, high) = figure.values.iter().fold((f64::MAX, 0.0_f64), |(l, h), v| (l.min(*v), h.max(*v)));
        (high - low) / figure.median() * 100.0
    };
    let load = [ONE, FOUR, ROUND_TRIP, DATAGRAMS];
    let mut spreads: Vec<f64> =
        bench.figures.iter().filter(|f| load.iter().any(|(metric, _)| *metric == f.metric)).map(spread).collect();
    spreads.sort_by(f64::total_cmp);
    let typical = spreads.get(spreads.len() / 2).copied().unwrap_or_default();
    let most = spreads.last().copied().unwrap_or_default();
    vec![
        format!(
            "Medians of {} rounds in one lab of two hosts with an engine each, joined by a bridge; every load lasts {} s and              the ways take turns. Baseline of loads: a VXLAN device whose only peer is the other host, straight in the              container, the least that any VXLAN overlay does. Swarm: an attachable overlay of the same engines. Both ends              and both hosts share the cores. Largest less smallest value of a load: {typical:.0} % of its median typically,              {most:.0} % at most.",
            bench.rounds, bench.seconds
        ),
        "CPU: busy time of all cores while `iperf3` runs, by what its receiver got. The network part of a container: what          the engine asks the plugin before a container starts, asked in its place at the plugin's socket; moving the link          into the container is the engine's own. Slab: objects in use times their size, which is what state costs without          the rest of half-filled pages."
            .to_owned(),
    ]
}
