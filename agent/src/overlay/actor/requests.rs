//! The engine's requests, done by the overlay's actor.
//!
//! Owns: the order of deciding, remembering and doing, and what is taken back when one of them fails. Must not know: what
//! the requests mean, which [`PluginState`](crate::plugin::PluginState) decides. No tasks and channels of its own.

use std::collections::BTreeSet;

use super::{Actor, Cause, chain, warn_of};
use crate::{
    overlay::{OverlayError, claims::HostPort, desired},
    plugin::{
        state::{Effect, container_ifname},
        wire::{Reply, Request},
    },
};

/// What to take back when a request fails half way.
#[derive(Clone, Debug)]
enum Undo {
    Join(String),
    Publish(String),
    Nothing,
}

impl Actor {
    pub(super) async fn plugin_request(&mut self, request: Request) -> Result<Reply, String> {
        let builds = builds_up(&request);
        let undo = match &request {
            Request::Join { endpoint, .. } => Undo::Join(endpoint.clone()),
            Request::Publish { endpoint, .. } => Undo::Publish(endpoint.clone()),
            _ => Undo::Nothing,
        };
        let request = self.claim_ports(request)?;
        let outcome = match self.plugin.handle(&self.known, &mut self.leases, request) {
            Ok(outcome) => outcome,
            Err(refusal) => {
                self.hold_ports();
                return Err(refusal.to_string());
            }
        };
        if builds {
            // Not remembered means lost at our next start, with its container cut off: better not begun.
            if let Err(error) = self.persist(outcome.changes).await {
                self.undo(undo).await;
                return Err(chain(&error));
            }
        } else {
            self.persist_or_warn(outcome.changes).await;
        }
        for effect in outcome.effects {
            if let Err(error) = self.effect(effect).await {
                if builds {
                    self.undo(undo).await;
                    return Err(chain(&error));
                }
                tracing::warn!(
                    error = chain(&error),
                    "failed to clean up behind the engine: the audit goes on with it"
                );
            }
        }
        if self.sandboxes != self.in_several_networks() {
            self.publish_zone();
        }
        self.remove_retired().await;
        Ok(outcome.reply)
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
        }
        let ports = self.claims.claim(&ports).map_err(|e| chain(&e))?;
        Ok(Request::Publish { endpoint, ports })
    }

    /// Holds exactly the ports that endpoints publish.
    pub(super) fn hold_ports(&mut self) {
        let mut keep: BTreeSet<HostPort> = BTreeSet::new();
        for (id, endpoint) in self.plugin.endpoints() {
            if let Err(error) = self.claims.claim(&endpoint.ports) {
                tracing::warn!(endpoint = id, error = chain(&error), "a published port is not ours any more");
            }
            keep.extend(endpoint.ports.iter().map(|p| (p.proto, p.host_ip, p.host_port)));
        }
        self.claims.retain(&keep);
    }

    /// Takes back what a request began that could not be finished. What else it made (an endpoint, an address), the
    /// engine takes down by itself.
    async fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Join(endpoint) => {
                let change = self.plugin.join_failed(&endpoint);
                self.persist_or_warn(change).await;
            }
            Undo::Publish(endpoint) => {
                let outcome = self.plugin.set_ports(&endpoint, Vec::new());
                self.persist_or_warn(outcome.changes).await;
                for effect in outcome.effects {
                    warn_of(self.effect(effect).await);
                }
                self.hold_ports();
            }
            Undo::Nothing => {}
        }
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
