//! Constraint and affinity expressions: parsing with positions, and matching of single values.
//!
//! Owns the syntax (docs/scheduling.md) and its limits. It must not know nodes, tasks or the index: a parsed
//! expression names an attribute and tells for one value whether it matches. Pure, no tasks, no channels.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use ipnet::IpNet;
use regex_lite::{Regex, RegexBuilder};
use skein_api::NODE_LABEL_VALUE_BYTES_MAX;

use super::facts::{NodeAttr, TaskAttr};

/// Longest expression, in characters: a label key and value of Docker's longest in practice, with room for a regex.
pub const EXPRESSION_CHARS_MAX: usize = 1_024;

/// Memory of one compiled regex. Matching is linear in value × program (no backtracking), so this bounds time too: some
/// 370 states. The slowest that fit, such as `(x?){96}y`, take 0.3 ms for a value of 64 bytes and 2.5 ms for one of 512
/// (measured); an alternation of 40 names fits.
pub(super) const REGEX_BYTES_MAX: usize = 16 * 1_024;

/// Longest value that a regex matches: that of a node's label. Those of containers may be longer.
const REGEX_VALUE_BYTES_MAX: usize = NODE_LABEL_VALUE_BYTES_MAX;

/// Nesting of one regex; the parser recurses this deep.
const REGEX_NESTING_MAX: u32 = 32;

/// An expression that does not parse: where, and what would have been right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to parse {kind} `{expression}` at column {column}: expected {expected}")]
pub struct ConstraintError {
    /// `constraint` or `affinity`.
    pub kind: &'static str,
    /// The expression as the user wrote it.
    pub expression: String,
    /// Where, in characters from 1.
    pub column: usize,
    /// What would have been right, in words.
    pub expected: String,
    /// An expression of this kind that parses.
    pub example: &'static str,
}

impl ConstraintError {
    /// Two lines that show the position: the expression, and a caret under it.
    pub fn caret(&self) -> String {
        // Control characters would move the caret or worse.
        let line: String = self.expression.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("{line}\n{:>width$}", '^', width = self.column)
    }

    /// What to change, in one sentence.
    pub fn hint(&self) -> String {
        format!("write for example `{}`", self.example)
    }
}

/// How a value is compared.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    /// Character for character.
    Exact(String),
    /// The parts between the `*`.
    Glob(Vec<String>),
    /// Anywhere in the value, as regexes do.
    Regex(Regex),
    /// Character for character one of these.
    OneOf(BTreeSet<String>),
    /// An address in this prefix.
    Subnet(IpNet),
}

impl Pattern {
    /// Whether a value that is there matches.
    pub(super) fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == value,
            Self::Glob(parts) => glob_matches(parts, value),
            Self::Regex(regex) => value.len() <= REGEX_VALUE_BYTES_MAX && regex.is_match(value),
            Self::OneOf(values) => values.contains(value),
            Self::Subnet(net) => value.parse::<IpAddr>().is_ok_and(|ip| net.contains(&ip)),
        }
    }
}

/// `parts` are what stands between the `*`, so there are at least two; taking each as early as possible is enough.
pub(super) fn glob_matches(parts: &[String], value: &str) -> bool {
    let [first, middle @ .., last] = parts else {
        return false;
    };
    let Some(mut rest) = value.strip_prefix(first.as_str()) else {
        return false;
    };
    for part in middle {
        let Some(at) = rest.find(part.as_str()) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last.as_str())
}

/// Which attributes of a node a constraint looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NodeKey {
    /// A node matches when the value of any of them does.
    Any(Vec<NodeAttr>),
    /// The first of them that the node has decides.
    First(Vec<NodeAttr>),
}

/// A parsed expression about attributes `K`.
#[derive(Clone, Debug)]
pub(super) struct Expression<K> {
    /// Without blanks and prefix: `node.labels.disk==ssd`.
    pub(super) text: String,
    pub(super) key: K,
    /// `!=`
    pub(super) negated: bool,
    /// `~`
    pub(super) soft: bool,
    pub(super) pattern: Pattern,
}

