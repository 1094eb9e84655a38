//! Who is heard of: memory of the leading master, never stored.
//!
//! ```text
//!            heard                     silent for DETECTION
//! unknown ───────────> ready ──────────────────────────────> down
//!    │                   ^                                    │
//!    │ silent since the  └──────────────── heard ─────────────┘
//!    │ master's start for DETECTION ──> down
//! ```

use std::collections::BTreeMap;

use skein_api::{NodeId, NodeState, NodeStatus, UnixMillis};

use crate::command::Now;

/// How often an agent sends a heartbeat.
pub const HEARTBEAT_MS: u64 = 5_000;

/// Silence after which a node counts as lost: three heartbeats.
pub const DETECTION_MS: u64 = 3 * HEARTBEAT_MS;

#[derive(Clone, Debug)]
struct Seen {
    heard_mono_ms: Option<u64>,
    state: NodeState,
    since: UnixMillis,
}

/// When each node was last heard of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Liveness {
    start: Now,
    nodes: BTreeMap<NodeId, Seen>,
}

impl Liveness {
    pub(crate) fn new(start: Now) -> Self {
        Self { start, nodes: BTreeMap::new() }
    }

    /// Knows the node from now on.
    pub(crate) fn ensure(&mut self, node: &NodeId) {
        let since = self.start.wall;
        self.nodes.entry(node.clone()).or_insert(Seen { heard_mono_ms: None, state: NodeState::Unknown, since });
    }

    pub(crate) fn remove(&mut self, node: &NodeId) {
        self.nodes.remove(node);
    }

    pub(crate) fn heard(&mut self, node: &NodeId, now: Now) {
        self.ensure(node);
        if let Some(seen) = self.nodes.get_mut(node) {
            seen.heard_mono_ms = Some(now.mono_ms);
        }
    }

    /// Recomputes a node's state; true when it changed.
    pub(crate) fn refresh(&mut self, node: &NodeId, now: Now) -> bool {
        let start = self.start.mono_ms;
        let Some(seen) = self.nodes.get_mut(node) else { return false };
        let silent_ms = now.mono_ms.saturating_sub(seen.heard_mono_ms.unwrap_or(start));
        let state = match (silent_ms >= DETECTION_MS, seen.heard_mono_ms) {
            (true, _) => NodeState::Down,
            (false, Some(_)) => NodeState::Ready,
            (false, None) => NodeState::Unknown,
        };
        if state == seen.state {
            return false;
        }
        seen.state = state;
        seen.since = now.wall;
        true
    }

    /// Nodes that count as present but have been silent for too long.
    pub(crate) fn overdue(&self, now: Now) -> Vec<NodeId> {
        let overdue = |seen: &Seen| {
            let last = seen.heard_mono_ms.unwrap_or(self.start.mono_ms);
            seen.state != NodeState::Down && now.mono_ms.saturating_sub(last) >= DETECTION_MS
        };
        self.nodes.iter().filter(|(_, seen)| overdue(seen)).map(|(id, _)| id.clone()).collect()
    }

    pub(crate) fn is_ready(&self, node: &NodeId) -> bool {
        self.nodes.get(node).is_some_and(|seen| seen.state == NodeState::Ready)
    }

    pub(crate) fn status(&self, node: &NodeId) -> NodeStatus {
        let Some(seen) = self.nodes.get(node) else { return NodeStatus::default() };
        let message = match seen.state {
            NodeState::Unknown => "not heard of since this master started",
            NodeState::Ready => "",
            NodeState::Down => "no heartbeat for 15 s",
        };
        NodeStatus { state: seen.state, since: seen.since, message: message.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mono_ms: u64) -> Now {
        Now { wall: UnixMillis(1_000_000 + mono_ms), mono_ms }
    }

    #[test]
    fn states_follow_silence() {
        let node = NodeId::new("n");
        let mut liveness = Liveness::new(at(100));
        liveness.ensure(&node);
        let mut check = |heard: bool, at_ms: u64, expected: NodeState| {
            if heard {
                liveness.heard(&node, at(at_ms));
            }
            liveness.refresh(&node, at(at_ms));
            assert_eq!(liveness.status(&node).state, expected, "at {at_ms}");
        };
        check(false, 100, NodeState::Unknown);
        check(false, 100 + DETECTION_MS - 1, NodeState::Unknown);
        check(false, 100 + DETECTION_MS, NodeState::Down);
        check(true, 20_000, NodeState::Ready);
        check(false, 20_000 + DETECTION_MS - 1, NodeState::Ready);
        check(false, 20_000 + DETECTION_MS, NodeState::Down);
        check(true, 40_000, NodeState::Ready);
    }
}
