//! Owns the asynchronous face of netlib: [`Overlay`] for what an agent wants done, [`Watch`] for what happens meanwhile.
//!
//! Calls of one network run one after another, those of different networks side by side; each runs on the blocking
//! pool. A call whose future is dropped runs on to its end.
//!
//! Tasks: one per watched namespace, in a `JoinSet` of [`Watch`], ended when it is dropped. Channels: a `watch` with
//! the number of fabrics made and removed so far, so that a [`Watch`] follows them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    sync::{Notify, watch},
    task::{AbortHandle, JoinSet, spawn_blocking},
};

use crate::{
    driver,
    fast::FastCounters,
    kernel::{Error, HostRoute, Kernel, Scope},
    linux::{
        LinuxKernel,
        watch::{Feed, follow},
    },
    look::{self, Counted, Look},
    plan::Op,
    state::{LinkKind, Observed, Query},
    types::{Endpoint, HostConfig, HostState, Ingress, NetworkId, NetworkState, PublishedPort, Report, Service},
};

type Gate = Arc<tokio::sync::Mutex<()>>;

/// The overlay networks of this host. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Overlay {
    inner: Arc<Inner>,
}

struct Inner {
    config: HostConfig,
    kernel: LinuxKernel,
    /// One gate per scope: a network's calls must not mix. Entries of removed networks stay, some 100 bytes each.
    gates: Mutex<HashMap<Scope, Gate>>,
    /// Counts fabrics made and removed.
    fabrics_tx: watch::Sender<u64>,
    /// What each network's connections were swept for last: reading all connections is dear, and those that must go
    /// become so only by a change of these.
    swept: Mutex<HashMap<NetworkId, Leads>>,
    /// The same for the host's own namespace: the ports that lead into networks on every host.
    host_swept: Mutex<BTreeSet<PublishedPort>>,
}

/// Where connections of a network may be led: services, and ports of every host.
type Leads = (BTreeMap<IpAddr, Service>, Option<Ingress>);

impl Inner {
    /// After a network's rules were brought to `state`.
    fn sweep(&self, state: &NetworkState) -> Result<(), Error> {
        let same = match locked(&self.swept).get(&state.id) {
            Some((services, ingress)) => *services == state.services && *ingress == state.ingress,
            // Nothing is translated where there are no services.
            None => state.services.is_empty(),
        };
        if same {
            return Ok(());
        }
        driver::sweep_connections(&self.kernel, state)?;
        locked(&self.swept).insert(state.id.clone(), (state.services.clone(), state.ingress.clone()));
        Ok(())
    }

    /// After the host's rules were brought to `state`. A fresh process sweeps once.
    fn sweep_host(&self, state: &HostState) -> Result<(), Error> {
        let leads: BTreeSet<_> =
            state.published.iter().filter(|port| state.ingress.contains(&port.target)).cloned().collect();
        if *locked(&self.host_swept) == leads {
            return Ok(());
        }
        driver::sweep_host_connections(&self.kernel, state)?;
        *locked(&self.host_swept) = leads;
        Ok(())
    }
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is kept under these locks is whole at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Overlay {
    /// Opens the overlay with the calling thread's network namespace as the host's. Changes nothing.
    ///
    /// # Errors
    /// When netlink cannot be opened, for want of privilege for example.
    pub fn try_new(config: HostConfig) -> Result<Self, Error> {
        let kernel = LinuxKernel::try_new(&config.netns_dir)?;
        Ok(Self::with_kernel(config, kernel))
    }

    /// Opens the overlay with the given network namespace as the host's. Changes nothing.
    ///
    /// # Errors
    /// As [`Overlay::try_new`].
    pub fn try_new_in(config: HostConfig, host_ns: OwnedFd) -> Result<Self, Error> {
        let kernel = LinuxKernel::try_new_in(&config.netns_dir, host_ns)?;
        Ok(Self::with_kernel(config, kernel))
    }

    fn with_kernel(config: HostConfig, kernel: LinuxKernel) -> Self {
        let (fabrics_tx, _) = watch::channel(0);
        let (gates, swept, host_swept) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { inner: Arc::new(Inner { config, kernel, gates, fabrics_tx, swept, host_swept }) }
    }

    /// The settings it was opened with.
    pub fn config(&self) -> &HostConfig {
        &self.inner.config
    }

    /// Runs blocking work, one at a time per scope.
    async fn run<T: Send + 'static>(
        &self,
        scope: Scope,
        what: &'static str,
        work: impl FnOnce(&Inner) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let gate = Arc::clone(locked(&self.inner.gates).entry(scope).or_default());
        let held = gate.lock_owned().await;
        let inner = Arc::clone(&self.inner);
        let task = spawn_blocking(move || {
            // Held here, so that a dropped future does not let the next call in too early.
            let _held = held;
            work(&inner)
        });
        task.await.map_err(|_| Error::Worker(what))?
    }

