//! Why each node does not fit, and the smallest change after which one would.
//!
//! Owns the words. What passes is decided by the filters on sets; a reason adds the figures of the one node, and who holds
//! what is taken there. Pure, no tasks, no channels.

use skein_api::{Availability, NodeId, PortPublish};

use super::{
    NodeFacts, Scheduler,
    bits::{Bits, NodeIdx},
    eval::Evaluation,
    expr::{NodeKey, Pattern},
    facts::{Dimension, NodeAttr, ports_conflict},
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
    /// Nodes with all their reasons, by name: every one, or one alone. O(filters × nodes).
    pub fn reasons(&self, request: &Request, only: Option<&NodeId>) -> Vec<NodeReasons> {
        let evaluation = Evaluation::new(self, request);
        let passing = self.each_alone(&evaluation);
        let reasons = |idx: NodeIdx| {
            let failed = evaluation.hard.iter().zip(&passing).filter(|(_, passing)| !passing.contains(idx));
            let reasons = failed.map(|(filter, _)| self.reason(&evaluation, filter, idx)).collect();
            NodeReasons { node: self.facts(idx).name.clone(), reasons }
        };
        let mut all: Vec<NodeReasons> = match only {
            Some(node) => self.position(node).map(reasons).into_iter().collect(),
            None => self.index.nodes.iter().map(reasons).collect(),
        };
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
            changes.extend(match failed.first() {
                Some(Filter::Amount(..)) => self.change_of_amounts(&failed, idx),
                Some(filter) => self.change(&evaluation, filter, idx),
                None => None,
            });
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
            Filter::Port(port) => format!("{filter}: taken by {}", self.holders(port, idx)),
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

    /// What to change where nothing but amounts is missing: ask for less of all of them, or free all that is missing. What
    /// is larger than the node must be lowered, what is used up can only be freed; none where one amount is both.
    fn change_of_amounts(&self, failed: &[&Filter<'_>], idx: NodeIdx) -> Option<Change> {
        let name = &self.facts(idx).name;
        let amounts: Vec<Lack<'_>> = failed.iter().filter_map(|filter| self.lack(filter, idx)).collect();
        let size = amounts.iter().map(|lack| millionths(lack.ask - lack.free, lack.offered)).max()?;
        let too_large = |lack: &&Lack<'_>| lack.ask > lack.offered;
        let used_up = |lack: &&Lack<'_>| lack.free == 0;
        if amounts.iter().filter(too_large).any(|lack| used_up(&lack)) {
            return None;
        }
        let list = |lacks: &mut dyn Iterator<Item = &Lack<'_>>, amount: fn(&Lack<'_>) -> u64| {
            let words: Vec<String> = lacks.map(|lack| Amount(lack.dimension, amount(lack)).to_string()).collect();
            words.join(" and ")
        };
        let free = |lacks: &mut dyn Iterator<Item = &Lack<'_>>| {
            format!("free {} on {name}", list(lacks, |lack| lack.ask - lack.free))
        };
        let all_free = list(&mut amounts.iter(), |lack| lack.free);
        let words = match (amounts.iter().any(|lack| too_large(&lack)), amounts.iter().any(|lack| used_up(&lack))) {
            (false, true) => free(&mut amounts.iter()),
            (false, false) => {
                let asked = list(&mut amounts.iter(), |lack| lack.ask);
                format!("ask for {all_free} instead of {asked}, or {}", free(&mut amounts.iter()))
            }
            (true, false) => format!("ask for {all_free} at most, which is free on {name}"),
            (true, true) => {
                let lowered = list(&mut amounts.iter().filter(too_large), |lack| lack.free);
                let freed = free(&mut amounts.iter().filter(|lack| !too_large(lack)));
                format!("ask for {lowered} at most, and {freed}")
            }
        };
        Some((1, size, idx, words))
    }

    fn lack<'a>(&self, filter: &Filter<'a>, idx: NodeIdx) -> Option<Lack<'a>> {
        let Filter::Amount(dimension, ask) = filter else { return None };
        let (free, offered) = self.free(filter, idx);
        Some(Lack { dimension, ask: *ask, free, offered })
    }

    /// Who has a port of a node, at any address that overlaps: names of tasks.
    fn holders(&self, wanted: &PortPublish, idx: NodeIdx) -> String {
        let claims = |port: &PortPublish| ports_conflict(port, wanted);
        let tasks = self.by_node.get(self.id_at(idx)).into_iter().flatten();
        let tasks = tasks.map(|task| &self.tasks[task]).map(|held| (&*held.name, self.engine.like(held.profile)));
        let claiming = tasks.filter(|(_, like)| like.ports.iter().any(claims));
        let names: Vec<String> = claiming.map(|(name, like)| named(name, &like.service_name)).collect();
        names.join(" and ")
    }

    /// What would have to change for a node to pass a filter that it does not pass, other than an amount; none when
    /// nothing simple would do.
    fn change(&self, evaluation: &Evaluation<'_>, filter: &Filter<'_>, idx: NodeIdx) -> Option<Change> {
        let facts = self.facts(idx);
        let name = &facts.name;
        let (rank, size, words) = match filter {
            Filter::Availability => (0, 0, format!("skein node activate {name}")),
            Filter::Port(port) => {
                (2, 0, format!("free {filter} on {name}, which is taken by {}", self.holders(port, idx)))
            }
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

/// An amount of which a node has too little left.
struct Lack<'a> {
    dimension: &'a Dimension,
    ask: u64,
    /// Less than what is asked for.
    free: u64,
    offered: u64,
}

/// A task as users find it; with its service where its name does not say it.
fn named(name: &str, service_name: &str) -> String {
    match name {
        "" => "a task that waits".to_owned(),
        name if name.starts_with(service_name) => name.to_owned(),
        name => format!("{name} of service {service_name}"),
    }
}
