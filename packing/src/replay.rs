//! Replays: filling up, coming and going, counting hosts.

use std::{cmp::Reverse, collections::BinaryHeap, time::Instant};

use crate::{
    fleet::Loads,
    rules::Rule,
    trace::{Arrival, Size, batches},
};

/// What large requests ask for: the largest of the trace.
pub const LARGE: Size = Size { cores: 16, mem_mib: 112 << 10 };

/// Nothing is sampled in the first day: the fleet fills.
const WARM_S: u64 = 86_400;

/// Seconds between samples.
const SAMPLE_S: u64 = 3_600;

/// What filling up gives.
#[derive(Clone, Copy, Debug)]
pub struct Filled {
    /// Tasks that were placed.
    pub placed: usize,
    /// Percent of CPU and of memory set aside when the first was rejected.
    pub allocated: (f64, f64),
    /// Whether one was rejected before the arrivals ended.
    pub rejected: bool,
}

/// Tasks come and never go, until the first rejection.
pub fn fill(rule: Rule, offered: &[Size], arrivals: &[Arrival]) -> Filled {
    let (loads, placed) = arrive(rule, offered, arrivals, |_| {});
    Filled { placed, allocated: loads.allocated(), rejected: placed < arrivals.len() }
}

/// The most hosts that ever stand apart when tasks only come: the largest number of tasks on a host less the smallest,
/// looked at after each, so each comes alone.
pub fn apart(rule: Rule, offered: &[Size], arrivals: &[Arrival]) -> u32 {
    let mut most = 0;
    let one_by_one: Vec<Arrival> = (0..).zip(arrivals).map(|(batch, one)| Arrival { batch, ..*one }).collect();
    arrive(rule, offered, &one_by_one, |loads| {
        let (min, max) = loads.tasks.iter().fold((u32::MAX, 0), |(min, max), &tasks| (min.min(tasks), max.max(tasks)));
        most = most.max(max - min);
    });
    most
}

/// Hosts used by tasks that only come, and the lower bound: the larger of all CPU and all memory over one host's. None
/// where the fleet is too small.
pub fn hosts_used(rule: Rule, offered: &[Size], arrivals: &[Arrival]) -> Option<(usize, u64)> {
    let (loads, placed) = arrive(rule, offered, arrivals, |_| {});
    let sum = |of: fn(&Size) -> u64| arrivals.iter().map(|arrival| of(&arrival.size)).sum::<u64>();
    let host = offered.first()?;
    let bound = sum(|size| size.cores).div_ceil(host.cores).max(sum(|size| size.mem_mib).div_ceil(host.mem_mib));
    (placed == arrivals.len()).then(|| (offered.len() - loads.empty(), bound))
}

/// Places batches until the end or the first rejection; what is set aside then, and how many were placed.
fn arrive(rule: Rule, offered: &[Size], arrivals: &[Arrival], mut look: impl FnMut(&Loads)) -> (Loads, usize) {
    let mut loads = Loads::new(offered.to_vec());
    let mut chooser = rule.chooser(offered);
    let mut placed = 0;
    for batch in batches(arrivals) {
        let hosts = chooser.place(&mut loads, number(placed), number(batch.len()), batch[0].size);
        placed += hosts.len();
        look(&loads);
        if hosts.len() < batch.len() {
            must_be_full(&loads, batch[0].size);
            break;
        }
    }
    (loads, placed)
}

fn number(count: usize) -> u32 {
    u32::try_from(count).expect("a trace has fewer than 2^32 arrivals")
}

/// A rejection is true: no host has room.
fn must_be_full(loads: &Loads, size: Size) {
    let room = (0..loads.offered.len()).find(|host| loads.fits(*host, size));
    assert_eq!(room, None, "{size:?} was rejected, and this host has room");
}

/// What coming and going gives. Means are over the hours after the first day.
#[derive(Clone, Copy, Debug, Default)]
pub struct Churned {
    /// Tasks that found no host; they do not wait.
    pub rejections: u64,
    /// Percent of the CPU that was asked for and rejected, of all that was asked for.
    pub cpu_rejected: f64,
    /// Mean number of hosts without a task.
    pub empty: f64,
    /// Mean number of large requests that would still fit.
    pub large_slots: f64,
    /// Mean standard deviation over hosts of the larger share, in percent of a host.
    pub imbalance: f64,
    /// Placements and removals with what they cost, in seconds.
    pub seconds: f64,
    /// How many decisions.
    pub decisions: u64,
}

/// Tasks come in their batches, stay for their time and go. A task that goes does so before those that come at the same second.
pub fn churn(rule: Rule, offered: &[Size], arrivals: &[Arrival]) -> Churned {
    let mut loads = Loads::new(offered.to_vec());
    let mut chooser = rule.chooser(offered);
    let mut ends: BinaryHeap<Reverse<(u64, u32, usize, Size)>> = BinaryHeap::new();
    let mut samples = Vec::new();
    let (mut out, mut asked, mut refused) = (Churned::default(), 0, 0);
    let mut next_sample = WARM_S;
    let began = Instant::now();
    let mut aside = 0.0;
    let mut first = 0;
    for batch in batches(arrivals) {
        let Arrival { at_s, size, .. } = batch[0];
        while let Some(&Reverse((end, task, host, size))) = ends.peek() {
            if end > at_s {
                break;
            }
            ends.pop();
            loads.remove(host, size);
            chooser.remove(task);
        }
        if at_s >= next_sample {
            let paused = Instant::now();
            samples.push([loads.empty() as f64, loads.slots(LARGE) as f64, loads.imbalance()]);
            next_sample = at_s + SAMPLE_S;
            aside += paused.elapsed().as_secs_f64();
        }
        out.decisions += batch.len() as u64;
        asked += size.cores * batch.len() as u64;
        let hosts = chooser.place(&mut loads, first, number(batch.len()), size);
        for ((task, host), arrival) in (first..).zip(&hosts).zip(batch) {
            if let Some(stays) = arrival.stays_s {
                ends.push(Reverse((at_s + stays, task, *host, size)));
            }
        }
        if hosts.len() < batch.len() {
            must_be_full(&loads, size);
            let rejected = (batch.len() - hosts.len()) as u64;
            out.rejections += rejected;
            refused += size.cores * rejected;
        }
        first += number(batch.len());
    }
    out.seconds = began.elapsed().as_secs_f64() - aside;
    out.cpu_rejected = 100.0 * refused as f64 / (asked as f64).max(1.0);
    let mean =
        |at: usize| samples.iter().map(|sample: &[f64; 3]| sample[at]).sum::<f64>() / (samples.len() as f64).max(1.0);
    (out.empty, out.large_slots, out.imbalance) = (mean(0), mean(1), mean(2));
    out
}
