//! Owns our nft table as data: chains, rules, sets and maps, the text that `nft -f` takes, and the view in which the
//! wanted table is compared with the one in the kernel.
//!
//! nft prints rules in another form than it reads them, so rules are compared by a tag that each one carries in its
//! comment (a digest of its text), sets and maps by their elements. Someone who rewrites a rule and keeps its comment is
//! not noticed; removing, adding or reordering is. It knows no process and no namespace. No tasks, no channels.

use std::{collections::BTreeMap, fmt::Write as _};

/// Where a base chain stands. Text as nft writes it: type `filter` or `nat`, a hook, a numeric priority. The policy is
/// always accept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// `filter` or `nat`.
    pub kind: String,
    /// `prerouting`, `input`, `forward`, `output` or `postrouting`.
    pub hook: String,
    /// Priority: lower runs first.
    pub priority: i32,
}

/// A base chain with its rules in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Where it stands.
    pub hook: Hook,
    /// Rules in nft's syntax, without comment.
    pub rules: Vec<String>,
}

/// A named set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Type of the keys, parts joined by ` . `.
    pub key: &'static str,
    /// Type of the values; `None` makes it a set.
    pub value: Option<&'static str>,
    /// Elements: parts joined by ` . `, with an empty value in a set.
    pub elements: BTreeMap<String, String>,
}

/// A table of family inet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: &'static str,
    /// Sets and maps by name.
    pub sets: BTreeMap<&'static str, Set>,
    /// Chains by name.
    pub chains: BTreeMap<&'static str, Chain>,
}

/// What of a table is compared.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableView {
    /// Sets and maps: type (key, then value after ` : `) and elements.
    pub sets: BTreeMap<String, (String, BTreeMap<String, String>)>,
    /// Chains: place and the tags of their rules in order; a rule that is not ours has the tag of its expression.
    pub chains: BTreeMap<String, (Option<Hook>, Vec<String>)>,
}

impl TableView {
    /// Whether this and `other` differ in nothing but elements.
    pub fn same_frame(&self, other: &Self) -> bool {
        self.chains == other.chains
            && self.sets.len() == other.sets.len()
            && self.sets.iter().zip(&other.sets).all(|((a, (at, _)), (b, (bt, _)))| a == b && at == bt)
    }
}

/// The tag in a rule's comment: FNV-1a over its text, 64 bits in hex.
pub fn rule_tag(rule: &str) -> String {
    let digest = rule
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("skein {digest:016x}")
}

impl Set {
    /// An empty set without values.
    pub fn plain(key: &'static str) -> Self {
        Self { key, value: None, elements: BTreeMap::new() }
    }

    /// An empty map.
    pub fn map(key: &'static str, value: &'static str) -> Self {
        Self { key, value: Some(value), elements: BTreeMap::new() }
    }

    fn type_text(&self) -> String {
        match self.value {
            Some(value) => format!("{} : {value}", self.key),
            None => self.key.to_owned(),
        }
    }

    fn elements_text(&self) -> String {
        let one = |(key, value): (&String, &String)| {
            if self.value.is_some() { format!("{key} : {value}") } else { key.clone() }
        };
        self.elements.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

impl Table {
    /// What of it is compared.
    pub fn view(&self) -> TableView {
        let set = |(name, set): (&&str, &Set)| ((*name).to_owned(), (set.type_text(), set.elements.clone()));
        let chain = |(name, chain): (&&str, &Chain)| {
            let tags = chain.rules.iter().map(|rule| rule_tag(rule)).collect();
            ((*name).to_owned(), (Some(chain.hook.clone()), tags))
        };
        TableView { sets: self.sets.iter().map(set).collect(), chains: self.chains.iter().map(chain).collect() }
    }

    /// Text for `nft -f` that puts this table in place of any of its name, in one transaction. Connections that were
    /// translated keep their translation: that is conntrack's state, not the table's.
    pub fn replace_text(&self) -> String {
        let name = self.name;
        // "add" first: nft refuses to delete a table that is not there.
        let mut text = format!("add table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n");
        for (set_name, set) in &self.sets {
            let kind = if set.value.is_some() { "map" } else { "set" };
            let _ = writeln!(text, "  {kind} {set_name} {{\n    type {}", set.type_text());
            if !set.elements.is_empty() {
                let _ = writeln!(text, "    elements = {{ {} }}", set.elements_text());
            }
            text.push_str("  }\n");
        }
        for (chain_name, chain) in &self.chains {
            let Hook { kind, hook, priority } = &chain.hook;
            let _ = writeln!(text, "  chain {chain_name} {{");
            let _ = writeln!(text, "    type {kind} hook {hook} priority {priority}; policy accept;");
            for rule in &chain.rules {
                let _ = writeln!(text, "    {rule} comment \"{}\"", rule_tag(rule));
            }
            text.push_str("  }\n");
        }
        text.push_str("}\n");
        text
    }

    /// Text for `nft -f` that changes nothing but the elements of the named sets, in one transaction.
    pub fn elements_text(&self, sets: &[String]) -> String {
        let mut text = String::new();
        for (name, set) in self.sets.iter().filter(|(name, _)| sets.iter().any(|wanted| wanted == *name)) {
            let kind = if set.value.is_some() { "map" } else { "set" };
            let _ = writeln!(text, "flush {kind} inet {} {name}", self.name);
            if !set.elements.is_empty() {
                let _ = writeln!(text, "add element inet {} {name} {{ {} }}", self.name, set.elements_text());
            }
        }
        text
    }
}
