//! When an ended container task is started again.
//!
//! The policy's `delay_ms` is the least pause. Under it lies Docker's back-off, so that a delay of 0 does not spin:
//! 100 ms, doubled for each run in a row that ended within 10 s, at most a minute. All of it follows from what is in
//! the ledger, so a new agent goes on where the old one was.

use skein_api::{RestartCondition, RestartPolicy, TaskState, UnixMillis};

use crate::TaskLocal;

/// First pause of the back-off (Docker's).
pub const PAUSE_MIN_MS: u64 = 100;
/// Longest pause of the back-off (Docker's).
pub const PAUSE_MAX_MS: u64 = 60_000;
/// A run that lasted this long resets the back-off (Docker's).
pub const STABLE_MS: u64 = 10_000;
/// Times of restarts that are kept for `window_ms`: 1,000 × 14 bytes in the ledger. A policy that allows more
/// attempts within its window is held to this many.
pub const ATTEMPTS_KEPT_MAX: usize = 1_000;

/// What the policy says about an ended run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// Start it now.
    Now,
    /// Not before this time.
    At(UnixMillis),
    /// Leave it.
    Never,
}

/// Decides about the run that `local.status` shows as ended.
pub fn decide(policy: &RestartPolicy, local: &TaskLocal, now: UnixMillis) -> Restart {
    let failed = matches!(local.status.state, TaskState::Failed | TaskState::Rejected);
    let wanted = match policy.condition {
        RestartCondition::None => false,
        RestartCondition::OnFailure => failed,
        RestartCondition::Any => failed || local.status.state == TaskState::Complete,
    };
    if !wanted {
        return Restart::Never;
    }
    if local.status.since > now {
        // The clock went back: nobody knows how long ago it ended, and waiting for that time could take a year.
        return Restart::Now;
    }
    let mut at = local.status.since.plus_ms(policy.delay_ms.max(back_off_ms(local.quick_ends)));
    if let Some(max) = policy.max_attempts {
        if policy.window_ms == 0 {
            if local.restarts >= max {
                return Restart::Never;
            }
        } else {
            let max = (max as usize).min(ATTEMPTS_KEPT_MAX);
            if max == 0 {
                return Restart::Never;
            }
            // The attempt that must have left the window before there is room for another.
            let oldest = local.restarted_at.len().checked_sub(max).map(|i| local.restarted_at[i]);
            if let Some(oldest) = oldest.filter(|oldest| *oldest <= now) {
                at = at.max(oldest.plus_ms(policy.window_ms));
            }
        }
    }
    if at <= now { Restart::Now } else { Restart::At(at) }
}

/// Notes a restart by policy.
pub fn note(policy: &RestartPolicy, local: &mut TaskLocal, now: UnixMillis) {
    local.restarts = local.restarts.saturating_add(1);
    if policy.max_attempts.is_some() && policy.window_ms != 0 {
        local.restarted_at.push(now);
        let surplus = local.restarted_at.len().saturating_sub(ATTEMPTS_KEPT_MAX);
        local.restarted_at.drain(..surplus);
    }
}

/// Forgets earlier restarts: a user started the container.
pub fn reset(local: &mut TaskLocal) {
    local.restarts = 0;
    local.restarted_at.clear();
    local.quick_ends = 0;
}

fn back_off_ms(quick_ends: u32) -> u64 {
    match quick_ends {
        0 => 0,
        n => (PAUSE_MIN_MS << (n - 1).min(16)).min(PAUSE_MAX_MS),
    }
}

#[cfg(test)]
mod tests {
    use skein_api::TaskStatus;

    use super::*;

    fn ended(state: TaskState, since: u64) -> TaskLocal {
        TaskLocal { status: TaskStatus { state, since: UnixMillis(since), ..Default::default() }, ..Default::default() }
    }

    fn check(policy: RestartPolicy, local: &TaskLocal, now: u64, expected: Restart) {
        assert_eq!(decide(&policy, local, UnixMillis(now)), expected, "{policy:?} {local:?} at {now}");
    }

    #[test]
    fn conditions() {
        use RestartCondition::{Any, None, OnFailure};
        use TaskState::{Complete, Failed, Rejected};
        for (condition, state, again) in [
            (None, Failed, false),
            (None, Complete, false),
            (OnFailure, Complete, false),
            (OnFailure, Failed, true),
            (OnFailure, Rejected, true),
            (Any, Complete, true),
            (Any, Failed, true),
            (Any, TaskState::Shutdown, false),
        ] {
            let policy = RestartPolicy { condition, delay_ms: 0, ..Default::default() };
            check(policy, &ended(state, 10), 10, if again { Restart::Now } else { Restart::Never });
        }
    }

    #[test]
    fn the_delay_is_the_least_pause() {
        let policy = RestartPolicy { delay_ms: 5_000, ..Default::default() };
        check(policy, &ended(TaskState::Failed, 1_000), 1_000, Restart::At(UnixMillis(6_000)));
        check(policy, &ended(TaskState::Failed, 1_000), 6_000, Restart::Now);
        let quick = TaskLocal { quick_ends: 20, ..ended(TaskState::Failed, 0) };
        check(policy, &quick, 0, Restart::At(UnixMillis(PAUSE_MAX_MS)));
        let third = TaskLocal { quick_ends: 3, ..ended(TaskState::Failed, 0) };
        check(RestartPolicy { delay_ms: 0, ..Default::default() }, &third, 0, Restart::At(UnixMillis(400)));
    }

    #[test]
    fn a_clock_that_went_back_holds_nothing_up() {
        let policy = RestartPolicy { delay_ms: 5_000, max_attempts: Some(1), window_ms: 1_000, ..Default::default() };
        let year = 31_536_000_000;
        let local = TaskLocal { restarted_at: vec![UnixMillis(year)], ..ended(TaskState::Failed, year) };
        check(policy, &local, 1_000, Restart::Now);
        let local = TaskLocal { restarted_at: vec![UnixMillis(year)], ..ended(TaskState::Failed, 1_000) };
        check(policy, &local, 2_000, Restart::At(UnixMillis(6_000)));
    }

    #[test]
    fn attempts_are_counted_for_ever_or_within_the_window() {
        let policy = RestartPolicy { delay_ms: 0, max_attempts: Some(2), ..Default::default() };
        let mut local = ended(TaskState::Failed, 0);
        for _ in 0..2 {
            check(policy, &local, 0, Restart::Now);
            note(&policy, &mut local, UnixMillis(0));
        }
        check(policy, &local, 1 << 40, Restart::Never);

        let windowed = RestartPolicy { window_ms: 1_000, ..policy };
        let mut local = ended(TaskState::Failed, 0);
        note(&windowed, &mut local, UnixMillis(100));
        note(&windowed, &mut local, UnixMillis(200));
        check(windowed, &local, 300, Restart::At(UnixMillis(1_100)));
        check(windowed, &local, 1_100, Restart::Now);
        note(&windowed, &mut local, UnixMillis(1_100));
        check(windowed, &local, 1_101, Restart::At(UnixMillis(1_200)));
        reset(&mut local);
        check(windowed, &local, 1_101, Restart::Now);
    }
}
