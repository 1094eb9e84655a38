//! The agent's overlay: what the master assigned, brought to the kernel and to the name server.
//!
//! Owns: the networks of this host, the addresses it gives, and the memory of the engine's plugin. Must not know: the
//! engine and the master; both reach it through [`OverlayHandle`].
//!
//! * [`desired`]: assignments and endpoints → what the kernel shall have. Pure.
//! * [`claims`]: ports of the host.
//! * [`store`]: local state on disk.
//! * `side`: what the executor wants of it.
//! * `picture`: what is wanted and remembered at one moment, for questions.
//! * `actor`: the one owner of all of it.
//!
//! Tasks: the actor, in [`OverlayTask`]; the name server's tasks below it. Channels: one bounded `mpsc` of requests to
//! the actor with a `oneshot` for each reply. The actor ends when the last handle is gone. Ending it, in whatever way,
//! leaves the kernel's state as it is: the next one adopts it.

mod actor;
pub mod claims;
pub mod desired;
pub mod picture;
mod side;
pub mod store;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use agent_core::lease::LeaseError;
use arc_swap::ArcSwap;
use netlib::Proto;
use skein_api::{
    Assignment, EndpointAssignment, NetworkAssignment, NetworkId, PeerAssignment, ServiceAssignment, TaskAddress,
    TaskId,
};
use thiserror::Error;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, timeout_at},
};

use self::{
    actor::Actor,
    claims::ClaimError,
    picture::{Picture, Repairs},
    store::{DirStore, LocalStore, StoreError},
};
use crate::{
    dns::{DnsServer, UpstreamSource},
    fdstore::FdStore,
    plugin::wire::{PortBinding, Reply, Request},
};

/// Requests that wait for the actor: the plugin's connections (128) and some for session and executor. When it is full
/// the sender waits, and an engine's request then runs into its own time limit.
const REQUESTS_MAX: usize = 160;

/// How the holders of addresses begin that probes of `skein net check` have; no task's id does.
pub const CHECK_TASK: &str = "net-check-";

/// How long a container waits for its names: the master's answer takes a round trip and a commit; one that does not
/// answer must not keep containers from starting.
pub const ANNOUNCED_TIMEOUT: Duration = Duration::from_secs(10);

/// What the overlay must know of its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayConfig {
    /// IPv4 address on the underlay: the source of VXLAN packets.
    pub underlay4: Option<Ipv4Addr>,
    /// IPv6 address on the underlay: used where there is no IPv4 address.
    pub underlay6: Option<Ipv6Addr>,
    /// UDP port of VXLAN, the same on every host (RFC 7348: 4789).
    pub vxlan_port: u16,
    /// Whether plain packets between hosts take the fast path (`netlib::fast`).
    pub fast_path: bool,
    /// Where network namespaces are pinned; must outlive the agent.
    pub netns_dir: PathBuf,
    /// Where local state is kept; `network` below it is ours.
    pub state_dir: PathBuf,
}

impl OverlayConfig {
    /// The address by which other hosts reach this one's containers.
    pub fn vtep(&self) -> Option<IpAddr> {
        self.underlay4.map(IpAddr::V4).or(self.underlay6.map(IpAddr::V6))
    }

    /// The directory of local state as a store, made if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open_store(&self) -> Result<DirStore, StoreError> {
        DirStore::try_open(self.state_dir.join("network"))
    }
}

