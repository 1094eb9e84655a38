//! Pictures of what the actor wants and remembers, for questions that are answered beside it, and what such questions
//! left behind.
//!
//! Owns: nothing. Must not know: what is asked. No tasks and channels of its own.

use skein_api::{BlockStatus, NetworkAssignment, address6, block6};

use super::{Actor, chain, desired};
use crate::overlay::{
    CHECK_TASK,
    picture::{NetworkPicture, Picture},
};

impl Actor {
    /// Everything as it is wanted now; some copies, no system call.
    pub(super) fn picture(&self) -> Picture {
        let vtep = self.config.vtep();
        let peers = self.peers.values().flatten();
        let host = vtep.filter(|_| !self.known.is_empty());
        Picture {
            vtep,
            vxlan_port: self.config.vxlan_port,
            netlib: self.netlib.clone(),
            host: host.map(|vtep| {
                desired::host(self.known.values(), peers, (&self.plugin, &self.draining), &self.ingress, vtep)
            }),
            networks: self.known.values().map(|ours| self.network_picture(ours)).collect(),
            zone: self.dns.zone(),
            dns: self.dns.clone(),
            troubles: self.troubles.values().cloned().collect(),
        }
    }

    /// Gives back what checks had that an earlier agent did not end: first the address, then the lease, so that nobody
    /// is given an address that is still on this host.
    pub(super) async fn end_checks(&mut self) {
        for (network, v4, task) in self.leases.of_tasks(CHECK_TASK) {
            let Some(ours) = self.known.get(&network) else { continue };
            let v6 = address6(ours.subnet6, ours.subnet4, v4);
            let (Ok(netlib), Ok(id)) = (self.netlib().await, network.as_str().parse()) else { continue };
            for address in [v4.into(), v6.into()] {
                if let Err(error) = netlib.remove_local(&id, address).await {
                    tracing::warn!(%network, %address, %error, "failed to remove the address of a check");
                    return;
                }
            }
            let changes = self.leases.release(&task, |_, _| false);
            self.persist_or_warn(changes).await;
        }
    }

    fn network_picture(&self, ours: &NetworkAssignment) -> NetworkPicture {
        let wanted = match self.config.vtep() {
            Some(vtep) => self.network_state(&ours.id, vtep).map_err(|e| chain(&e)),
            None => Err(super::OverlayError::NoUnderlay.to_string()),
        };
        let (state, unreachable) = match wanted {
            Ok((state, unreachable)) => (Ok(state), unreachable.into_iter().map(|u| u.node).collect()),
            Err(why) => (Err(why), Vec::new()),
        };
        let block = |block: &ipnet::Ipv4Net| {
            let (used, size) = self.leases.used_of(ours, *block);
            BlockStatus { block: *block, block6: block6(ours.subnet6, ours.subnet4, *block), used, size }
        };
        NetworkPicture {
            state,
            unreachable,
            peers: self.peers.get(&ours.id).cloned().unwrap_or_default(),
            endpoints: self.endpoints.iter().filter(|e| e.network == ours.id).cloned().collect(),
            containers: self.plugin.joined(&ours.id).map(|(_, endpoint)| endpoint.clone()).collect(),
            blocks: ours.blocks.iter().map(block).collect(),
            ours: ours.clone(),
        }
    }
}