    /// Brings a network to `state`: fabric, VXLAN device, peers, endpoints, uplink. Idempotent, and adopts what an
    /// earlier process left without touching it. The report is empty when nothing had to be done.
    ///
    /// `state` is the whole truth: endpoints that it does not name are removed. Take it under the lock that also covers
    /// [`Overlay::add_endpoint`].
    ///
    /// # Errors
    /// When the state is invalid (nothing was changed) or the kernel refuses a change (the others were made).
    pub async fn ensure_network(&self, state: &NetworkState) -> Result<Report, Error> {
        let state = state.clone();
        let scope = Scope::Fabric(state.id.clone());
        self.run(scope, "ensuring a network", move |inner| {
            let before = inner.kernel.networks()?.contains(&state.id);
            let result = driver::ensure_network(&inner.kernel, &inner.config, &state);
            if !before {
                inner.fabrics_tx.send_modify(|count| *count += 1);
            }
            let report = result?;
            inner.sweep(&state)?;
            Ok(report)
        })
        .await
    }

    /// Brings only the rules of a network that is there to `state`: its services and published ports. For changes of
    /// those, which are far more frequent than others. Idempotent.
    ///
    /// # Errors
    /// When the state is invalid, the network does not exist here (nothing was changed), or nft refuses.
    pub async fn ensure_rules(&self, state: &NetworkState) -> Result<Report, Error> {
        let state = state.clone();
        self.run(Scope::Fabric(state.id.clone()), "ensuring rules", move |inner| {
            let report = driver::ensure_rules(&inner.kernel, &inner.config, &state)?;
            inner.sweep(&state)?;
            Ok(report)
        })
        .await
    }