/// Why the overlay does not follow.
#[derive(Debug, Error)]
pub enum OverlayError {
    /// The configuration names no address of this host.
    #[error("failed to find an underlay address of this host: the configuration names none")]
    NoUnderlay,
    /// The networks do not agree on this host's number.
    #[error("failed to tell this host's number: networks say both {0} and {1}")]
    HostIndex(u16, u16),
    /// A network that the master has not given to this host.
    #[error("network {0} is not on this host")]
    UnknownNetwork(NetworkId),
    /// A network cannot be what the master wants.
    #[error("failed to describe network {network} to the kernel")]
    Invalid {
        /// The network.
        network: NetworkId,
        /// What is wrong.
        #[source]
        source: netlib::InvalidState,
    },
    /// A peer without an underlay address of our family.
    #[error("failed to reach node {node} in network {network}: it has no underlay address of the family of {vtep}")]
    Unreachable {
        /// The network.
        network: NetworkId,
        /// The node.
        node: String,
        /// Our own address.
        vtep: IpAddr,
    },
    /// The kernel refused.
    #[error("failed to bring {what} to the kernel")]
    Kernel {
        /// `network <name>` or `the host's namespace`.
        what: String,
        /// What it said.
        #[source]
        source: netlib::Error,
    },
    /// The name server cannot listen.
    #[error("failed to serve names in network {network}")]
    Dns {
        /// The network.
        network: NetworkId,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No port.
    #[error(transparent)]
    Port(#[from] ClaimError),
    /// No address.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The actor is gone.
    #[error("the overlay has ended")]
    Ended,
}

/// What the overlay counted since it started.
#[derive(Debug, Default)]
pub struct OverlayCounters {
    /// Checks of the kernel's state, one per network or host.
    pub audits_total: AtomicU64,
    /// Differences found by a check and repaired: somebody else changed what is ours.
    pub repairs_total: AtomicU64,
    /// Containers found without their link.
    pub lost_endpoints_total: AtomicU64,
    /// Checks that failed.
    pub failures_total: AtomicU64,
}

impl OverlayCounters {
    fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// The network's part of what a master assigned: the whole of what a host shall have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Networks of this host.
    pub networks: Vec<NetworkAssignment>,
    /// The other hosts in them.
    pub peers: Vec<PeerAssignment>,
    /// Virtual addresses in them.
    pub services: Vec<ServiceAssignment>,
    /// Names and addresses in them.
    pub endpoints: Vec<EndpointAssignment>,
}

impl Wanted {
    /// Takes from a ledger what is the network's.
    pub fn of<'a>(assignments: impl IntoIterator<Item = &'a Assignment>) -> Self {
        let mut wanted = Self::default();
        for assignment in assignments {
            match assignment {
                Assignment::Network(n) => wanted.networks.push(n.clone()),
                Assignment::Peer(p) => wanted.peers.push(p.clone()),
                Assignment::Service(s) => wanted.services.push(s.clone()),
                Assignment::Endpoint(e) => wanted.endpoints.push(e.clone()),
                Assignment::Task(_) => {}
            }
        }
        wanted
    }
}

/// What the master wants to know of this host's addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressUse {
    /// Which frozen addresses are in use, by ticket: told after the freeze is in force.
    pub frozen: BTreeMap<u64, Vec<Ipv4Addr>>,
    /// How many addresses containers have in each network that are no tasks of ours.
    pub plain: BTreeMap<NetworkId, u32>,
}

#[derive(Debug)]
enum Message {
    Apply {
        wanted: Wanted,
        reply: oneshot::Sender<Result<(), OverlayError>>,
    },
    Plugin {
        request: Request,
        reply: oneshot::Sender<Result<Reply, String>>,
    },
    Reserve {
        task: TaskId,
        network: NetworkId,
        asked: Option<Ipv4Addr>,
        reply: oneshot::Sender<Result<TaskAddress, OverlayError>>,
    },
    Release {
        task: TaskId,
        reply: oneshot::Sender<()>,
    },
    ChoosePorts {
        task: TaskId,
        ports: Vec<PortBinding>,
        avoid: BTreeSet<(Proto, u16)>,
        reply: oneshot::Sender<Result<Vec<PortBinding>, OverlayError>>,
    },
    /// The host has other addresses on the underlay.
    Underlay {
        v4: Option<Ipv4Addr>,
        v6: Option<Ipv6Addr>,
        reply: oneshot::Sender<Result<(), OverlayError>>,
    },
    /// In which networks the task has an address but no name.
    Unannounced {
        task: TaskId,
        reply: oneshot::Sender<Vec<NetworkId>>,
    },
    Picture {
        reply: oneshot::Sender<Picture>,
    },
}

