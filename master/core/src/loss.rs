//! Which of the silent nodes are given up, so that their tasks are replaced: not too many at once.
//!
//! One host that is silent has failed. A third of all hosts that are silent at once have not: a switch has, or the master's
//! own line. Replacing all their tasks then would put a third of the load on the others, and take it away again a
//! minute later. So nodes are given up on credit: a twentieth of the cluster (two at least) at once, and then one
//! hundredth of it per minute (six nodes at least). A loss that is real is mended all the same, the longest silent
//! first, only slower; an operator who knows better removes the node, which is not rationed.
//!
//! ```text
//!         silent for DETECTION            credit
//! heard ───────────────────────> waiting ─────────> given up
//!   ^                               │                  │
//!   └───────────── heard ───────────┴──────────────────┘
//! ```
//!
//! Memory of the leading master, like all liveness.

use std::collections::BTreeSet;

use skein_api::NodeId;

/// Of a hundred nodes, how many may be given up at once.
const AT_ONCE_PERCENT: u64 = 5;
/// So many at least: in a cluster of three, two hosts can fail.
const AT_ONCE_MIN: u64 = 2;
/// Of a hundred nodes, how many more per minute.
const PER_MINUTE_PERCENT: u64 = 1;
/// So many per minute at least.
const PER_MINUTE_MIN: u64 = 6;
/// Credit is counted in thousandths of a node.
const NODE: u64 = 1_000;

/// Silent nodes, and the credit for giving them up. O(log nodes) per node.
#[derive(Clone, Debug)]
pub(crate) struct Loss {
    /// Silent nodes that are not given up, by when they were found silent.
    waiting: BTreeSet<(u64, NodeId)>,
    given_up: BTreeSet<NodeId>,
    credit: u64,
    /// Until when credit was given.
    at_mono_ms: u64,
    /// The operator was told of this shortage.
    told: bool,
}

impl Loss {
    /// Full credit, whatever the number of nodes will be.
    pub(crate) fn new(now_mono_ms: u64) -> Self {
        Self {
            waiting: BTreeSet::new(),
            given_up: BTreeSet::new(),
            credit: u64::MAX,
            at_mono_ms: now_mono_ms,
            told: false,
        }
    }

    /// A node was found silent.
    pub(crate) fn silent(&mut self, node: &NodeId, now_mono_ms: u64) {
        self.waiting.insert((now_mono_ms, node.clone()));
    }

    /// A node was heard, or is none any more.
    pub(crate) fn forget(&mut self, node: &NodeId) {
        self.given_up.remove(node);
        self.waiting.retain(|(_, waiting)| waiting != node);
    }

    /// A node is given up, whatever the credit.
    pub(crate) fn give_up_now(&mut self, node: &NodeId) {
        self.forget(node);
        self.given_up.insert(node.clone());
    }

    /// Whether the tasks of a node are to be replaced.
    pub(crate) fn is_given_up(&self, node: &NodeId) -> bool {
        self.given_up.contains(node)
    }

    /// Gives up as many of the waiting nodes as there is credit for in a cluster of `nodes`, and says which. The other
    /// part of the answer is how many still wait, once for each shortage.
    pub(crate) fn give_up(&mut self, nodes: u64, now_mono_ms: u64) -> (Vec<NodeId>, Option<usize>) {
        let per_minute = (nodes * PER_MINUTE_PERCENT / 100).max(PER_MINUTE_MIN);
        let at_once = (nodes * AT_ONCE_PERCENT / 100).max(AT_ONCE_MIN);
        let passed_ms = now_mono_ms.saturating_sub(self.at_mono_ms);
        self.at_mono_ms = now_mono_ms;
        let earned = passed_ms.saturating_mul(per_minute) * NODE / 60_000;
        self.credit = self.credit.saturating_add(earned).min(at_once * NODE);
        let mut gone = Vec::new();
        while (self.credit >= NODE || skein_api::mutant!("mass-loss"))
            && let Some((_, node)) = self.waiting.pop_first()
        {
            self.credit = self.credit.saturating_sub(NODE);
            self.given_up.insert(node.clone());
            gone.push(node);
        }
        self.told &= !self.waiting.is_empty();
        let short =
            (!self.waiting.is_empty() && !std::mem::replace(&mut self.told, true)).then_some(self.waiting.len());
        (gone, short)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u64) -> NodeId {
        NodeId::new(format!("n{n:04}"))
    }

    #[test]
    fn a_few_are_given_up_at_once_and_many_one_after_the_other() {
        let check = |nodes: u64, silent: u64, at_once: usize, after_a_minute: usize| {
            let mut loss = Loss::new(0);
            loss.give_up(nodes, 500);
            (0..silent).for_each(|n| loss.silent(&node(n), 1_000));
            let (gone, short) = loss.give_up(nodes, 1_000);
            assert_eq!(gone.len(), at_once, "{silent} of {nodes}");
            let wait = usize::try_from(silent).expect("few") - at_once;
            assert_eq!(short, (wait > 0).then_some(wait));
            let later: usize = (1..=200)
                .map(|tick| {
                    let (gone, short) = loss.give_up(nodes, 1_000 + tick * 300);
                    assert_eq!(short, None, "told once");
                    gone.len()
                })
                .sum();
            assert_eq!(later, after_a_minute, "{silent} of {nodes}");
        };
        check(3, 1, 1, 0);
        check(3, 3, 2, 1);
        check(100, 5, 5, 0);
        check(100, 30, 5, 6);
        check(10_000, 500, 500, 0);
        check(10_000, 10_000, 500, 100);
    }

    #[test]
    fn one_that_is_heard_is_given_up_no_more() {
        let mut loss = Loss::new(0);
        (0..3).for_each(|n| loss.silent(&node(n), n));
        loss.forget(&node(0));
        assert_eq!(loss.give_up(3, 10).0, [node(1), node(2)]);
        assert!(loss.is_given_up(&node(1)));
        loss.forget(&node(1));
        assert!(!loss.is_given_up(&node(1)) && loss.is_given_up(&node(2)));
    }
}