/// Equal text of one kind means equal meaning.
impl<K> PartialEq for Expression<K> {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl<K> fmt::Display for Expression<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// About a node.
pub(super) type Constraint = Expression<NodeKey>;

/// About the tasks on a node.
pub(super) type Affinity = Expression<TaskAttr>;

/// Whether an affinity looks at what runs on a node or at what lies there.
#[derive(Clone, Debug)]
pub(super) enum AnyAffinity {
    Tasks(Affinity),
    /// Volumes are facts of the node.
    Volumes(Constraint),
}

/// What the three kinds of expressions begin with in an environment.
pub(super) const CONSTRAINT_PREFIX: &str = "constraint:";
pub(super) const AFFINITY_PREFIX: &str = "affinity:";
pub(super) const WHITELIST_PREFIX: &str = "whitelist:";

/// Key of a container's label in an affinity, before which the words `container`, `image`, … stand for themselves.
const CONTAINER_LABELS: &str = "container.labels.";

const CONSTRAINT: Syntax = Syntax { kind: "constraint", prefix: CONSTRAINT_PREFIX, example: "node.labels.disk==ssd" };
const AFFINITY: Syntax = Syntax { kind: "affinity", prefix: AFFINITY_PREFIX, example: "affinity:container!=db*" };
const WHITELIST: Syntax =
    Syntax { kind: "whitelist", prefix: WHITELIST_PREFIX, example: "whitelist:node==dc1-a|dc1-b" };
const PLATFORM: Syntax = Syntax { kind: "platform", prefix: "", example: "linux/arm64" };
const PREFERENCE: Syntax = Syntax { kind: "preference", prefix: "spread=", example: "node.labels.zone" };

/// What a list of expressions is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExprKind {
    Constraint,
    Affinity,
    Whitelist,
    Preference,
}

impl ExprKind {
    fn syntax(self) -> &'static Syntax {
        match self {
            Self::Constraint => &CONSTRAINT,
            Self::Affinity => &AFFINITY,
            Self::Whitelist => &WHITELIST,
            Self::Preference => &PREFERENCE,
        }
    }
}

/// Parses a constraint in either spelling.
pub(super) fn parse_constraint(expression: &str) -> Result<Constraint, ConstraintError> {
    let mut parts = CONSTRAINT.split(expression)?;
    let key = node_key(parts.key).map_err(|expected| CONSTRAINT.error(expression, parts.key_at, expected))?;
    if let (NodeKey::First(attrs), Pattern::Exact(text)) = (&key, &parts.pattern)
        && attrs[..] == [NodeAttr::Ip]
    {
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        let expected = "an address such as 10.0.0.7 or a prefix such as 10.0.0.0/24";
        parts.pattern =
            Pattern::Subnet(net.map_err(|_| CONSTRAINT.error(expression, parts.value_at, expected))?.trunc());
    }
    Ok(parts.into_expression(key))
}

/// Parses an affinity expression.
pub(super) fn parse_affinity(expression: &str) -> Result<AnyAffinity, ConstraintError> {
    let parts = AFFINITY.split(expression)?;
    let key = match parts.key {
        "container" => TaskAttr::Container,
        "image" => TaskAttr::Image,
        "service" => TaskAttr::Service,
        "volume" => {
            return Ok(AnyAffinity::Volumes(parts.into_expression(NodeKey::First(vec![NodeAttr::Volume]))));
        }
        key => match key.strip_prefix(CONTAINER_LABELS) {
            Some("") => {
                let expected = format!("the key of a label after `{CONTAINER_LABELS}`");
                return Err(AFFINITY.error(expression, parts.key_at, expected));
            }
            label => TaskAttr::Label(label.unwrap_or(key).to_owned()),
        },
    };
    Ok(AnyAffinity::Tasks(parts.into_expression(key)))
}