    /// Removes a network with its links, routes and uplink. Answers whether there was one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn remove_network(&self, id: &NetworkId) -> Result<bool, Error> {
        let id = id.clone();
        self.run(Scope::Fabric(id.clone()), "removing a network", move |inner| {
            let result = driver::remove_network(&inner.kernel, &id);
            locked(&inner.swept).remove(&id);
            inner.fabrics_tx.send_modify(|count| *count += 1);
            result
        })
        .await
    }

    /// The networks that exist on this host, in order.
    ///
    /// # Errors
    /// When the directory of namespaces cannot be read.
    pub async fn list_networks(&self) -> Result<Vec<NetworkId>, Error> {
        self.run(Scope::Host, "listing networks", |inner| inner.kernel.networks()).await
    }

    /// Makes a container's veth pair: one end in the fabric with routes and neighbours, the other in the host's
    /// namespace as `container_ifname` (at most 15 bytes, free), down, with MAC and MTU set, for the engine to take.
    /// About 1 ms; reads no tables. Of `network` it uses id, VNI, MTU and gateways. A link left over from an earlier
    /// container with the same address is replaced.
    ///
    /// # Errors
    /// When the network does not exist here, the name is taken, or the kernel refuses; nothing is left behind.
    pub async fn add_endpoint(
        &self,
        network: &NetworkState,
        endpoint: &Endpoint,
        container_ifname: &str,
    ) -> Result<(), Error> {
        let (endpoint, ifname) = (endpoint.clone(), container_ifname.to_owned());
        // Peers are not needed, and there may be thousands.
        let network = NetworkState {
            local_blocks: BTreeSet::new(),
            peers: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            published: BTreeSet::new(),
            services: BTreeMap::new(),
            ingress: None,
            id: network.id.clone(),
            ..*network
        };
        self.run(Scope::Fabric(network.id.clone()), "adding an endpoint", move |inner| {
            driver::add_endpoint(&inner.kernel, &network, &endpoint, &ifname)?;
            driver::speed_up_endpoint(&inner.kernel, &inner.config, &network, &endpoint);
            Ok(())
        })
        .await
    }

    /// Removes a container's veth pair with its routes, wherever the container's end is. Idempotent.
    ///
    /// # Errors
    /// When the network does not exist here or the kernel refuses.
    pub async fn remove_endpoint(&self, id: &NetworkId, endpoint: &Endpoint) -> Result<(), Error> {
        let (id, endpoint) = (id.clone(), endpoint.clone());
        self.run(Scope::Fabric(id.clone()), "removing an endpoint", move |inner| {
            driver::remove_endpoint(&inner.kernel, &id, &endpoint)
        })
        .await
    }

    /// Why the kernel refused a program of the fast path, if it did: every packet goes the routed way.
    pub fn fast_path_refused(&self) -> Option<&str> {
        self.inner.kernel.fast_path_refused()
    }

    /// What the fast path of a network counted since its programs were loaded.
    ///
    /// # Errors
    /// When the network does not exist here or it cannot be read.
    pub async fn fast_counters(&self, id: &NetworkId) -> Result<FastCounters, Error> {
        let id = id.clone();
        let scope = Scope::Fabric(id.clone());
        self.run(scope, "reading the fast path's counters", move |inner| inner.kernel.fast_counters(&id)).await
    }

    /// Brings the host's sysctls, guards, published ports and `DOCKER-USER` rules to `state`. Idempotent.
    ///
    /// # Errors
    /// When the state is invalid (nothing was changed) or the kernel refuses a change (the others were made).
    pub async fn ensure_host(&self, state: &HostState) -> Result<Report, Error> {
        let state = state.clone();
        self.run(Scope::Host, "ensuring the host", move |inner| {
            let report = driver::ensure_host(&inner.kernel, &inner.config, &state)?;
            inner.sweep_host(&state)?;
            Ok(report)
        })
        .await
    }

    /// Removes our nft table and `DOCKER-USER` rules from the host's namespace, for a host that leaves. Sysctls stay:
    /// others may rely on them. Networks are removed one by one with [`Overlay::remove_network`].
    ///
    /// # Errors
    /// When nft or iptables refuses.
    pub async fn remove_host(&self) -> Result<(), Error> {
        self.run(Scope::Host, "removing the host's rules", |inner| inner.kernel.remove_host_rules()).await
    }

    /// Binds a UDP socket, nonblocking, inside a network's fabric, on its gateway for example.
    ///
    /// # Errors
    /// When the network does not exist here or the address cannot be bound.
    pub async fn udp_socket_in(&self, id: &NetworkId, addr: SocketAddr) -> Result<UdpSocket, Error> {
        let scope = Scope::Fabric(id.clone());
        self.run(scope.clone(), "opening a socket", move |inner| inner.kernel.udp_socket_in(&scope, addr)).await
    }

    /// Binds a TCP listener, nonblocking, inside a network's fabric.
    ///
    /// # Errors
    /// When the network does not exist here or the address cannot be bound.
    pub async fn tcp_listener_in(&self, id: &NetworkId, addr: SocketAddr) -> Result<TcpListener, Error> {
        let scope = Scope::Fabric(id.clone());
        self.run(scope.clone(), "opening a listener", move |inner| inner.kernel.tcp_listener_in(&scope, addr)).await
    }

    /// A network as it shall be beside what it is; changes nothing.
    ///
    /// # Errors
    /// When the state is invalid, the network does not exist here, or it cannot be read.
    pub async fn look_network(&self, state: &NetworkState) -> Result<Vec<Look>, Error> {
        let state = state.clone();
        self.run(Scope::Fabric(state.id.clone()), "looking at a network", move |inner| {
            look::network(&inner.kernel, &inner.config, &state)
        })
        .await
    }

    /// What is ours in the host's namespace as it shall be beside what it is; changes nothing.
    ///
    /// # Errors
    /// When the state is invalid or the namespace cannot be read.
    pub async fn look_host(&self, state: &HostState) -> Result<Look, Error> {
        let state = state.clone();
        self.run(Scope::Host, "looking at the host", move |inner| look::host(&inner.kernel, &inner.config, &state))
            .await
    }

    /// What the kernel has counted in a namespace.
    ///
    /// # Errors
    /// When there is no such network or the counters cannot be read.
    pub async fn counted(&self, scope: &Scope) -> Result<Counted, Error> {
        let asked = scope.clone();
        self.run(scope.clone(), "reading counters", move |inner| inner.kernel.counted(&asked)).await
    }

    /// Runs blocking work on a thread inside the namespace that `path` shows, a container's; beside everything else.
    ///
    /// # Errors
    /// As [`LinuxKernel::run_at`].
    pub async fn run_at<T: Send + 'static>(
        &self,
        path: PathBuf,
        verb: &'static str,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.inner);
        let task = spawn_blocking(move || inner.kernel.run_at(&path, verb, work));
        task.await.map_err(|_| Error::Worker("work in a namespace"))?
    }

    /// Runs blocking work on a thread inside a namespace; beside everything else.
    ///
    /// # Errors
    /// When there is no such network, or what `work` says.
    pub async fn run_in<T: Send + 'static>(
        &self,
        scope: Scope,
        verb: &'static str,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.inner);
        let task = spawn_blocking(move || inner.kernel.run_in(&scope, verb, work));
        task.await.map_err(|_| Error::Worker("work in a namespace"))?
    }

    /// Gives a network's fabric an address of its own on `lo`, beside the gateway. It is not part of any wanted state, and
    /// no audit removes it: the caller does, with [`Overlay::remove_local`]. Idempotent.
    ///
    /// # Errors
    /// When there is no such network or the kernel refuses.
    pub async fn add_local(&self, id: &NetworkId, addr: IpAddr) -> Result<(), Error> {
        let scope = Scope::Fabric(id.clone());
        let op = Op::AddAddr("lo".to_owned(), addr.into());
        self.run(scope.clone(), "adding an address", move |inner| inner.kernel.apply(&scope, &[op])).await
    }

    /// Takes an address from `lo` of a network's fabric. That it is not there, or the network, is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn remove_local(&self, id: &NetworkId, addr: IpAddr) -> Result<(), Error> {
        let scope = Scope::Fabric(id.clone());
        let op = Op::DeleteAddr("lo".to_owned(), addr.into());
        let removed =
            self.run(scope.clone(), "removing an address", move |inner| inner.kernel.apply(&scope, &[op])).await;
        match removed {
            Err(Error::NoNetwork(_)) => Ok(()),
            other => other,
        }
    }

    /// VXLAN devices in the host's namespace on the port of ours, with their VNI: ours are in namespaces of their own.
    ///
    /// # Errors
    /// When the links cannot be read.
    pub async fn foreign_vxlans(&self) -> Result<Vec<(String, u32)>, Error> {
        let port = self.config().vxlan_port;
        self.run(Scope::Host, "reading links", move |inner| {
            let query = Query { objects: true, only_our_routes: true, ..Query::default() };
            let links = inner.kernel.observe(&Scope::Host, &query)?.links;
            let of_port = links.into_iter().filter_map(|(name, link)| match link.kind {
                LinkKind::Vxlan(vxlan) | LinkKind::LearningVxlan(vxlan) if vxlan.port == port => {
                    Some((name, vxlan.vni))
                }
                _ => None,
            });
            Ok(of_port.collect())
        })
        .await
    }

    /// Reads the links, addresses and routes of the namespace that `path` shows, a container's.
    ///
    /// # Errors
    /// As [`LinuxKernel::observe_at`].
    pub async fn observe_at(&self, path: PathBuf) -> Result<Observed, Error> {
        let inner = Arc::clone(&self.inner);
        let task = spawn_blocking(move || inner.kernel.observe_at(&path));
        task.await.map_err(|_| Error::Worker("looking into a namespace"))?
    }

    /// Rules of others that may drop packets on their way in, of the host and of a network, in words. Those that name
    /// the VXLAN port come first.
    ///
    /// # Errors
    /// When there is no such network or nft cannot list rules.
    pub async fn foreign_drops(&self, network: &Scope) -> Result<Vec<String>, Error> {
        let (network, port) = (network.clone(), self.config().vxlan_port);
        self.run(network.clone(), "reading foreign rules", move |inner| {
            let mut rules = inner.kernel.foreign_drops(&Scope::Host, port)?;
            rules.extend(inner.kernel.foreign_drops(&network, port)?);
            let of_port = port.to_string();
            rules.sort_by_key(|rule| !rule.contains(&of_port));
            Ok(rules)
        })
        .await
    }

    /// The host's routes that are neither ours nor default nor link-local, to check a new subnet against.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn host_routes(&self) -> Result<Vec<HostRoute>, Error> {
        self.run(Scope::Host, "reading routes", |inner| inner.kernel.host_routes()).await
    }

    /// MTU in bytes of the host's device `dev`, or else of the one that has `addr`.
    ///
    /// # Errors
    /// When there is no such device.
    pub async fn underlay_mtu(&self, dev: Option<&str>, addr: IpAddr) -> Result<u32, Error> {
        let dev = dev.map(str::to_owned);
        self.run(Scope::Host, "reading the mtu", move |inner| inner.kernel.underlay_mtu(dev.as_deref(), addr)).await
    }

    /// What the host's way to each of these VTEPs takes, bytes; see [`LinuxKernel::path_mtus`].
    ///
    /// # Errors
    /// When the host's namespace cannot be entered.
    pub async fn path_mtus(&self, peers: BTreeSet<IpAddr>) -> Result<BTreeMap<IpAddr, u32>, Error> {
        let local = self.inner.config.vtep;
        self.run(Scope::Host, "reading the mtu of paths", move |inner| inner.kernel.path_mtus(local, &peers)).await
    }

    /// Subscribes to changes in the host's namespace and every fabric, also those made later. Subscribe first, then
    /// ensure, then follow.
    ///
    /// # Errors
    /// When a subscription cannot be opened.
    pub async fn watch(&self) -> Result<Watch, Error> {
        let mut watch = Watch {
            overlay: self.clone(),
            shared: Arc::default(),
            fabrics_rx: self.inner.fabrics_tx.subscribe(),
            tasks: JoinSet::new(),
            followed: BTreeMap::new(),
            followed_at: None,
        };
        let count = *watch.fabrics_rx.borrow_and_update();
        watch.follow_all().await?;
        watch.followed_at = Some(count);
        Ok(watch)
    }
}

