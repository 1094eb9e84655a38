//! The server's sockets: one UDP and one TCP socket per gateway address of a network.
//!
//! Owns: serving loops and their bounds. Must not know: how the sockets came into the network's namespace, nor where
//! the zone comes from.
//!
//! Tasks: per network one for each socket; below a UDP task one per forwarded question, below a TCP task one per
//! connection. All are in [`Serving`], whose drop aborts them. No channels: the zone is read through an atomic pointer,
//! so the last one published is served for as long as nobody publishes another, with or without a master.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use hickory_proto::op::ResponseCode;
use skein_api::NetworkId;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};

use super::{
    message::{self, Asker, Outcome, Question},
    upstream::{UpstreamSource, Upstreams, write_framed},
    zone::Zone,
};

/// Questions under way to the host's resolvers, all clients together: each holds a socket, a third of the usual limit
/// of 1024 open files. More are answered SERVFAIL at once.
pub const FORWARDS_MAX: usize = 320;

/// The same for one client: a tenth, so that one cannot starve the others.
pub const FORWARDS_PER_CLIENT_MAX: usize = 32;

/// TCP connections held open, all clients together.
pub const CONNECTIONS_MAX: usize = 128;

/// The same for one client. More are closed at once.
pub const CONNECTIONS_PER_CLIENT_MAX: usize = 8;

/// How long a TCP connection may be silent, or take for one message (RFC 7766, 6.2.3: seconds).
pub const TCP_IDLE: Duration = Duration::from_secs(10);

/// Largest question over UDP, bytes. Longer ones are cut by the kernel and then malformed.
const UDP_BUFFER_BYTES: usize = 4096;

/// Pause after a socket's error, so that one that persists does not spin.
const ERROR_PAUSE: Duration = Duration::from_millis(50);

/// What the server counted since it started.
#[derive(Debug, Default)]
pub struct DnsCounters {
    /// Questions that were answered from the zone or refused.
    pub answered_total: AtomicU64,
    /// Questions that went to the host's resolvers.
    pub forwarded_total: AtomicU64,
    /// Of these, the ones that no resolver answered.
    pub forward_failures_total: AtomicU64,
    /// Questions and connections over a bound.
    pub rejected_total: AtomicU64,
}

/// Counts what each client holds; a [`Permit`] gives back on drop.
#[derive(Debug)]
struct Bound {
    all: Arc<Semaphore>,
    per_client_max: usize,
    clients: Mutex<BTreeMap<IpAddr, usize>>,
}

#[derive(Debug)]
struct Permit {
    bound: Arc<Bound>,
    client: IpAddr,
    _all: OwnedSemaphorePermit,
}

impl Bound {
    fn new(max: usize, per_client_max: usize) -> Arc<Self> {
        Arc::new(Self { all: Arc::new(Semaphore::new(max)), per_client_max, clients: Mutex::default() })
    }

