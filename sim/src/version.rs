//! Releases side by side: what a later one writes and says has fields that an earlier one does not know.
//!
//! A world begins with the release before this one everywhere; faults upgrade master and hosts, in any order. A master
//! refuses an agent that speaks a later version than it does (`master/src/agents.rs`), and is then upgraded too.

use std::collections::BTreeMap;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use skein_api::{Assignment, NodeId};

/// The release that a world begins with, and the last one: N-1 and N+1.
pub(crate) const FIRST: u32 = 1;
/// See [`FIRST`].
pub(crate) const LAST: u32 = 3;

/// Structures of the documents that a later release may extend; what is not there is left out.
const EXTENDED: [&[&str]; 5] = [&[], &["spec"], &["spec", "container"], &["status"], &["description"]];

/// A JSON document with fields that this release does not know.
pub(crate) fn with_unknown_fields(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut document: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    for path in EXTENDED {
        let place = path.iter().try_fold(&mut document, |at, name| at.get_mut(*name));
        if let Some(Value::Object(object)) = place {
            object.insert("of_a_later_release".to_owned(), serde_json::json!({ "list": [1, "two", null] }));
        }
    }
    serde_json::to_vec(&document).map_err(|e| e.to_string())
}

/// What an earlier release reads of a document that a later one sent.
///
/// # Errors
/// It cannot be read.
pub(crate) fn as_read<T: Serialize + DeserializeOwned>(sent: &T) -> Result<T, String> {
    let bytes = serde_json::to_vec(sent).map_err(|e| e.to_string())?;
    serde_json::from_slice(&with_unknown_fields(&bytes)?).map_err(|e| format!("a later release's document: {e}"))
}

/// Documents that an earlier release reads as they are, by host and key: what is told again, and what every host of a
/// network is told, is read once.
#[derive(Debug, Default)]
pub(crate) struct Readings {
    known: BTreeMap<String, Assignment>,
}

impl Readings {
    /// As [`as_read`].
    pub(crate) fn read(&mut self, node: &NodeId, sent: Assignment) -> Result<Assignment, String> {
        let key = match &sent {
            // Each host has its own words for it.
            Assignment::Network(_) => format!("{node} {}", sent.key()),
            _ => sent.key(),
        };
        if self.known.get(&key) == Some(&sent) {
            return Ok(sent);
        }
        let read = as_read(&sent)?;
        if read != sent {
            return Ok(read);
        }
        self.known.insert(key, sent.clone());
        Ok(sent)
    }
}
