//! Explanations: for every filter how many nodes it took away, in order and alone.
//!
//! Owns the counting and the sentences. It must not decide anything. Pure, no tasks, no channels.

use std::fmt;

use skein_api::{Explanation, FilterCount, Strategy};

use super::{
    Scheduler,
    bits::{Bits, NodeIdx},
    eval::{Copies, Evaluation, Row},
    rank::choose,
    request::{Filter, FilterKind, Request},
};

/// What one filter did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterTally {
    /// Which rule.
    pub kind: FilterKind,
    /// The rule with its values: `constraint node.labels.disk==ssd`.
    pub filter: String,
    /// Nodes that passed all filters before and not this one.
    pub rejected: u32,
    /// Nodes that would not pass this filter alone.
    pub rejected_alone: u32,
}

/// Why no node fits. `Display` is one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Rejection {
    /// Nodes looked at. The `rejected` counts of the filters add up to it.
    pub nodes: u32,
    /// In the order in which the filters run.
    pub filters: Vec<FilterTally>,
}

impl Rejection {
    /// Counts for a request that fits nowhere while `copies` of it are counted as placed.
    pub(super) fn of(evaluation: &Evaluation<'_>, copies: &Copies) -> Self {
        let nodes = &evaluation.scheduler.index.nodes;
        Self { nodes: number(nodes), filters: tally(evaluation, copies).0 }
    }

    /// One sentence: `no node fits: 3 nodes; 1 not ready; constraint disk==ssd took 2`.
    pub fn summary(&self) -> String {
        self.to_string()
    }

    /// For users; `subject` is the name of the task or service.
    pub fn into_explanation(self, subject: &str) -> Explanation {
        Findings::from(self).into_explanation(subject)
    }
}

/// How the filters of a request act on the present state, whether a node fits or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Findings {
    /// Nodes looked at: `fitting` and the `rejected` counts of the filters add up to it.
    pub nodes: u32,
    /// The hard filters in order, then the soft expressions.
    pub filters: Vec<FilterTally>,
    /// Nodes that pass the hard filters.
    pub fitting: u32,
    /// One sentence.
    pub summary: String,
}

impl Findings {
    /// For users; `subject` is the name of the task or service.
    pub fn into_explanation(self, subject: &str) -> Explanation {
        Explanation {
            subject: subject.to_owned(),
            summary: self.summary,
            nodes: self.nodes,
            filters: self.filters.iter().map(FilterCount::from).collect(),
            fitting: self.fitting,
            ..Explanation::default()
        }
    }
}

impl From<Rejection> for Findings {
    fn from(rejection: Rejection) -> Self {
        Self { summary: rejection.summary(), nodes: rejection.nodes, filters: rejection.filters, fitting: 0 }
    }
}

impl From<&FilterTally> for FilterCount {
    fn from(tally: &FilterTally) -> Self {
        Self { filter: tally.filter.clone(), rejected: tally.rejected, rejected_alone: tally.rejected_alone }
    }
}

impl fmt::Display for FilterTally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { filter, rejected, .. } = self;
        match self.kind {
            FilterKind::Health => write!(f, "{rejected} not ready"),
            FilterKind::Availability => write!(f, "{rejected} paused or drained"),
            FilterKind::Pinned => write!(f, "{rejected} ruled out because {filter}"),
            _ => write!(f, "{filter} took {rejected}"),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.nodes {
            0 => return f.write_str("no node fits: the cluster has no nodes"),
            1 => f.write_str("no node fits: 1 node")?,
            nodes => write!(f, "no node fits: {nodes} nodes")?,
        }
        self.filters.iter().filter(|tally| tally.rejected > 0).try_for_each(|tally| write!(f, "; {tally}"))
    }
}