    fn take(self: &Arc<Self>, client: IpAddr) -> Option<Permit> {
        let all = self.all.clone().try_acquire_owned().ok()?;
        let mut clients = self.clients.lock().unwrap_or_else(|e| e.into_inner());
        let held = clients.entry(client).or_default();
        if *held >= self.per_client_max {
            return None;
        }
        *held += 1;
        Some(Permit { bound: self.clone(), client, _all: all })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut clients = self.bound.clients.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(held) = clients.get_mut(&self.client) {
            *held -= 1;
            if *held == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

/// The name server of this host. Cheap to share; it serves nothing until it is given sockets.
#[derive(Debug)]
pub struct DnsServer {
    zone: ArcSwap<Zone>,
    upstreams: Upstreams,
    rotation: AtomicUsize,
    forwards: Arc<Bound>,
    connections: Arc<Bound>,
    counters: DnsCounters,
}

/// The tasks that serve one network; dropping it ends them and closes the sockets.
#[derive(Debug)]
pub struct Serving {
    tasks: JoinSet<()>,
}

impl Serving {
    /// Every task is still there. None ends by itself short of a panic.
    pub fn is_alive(&mut self) -> bool {
        self.tasks.try_join_next().is_none()
    }
}

impl DnsServer {
    /// A server with an empty zone.
    pub fn new(upstreams: UpstreamSource) -> Arc<Self> {
        Arc::new(Self {
            zone: ArcSwap::from_pointee(Zone::default()),
            upstreams: Upstreams::new(upstreams),
            rotation: AtomicUsize::new(0),
            forwards: Bound::new(FORWARDS_MAX, FORWARDS_PER_CLIENT_MAX),
            connections: Bound::new(CONNECTIONS_MAX, CONNECTIONS_PER_CLIENT_MAX),
            counters: DnsCounters::default(),
        })
    }

    /// Answers from this zone from now on.
    pub fn publish(&self, zone: Zone) {
        self.zone.store(Arc::new(zone));
    }

    /// The names that it answers from now.
    pub fn zone(&self) -> Arc<Zone> {
        self.zone.load_full()
    }

    /// What was counted.
    pub fn counters(&self) -> &DnsCounters {
        &self.counters
    }

    /// Serves a network on sockets that were opened in its namespace; must be called within a tokio runtime.
    ///
    /// # Errors
    /// A socket cannot be registered with the runtime (it must be non-blocking).
    pub fn serve(
        self: &Arc<Self>,
        network: &NetworkId,
        udp: std::net::UdpSocket,
        tcp: std::net::TcpListener,
    ) -> io::Result<Serving> {
        let udp = UdpSocket::from_std(udp)?;
        let tcp = TcpListener::from_std(tcp)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(self.clone().serve_udp(network.clone(), Arc::new(udp)));
        tasks.spawn(self.clone().serve_tcp(network.clone(), tcp));
        Ok(Serving { tasks })
    }

    fn decide(&self, network: &NetworkId, client: IpAddr, tcp: bool, packet: &[u8]) -> Outcome {
        let rotation = self.rotation.fetch_add(1, Ordering::Relaxed);
        let outcome = message::decide(&self.zone.load(), Asker { network, client, tcp }, packet, rotation);
        if matches!(outcome, Outcome::Reply(_)) {
            self.counters.answered_total.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    fn forward_permit(&self, client: IpAddr) -> Option<Permit> {
        let permit = self.forwards.take(client);
        let counter = if permit.is_some() { &self.counters.forwarded_total } else { &self.counters.rejected_total };
        counter.fetch_add(1, Ordering::Relaxed);
        permit
    }

    async fn forward(&self, question: &Question, packet: &[u8]) -> Vec<u8> {
        match self.upstreams.ask(question, packet).await {
            Ok(answer) => answer,
            Err(error) => {
                self.counters.forward_failures_total.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(name = %question.query.name(), %error, "no resolver answered");
                message::failure(question, ResponseCode::ServFail)
            }
        }
    }

    async fn serve_udp(self: Arc<Self>, network: NetworkId, socket: Arc<UdpSocket>) {
        let mut forwards = JoinSet::new();
        let mut buffer = vec![0; UDP_BUFFER_BYTES];
        loop {
            while forwards.try_join_next().is_some() {}
            let (n, client) = match socket.recv_from(&mut buffer).await {
                Ok(got) => got,
                Err(error) => {
                    // ICMP errors of earlier answers come back here; they concern one client only.
                    tracing::debug!(%network, %error, "failed to receive a question");
                    tokio::time::sleep(ERROR_PAUSE).await;
                    continue;
                }
            };
            let packet = &buffer[..n];
            match self.decide(&network, client.ip(), false, packet) {
                Outcome::Drop => {}
                Outcome::Reply(answer) => send(&socket, client, &answer).await,
                Outcome::Forward(question) => match self.forward_permit(client.ip()) {
                    None => send(&socket, client, &message::failure(&question, ResponseCode::ServFail)).await,
                    Some(permit) => {
                        let (server, socket, packet) = (self.clone(), socket.clone(), packet.to_vec());
                        forwards.spawn(async move {
                            let answer = server.forward(&question, &packet).await;
                            send(&socket, client, &answer).await;
                            drop(permit);
                        });
                    }
                },
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, network: NetworkId, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let (stream, client) = match listener.accept().await {
                Ok(got) => got,
                Err(error) => {
                    tracing::debug!(%network, %error, "failed to accept a connection");
                    tokio::time::sleep(ERROR_PAUSE).await;
                    continue;
                }
            };
            let Some(permit) = self.connections.take(client.ip()) else {
                self.counters.rejected_total.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let (server, network) = (self.clone(), network.clone());
            connections.spawn(async move {
                if let Err(error) = server.connection(&network, client.ip(), stream).await {
                    tracing::debug!(%network, %client, %error, "connection ended");
                }
                drop(permit);
            });
        }
    }

    /// Answers the messages of one connection in their order, until it ends or is silent for too long.
    async fn connection(&self, network: &NetworkId, client: IpAddr, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let Ok(packet) = timeout(TCP_IDLE, read_framed(&mut stream)).await else {
                return Ok(());
            };
            let Some(packet) = packet? else { return Ok(()) };
            let answer = match self.decide(network, client, true, &packet) {
                Outcome::Drop => return Ok(()),
                Outcome::Reply(answer) => answer,
                Outcome::Forward(question) => match self.forward_permit(client) {
                    None => message::failure(&question, ResponseCode::ServFail),
                    Some(_permit) => self.forward(&question, &packet).await,
                },
            };
            timeout(TCP_IDLE, write_framed(&mut stream, &answer)).await??;
        }
    }
}

/// Sends an answer; a lost one is asked for again by its client.
async fn send(socket: &UdpSocket, client: SocketAddr, answer: &[u8]) {
    if let Err(error) = socket.send_to(answer, client).await {
        tracing::debug!(%client, %error, "failed to send an answer");
    }
}

/// The next message; none at a clean end.
async fn read_framed(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[1..]).await?;
    let mut packet = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut packet).await?;
    Ok(Some(packet))
}

#[cfg(test)]
mod tests;
