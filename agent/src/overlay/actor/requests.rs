//! The engine's requests, done by the overlay's actor.
//!
//! Owns: the order of deciding, remembering and doing, and what is taken back when one of them fails. Must not know: what
//! the requests mean, which [`PluginState`](crate::plugin::PluginState) decides. No tasks and channels of its own.

use std::collections::BTreeSet;

use netlib::Proto;
use skein_api::TaskId;

use super::{Actor, Cause, Leases, PortBinding, chain, warn_of};
use crate::{
    overlay::{OverlayError, claims::HostPort, desired},
    plugin::{
        PluginState,
        state::{Effect, container_ifname},
        wire::{Reply, Request},
    },
};

impl Actor {
    pub(super) async fn plugin_request(&mut self, request: Request) -> Result<Reply, String> {
        let builds = builds_up(&request);
        let publishes = matches!(request, Request::Publish { .. });
        let endpoint = match &request {
            Request::Publish { endpoint, .. } => Some(endpoint.clone()),
            _ => None,
        };
        let request = self.claim_ports(request)?;
        // Some hundred small entries: cheaper than the fsync that follows.
        let before = (self.plugin.clone(), self.leases.clone());
        let outcome = match self.plugin.handle(&self.known, &mut self.leases, request) {
            Ok(outcome) => outcome,
            Err(refusal) => {
                self.hold_ports();
                return Err(refusal.to_string());
            }
        };
        if builds {
            let keys: Vec<String> = outcome.changes.iter().map(|c| c.key().to_owned()).collect();
            // Not remembered means lost at our next start, with its container cut off: better not begun.
            if let Err(error) = self.persist(outcome.changes).await {
                self.take_back(before, &keys).await;
                return Err(chain(&error));
            }
            for (done, effect) in outcome.effects.iter().enumerate() {
                if let Err(error) = self.effect(effect.clone()).await {
                    self.take_back(before, &keys).await;
                    if publishes {
                        for effect in &outcome.effects[..=done] {
                            warn_of(self.effect(effect.clone()).await);
                        }
                    }
                    return Err(chain(&error));
                }
            }
        } else {
            self.persist_or_warn(outcome.changes).await;
            for effect in outcome.effects {
                if let Err(error) = self.effect(effect).await {
                    tracing::warn!(
                        error = chain(&error),
                        "failed to clean up behind the engine: the audit goes on with it"
                    );
                }
            }
        }
        let task = endpoint.and_then(|id| self.plugin.endpoints().get(&id)?.task.clone());
        if let Some(task) = task {
            // The endpoint holds them from now on.
            self.chosen.remove(&task);
        }
        self.retain_troubles();
        self.tell_by_hand();
        if self.sandboxes != self.in_several_networks() {
            self.publish_zone();
        }
        self.remove_retired().await;
        Ok(outcome.reply)
    }

    /// Takes back what a refused request began, in memory and on disk: the engine believes that nothing was made, and
    /// will never take it down.
    async fn take_back(&mut self, (plugin, leases): (PluginState, Leases), keys: &[String]) {
        self.plugin = plugin;
        self.leases = leases;
        self.rewrite(keys).await;
        self.hold_ports();
    }

    /// Makes the ports of a task concrete that were left open, and holds them until its container publishes them. The
    /// same task gets the same again.
    pub(super) fn choose_ports(
        &mut self,
        task: TaskId,
        ports: &[PortBinding],
        avoid: &BTreeSet<(Proto, u16)>,
    ) -> Result<Vec<PortBinding>, OverlayError> {
        let answers = |chosen: &[PortBinding]| {
            let same = |(c, p): (&PortBinding, &PortBinding)| {
                (c.proto, c.host_ip, c.port) == (p.proto, p.host_ip, p.port) && [0, c.host_port].contains(&p.host_port)
            };
            chosen.len() == ports.len() && chosen.iter().zip(ports).all(same)
        };
        if let Some(chosen) = self.chosen.get(&task).filter(|c| answers(c)) {
            return Ok(chosen.clone());
        }
        let open: Vec<PortBinding> = ports.iter().filter(|p| p.host_port == 0).cloned().collect();
        let mut taken = self.claims.claim_but(&open, avoid)?.into_iter();
        let fill = |p: &PortBinding| match p.host_port {
            0 => taken.next().expect("one for each that was left open"),
            _ => p.clone(),
        };
        let chosen: Vec<PortBinding> = ports.iter().map(fill).collect();
        if !open.is_empty() {
            self.chosen.insert(task, chosen.clone());
        }
        Ok(chosen)
    }

