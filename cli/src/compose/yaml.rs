//! YAML text to a tree of nodes that know their place.
//!
//! Owns: anchors and aliases, merge keys (YAML 1.1 `<<`), refusal of duplicate keys, bounds on size. Scalars keep the
//! text that the user wrote (`22:22` is no number, `1.0` stays `1.0`) and whether they were quoted; what a scalar means
//! is decided by who reads it. Must not know compose.

use std::{
    collections::{HashMap, HashSet},
    iter::Peekable,
};

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use super::problem::{Pos, Problem};

/// Most nodes of a tree after aliases are followed: a file of a thousand services has some 50,000; a "billion laughs"
/// file has more.
pub const NODES_MAX: usize = 500_000;

/// Most bytes that anchors and aliases copy: a file of a thousand services has less than 1 MB in all. Values alone are
/// no bound, since one of them may be as long as the file.
pub const COPIES_BYTES_MAX: usize = 16 << 20;

/// Deepest nesting; the deepest useful path of a compose file has 8 levels.
pub const DEPTH_MAX: usize = 64;

/// A value and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where it starts.
    pub pos: Pos,
    /// What it is.
    pub value: Value,
}

/// The kinds of nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Text; `quoted` in any way, also as a block.
    Scalar {
        /// As written, escapes resolved.
        text: String,
        /// Not plain: never null.
        quoted: bool,
    },
    /// A list.
    List(Vec<Node>),
    /// A mapping, in the order of the file; keys are unique.
    Map(Vec<(Key, Node)>),
}

/// A key of a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Where it starts.
    pub pos: Pos,
    /// Its text.
    pub text: String,
}

impl Node {
    /// Empty, `~` or `null`, unquoted (YAML 1.2 core schema).
    pub fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, quoted: false } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// What it is, in words for error messages.
    pub fn kind(&self) -> String {
        match &self.value {
            _ if self.is_null() => "nothing".into(),
            Value::Scalar { text, .. } if text.chars().count() <= 60 => format!("{text:?}"),
            Value::Scalar { text, .. } => format!("{:?}…", text.chars().take(57).collect::<String>()),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }

    /// The value of a key, if this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(k, _)| k.text == key).map(|(_, v)| v),
            _ => None,
        }
    }

    fn count(&self) -> usize {
        1 + match &self.value {
            Value::Scalar { .. } => 0,
            Value::List(items) => items.iter().map(Self::count).sum(),
            Value::Map(entries) => entries.iter().map(|(_, v)| 1 + v.count()).sum(),
        }
    }

    fn text_bytes(&self) -> usize {
        match &self.value {
            Value::Scalar { text, .. } => text.len(),
            Value::List(items) => items.iter().map(Self::text_bytes).sum(),
            Value::Map(entries) => entries.iter().map(|(key, v)| key.text.len() + v.text_bytes()).sum(),
        }
    }
}

/// Reads the one document of a file. An empty file is `None`.
///
/// # Errors
/// The first thing that is wrong: syntax, a duplicate or complex key, an unknown tag, a bad alias or merge, a second
/// document, over [`NODES_MAX`] or [`DEPTH_MAX`].
pub fn parse(text: &str, file: usize) -> Result<Option<Node>, Problem> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut builder =
        Builder { parser: Parser::new_from_str(text).peekable(), file, anchors: HashMap::new(), nodes: 0, copied: 0 };
    let mut root = None;
    loop {
        let (event, span) = builder.next()?;
        match event {
            Event::StreamEnd => return Ok(root),
            Event::DocumentStart(_) if root.is_some() => {
                return Err(Problem::at(builder.pos(span), "expected one document, found a second one")
                    .hint("keep one stack per file; give further files with `-f`"));
            }
            Event::DocumentStart(_) | Event::DocumentEnd | Event::StreamStart | Event::Nothing => {}
            other => root = Some(builder.node(other, span, 0)?),
        }
    }
}

struct Builder<'t, I: Iterator<Item = Result<(Event<'t>, Span), saphyr_parser::ScanError>>> {
    parser: Peekable<I>,
    file: usize,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    copied: usize,
}

