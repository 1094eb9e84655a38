//! Why each node does not fit, and the smallest change after which one would.
//!
//! Owns the words. What passes is decided by the filters on sets; a reason adds the figures of the one node. Pure, no
//! tasks, no channels.

use skein_api::Availability;

use super::{
    NodeFacts, Scheduler,
    bits::{Bits, NodeIdx},
    eval::Evaluation,
    expr::{NodeKey, Pattern},
    facts::NodeAttr,
    rank::millionths,
    request::{Amount, Filter, Request},
};

/// Most changes that are proposed.
const SUGGESTIONS_MAX: usize = 3;

/// One node and every filter that it does not pass, each on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeReasons {
    /// Name of the node.
    pub node: String,
    /// In the order of the filters; empty when it fits.
    pub reasons: Vec<String>,
}

/// A change that would make a node fit. The smallest first: what is only switched on, then amounts by their share of the
/// node, then ports, replicas, labels, hosts to bring back; then by position.
type Change = (u8, u64, NodeIdx, String);

impl Scheduler {
    /// Every node with all its reasons, by name. O(filters × nodes).
    pub fn reasons(&self, request: &Request) -> Vec<NodeReasons> {
        let evaluation = Evaluation::new(self, request);
        let passing = self.each_alone(&evaluation);
        let reasons = |idx: NodeIdx| {
            let failed = evaluation.hard.iter().zip(&passing).filter(|(_, passing)| !passing.contains(idx));
            let reasons = failed.map(|(filter, _)| self.reason(&evaluation, filter, idx)).collect();
            NodeReasons { node: self.facts(idx).name.clone(), reasons }
        };
        let mut all: Vec<NodeReasons> = self.index.nodes.iter().map(reasons).collect();
        all.sort_by(|a, b| a.node.cmp(&b.node));
        all
    }

    /// What to change so that a node fits; nothing while one does. Nodes are looked at that one filter rules out, or
    /// amounts alone.
    pub fn suggestions(&self, request: &Request) -> Vec<String> {
        let evaluation = Evaluation::new(self, request);
        if !evaluation.fitting().is_empty() {
            return Vec::new();
        }
        let passing = self.each_alone(&evaluation);
        let mut changes: Vec<Change> = Vec::new();
        for idx in self.index.nodes.iter() {
            let failed = evaluation.hard.iter().zip(&passing).filter(|(_, passing)| !passing.contains(idx));
            let failed: Vec<&Filter<'_>> = failed.map(|(filter, _)| filter).collect();
            let amounts = failed.iter().all(|filter| matches!(filter, Filter::Amount(..)));
            if failed.len() > 1 && !amounts {
                continue;
            }
            let parts: Option<Vec<Change>> =
                failed.iter().map(|filter| self.change(&evaluation, filter, idx)).collect();
            let Some(parts) = parts.filter(|parts| !parts.is_empty()) else { continue };
            let size = parts.iter().map(|part| part.1).max().unwrap_or(0);
            let words: Vec<String> = parts.iter().map(|part| part.3.clone()).collect();
            changes.push((parts[0].0, size, idx, words.join(" and ")));
        }
        changes.sort();
        let mut words: Vec<String> = Vec::new();
        for (.., change) in changes {
            if !words.contains(&change) && words.len() < SUGGESTIONS_MAX {
                words.push(change);
            }
        }
        words
    }

    /// For each hard filter the nodes that pass it alone.
    fn each_alone(&self, evaluation: &Evaluation<'_>) -> Vec<Bits> {
        evaluation.hard.iter().map(|filter| evaluation.passing(filter, self.index.nodes.clone())).collect()
    }

    fn facts(&self, idx: NodeIdx) -> &NodeFacts {
        self.at(idx).expect("the index only holds positions of nodes")
    }

    fn reason(&self, evaluation: &Evaluation<'_>, filter: &Filter<'_>, idx: NodeIdx) -> String {
        let facts = self.facts(idx);
        match filter {
            Filter::Health => "not ready".to_owned(),
            Filter::Availability if facts.availability == Availability::Drain => "drained".to_owned(),
            Filter::Availability => "paused".to_owned(),
            Filter::Amount(dimension, _) => {
                let (free, offered) = self.free(filter, idx);
                format!("{filter}: {} free of {}", Amount(dimension, free), Amount(dimension, offered))
            }
            Filter::MaxReplicas { .. } => format!("{filter}: it has {}", evaluation.replicas(idx, 0)),
            _ => filter.to_string(),
        }
    }

    /// What is left of an amount on a node, and what it offers.
    fn free(&self, filter: &Filter<'_>, idx: NodeIdx) -> (u64, u64) {
        let Filter::Amount(dimension, _) = filter else { return (0, 0) };
        let offered = self.facts(idx).offer(dimension).unwrap_or(u64::MAX);
        let used = u64::try_from(self.index.used(dimension, idx)).unwrap_or(u64::MAX);
        (offered.saturating_sub(used), offered)
    }

    /// What would have to change for a node to pass a filter that it does not pass; none when nothing simple would do.
    fn change(&self, evaluation: &Evaluation<'_>, filter: &Filter<'_>, idx: NodeIdx) -> Option<Change> {
        let facts = self.facts(idx);
        let name = &facts.name;
        let (rank, size, words) = match filter {
            Filter::Availability => (0, 0, format!("skein node activate {name}")),
            Filter::Amount(dimension, ask) => {
                let (free, offered) = self.free(filter, idx);
                let missing = ask.saturating_sub(free);
                let free_it = format!("free {} on {name}", Amount(dimension, missing));
                let words = match free {
                    _ if *ask > offered && free > 0 => {
                        format!("ask for {} at most, as {name} has", Amount(dimension, free))
                    }
                    _ if *ask > offered => return None,
                    0 => free_it,
                    _ => format!(
                        "ask for {} instead of {}, or {free_it}",
                        Amount(dimension, free),
                        Amount(dimension, *ask)
                    ),
                };
                (1, millionths(missing, offered), words)
            }
            Filter::Port(_) => (2, 0, format!("free {filter} on {name}")),
            Filter::MaxReplicas { .. } => {
                let more = evaluation.replicas(idx, 0) + 1;
                (3, u64::from(more), format!("allow {more} replicas per node"))
            }
            Filter::Constraint(constraint) if !constraint.negated => {
                let (NodeKey::First(attrs) | NodeKey::Any(attrs)) = &constraint.key;
                match (attrs.first(), &constraint.pattern) {
                    (Some(NodeAttr::NodeLabel(key)), Pattern::Exact(value)) => {
                        (4, 0, format!("skein node label {name} {key}={value}"))
                    }
                    _ => return None,
                }
            }
            Filter::Health => (5, 0, format!("bring {name} back, which is not ready")),
            _ => return None,
        };
        Some((rank, size, idx, words))
    }
}