/// Parses a set of nodes: `[whitelist:]node==a|b|c`.
pub(super) fn parse_whitelist(expression: &str) -> Result<Constraint, ConstraintError> {
    let mut parts = WHITELIST.split(expression)?;
    if parts.key != "node" {
        return Err(WHITELIST.error(expression, parts.key_at, "`node`"));
    }
    if parts.negated || parts.soft {
        return Err(WHITELIST.error(expression, parts.op_at, "`==`"));
    }
    let mut names = BTreeSet::new();
    let mut at = parts.value_at;
    for name in parts.value.split('|') {
        let allowed = |c: char| is_key_char(c) && c != '/';
        let trimmed = name.trim();
        if trimmed.is_empty() || !trimmed.chars().all(allowed) {
            let offset = name.find(|c: char| !allowed(c) && c != ' ').unwrap_or(name.len() - name.trim_start().len());
            return Err(WHITELIST.error(expression, at + offset, "the name or id of a node, and `|` before the next"));
        }
        names.insert(trimmed.to_owned());
        at += name.len() + 1;
    }
    parts.pattern = Pattern::OneOf(names);
    Ok(parts.into_expression(NodeKey::Any(vec![NodeAttr::Name, NodeAttr::Id])))
}

/// Parses the key of a spread preference: `[spread=]node.labels.zone`.
pub(super) fn parse_preference(text: &str) -> Result<NodeKey, ConstraintError> {
    let at = skip_blanks(text, 0);
    let at = if text[at..].starts_with(PREFERENCE.prefix) { at + PREFERENCE.prefix.len() } else { at };
    let key = text[at..].trim_end();
    let wrong = key.find(|c| !is_key_char(c)).or_else(|| key.is_empty().then_some(0));
    if let Some(offset) = wrong {
        return Err(PREFERENCE.error(text, at + offset, "a key made of letters, digits and `.` `_` `-` `/`"));
    }
    match node_key(key).map_err(|expected| PREFERENCE.error(text, at, expected))? {
        NodeKey::First(attrs) if attrs == [NodeAttr::Ip] => {
            Err(PREFERENCE.error(text, at, "a key with one value, such as a label"))
        }
        key => Ok(key),
    }
}

/// What an image runs on; an empty part means any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Platform {
    pub(super) os: String,
    pub(super) arch: String,
}

/// Parses `os[/architecture[/variant]]` or an architecture alone, as Docker's `--platform` takes it. The variant
/// does not count: engines say `armv7l`, not how an image would name it.
pub(super) fn parse_platform(text: &str) -> Result<Platform, ConstraintError> {
    let parts: Vec<&str> = text.split('/').collect();
    let wrong = |part: &&str| part.is_empty() || !part.chars().all(|c| is_key_char(c) && c != '/');
    if let Some(at) = parts.iter().position(wrong).or_else(|| (parts.len() > 3).then_some(3)) {
        let offset = parts[..at].iter().map(|part| part.len() + 1).sum();
        return Err(PLATFORM.error(text, offset, "`os/architecture` with at most a variant after it"));
    }
    let (os, arch) = match parts[..] {
        [os @ ("linux" | "windows" | "darwin" | "freebsd")] => (os, ""),
        [arch] => ("", arch),
        _ => (parts[0], parts[1]),
    };
    Ok(Platform { os: os.to_ascii_lowercase(), arch: arch.to_ascii_lowercase() })
}

/// An error about a list of expressions rather than one of them.
pub(super) fn list_error(kind: ExprKind, text: &str, column: usize, expected: String) -> ConstraintError {
    let syntax = kind.syntax();
    ConstraintError {
        kind: syntax.kind,
        expression: text.to_owned(),
        column: column.max(1),
        expected,
        example: syntax.example,
    }
}

