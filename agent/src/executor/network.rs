//! What the executor needs of the network side, in its own words.

use std::{collections::BTreeSet, future::Future, net::IpAddr};

use skein_api::{NetworkId, PortPublish, Protocol, TaskAddress, TaskAssignment, TaskId};

use crate::engine::EngineNetworkSpec;

/// The network side of the agent. Its calls may be cancelled and repeated at any point.
pub trait NetworkSide: Send + Sync + 'static {
    /// What the engine is to be told about a network; none: the network side has not set it up yet.
    fn engine_network(&self, network: &NetworkId) -> impl Future<Output = Option<EngineNetworkSpec>> + Send;

    /// The task's addresses in a network. Sticky: until [`NetworkSide::release`] the answer is the same. They are on
    /// disk when this returns.
    fn reserve(
        &self,
        task: &TaskAssignment,
        network: &NetworkId,
    ) -> impl Future<Output = Result<TaskAddress, String>> + Send;

    /// Gives all addresses of a task back; one that has none is no error.
    fn release(&self, task: &TaskId) -> impl Future<Output = ()> + Send;

    /// The ports of a task in networks of this side, with a free port of the host for each that was left open; none of
    /// `avoid` is chosen. They are held until the task's container publishes them or until [`NetworkSide::release`].
    /// None: the engine publishes them by itself, so nobody holds them.
    fn choose_ports(
        &self,
        _task: &TaskAssignment,
        _avoid: &BTreeSet<(Protocol, u16)>,
    ) -> impl Future<Output = Result<Option<Vec<PortPublish>>, String>> + Send {
        async { Ok(None) }
    }

    /// Resolvers for a container in these networks, in order.
    fn dns_servers(&self, networks: &[NetworkId]) -> Vec<IpAddr>;

    /// Returns when the task can be reached everywhere (peers have its blocks, DNS has its name) or when waiting longer
    /// makes no sense; the error then names who is late, and the container is started all the same.
    fn ready(&self, task: &TaskId) -> impl Future<Output = Result<(), String>> + Send;
}
