//! Tokens, cluster-wide information, events and explanations.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{ApiError, Meta, Resources, TaskSpec, TokenId, UnixMillis};

/// A join token as the cluster keeps it; the secret is stored as a hash only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Token {
    /// Identity: the public part of the token.
    pub id: TokenId,
    /// Common fields.
    pub meta: Meta,
    /// SHA-256 of the secret, hex. Empty where it is shown to users.
    pub secret_sha256: String,
    /// No joins after this.
    pub expires_at: UnixMillis,
    /// How many hosts may join with it.
    pub uses_max: u32,
    /// How many have.
    pub uses: u32,
    /// Labels that nodes get when they join with it.
    pub node_labels: BTreeMap<String, String>,
}

/// A request for a join token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenCreate {
    /// Lifetime, seconds; 1 to 31,536,000 (a year).
    pub ttl_s: u64,
    /// How many hosts may join with it, at least 1.
    pub uses: u32,
    /// Labels that nodes get when they join with it.
    pub node_labels: BTreeMap<String, String>,
}

impl Default for TokenCreate {
    fn default() -> Self {
        Self { ttl_s: 3_600, uses: 1, node_labels: BTreeMap::new() }
    }
}

/// A new token: the only time that its secret is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenCreated {
    /// The whole token, for `skein-agent join`.
    pub token: String,
    /// What is kept of it.
    pub info: Token,
}

/// A request to run a container task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerCreate {
    /// Name; empty lets the master choose.
    pub name: String,
    /// What to run.
    pub spec: TaskSpec,
}

/// What a master says of itself and its cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterInfo {
    /// Identity of the cluster.
    pub id: String,
    /// Version of the master.
    pub version: String,
    /// SHA-256 of the CA certificate (DER), hex.
    pub ca_sha256: String,
    /// Position of the store.
    pub revision: u64,
    /// This master's term of office.
    pub epoch: u64,
    /// Nodes by state.
    pub nodes: BTreeMap<String, u64>,
    /// Tasks by state.
    pub tasks: BTreeMap<String, u64>,
    /// What all ready nodes offer.
    pub offered: Resources,
    /// What of it is reserved.
    pub reserved: Resources,
    /// Set while the store refuses writes.
    pub read_only: Option<String>,
}

/// A change, as `GET /v1/events` streams it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Position of the store.
    pub revision: u64,
    /// `node`, `service`, `task`, `network`, `volume`, `token`.
    pub kind: String,
    /// Id of the object.
    pub id: String,
    /// The object now; none: it is gone.
    pub object: Option<serde_json::Value>,
}

/// Why a task is where it is, or why it is nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Explanation {
    /// Name of the task or service.
    pub subject: String,
    /// One sentence.
    pub summary: String,
    /// Nodes looked at.
    pub nodes: u32,
    /// How many each filter took away, in order.
    pub filters: Vec<FilterCount>,
    /// Nodes that are left.
    pub fitting: u32,
    /// When no node fits: what to change so that one does, the smallest change first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub suggestions: Vec<String>,
    /// When no node fits and the service may preempt: the room that it makes, or why it can make none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preemption: Option<Preemption>,
    /// When asked for: each node with every reason against it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub per_node: Vec<NodeExplanation>,
}

/// Room for a task, made by stopping tasks that count less.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Preemption {
    /// One sentence: what is done, what would be, or why nothing helps.
    pub message: String,
    /// Name of the node; none: no room can be made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Names of the tasks that are stopped there; none when what is going already is enough.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub victims: Vec<String>,
}

/// Why one node does not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeExplanation {
    /// Its name.
    pub node: String,
    /// Every filter that it does not pass, with figures; none when it fits.
    pub reasons: Vec<String>,
}

/// Which nodes an explanation shall tell of one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExplainQuery {
    /// All of them.
    pub nodes: bool,
    /// This one; by name, id or prefix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// How many nodes one filter took away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FilterCount {
    /// The filter, with its expression: `constraint node.labels.disk==ssd`.
    pub filter: String,
    /// Nodes that passed all filters before and not this one.
    pub rejected: u32,
    /// Nodes that would not pass this filter alone.
    pub rejected_alone: u32,
}

/// Request for a client certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CertRequest {
    /// Name of the user.
    pub name: String,
    /// Lifetime, seconds.
    pub ttl_s: u64,
}

/// A client certificate with its key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CertBundle {
    /// PEM.
    pub certificate_pem: String,
    /// PEM.
    pub key_pem: String,
    /// PEM.
    pub ca_pem: String,
}

/// Name in a master's certificate, which clients verify whatever address they dialled.
pub const MASTER_NAME: &str = "skein-master";

/// A join token, taken apart: `SKEIN-1-<SHA-256 of the CA, 64 hex>-<id, 12 hex>-<secret, 32 hex>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the CA certificate (DER), hex: the joining host trusts this CA and no other.
    pub ca_sha256: String,
    /// Public part.
    pub id: String,
    /// Secret part.
    pub secret: String,
}

impl JoinToken {
    /// Reads a token's text.
    ///
    /// # Errors
    /// `token_malformed`.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let hex = |part: &str, length: usize| part.len() == length && part.bytes().all(|b| b.is_ascii_hexdigit());
        let parts: Vec<&str> = text.trim().split('-').collect();
        match parts[..] {
            ["SKEIN", "1", ca, id, secret] if hex(ca, 64) && hex(id, 12) && hex(secret, 32) => {
                Ok(Self { ca_sha256: ca.to_owned(), id: id.to_owned(), secret: secret.to_owned() })
            }
            _ => Err(ApiError::new("token_malformed", "this is not a join token: SKEIN-1-<64 hex>-<12 hex>-<32 hex>")
                .with_hint("copy the whole line that skein token create printed")),
        }
    }
}