/// The attributes behind a key; the error says what was expected.
fn node_key(key: &str) -> Result<NodeKey, String> {
    // swarmkit compares its own names without case and label keys with it (manager/constraint).
    let lower = key.to_ascii_lowercase();
    let label = |prefix: &str| lower.starts_with(prefix).then(|| key[prefix.len()..].to_owned());
    for (prefix, attr) in [
        ("node.labels.", NodeAttr::NodeLabel as fn(String) -> NodeAttr),
        ("engine.labels.", NodeAttr::EngineLabel as fn(String) -> NodeAttr),
    ] {
        match label(prefix) {
            Some(name) if name.is_empty() => return Err(format!("the key of a label after `{prefix}`")),
            Some(name) => return Ok(NodeKey::First(vec![attr(name)])),
            None => {}
        }
    }
    let standard = match lower.as_str() {
        // The classic spelling; any label of this name is reached through `node.labels.node`.
        "node" => return Ok(NodeKey::Any(vec![NodeAttr::Name, NodeAttr::Id])),
        "node.id" => NodeAttr::Id,
        "node.name" => NodeAttr::Name,
        "node.hostname" => NodeAttr::Hostname,
        "node.role" => NodeAttr::Role,
        "node.site" => NodeAttr::Site,
        "node.ip" => NodeAttr::Ip,
        "node.platform.os" => NodeAttr::Os,
        "node.platform.arch" => NodeAttr::Arch,
        _ if lower.starts_with("node.") || lower.starts_with("engine.") => {
            return Err("one of node.id, node.name, node.hostname, node.ip, node.role, node.site, \
                        node.platform.os, node.platform.arch, node.labels.<key>, engine.labels.<key>"
                .to_owned());
        }
        _ => return Ok(NodeKey::First(bare_key(key, &lower))),
    };
    Ok(NodeKey::First(vec![standard]))
}

/// A bare key is a label of the node, else of the engine, else one of the classic standard names.
fn bare_key(key: &str, lower: &str) -> Vec<NodeAttr> {
    let mut attrs = vec![NodeAttr::NodeLabel(key.to_owned()), NodeAttr::EngineLabel(key.to_owned())];
    match lower {
        "storagedriver" => attrs.push(NodeAttr::StorageDriver),
        "executiondriver" => attrs.push(NodeAttr::ExecutionDriver),
        "kernelversion" => attrs.push(NodeAttr::Kernel),
        "operatingsystem" => attrs.push(NodeAttr::OperatingSystem),
        "engineversion" => attrs.push(NodeAttr::EngineVersion),
        "site" => attrs.push(NodeAttr::Site),
        _ => {}
    }
    attrs
}

/// What differs between the kinds of expressions.
struct Syntax {
    kind: &'static str,
    prefix: &'static str,
    example: &'static str,
}

/// An expression taken apart.
struct Parts<'a> {
    key: &'a str,
    /// Byte offsets.
    key_at: usize,
    op_at: usize,
    value_at: usize,
    negated: bool,
    soft: bool,
    value: &'a str,
    pattern: Pattern,
}

impl Parts<'_> {
    fn into_expression<K>(self, key: K) -> Expression<K> {
        let op = if self.negated { "!=" } else { "==" };
        let soft = if self.soft { "~" } else { "" };
        let text = format!("{}{op}{soft}{}", self.key, self.value);
        Expression { text, key, negated: self.negated, soft: self.soft, pattern: self.pattern }
    }
}

impl Syntax {
    /// An error at a byte offset.
    fn error(&self, expression: &str, at: usize, expected: impl Into<String>) -> ConstraintError {
        let column = expression.get(..at).unwrap_or(expression).chars().count() + 1;
        ConstraintError {
            kind: self.kind,
            expression: expression.to_owned(),
            column,
            expected: expected.into(),
            example: self.example,
        }
    }

