//! Carries single actions out. No state but the choice of ports; every action may be cancelled and repeated.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use agent_core::{Action, ActionError, EngineNetwork, Outcome};
use skein_api::{Namespaces, NetworkId, PortPublish, Protocol, TaskAddress, TaskAssignment, TaskId};
use tokio::sync::mpsc;

use super::{
    network::NetworkSide,
    ports::{self, PortChooser},
};
use crate::engine::{Engine, EngineError, Pulled, create::CreateInput};

/// Longest wait for one answer of the network side. Its own deadline for a task to be reachable everywhere is shorter;
/// this one is for when it hangs.
pub(super) const NETWORK_TIMEOUT: Duration = Duration::from_secs(60);

/// What actions work with.
pub(super) struct Tools<N> {
    pub(super) engine: Engine,
    pub(super) network: Arc<N>,
    pub(super) ports: PortChooser,
    pub(super) progress_tx: mpsc::Sender<(TaskId, String)>,
}

/// What an action sees of desired and observed state, taken when it begins.
pub(super) struct Sight {
    pub(super) assignment: Option<TaskAssignment>,
    pub(super) networks: BTreeMap<NetworkId, EngineNetwork>,
    /// Containers of `volumes_from`, by the engine's id.
    pub(super) volumes_from: Vec<(String, bool)>,
    /// Containers whose namespaces are shared, by the engine's id.
    pub(super) share: Namespaces<String>,
    /// Host ports of all our containers.
    pub(super) used_ports: BTreeSet<(Protocol, u16)>,
}

fn refused(error: &EngineError) -> ActionError {
    ActionError { message: error.to_string(), fatal: error.is_fatal() }
}

fn later(message: impl Into<String>) -> ActionError {
    ActionError { message: message.into(), fatal: false }
}

impl<N: NetworkSide> Tools<N> {
    /// Does it once. The engine's id of a container that was made comes with the outcome.
    pub(super) async fn execute(
        &self,
        action: &Action,
        sight: Sight,
    ) -> (Result<Outcome, ActionError>, Option<String>) {
        let done = |result: Result<(), EngineError>| match result {
            Ok(()) => Ok(Outcome::default()),
            // Only making and starting a container can fail for good.
            Err(error) => Err(ActionError { fatal: false, ..refused(&error) }),
        };
        let result = match action {
            Action::CreateContainer { .. } => {
                return match self.create(sight).await {
                    Ok((outcome, container)) => (Ok(outcome), Some(container)),
                    Err(error) => (Err(error), None),
                };
            }
            Action::StartContainer { container, .. } => self.start(container, sight).await,
            Action::StopContainer { container, grace_ms, .. } => {
                done(self.engine.stop(container, Duration::from_millis(*grace_ms)).await)
            }
            Action::RemoveContainer { container, .. } => done(self.engine.remove(container).await),
            Action::ReleaseTask { task } => {
                let released = tokio::time::timeout(NETWORK_TIMEOUT, self.network.release(task)).await;
                released
                    .map(|()| Outcome::default())
                    .map_err(|_| later("failed to release addresses: no answer in time"))
            }
            Action::EnsureEngineNetwork { network } => {
                match tokio::time::timeout(NETWORK_TIMEOUT, self.network.engine_network(network)).await {
                    Ok(Some(spec)) => done(self.engine.ensure_network(&spec).await),
                    Ok(None) => Err(later(format!("the overlay has not set up network {} yet", network.short()))),
                    Err(_) => Err(later(format!("failed to set up network {}: no answer in time", network.short()))),
                }
            }
            Action::RemoveEngineNetwork { engine_id, .. } => done(self.engine.remove_network(engine_id).await),
            Action::RemoveImage { image } => match self.engine.remove_image(image).await {
                Ok(()) => {
                    tracing::info!(image, "unused image removed");
                    Ok(Outcome::default())
                }
                Err(error) => {
                    let fatal = matches!(error, EngineError::Conflict { .. });
                    Err(ActionError { message: error.to_string(), fatal })
                }
            },
        };
        (result, None)
    }

