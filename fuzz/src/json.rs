//! Changes of a JSON document that keep it one: other values, other keys, parts of another document.

use bolero::Driver;
use serde_json::{Map, Number, Value};

use crate::generate::Pick;

/// Levels that a nested value gets: on both sides of serde_json's limit of 128.
const NESTING: [usize; 3] = [3, 60, 200];

/// Texts that mean something to some parser.
const TEXTS: &[&str] = &[
    "",
    " ",
    "\0",
    "..",
    "/",
    "a/b",
    "-",
    "\u{feff}",
    "\u{202e}txt",
    "ß🦀",
    "0",
    "10.0.0.0/33",
    "::/0",
    "255.255.255.255/32",
];

/// Changes a document in a few places. Parts of `other` may come in.
pub fn mutate<D: Driver>(pick: &mut Pick<'_, D>, tree: &mut Value, other: &Value) {
    for _ in 0..1 + pick.below(5) {
        let count = size(tree);
        let mut at = pick.below(count);
        if let Some(place) = nth(tree, &mut at) {
            change(pick, place, other);
        }
    }
}

fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(map) => map.values().map(size).sum(),
        _ => 0,
    }
}

/// The value that a walk in order meets as number `at`.
fn nth<'v>(value: &'v mut Value, at: &mut usize) -> Option<&'v mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Array(list) => list.iter_mut().find_map(|v| nth(v, at)),
        Value::Object(map) => map.values_mut().find_map(|v| nth(v, at)),
        _ => None,
    }
}

fn change<D: Driver>(pick: &mut Pick<'_, D>, place: &mut Value, other: &Value) {
    // Half of the changes keep the kind of value, so that the document still fits its type.
    if pick.once_in(2) {
        match place {
            Value::Object(map) => return change_map(pick, map, other),
            Value::Array(list) => return change_list(pick, list),
            Value::String(text) => return change_text(pick, text),
            Value::Number(_) => return *place = number(pick),
            Value::Bool(flag) => return *flag = !*flag,
            Value::Null => {}
        }
    }
    *place = match pick.below(9) {
        0 => Value::Null,
        1 => Value::Bool(pick.once_in(2)),
        2 => number(pick),
        3 => Value::String((*pick.one_of::<&str>(TEXTS)).to_owned()),
        4 => Value::Array(Vec::new()),
        5 => Value::Object(Map::new()),
        6 => nested(pick),
        7 => Value::String("x".repeat(pick.below(4_096))),
        _ => part(pick, other),
    };
}

fn change_map<D: Driver>(pick: &mut Pick<'_, D>, map: &mut Map<String, Value>, other: &Value) {
    let keys: Vec<String> = map.keys().cloned().collect();
    match pick.below(3) {
        0 if !keys.is_empty() => drop(map.remove(pick.one_of(&keys))),
        1 if !keys.is_empty() => {
            let value = map[pick.one_of(&keys)].clone();
            let name = pick.one_of::<&str>(TEXTS);
            map.insert((*name).to_owned(), value);
        }
        _ => {
            if let Value::Object(more) = part(pick, other) {
                map.extend(more);
            }
        }
    }
}

fn change_list<D: Driver>(pick: &mut Pick<'_, D>, list: &mut Vec<Value>) {
    let at = pick.below(list.len());
    match (pick.below(4), list.get(at).cloned()) {
        (0, Some(_)) => drop(list.remove(at)),
        (1, Some(one)) => list.insert(at, one),
        // Many of the same: a list without a limit shows itself.
        (2, Some(one)) if size(&one) < 20 => list.extend(vec![one; pick.below(200)]),
        _ => list.reverse(),
    }
}

fn change_text<D: Driver>(pick: &mut Pick<'_, D>, text: &mut String) {
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let at = *pick.one_of(&starts);
    match pick.below(5) {
        0 => text.truncate(at),
        1 => text.insert_str(at, pick.one_of::<&str>(TEXTS)),
        2 => text.insert(at, char::from(pick.below(128) as u8)),
        3 => text.extend_from_within(at..),
        _ => text.insert_str(at, &pick.edge().to_string()),
    }
}

fn number<D: Driver>(pick: &mut Pick<'_, D>) -> Value {
    match pick.below(8) {
        0 => Value::from(-1),
        1 => Value::from(i64::MIN),
        2 => Number::from_f64(1e300).map_or(Value::Null, Value::Number),
        3 => Number::from_f64(0.5).map_or(Value::Null, Value::Number),
        4 => Value::from(pick.word()),
        5 | 6 => Value::from(pick.below(70)),
        _ => Value::from(pick.edge()),
    }
}

fn nested<D: Driver>(pick: &mut Pick<'_, D>) -> Value {
    let (depth, list) = (*pick.one_of(&NESTING), pick.once_in(2));
    (0..depth).fold(Value::Null, |inner, _| match list {
        true => Value::Array(vec![inner]),
        false => Value::Object(Map::from_iter([("a".to_owned(), inner)])),
    })
}

/// Some value of the other document.
fn part<D: Driver>(pick: &mut Pick<'_, D>, other: &Value) -> Value {
    let mut other = other.clone();
    let mut at = pick.below(size(&other));
    nth(&mut other, &mut at).map(|v| v.take()).unwrap_or_default()
}