    /// `[prefix] key (==|!=)[~] value`, blanks between the parts allowed.
    fn split<'a>(&self, expression: &'a str) -> Result<Parts<'a>, ConstraintError> {
        if let Some((at, _)) = expression.char_indices().nth(EXPRESSION_CHARS_MAX) {
            return Err(self.error(expression, at, format!("the end: at most {EXPRESSION_CHARS_MAX} characters")));
        }
        let mut key_at = skip_blanks(expression, 0);
        let others = [CONSTRAINT_PREFIX, AFFINITY_PREFIX, WHITELIST_PREFIX].into_iter().filter(|p| *p != self.prefix);
        if others.into_iter().any(|prefix| expression[key_at..].starts_with(prefix)) {
            let expected = format!("`{}`, this is a list of {} expressions", self.prefix, self.kind);
            return Err(self.error(expression, key_at, expected));
        }
        if expression[key_at..].starts_with(self.prefix) {
            key_at = skip_blanks(expression, key_at + self.prefix.len());
        }
        let key_len = expression[key_at..].find(|c| !is_key_char(c)).unwrap_or(expression.len() - key_at);
        if key_len == 0 {
            return Err(self.error(expression, key_at, "a key made of letters, digits and `.` `_` `-` `/`"));
        }
        let op_at = skip_blanks(expression, key_at + key_len);
        let negated = match expression[op_at..].get(..2) {
            Some("==") => false,
            Some("!=") => true,
            _ => return Err(self.error(expression, op_at, "`==`, `!=`, `==~` or `!=~`")),
        };
        let soft = expression[op_at + 2..].starts_with('~');
        let value_at = skip_blanks(expression, op_at + 2 + usize::from(soft));
        let value = expression[value_at..].trim_end();
        let pattern = self.pattern(expression, value_at, value)?;
        let key = &expression[key_at..key_at + key_len];
        Ok(Parts { key, key_at, op_at, value_at, negated, soft, value, pattern })
    }

    /// The value: `/regex/`, a glob or a plain text.
    fn pattern(&self, expression: &str, at: usize, value: &str) -> Result<Pattern, ConstraintError> {
        if value.is_empty() {
            return Err(self.error(expression, at, "a value, a glob such as `a*` or a regex such as `/a|b/`"));
        }
        if let Some(offset) = value.find(char::is_control) {
            return Err(self.error(expression, at + offset, "a value without control characters"));
        }
        if value.starts_with('=') {
            return Err(self.error(expression, at, "a value after the operator, not a third `=`"));
        }
        if let Some(inner) = value.strip_prefix('/') {
            let Some(regex) = inner.strip_suffix('/') else {
                return Err(self.error(expression, at + value.len(), "`/` at the end of the regex"));
            };
            if regex.is_empty() {
                return Err(self.error(expression, at + 1, "a regex between the slashes"));
            }
            return RegexBuilder::new(regex)
                .size_limit(REGEX_BYTES_MAX)
                .nest_limit(REGEX_NESTING_MAX)
                .build()
                .map(Pattern::Regex)
                .map_err(|err| self.error(expression, at + 1, format!("a regex of bounded size ({err})")));
        }
        if value.contains('*') {
            return Ok(Pattern::Glob(value.split('*').map(str::to_owned).collect()));
        }
        Ok(Pattern::Exact(value.to_owned()))
    }
}

fn skip_blanks(expression: &str, from: usize) -> usize {
    expression.len() - expression[from..].trim_start().len()
}

