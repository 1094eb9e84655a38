//! Laying one compose file over another (Compose specification, "Merge").
//!
//! Mappings are merged key by key; `command`, `entrypoint` and `healthcheck.test` are replaced; other lists are appended
//! to, where an entry about the same thing (variable, label, mount target) replaces the earlier one; all else is
//! replaced. A section that is a mapping in one file and a list in the other becomes a mapping. Pure, on trees.

use super::yaml::{Key, Node, Value};

/// Lists that a later file replaces as a whole.
const REPLACED: &[&str] = &["command", "entrypoint", "test"];

/// Sections that may be lists of `name=value`.
const ENTRIES: &[&str] = &["environment", "labels", "extra_hosts", "annotations", "sysctls"];

/// Sections that may be lists of names.
const NAMES: &[&str] = &["networks", "depends_on"];

/// Lays `over` over `base`.
pub(super) fn merge(base: &mut Node, over: Node) {
    merge_at(base, over, "");
}

fn merge_at(base: &mut Node, mut over: Node, key: &str) {
    let mixed = matches!((&base.value, &over.value), (Value::Map(_), Value::List(_)) | (Value::List(_), Value::Map(_)));
    let entries = ENTRIES.contains(&key);
    if entries || (mixed && NAMES.contains(&key)) {
        to_map(base, entries);
        to_map(&mut over, entries);
    }
    match (&mut base.value, over.value) {
        (Value::Map(to), Value::Map(from)) => {
            for (key, value) in from {
                match to.iter_mut().find(|(k, _)| k.text == key.text) {
                    Some((known, node)) => {
                        merge_at(node, value, &key.text);
                        known.pos = key.pos;
                    }
                    None => to.push((key, value)),
                }
            }
        }
        (Value::List(to), Value::List(from)) if !REPLACED.contains(&key) => {
            for item in from {
                let same = |old: &Node| old.value == item.value || (key == "volumes" && same_target(old, &item));
                match to.iter().position(same) {
                    Some(i) => to[i] = item,
                    None => to.push(item),
                }
            }
        }
        (Value::Map(_) | Value::List(_), Value::Scalar { text, quoted: false }) if text.is_empty() => {}
        (to, from) => {
            *to = from;
            base.pos = over.pos;
        }
    }
}

/// A list of `name=value` (or of names) as the mapping that says the same.
fn to_map(node: &mut Node, split: bool) {
    let Value::List(items) = &node.value else { return };
    let mut map: Vec<(Key, Node)> = Vec::new();
    for item in items {
        // Something else than text in such a list is an error that the reader of the list reports best.
        let Value::Scalar { text, .. } = &item.value else { return };
        let (name, value) = match text.split_once('=').filter(|_| split) {
            Some((name, value)) => (name, Value::Scalar { text: value.into(), quoted: true }),
            None => (text.as_str(), Value::Scalar { text: String::new(), quoted: false }),
        };
        map.retain(|(k, _)| k.text != name);
        map.push((Key { pos: item.pos, text: name.into() }, Node { pos: item.pos, value }));
    }
    node.value = Value::Map(map);
}

fn same_target(a: &Node, b: &Node) -> bool {
    match (target(a), target(b)) {
        (Some(a), Some(b)) => a == b,
        _ => false,
    }
}

fn target(node: &Node) -> Option<&str> {
    let text = |node: &'_ Node| matches!(node.value, Value::Scalar { .. });
    match &node.value {
        Value::Scalar { text, .. } => text.split(':').nth(1).or(Some(text)),
        Value::Map(_) => match &node.get("target").filter(|n| text(n))?.value {
            Value::Scalar { text, .. } => Some(text),
            _ => None,
        },
        Value::List(_) => None,
    }
}
