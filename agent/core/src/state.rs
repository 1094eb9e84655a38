//! The state machine of one run of a task.
//!
//! ```text
//!  Accepted ──► Preparing ──► Ready ──► Starting ──► Running
//!     │             │           │          │            │
//!     │             │           │          ├────────────┼──► Complete   ended by itself with 0
//!     │             │           │          ├────────────┼──► Failed     ended by itself otherwise, or unhealthy
//!     ├─────────────┼───────────┼──────────┼────────────┴──► Shutdown   ended because it was asked to
//!     └─────────────┴───────────┴──────────┴───────────────► Rejected   could not be started
//!
//!  any of them ──► Remove                          (container, addresses and anonymous volumes are gone)
//! ```
//!
//! Forward jumps are normal: an agent that was away finds a container further than it left it. The states before
//! `Accepted` and `Orphaned` are the master's.

use skein_api::{TaskState, TaskStatus, UnixMillis};

/// All states, in order.
pub const ALL: [TaskState; 14] = [
    TaskState::New,
    TaskState::Pending,
    TaskState::Assigned,
    TaskState::Accepted,
    TaskState::Preparing,
    TaskState::Ready,
    TaskState::Starting,
    TaskState::Running,
    TaskState::Complete,
    TaskState::Shutdown,
    TaskState::Failed,
    TaskState::Rejected,
    TaskState::Remove,
    TaskState::Orphaned,
];

/// Whether a task may go from `from` to `to` within one run. Staying (`from == to`) is not a step.
pub fn may_step(from: TaskState, to: TaskState) -> bool {
    use TaskState::{Accepted, Complete, Failed, Orphaned, Rejected, Remove, Running, Shutdown};
    match (from, to) {
        (_, Orphaned) | (Orphaned | Remove, _) => false,
        (_, Remove) => true,
        (from, _) if from.is_terminal() => false,
        // The master's states end with the first word of the agent.
        (_, to) if to < Accepted => false,
        (Running, Rejected) => false,
        (_, Complete | Failed | Shutdown | Rejected) => true,
        (from, to) => from < to,
    }
}

/// Brings `old` to `new`: state only forward, `since` only when the state changes. A status that would go back keeps
/// its state and everything that was said with it.
pub fn step(old: &TaskStatus, mut new: TaskStatus, now: UnixMillis) -> TaskStatus {
    if old.state == new.state {
        new.since = old.since;
        return new;
    }
    if may_step(old.state, new.state) {
        new.since = now;
        return new;
    }
    old.clone()
}

#[cfg(test)]
mod tests {
    use TaskState::*;

    use super::*;

    /// The whole table, by hand: rows `from`, columns `to`, in the order of [`ALL`].
    #[test]
    fn the_transition_table_is_complete() {
        #[rustfmt::skip]
        let table = [
            //             New Pen Asg Acc Pre Rdy Sta Run Com Shu Fai Rej Rem Orp
            (New,        "  .   .   .   x   x   x   x   x   x   x   x   x   x   . "),
            (Pending,    "  .   .   .   x   x   x   x   x   x   x   x   x   x   . "),
            (Assigned,   "  .   .   .   x   x   x   x   x   x   x   x   x   x   . "),
            (Accepted,   "  .   .   .   .   x   x   x   x   x   x   x   x   x   . "),
            (Preparing,  "  .   .   .   .   .   x   x   x   x   x   x   x   x   . "),
            (Ready,      "  .   .   .   .   .   .   x   x   x   x   x   x   x   . "),
            (Starting,   "  .   .   .   .   .   .   .   x   x   x   x   x   x   . "),
            (Running,    "  .   .   .   .   .   .   .   .   x   x   x   .   x   . "),
            (Complete,   "  .   .   .   .   .   .   .   .   .   .   .   .   x   . "),
            (Shutdown,   "  .   .   .   .   .   .   .   .   .   .   .   .   x   . "),
            (Failed,     "  .   .   .   .   .   .   .   .   .   .   .   .   x   . "),
            (Rejected,   "  .   .   .   .   .   .   .   .   .   .   .   .   x   . "),
            (Remove,     "  .   .   .   .   .   .   .   .   .   .   .   .   .   . "),
            (Orphaned,   "  .   .   .   .   .   .   .   .   .   .   .   .   .   . "),
        ];
        assert_eq!(table.map(|(from, _)| from), ALL);
        for (from, row) in table {
            let row: Vec<&str> = row.split_whitespace().collect();
            assert_eq!(row.len(), ALL.len());
            for (to, want) in ALL.into_iter().zip(row) {
                assert_eq!(may_step(from, to), want == "x", "{from:?} -> {to:?}");
            }
        }
    }

    #[test]
    fn since_moves_with_the_state_only() {
        let old = TaskStatus { state: Starting, since: UnixMillis(5), ..Default::default() };
        let same = step(&old, TaskStatus { state: Starting, message: "m".into(), ..Default::default() }, UnixMillis(9));
        assert_eq!((same.since, same.message.as_str()), (UnixMillis(5), "m"));
        let next = step(&old, TaskStatus { state: Running, ..Default::default() }, UnixMillis(9));
        assert_eq!((next.state, next.since), (Running, UnixMillis(9)));
        let back = step(&next, TaskStatus { state: Ready, ..Default::default() }, UnixMillis(10));
        assert_eq!(back, next);
    }
}
