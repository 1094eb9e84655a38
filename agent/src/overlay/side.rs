//! The overlay as the executor wants it.
//!
//! Owns: the translation between the two. Must not know: more than both. No tasks, no channels of its own.

use std::net::IpAddr;

use skein_api::{NetworkId, TaskAddress, TaskAssignment, TaskId};

use super::{ANNOUNCED_TIMEOUT, OverlayHandle};
use crate::{engine::EngineNetworkSpec, executor::NetworkSide};

impl NetworkSide for OverlayHandle {
    async fn engine_network(&self, network: &NetworkId) -> Option<EngineNetworkSpec> {
        self.network(network).map(|n| EngineNetworkSpec::overlay(&n))
    }

    async fn reserve(&self, task: &TaskAssignment, network: &NetworkId) -> Result<TaskAddress, String> {
        Self::reserve(self, &task.id, network).await.map_err(|e| skein_daemon::chain(&e))
    }

    async fn release(&self, task: &TaskId) {
        if let Err(error) = Self::release(self, task).await {
            tracing::warn!(%task, %error, "failed to release a task's addresses");
        }
    }

    fn dns_servers(&self, networks: &[NetworkId]) -> Vec<IpAddr> {
        Self::dns_servers(self, networks)
    }

    async fn ready(&self, task: &TaskId) -> Result<(), String> {
        self.announced(task).await.map_err(|missing| {
            let names: Vec<String> =
                missing.iter().map(|id| self.network(id).map_or_else(|| id.to_string(), |n| n.name)).collect();
            let seconds = ANNOUNCED_TIMEOUT.as_secs();
            format!("the master has not announced task {task} in network {} within {seconds} s", names.join(", "))
        })
    }
}
