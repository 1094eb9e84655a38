//! Strategies: which of the nodes that fit is taken.
//!
//! Owns the order of preference (docs/scheduling.md, "Strategies"). It must not know filters. Every order is total:
//! what is equal otherwise goes to the lower position. Pure, no tasks, no channels.

use skein_api::Strategy;

use super::{
    bits::{Bits, NodeIdx},
    eval::Evaluation,
};

/// Bits of fraction of a share: all that a node offers is 2^23. A ten-millionth of a host is told apart, and what holds
/// twice its offer still fits into [`SHARE_MAX`]. No floats, so that the order is the same on every machine.
const SHARE_BITS: u32 = 23;

/// Larger shares count as this one: 24 bits of a key.
pub(super) const SHARE_MAX: u64 = (1 << 24) - 1;

/// More tasks on a node count as so many.
const TASKS_MAX: u64 = (1 << 24) - 1;

/// More replicas on a node count as so many.
const REPLICAS_MAX: u32 = (1 << 16) - 2;

/// Preference of one node; the smallest wins, the position last.
pub(super) type Rank = (u64, NodeIdx);

/// `floor(2^(64 + 23) / offered)`, at most 2^64 - 1: multiplied by it and shifted by 64, an amount is a share of what
/// is offered. Kept beside the offer, since a division costs as much as the rest of a key.
pub(super) fn reciprocal(offered: u64) -> u64 {
    let scaled = (1_u128 << (64 + SHARE_BITS)).checked_div(u128::from(offered)).unwrap_or(u128::MAX);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// The share of its offer that a node has set aside, in units of 2^-23, at most [`SHARE_MAX`].
pub(super) fn share(used: u64, reciprocal: u64) -> u64 {
    let share = (u128::from(used) * u128::from(reciprocal)) >> 64;
    u64::try_from(share).unwrap_or(u64::MAX).min(SHARE_MAX)
}

/// What share of `of` an amount is, in millionths, rounded down; of nothing as of one. For comparisons that show, not
/// for ranks.
pub fn millionths(amount: u64, of: u64) -> u64 {
    u64::try_from(u128::from(amount) * 1_000_000 / u128::from(of.max(1))).unwrap_or(u64::MAX)
}

/// Steps of a share that spread tells apart: 256 in what is offered. Shares above the offer are told apart up to twice
/// of it.
const STEP_BITS: u32 = SHARE_BITS - 8;

/// Tasks that spread tells apart.
const LEVEL_TASKS_MAX: u64 = 255;

/// Loads that spread tells apart: 512 steps of a share times 256 counts of tasks.
pub(super) const LEVELS: usize = 1 << 17;

/// How full a node is, for spread. The same for every request of its kind, so that one order of all nodes serves them:
/// those that reserve CPU or memory rank by the larger of the shares of the two that are set aside, in steps of 1/256 of
/// the offer, then by tasks; those that reserve nothing take only a place, and rank by tasks, then by the share.
pub(super) fn level(share: u64, tasks: u64, reserves: bool) -> u32 {
    let (steps, tasks) = (share >> STEP_BITS, tasks.min(LEVEL_TASKS_MAX));
    let level = if reserves { steps << 8 | tasks } else { tasks << 9 | steps };
    u32::try_from(level).expect("17 bits")
}

/// Spread: own replicas, then how full the node is without the task. Smaller is better; never `u64::MAX`.
pub(super) fn emptiest(replicas: u32, level: u32) -> u64 {
    u64::from(replicas.min(REPLICAS_MAX)) << 48 | u64::from(level)
}

/// How full binpack calls a node, of the shares that would be set aside with the task and what the task asks for: the
/// smaller share, over the dimensions that are asked for. What is least used of a host gets as used as it can, so
/// requests go to hosts of their own shape and neither CPU nor memory is left over alone. More tasks never make it
/// smaller. A task that asks for nothing sees the larger share.
pub(super) fn packed<const N: usize>(shares: [u64; N], asks: [u64; N]) -> u64 {
    let asked = shares.iter().zip(asks).filter(|(_, ask)| *ask > 0).map(|(share, _)| *share).min();
    asked.or_else(|| shares.into_iter().max()).unwrap_or_default()
}

/// Binpack: how full the node would be with the task, the fullest first. Smaller is better; never `u64::MAX`.
pub(super) fn fullest(share: u64, tasks: u64, reserves: bool) -> u64 {
    let tasks = tasks.min(TASKS_MAX);
    let (first, second) = if reserves { (share, tasks) } else { (tasks, share) };
    ((1 << 48) - 1) - (first << 24 | second)
}

/// The rank of a node for one more task beside `copies` of it that are counted as placed.
pub(super) fn rank(evaluation: &Evaluation<'_>, idx: NodeIdx, copies: u32) -> Rank {
    let request = evaluation.request;
    let asks = [request.reservations.nano_cpus, request.reservations.mem_bytes];
    let shares_with = |count| evaluation.scheduler.engine.shares_with(idx, asks, count);
    let tasks = u64::from(evaluation.scheduler.index.load(idx).tasks) + u64::from(copies);
    let reserves = asks != [0; 2];
    let key = match request.strategy {
        Strategy::Spread => {
            let [cpu, memory] = shares_with(copies);
            emptiest(evaluation.replicas(idx, copies), level(cpu.max(memory), tasks, reserves))
        }
        Strategy::Binpack => fullest(packed(shares_with(copies + 1), asks), tasks, reserves),
        // Chosen by seed, not by rank.
        Strategy::Random => 0,
    };
    (key, idx)
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
