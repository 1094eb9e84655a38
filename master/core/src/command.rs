//! What can be asked of the core, by users and by agents, and what it answers.
//!
//! Parsed and typed at the edge of the shell: a command holds values, never wire messages.

use skein_api::{
    ApiError, ContainerCreate, NetworkSpec, NodeDescription, NodeId, NodeUpdate, Origin, StackApply, StackPlan, TaskId,
    TaskReport, TokenCreate, TokenId, UnixMillis,
};

use crate::model::Cluster;

/// Time as the shell reads it: the wall clock for what people see, a monotonic clock for what is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Wall clock.
    pub wall: UnixMillis,
    /// Monotonic clock, milliseconds since some fixed point.
    pub mono_ms: u64,
}

/// What surrounds a command.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// When.
    pub now: Now,
    /// Who asks, and why.
    pub origin: Origin,
    /// Randomness for new ids.
    pub seed: u64,
}

/// A request to change the desired or observed state.
#[derive(Clone, Debug)]
pub enum Command {
    /// First start: make the cluster.
    InitCluster(Box<Cluster>),
    /// A host wants to become a node.
    Join {
        /// Public part of the token.
        token: TokenId,
        /// SHA-256 of its secret part, hex.
        secret_sha256: String,
        /// SHA-256 of the host's public key, hex.
        key_digest: String,
        /// The host.
        description: Box<NodeDescription>,
        /// The host's clock.
        clock: UnixMillis,
    },
    /// An agent says what its host is.
    Describe {
        /// The node.
        node: NodeId,
        /// The host.
        description: Box<NodeDescription>,
    },
    /// Labels and availability.
    NodeUpdate {
        /// Name, id or prefix.
        node: String,
        /// What changes.
        update: NodeUpdate,
    },
    /// Remove a node for good.
    NodeRemove {
        /// Name, id or prefix.
        node: String,
        /// Also when it is ready.
        force: bool,
    },
    /// A new join token; the shell made the secret.
    TokenCreate {
        /// Its public part.
        id: TokenId,
        /// SHA-256 of its secret part, hex.
        secret_sha256: String,
        /// Lifetime and uses.
        request: TokenCreate,
    },
    /// End a token.
    TokenRevoke(TokenId),
    /// A new network.
    NetworkCreate(NetworkSpec),
    /// Remove a network that nothing uses.
    NetworkRemove(String),
    /// Make a stack so.
    StackApply(Box<StackApply>),
    /// Remove a stack.
    StackRemove {
        /// Its name.
        name: String,
        /// Forget its volumes too.
        volumes: bool,
        /// Only plan.
        dry_run: bool,
    },
    /// Remove a service.
    ServiceRemove(String),
    /// A container task.
    ContainerCreate(Box<ContainerCreate>),
    /// Stop a container task.
    ContainerStop(String),
    /// Start a stopped container task.
    ContainerStart(String),
    /// Remove a container task.
    ContainerRemove {
        /// Name, id or prefix.
        task: String,
        /// Also when it runs.
        force: bool,
    },
    /// An agent says how its tasks are.
    Reports {
        /// The node.
        node: NodeId,
        /// What it saw.
        reports: Vec<TaskReport>,
    },
}

/// What a command gives back.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Nothing more to say.
    Done,
    /// The node of a join.
    Node(NodeId),
    /// A new network's id.
    Network(skein_api::NetworkId),
    /// A container task.
    Task(TaskId),
    /// What a stack's change does.
    Plan(StackPlan),
}

/// The outcome of a decision: refused with nothing changed, or what changes and what to answer.
pub type Decision = Result<(Vec<crate::model::Change>, Reply), ApiError>;
