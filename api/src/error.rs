//! The one shape in which a user sees a failure.

use serde::{Deserialize, Serialize};

/// A failure as the API returns it: what failed and why in `message`, a stable code, and a hint that can be acted on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(default)]
#[error("{message}")]
pub struct ApiError {
    /// Stable, for programs: `not_found`, `name_taken`, `no_node_fits`, `token_expired`, …
    pub code: String,
    /// What failed, where and why.
    pub message: String,
    /// A command that can be run, or what to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without a hint.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), hint: None }
    }
    /// The same with a hint.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