/// What Docker takes in label keys and Swarm took in its keys. A `!` or `=` ends the key.
fn is_key_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_wrong<T: fmt::Debug>(
        text: &str,
        parsed: Result<T, ConstraintError>,
        column: usize,
        expected: &str,
    ) -> String {
        let err = parsed.expect_err(text);
        assert_eq!((err.column, err.expected.contains(expected)), (column, true), "{text}: {err}");
        err.caret()
    }

    fn check_error(expression: &str, column: usize, expected: &str) {
        let caret = check_wrong(expression, parse_constraint(expression), column, expected);
        assert_eq!(caret.lines().nth(1).unwrap().chars().count(), column, "{expression}");
    }

    #[test]
    fn both_spellings_and_blanks_give_the_same_expression() {
        let check = |expression: &str, text: &str, negated, soft| {
            let got = parse_constraint(expression).unwrap_or_else(|err| panic!("{err}\n{}", err.caret()));
            assert_eq!((got.text.as_str(), got.negated, got.soft), (text, negated, soft));
        };
        check("disk==ssd", "disk==ssd", false, false);
        check("constraint:disk==ssd", "disk==ssd", false, false);
        check("  constraint: disk  ==  ssd ", "disk==ssd", false, false);
        check("disk!=~ssd", "disk!=~ssd", true, true);
        check("disk ==~ /s.d/", "disk==~/s.d/", false, true);
        check("node.labels.a/b-c_d.e != x y", "node.labels.a/b-c_d.e!=x y", true, false);
        check("zone==a=b", "zone==a=b", false, false);
        check("path==a/b", "path==a/b", false, false);
    }

    #[test]
    fn keys_name_attributes() {
        let check = |key: &str, expected: NodeKey| {
            assert_eq!(parse_constraint(&format!("{key}==x")).unwrap().key, expected);
        };
        let first = |attr| NodeKey::First(vec![attr]);
        check("node", NodeKey::Any(vec![NodeAttr::Name, NodeAttr::Id]));
        check("node.id", first(NodeAttr::Id));
        check("Node.Hostname", first(NodeAttr::Hostname));
        check("node.platform.arch", first(NodeAttr::Arch));
        check("node.labels.Zone", first(NodeAttr::NodeLabel("Zone".into())));
        check("engine.labels.gpu", first(NodeAttr::EngineLabel("gpu".into())));
        let both = |key: &str| vec![NodeAttr::NodeLabel(key.into()), NodeAttr::EngineLabel(key.into())];
        check("disk", NodeKey::First(both("disk")));
        check("site", NodeKey::First([both("site"), vec![NodeAttr::Site]].concat()));
    }

    #[test]
    fn errors_show_the_position_and_what_was_expected() {
        check_error("", 1, "a key");
        check_error("==ssd", 1, "a key");
        check_error("disk", 5, "`==`");
        check_error("disk=ssd", 5, "`==`");
        check_error("disk<5", 5, "`==`");
        check_error("constraint:disk", 16, "`==`");
        check_error("my disk==ssd", 4, "`==`");
        check_error("größe==1", 3, "`==`");
        check_error("disk==", 7, "a value");
        check_error("disk ==~ ", 10, "a value");
        check_error("disk===ssd", 7, "third");
        check_error("disk==/ssd", 11, "`/`");
        check_error("disk==//", 8, "a regex");
        check_error("disk==/(/", 8, "a regex");
        check_error("disk==/((a{500}){500}){500}/", 8, "a regex");
        check_error("disk==/(x?){200}y/", 8, "bounded size");
        check_error("disk==a\u{7}b", 8, "control");
        check_error("affinity:container==web", 1, "`constraint:`");
        check_error("node.colour==red", 1, "node.labels.<key>");
        check_error("engine.gpu==1", 1, "engine.labels.<key>");
        check_error("node.labels.==x", 1, "the key of a label");
        check_error(&format!("a=={}", "x".repeat(2_000)), EXPRESSION_CHARS_MAX + 1, "at most 1024");
        let deep = format!("a==/{}x{}/", "(".repeat(200), ")".repeat(200));
        check_error(&deep, 5, "a regex");
    }

    #[test]
    fn an_error_reads_as_a_sentence_with_a_caret() {
        let err = parse_constraint("größe = x").unwrap_err();
        assert_eq!(
            err.to_string(),
            "failed to parse constraint `größe = x` at column 3: expected `==`, `!=`, `==~` or `!=~`"
        );
        assert_eq!(err.caret(), "größe = x\n  ^");
        assert_eq!(err.hint(), "write for example `node.labels.disk==ssd`");
    }

    #[test]
    fn values_match_exactly_by_glob_or_by_regex() {
        let check = |value: &str, yes: &[&str], no: &[&str]| {
            let pattern = parse_constraint(&format!("k=={value}")).unwrap().pattern;
            yes.iter().for_each(|text| assert!(pattern.matches(text), "{value} shall match {text}"));
            no.iter().for_each(|text| assert!(!pattern.matches(text), "{value} shall not match {text}"));
        };
        check("ssd", &["ssd"], &["SSD", "ssd2", ""]);
        check("*", &["", "x"], &[]);
        check("a*", &["a", "ab"], &["ba", "A"]);
        check("*a", &["a", "ba"], &["ab"]);
        check("a*a", &["aa", "aba"], &["a"]);
        check("a*b*c", &["abc", "axbxbxc"], &["acb", "ac"]);
        check("a**b", &["ab", "axb"], &["a"]);
        check("a.c*", &["a.c"], &["abc"]);
        check("/b/", &["abc"], &["ac"]);
        check("/^b$/", &["b"], &["abc"]);
        let names = (0..40).map(|n| format!("dc1-host{n:02}")).collect::<Vec<_>>().join("|");
        check(&format!("/^({names})$/"), &["dc1-host39"], &["dc1-host40"]);
        let (longest, longer) = ("x".repeat(512), "x".repeat(513));
        check("/x/", &[&longest], &[&longer]);
        check("/(?i)node[12]/", &["NODE1", "my-node2"], &["node3"]);
    }

    #[test]
    fn addresses_match_by_prefix() {
        let check = |value: &str, yes: &[&str], no: &[&str]| {
            let pattern = parse_constraint(&format!("node.ip=={value}")).unwrap().pattern;
            yes.iter().for_each(|text| assert!(pattern.matches(text), "{value} shall match {text}"));
            no.iter().for_each(|text| assert!(!pattern.matches(text), "{value} shall not match {text}"));
        };
        check("10.0.0.7", &["10.0.0.7"], &["10.0.0.70", "fd00::7"]);
        check("10.1.2.3/16", &["10.1.0.1", "10.1.255.255"], &["10.2.0.1", ""]);
        check("fd00::/8", &["fd01::1"], &["fe80::1", "10.0.0.7"]);
        check("10.0.*", &["10.0.3.4"], &["10.1.3.4"]);
        check_error("node.ip==10.0.0", 10, "a prefix such as");
    }

    #[test]
    fn whitelists_are_sets_of_names() {
        let check = |text: &str, names: &[&str]| match parse_whitelist(text).unwrap().pattern {
            Pattern::OneOf(got) => assert!(got.iter().eq(names), "{text}: {got:?}"),
            other => panic!("{other:?}"),
        };
        check("node==a", &["a"]);
        check("whitelist:node==dc1-b | dc1-a|dc1-b", &["dc1-a", "dc1-b"]);
        let wrong = |text: &str, column, expected| drop(check_wrong(text, parse_whitelist(text), column, expected));
        wrong("node!=a", 5, "`==`");
        wrong("node==~a", 5, "`==`");
        wrong("zone==a", 1, "`node`");
        wrong("node==a||b", 9, "the name");
        wrong("node==a|b*", 10, "the name");
        wrong("node==a|", 9, "the name");
        wrong("constraint:node==a", 1, "`whitelist:`");
    }

    #[test]
    fn preferences_are_keys() {
        let check = |text: &str, expected: NodeKey| assert_eq!(parse_preference(text).unwrap(), expected, "{text}");
        check("node.labels.zone", NodeKey::First(vec![NodeAttr::NodeLabel("zone".into())]));
        check("spread=node.site", NodeKey::First(vec![NodeAttr::Site]));
        let wrong = |text: &str, column, expected| drop(check_wrong(text, parse_preference(text), column, expected));
        wrong("", 1, "a key");
        wrong("spread=", 8, "a key");
        wrong("node.labels.zone==a", 17, "a key");
        wrong("node.colour", 1, "node.labels.<key>");
        wrong("node.ip", 1, "one value");
    }

    #[test]
    fn affinities_look_at_containers_images_and_labels() {
        let check = |expression: &str, expected| match parse_affinity(expression).unwrap() {
            AnyAffinity::Tasks(affinity) => assert_eq!(affinity.key, expected),
            AnyAffinity::Volumes(volumes) => panic!("{volumes}"),
        };
        check("container==web", TaskAttr::Container);
        check("affinity:image==~redis", TaskAttr::Image);
        check("com.example.tier!=front", TaskAttr::Label("com.example.tier".into()));
        check("service!=shop_web", TaskAttr::Service);
        check("container.labels.service==x", TaskAttr::Label("service".into()));
        let volumes = parse_affinity("volume==data*").unwrap();
        assert!(matches!(volumes, AnyAffinity::Volumes(v) if v.key == NodeKey::First(vec![NodeAttr::Volume])));
        assert_eq!(parse_affinity("container.labels.==x").unwrap_err().column, 1);
        let err = parse_affinity("constraint:disk==ssd").unwrap_err();
        assert_eq!((err.kind, err.column), ("affinity", 1));
    }
}
