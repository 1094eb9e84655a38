//! Reading typed values out of the tree: what was expected, what was found, and where.
//!
//! Owns the collection of errors and warnings of one run: reading goes on after an error, so that a user sees all of
//! them at once. Must not know what the keys mean; [`super::keys`] says which there are.

use skein_api::did_you_mean;

use super::{
    keys::{Support, Table},
    problem::{Pos, Problem},
    yaml::{Key, Node, Value},
};

/// What a run has found so far.
#[derive(Debug, Default)]
pub(super) struct Cx {
    /// Keys without effect are errors.
    pub(super) strict: bool,
    /// What is wrong.
    pub(super) errors: Vec<Problem>,
    /// What the user should know.
    pub(super) warnings: Vec<Problem>,
}

/// A mapping whose keys were checked.
pub(super) struct Fields<'n> {
    /// Where it is: `services.web`.
    pub(super) path: String,
    entries: Vec<(&'n Key, &'n Node)>,
}

impl<'n> Fields<'n> {
    /// The value of a key; none when it is absent or empty.
    pub(super) fn get(&self, key: &str) -> Option<(&'n Node, String)> {
        let (_, node) = self.entries.iter().find(|(k, _)| k.text == key)?;
        (!node.is_null()).then(|| (*node, format!("{}.{key}", self.path)))
    }

    /// Where a key stands.
    pub(super) fn key_pos(&self, key: &str) -> Option<Pos> {
        self.entries.iter().find(|(k, _)| k.text == key).map(|(k, _)| k.pos)
    }
}

/// Name and value of an entry of `environment`, `labels` and the like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) value: Option<String>,
    pub(super) pos: Pos,
}

impl Cx {
    pub(super) fn error(&mut self, pos: Pos, message: impl Into<String>) {
        self.errors.push(Problem::at(pos, message));
    }

    pub(super) fn error_hint(&mut self, pos: Pos, message: impl Into<String>, hint: impl Into<String>) {
        self.errors.push(Problem::at(pos, message).hint(hint));
    }

    pub(super) fn warn(&mut self, pos: Pos, message: impl Into<String>) {
        self.warnings.push(Problem::at(pos, message));
    }

    /// Says that something has no effect: a warning, an error when strict.
    pub(super) fn no_effect(&mut self, pos: Pos, message: impl Into<String>) {
        let problem = Problem::at(pos, message);
        if self.strict {
            self.errors.push(problem.hint("without --strict this is a warning"));
        } else {
            self.warnings.push(problem);
        }
    }