impl<'t, I: Iterator<Item = Result<(Event<'t>, Span), saphyr_parser::ScanError>>> Builder<'t, I> {
    fn pos(&self, span: Span) -> Pos {
        Pos { file: self.file, line: span.start.line(), column: span.start.col() + 1 }
    }

    fn next(&mut self) -> Result<(Event<'t>, Span), Problem> {
        match self.parser.next() {
            Some(Ok(next)) => Ok(next),
            Some(Err(e)) => {
                let pos = Pos { file: self.file, line: e.marker().line(), column: e.marker().col() + 1 };
                Err(Problem::at(pos, format!("bad YAML: {}", e.info())))
            }
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn add(&mut self, count: usize, pos: Pos) -> Result<(), Problem> {
        self.nodes += count;
        if self.nodes > NODES_MAX {
            return Err(Problem::at(
                pos,
                format!("the file has more than {NODES_MAX} values once its aliases are followed"),
            ));
        }
        Ok(())
    }

    /// A copy for an anchor or an alias, within the limits of both: a value is copied for each anchor around it.
    fn copy(&mut self, node: &Node, pos: Pos) -> Result<Node, Problem> {
        self.add(node.count(), pos)?;
        self.copied += node.text_bytes();
        if self.copied > COPIES_BYTES_MAX {
            let message = format!("the file's anchors and aliases copy more than {COPIES_BYTES_MAX} bytes");
            return Err(Problem::at(pos, message));
        }
        Ok(node.clone())
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Node, Problem> {
        let pos = self.pos(span);
        if depth > DEPTH_MAX {
            return Err(Problem::at(pos, format!("nested more than {DEPTH_MAX} levels deep")));
        }
        self.add(1, pos)?;
        let (value, anchor) = match event {
            Event::Alias(id) => {
                let Some(target) = self.anchors.remove(&id) else {
                    return Err(Problem::at(pos, "this alias refers to a value that contains it"));
                };
                let copy = self.copy(&target, pos);
                self.anchors.insert(id, target);
                return copy;
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.check_tag(tag.as_deref(), pos)?;
                let text_tag = tag.is_some_and(|t| t.suffix == "str");
                let quoted = style != ScalarStyle::Plain || text_tag;
                (Value::Scalar { text: text.into_owned(), quoted }, anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                self.check_tag(tag.as_deref(), pos)?;
                (self.list(depth)?, anchor)
            }
            Event::MappingStart(anchor, tag) => {
                self.check_tag(tag.as_deref(), pos)?;
                (self.map(depth)?, anchor)
            }
            other => return Err(Problem::at(pos, format!("bad YAML: unexpected {other:?}"))),
        };
        let node = Node { pos, value };
        if anchor != 0 {
            let copy = self.copy(&node, pos)?;
            self.anchors.insert(anchor, copy);
        }
        Ok(node)
    }

    fn check_tag(&self, tag: Option<&saphyr_parser::Tag>, pos: Pos) -> Result<(), Problem> {
        match tag {
            Some(tag) if !tag.is_yaml_core_schema() => Err(Problem::at(pos, format!("the tag {tag} is not supported"))),
            _ => Ok(()),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, Problem> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(Value::List(items)),
                (event, span) => items.push(self.node(event, span, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Value, Problem> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        let mut seen: HashMap<String, Pos> = HashMap::new();
        let mut merges: Option<Node> = None;
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                break;
            }
            let pos = self.pos(span);
            let merge = matches!(&event, Event::Scalar(text, ScalarStyle::Plain, ..) if text == "<<");
            let key = self.node(event, span, depth + 1)?;
            let Value::Scalar { text, .. } = key.value else {
                return Err(Problem::at(pos, format!("expected a key, found {}", key.kind())));
            };
            if let Some(first) = seen.insert(text.clone(), pos) {
                let mut problem = Problem::at(pos, format!("the key {text:?} is given twice"));
                problem.notes.push((first, "first given here".into()));
                return Err(problem);
            }
            let (event, span) = self.next()?;
            let value = self.node(event, span, depth + 1)?;
            if merge {
                merges = Some(value);
            } else {
                entries.push((Key { pos, text }, value));
            }
        }
        if let Some(merged) = merges {
            self.merge(&mut entries, merged)?;
        }
        Ok(Value::Map(entries))
    }

    /// Adds what `<<` brings: a key that is there already wins, an earlier mapping wins over a later one.
    fn merge(&mut self, entries: &mut Vec<(Key, Node)>, merged: Node) -> Result<(), Problem> {
        let mut seen: HashSet<String> = entries.iter().map(|(key, _)| key.text.clone()).collect();
        let pos = merged.pos;
        let sources = match merged.value {
            Value::List(items) => items,
            _ => vec![merged],
        };
        for source in sources {
            let kind = source.kind();
            let Value::Map(more) = source.value else {
                return Err(Problem::at(
                    pos,
                    format!("expected a mapping or a list of mappings to merge, found {kind}"),
                ));
            };
            for (key, value) in more {
                if seen.insert(key.text.clone()) {
                    entries.push((key, value));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree on one line: `{a: b, c: [d, "e"]}`.
    fn show(node: &Node) -> String {
        match &node.value {
            Value::Scalar { text, quoted: true } => format!("{text:?}"),
            Value::Scalar { text, .. } => text.clone(),
            Value::List(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(", ")),
            Value::Map(entries) => {
                let entries: Vec<_> = entries.iter().map(|(k, v)| format!("{}: {}", k.text, show(v))).collect();
                format!("{{{}}}", entries.join(", "))
            }
        }
    }

    fn check(text: &str, expected: &str) {
        let got = match parse(text, 0) {
            Ok(Some(node)) => show(&node),
            Ok(None) => "(empty)".into(),
            Err(p) => {
                let pos = p.at.unwrap();
                format!("{}:{} {}", pos.line, pos.column, p.message)
            }
        };
        assert_eq!(got, expected, "{text:?}");
    }

    #[test]
    fn trees() {
        check("", "(empty)");
        check("# only a comment\n", "(empty)");
        check("a: b", "{a: b}");
        check("\u{feff}a: b", "{a: b}");
        check("a: [22:22, '80', 0x10, yes, ~]", "{a: [22:22, \"80\", 0x10, yes, ~]}");
        check("a: |\n  one\n  two\n", "{a: \"one\\ntwo\\n\"}");
        check("a: >-\n  one\n  two\n", "{a: \"one two\"}");
        check("a: plain\n  goes on\n", "{a: plain goes on}");
        check("a: !!str 5", "{a: \"5\"}");
        check("a:\n- b: 1\n  c: 2\n- d", "{a: [{b: 1, c: 2}, d]}");
    }

    #[test]
    fn anchors_and_merges() {
        check("a: &x {b: 1}\nc: *x", "{a: {b: 1}, c: {b: 1}}");
        check("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", "{a: {b: 1, c: 2}, d: {c: 3, b: 1}}");
        check("a: &x {k: 1}\nb: &y {k: 2, l: 2}\nc: {<<: [*x, *y]}", "{a: {k: 1}, b: {k: 2, l: 2}, c: {k: 1, l: 2}}");
        check("a: {\"<<\": b}", "{a: {<<: b}}");
        check("a: {<<: b}", "1:9 expected a mapping or a list of mappings to merge, found \"b\"");
        check("a: &x\n  b: *x", "2:6 this alias refers to a value that contains it");
    }

    #[test]
    fn refusals() {
        check("a: 1\nb: 2\na: 3", "3:1 the key \"a\" is given twice");
        check("a: {b: 1, b: 2}", "1:11 the key \"b\" is given twice");
        check("? [a]\n: b", "1:3 expected a key, found a list");
        check("a: !reset null", "1:4 the tag !reset is not supported");
        check("a: 1\n---\nb: 2", "2:1 expected one document, found a second one");
        let deep = format!("{}{}", "[".repeat(70), "]".repeat(70));
        check(&deep, "1:66 nested more than 64 levels deep");
        let mut laughs = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..9 {
            let alias = format!("*a{},", i - 1).repeat(10);
            laughs.push_str(&format!("a{i}: &a{i} [{alias}]\n"));
        }
        assert_eq!(
            parse(&laughs, 0).unwrap_err().message,
            "the file has more than 500000 values once its aliases are followed"
        );
    }
}