    async fn create(&self, sight: Sight) -> Result<(Outcome, String), ActionError> {
        let Some(assignment) = sight.assignment else { return Err(later("the task is not assigned any more")) };
        let image = assignment.spec.container.image.clone();
        let progress = |words| {
            // A full channel means that the loop is behind; the next words will do.
            let _ = self.progress_tx.try_send((assignment.id.clone(), words));
        };
        let pulled = self.engine.ensure_image(&image, progress).await.map_err(|e| refused(&e))?;
        progress("making the container".to_owned());
        let addresses = self.reserve(&assignment).await?;
        if let Some(message) = ports::taken(&assignment.spec.ports) {
            return Err(ActionError { message, fatal: true });
        }
        let ports = self.choose_ports(&assignment, &sight.used_ports).await?;
        let networks = attachments(&assignment, &sight.networks)?;
        let input = CreateInput {
            networks,
            addresses: addresses.clone(),
            // The engine refuses servers of its own for one that shares another's network.
            dns: match sight.share.network {
                Some(_) => Vec::new(),
                None => self.network.dns_servers(&assignment.networks),
            },
            ports,
            volumes_from: sight.volumes_from,
            share: sight.share,
        };
        let container = self.engine.create(&assignment, &input).await.map_err(|e| refused(&e))?;
        let outcome = Outcome { addresses: Some(addresses), pulled: matches!(pulled, Pulled::Yes).then_some(image) };
        Ok((outcome, container))
    }

    async fn choose_ports(
        &self,
        assignment: &TaskAssignment,
        used: &BTreeSet<(Protocol, u16)>,
    ) -> Result<Vec<PortPublish>, ActionError> {
        if !assignment.networks.is_empty() {
            let avoid = self.ports.with_recent(used);
            let chosen = tokio::time::timeout(NETWORK_TIMEOUT, self.network.choose_ports(assignment, &avoid)).await;
            let failed = |why: String| later(format!("failed to choose host ports: {why}"));
            if let Some(ports) = chosen.map_err(|_| failed("no answer in time".into()))?.map_err(failed)? {
                return Ok(ports);
            }
        }
        self.ports.choose(&assignment.spec.ports, used).map_err(later)
    }

    async fn reserve(&self, assignment: &TaskAssignment) -> Result<Vec<TaskAddress>, ActionError> {
        let mut addresses = Vec::with_capacity(assignment.networks.len());
        for network in &assignment.networks {
            let reserved = tokio::time::timeout(NETWORK_TIMEOUT, self.network.reserve(assignment, network)).await;
            let failed = |why: String| later(format!("failed to reserve an address in {}: {why}", network.short()));
            addresses.push(reserved.map_err(|_| failed("no answer in time".into()))?.map_err(failed)?);
        }
        Ok(addresses)
    }

    async fn start(&self, container: &str, sight: Sight) -> Result<Outcome, ActionError> {
        let Some(assignment) = sight.assignment else { return Err(later("the task is not assigned any more")) };
        let found = self.engine.inspect(container, &sight.networks).await.map_err(|e| refused(&e))?;
        let Some(found) = found else { return Err(later("the container is gone")) };
        let addresses = self.reserve(&assignment).await?;
        // The engine takes one network with the request that makes a container; the others follow here, also when a
        // crash came between the two.
        for (network, address) in attachments(&assignment, &sight.networks)?.iter().zip(&addresses) {
            if !found.attached.contains(&network.name) {
                let attached = self.engine.connect(container, network, &assignment.id, Some(address)).await;
                attached.map_err(|e| ActionError { fatal: false, ..refused(&e) })?;
            }
        }
        if !assignment.networks.is_empty() {
            match tokio::time::timeout(NETWORK_TIMEOUT, self.network.ready(&assignment.id)).await {
                Ok(Ok(())) => {}
                Ok(Err(late)) => {
                    tracing::warn!(task = %assignment.id, late, "container starts before its network is ready everywhere")
                }
                Err(_) => tracing::warn!(task = %assignment.id, "container starts without word from the network side"),
            }
        }
        self.engine.start(container).await.map_err(|e| refused(&e))?;
        Ok(Outcome { addresses: Some(addresses), pulled: None })
    }
}

/// The engine's networks of a task, in its order.
fn attachments(
    assignment: &TaskAssignment,
    networks: &BTreeMap<NetworkId, EngineNetwork>,
) -> Result<Vec<EngineNetwork>, ActionError> {
    let find = |id: &NetworkId| {
        networks.get(id).cloned().ok_or_else(|| later(format!("the engine does not have network {}", id.short())))
    };
    assignment.networks.iter().map(find).collect()
}