#[derive(Debug, Default)]
struct Shared {
    networks: ArcSwap<BTreeMap<NetworkId, NetworkAssignment>>,
    /// Counts the zones published.
    zones: watch::Sender<u64>,
    counters: OverlayCounters,
    repairs: Repairs,
    troubles: watch::Sender<Vec<String>>,
    addresses: watch::Sender<AddressUse>,
    /// Counts what netlink told of the host's own namespace.
    host_changes: watch::Sender<u64>,
    by_hand: watch::Sender<BTreeMap<String, ByHand>>,
}

/// Where a container is that somebody started with the host's own engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByHand {
    /// The network.
    pub network: NetworkId,
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

/// The way to the overlay; cheap to clone.
#[derive(Clone, Debug)]
pub struct OverlayHandle {
    messages_tx: mpsc::Sender<Message>,
    shared: Arc<Shared>,
}

/// The overlay's actor; dropping it aborts it.
#[derive(Debug)]
pub struct OverlayTask {
    tasks: JoinSet<()>,
}

impl OverlayTask {
    /// Waits until the actor has ended: after the last handle is gone, or by a panic.
    pub async fn ended(&mut self) {
        self.tasks.join_next().await;
    }
}

impl OverlayHandle {
    /// Starts the overlay with the local state in `store` (see [`OverlayConfig::open_store`]). Nothing in the kernel
    /// changes before the first [`OverlayHandle::apply`]. `sockets` are those that earlier agents left to the service
    /// manager. Call it on a thread whose network namespace is the host's.
    ///
    /// # Errors
    /// The local state cannot be read.
    pub fn try_start(
        config: OverlayConfig,
        store: Arc<dyn LocalStore>,
        resolvers: UpstreamSource,
        sockets: FdStore,
    ) -> Result<(Self, OverlayTask), OverlayError> {
        let (messages_tx, messages_rx) = mpsc::channel(REQUESTS_MAX);
        let shared = Arc::<Shared>::default();
        let actor = Actor::load(config, store, DnsServer::new(resolvers), sockets, shared.clone())?;
        let mut tasks = JoinSet::new();
        tasks.spawn(actor.run(messages_rx));
        Ok((Self { messages_tx, shared }, OverlayTask { tasks }))
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, OverlayError> {
        let (reply, answer) = oneshot::channel();
        self.messages_tx.send(message(reply)).await.map_err(|_| OverlayError::Ended)?;
        answer.await.map_err(|_| OverlayError::Ended)
    }

    /// Makes this the whole of what this host shall have, and returns when the kernel and the name server follow it.
    /// Idempotent. Networks that are not named are removed, as soon as no container of the engine uses them.
    ///
    /// # Errors
    /// The first failure; everything else was done all the same, and the audit goes on trying.
    pub async fn apply(&self, wanted: Wanted) -> Result<(), OverlayError> {
        self.ask(|reply| Message::Apply { wanted, reply }).await?
    }

    /// The task's address in a network, `asked` if it shall have a certain one: sticky until
    /// [`OverlayHandle::release`], durable when this returns.
    ///
    /// # Errors
    /// The network is not here, its blocks are full, the address is not this host's or in use, or the disk failed.
    pub async fn reserve(
        &self,
        task: &TaskId,
        network: &NetworkId,
        asked: Option<Ipv4Addr>,
    ) -> Result<TaskAddress, OverlayError> {
        let (task, network) = (task.clone(), network.clone());
        self.ask(|reply| Message::Reserve { task, network, asked, reply }).await?
    }

    /// Gives up all addresses of a task whose container is gone; unknown tasks are no error.
    ///
    /// # Errors
    /// [`OverlayError::Ended`] only.
    pub async fn release(&self, task: &TaskId) -> Result<(), OverlayError> {
        let task = task.clone();
        self.ask(|reply| Message::Release { task, reply }).await
    }

    /// The name servers for a container in these networks: each network's gateway, in the given order.
    pub fn dns_servers(&self, networks: &[NetworkId]) -> Vec<IpAddr> {
        let known = self.shared.networks.load();
        networks.iter().filter_map(|id| known.get(id)).map(|n| IpAddr::V4(n.gateway4)).collect()
    }

    /// A network of this host as the master assigned it.
    pub fn network(&self, id: &NetworkId) -> Option<NetworkAssignment> {
        self.shared.networks.load().get(id).cloned()
    }

    /// Waits until every network in which the task has an address knows a name for it: by then the master has heard of
    /// the address and told every host, this one included.
    ///
    /// # Errors
    /// The networks that know none yet after [`ANNOUNCED_TIMEOUT`].
    pub async fn announced(&self, task: &TaskId) -> Result<(), Vec<NetworkId>> {
        let mut zones = self.shared.zones.subscribe();
        let deadline = Instant::now() + ANNOUNCED_TIMEOUT;
        loop {
            zones.mark_unchanged();
            let wanted = task.clone();
            let Ok(missing) = self.ask(|reply| Message::Unannounced { task: wanted, reply }).await else {
                return Err(Vec::new());
            };
            if missing.is_empty() {
                return Ok(());
            }
            match timeout_at(deadline, zones.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(missing),
            }
        }
    }

    /// The task's ports with a free port of the host for each that was left open (`host_port` 0), none of `avoid`.
    /// They are held until the task's container publishes them or [`OverlayHandle::release`]; the same task gets the
    /// same again meanwhile.
    ///
    /// # Errors
    /// No port is free.
    pub async fn choose_ports(
        &self,
        task: &TaskId,
        ports: Vec<PortBinding>,
        avoid: BTreeSet<(Proto, u16)>,
    ) -> Result<Vec<PortBinding>, OverlayError> {
        let task = task.clone();
        self.ask(|reply| Message::ChoosePorts { task, ports, avoid, reply }).await?
    }

    /// What does not work now, in words; empty when all is well.
    pub fn troubles(&self) -> watch::Receiver<Vec<String>> {
        self.shared.troubles.subscribe()
    }

    /// Endpoints of containers that somebody started by hand, by the engine's ids.
    pub fn by_hand(&self) -> watch::Receiver<BTreeMap<String, ByHand>> {
        self.shared.by_hand.subscribe()
    }

    /// What is wanted and remembered now.
    ///
    /// # Errors
    /// [`OverlayError::Ended`] only.
    pub async fn picture(&self) -> Result<Picture, OverlayError> {
        self.ask(|reply| Message::Picture { reply }).await
    }

    /// How many repairs there were in a namespace since the start, and the last of them. See [`picture`] for its words.
    pub fn repairs(&self, what: &str) -> (u64, Vec<skein_api::Repair>) {
        self.shared.repairs.of(what)
    }

    /// The host has these addresses on the underlay now: packets leave from them, and no container notices. Returns when
    /// the kernel follows it.
    ///
    /// # Errors
    /// As [`OverlayHandle::apply`].
    pub async fn set_underlay(&self, v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> Result<(), OverlayError> {
        self.ask(|reply| Message::Underlay { v4, v6, reply }).await?
    }

    /// Counts changes of the host's own links, addresses and routes.
    pub fn host_changes(&self) -> watch::Receiver<u64> {
        self.shared.host_changes.subscribe()
    }

    /// What the master wants to know of this host's addresses.
    pub fn addresses(&self) -> watch::Receiver<AddressUse> {
        self.shared.addresses.subscribe()
    }

    /// What was counted.
    pub fn counters(&self) -> &OverlayCounters {
        &self.shared.counters
    }

    /// A request of the engine's plugin protocol.
    ///
    /// # Errors
    /// Words for the engine's user.
    pub async fn plugin(&self, request: Request) -> Result<Reply, String> {
        self.ask(|reply| Message::Plugin { request, reply }).await.map_err(|e| e.to_string())?
    }
}
