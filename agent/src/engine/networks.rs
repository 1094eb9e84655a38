//! The engine's networks that stand for overlay networks.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use agent_core::EngineNetwork;
use bollard::{
    models::{EndpointIpamConfig, EndpointSettings, Ipam, IpamConfig, NetworkConnectRequest, NetworkCreateRequest},
    query_parameters::ListNetworksOptionsBuilder,
};
use ipnet::IpNet;
use skein_api::{NetworkAssignment, NetworkId, TaskAddress, TaskId};

use super::{Engine, EngineError, labels};

/// Name of our network driver and IPAM driver.
pub(super) const DRIVER: &str = "skein";

/// An engine network to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineNetworkSpec {
    /// Its name: that of the overlay network.
    pub name: String,
    /// The overlay network.
    pub network: NetworkId,
    /// Network driver.
    pub driver: String,
    /// IPAM driver.
    pub ipam_driver: String,
    /// Options for both drivers.
    pub options: BTreeMap<String, String>,
    /// Subnets with their gateways.
    pub subnets: Vec<(IpNet, IpAddr)>,
    /// Plain `docker run --network` may use it.
    pub attachable: bool,
}

impl EngineNetworkSpec {
    /// The form that our own driver expects. `internal` is an option for the driver and not the engine's flag: with
    /// the flag the engine would add rules of its own, which nothing of ours may depend on.
    pub fn overlay(network: &NetworkAssignment) -> Self {
        Self {
            name: network.name.clone(),
            network: network.id.clone(),
            driver: DRIVER.into(),
            ipam_driver: DRIVER.into(),
            options: BTreeMap::from([
                (labels::NETWORK.to_owned(), network.id.to_string()),
                (labels::INTERNAL.to_owned(), network.internal.to_string()),
            ]),
            subnets: vec![
                (network.subnet4.into(), network.gateway4.into()),
                (network.subnet6.into(), network.gateway6.into()),
            ],
            attachable: network.attachable,
        }
    }

    fn request(&self, cluster: &str, node: &str) -> NetworkCreateRequest {
        let options: HashMap<String, String> = self.options.clone().into_iter().collect();
        NetworkCreateRequest {
            name: self.name.clone(),
            driver: Some(self.driver.clone()),
            attachable: Some(self.attachable),
            enable_ipv6: Some(self.subnets.iter().any(|(subnet, _)| matches!(subnet, IpNet::V6(_)))),
            ipam: Some(Ipam {
                driver: Some(self.ipam_driver.clone()),
                config: Some(
                    self.subnets
                        .iter()
                        .map(|(subnet, gateway)| IpamConfig {
                            subnet: Some(subnet.to_string()),
                            gateway: Some(gateway.to_string()),
                            ..Default::default()
                        })
                        .collect(),
                ),
                options: Some(options.clone()),
            }),
            options: Some(options),
            labels: Some(HashMap::from([
                (labels::CLUSTER.to_owned(), cluster.to_owned()),
                (labels::NODE.to_owned(), node.to_owned()),
                (labels::NETWORK.to_owned(), self.network.to_string()),
            ])),
            ..Default::default()
        }
    }
}

/// How a task's container is attached to a network: with its reserved addresses, and naming the task to the driver.
/// No aliases: the engine's DNS must know no name of ours.
pub(super) fn endpoint(task: &TaskId, address: Option<&TaskAddress>) -> EndpointSettings {
    EndpointSettings {
        ipam_config: address.filter(|a| a.v4.is_some() || a.v6.is_some()).map(|a| EndpointIpamConfig {
            ipv4_address: a.v4.map(|ip| ip.to_string()),
            ipv6_address: a.v6.map(|ip| ip.to_string()),
            ..Default::default()
        }),
        driver_opts: Some(HashMap::from([(labels::TASK.to_owned(), task.to_string())])),
        ..Default::default()
    }
}

impl Engine {
    /// Our networks by the cluster's id.
    pub async fn networks(&self) -> Result<BTreeMap<NetworkId, EngineNetwork>, EngineError> {
        let filter = format!("{}={}", labels::CLUSTER, self.config().cluster);
        let options = ListNetworksOptionsBuilder::default().filters(&HashMap::from([("label", vec![filter])])).build();
        let client = self.client().await?;
        let found = client.list_networks(Some(options)).await.map_err(|e| self.failed("list", "networks", e))?;
        Ok(found
            .into_iter()
            .filter_map(|n| {
                let id = n.labels?.remove(labels::NETWORK)?;
                Some((NetworkId::new(id), EngineNetwork { engine_id: n.id?, name: n.name? }))
            })
            .collect())
    }

    /// Makes the network unless it is there. A network of that name that is not ours is an error: it is never touched.
    pub async fn ensure_network(&self, spec: &EngineNetworkSpec) -> Result<(), EngineError> {
        if self.networks().await?.contains_key(&spec.network) {
            return Ok(());
        }
        let client = self.client().await?;
        // The engine's own check of names is best effort in old versions; two networks of one name would make every
        // later reference ambiguous.
        let named =
            ListNetworksOptionsBuilder::default().filters(&HashMap::from([("name", vec![spec.name.as_str()])])).build();
        let named = client.list_networks(Some(named)).await.map_err(|e| self.failed("list", "networks", e))?;
        if named.iter().any(|n| n.name.as_deref() == Some(&spec.name)) {
            return Err(EngineError::Conflict {
                verb: "create",
                thing: format!("engine network {}", spec.name),
                message:
                    "the engine has a network of that name that does not belong to this cluster; rename or remove it"
                        .into(),
            });
        }
        let request = spec.request(&self.config().cluster, &self.config().node);
        let made = client.create_network(request).await;
        made.map_err(|e| self.failed("create", &format!("engine network {}", spec.name), e))?;
        Ok(())
    }

    /// Removes a network by the engine's id; one that is gone is no error.
    pub async fn remove_network(&self, engine_id: &str) -> Result<(), EngineError> {
        let client = self.client().await?;
        match client.remove_network(engine_id).await {
            Ok(()) => Ok(()),
            Err(error) => match self.failed("remove", &format!("engine network {engine_id}"), error) {
                error if error.is_not_found() => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Attaches a container that does not run yet to one more network.
    pub async fn connect(
        &self,
        container: &str,
        network: &EngineNetwork,
        task: &TaskId,
        address: Option<&TaskAddress>,
    ) -> Result<(), EngineError> {
        let request =
            NetworkConnectRequest { container: container.to_owned(), endpoint_config: Some(endpoint(task, address)) };
        let client = self.client().await?;
        let thing = format!("container {container} to network {}", network.name);
        client.connect_network(&network.engine_id, request).await.map_err(|e| self.failed("attach", &thing, e))
    }
}
