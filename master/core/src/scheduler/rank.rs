//! Strategies: which of the nodes that fit is taken.
//!
//! Owns the order of preference (docs/scheduling.md, "Strategies"). It must not know filters. Every order is total:
//! what is equal otherwise goes to the lower position. Pure, no tasks, no channels.

use skein_api::{Resources, Strategy};

use super::{
    bits::{Bits, NodeIdx},
    eval::Evaluation,
    index::Load,
};

/// A share of 1: all that a node offers. 32 bits of fraction tell a byte in 4 GiB apart; no floats, so that the order
/// is the same on every machine.
pub(super) const SHARE_ONE: u64 = 1 << 32;

/// Preference of one node; the smallest wins. The parts are compared in turn, the position last.
pub(super) type Rank = ([u64; 3], NodeIdx);

/// The rank of a node for one more task beside `copies` of it that are counted as placed.
///
/// What a request takes is what is scarce for it. One that reserves CPU or memory ranks by the dominant share: the
/// larger of the two shares of the offer that would be set aside with it, then by tasks. One that reserves nothing
/// takes only a place, and ranks by tasks, then by the dominant share.
pub(super) fn rank(evaluation: &Evaluation<'_>, idx: NodeIdx, copies: u32) -> Rank {
    let request = evaluation.request;
    let load = evaluation.scheduler.index.load(idx);
    let asks = request.reservations;
    let share = dominant_share(load, asks, u64::from(copies) + 1);
    let tasks = u64::from(load.tasks) + u64::from(copies);
    let reserves = asks != Resources::default();
    let (first, second) = if reserves { (share, tasks) } else { (tasks, share) };
    let parts = match request.strategy {
        Strategy::Spread => [u64::from(evaluation.replicas(idx, copies)), first, second],
        Strategy::Binpack => [u64::MAX - first, u64::MAX - second, 0],
        // Chosen by seed, not by rank.
        Strategy::Random => [0; 3],
    };
    (parts, idx)
}

/// The larger of the shares of CPU and memory that are set aside with `times` more of `asks`.
fn dominant_share(load: &Load, asks: Resources, times: u64) -> u64 {
    let share = |used: u128, asks: u64, offered: u64| {
        let used = used + u128::from(asks) * u128::from(times);
        match (used, offered) {
            (0, _) => 0,
            // More than all of nothing: fuller than any other.
            (_, 0) => u64::MAX,
            // 2^96 × 2^32 is the largest product of a used amount that can come about: 2^32 tasks of 2^64.
            _ => u64::try_from(used.saturating_mul(u128::from(SHARE_ONE)) / u128::from(offered)).unwrap_or(u64::MAX),
        }
    };
    share(load.nano_cpus, asks.nano_cpus, load.offered.nano_cpus).max(share(
        load.mem_bytes,
        asks.mem_bytes,
        load.offered.mem_bytes,
    ))
}

/// The node that one task gets, of those that are left after filters and preferences.
pub(super) fn choose(evaluation: &Evaluation<'_>, left: &Bits, seed: u64) -> Option<NodeIdx> {
    match evaluation.request.strategy {
        Strategy::Random => left.nth(pick(seed, left.len())),
        Strategy::Spread | Strategy::Binpack => {
            left.iter().map(|idx| rank(evaluation, idx, 0)).min().map(|(_, idx)| idx)
        }
    }
}

/// A number under `count`, evenly for evenly chosen seeds; 0 when `count` is 0.
pub(super) fn pick(seed: u64, count: usize) -> usize {
    // Multiply and shift instead of a remainder: no bias worth a loop at these sizes.
    let scaled = (u128::from(mix(seed)) * count as u128) >> 64;
    usize::try_from(scaled).expect("less than count, which is a usize")
}

/// The seed of the `step`-th placement of a batch: placing one by one with these seeds gives the same nodes.
pub fn batch_seed(seed: u64, step: u32) -> u64 {
    mix(seed ^ mix(u64::from(step)))
}

/// One step of SplitMix64: neighbouring seeds give unrelated numbers.
fn mix(seed: u64) -> u64 {
    crate::rng::Rng::new(seed).next_u64()
}
