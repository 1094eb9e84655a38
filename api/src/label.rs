//! Limits of labels: what master, agents and clients agree on before a label goes anywhere.

use std::collections::BTreeMap;

/// Longest key of a label, bytes.
pub const LABEL_KEY_BYTES_MAX: usize = 128;

/// Longest value of a node's or an engine's label, bytes: with its key it fits in one expression of 1,024 characters.
pub const NODE_LABEL_VALUE_BYTES_MAX: usize = 512;

/// Longest value of a label of a container, a service or a network, bytes.
pub const LABEL_VALUE_BYTES_MAX: usize = 16 * 1_024;

/// Most labels of one object.
pub const LABELS_MAX: usize = 256;

/// Label of an engine or a node that limits how many tasks hold a place there (Docker Swarm's name); a whole number.
pub const SLOTS_LABEL: &str = "containerslots";

/// What a key that expressions can name is made of, in words.
pub const LABEL_KEY_EXPECTED: &str = "letters, digits and `.` `_` `-` `/`, at most 128";

/// Whether expressions can name this key: of a node's label, of a kind of generic resource.
pub fn is_label_key(key: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/');
    (1..=LABEL_KEY_BYTES_MAX).contains(&key.len()) && key.chars().all(allowed)
}

/// Checks one label of a node.
///
/// # Errors
/// What is wrong with it, in words.
pub fn check_node_label(key: &str, value: &str) -> Result<(), String> {
    if !is_label_key(key) {
        return Err(format!("label key {key:?} is not valid: expected {LABEL_KEY_EXPECTED}"));
    }
    if value.len() > NODE_LABEL_VALUE_BYTES_MAX {
        let bytes = value.len();
        return Err(format!(
            "value of label {key} has {bytes} bytes, at most {NODE_LABEL_VALUE_BYTES_MAX} are possible"
        ));
    }
    if value.contains(char::is_control) {
        return Err(format!("value of label {key} has control characters"));
    }
    if key == SLOTS_LABEL && value.parse::<u64>().is_err() {
        return Err(format!("label {key} is a number of tasks, found {value:?}"));
    }
    Ok(())
}

/// Checks the labels of a container, a service or a network: any key of visible characters but `=`, any value.
///
/// # Errors
/// What is wrong with the first that is, in words.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    if labels.len() > LABELS_MAX {
        return Err(format!("{} labels, at most {LABELS_MAX} are possible", labels.len()));
    }
    for (key, value) in labels {
        let wrong = |c: char| c == '=' || c.is_whitespace() || c.is_control();
        if !(1..=LABEL_KEY_BYTES_MAX).contains(&key.len()) || key.contains(wrong) {
            let expected = "at most 128 bytes without `=`, blanks and control characters";
            return Err(format!("label key {key:?} is not valid: expected {expected}"));
        }
        if value.len() > LABEL_VALUE_BYTES_MAX {
            let bytes = value.len();
            return Err(format!(
                "value of label {key} has {bytes} bytes, at most {LABEL_VALUE_BYTES_MAX} are possible"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_nodes_can_be_named_in_expressions() {
        let check = |key: &str, value: &str, expected: &str| {
            let got = check_node_label(key, value).err().unwrap_or_default();
            assert!(got.contains(expected) && got.is_empty() == expected.is_empty(), "{got}");
        };
        check("com.example/disk-type_2", "", "");
        check("a", &"x".repeat(512), "");
        check(&"k".repeat(128), "é", "");
        check("", "x", "label key \"\" is not valid");
        check("a b", "x", "expected letters, digits");
        check("größe", "x", "is not valid");
        check(&"k".repeat(129), "x", "at most 128");
        check("a", &"x".repeat(513), "value of label a has 513 bytes, at most 512");
        check("a", "x\ny", "control characters");
        check("containerslots", "20", "");
        check("containerslots", "-1", "label containerslots is a number of tasks, found \"-1\"");
    }

    #[test]
    fn labels_of_objects_are_bounded() {
        let check = |key: &str, value: &str, expected: &str| {
            let got = check_labels(&BTreeMap::from([(key.to_owned(), value.to_owned())])).err().unwrap_or_default();
            assert!(got.contains(expected) && got.is_empty() == expected.is_empty(), "{got}");
        };
        check("traefik.http.routers[0]", "Host(`a`)\n", "");
        check("a=b", "", "without `=`");
        check("", "", "is not valid");
        check("a", &"x".repeat(16_385), "16385 bytes, at most 16384");
        let many = (0..257).map(|n| (format!("k{n}"), String::new())).collect();
        assert_eq!(check_labels(&many), Err("257 labels, at most 256 are possible".to_owned()));
    }
}