    /// Whether a port is kept for a task other than the endpoint's.
    fn check_chosen(&self, endpoint: &str, ports: &[PortBinding]) -> Result<(), String> {
        let own = self.plugin.endpoints().get(endpoint).and_then(|e| e.task.as_ref());
        for (task, chosen) in self.chosen.iter().filter(|(task, _)| Some(*task) != own) {
            let clash = |w: &&PortBinding| chosen.iter().any(|c| (c.proto, c.host_port) == (w.proto, w.host_port));
            if let Some(port) = ports.iter().find(clash) {
                return Err(format!("port {}/{} of this host is kept for task {task}", port.host_port, port.proto));
            }
        }
        Ok(())
    }

    /// Makes the ports of a Publish concrete and ours, before anything is decided.
    fn claim_ports(&mut self, request: Request) -> Result<Request, String> {
        let Request::Publish { endpoint, ports } = request else {
            return Ok(request);
        };
        if !ports.is_empty() {
            if !self.applied {
                return Err("the agent is still starting".into());
            }
            self.plugin.check_ports(&endpoint, &ports).map_err(|e| e.to_string())?;
            self.check_chosen(&endpoint, &ports)?;
        }
        let ports = self.claims.claim(&ports).map_err(|e| chain(&e))?;
        Ok(Request::Publish { endpoint, ports })
    }

    /// Holds exactly the ports that endpoints publish, and those that were chosen for tasks.
    pub(super) fn hold_ports(&mut self) {
        let mut keep: BTreeSet<HostPort> = BTreeSet::new();
        for (id, endpoint) in self.plugin.endpoints() {
            if let Err(error) = self.claims.claim(&endpoint.ports) {
                tracing::warn!(endpoint = id, error = chain(&error), "a published port is not ours any more");
            }
            keep.extend(endpoint.ports.iter().map(|p| (p.proto, p.host_ip, p.host_port)));
        }
        let chosen = self.chosen.values().flatten();
        keep.extend(chosen.map(|p| (p.proto, p.host_ip, p.host_port)));
        self.claims.retain(&keep);
    }

    async fn effect(&mut self, effect: Effect) -> Result<(), OverlayError> {
        match effect {
            Effect::Attach { endpoint } => self.attach(&endpoint).await,
            Effect::Detach { network, endpoint } => {
                let netlib = self.netlib().await?;
                let invalid = |source| OverlayError::Invalid { network: network.clone(), source };
                let id: netlib::NetworkId = network.as_str().parse().map_err(invalid)?;
                match netlib.remove_endpoint(&id, &endpoint).await {
                    // The whole network is gone, and the link with it.
                    Ok(()) | Err(netlib::Error::NoNetwork(_)) => Ok(()),
                    Err(source) => Err(OverlayError::Kernel { what: format!("the end of {}", endpoint.addr4), source }),
                }
            }
            Effect::Ports { network } => {
                self.hold_ports();
                self.ensure_host(Cause::Request).await?;
                if self.applied && self.known.contains_key(&network) {
                    self.ensure_network(&network, Cause::Request).await?;
                }
                Ok(())
            }
        }
    }

    async fn attach(&mut self, id: &str) -> Result<(), OverlayError> {
        let netlib = self.netlib().await?;
        let Some(endpoint) = self.plugin.endpoints().get(id) else {
            return Ok(());
        };
        let network = endpoint.network.clone();
        let (kernel_endpoint, ifname) = (endpoint.to_netlib(), container_ifname(id));
        let ours = self.known.get(&network).ok_or_else(|| OverlayError::UnknownNetwork(network.clone()))?;
        let what = format!("{} of network {}", endpoint.v4, ours.name);
        let state =
            desired::bare_network(ours).map_err(|source| OverlayError::Invalid { network: network.clone(), source })?;
        let result = match netlib.add_endpoint(&state, &kernel_endpoint, &ifname).await {
            // After a boot the engine may be here before the fabric.
            Err(netlib::Error::NoNetwork(_)) if self.applied => {
                self.ensure_network(&network, Cause::Request).await?;
                netlib.add_endpoint(&state, &kernel_endpoint, &ifname).await
            }
            result => result,
        };
        result.map_err(|source| OverlayError::Kernel { what, source })?;
        if self.served.get(&network).is_some_and(|s| s.v6.is_none()) {
            // The first link brings the IPv6 gateway: names can be served there from now on.
            self.serve_names(&netlib, &network, &state).await?;
        }
        Ok(())
    }
}

/// Requests that make something, and must fail when it cannot be done or remembered. The others take down, and must
/// not stand in the engine's way.
fn builds_up(request: &Request) -> bool {
    matches!(
        request,
        Request::CreateNetwork { .. }
            | Request::CreateEndpoint { .. }
            | Request::Join { .. }
            | Request::Publish { .. }
            | Request::RequestPool { .. }
            | Request::RequestAddress { .. }
    )
}
