//! The overlay's actor: one owner of all its state.
//!
//! Owns: assignments, leases, the plugin's memory, the name server's sockets (a service manager may keep copies, see
//! `fdstore`), and when the kernel is looked at. Must not know: the engine, the master. One task; it reads its requests from a bounded `mpsc`, netlib's watch, and two
//! timers. Requests run one after another: each takes a few milliseconds, a whole `apply` as long as the kernel does.
//!
//! `requests`: what the engine asks for. `ports`: ports of the host. `disk`: what is remembered, and what does not work.
//! `names`: the zone and its sockets. `look`: pictures of it. `underlay`: what packets between hosts travel on.
//!
//! The kernel is checked (*audit*): what changed according to netlink half a second later, everything once a minute.

mod disk;
mod look;
mod names;
mod ports;
mod requests;
mod underlay;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use agent_core::lease::{LEASE_PREFIX, Leases};
use netlib::{HostConfig, HostIndex, Ingress, Report, Scope};
use skein_api::{
    EndpointAssignment, NetworkAssignment, NetworkId, PeerAssignment, ServiceAssignment, TaskAddress, TaskId, address6,
};
use skein_daemon::chain;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use self::disk::Topic;
use super::{
    AddressUse, ByHand, Message, OverlayConfig, OverlayCounters, OverlayError, Shared, Wanted,
    claims::Claims,
    desired::{self, Services},
    picture::{OF_HOST, of_network},
    store::{Change, LocalStore, StoreError},
};
use crate::{
    dns::{DnsServer, Serving},
    fdstore::FdStore,
    plugin::{PluginEndpoint, PluginState, wire::PortBinding},
};

/// Keys of the networks that this host had last, so that the plugin knows them before the first `apply`.
const NETWORK_PREFIX: &str = "overlay/network/";
/// Keys of the plugin's memory.
const PLUGIN_PREFIX: &str = "plugin/";
/// Everything is checked this often, whatever netlink says.
const FULL_AUDIT: Duration = Duration::from_secs(60);
/// From netlink's first word to the check: changes come in bursts, most of them our own.
const DEBOUNCE: Duration = Duration::from_millis(500);
/// Why the kernel is being brought to its state, which decides how loudly its changes are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// We were asked for something: changes are expected.
    Request,
    /// Nobody asked: changes are repairs.
    Audit,
}

/// The name server's tasks of one network.
#[derive(Debug)]
struct Served {
    /// Inode of the namespace that the sockets are in; another one means that the fabric was made anew.
    inode: u64,
    v4: Serving,
    v6: Option<Serving>,
}

pub(super) struct Actor {
    config: OverlayConfig,
    store: Arc<dyn LocalStore>,
    shared: Arc<Shared>,
    netlib: Option<netlib::Overlay>,
    watch: Option<netlib::Watch>,
    /// What the host's way to each peer takes, bytes.
    paths: BTreeMap<IpAddr, u32>,
    /// Assigned networks, and those that are no more but still have containers.
    known: BTreeMap<NetworkId, NetworkAssignment>,
    /// Those of `known` that the master has taken away.
    retired: BTreeSet<NetworkId>,
    peers: BTreeMap<NetworkId, Vec<PeerAssignment>>,
    services: Vec<ServiceAssignment>,
    endpoints: Vec<EndpointAssignment>,
    /// Where the virtual addresses of each network lead: what follows from the two above.
    backends: BTreeMap<NetworkId, Services>,
    leases: Leases,
    plugin: PluginState,
    claims: Claims,
    /// This host's own address in each network that has one, with the ports of every host that lead there from here.
    ingress: BTreeMap<NetworkId, Ingress>,
    /// Such addresses in networks that are no more, until connections to them were forgotten.
    left: BTreeSet<IpAddr>,
    /// Tasks of this host that are about to stop: their published ports take no new connections.
    draining: BTreeSet<TaskId>,
    /// Host ports that were chosen for a task whose container has not published them yet. Bounded by the host's tasks.
    chosen: BTreeMap<TaskId, Vec<PortBinding>>,
    dns: Arc<DnsServer>,
    served: BTreeMap<NetworkId, Served>,
    sockets: FdStore,
    /// Local containers in the zone that was published last.
    sandboxes: Vec<Vec<(NetworkId, Vec<IpAddr>)>>,
    /// Peers are known only after the first `apply`: before it nothing is ensured, since that would cut them off.
    applied: bool,
    /// The last look at everything found or made all of it so.
    ensured: bool,
    dirty: BTreeSet<Scope>,
    audit_at: Option<Instant>,
    /// Changes that the disk refused, by key.
    behind: BTreeMap<String, Change>,
    troubles: BTreeMap<Topic, String>,
}