impl Scheduler {
    /// How the filters of a request would act now, and which node the next such task would get.
    ///
    /// After the hard filters come the soft expressions, marked as met or given up; they take no node away, so
    /// `rejected` is 0 and `rejected_alone` says how many nodes do not meet them. A task that is placed already is
    /// counted like any other: remove it from a copy of the scheduler first to ask about it alone.
    pub fn explain(&self, request: &Request) -> Findings {
        let evaluation = Evaluation::new(self, request);
        let nodes = number(&self.index.nodes);
        let (mut filters, fitting) = tally(&evaluation, &Copies::new());
        if fitting.is_empty() {
            return Rejection { nodes, filters }.into();
        }
        filters.extend(tally_soft(&evaluation, &fitting));
        let left = number(&fitting);
        // Known requests that spread are answered by the engine; others are looked for among all that fit.
        let next = self.class_of(request).and_then(|class| self.engine.peek(class));
        let next = match next {
            Some(chosen) => self.next_goes_to(chosen, request.strategy),
            None => {
                let preferred = evaluation.spread_out(evaluation.preferred(fitting));
                match request.strategy {
                    Strategy::Random if preferred.len() > 1 => format!("any of {} of them (random)", preferred.len()),
                    // With one candidate left the seed does not matter, and the other strategies have none.
                    strategy => {
                        let chosen = choose(&evaluation, &preferred, 0).expect("a node fits, so one is preferred");
                        self.next_goes_to(chosen, strategy)
                    }
                }
            }
        };
        let noun = if nodes == 1 { "node fits" } else { "nodes fit" };
        Findings {
            nodes,
            filters,
            fitting: left,
            summary: format!("{left} of {nodes} {noun}; the next task goes to {next}"),
        }
    }

    fn next_goes_to(&self, chosen: NodeIdx, strategy: Strategy) -> String {
        let name = &self.at(chosen).expect("the index only holds positions of nodes").name;
        format!("{name} ({})", strategy_name(strategy))
    }
}

/// Counts per hard filter, and the nodes that are left.
fn tally(evaluation: &Evaluation<'_>, copies: &Copies) -> (Vec<FilterTally>, Bits) {
    let all = &evaluation.scheduler.index.nodes;
    let nodes = all.len();
    let (mut left, mut before) = (all.clone(), nodes);
    let mut tallies = Vec::with_capacity(evaluation.hard.len());
    for filter in &evaluation.hard {
        let row = match copies.is_empty() {
            true => evaluation.row(filter),
            false => Row::Made(evaluation.passing_with(filter, all, copies)),
        };
        let (passing, kept) = match &row {
            Row::Kept(set) => left.narrow(set, false),
            Row::Made(set) => left.narrow(set, false),
            Row::But(set) => {
                let (members, kept) = left.narrow(set, true);
                (nodes - members, kept)
            }
        };
        tallies.push(FilterTally {
            kind: filter.kind(),
            filter: filter.to_string(),
            rejected: narrow(before - kept),
            rejected_alone: narrow(nodes - passing),
        });
        before = kept;
    }
    (tallies, left)
}

/// One line per soft expression, in the order in which they are tried on the nodes that fit.
fn tally_soft(evaluation: &Evaluation<'_>, fitting: &Bits) -> Vec<FilterTally> {
    let all = &evaluation.scheduler.index.nodes;
    let mut left = fitting.clone();
    let mut line = |filter: &Filter<'_>| {
        let alone = evaluation.passing(filter, all.clone());
        let mut narrowed = left.clone();
        narrowed.and(&alone);
        let verdict = if narrowed.is_empty() {
            "given up: no node would be left".to_owned()
        } else {
            let verdict = format!("met by {} of {}", narrowed.len(), left.len());
            left = narrowed;
            verdict
        };
        FilterTally {
            kind: filter.kind(),
            filter: format!("{filter} ({verdict})"),
            rejected: 0,
            rejected_alone: number(all) - number(&alone),
        }
    };
    evaluation.soft.iter().map(&mut line).collect()
}

fn number(bits: &Bits) -> u32 {
    narrow(bits.len())
}

fn narrow(nodes: usize) -> u32 {
    u32::try_from(nodes).expect("positions are u32")
}

/// As users write it.
fn strategy_name(strategy: Strategy) -> &'static str {
    match strategy {
        Strategy::Spread => "spread",
        Strategy::Binpack => "binpack",
        Strategy::Random => "random",
    }
}
