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
    /// How nft wants key and value declared where it has no name for a type: `typeof`, expressions joined by ` : `.
    pub typeof_text: Option<&'static str>,
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
pub(crate) fn digest(text: &str) -> String {
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
/// elements are sorted; what a counter has counted is left out.
pub(crate) fn rule_form(expr: &Value) -> String {
    fn sorted(value: &mut Value) {
        match value {
            Value::Object(object) => {
                for (key, inner) in object.iter_mut() {
                    if key == "counter" {
                        *inner = Value::Null;
                    }
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
        Self { key, value: None, typeof_text: None, elements: BTreeMap::new() }
    }

    /// An empty map.
    pub fn map(key: &'static str, value: &'static str) -> Self {
        Self { key, value: Some(value), typeof_text: None, elements: BTreeMap::new() }
    }

    /// An empty map from an address and a number to an address, of family `ip` or `ip6`. A number has no type of its own
    /// that `type` would take; nft prints it as `integer`.
    pub fn numbered(six: bool) -> Self {
        let (key, value, typeof_text) = match six {
            false => ("ipv4_addr . integer", "ipv4_addr", "ip daddr . numgen random mod 2 : ip daddr"),
            true => ("ipv6_addr . integer", "ipv6_addr", "ip6 daddr . numgen random mod 2 : ip6 daddr"),
        };
        Self { typeof_text: Some(typeof_text), ..Self::map(key, value) }
    }

    /// An empty map from a protocol, a port and a number to an address of family `ip` or `ip6` and a port.
    pub fn numbered_ports(six: bool) -> Self {
        let (value, typeof_text) = match six {
            false => {
                ("ipv4_addr . inet_service", "meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport")
            }
            true => {
                ("ipv6_addr . inet_service", "meta l4proto . th dport . numgen random mod 2 : ip6 daddr . th dport")
            }
        };
        Self { typeof_text: Some(typeof_text), ..Self::map("inet_proto . inet_service . integer", value) }
    }

    fn type_text(&self) -> String {
        match self.value {
            Some(value) => format!("{} : {value}", self.key),
            None => self.key.to_owned(),
        }
    }

    /// The declaration, as a statement.
    fn declaration(&self) -> String {
        match self.typeof_text {
            Some(text) => format!("typeof {text}"),
            None => format!("type {}", self.type_text()),
        }
    }

    fn elements_text<'a>(&self, elements: impl Iterator<Item = (&'a String, &'a String)>) -> String {
        let one = |(key, value): (&String, &String)| {
            if self.value.is_some() { format!("{key} : {value}") } else { key.clone() }
        };
        elements.map(one).collect::<Vec<_>>().join(", ")
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
            let _ = writeln!(text, "  {kind} {set_name} {{\n    {}", set.declaration());
            if !set.elements.is_empty() {
                let _ = writeln!(text, "    elements = {{ {} }}", set.elements_text(set.elements.iter()));
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
            (*name, Set { elements: BTreeMap::new(), key: set.key, value: set.value, typeof_text: set.typeof_text })
        };
        Self { name: self.name, sets: self.sets.iter().map(empty).collect(), chains: self.chains.clone() }
    }

    /// The tags of all its rules.
    pub(crate) fn tags(&self) -> impl Iterator<Item = String> + '_ {
        self.chains.values().flat_map(|chain| &chain.rules).map(|rule| rule_tag(rule))
    }

    /// Text for `nft -f` that replaces the elements of the named sets and changes nothing else, in one transaction.
    pub fn elements_text<'a>(&self, sets: impl IntoIterator<Item = &'a String>) -> String {
        let mut text = String::new();
        for (name, set) in sets.into_iter().filter_map(|name| self.sets.get_key_value(name.as_str())) {
            let kind = if set.value.is_some() { "map" } else { "set" };
            let _ = writeln!(text, "flush {kind} inet {} {name}", self.name);
            self.add_text(&mut text, name, set, set.elements.iter());
        }
        text
    }

    /// The same where `found` is what the sets have: only what differs is written, in one transaction. It fails as a
    /// whole when somebody else removed an element meanwhile. A change of one backend among 10,000 takes a few
    /// milliseconds this way, all of them a quarter of a second.
    pub fn difference_text(&self, found: &BTreeMap<String, BTreeMap<String, String>>) -> String {
        let mut text = String::new();
        for (name, found) in found {
            let Some((name, set)) = self.sets.get_key_value(name.as_str()) else { continue };
            let stale = found.iter().filter(|(key, value)| set.elements.get(*key) != Some(*value));
            let stale: Vec<&str> = stale.map(|(key, _)| key.as_str()).collect();
            if !stale.is_empty() {
                let _ = writeln!(text, "delete element inet {} {name} {{ {} }}", self.name, stale.join(", "));
            }
            let missing = set.elements.iter().filter(|(key, value)| found.get(*key) != Some(*value));
            self.add_text(&mut text, name, set, missing);
        }
        text
    }

    fn add_text<'a>(
        &self,
        text: &mut String,
        name: &str,
        set: &Set,
        elements: impl Iterator<Item = (&'a String, &'a String)>,
    ) {
        let elements = set.elements_text(elements);
        if !elements.is_empty() {
            let _ = writeln!(text, "add element inet {} {name} {{ {elements} }}", self.name);
        }
    }
}
