//! Places where other hosts' probes are echoed: addresses of this host's own blocks, on `lo` of the network's namespace.
//!
//! Owns: their life. They are leased like a container's, so that a probe takes the very routes, neighbours and forwarding
//! entries that containers' packets take, and nobody else gets them meanwhile. Must not know: who sends.
//!
//! Tasks: two per address and one per connection, all in [`Places`]; its drop ends them and gives the addresses back.
//! No channels. What a crash leaves is given back by the overlay's actor at the next start.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use skein_api::{NetworkId, PLACES_MAX, ProbePlace, ProbeSockets, TaskId};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};

use super::probe::MARK;
use crate::overlay::{CHECK_TASK, OverlayHandle};

/// Connections that are echoed at a time, all places together.
const CONNECTIONS_MAX: usize = 256;
/// Longest life of one.
const CONNECTION_WITHIN: Duration = Duration::from_secs(10);
/// Largest datagram.
const DATAGRAM_BYTES_MAX: usize = 65_535;

/// Open places.
pub(super) struct Places {
    overlay: OverlayHandle,
    task: TaskId,
    addresses: Vec<(netlib::Overlay, netlib::NetworkId, IpAddr)>,
    /// Aborted with this.
    tasks: JoinSet<()>,
}

impl Places {
    /// Opens a place in each of these networks that is on this host; the others are left out.
    pub(super) async fn open(
        overlay: &OverlayHandle,
        networks: &[NetworkId],
    ) -> Result<(Self, Vec<ProbePlace>), String> {
        if networks.len() > PLACES_MAX {
            return Err(format!("{} networks are too many, {PLACES_MAX} can be checked at a time", networks.len()));
        }
        let netlib = overlay.picture().await.map_err(|e| e.to_string())?.netlib;
        let netlib = netlib.ok_or("this host has no network yet")?;
        let task = TaskId::new(format!("{CHECK_TASK}{:016x}", rand::random::<u64>()));
        let mut places = Self { overlay: overlay.clone(), task, addresses: Vec::new(), tasks: JoinSet::new() };
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut opened = Vec::new();
        for network in networks {
            let Ok(id) = netlib::NetworkId::try_from(network.as_str().to_owned()) else { continue };
            let Ok(leased) = overlay.reserve(&places.task, network, None).await else { continue };
            let mut sockets = Vec::new();
            for address in [leased.v4.map(IpAddr::V4), leased.v6.map(IpAddr::V6)].into_iter().flatten() {
                places.addresses.push((netlib.clone(), id.clone(), address));
                match places.open_one(&netlib, &id, address, &connections).await {
                    Ok(found) => sockets.push(found),
                    Err(error) => tracing::warn!(%network, %address, error, "no place for probes"),
                }
            }
            opened.push(ProbePlace { network: network.clone(), sockets });
        }
        Ok((places, opened))
    }

    async fn open_one(
        &mut self,
        netlib: &netlib::Overlay,
        id: &netlib::NetworkId,
        address: IpAddr,
        connections: &Arc<Semaphore>,
    ) -> Result<ProbeSockets, String> {
        let failed = |e: netlib::Error| skein_daemon::chain(&e);
        netlib.add_local(id, address).await.map_err(failed)?;
        let any = SocketAddr::new(address, 0);
        let udp = netlib.udp_socket_in(id, any).await.map_err(failed)?;
        let tcp = netlib.tcp_listener_in(id, any).await.map_err(failed)?;
        let udp = UdpSocket::from_std(udp).map_err(|e| e.to_string())?;
        let tcp = TcpListener::from_std(tcp).map_err(|e| e.to_string())?;
        let port = |address: std::io::Result<SocketAddr>| address.map(|a| a.port()).map_err(|e| e.to_string());
        let sockets = ProbeSockets { address, tcp: port(tcp.local_addr())?, udp: port(udp.local_addr())? };
        self.tasks.spawn(echo_datagrams(udp));
        self.tasks.spawn(echo_connections(tcp, connections.clone()));
        Ok(sockets)
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let (overlay, task) = (self.overlay.clone(), self.task.clone());
        let addresses = std::mem::take(&mut self.addresses);
        self.tasks.abort_all();
        // Without a runtime the process ends: the next start cleans up.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                for (netlib, id, address) in addresses {
                    if let Err(error) = netlib.remove_local(&id, address).await {
                        tracing::warn!(network = %id, %address, %error, "failed to close a place for probes");
                    }
                }
                // Last: a lease that is free while its address is still here would cut its next holder off.
                let _ = overlay.release(&task).await;
            });
        }
    }
}

/// Sends back what begins with the mark; a container that sends anything else hears nothing.
async fn echo_datagrams(socket: UdpSocket) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((n, from)) if buffer[..n].starts_with(MARK) => drop(socket.send_to(&buffer[..n], from).await),
            Ok(_) => {}
            // Errors of earlier answers come back here; they are the sender's.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

async fn echo_connections(listener: TcpListener, connections: Arc<Semaphore>) {
    let mut echoes = JoinSet::new();
    loop {
        while echoes.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            tokio::task::yield_now().await;
            continue;
        };
        // Over the bound it is closed at once.
        if let Ok(permit) = connections.clone().try_acquire_owned() {
            echoes.spawn(async move {
                let _ = timeout(CONNECTION_WITHIN, echo(stream)).await;
                drop(permit);
            });
        }
    }
}

async fn echo(mut stream: tokio::net::TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return stream.shutdown().await,
            n => stream.write_all(&buffer[..n]).await?,
        }
    }
}