impl Actor {
    pub(super) fn load(
        config: OverlayConfig,
        store: Arc<dyn LocalStore>,
        dns: Arc<DnsServer>,
        sockets: FdStore,
        shared: Arc<Shared>,
    ) -> Result<Self, OverlayError> {
        let mut known = BTreeMap::new();
        for (key, json) in store.load(NETWORK_PREFIX)? {
            match serde_json::from_str::<NetworkAssignment>(&json) {
                Ok(network) => drop(known.insert(network.id.clone(), network)),
                Err(error) => tracing::warn!(key, %error, "damaged local state was left out"),
            }
        }
        let (mut leases, damaged_leases) = Leases::load(&store.load(LEASE_PREFIX)?);
        let plugin = PluginState::load(&store.load(PLUGIN_PREFIX)?);
        for key in &damaged_leases {
            tracing::warn!(key, "damaged local state was left out");
        }
        let mut troubles = BTreeMap::new();
        for key in plugin.damaged() {
            tracing::error!(key, "local state is damaged: links of the kernel that it may be about are left alone");
            let words = format!(
                "local state {key} is damaged; its container goes on, but cannot be started again or publish ports \
                 before it was removed and made anew"
            );
            troubles.insert(Topic::Damage(key.to_owned()), words);
        }
        let mut behind = BTreeMap::new();
        for endpoint in plugin.endpoints().values() {
            if let Some(change) = leases.adopt(&endpoint.network, endpoint.v4, Some(endpoint.mac.to_string())) {
                behind.insert(change.key().to_owned(), change);
            }
        }
        shared.troubles.send_replace(troubles.values().cloned().collect());
        shared.networks.store(Arc::new(known.clone()));
        Ok(Self {
            config,
            store,
            shared,
            netlib: None,
            watch: None,
            paths: BTreeMap::new(),
            known,
            retired: BTreeSet::new(),
            peers: BTreeMap::new(),
            services: Vec::new(),
            endpoints: Vec::new(),
            backends: BTreeMap::new(),
            leases,
            plugin,
            claims: Claims::default(),
            ingress: BTreeMap::new(),
            left: BTreeSet::new(),
            draining: BTreeSet::new(),
            chosen: BTreeMap::new(),
            dns,
            served: BTreeMap::new(),
            sockets,
            sandboxes: Vec::new(),
            applied: false,
            ensured: false,
            dirty: BTreeSet::new(),
            audit_at: None,
            behind,
            troubles,
        })
    }

    pub(super) async fn run(mut self, mut messages_rx: mpsc::Receiver<Message>) {
        let mut full = interval(FULL_AUDIT);
        full.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick comes at once; the first apply audits anyway.
        full.tick().await;
        self.write_behind().await;
        self.tell_by_hand();
        // Ports are held again before anybody can take them; a failure shows at the next start of the container.
        self.hold_ports();
        loop {
            let audit_at = self.audit_at.unwrap_or_else(Instant::now);
            // All branches are cancel-safe: a receiver, a watch that keeps what it has not told, and timers.
            tokio::select! {
                message = messages_rx.recv() => match message {
                    Some(message) => {
                        self.message(message).await;
                        self.tell_addresses();
                    }
                    None => break,
                },
                scopes = changed(&mut self.watch) => self.changed(scopes),
                () = sleep_until(audit_at), if self.audit_at.is_some() => self.audit_dirty().await,
                _ = full.tick() => self.audit_all().await,
            }
        }
    }

