//! The engine's requests, done by the overlay's actor.
//!
//! Owns: the order of deciding, remembering and doing, and what is taken back when one of them fails. Must not know: what
//! the requests mean, which [`PluginState`](crate::plugin::PluginState) decides. No tasks and channels of its own.

use super::{Actor, Cause, Change, Leases, chain, warn_of};
use crate::{
    overlay::{OverlayError, desired},
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
        let mut outcome = match self.plugin.handle(&self.known, &mut self.leases, request) {
            Ok(outcome) => outcome,
            Err(refusal) => {
                self.hold_ports();
                return Err(refusal.to_string());
            }
        };
        for effect in &outcome.effects {
            if let Effect::Attach { endpoint } = effect {
                let noted = self.note_mtu(endpoint);
                outcome.changes.retain(|change| noted.as_ref().map(Change::key) != Some(change.key()));
                outcome.changes.extend(noted);
            }
        }
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

    /// An endpoint's link is made with the network's MTU of now, and keeps it.
    fn note_mtu(&mut self, id: &str) -> Option<Change> {
        let ours = self.known.get(&self.plugin.endpoints().get(id)?.network)?;
        let mut state = desired::bare_network(ours).ok()?;
        self.fit(&mut state);
        self.plugin.set_mtu(id, state.mtu)
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
        let mut state =
            desired::bare_network(ours).map_err(|source| OverlayError::Invalid { network: network.clone(), source })?;
        state.mtu = kernel_endpoint.mtu.unwrap_or(state.mtu);
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
