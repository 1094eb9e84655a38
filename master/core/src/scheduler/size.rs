//! Requests that are larger than any host.
//!
//! Owns the comparison of what a request takes with what single nodes offer, whatever is set aside there already. It
//! must not know load: that comes and goes. Pure, no tasks, no channels.

use std::fmt;

use super::{
    Scheduler,
    facts::{Dimension, NodeFacts},
    request::{Amount, Request},
};

/// A request that no host could have even if it were empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// What is more than any host offers; when each amount alone has a host, all of them.
    pub amounts: Vec<Largest>,
    /// Each amount alone has a host that offers it, only not all of them together.
    pub together: bool,
}

/// One amount beside the host that offers most of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Largest {
    /// What is counted.
    pub dimension: Dimension,
    /// What the request takes of it.
    pub asked: u64,
    /// Name of the host.
    pub node: String,
    /// What that host offers.
    pub offered: u64,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let asked = |one: &Largest| Amount(&one.dimension, one.asked).to_string();
        let offered = |one: &Largest| Amount(&one.dimension, one.offered).to_string();
        let list = |show: &dyn Fn(&Largest) -> String, separator| -> String {
            self.amounts.iter().map(show).collect::<Vec<_>>().join(separator)
        };
        if self.together {
            let most =
                |one: &Largest| format!("{} has the most {} with {}", one.node, one.dimension.name(), offered(one));
            return write!(f, "no host offers {} together: {}", list(&asked, " and "), list(&most, ", "));
        }
        let above = |one: &Largest| {
            format!("{} is more than the largest host offers: {} has {}", asked(one), one.node, offered(one))
        };
        f.write_str(&list(&above, "; "))
    }
}

impl Scheduler {
    /// Whether a request is larger than every host that it could ever be on ([`Scheduler::allowed`]); none when some
    /// host would have it, or when there is no such host at all. O(nodes × amounts).
    pub fn too_large(&self, request: &Request) -> Option<TooLarge> {
        let allowed = self.allowed(request);
        let nodes: Vec<&NodeFacts> = allowed.iter().filter_map(|id| self.node(id)).collect();
        // Whether a host has a free place is a matter of its load.
        let asks: Vec<_> = request.asks.iter().filter(|(of, _)| *of != Dimension::Slots).collect();
        let has = |node: &NodeFacts, of: &Dimension, amount: u64| node.offer(of).is_none_or(|offer| offer >= amount);
        if nodes.iter().any(|node| asks.iter().all(|(of, amount)| has(node, of, *amount))) {
            return None;
        }
        let largest = |(of, amount): &&(Dimension, u64)| {
            // Of equal ones the first, as everywhere.
            let most = nodes.iter().rev().max_by_key(|node| node.offer(of))?;
            let offered = most.offer(of).unwrap_or(u64::MAX);
            Some(Largest { dimension: of.clone(), asked: *amount, node: most.name.clone(), offered })
        };
        let all = asks.iter().filter_map(largest);
        let (above, within): (Vec<_>, Vec<_>) = all.partition(|one| one.asked > one.offered);
        match (above.is_empty(), within.is_empty()) {
            (false, _) => Some(TooLarge { amounts: above, together: false }),
            (true, false) => Some(TooLarge { amounts: within, together: true }),
            // No host at all.
            (true, true) => None,
        }
    }
}
