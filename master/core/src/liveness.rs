//! Who is heard of: memory of the leading master, never stored.
//!
//! ```text
//!            heard                     silent for DETECTION
//! unknown ───────────> ready ──────────────────────────────> down
//!    │                   ^                                    │
//!    │ silent since it   └──────────────── heard ─────────────┘
//!    │ joined or this master started, for RETURN ──> down
//! ```
//!
//! Only time in which this master looked at the clock counts as silence: one that was paused, or waited for its disk, finds
//! the words of that time unread, and must not give up every host before it reads them.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{NodeId, NodeState, NodeStatus, UnixMillis};

use crate::command::Now;

/// How often an agent sends a heartbeat, in a cluster that is not large.
pub const HEARTBEAT_MS: u64 = 5_000;

/// The longest time between two: two of them, and the time for one to be sent again, are within the detection period.
const HEARTBEAT_MS_MAX: u64 = 7_000;

/// From so many heartbeats a second on their period grows: each is some 50 µs of the master, so a tenth of a core. Agents
/// send each up to a fifth early, on the average a tenth.
const HEARTBEATS_PER_S: u64 = 1_700;

/// Silence after which a node counts as lost: three heartbeats, less what the next look at the clock and the commit may
/// take, so that it is known within these three.
pub const DETECTION_MS: u64 = 3 * HEARTBEAT_MS - 250;

/// How long a node may take for its first word to a master that has just started: three times the detection period. Ten
/// thousand agents that come back at once need half of it on two busy cores, and a late one whose tasks were replaced
/// would have been no less alive.
pub const RETURN_MS: u64 = 9 * HEARTBEAT_MS;

/// How often each agent of a cluster of so many nodes shall send a heartbeat.
pub fn heartbeat_ms(nodes: usize) -> u64 {
    (nodes as u64 * 1_000 / HEARTBEATS_PER_S).clamp(HEARTBEAT_MS, HEARTBEAT_MS_MAX)
}

#[derive(Clone, Debug)]
struct Seen {
    /// Monotonic time of its last word; before the first one, of the word that would leave it until [`RETURN_MS`].
    last_mono_ms: u64,
    /// As which it stands in `silence`, if it does.
    queued_ms: Option<u64>,
    heard: bool,
    state: NodeState,
    since: UnixMillis,
}

/// When each node was last heard of. O(log nodes) for each word, which moves nothing; a look at the clock is O(log nodes)
/// for each node whose word was [`DETECTION_MS`] ago when it was last looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Liveness {
    nodes: BTreeMap<NodeId, Seen>,
    /// The nodes that do not count as down, by their last word or an earlier one.
    silence: BTreeSet<(u64, NodeId)>,
    /// Monotonic time of the last look at the clock.
    looked_mono_ms: Option<u64>,
}

impl Liveness {
    /// Knows the node from now on; its detection period begins.
    pub(crate) fn ensure(&mut self, node: &NodeId, now: Now) {
        if !self.nodes.contains_key(node) {
            let patience_ms = if skein_api::mutant!("hasty-master") { 0 } else { RETURN_MS };
            let last_mono_ms = (now.mono_ms + patience_ms).saturating_sub(DETECTION_MS);
            let queued_ms = Some(last_mono_ms);
            let seen = Seen { last_mono_ms, queued_ms, heard: false, state: NodeState::Unknown, since: now.wall };
            self.silence.insert((last_mono_ms, node.clone()));
            self.nodes.insert(node.clone(), seen);
        }
    }

    pub(crate) fn remove(&mut self, node: &NodeId) {
        if let Some(queued_ms) = self.nodes.remove(node).and_then(|seen| seen.queued_ms) {
            self.silence.remove(&(queued_ms, node.clone()));
        }
    }

