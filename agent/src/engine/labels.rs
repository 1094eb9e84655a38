//! The labels by which we know what is ours. Only what carries [`CLUSTER`] with our cluster's id is ever touched.

/// Id of the cluster.
pub const CLUSTER: &str = "io.skein.cluster";
/// Id of the node.
pub const NODE: &str = "io.skein.node";
/// Id of the task.
pub const TASK: &str = "io.skein.task";
/// Name of the task in the cluster.
pub const TASK_NAME: &str = "io.skein.task.name";
/// Id of the service.
pub const SERVICE: &str = "io.skein.service";
/// Name of the service.
pub const SERVICE_NAME: &str = "io.skein.service.name";
/// Place within the service.
pub const SLOT: &str = "io.skein.slot";
/// Stack.
pub const STACK: &str = "io.skein.stack";
/// The run for which the container was made; later runs of a container task keep the container.
pub const RUN: &str = "io.skein.run";
/// Time between stop signal and SIGKILL, milliseconds: for when no assignment says it any more.
pub const STOP_GRACE_MS: &str = "io.skein.stop-grace-ms";
/// Ids of the overlay networks, comma-separated.
pub const NETWORKS: &str = "io.skein.networks";
/// Image reference as the user wrote it.
pub const IMAGE: &str = "io.skein.image";
/// Of an engine network: id of the overlay network. Also the option by which the driver learns it.
pub const NETWORK: &str = "io.skein.network";
/// Option of an engine network for the driver: `true` when nothing may leave or enter it.
pub const INTERNAL: &str = "io.skein.internal";
/// All labels of ours begin so; a user's label that does is left out.
pub const PREFIX: &str = "io.skein.";
