//! Expressions that can never hold together, recognised from their text alone.
//!
//! Owns the rules by which two expressions exclude each other. It must not know which nodes there are: what no node
//! meets *now* is another matter. Every rule is sound (what it names never holds on any node) and none is complete
//! (two regular expressions are not compared). Pure, no tasks, no channels.

use std::fmt;

use super::{
    expr::{Expression, NodeKey, Pattern, glob_matches},
    facts::{NodeAttr, TaskAttr, arch_alias},
    request::Request,
};

/// Two hard expressions of one request of which each node fails at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contradiction {
    /// `constraint`, `affinity` or `whitelist`, with the expression as the user wrote it.
    pub first: String,
    /// The other one.
    pub second: String,
    /// Why, in a few words.
    pub reason: String,
}

impl fmt::Display for Contradiction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {} can never both hold: {}", self.first, self.second, self.reason)
    }
}

impl Request {
    /// The first two hard expressions that exclude each other.
    pub fn contradiction(&self) -> Option<Contradiction> {
        let whitelists = self.whitelists.iter().map(|e| ("whitelist", e));
        let constraints: Vec<_> = whitelists.chain(self.constraints.iter().map(|e| ("constraint", e))).collect();
        let about_nodes =
            pairs(&constraints, |a, b| same_node_key(a, b).then(|| one_value(&a.key) || two_architectures(a, b)));
        let volumes: Vec<_> = self.volume_affinities.iter().map(|e| ("affinity", e)).collect();
        let tasks: Vec<_> = self.affinities.iter().map(|e| ("affinity", e)).collect();
        about_nodes
            .or_else(|| pairs(&volumes, |a, b| (a.key == b.key).then_some(false)))
            // Different tasks of a node may have different values.
            .or_else(|| pairs(&tasks, |a: &Expression<TaskAttr>, b| (a.key == b.key).then_some(false)))
    }
}

/// The first pair that excludes each other. `same` says for two expressions whether they look at the same thing, and
/// whether that has at most one value.
fn pairs<K>(
    expressions: &[(&str, &Expression<K>)],
    same: impl Fn(&Expression<K>, &Expression<K>) -> Option<bool>,
) -> Option<Contradiction> {
    for (at, (kind, first)) in expressions.iter().enumerate() {
        for (other_kind, second) in &expressions[at + 1..] {
            // At most 64 expressions, so 2,016 pairs.
            if let Some(reason) = same(first, second).and_then(|single| excluded(first, second, single)) {
                let (first, second) = (format!("{kind} {first}"), format!("{other_kind} {second}"));
                return Some(Contradiction { first, second, reason });
            }
        }
    }
    None
}

/// Why two expressions about the same thing exclude each other, if they do.
fn excluded<K>(a: &Expression<K>, b: &Expression<K>, single: bool) -> Option<String> {
    match (a.negated, b.negated) {
        (true, true) => None,
        (false, true) => covers(&b.pattern, &a.pattern).then(|| excludes(b, a)),
        (true, false) => covers(&a.pattern, &b.pattern).then(|| excludes(a, b)),
        (false, false) => {
            let apart = single && disjoint(&a.pattern, &b.pattern);
            apart.then(|| format!("a node has one value of {}", key_text(a)))
        }
    }
}

fn excludes<K>(negated: &Expression<K>, wanted: &Expression<K>) -> String {
    format!("{negated} excludes all that {wanted} allows")
}

/// The key as the user wrote it.
fn key_text<K>(expression: &Expression<K>) -> &str {
    let text = &expression.text;
    text.find(['=', '!']).map_or(text, |at| &text[..at])
}

/// Whether everything that `inner` matches is matched by `outer`, as far as that is easily seen.
fn covers(outer: &Pattern, inner: &Pattern) -> bool {
    match (outer, inner) {
        (_, Pattern::Exact(value)) => outer.matches(value),
        (_, Pattern::OneOf(values)) => values.iter().all(|value| outer.matches(value)),
        // A star of the inner one can only stand where the outer one has a star too: neither has it in its parts.
        (Pattern::Glob(outer), Pattern::Glob(inner)) => glob_matches(outer, &inner.join("*")),
        (Pattern::Regex(outer), Pattern::Regex(inner)) => outer.as_str() == inner.as_str(),
        (Pattern::Glob(outer), Pattern::Regex(_) | Pattern::Subnet(_)) => outer.iter().all(String::is_empty),
        (Pattern::Subnet(outer), Pattern::Subnet(inner)) => outer.contains(inner),
        _ => false,
    }
}

/// Whether no value matches both, as far as that is easily seen.
fn disjoint(a: &Pattern, b: &Pattern) -> bool {
    match (a, b) {
        (Pattern::Exact(value), other) | (other, Pattern::Exact(value)) => !other.matches(value),
        (Pattern::OneOf(values), other) | (other, Pattern::OneOf(values)) => {
            values.iter().all(|value| !other.matches(value))
        }
        (Pattern::Glob(a), Pattern::Glob(b)) => {
            let ends = |parts: &[String]| (parts[0].clone(), parts[parts.len() - 1].clone());
            let ((a_first, a_last), (b_first, b_last)) = (ends(a), ends(b));
            let begin = a_first.starts_with(&b_first) || b_first.starts_with(&a_first);
            let end = a_last.ends_with(&b_last) || b_last.ends_with(&a_last);
            !(begin && end)
        }
        _ => false,
    }
}

/// Whether two constraints look at the same values of a node: a bare key looks at the node's label where there is one,
/// which a `==` on that label itself makes sure of.
fn same_node_key(a: &Expression<NodeKey>, b: &Expression<NodeKey>) -> bool {
    let hides = |sure: &Expression<NodeKey>, bare: &Expression<NodeKey>| match (&sure.key, &bare.key) {
        (NodeKey::First(sure_attrs), NodeKey::First(attrs)) => {
            !sure.negated && sure_attrs.len() == 1 && attrs.first() == sure_attrs.first()
        }
        _ => false,
    };
    a.key == b.key || hides(a, b) || hides(b, a)
}

/// Whether two expressions name two architectures, which no node has: `amd64` and `x86_64` are one.
fn two_architectures(a: &Expression<NodeKey>, b: &Expression<NodeKey>) -> bool {
    let canonical = |value: &str| arch_alias(value).map_or_else(|| value.to_owned(), str::to_owned);
    match (&a.key, &a.pattern, &b.pattern) {
        (NodeKey::First(attrs), Pattern::Exact(a), Pattern::Exact(b)) if attrs[..] == [NodeAttr::Arch] => {
            canonical(a) != canonical(b)
        }
        _ => false,
    }
}

/// Whether a node has at most one value there.
fn one_value(key: &NodeKey) -> bool {
    match key {
        // Name and id.
        NodeKey::Any(_) => false,
        NodeKey::First(attrs) => attrs.iter().all(|attr| match attr {
            NodeAttr::Ip | NodeAttr::Volume | NodeAttr::VolumePlugin | NodeAttr::NetworkPlugin => false,
            // Two names of one architecture.
            NodeAttr::Arch => false,
            NodeAttr::Id
            | NodeAttr::Name
            | NodeAttr::Hostname
            | NodeAttr::Role
            | NodeAttr::Site
            | NodeAttr::Os
            | NodeAttr::OperatingSystem
            | NodeAttr::Kernel
            | NodeAttr::EngineVersion
            | NodeAttr::StorageDriver
            | NodeAttr::ExecutionDriver
            | NodeAttr::NodeLabel(_)
            | NodeAttr::EngineLabel(_) => true,
        }),
    }
}