    async fn message(&mut self, message: Message) {
        // An asker that is gone wants no answer.
        match message {
            Message::Apply { wanted, reply } => {
                let _ = reply.send(self.apply(wanted).await);
            }
            Message::Plugin { request, reply } => {
                let _ = reply.send(self.plugin_request(request).await);
            }
            Message::Reserve { task, network, asked, reply } => {
                let _ = reply.send(self.reserve(&task, &network, asked).await);
            }
            Message::Underlay { v4, v6, reply } => {
                let _ = reply.send(self.set_underlay(v4, v6).await);
            }
            Message::Unannounced { task, reply } => {
                let named = |n: &NetworkId| self.endpoints.iter().any(|e| e.task == task && e.network == *n);
                let mut networks = self.leases.networks_of(&task);
                networks.retain(|n| !named(n));
                let _ = reply.send(networks);
            }
            Message::Release { task, reply } => {
                let changes = self.leases.release(&task, |network, a| self.plugin.has_address(network, a));
                self.persist_or_warn(changes).await;
                if self.chosen.remove(&task).is_some() {
                    self.hold_ports();
                }
                let _ = reply.send(());
            }
            Message::Picture { reply } => {
                let _ = reply.send(self.picture());
            }
            Message::ChoosePorts { task, ports, avoid, reply } => {
                let _ = reply.send(self.choose_ports(task, &ports, &avoid));
            }
        }
    }

    // --- assignments ---

    async fn apply(&mut self, wanted: Wanted) -> Result<(), OverlayError> {
        let Wanted { networks, peers, services, endpoints } = wanted;
        let mut wanted: BTreeMap<NetworkId, NetworkAssignment> =
            networks.into_iter().map(|n| (n.id.clone(), n)).collect();
        self.retired.clear();
        for (id, old) in &self.known {
            if !wanted.contains_key(id) && self.uses(id) {
                tracing::warn!(network = %old.name, "network was removed but still has containers: it stays until they leave");
                self.retired.insert(id.clone());
                wanted.insert(id.clone(), old.clone());
            }
        }
        let mut by_network: BTreeMap<NetworkId, Vec<PeerAssignment>> = BTreeMap::new();
        for peer in peers {
            by_network.entry(peer.network.clone()).or_default().push(peer);
        }
        let backends = desired::services(&services, &endpoints);
        // Most changes are of endpoints, which are the name server's and of the rules for services: the rest of the
        // kernel's state need not be read for them.
        let same = self.ensured && wanted == self.known && by_network == self.peers;
        let mut changes = self.set_known(wanted);
        self.peers = by_network;
        self.services = services;
        self.endpoints = endpoints;
        let before = std::mem::replace(&mut self.backends, backends);
        let (ingress, draining) = (self.ingress.clone(), self.draining.clone());
        self.draining = desired::draining(&self.endpoints, &self.plugin);
        changes.extend(self.reserve_own());
        self.hold_ports();
        if !self.applied {
            self.end_checks().await;
        }
        self.applied = true;
        self.publish_zone();
        let stored = self.persist(changes).await;
        if same {
            let stops = |id: &NetworkId| self.publishes(id, &draining) != self.publishes(id, &self.draining);
            let differs = |id: &&NetworkId| {
                before.get(*id) != self.backends.get(*id) || ingress.get(*id) != self.ingress.get(*id) || stops(id)
            };
            let turned: Vec<NetworkId> = self.known.keys().filter(differs).cloned().collect();
            let services = self.ensure_services(&turned).await;
            if ingress != self.ingress || draining != self.draining {
                self.ensure_host(Cause::Request).await?;
            }
            services?;
        } else {
            self.look_at_paths().await;
            self.ensure_all(Cause::Request).await?;
        }
        stored?;
        Ok(())
    }