    /// The node said something; true when its state changed. One that is not known is not heard.
    pub(crate) fn heard(&mut self, node: &NodeId, now: Now) -> bool {
        let Some(seen) = self.nodes.get_mut(node) else { return false };
        (seen.last_mono_ms, seen.heard) = (now.mono_ms, true);
        // Its first word comes before the time that it had for it.
        if seen.queued_ms.is_none_or(|queued_ms| queued_ms > now.mono_ms) {
            if let Some(queued_ms) = seen.queued_ms.replace(now.mono_ms) {
                self.silence.remove(&(queued_ms, node.clone()));
            }
            self.silence.insert((now.mono_ms, node.clone()));
        }
        let changed = seen.state != NodeState::Ready;
        if changed {
            (seen.state, seen.since) = (NodeState::Ready, now.wall);
        }
        changed
    }

    /// Recomputes a node's state; true when it changed.
    pub(crate) fn refresh(&mut self, node: &NodeId, now: Now) -> bool {
        let Some(seen) = self.nodes.get_mut(node) else { return false };
        let silent_ms = now.mono_ms.saturating_sub(seen.last_mono_ms);
        let state = match (silent_ms >= DETECTION_MS, seen.heard) {
            (true, _) => NodeState::Down,
            (false, true) => NodeState::Ready,
            (false, false) => NodeState::Unknown,
        };
        if state == NodeState::Down
            && let Some(queued_ms) = seen.queued_ms.take()
        {
            self.silence.remove(&(queued_ms, node.clone()));
        }
        if state == seen.state {
            return false;
        }
        (seen.state, seen.since) = (state, now.wall);
        true
    }

    /// The node counts as silent for too long.
    pub(crate) fn lose(&mut self, node: &NodeId, now: Now) {
        if let Some(seen) = self.nodes.get_mut(node) {
            if let Some(queued_ms) = seen.queued_ms.take() {
                self.silence.remove(&(queued_ms, node.clone()));
            }
            (seen.state, seen.since) = (NodeState::Down, now.wall);
        }
    }

    /// The clock is looked at, as it is several times between two heartbeats. When that was not so, nobody's silence has
    /// grown meanwhile; O(nodes) then.
    pub(crate) fn look(&mut self, now: Now) {
        let missed_ms = now.mono_ms.saturating_sub(self.looked_mono_ms.unwrap_or(now.mono_ms));
        self.looked_mono_ms = Some(now.mono_ms);
        if missed_ms < HEARTBEAT_MS {
            return;
        }
        for (_, node) in std::mem::take(&mut self.silence) {
            let Some(seen) = self.nodes.get_mut(&node) else { continue };
            seen.last_mono_ms = now.mono_ms.min(seen.last_mono_ms + missed_ms).max(seen.last_mono_ms);
            seen.queued_ms = Some(seen.last_mono_ms);
            self.silence.insert((seen.last_mono_ms, node));
        }
    }

    /// Nodes that count as present but have been silent for too long. Those that only stand where their earlier word was
    /// are put where their last one is.
    pub(crate) fn overdue(&mut self, now: Now) -> Vec<NodeId> {
        if skein_api::mutant!("endless-patience") {
            return Vec::new();
        }
        let Some(latest) = now.mono_ms.checked_sub(DETECTION_MS) else { return Vec::new() };
        let mut overdue = Vec::new();
        while self.silence.first().is_some_and(|(queued_ms, _)| *queued_ms <= latest) {
            let Some((_, node)) = self.silence.pop_first() else { break };
            let Some(seen) = self.nodes.get_mut(&node) else { continue };
            if seen.last_mono_ms <= latest {
                overdue.push(node);
            } else {
                seen.queued_ms = Some(seen.last_mono_ms);
                self.silence.insert((seen.last_mono_ms, node));
            }
        }
        // They stay until they are found down, or heard.
        for node in &overdue {
            if let Some(queued_ms) = self.nodes.get(node).and_then(|seen| seen.queued_ms) {
                self.silence.insert((queued_ms, node.clone()));
            }
        }
        overdue
    }

