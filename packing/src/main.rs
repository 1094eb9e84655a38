//! `skein-packing`: replays a trace from standard input. `cargo xtask bench packing` builds and starts it.
//!
//! One JSON object a line on standard output: `{"case","rule","metric","unit","value"}`.

#![expect(clippy::print_stdout, reason = "the program's output")]

use std::io::Read as _;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use skein_api::Strategy;
use skein_packing::{
    fleet::{Kinds, fleet},
    replay::{apart, churn, fill, hosts_used},
    rules::Rule,
    trace::{Arrival, Size, parse},
};

/// Fleets that are filled up, of cores and GiB: a name, kinds of hosts, how many. Each offers 57,600 cores, of which the trace
/// wants 64,799 at its height.
const FLEETS: &[(&str, &Kinds, usize)] = &[
    ("equal: 900 of 64/192", &[(64, 192)], 900),
    ("mixed A: 200 each of 32/128, 64/128, 64/256, 128/256", &[(32, 128), (64, 128), (64, 256), (128, 256)], 800),
    (
        "mixed B: 225 each of 16/112, 32/128, 48/192, 64/128, 96/192",
        &[(16, 112), (32, 128), (48, 192), (64, 128), (96, 192)],
        1_125,
    ),
    ("mixed C: 240 each of 16/128, 32/192, 64/256, 128/384", &[(16, 128), (32, 192), (64, 256), (128, 384)], 960),
];

/// The first so many fleets see the whole trace.
const CHURNED: usize = 2;

/// Hosts that are opened one by one: a name, the kind, enough of them for [`HOSTS_ARRIVALS`].
const OPENED: &[(&str, (u64, u64), usize)] = &[
    ("equal 64/384, opened one by one", (64, 384), 2_400),
    ("equal 64/256, opened one by one", (64, 256), 2_400),
    ("equal 64/192, opened one by one", (64, 192), 2_600),
];

/// Arrivals for which hosts are opened; they ask for 136,700 cores.
const HOSTS_ARRIVALS: usize = 50_000;

/// Places in the trace at which filling up starts, evenly over it.
const STARTS: usize = 8;

const RULES: &[Rule] = &[
    Rule::Skein(Strategy::Binpack),
    Rule::BestFit,
    Rule::FirstFit,
    Rule::Skein(Strategy::Spread),
    Rule::LeastLoaded,
    Rule::FewestTasks,
    Rule::Skein(Strategy::Random),
];

fn main() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("failed to read the trace from standard input")?;
    let arrivals = parse(&text)?;
    ensure!(arrivals.len() >= HOSTS_ARRIVALS, "the trace has less than {HOSTS_ARRIVALS} arrivals");
    for &(name, kinds, hosts) in FLEETS {
        fill_up(name, &fleet(kinds, hosts), &arrivals)?;
    }
    for &(name, kind, hosts) in OPENED {
        for rule in [Rule::Skein(Strategy::Binpack), Rule::BestFit, Rule::FirstFit] {
            let used = hosts_used(rule, &fleet(&[kind], hosts), &arrivals[..HOSTS_ARRIVALS]);
            let (used, bound) = used.context("the fleet is too small for the arrivals")?;
            print(name, rule, "hosts used", "", used as f64);
            print(name, rule, "hosts above the lower bound", "%", 100.0 * (used as f64 / bound as f64 - 1.0));
        }
    }
    let equal = Arrival { at_s: 0, size: Size { cores: 2, mem_mib: 3_584 }, stays_s: None, batch: 0 };
    for rule in [Rule::Skein(Strategy::Spread), Rule::FewestTasks] {
        let most = apart(rule, &fleet(&[(64, 192)], 1_000), &vec![equal; 30_000]);
        print("1,000 of 64/192, 30,000 of 2/3.5 that only arrive", rule, "max - min", "tasks", f64::from(most));
    }
    for &(name, kinds, hosts) in &FLEETS[..CHURNED] {
        for &rule in RULES {
            come_and_go(name, rule, &fleet(kinds, hosts), &arrivals);
        }
    }
    Ok(())
}

/// Means over the starts from which every rule came to a rejection, so that all are asked the same.
fn fill_up(name: &str, offered: &[Size], arrivals: &[Arrival]) -> Result<()> {
    let filled = |from: usize| RULES.iter().map(|rule| fill(*rule, offered, &arrivals[from..])).collect::<Vec<_>>();
    let starts = (0..STARTS).map(|start| filled(start * arrivals.len() / STARTS));
    let starts: Vec<_> = starts.filter(|rules| rules.iter().all(|filled| filled.rejected)).collect();
    ensure!(!starts.is_empty(), "{name}: from no start every rule comes to a rejection");
    let case = format!("{name}; filled");
    for (at, &rule) in RULES.iter().enumerate() {
        let mean = |of: fn(&(f64, f64)) -> f64| {
            starts.iter().map(|rules| of(&rules[at].allocated)).sum::<f64>() / starts.len() as f64
        };
        print(&case, rule, "CPU at first rejection", "%", mean(|a| a.0));
        print(&case, rule, "memory at first rejection", "%", mean(|a| a.1));
    }
    Ok(())
}

fn come_and_go(name: &str, rule: Rule, offered: &[Size], arrivals: &[Arrival]) {
    let out = churn(rule, offered, arrivals);
    let case = format!("{name}; whole trace");
    print(&case, rule, "rejections", "", out.rejections as f64);
    print(&case, rule, "CPU rejected", "%", out.cpu_rejected);
    print(&case, rule, "empty hosts", "", out.empty);
    print(&case, rule, "free slots of 16/112", "", out.large_slots);
    print(&case, rule, "imbalance", "% of a host", out.imbalance);
    print(&case, rule, "decisions", "1/s", out.decisions as f64 / out.seconds);
}

fn print(case: &str, rule: Rule, metric: &str, unit: &str, value: f64) {
    println!("{}", json!({ "case": case, "rule": rule.name(), "metric": metric, "unit": unit, "value": value }));
}
