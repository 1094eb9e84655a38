//! A cluster whose underlay delays, loses, doubles and reorders: it keeps its promises, only slower.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::{Impairment, Lab, MASTER, wait_for},
};

use super::{
    cluster,
    faults::states,
    history::{self, History},
    kills::settled,
    lab,
    recovery::{PAIR, fetch},
    support::Checks,
    watched::Watched,
};

/// For each host's cable. A frame from one host to another passes two: 100 ms ± 50 ms, and 5 % are lost.
const CABLE: Impairment = Impairment {
    delay: Duration::from_millis(50),
    jitter: Duration::from_millis(25),
    loss: 0.025,
    duplicate: 0.01,
    reorder: 0.025,
    rate: None,
};

/// Twice the time after which a silent node counts as lost.
const TWO_DETECTIONS: Duration = Duration::from_secs(30);

/// Requests by name, in each direction.
const FETCHES: usize = 5;

/// Services come up, find each other by name, and change their size; changes are acknowledged, and nobody counts as lost.
fn slow_but_right(lab: &Lab, cluster: &Cluster<'_>, history: &mut History, checks: &mut Checks) -> Result<()> {
    let nodes = states(cluster)?;
    let begin = Instant::now();
    let file = cluster.compose_file("s", PAIR)?;
    cluster.stack_up("s", &file)?;
    for _ in 0..FETCHES {
        for (from, name, expected) in [("s_a.1", "b", "in-b"), ("s_b.1", "a", "in-a")] {
            let got = fetch(cluster, from, name, 15);
            checks.ensure("found by name", got.as_ref().is_ok_and(|t| t == expected), format_args!("{got:?}"));
        }
    }
    loop {
        history.start();
        history.wait_for(300)?;
        history.settle()?;
        history.verify()?;
        // The pair and those that are watched.
        settled(lab, cluster, history.churn_tasks() + 2)?;
        if begin.elapsed() > TWO_DETECTIONS {
            break;
        }
    }
    let now = states(cluster)?;
    checks.ensure("no node counts as lost", now == nodes, format_args!("{nodes:?} -> {now:?}"));
    Ok(())
}

fn all(lab: &Lab, cluster: &Cluster<'_>, seed: u64) -> Result<()> {
    let watched = Watched::start(lab, cluster)?;
    let mut history = History::new(cluster.socket(), "h1", true, seed)?;
    let mut checks = Checks::default();
    for (host, seed) in [MASTER, "h1", "h2"].into_iter().zip(seed..) {
        lab.relay(host, CABLE, seed)?;
    }
    let from = Instant::now();
    slow_but_right(lab, cluster, &mut history, &mut checks)?;
    let [(_, packets), (_, requests)] = watched.since(from);
    // There and back: 9.75 % on average. More where this machine stood still for longer than a probe waits; that the
    // relays lost as much as they were asked to, their own counters say.
    let lost = packets.lost * 1_000 / packets.sent.max(1);
    checks.ensure("packets are lost as asked for", lost >= 70, &packets);
    checks.ensure("no request is lost", requests.lost == 0 && requests.answered > 20, &requests);
    for host in [MASTER, "h1", "h2"] {
        let relay = lab.relay_state(host)?.context("the relay is there")?;
        let counters = relay.counters;
        let frames = counters.passed + counters.lost;
        // 5 % of what the host sends, which is half of what passes; of few frames chance may lose more or fewer.
        let as_asked =
            if frames < 10_000 { counters.lost > 0 } else { (20..30).contains(&(counters.lost * 1_000 / frames)) };
        checks.ensure(host, as_asked && counters.overflowed == 0, format_args!("{counters:?}"));
        // As it was, at run time.
        lab.relay(host, Impairment::default(), 0)?;
    }
    // What was on its way has arrived; from then on nothing is lost.
    wait_for("answers without a delay", PATIENCE, || {
        let from = Instant::now();
        std::thread::sleep(Duration::from_millis(200));
        let [(_, packets), _] = watched.since(from);
        Ok((packets.slowest < CABLE.delay && packets.lost == 0).then_some(()))
    })?;
    let from = Instant::now();
    history.start();
    history.wait_for(300)?;
    history.settle()?;
    history.verify()?;
    settled(lab, cluster, history.churn_tasks() + 2)?;
    watched.lost_nothing(&mut checks, "without an impairment", from);
    watched.untouched()?;
    let [_, requests] = watched.stop();
    ensure!(requests.lost == 0, "{requests}");
    checks.finish()
}

#[test]
fn a_slow_and_lossy_underlay_breaks_no_promise() -> Result<()> {
    let seed = history::seed()?;
    let lab = lab("relayed", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    all(&lab, &cluster, seed).with_context(|| lab.logs(30)).with_context(|| format!("seed {seed}"))
}