    /// Those of `tasks` that have a place in a network.
    fn publishes<'a>(&self, network: &NetworkId, tasks: &'a BTreeSet<TaskId>) -> BTreeSet<&'a TaskId> {
        let here = |task: &&TaskId| self.plugin.joined(network).any(|(_, e)| e.task.as_ref() == Some(*task));
        tasks.iter().filter(here).collect()
    }

    /// Whether a container may be in this network.
    fn uses(&self, network: &NetworkId) -> bool {
        let unreadable = || self.plugin.misses_endpoints() && self.leases.asked_for(network).next().is_some();
        self.plugin.uses(network) || unreadable()
    }

    /// Makes these the networks of this host, and forgets what belongs to others.
    fn set_known(&mut self, wanted: BTreeMap<NetworkId, NetworkAssignment>) -> Vec<Change> {
        let keep: BTreeSet<NetworkId> = wanted.keys().cloned().collect();
        let gone = self.ingress.iter().filter(|(id, _)| !keep.contains(*id));
        self.left.extend(gone.flat_map(|(_, ingress)| ingress.addrs()));
        let mut changes = self.plugin.retain_networks(&keep);
        changes.extend(self.leases.retain_networks(&keep));
        for (id, network) in &wanted {
            if self.known.get(id) != Some(network) {
                let json = serde_json::to_string(network).expect("only string keys");
                changes.push(Change::Put(format!("{NETWORK_PREFIX}{id}"), json));
            }
        }
        let gone = self.known.keys().filter(|id| !keep.contains(*id));
        changes.extend(gone.map(|id| Change::Delete(format!("{NETWORK_PREFIX}{id}"))));
        self.known = wanted;
        self.shared.networks.store(Arc::new(self.known.clone()));
        self.retain_troubles();
        changes
    }

    /// Removes networks that the master has taken away, once their last container has left.
    async fn remove_retired(&mut self) {
        let free: Vec<NetworkId> = self.retired.iter().filter(|id| !self.uses(id)).cloned().collect();
        if free.is_empty() {
            return;
        }
        let mut wanted = self.known.clone();
        for id in &free {
            self.retired.remove(id);
            wanted.remove(id);
        }
        let changes = self.set_known(wanted);
        self.persist_or_warn(changes).await;
        self.publish_zone();
        warn_of(self.ensure_all(Cause::Request).await);
    }

    async fn reserve(
        &mut self,
        task: &TaskId,
        network: &NetworkId,
        asked: Option<Ipv4Addr>,
    ) -> Result<TaskAddress, OverlayError> {
        let ours = self.known.get(network).ok_or_else(|| OverlayError::UnknownNetwork(network.clone()))?;
        let before = self.leases.clone();
        let in_use = |network: &NetworkId, address| self.plugin.has_address(network, address);
        let (v4, change) = self.leases.reserve(ours, task, asked, in_use)?;
        let v6 = address6(ours.subnet6, ours.subnet4, v4);
        let keys: Vec<String> = change.iter().map(|c| c.key().to_owned()).collect();
        if let Err(error) = self.persist(change).await {
            // Else the next to ask would be given what no disk has.
            self.leases = before;
            self.rewrite(&keys).await;
            return Err(error.into());
        }
        Ok(TaskAddress { network: network.clone(), v4: Some(v4), v6: Some(v6) })
    }

    /// What the master asked about addresses that are frozen here. Both come from the same memory, so an answer counts
    /// every address that was given before the freeze.
    fn tell_addresses(&self) {
        let now = AddressUse { frozen: self.leases.frozen(self.known.values()), plain: self.leases.plain() };
        self.shared.addresses.send_if_modified(|told| {
            let changed = *told != now;
            *told = now;
            changed
        });
    }

    // --- the kernel ---

    /// netlib, opened for this host's number as the networks say it; again if the master gave it another.
    async fn netlib(&mut self) -> Result<netlib::Overlay, OverlayError> {
        let mut indexes = self.known.values().map(|n| n.host_index);
        let current = self.netlib.as_ref().map(|n| n.config().host.0);
        let index = indexes.next().or(current).unwrap_or(0);
        if let Some(other) = indexes.find(|i| *i != index) {
            return Err(OverlayError::HostIndex(index, other));
        }
        let vtep = self.config.vtep().ok_or(OverlayError::NoUnderlay)?;
        let same = |n: &&netlib::Overlay| (n.config().host.0, n.config().vtep) == (index, vtep);
        if let Some(netlib) = self.netlib.as_ref().filter(same) {
            return Ok(netlib.clone());
        }
        let failed = |source| OverlayError::Kernel { what: "the host's namespace".into(), source };
        let mut config = HostConfig::new(HostIndex(index), vtep, netlib::types::MTU_MAX);
        config.vxlan_port = self.config.vxlan_port;
        config.fast_path = self.config.fast_path;
        config.netns_dir = self.config.netns_dir.clone();
        let probe = netlib::Overlay::try_new(config.clone()).map_err(failed)?;
        config.underlay_mtu = probe.underlay_mtu(None, vtep).await.map_err(failed)?;
        let netlib = netlib::Overlay::try_new(config).map_err(failed)?;
        self.watch = match netlib.watch().await {
            Ok(watch) => Some(watch),
            Err(error) => {
                tracing::warn!(%error, "failed to watch the kernel: differences are found once a minute only");
                None
            }
        };
        self.netlib = Some(netlib.clone());
        Ok(netlib)
    }

    /// Everything: networks, the host, and what is no more. Goes on after a failure and gives the first.
    async fn ensure_all(&mut self, cause: Cause) -> Result<(), OverlayError> {
        // Of networks that are no more, perhaps since before this agent started: they would keep the namespace.
        self.sockets.release(|name, _| !self.known.contains_key(&name.network)).await;
        if self.known.is_empty() && self.netlib.is_none() && !self.config.netns_dir.exists() {
            // A host that never had a network: nothing to look at, and no privilege needed.
            return Ok(());
        }
        let mut first = Ok(());
        let mut note = |result: Result<(), OverlayError>| {
            if let Err(error) = result
                && first.is_ok()
            {
                first = Err(error);
            }
        };
        for id in self.known.keys().cloned().collect::<Vec<_>>() {
            note(self.ensure_network(&id, cause).await);
        }
        let removed = self.remove_unknown(cause).await;
        self.trouble(Topic::Cleanup, removed.as_ref().err().map(|e| chain(e)));
        note(removed);
        if !self.known.is_empty() {
            note(self.ensure_host(cause).await);
        } else if cause == Cause::Request {
            // Without a network the guard of the VXLAN port would only be in the way of others.
            note(self.remove_host().await);
        }
        self.ensured = first.is_ok();
        first
    }

    async fn ensure_network(&mut self, id: &NetworkId, cause: Cause) -> Result<(), OverlayError> {
        let result = self.try_ensure_network(id, cause).await;
        self.trouble(Topic::Network(id.clone()), words_of(&result));
        result.map(drop)
    }

    /// The rules of networks whose services changed. Goes on after a failure and gives the first.
    async fn ensure_services(&mut self, networks: &[NetworkId]) -> Result<(), OverlayError> {
        let mut first = Ok(());
        for id in networks {
            let result = self.try_ensure_services(id).await;
            if let Err(error) = result {
                // The next look is at all of it.
                self.ensured = false;
                self.trouble(Topic::Network(id.clone()), Some(chain(&error)));
                first = first.and(Err(error));
            }
        }
        first
    }

    async fn try_ensure_services(&mut self, id: &NetworkId) -> Result<(), OverlayError> {
        let netlib = self.netlib().await?;
        let (state, _) = self.network_state(id, netlib.config().vtep)?;
        let what = of_network(&self.known[id].name);
        let report = netlib.ensure_rules(&state).await.map_err(self.failed(&what))?;
        self.tell(&what, Cause::Request, &report);
        Ok(())
    }

    /// Counts a failure of the kernel and says of what.
    fn failed(&self, what: &str) -> impl FnOnce(netlib::Error) -> OverlayError {
        move |source| {
            OverlayCounters::add(&self.shared.counters.failures_total, 1);
            OverlayError::Kernel { what: what.to_owned(), source }
        }
    }

    /// Fits a network to what the underlay takes.
    fn fit(&self, state: &mut netlib::NetworkState) {
        if let Some(netlib) = &self.netlib {
            desired::fit(state, netlib.config().vtep, netlib.config().underlay_mtu, &self.paths);
        }
    }

    /// What a network shall be, and which of its hosts cannot be reached.
    fn network_state(
        &self,
        id: &NetworkId,
        vtep: IpAddr,
    ) -> Result<(netlib::NetworkState, Vec<desired::Unreachable>), OverlayError> {
        let ours = self.known.get(id).ok_or_else(|| OverlayError::UnknownNetwork(id.clone()))?;
        let peers = self.peers.get(id).map_or(&[][..], Vec::as_slice);
        let plugin = (&self.plugin, &self.draining);
        let (mut state, unreachable) = desired::network(ours, peers, plugin, &self.leases, vtep)
            .map_err(|source| OverlayError::Invalid { network: id.clone(), source })?;
        self.fit(&mut state);
        state.services = self.backends.get(id).cloned().unwrap_or_default();
        state.ingress = self.ingress.get(id).cloned();
        Ok((state, unreachable))
    }

    /// The answer is what is in the way.
    async fn try_ensure_network(&mut self, id: &NetworkId, cause: Cause) -> Result<Vec<String>, OverlayError> {
        let netlib = self.netlib().await?;
        let vtep = netlib.config().vtep;
        let (state, unreachable) = self.network_state(id, vtep)?;
        let what = of_network(&self.known[id].name);
        let report = netlib.ensure_network(&state).await.map_err(self.failed(&what))?;
        self.tell(&what, cause, &report);
        self.serve_names(&netlib, id, &state).await?;
        match unreachable.into_iter().next() {
            Some(desired::Unreachable { network, node }) => Err(OverlayError::Unreachable { network, node, vtep }),
            None => {
                let refused = netlib.fast_path_refused().map(|why| format!("there is no fast path: {why}"));
                Ok(in_the_way(&report).chain(refused).collect())
            }
        }
    }

    async fn ensure_host(&mut self, cause: Cause) -> Result<(), OverlayError> {
        let result = self.try_ensure_host(cause).await;
        self.trouble(Topic::Host, words_of(&result));
        result.map(drop)
    }

    /// The answer is what is in the way.
    async fn try_ensure_host(&mut self, cause: Cause) -> Result<Vec<String>, OverlayError> {
        let netlib = self.netlib().await?;
        let peers = self.peers.values().flatten();
        let plugin = (&self.plugin, &self.draining);
        let mut state = desired::host(self.known.values(), peers, plugin, &self.ingress, netlib.config().vtep);
        state.ingress.extend(&self.left);
        let what = OF_HOST;
        let report = netlib.ensure_host(&state).await.map_err(self.failed(what))?;
        self.left.clear();
        self.tell(what, cause, &report);
        Ok(in_the_way(&report).collect())
    }

    async fn remove_host(&mut self) -> Result<(), OverlayError> {
        let failed = |source| OverlayError::Kernel { what: "the end of the host's rules".into(), source };
        self.netlib().await?.remove_host().await.map_err(failed)
    }

    /// Removes fabrics of networks that this host has no more.
    async fn remove_unknown(&mut self, cause: Cause) -> Result<(), OverlayError> {
        let netlib = self.netlib().await?;
        let failed = |what: String| move |source| OverlayError::Kernel { what, source };
        for id in netlib.list_networks().await.map_err(failed("the list of networks".into()))? {
            let network = NetworkId::new(id.as_str());
            if self.known.contains_key(&network) {
                continue;
            }
            if self.plugin.uses(&network) {
                // Its own document was lost, and no master has told of it yet.
                tracing::warn!(%network, "network is not known but has containers: it stays until they leave");
                continue;
            }
            // Its sockets first: they would keep the namespace.
            self.served.remove(&network);
            netlib.remove_network(&id).await.map_err(failed(format!("the end of network {id}")))?;
            tracing::info!(network = %id, ?cause, "removed a network");
        }
        self.served.retain(|id, _| self.known.contains_key(id));
        Ok(())
    }

    fn tell(&self, what: &str, cause: Cause, report: &Report) {
        let counters = &self.shared.counters;
        OverlayCounters::add(&counters.audits_total, 1);
        for change in &report.changes {
            match cause {
                Cause::Request => tracing::info!(what, change, "changed the kernel's state"),
                Cause::Audit => {
                    tracing::warn!(what, repair = change, "repaired the kernel's state")
                }
            }
        }
        if cause == Cause::Audit {
            OverlayCounters::add(&counters.repairs_total, report.changes.len());
            self.shared.repairs.note(what, &report.changes);
        }
        for why in &report.routed {
            tracing::warn!(what, why, "packets go the routed way, without the fast path");
        }
        for conflict in &report.conflicts {
            tracing::warn!(what, conflict, "something that is not ours is in the way");
        }
        // Those that only stand in for what cannot be read need not be there.
        let lost = report.lost_endpoints.iter().filter(|id| self.plugin.endpoints().contains_key(&id.0));
        for endpoint in lost {
            tracing::warn!(what, %endpoint, "a container has lost its link: only a restart brings it back");
            OverlayCounters::add(&counters.lost_endpoints_total, 1);
        }
    }

    // --- audits ---

    fn changed(&mut self, scopes: Result<Vec<Scope>, netlib::Error>) {
        match scopes {
            Ok(scopes) => {
                if scopes.contains(&Scope::Host) {
                    self.shared.host_changes.send_modify(|count| *count += 1);
                }
                self.dirty.extend(scopes);
                self.audit_at.get_or_insert_with(|| Instant::now() + DEBOUNCE);
            }
            Err(error) => {
                // Opened again by the next full audit, rather than in a loop here.
                tracing::warn!(%error, "lost the watch of the kernel");
                self.watch = None;
            }
        }
    }

    async fn audit_dirty(&mut self) {
        self.audit_at = None;
        let dirty = std::mem::take(&mut self.dirty);
        if !self.applied {
            return;
        }
        if dirty.contains(&Scope::Host) && self.look_at_underlay().await {
            warn_of(self.ensure_all(Cause::Request).await);
            return;
        }
        for scope in dirty {
            let result = match &scope {
                Scope::Host if self.known.is_empty() => Ok(()),
                Scope::Host => self.ensure_host(Cause::Audit).await,
                Scope::Fabric(id) => {
                    let id = NetworkId::new(id.as_str());
                    // One that is unknown is being removed.
                    if self.known.contains_key(&id) { self.ensure_network(&id, Cause::Audit).await } else { Ok(()) }
                }
            };
            warn_of(result);
        }
    }

    async fn audit_all(&mut self) {
        self.write_behind().await;
        if !self.applied {
            return;
        }
        // What another program had may be free now.
        self.hold_ports();
        if self.watch.is_none()
            && let Some(netlib) = &self.netlib
        {
            self.watch = netlib.watch().await.ok();
        }
        self.look_at_underlay().await;
        warn_of(self.ensure_all(Cause::Audit).await);
    }
}

/// What is in the way of a report's network or host.
fn in_the_way(report: &Report) -> impl Iterator<Item = String> {
    report.conflicts.iter().map(|conflict| format!("something that is not ours is in the way: {conflict}"))
}

/// Why it failed, or what is in the way.
fn words_of(result: &Result<Vec<String>, OverlayError>) -> Option<String> {
    match result {
        Ok(words) => words.first().cloned(),
        Err(error) => Some(chain(error)),
    }
}

/// What the watch says; nothing ever without one.
async fn changed(watch: &mut Option<netlib::Watch>) -> Result<Vec<Scope>, netlib::Error> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

fn warn_of(result: Result<(), OverlayError>) {
    if let Err(error) = result {
        tracing::warn!(error = chain(&error), "failed to audit the overlay");
    }
}

#[cfg(test)]
mod tests;
