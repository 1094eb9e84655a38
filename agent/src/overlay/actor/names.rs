//! Names: what the zone is made of, and the name server's sockets in each fabric.
//!
//! Owns: who is told of which names and of which containers. Must not know: what a question is. No tasks and channels of
//! its own.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use skein_api::NetworkId;

use super::{Actor, ByHand, OverlayError, PluginEndpoint, Served};
use crate::{
    dns::{Serving, Zone},
    fdstore::{Protocol, SocketName},
};

/// Port of the name server (RFC 1035).
const DNS_PORT: u16 = 53;

/// Whatever kept the name server from listening.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Actor {
    pub(super) fn publish_zone(&mut self) {
        self.sandboxes = self.in_several_networks();
        self.dns.publish(Zone::build(self.known.values(), &self.services, &self.endpoints, self.sandboxes.clone()));
        self.shared.zones.send_modify(|count| *count += 1);
    }

    /// Tells who follows them which endpoints are of containers that are nobody's task.
    pub(super) fn tell_by_hand(&self) {
        let joined = self.plugin.endpoints().iter().filter(|(_, e)| e.task.is_none() && e.sandbox.is_some());
        let of = |(id, e): (&String, &PluginEndpoint)| {
            (id.clone(), ByHand { network: e.network.clone(), v4: e.v4, v6: e.v6 })
        };
        let now: BTreeMap<String, ByHand> = joined.map(of).collect();
        self.shared.by_hand.send_if_modified(|told| {
            let changed = *told != now;
            *told = now;
            changed
        });
    }

    pub(super) fn in_several_networks(&self) -> Vec<Vec<(NetworkId, Vec<IpAddr>)>> {
        self.plugin.sandboxes().into_iter().filter(|s| s.len() > 1).collect()
    }

    /// Gives the name server its sockets in a fabric that has none, or that was made anew: those that an earlier agent
    /// left, with the questions that wait in them, or else new ones.
    pub(super) async fn serve_names(
        &mut self,
        netlib: &netlib::Overlay,
        id: &NetworkId,
        state: &netlib::NetworkState,
    ) -> Result<(), OverlayError> {
        let failed = |source: BoxError| OverlayError::Dns { network: id.clone(), source };
        let path = netlib.config().netns_dir.join(netlib::names::netns_name(&state.id));
        let inode = std::fs::metadata(&path).map_err(|e| failed(e.into()))?.ino();
        let alive = match self.served.get_mut(id) {
            Some(served) => served.inode == inode && served.v4.is_alive(),
            None => false,
        };
        // Those of a namespace or a gateway that is no more, and those whose tasks have died: they keep the address.
        let gateways = [Some(IpAddr::V4(state.gateway4)), state.gateway6.map(IpAddr::V6)];
        let useless = |name: &SocketName, in_use: bool| {
            let stale = name.fabric != inode || !gateways.contains(&Some(name.address.ip()));
            name.network == *id && (stale || (in_use && !alive))
        };
        if !alive {
            self.served.remove(id);
        }
        self.sockets.release(useless).await;
        if !alive {
            let v4 = self.open_names(netlib, id, inode, IpAddr::V4(state.gateway4)).await.map_err(failed)?;
            self.served.insert(id.clone(), Served { inode, v4, v6: None });
        }
        if let Some(gateway6) = state.gateway6
            && self.served.get(id).is_some_and(|s| s.v6.is_none())
        {
            // The IPv6 gateway is an address of the containers' links: without one there is nothing to bind, and
            // nobody to ask. Tried again with the next look at the network.
            match self.open_names(netlib, id, inode, IpAddr::V6(gateway6)).await {
                Ok(serving) => self.served.get_mut(id).expect("inserted above").v6 = Some(serving),
                Err(error) => tracing::debug!(network = %id, %error, "no names over IPv6 yet"),
            }
        }
        Ok(())
    }

    async fn open_names(
        &mut self,
        netlib: &netlib::Overlay,
        id: &NetworkId,
        fabric: u64,
        gateway: IpAddr,
    ) -> Result<Serving, BoxError> {
        let address = SocketAddr::new(gateway, DNS_PORT);
        let result = self.try_open_names(netlib, id, fabric, address).await;
        if result.is_err() {
            // A copy of one that was opened would keep the address from the next attempt.
            self.sockets.release(|name, _| name.network == *id && name.address == address).await;
        }
        result
    }

    async fn try_open_names(
        &mut self,
        netlib: &netlib::Overlay,
        id: &NetworkId,
        fabric: u64,
        address: SocketAddr,
    ) -> Result<Serving, BoxError> {
        let scope = netlib::NetworkId::try_from(id.as_str().to_owned())?;
        let name = |protocol| SocketName { network: id.clone(), fabric, protocol, address };
        let (udp_name, tcp_name) = (name(Protocol::Udp), name(Protocol::Tcp));
        let udp = match self.sockets.take_udp(&udp_name) {
            Some(kept) => kept,
            None => netlib.udp_socket_in(&scope, address).await?,
        };
        let tcp = match self.sockets.take_tcp(&tcp_name) {
            Some(kept) => kept,
            None => netlib.tcp_listener_in(&scope, address).await?,
        };
        self.sockets.keep(udp_name, udp.as_fd()).await;
        self.sockets.keep(tcp_name, tcp.as_fd()).await;
        Ok(self.dns.serve(id, udp, tcp)?)
    }
}