    /// The entries of a mapping.
    pub(super) fn map<'n>(&mut self, node: &'n Node, path: &str) -> Option<&'n [(Key, Node)]> {
        match &node.value {
            Value::Map(entries) => Some(entries),
            _ if node.is_null() => Some(&[]),
            _ => {
                let path = if path.is_empty() { "the file" } else { path };
                self.error(node.pos, format!("{path}: expected a mapping, found {}", node.kind()));
                None
            }
        }
    }

    /// A mapping whose keys are in `table`: unknown ones are errors, unsupported ones are said.
    pub(super) fn fields<'n>(&mut self, node: &'n Node, path: &str, table: Table) -> Option<Fields<'n>> {
        let mut entries = Vec::new();
        for (key, value) in self.map(node, path)? {
            let name = key.text.as_str();
            // Extensions are anybody's; the few in the tables are ours.
            if name.starts_with("x-") && !table.iter().any(|(k, _)| *k == name) {
                continue;
            }
            let full = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
            match table.iter().find(|(k, _)| *k == name).map(|(_, s)| *s) {
                None => self.unknown_key(key, path, table),
                Some(_) if value.is_null() => {}
                Some(Support::Yes) => {}
                Some(Support::Warn(why)) => self.no_effect(key.pos, format!("{full} has no effect: {why}")),
                Some(Support::Refuse(why, hint)) => self.error_hint(key.pos, format!("{full} is refused: {why}"), hint),
            }
            entries.push((key, value));
        }
        Some(Fields { path: path.to_owned(), entries })
    }

    fn unknown_key(&mut self, key: &Key, path: &str, table: Table) {
        let place = if path.is_empty() { "at the top level".to_owned() } else { format!("in {path}") };
        let mut problem = Problem::at(key.pos, format!("unknown key {:?} {place}", key.text));
        if let Some(meant) = did_you_mean(&key.text, table.iter().map(|(k, _)| *k)) {
            problem = problem.hint(format!("did you mean {meant:?}?"));
        }
        self.errors.push(problem);
    }

    pub(super) fn list<'n>(&mut self, node: &'n Node, path: &str) -> &'n [Node] {
        match &node.value {
            Value::List(items) => items,
            _ if node.is_null() => &[],
            _ => {
                self.error(node.pos, format!("{path}: expected a list, found {}", node.kind()));
                &[]
            }
        }
    }

    fn scalar<'n>(&mut self, node: &'n Node, path: &str, expected: &str) -> Option<&'n str> {
        match &node.value {
            Value::Scalar { text, .. } if !node.is_null() => Some(text),
            _ => {
                self.error(node.pos, format!("{path}: expected {expected}, found {}", node.kind()));
                None
            }
        }
    }

    /// Any scalar, as it is written.
    pub(super) fn text(&mut self, node: &Node, path: &str) -> Option<String> {
        self.scalar(node, path, "text").map(str::to_owned)
    }

    /// Text that is not empty.
    pub(super) fn word(&mut self, node: &Node, path: &str) -> Option<String> {
        let text = self.text(node, path)?;
        if text.is_empty() {
            self.error(node.pos, format!("{path}: expected text, found nothing"));
            return None;
        }
        Some(text)
    }

    /// A scalar in a small language of its own.
    pub(super) fn parsed<T>(
        &mut self,
        node: &Node,
        path: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.scalar(node, path, "a single value")?;
        match parse(text) {
            Ok(value) => Some(value),
            Err(e) => {
                self.error(node.pos, format!("{path}: {e}"));
                None
            }
        }
    }

    /// `true` or `false`.
    pub(super) fn bool(&mut self, node: &Node, path: &str) -> Option<bool> {
        self.parsed_or(node, path, "true or false", |text| match text {
            "true" | "True" | "TRUE" => Some(true),
            "false" | "False" | "FALSE" => Some(false),
            _ => None,
        })
    }

    /// A whole number that `T` holds.
    pub(super) fn number<T: std::str::FromStr>(&mut self, node: &Node, path: &str) -> Option<T> {
        self.parsed_or(node, path, "a whole number", |text| text.parse().ok())
    }

    /// An address of the wanted family.
    pub(super) fn address<T: std::str::FromStr>(&mut self, node: &Node, path: &str) -> Option<T> {
        self.parsed_or(node, path, "an address", |text| text.parse().ok())
    }

    fn parsed_or<T>(
        &mut self,
        node: &Node,
        path: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.scalar(node, path, expected)?;
        let value = parse(text);
        if value.is_none() {
            self.error(node.pos, format!("{path}: expected {expected}, found {}", node.kind()));
        }
        value
    }

    /// One of the given words.
    pub(super) fn one_of<T: Copy>(&mut self, node: &Node, path: &str, words: &[(&str, T)]) -> Option<T> {
        let names: Vec<&str> = words.iter().map(|(w, _)| *w).collect();
        let (last, first) = names.split_last().expect("at least one word");
        let expected = if first.is_empty() { (*last).to_owned() } else { format!("{} or {last}", first.join(", ")) };
        self.parsed_or(node, path, &expected, |text| words.iter().find(|(w, _)| *w == text).map(|(_, v)| *v))
    }

    /// A list of scalars.
    pub(super) fn words(&mut self, node: &Node, path: &str) -> Vec<(String, Pos)> {
        let items = self.list(node, path).iter().enumerate();
        items.filter_map(|(i, n)| Some((self.text(n, &format!("{path}[{i}]"))?, n.pos))).collect()
    }

    /// A list of scalars, or one alone.
    pub(super) fn word_or_words(&mut self, node: &Node, path: &str) -> Vec<(String, Pos)> {
        match &node.value {
            Value::Scalar { .. } if !node.is_null() => {
                self.text(node, path).map(|t| (t, node.pos)).into_iter().collect()
            }
            _ => self.words(node, path),
        }
    }

    /// A mapping of names to scalars, or a list of `name<separator>value`.
    pub(super) fn entries(&mut self, node: &Node, path: &str, separators: &[char]) -> Vec<Entry> {
        match &node.value {
            Value::Map(map) => {
                let mut out = Vec::new();
                for (key, value) in map {
                    let path = format!("{path}.{}", key.text);
                    let value = if value.is_null() { Some(None) } else { self.text(value, &path).map(Some) };
                    out.extend(value.map(|value| Entry { name: key.text.clone(), value, pos: key.pos }));
                }
                out
            }
            Value::List(_) => {
                let split = |(text, pos): (String, Pos)| match text.split_once(separators) {
                    Some((name, value)) => Entry { name: name.trim_end().into(), value: Some(value.into()), pos },
                    None => Entry { name: text, value: None, pos },
                };
                self.words(node, path).into_iter().map(split).collect()
            }
            Value::Scalar { .. } if node.is_null() => Vec::new(),
            Value::Scalar { .. } => {
                self.error(node.pos, format!("{path}: expected a mapping or a list, found {}", node.kind()));
                Vec::new()
            }
        }
    }
}
