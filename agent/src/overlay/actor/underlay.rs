//! What packets between hosts travel on: this host's address there, and how large they may be.
//!
//! Owns: noticing that either changed, and what follows. Must not know: how addresses are chosen. No tasks and channels
//! of its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Actor, BTreeSet, Cause, OverlayError};

impl Actor {
    /// Packets leave from other addresses from now on.
    pub(super) async fn set_underlay(
        &mut self,
        v4: Option<Ipv4Addr>,
        v6: Option<Ipv6Addr>,
    ) -> Result<(), OverlayError> {
        let before = self.config.vtep();
        (self.config.underlay4, self.config.underlay6) = (v4, v6);
        if self.config.vtep() == before {
            return Ok(());
        }
        tracing::info!(?before, now = ?self.config.vtep(), "this host's underlay address changed");
        if !self.applied {
            return Ok(());
        }
        self.look_at_paths().await;
        self.ensure_all(Cause::Request).await
    }

    /// Looks at how large packets may be. Answers whether that changed.
    pub(super) async fn look_at_underlay(&mut self) -> bool {
        let Some(netlib) = &self.netlib else { return false };
        let (known, vtep) = (netlib.config().underlay_mtu, netlib.config().vtep);
        let changed = match netlib.underlay_mtu(None, vtep).await {
            Ok(mtu) if mtu != known => {
                tracing::info!(before = known, now = mtu, "the underlay takes packets of another size");
                // Opened again with it.
                self.netlib = None;
                true
            }
            // Between two addresses it may have none: whoever changes it tells.
            Ok(_) | Err(_) => false,
        };
        self.look_at_paths().await || changed
    }

    /// Looks at how large packets to each peer may be. Answers whether that changed.
    pub(super) async fn look_at_paths(&mut self) -> bool {
        if self.peers.values().all(Vec::is_empty) {
            // Nothing to ask, and a host without a network needs no privilege.
            self.paths.clear();
            return false;
        }
        let Ok(netlib) = self.netlib().await else { return false };
        let own = netlib.config().vtep;
        let vtep = |peer: &skein_api::PeerAssignment| match own {
            IpAddr::V4(_) => peer.underlay4.map(IpAddr::V4),
            IpAddr::V6(_) => peer.underlay6.map(IpAddr::V6),
        };
        let peers: BTreeSet<IpAddr> = self.peers.values().flatten().filter_map(vtep).collect();
        match netlib.path_mtus(peers).await {
            Ok(paths) => {
                let changed = self.paths != paths;
                self.paths = paths;
                changed
            }
            Err(error) => {
                tracing::warn!(%error, "failed to ask how large packets to peers may be");
                false
            }
        }
    }
}