    pub(crate) fn is_ready(&self, node: &NodeId) -> bool {
        self.nodes.get(node).is_some_and(|seen| seen.state == NodeState::Ready)
    }

    pub(crate) fn status(&self, node: &NodeId) -> NodeStatus {
        let Some(seen) = self.nodes.get(node) else { return NodeStatus::default() };
        let message = match seen.state {
            NodeState::Unknown => "not heard of since this master started",
            NodeState::Ready => "",
            NodeState::Down if !seen.heard => "not heard of since this master started",
            NodeState::Down => "no heartbeat for 15 s",
        };
        NodeStatus { state: seen.state, since: seen.since, message: message.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_agents_send_less_often() {
        let periods = [0, 1, 8_500, 10_000, 100_000].map(heartbeat_ms);
        assert_eq!(periods, [5_000, 5_000, 5_000, 5_882, 7_000]);
        const { assert!(2 * HEARTBEAT_MS_MAX < DETECTION_MS) };
    }

    fn at(mono_ms: u64) -> Now {
        Now { wall: UnixMillis(1_000_000 + mono_ms), mono_ms }
    }

    #[test]
    fn what_a_paused_master_did_not_hear_is_no_silence() {
        let node = NodeId::new("n");
        let mut liveness = Liveness::default();
        liveness.ensure(&node, at(0));
        liveness.heard(&node, at(1_000));
        liveness.look(at(1_000));
        for looked_ms in (2_000..=14_000).step_by(1_000) {
            liveness.look(at(looked_ms));
        }
        // 13 s of silence, then a pause of any length: the rest is left.
        let left = DETECTION_MS - 13_000;
        liveness.look(at(100_000));
        let check = |liveness: &mut Liveness, at_ms: u64, overdue: bool| {
            assert_eq!(!liveness.overdue(at(at_ms)).is_empty(), overdue, "at {at_ms}");
        };
        check(&mut liveness, 100_000, false);
        check(&mut liveness, 100_000 + left - 1, false);
        check(&mut liveness, 100_000 + left, true);
        // A word during the pause, read after it, counts from when it is read.
        liveness.heard(&node, at(100_100));
        check(&mut liveness, 100_100 + DETECTION_MS - 1, false);
        check(&mut liveness, 100_100 + DETECTION_MS, true);
        assert!(liveness.refresh(&node, at(100_100 + DETECTION_MS)));
        liveness.look(at(200_000));
        assert_eq!(liveness.status(&node).state, NodeState::Down, "who is lost already is not found by a pause");
        assert!(liveness.overdue(at(300_000)).is_empty());
    }

    #[test]
    fn states_follow_silence() {
        let node = NodeId::new("n");
        let mut liveness = Liveness::default();
        liveness.heard(&node, at(50));
        assert!(!liveness.refresh(&node, at(50)), "a node that is not known is not heard");
        liveness.ensure(&node, at(100));
        let mut check = |heard: bool, at_ms: u64, expected: NodeState| {
            let before = liveness.status(&node).state;
            let came = heard && liveness.heard(&node, at(at_ms));
            let overdue = liveness.overdue(at(at_ms));
            let changed = liveness.refresh(&node, at(at_ms)) || came;
            assert_eq!(changed, liveness.status(&node).state != before, "at {at_ms}");
            assert_eq!(!overdue.is_empty(), changed && expected == NodeState::Down, "at {at_ms} from {before:?}");
            assert_eq!(liveness.status(&node).state, expected, "at {at_ms}");
        };
        check(false, 100, NodeState::Unknown);
        check(false, 100 + RETURN_MS - 1, NodeState::Unknown);
        check(false, 100 + RETURN_MS, NodeState::Down);
        check(true, 50_000, NodeState::Ready);
        check(false, 50_000 + DETECTION_MS - 1, NodeState::Ready);
        check(false, 50_000 + DETECTION_MS, NodeState::Down);
        check(true, 70_000, NodeState::Ready);
    }
}
