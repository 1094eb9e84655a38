//! The overlay as the executor wants it.
//!
//! Owns: the translation between the two. Must not know: more than both. No tasks, no channels of its own.

use std::{collections::BTreeSet, net::IpAddr};

use skein_api::{NetworkId, PortPublish, Protocol, TaskAddress, TaskAssignment, TaskId};

use super::{ANNOUNCED_TIMEOUT, OverlayHandle, desired::proto};
use crate::{engine::EngineNetworkSpec, executor::NetworkSide, plugin::wire::PortBinding};

fn binding(port: &PortPublish) -> PortBinding {
    PortBinding {
        proto: proto(port.protocol),
        host_ip: port.host_ip,
        host_port: port.host_port,
        host_port_end: port.host_port,
        port: port.container_port,
    }
}

impl NetworkSide for OverlayHandle {
    async fn engine_network(&self, network: &NetworkId) -> Option<EngineNetworkSpec> {
        self.network(network).map(|n| EngineNetworkSpec::overlay(&n))
    }

    async fn reserve(&self, task: &TaskAssignment, network: &NetworkId) -> Result<TaskAddress, String> {
        let asked = task.spec.static_address(network);
        Self::reserve(self, &task.id, network, asked).await.map_err(|e| skein_daemon::chain(&e))
    }

    async fn release(&self, task: &TaskId) {
        if let Err(error) = Self::release(self, task).await {
            tracing::warn!(%task, %error, "failed to release a task's addresses");
        }
    }

    async fn choose_ports(
        &self,
        task: &TaskAssignment,
        avoid: &BTreeSet<(Protocol, u16)>,
    ) -> Result<Option<Vec<PortPublish>>, String> {
        let wanted = &task.spec.ports;
        let avoid = avoid.iter().map(|(protocol, port)| (proto(*protocol), *port)).collect();
        let chosen = Self::choose_ports(self, &task.id, wanted.iter().map(binding).collect(), avoid).await;
        let chosen = chosen.map_err(|e| skein_daemon::chain(&e))?;
        let filled = wanted.iter().zip(chosen).map(|(w, c)| PortPublish { host_port: c.host_port, ..*w });
        Ok(Some(filled.collect()))
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