/// What changed and has not been told yet: at most one entry per namespace.
#[derive(Default)]
struct Shared {
    dirty: Mutex<BTreeSet<Scope>>,
    notify: Notify,
}

/// Tells which namespaces changed, coalesced: a thousand changes between two calls are one. Our own changes count too;
/// the `ensure_*` that follows them finds nothing to do.
///
/// A change in the host's namespace calls for [`Overlay::ensure_host`] and [`Overlay::ensure_network`] of every network
/// that is not internal: their uplinks end there, and its addresses stand in their tables of published ports. Sysctls do
/// not notify; a timer is needed beside this.
pub struct Watch {
    overlay: Overlay,
    shared: Arc<Shared>,
    fabrics_rx: watch::Receiver<u64>,
    tasks: JoinSet<()>,
    followed: BTreeMap<Scope, AbortHandle>,
    /// The count of fabrics made and removed when `followed` was last brought up to date.
    followed_at: Option<u64>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("followed", &self.followed.keys()).finish_non_exhaustive()
    }
}

impl Watch {
    /// Waits until something changed, and tells where. Cancel-safe: what was not told yet stays.
    ///
    /// # Errors
    /// When a new fabric cannot be subscribed to; it is tried again on the next call.
    pub async fn changed(&mut self) -> Result<Vec<Scope>, Error> {
        loop {
            let count = *self.fabrics_rx.borrow_and_update();
            if self.followed_at != Some(count) {
                self.follow_all().await?;
                self.followed_at = Some(count);
            }
            {
                let mut dirty = locked(&self.shared.dirty);
                if !dirty.is_empty() {
                    return Ok(std::mem::take(&mut *dirty).into_iter().collect());
                }
            }
            // All cancel-safe: a permit that is not taken stays, and the other two are looked at again above.
            tokio::select! {
                () = self.shared.notify.notified() => {}
                // The sender lives in `overlay`, which is ours.
                changed = self.fabrics_rx.changed() => changed.map_err(|_| Error::Worker("watching"))?,
                // A subscription that broke is opened again.
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    self.followed.retain(|_, task| !task.is_finished());
                    self.followed_at = None;
                }
            }
        }
    }

    /// Starts a task for each namespace that has none and ends those whose fabric is gone: a socket would keep it.
    async fn follow_all(&mut self) -> Result<(), Error> {
        let overlay = self.overlay.clone();
        let networks = overlay.list_networks().await?;
        let scopes: BTreeSet<Scope> =
            networks.into_iter().map(Scope::Fabric).chain(std::iter::once(Scope::Host)).collect();
        self.followed.retain(|scope, task| {
            let stays = scopes.contains(scope);
            if !stays {
                task.abort();
            }
            stays
        });
        for scope in scopes {
            if self.followed.contains_key(&scope) {
                continue;
            }
            let feed = match Feed::open(&overlay.inner.kernel, &scope) {
                Ok(feed) => feed,
                // Removed since it was listed.
                Err(Error::NoNetwork(_)) => continue,
                Err(error) => return Err(error),
            };
            let shared = Arc::clone(&self.shared);
            let task = self.tasks.spawn(follow(feed, move |scope| {
                locked(&shared.dirty).insert(scope.clone());
                shared.notify.notify_one();
            }));
            // What changed before the subscription is told once.
            locked(&self.shared.dirty).insert(scope.clone());
            self.followed.insert(scope, task);
        }
        Ok(())
    }
}
