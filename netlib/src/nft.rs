//! Owns our nft table as data: chains, rules, sets and maps, the text that `nft -f` takes, and the view in which the
//! wanted table is compared with the one in the kernel.
//!
//! nft prints rules in another form than it reads them, so a rule is compared by two digests that it carries in its
//! comment: its *tag*, of the text we write, and its *form*, of what nft prints for that text. The first says which rule
//! it shall be, the second that it still is that rule: one that was rewritten under its comment is noticed like one that
//! was removed, added or moved. Sets and maps are compared by their elements. It knows no process and no namespace. No
//! tasks, no channels.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::Value;

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
    /// Chains: place and the tags of their rules in order; a rule that is not ours, or not any more, stands there whole.
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

/// Forms of rules by tag, as far as they are known.
pub(crate) type Forms = BTreeMap<String, String>;

/// FNV-1a, 64 bits in hex. It guards against accidents; whoever wants to fool us needs root, and then need not.
fn digest(text: &str) -> String {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

/// What a rule of ours is known by: a digest of its text.
pub fn rule_tag(rule: &str) -> String {
    format!("skein {}", digest(rule))
}

/// A digest of a rule as nft prints it, `expr` of its JSON. An anonymous set is printed in the kernel's order, so its
/// elements are sorted.
pub(crate) fn rule_form(expr: &Value) -> String {
    fn sorted(value: &mut Value) {
        match value {
            Value::Object(object) => {
                for (key, inner) in object.iter_mut() {
                    sorted(inner);
                    if let (true, Value::Array(elements)) = (key == "set", inner) {
                        elements.sort_by_cached_key(Value::to_string);
                    }
                }
            }
            Value::Array(elements) => elements.iter_mut().for_each(sorted),
            _ => {}
        }
    }
    let mut expr = expr.clone();
    sorted(&mut expr);
    digest(&expr.to_string())
}

/// The tag of a rule as nft prints it. A rule that is not ours, or not what its comment says, is its own text. A comment
/// without a form (it could not be learnt) is believed.
pub(crate) fn listed_tag(rule: &Value) -> String {
    let comment = rule.get("comment").and_then(Value::as_str).unwrap_or_default();
    let mut words = comment.split(' ');
    let (Some("skein"), Some(tag), form, None) = (words.next(), words.next(), words.next(), words.next()) else {
        return rule.to_string();
    };
    match form {
        Some(form) if rule.get("expr").map(rule_form).as_deref() != Some(form) => rule.to_string(),
        _ => format!("skein {tag}"),
    }
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
    ///
    /// `forms` go into the comments of their rules.
    pub(crate) fn replace_text(&self, forms: &Forms) -> String {
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
                let tag = rule_tag(rule);
                let form = forms.get(&tag).map(|form| format!(" {form}")).unwrap_or_default();
                let _ = writeln!(text, "    {rule} comment \"{tag}{form}\"");
            }
            text.push_str("  }\n");
        }
        text.push_str("}\n");
        text
    }

    /// The same table without elements, for learning forms.
    pub(crate) fn frame(&self) -> Self {
        let empty = |(name, set): (&&'static str, &Set)| {
            (*name, Set { key: set.key, value: set.value, elements: BTreeMap::new() })
        };
        Self { name: self.name, sets: self.sets.iter().map(empty).collect(), chains: self.chains.clone() }
    }

    /// The tags of all its rules.
    pub(crate) fn tags(&self) -> impl Iterator<Item = String> + '_ {
        self.chains.values().flat_map(|chain| &chain.rules).map(|rule| rule_tag(rule))
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
